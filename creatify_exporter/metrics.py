"""The table of metrics, and how what is known of the workspaces becomes an exposition."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from creatify_exporter.listing import Listing
from creatify_exporter.recording import Key, Totals
from creatify_exporter.schema import BOUNDS, bucket_label
from creatify_exporter.tasks import NANO, SECOND

_BOUNDS = [floatToGoString(bound) for bound in BOUNDS]
_FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}


class Metric(NamedTuple):
    """One metric: `type` is gauge, counter or histogram; a counter's name ends in `_total`."""

    name: str
    help: str
    labels: tuple[str, ...] = ("workspace",)
    type: str = "gauge"


_OF_MODEL = ("workspace", "model")
_BY_STATUS = (*_OF_MODEL, "status")
_BY_REASON = (*_OF_MODEL, "reason")

METRICS = (
    Metric("creatify_up", "Whether the newest finished listing succeeded and is not too old."),
    Metric("creatify_text_generator_tasks", "Listed tasks by current status.", _BY_STATUS),
    Metric("creatify_text_generator_failed_tasks", "Listed failed tasks by failure reason.", _BY_REASON),
    Metric("creatify_text_generator_listed_credits", "Sum of credits_used of the listed tasks.", _OF_MODEL),
    Metric(
        "creatify_text_generator_oldest_unfinished_task_timestamp_seconds",
        "When the oldest listed task that is pending or running was created.",
        _BY_STATUS,
    ),
    Metric("creatify_exporter_listing_size_bytes", "Decoded size of the newest listing."),
    Metric("creatify_exporter_malformed_tasks", "Records of the newest listing that could not be used."),
    Metric("creatify_remaining_credits", "Credits left for all products; absent when it could not be read."),
    Metric("creatify_exporter_balance_up", "Whether the newest attempt to read the balance succeeded."),
    Metric("creatify_text_generator_tasks_submitted_total", "Tasks submitted.", _OF_MODEL, "counter"),
    Metric("creatify_text_generator_tasks_finished_total", "Tasks that became done or failed.", _BY_STATUS, "counter"),
    Metric("creatify_text_generator_failures_total", "Tasks that failed, by failure reason.", _BY_REASON, "counter"),
    Metric("creatify_text_generator_credits_used_total", "Credits used.", _OF_MODEL, "counter"),
    Metric(
        "creatify_text_generator_failure_reason_info",
        "Who has to act on a failure reason: caller, account, upstream or unknown; always 1.",
        ("workspace", "reason", "owner"),
    ),
    Metric(
        "creatify_text_generator_task_duration_seconds",
        "updated_at - created_at of finished tasks, as reported by the API.",
        _BY_STATUS,
        "histogram",
    ),
    Metric("creatify_exporter_last_success_timestamp_seconds", "When the last successful listing ended."),
    Metric("creatify_exporter_listing_duration_seconds", "How long the newest finished listing took."),
    Metric(
        "creatify_exporter_listing_errors_total",
        "Failed listings by cause; ledger: it succeeded, but its tasks could not be recorded.",
        ("workspace", "cause"),
        "counter",
    ),
    Metric(
        "creatify_exporter_api_requests_total",
        "Requests sent to the API, by HTTP status or error.",
        ("workspace", "endpoint", "code"),
        "counter",
    ),
    Metric("creatify_exporter_ledger_up", "Whether the ledger answered last time.", ()),
    Metric("creatify_exporter_ledger_tasks", "Tasks the ledger holds."),
    Metric(
        "creatify_exporter_unsettled_tasks",
        "Tasks that left the list before they were finished and are still asked for by id.",
    ),
    Metric(
        "creatify_exporter_backoff_until_timestamp_seconds",
        "Until when requests are held back; only while they are.",
        ("workspace", "endpoint"),
    ),
    Metric(
        "creatify_exporter_clock_offset_seconds", "This machine's clock minus the Date of the newest listing's answer."
    ),
    Metric("creatify_exporter_ledger_start_timestamp_seconds", "When counting began."),
    Metric("creatify_exporter_config_last_reload_successful", "Whether the last reload succeeded.", ()),
    Metric(
        "creatify_exporter_config_last_reload_success_timestamp_seconds", "When the configuration was last loaded.", ()
    ),
    Metric("creatify_exporter_build_info", "The running version; always 1.", ("version", "revision", "python_version")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceView:
    """What one answer says of one workspace.

    `listing` is that of the newest finished listing, by label, and None when it failed with `cause`; `totals` are there
    once the ledger has answered. `balance_up` is None when nobody reads the balance. `backoff` says by endpoint until
    when requests are held back, `owners` by reason who has to act. Times are seconds since the epoch.
    """

    name: str
    up: bool = False
    listing: Listing | None = None
    cause: str | None = None
    finished_at: float | None = None
    duration: float | None = None
    last_success: float | None = None
    clock_offset: float | None = None
    totals: Totals | None = None
    balance: float | None = None
    balance_up: bool | None = None
    errors: Mapping[str, int] = field(default_factory=dict)
    requests: Mapping[tuple[str, str], int] = field(default_factory=dict)
    backoff: Mapping[str, float] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExporterView:
    """What one answer says of the exporter itself."""

    ledger_up: bool
    reload_successful: bool
    reloaded_at: float
    version: str
    revision: str
    python_version: str


class ExporterCollector(Collector):
    """Collect the metric families of some workspaces, and of the exporter itself unless `exporter` is None."""

    def __init__(self, workspaces: Sequence[WorkspaceView], exporter: ExporterView | None) -> None:
        self._workspaces = workspaces
        self._exporter = exporter

    def describe(self) -> list[Family]:
        """Return every family of the table, empty."""
        return list(_families().values())

    def collect(self) -> Iterator[Family]:
        """Yield the families that have samples, in the order of the table."""
        families = _families()
        for workspace in self._workspaces:
            _add_workspace(families, workspace)
            if workspace.up and workspace.listing is not None:
                _add_listing(families, workspace.name, workspace.listing)
            if workspace.totals is not None and workspace.totals.started is not None:
                _add_totals(families, workspace.name, workspace.totals)
        if self._exporter is not None:
            _add_exporter(families, self._exporter)
        yield from (family for family in families.values() if family.samples)


def _families() -> dict[str, Any]:
    return {one.name: _FAMILIES[one.type](one.name, one.help, labels=one.labels) for one in METRICS}


def _add_exporter(families: dict[str, Any], view: ExporterView) -> None:
    build = (view.version, view.revision, view.python_version)
    families["creatify_exporter_ledger_up"].add_metric((), view.ledger_up)
    families["creatify_exporter_config_last_reload_successful"].add_metric((), view.reload_successful)
    families["creatify_exporter_config_last_reload_success_timestamp_seconds"].add_metric((), view.reloaded_at)
    families["creatify_exporter_build_info"].add_metric(build, 1)


def _add_workspace(families: dict[str, Any], view: WorkspaceView) -> None:
    for name, value in {
        "creatify_up": view.up,
        "creatify_remaining_credits": view.balance,
        "creatify_exporter_last_success_timestamp_seconds": view.last_success,
        "creatify_exporter_listing_duration_seconds": view.duration,
        "creatify_exporter_balance_up": view.balance_up,
        "creatify_exporter_clock_offset_seconds": view.clock_offset,
    }.items():
        if value is not None:
            families[name].add_metric((view.name,), value)
    for endpoint, until in view.backoff.items():
        families["creatify_exporter_backoff_until_timestamp_seconds"].add_metric((view.name, endpoint), until)
    for reason, owner in view.owners.items():
        families["creatify_text_generator_failure_reason_info"].add_metric((view.name, reason, owner), 1)
    for cause, count in view.errors.items():
        families["creatify_exporter_listing_errors_total"].add_metric((view.name, cause), count)
    for (endpoint, code), count in view.requests.items():
        families["creatify_exporter_api_requests_total"].add_metric((view.name, endpoint, code), count)


def _add_listing(families: dict[str, Any], name: str, listing: Listing) -> None:
    families["creatify_exporter_listing_size_bytes"].add_metric((name,), listing.size)
    families["creatify_exporter_malformed_tasks"].add_metric((name,), listing.malformed)
    oldest = families["creatify_text_generator_oldest_unfinished_task_timestamp_seconds"]
    credits_: Counter[str] = Counter()
    for (model, status), cell in listing.cells.items():
        credits_[model] += cell.credits
        families["creatify_text_generator_tasks"].add_metric((name, model, status), cell.tasks)
        if cell.oldest is not None:
            oldest.add_metric((name, model, status), cell.oldest / SECOND)
    for model, nano in credits_.items():
        families["creatify_text_generator_listed_credits"].add_metric((name, model), nano / NANO)
    for (model, reason), count in listing.failed.items():
        families["creatify_text_generator_failed_tasks"].add_metric((name, model, reason), count)


_COUNTERS = {
    "submitted": ("creatify_text_generator_tasks_submitted_total", 1),
    "finished": ("creatify_text_generator_tasks_finished_total", 1),
    "failures": ("creatify_text_generator_failures_total", 1),
    "credits": ("creatify_text_generator_credits_used_total", NANO),
}


def _add_totals(families: dict[str, Any], name: str, totals: Totals) -> None:
    families["creatify_exporter_ledger_tasks"].add_metric((name,), totals.tasks)
    families["creatify_exporter_unsettled_tasks"].add_metric((name,), totals.unsettled)
    families["creatify_exporter_ledger_start_timestamp_seconds"].add_metric((name,), (totals.started or 0) / SECOND)
    durations = families["creatify_text_generator_task_duration_seconds"]
    shown = {key: total.value if total.shown else 0 for key, total in totals.series.items()}
    for key, value in shown.items():
        labels = (name, key.model, key.label) if key.label else (name, key.model)
        if key.metric == "duration":
            counts = (shown[Key(key.model, "bucket", bucket_label(key.label, bound))] for bound in BOUNDS)
            durations.add_metric(labels, list(zip(_BOUNDS, accumulate(counts), strict=True)), value / SECOND)
        elif key.metric in _COUNTERS:
            counter, unit = _COUNTERS[key.metric]
            task_id = totals.series[key].exemplar if totals.series[key].shown else None
            exemplar = Exemplar({"task_id": task_id}, 1) if task_id else None
            families[counter].add_metric(labels, value / unit, exemplar=exemplar)


def render(workspaces: Sequence[WorkspaceView], exporter: ExporterView | None, *, openmetrics: bool) -> bytes:
    """Return the exposition: OpenMetrics 1.0.0, or text format 0.0.4.

    With `exporter`, the process and Python metrics come along.
    """
    registry = CollectorRegistry()
    registry.register(ExporterCollector(workspaces, exporter))
    if exporter is not None:
        for standard in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            registry.register(standard)
    return generate_openmetrics(registry) if openmetrics else generate_latest(registry)
