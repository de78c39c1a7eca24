"""Dashboard and alerts at work: the real exporter, a real Prometheus, a real Alertmanager."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from creatify_exporter.demo import CREDENTIALS
from tests.support import rules
from tests.support.commands import output
from tests.support.exporter import ROOT, Exporter
from tests.support.grafana import Target, labels_of, load, substitute, targets
from tests.support.packages import require
from tests.support.processes import eventually
from tests.support.prometheus import Alertmanager, Prometheus, Series, Webhook
from tests.support.simulation import SimulatedApi, Simulation

pytestmark = pytest.mark.process

DASHBOARD = load()
TARGETS = targets(DASHBOARD)
VARIABLES = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
ANNOTATIONS = DASHBOARD["annotations"]["list"]

# Panels with a line for each workspace or replica: the demo has one of either.
ONE_LINE_EACH = (
    "Balance (credits)",
    "Listing time",
    "Listing size",
    "Tasks in the ledger",
    "Malformed records",
    "Memory",
    "CPU",
)
# What is about trouble that the demo does not have, or about more than happens in one second of it.
WITHOUT_DATA = {
    *(f"Firing alerts ({ref})" for ref in "ABCD"),
    *(f"Alerts that fire ({ref})" for ref in "AB"),
    *(f"Failed (15 min) ({ref})" for ref in "AB"),
    *(f"Failure ratio by model ({ref})" for ref in "ABCDEFGH"),
    *(f"Workspaces ({ref})" for ref in "GJ"),  # a share of enough tasks, and how long credits last
    *(f"Credits used by model ({ref})" for ref in "EFGHI"),
    *(f"Credits per finished task ({ref})" for ref in "EFGH"),
    *(f"What the exporter knows of each workspace ({ref})" for ref in "BF"),
    *(f"{title} ({ref})" for title in ONE_LINE_EACH for ref in "BCDEFGHI"),  # of further workspaces and replicas
}
# What is about each replica.
BY_INSTANCE = {"Replicas", "Memory", "CPU"}
MINUTE = 60.0


def configuration(directory: Path, exporter: Exporter, alertmanager: Alertmanager | None = None) -> dict[str, Any]:
    """Return a Prometheus configuration that scrapes every second, with the rules in fast motion."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "alerts.yml").write_text(yaml.safe_dump(rules.fast_motion()), encoding="utf-8")
    own: dict[str, Any] = yaml.safe_load((ROOT / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    own["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    own["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{exporter.port}"]}]
    if alertmanager is None:
        del own["alerting"]
    else:
        address = alertmanager.url.removeprefix("http://")
        own["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [address]}]}]
    return own


@dataclass(frozen=True)
class Live:
    """A Prometheus that scrapes the demo, and when it began."""

    prometheus: Prometheus
    began: float

    def within_a_minute(self) -> float:
        """Return how many seconds of the first minute are left, and some for a busy machine."""
        return max(self.began + MINUTE - time.monotonic(), 15.0)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("live")
    with Exporter(directory / "exporter", "--demo") as exporter:
        began = time.monotonic()
        scraping = configuration(directory, exporter)
        with Prometheus(directory, scraping, *rules.FLAGS) as prometheus:
            yield Live(prometheus, began)


def ask(prometheus: Prometheus, target: Target, at: float, variables: Mapping[str, str] | None = None) -> list[Series]:
    """Return what Grafana would get for a query, with the last minute as its time range."""
    expression = substitute(target.expr, scrape=1, interval=1, time_range=MINUTE, variables=variables)
    if target.instant:
        return prometheus.query(expression, at)
    return prometheus.query_range(expression, at - MINUTE, at, 1)


def with_values(series: list[Series]) -> list[Series]:
    """Return the series that have a value that can be drawn."""
    return [each for each in series if any(math.isfinite(value) for _, value in each.points)]


def test_what_may_be_without_data_is_there() -> None:
    assert {str(target) for target in TARGETS} >= WITHOUT_DATA


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_panel_shows_data_and_its_legend_within_a_minute_of_the_demo(live: Live, target: Target) -> None:
    if str(target) in WITHOUT_DATA:
        ask(live.prometheus, target, time.time())
        return
    series = eventually(
        lambda: with_values(ask(live.prometheus, target, time.time())), live.within_a_minute(), str(target)
    )
    for each in series:
        assert labels_of(target.legend) <= each.labels.keys()


@pytest.mark.parametrize("query", VARIABLES)
def test_every_variable_offers_something(live: Live, query: str) -> None:
    selector, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
    selector = substitute(selector, scrape=1, interval=1, time_range=MINUTE)
    offered = eventually(lambda: live.prometheus.label_values(label, selector), live.within_a_minute(), query)
    assert all(offered)


@pytest.mark.parametrize("annotation", ANNOTATIONS, ids=lambda annotation: str(annotation["name"]))
def test_alerts_and_starts_are_annotated(live: Live, annotation: Mapping[str, Any]) -> None:
    expression = substitute(annotation["expr"], scrape=1, interval=1, time_range=MINUTE)

    def marked() -> list[Series]:
        return live.prometheus.query_range(expression, time.time() - MINUTE, time.time(), 1)

    # Whether the demo raises an alert in its first minute is left to chance; its start is certain.
    series = marked() if "Alerts" in annotation["name"] else eventually(marked, live.within_a_minute(), "a mark")
    assert all({annotation["tagKeys"]} <= each.labels.keys() for each in series)


def test_the_rules_run_without_an_error_on_the_demo(live: Live) -> None:
    def all_evaluated() -> bool:
        return all(rule["health"] != "unknown" for rule in live.prometheus.rules())

    eventually(all_evaluated, live.within_a_minute(), "every rule evaluated")
    assert {rule["name"]: rule.get("lastError") for rule in live.prometheus.rules() if rule["health"] != "ok"} == {}


def test_a_second_replica_changes_no_panel(live: Live, tmp_path: Path) -> None:
    """Write what was scraped once more, as of a second instance, and ask every panel about one and about both."""
    prometheus, promtool = live.prometheus, require("promtool")[0]

    def complete() -> bool:
        drawn = (ask(prometheus, target, time.time()) for target in TARGETS if str(target) not in WITHOUT_DATA)
        return all(map(with_values, drawn))

    eventually(complete, live.within_a_minute(), "data in every panel")
    at = time.time()
    samples = [
        ({**series.labels, "instance": instance}, series.points)
        for series in prometheus.query('{job="creatify"}[90s]', at)
        for instance in ("one", "two")
    ]
    backfill(promtool, tmp_path, samples)
    differ, compared, lines = [], 0, {title: [0, 0] for title in BY_INSTANCE}
    with Prometheus(tmp_path, {"global": {"scrape_interval": "1s"}}, *rules.FLAGS) as backfilled:
        for target in TARGETS:
            one = shown(ask(backfilled, target, at, {"instance": "one"}))
            both = shown(ask(backfilled, target, at, {"instance": ".+"}))
            if of_panel := lines.get(target.panel["title"]):  # one query for each place: only together they show all
                of_panel[0] += len(one)
                of_panel[1] += len(both)
            elif one != both:
                differ.append(str(target))
            else:
                compared += bool(one)
    assert differ == []
    assert all(of_both == 2 * of_one > 0 for of_one, of_both in lines.values()), lines
    of_replicas = [target for target in TARGETS if target.panel["title"] in BY_INSTANCE]
    assert compared > len(TARGETS) - len(of_replicas) - len(WITHOUT_DATA) - 2


def backfill(
    promtool: str, directory: Path, samples: Iterable[tuple[Mapping[str, str], Sequence[tuple[float, float]]]]
) -> None:
    """Write series, as labels and points, to where a Prometheus of this directory keeps its data."""
    lines = []
    for labels, points in samples:
        selector = ",".join(f'{name}="{value}"' for name, value in labels.items() if name != "__name__")
        lines += [f"{labels['__name__']}{{{selector}}} {value!r} {moment:.3f}" for moment, value in points]
    exposition = directory / "samples.txt"
    exposition.write_text("\n".join([*lines, "# EOF\n"]), encoding="utf-8")
    output(promtool, "tsdb", "create-blocks-from", "openmetrics", exposition, directory / "tsdb")


def shown(series: list[Series]) -> dict[str, list[tuple[float, str]]]:
    """Return series as they would be drawn: comparable where a value is NaN, or added up in another order."""
    return {str(sorted(each.labels.items())): [(at, f"{value:.9g}") for at, value in each.points] for each in series}


# What happens in a minute, on one model; the balance falls by what is used.
SUBMITTED, DONE, FAILED, CREDITS, BALANCE = 10, 8, 2, 5, 6000
# Three minutes are between two points.
TRUTH = {
    "Failed (15 min) (A)": FAILED / (DONE + FAILED),
    "Credits last (A)": BALANCE / CREDITS * 60,
    "Workspaces (E)": (DONE + FAILED) * 60,
    "Workspaces (F)": FAILED * 60,
    "Workspaces (G)": FAILED / (DONE + FAILED),
    "Workspaces (H)": BALANCE,
    "Workspaces (I)": CREDITS * 60,
    "Workspaces (J)": BALANCE / CREDITS * 60,
    "Submitted and finished tasks (B)": SUBMITTED * 3,
    "Failures by owner (A)": FAILED * 3,
    "Failures by reason (A)": FAILED * 3,
    "Failures by reason (B)": FAILED * 3,
    "Failure ratio by model (A)": FAILED / (DONE + FAILED),
    "Reasons over the time range (A)": FAILED * 180,
    "Credits used by model (A)": CREDITS * 3,
    "Credits per finished task (A)": CREDITS / (DONE + FAILED),
    "Models over the time range (A)": SUBMITTED * 180,
    "Models over the time range (B)": DONE * 180,
    "Models over the time range (C)": FAILED * 180,
    "Models over the time range (D)": FAILED / (DONE + FAILED),
    "Models over the time range (F)": CREDITS * 180,
    "Task duration, as reported by the API (A)": 7.5,
}


@pytest.mark.parametrize("scrape", [15, 60])
def test_panels_show_the_truth_of_two_replicas_at_15_and_at_60_seconds(tmp_path: Path, scrape: int) -> None:
    at, span = float(int(time.time()) // 60 * 60), 4 * 3600
    moments = range(-span, scrape, scrape)

    def series(name: str, per_minute: float, last: float | None = None, **labels: str) -> Any:
        first = 0 if last is None else last - per_minute * span / 60
        points = [(at + moment, first + per_minute * (moment + span) / 60) for moment in moments]
        common = {"__name__": f"creatify_{name}", "job": "creatify", "workspace": "w"}
        return [({**common, "instance": instance, **labels}, points) for instance in ("one", "two")]

    samples = [
        *series("up", 0, 1),
        *series("text_generator_failure_reason_info", 0, 1, reason="overloaded", owner="upstream"),
        *series("remaining_credits", -CREDITS, BALANCE),
        *series("text_generator_tasks_submitted_total", SUBMITTED, model="m"),
        *series("text_generator_tasks_finished_total", DONE, model="m", status="done"),
        *series("text_generator_tasks_finished_total", FAILED, model="m", status="failed"),
        *series("text_generator_failures_total", FAILED, model="m", reason="overloaded"),
        *series("text_generator_failures_total", 0, model="m", reason="timeout"),
        *series("text_generator_credits_used_total", CREDITS, model="m"),
    ]
    for le, count in (("5.0", 0), ("10.0", DONE), ("+Inf", DONE)):
        name = "text_generator_task_duration_seconds_bucket"
        samples += series(name, count, model="m", status="done", le=le)
    backfill(require("promtool")[0], tmp_path, samples)
    found = {}
    with Prometheus(tmp_path, {"global": {"scrape_interval": "60s"}}) as prometheus:
        for target in TARGETS:
            expression = substitute(target.expr, scrape=scrape, interval=180, time_range=3 * 3600)
            answer = with_values(prometheus.query(expression, at))
            if str(target) in TRUTH:
                (found[str(target)],) = (each.value for each in answer)
    assert found == pytest.approx(TRUTH, rel=1e-6)


def notifying(webhook: Webhook) -> dict[str, Any]:
    """Return the example configuration of Alertmanager, made quick, with a webhook as its receiver."""
    own: dict[str, Any] = yaml.safe_load((ROOT / "prometheus" / "alertmanager.yml").read_text(encoding="utf-8"))
    del own["global"]
    own["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    sending = {"webhook_configs": [{"url": webhook.url, "send_resolved": True}]}
    own["receivers"] = [{"name": receiver["name"], **sending} for receiver in own["receivers"]]
    return own


def test_a_failure_spike_is_notified_and_resolved_from_the_task_to_the_webhook(tmp_path: Path) -> None:
    simulation = Simulation(5, time.time(), rate=6.0, history=100, window=300, record_size=600, media_share=0)
    config = {
        "workspaces": [{"name": "studio", "api_id": CREDENTIALS[0], "api_key": CREDENTIALS[1]}],
        "exposition": {"zero_hold": "0s"},
    }
    with (
        SimulatedApi({CREDENTIALS: simulation}) as api,
        Webhook() as webhook,
        Alertmanager(tmp_path / "alertmanager", notifying(webhook)) as alertmanager,
        Exporter(tmp_path / "exporter", config=config | {"api": {"base_url": api.url}}) as exporter,
        Prometheus(tmp_path, configuration(tmp_path, exporter, alertmanager), *rules.FLAGS) as prometheus,
    ):
        ratio = 'sum(workspace:creatify_text_generator_tasks_finished:increase{window="15m"}) > 30'
        eventually(lambda: prometheus.query(ratio), 90, "a full window of ordinary work")
        assert "CreatifyFailureSpike" not in prometheus.firing()

        simulation.spike(time.time(), 25)
        sent = webhook.wait_for(about("CreatifyFailureSpike", "firing"), 60)
        (alert,) = sent["alerts"]
        assert alert["labels"] == {
            "alertname": "CreatifyFailureSpike",
            "severity": "critical",
            "workspace": "studio",
        }
        assert " tasks that finished in the last 15m failed" in alert["annotations"]["description"]
        assert "Most often: overloaded" in alert["annotations"]["description"]
        assert alert["annotations"]["runbook_url"].endswith("docs/runbook.md#creatifyfailurespike")
        assert alert["annotations"]["dashboard_url"].endswith("/d/creatify-text-generator?var-workspace=studio")

        webhook.wait_for(about("CreatifyFailureSpike", "resolved"), 90)
        assert "CreatifyFailureSpike" not in prometheus.firing()


def about(name: str, status: str) -> Any:
    """Return what accepts a notification of an alert in a state."""

    def accepted(notification: dict[str, Any]) -> bool:
        return any(
            alert["labels"]["alertname"] == name and alert["status"] == status for alert in notification["alerts"]
        )

    return accepted
