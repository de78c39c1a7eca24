"""The table of metrics, and how what is known of the workspaces becomes an exposition."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry, generate_latest
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


class Metric(NamedTuple):
    """One metric: `type` is gauge, counter or histogram; a counter's name ends in `_total`."""

    name: str
    type: str
    help: str
    labels: tuple[str, ...] = ("workspace",)


_OF_MODEL = ("workspace", "model")
_BY_STATUS = (*_OF_MODEL, "status")
_BY_REASON = (*_OF_MODEL, "reason")

METRICS = (
    Metric("creatify_up", "gauge", "Whether the newest finished listing succeeded and is not too old."),
    Metric("creatify_text_generator_tasks", "gauge", "Listed tasks by current status.", _BY_STATUS),
    Metric("creatify_text_generator_failed_tasks", "gauge", "Listed failed tasks by failure reason.", _BY_REASON),
    Metric("creatify_text_generator_listed_credits", "gauge", "Sum of credits_used of the listed tasks.", _OF_MODEL),
    Metric(
        "creatify_text_generator_oldest_unfinished_task_timestamp_seconds",
        "gauge",
        "When the oldest listed task that is pending or running was created.",
        _BY_STATUS,
    ),
    Metric("creatify_exporter_listing_size_bytes", "gauge", "Decoded size of the newest listing."),
    Metric("creatify_exporter_malformed_tasks", "gauge", "Records of the newest listing that could not be used."),
    Metric("creatify_remaining_credits", "gauge", "Credits left for all products; absent when it could not be read."),
    Metric("creatify_exporter_balance_up", "gauge", "Whether the newest attempt to read the balance succeeded."),
    Metric("creatify_text_generator_tasks_submitted_total", "counter", "Tasks submitted.", _OF_MODEL),
    Metric("creatify_text_generator_tasks_finished_total", "counter", "Tasks that became done or failed.", _BY_STATUS),
    Metric("creatify_text_generator_failures_total", "counter", "Tasks that failed, by failure reason.", _BY_REASON),
    Metric("creatify_text_generator_credits_used_total", "counter", "Credits used.", _OF_MODEL),
    Metric(
        "creatify_text_generator_failure_reason_info",
        "gauge",
        "Who has to act on a failure reason: caller, account, upstream or unknown; always 1.",
        ("workspace", "reason", "owner"),
    ),
    Metric(
        "creatify_text_generator_task_duration_seconds",
        "histogram",
        "updated_at - created_at of finished tasks, as reported by the API.",
        _BY_STATUS,
    ),
    Metric("creatify_exporter_last_success_timestamp_seconds", "gauge", "When the last successful listing ended."),
    Metric("creatify_exporter_listing_duration_seconds", "gauge", "How long the newest finished listing took."),
    Metric(
        "creatify_exporter_listing_errors_total",
        "counter",
        "Failed listings by cause; ledger: it succeeded, but its tasks could not be recorded.",
        ("workspace", "cause"),
    ),
    Metric(
        "creatify_exporter_api_requests_total",
        "counter",
        "Requests sent to the API, by HTTP status or error.",
        ("workspace", "endpoint", "code"),
    ),
    Metric("creatify_exporter_ledger_up", "gauge", "Whether the ledger answered last time.", ()),
    Metric("creatify_exporter_ledger_tasks", "gauge", "Tasks the ledger holds."),
    Metric(
        "creatify_exporter_unsettled_tasks",
        "gauge",
        "Tasks that left the list before they were finished and are still asked for by id.",
    ),
    Metric(
        "creatify_exporter_backoff_until_timestamp_seconds",
        "gauge",
        "Until when requests are held back; only while they are.",
        ("workspace", "endpoint"),
    ),
    Metric(
        "creatify_exporter_clock_offset_seconds",
        "gauge",
        "This machine's clock minus the Date of the newest listing's answer.",
    ),
    Metric("creatify_exporter_ledger_start_timestamp_seconds", "gauge", "When counting began."),
    Metric("creatify_exporter_config_last_reload_successful", "gauge", "Whether the last reload succeeded.", ()),
    Metric(
        "creatify_exporter_config_last_reload_success_timestamp_seconds",
        "gauge",
        "When the configuration was last loaded.",
        (),
    ),
    Metric(
        "creatify_exporter_build_info",
        "gauge",
        "The running version; always 1.",
        ("version", "revision", "python_version"),
    ),
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
        return _Samples().families()

    def collect(self) -> Iterator[Family]:
        """Yield the families that have samples, in the order of the table."""
        samples = _Samples()
        for workspace in self._workspaces:
            _add_workspace(samples, workspace)
            if workspace.up and workspace.listing is not None:
                _add_listing(samples, workspace.name, workspace.listing)
            if workspace.totals is not None and workspace.totals.started is not None:
                _add_totals(samples, workspace.name, workspace.totals)
        if self._exporter is not None:
            _add_exporter(samples, self._exporter)
        yield from (family for family in samples.families() if family.samples)


class _Samples:
    """The families of the table, and how samples get into them."""

    def __init__(self) -> None:
        self._families = {
            metric.name: (metric, Family(metric.name.removesuffix("_total"), metric.help, metric.type))
            for metric in METRICS
        }

    def families(self) -> list[Family]:
        return [family for _, family in self._families.values()]

    def add(self, name: str, values: Sequence[str], value: float | None, exemplar: str | None = None) -> None:
        if value is not None:
            metric, family = self._families[name]
            newest = Exemplar({"task_id": exemplar}, 1) if exemplar else None
            family.add_sample(name, dict(zip(metric.labels, values, strict=True)), value, exemplar=newest)

    def add_histogram(self, name: str, values: Sequence[str], counts: Sequence[int], total: float) -> None:
        metric, family = self._families[name]
        labels = dict(zip(metric.labels, values, strict=True))
        for bound, count in zip(_BOUNDS, accumulate(counts), strict=True):
            family.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
        family.add_sample(f"{name}_count", labels, sum(counts))
        family.add_sample(f"{name}_sum", labels, total)


def _add_exporter(samples: _Samples, view: ExporterView) -> None:
    samples.add("creatify_exporter_ledger_up", (), view.ledger_up)
    samples.add("creatify_exporter_config_last_reload_successful", (), view.reload_successful)
    samples.add("creatify_exporter_config_last_reload_success_timestamp_seconds", (), view.reloaded_at)
    samples.add("creatify_exporter_build_info", (view.version, view.revision, view.python_version), 1)


def _add_workspace(samples: _Samples, view: WorkspaceView) -> None:
    samples.add("creatify_up", (view.name,), view.up)
    samples.add("creatify_remaining_credits", (view.name,), view.balance)
    samples.add("creatify_exporter_last_success_timestamp_seconds", (view.name,), view.last_success)
    samples.add("creatify_exporter_listing_duration_seconds", (view.name,), view.duration)
    samples.add("creatify_exporter_balance_up", (view.name,), view.balance_up)
    samples.add("creatify_exporter_clock_offset_seconds", (view.name,), view.clock_offset)
    for endpoint, until in view.backoff.items():
        samples.add("creatify_exporter_backoff_until_timestamp_seconds", (view.name, endpoint), until)
    for reason, owner in view.owners.items():
        samples.add("creatify_text_generator_failure_reason_info", (view.name, reason, owner), 1)
    for cause, count in view.errors.items():
        samples.add("creatify_exporter_listing_errors_total", (view.name, cause), count)
    for (endpoint, code), count in view.requests.items():
        samples.add("creatify_exporter_api_requests_total", (view.name, endpoint, code), count)


def _add_listing(samples: _Samples, name: str, listing: Listing) -> None:
    samples.add("creatify_exporter_listing_size_bytes", (name,), listing.size)
    samples.add("creatify_exporter_malformed_tasks", (name,), listing.malformed)
    credits_: Counter[str] = Counter()
    for (model, status), cell in listing.cells.items():
        credits_[model] += cell.credits
        samples.add("creatify_text_generator_tasks", (name, model, status), cell.tasks)
        oldest = None if cell.oldest is None else cell.oldest / SECOND
        samples.add("creatify_text_generator_oldest_unfinished_task_timestamp_seconds", (name, model, status), oldest)
    for model, nano in credits_.items():
        samples.add("creatify_text_generator_listed_credits", (name, model), nano / NANO)
    for (model, reason), count in listing.failed.items():
        samples.add("creatify_text_generator_failed_tasks", (name, model, reason), count)


def _add_totals(samples: _Samples, name: str, totals: Totals) -> None:
    samples.add("creatify_exporter_ledger_tasks", (name,), totals.tasks)
    samples.add("creatify_exporter_unsettled_tasks", (name,), totals.unsettled)
    samples.add("creatify_exporter_ledger_start_timestamp_seconds", (name,), (totals.started or 0) / SECOND)
    shown = {key: total.value if total.shown else 0 for key, total in totals.series.items()}
    for key, value in shown.items():
        if key.metric == "submitted":
            samples.add("creatify_text_generator_tasks_submitted_total", (name, key.model), value)
        elif key.metric == "finished":
            samples.add("creatify_text_generator_tasks_finished_total", (name, key.model, key.label), value)
        elif key.metric == "failures":
            exemplar = totals.series[key].exemplar if totals.series[key].shown else None
            samples.add("creatify_text_generator_failures_total", (name, key.model, key.label), value, exemplar)
        elif key.metric == "credits":
            samples.add("creatify_text_generator_credits_used_total", (name, key.model), value / NANO)
        elif key.metric == "duration":
            counts = [shown[Key(key.model, "bucket", bucket_label(key.label, bound))] for bound in BOUNDS]
            labels = (name, key.model, key.label)
            samples.add_histogram("creatify_text_generator_task_duration_seconds", labels, counts, value / SECOND)


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
