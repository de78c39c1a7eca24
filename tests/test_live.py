"""Dashboard and alerts at work: the real exporter, a real Prometheus, a real Alertmanager."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from creatify_exporter.simulator import CREDENTIALS, SimulatedApi, Simulation
from tests.support import rules
from tests.support.commands import output
from tests.support.exporter import ROOT, Exporter
from tests.support.grafana import Target, labels_of, load, seconds, substitute, targets
from tests.support.packages import require
from tests.support.processes import eventually
from tests.support.prometheus import Alertmanager, Prometheus, Series, Webhook

pytestmark = pytest.mark.process

DASHBOARD = load()
TARGETS = targets(DASHBOARD)
VARIABLES = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
(ANNOTATION,) = DASHBOARD["annotations"]["list"]

# What is about trouble that the demo does not have.
WITHOUT_DATA = {"Models, and overflow into other ({{workspace}} tasks in other)"}
# What is about each replica.
BY_INSTANCE = {"Ledger", "Memory", "CPU"}
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
    interval = seconds(target.panel.get("interval", "1s"))
    expression = substitute(target.expr, scrape=1, interval=interval, time_range=MINUTE, variables=variables)
    if target.instant:
        return prometheus.query(expression, at)
    return prometheus.query_range(expression, at - MINUTE, at, 1)


def with_values(series: list[Series]) -> list[Series]:
    """Return the series that have a value that can be drawn."""
    return [each for each in series if any(math.isfinite(value) for _, value in each.points)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_panel_shows_data_and_its_legend_within_a_minute_of_the_demo(live: Live, target: Target) -> None:
    if str(target) in WITHOUT_DATA:
        assert with_values(ask(live.prometheus, target, time.time())) == []
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


def test_alerts_are_annotated(live: Live) -> None:
    expression = substitute(ANNOTATION["expr"], scrape=1, interval=1, time_range=MINUTE)
    series = eventually(
        lambda: live.prometheus.query_range(expression, time.time() - MINUTE, time.time(), 1),
        live.within_a_minute(),
        "an annotation",
    )
    wanted = labels_of(ANNOTATION["titleFormat"]) | {ANNOTATION["tagKeys"]}
    assert all(wanted <= each.labels.keys() for each in series)


def test_the_rules_run_without_an_error_on_the_demo(live: Live) -> None:
    def all_evaluated() -> bool:
        return all(rule["health"] != "unknown" for rule in live.prometheus.rules())

    eventually(all_evaluated, live.within_a_minute(), "every rule evaluated")
    assert {rule["name"]: rule.get("lastError") for rule in live.prometheus.rules() if rule["health"] != "ok"} == {}


def test_a_second_replica_changes_no_panel(live: Live, tmp_path: Path) -> None:
    """Write what was scraped once more, as of a second instance, and ask every panel about one and about both."""
    prometheus, promtool = live.prometheus, require("promtool")[0]
    eventually(lambda: live.prometheus.query("ALERTS"), live.within_a_minute(), "an alert")
    at = time.time()
    lines = []
    for series in prometheus.query('{job="creatify"}[90s]', at):
        for instance in ("one", "two"):
            labels = {**series.labels, "instance": instance}
            name = labels.pop("__name__")
            selector = ",".join(f'{label}="{value}"' for label, value in labels.items())
            lines += [f"{name}{{{selector}}} {value!r} {moment:.3f}" for moment, value in series.points]
    samples = tmp_path / "samples.txt"
    samples.write_text("\n".join([*lines, "# EOF\n"]), encoding="utf-8")
    output(promtool, "tsdb", "create-blocks-from", "openmetrics", samples, tmp_path / "tsdb")
    differ, compared = [], 0
    with Prometheus(tmp_path, {"global": {"scrape_interval": "1s"}}, *rules.FLAGS) as backfilled:
        for target in TARGETS:
            one = shown(ask(backfilled, target, at, {"instance": "one"}))
            both = shown(ask(backfilled, target, at, {"instance": ".+"}))
            if target.panel["title"] in BY_INSTANCE:
                assert len(both) == 2 * len(one) > 0
            elif one != both:
                differ.append(str(target))
            else:
                compared += bool(one)
    assert differ == []
    assert compared > len(TARGETS) - len(BY_INSTANCE) - len(WITHOUT_DATA) - 2


def shown(series: list[Series]) -> dict[str, list[tuple[float, str]]]:
    """Return series as they would be drawn: comparable where a value is NaN, or added up in another order."""
    return {str(sorted(each.labels.items())): [(at, f"{value:.9g}") for at, value in each.points] for each in series}


def notifying(webhook: Webhook) -> dict[str, Any]:
    """Return the example configuration of Alertmanager, made quick, with a webhook as its receiver."""
    own: dict[str, Any] = yaml.safe_load((ROOT / "prometheus" / "alertmanager.yml").read_text(encoding="utf-8"))
    own["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    own["receivers"][0]["webhook_configs"] = [{"url": webhook.url, "send_resolved": True}]
    return own


def test_a_failure_spike_is_notified_and_resolved_from_the_task_to_the_webhook(tmp_path: Path) -> None:
    simulation = Simulation(5, time.time(), rate=6.0, history=100, window=2000, spikes=False)
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
        ratio = "sum(workspace_model_status:creatify_text_generator_tasks_finished:increase15m) > 30"
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
        assert "% of the tasks that finished" in alert["annotations"]["description"]
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
