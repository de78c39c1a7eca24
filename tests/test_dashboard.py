"""The dashboard is sound and tells the truth.

The rules of Grafana's own dashboard linter, what users of dashboards complain about, and then every query of every
panel on a real Prometheus, in each situation of tests/support/history.py.
"""

import colorsys
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from creatify_exporter.reasons import BUILT_IN
from tests.support import history
from tests.support.commands import output
from tests.support.exporter import ROOT
from tests.support.grafana import (
    GRAFANA,
    Shown,
    Target,
    labels_of,
    legend,
    load,
    panels,
    properties,
    seconds,
    stat,
    step,
    substitute,
    table,
    targets,
    targets_of,
)
from tests.support.history import SCENARIOS, Scenario, by_name, end_of
from tests.support.packages import require
from tests.support.prometheus import Prometheus, Series
from tests.support.promql import counters, innermost_aggregations, known_labels, matched_labels, nodes, selectors

DASHBOARD = load()
PANELS = panels(DASHBOARD)
BY_TITLE = {panel["title"]: panel for panel in PANELS}
TARGETS = targets(DASHBOARD)
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
QUERIES = {name: variable for name, variable in VARIABLES.items() if variable["type"] == "query"}
ANNOTATIONS = {annotation["name"]: annotation for annotation in DASHBOARD["annotations"]["list"]}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"string", "short", "percentunit", "s", "cpm", "bytes", "locale", "dateTimeFromNow"}
DOCS = "https://github.com/creatify-exporter/creatify-exporter/blob/main/"
# What Prometheus itself writes: its labels are those of the rules, and an absent label is an empty one.
OF_RULES = {"ALERTS", "ALERTS_FOR_STATE", "creatify:dashboard:info"}
NEUTRAL = "#6c7280"
# A row of Grafana's grid is 30 pixels high, with 8 between two.
PIXELS = 38

each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)


def concrete(expr: str) -> str:
    """Return a query with its variables put in."""
    return substitute(expr, scrape=60, interval=60, time_range=6 * 3600)


def labels_known(name: str) -> set[str]:
    """Return the labels of a series, of the process too."""
    return {"job", "instance"} if name == "process_start_time_seconds" else known_labels(name)


def options_of(panel: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the options of all fields of a panel: its own, and those of each override."""
    overrides = panel["fieldConfig"]["overrides"]
    return [panel["fieldConfig"]["defaults"], *({p["id"]: p["value"] for p in o["properties"]} for o in overrides)]


def test_generating_the_dashboard_again_changes_nothing() -> None:
    generated = json.loads(output(sys.executable, GRAFANA / "generate.py", "--print"))
    assert len(generated) == 3
    for path, text in generated.items():
        assert (GRAFANA / path).read_text(encoding="utf-8") == text, f"{path} is stale: run make generate"


# ---- The dashboard as a whole, and the ways to get it


def test_the_dashboard_is_provisioned_as_it_is() -> None:
    assert DASHBOARD["uid"] == "creatify-text-generator"
    assert DASHBOARD["schemaVersion"] >= 39
    assert not {"__inputs", "__requires", "id", "gnetId"} & DASHBOARD.keys()
    assert "${DS_" not in json.dumps(DASHBOARD)


def test_the_export_asks_for_the_data_source_and_has_the_same_panels() -> None:
    export = load(GRAFANA / "export" / "creatify-text-generator.json")
    (asked,) = export["__inputs"]
    assert (asked["name"], asked["type"], asked["pluginId"]) == ("DS_PROMETHEUS", "datasource", "prometheus")
    required = {(r["type"], r["id"]) for r in export["__requires"]}
    assert required == {("grafana", "grafana"), ("datasource", "prometheus")} | {("panel", p["type"]) for p in PANELS}
    assert export["id"] is None
    source, *others = export["templating"]["list"]
    assert source["current"]["value"] == "${DS_PROMETHEUS}"
    assert others == DASHBOARD["templating"]["list"][1:]
    for key in ("panels", "annotations", "links", "title", "uid", "time"):
        assert export[key] == DASHBOARD[key]
    assert set(re.findall(r"\$\{DS_\w+\}", json.dumps(export))) == {"${DS_PROMETHEUS}"}


def test_the_config_map_is_found_by_the_sidecar_and_holds_the_same_dashboard() -> None:
    text = (GRAFANA / "kubernetes" / "dashboard.yaml").read_text(encoding="utf-8")
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("v1", "ConfigMap")
    assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {name: json.loads(data) for name, data in manifest["data"].items()} == {
        "creatify-text-generator.json": DASHBOARD
    }
    # kubectl apply keeps a copy of what it applied in an annotation, and annotations have 256 KiB.
    assert len(text) < 230_000


def test_the_data_source_knows_the_scrape_interval() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    prometheus = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert seconds(prometheus["global"]["scrape_timeout"]) < seconds(prometheus["global"]["scrape_interval"])


def test_the_dashboard_is_provisioned_from_where_it_is_mounted() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/creatify.yml").read_text())["providers"]
    assert provider["type"] == "file"
    compose = (ROOT / "deploy/compose.yaml").read_text()
    assert f"../grafana/dashboards:{provider['options']['path']}:ro" in compose
    assert [path.name for path in (GRAFANA / "dashboards").iterdir()] == ["creatify-text-generator.json"]


def test_the_dashboard_has_browser_time_shared_crosshair_tags_and_cannot_be_edited_by_accident() -> None:
    assert DASHBOARD["timezone"] == "browser"
    assert DASHBOARD["graphTooltip"] == 1
    assert DASHBOARD["tags"]
    assert DASHBOARD["editable"] is False


def test_the_first_screen_comes_first_and_the_exporter_last_and_collapsed() -> None:
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows] == ["Work", "Failures", "Credits", "Models", "Exporter"]
    assert [row["collapsed"] for row in rows] == [False, False, False, False, True]
    assert rows[-1]["panels"]
    top = [panel["title"] for panel in PANELS if panel["gridPos"]["y"] < rows[0]["gridPos"]["y"]]
    assert top == [
        *("Firing alerts", "Workspaces down", "Ledger", "Failed (15 min)", "Oldest unfinished", "Credits last"),
        *("Workspaces", "Alerts that fire"),
    ]


def test_links_lead_to_the_documents_and_the_exporter() -> None:
    for path in re.findall(re.escape(DOCS) + r"([\w./-]+)", json.dumps(DASHBOARD)):
        assert (ROOT / path).is_file(), path
    assert {link["title"] for link in DASHBOARD["links"]} == {"Metrics", "Runbook", "Exporter"}


def test_critical_alerts_warnings_and_starts_of_the_exporter_are_annotations_in_colours_of_their_own() -> None:
    assert {name: a["iconColor"] for name, a in ANNOTATIONS.items()} == {
        "Alerts: critical": "red",
        "Alerts: warning": "orange",
        "Exporter started": "blue",
    }
    for annotation in ANNOTATIONS.values():
        assert annotation["datasource"] == SOURCE
        assert annotation["enable"]
        for aggregation in nodes(concrete(annotation["expr"])):
            if isinstance(aggregation, promql_parser.AggregateExpr):
                kept = set(aggregation.modifier.labels) if aggregation.modifier else set()
                assert labels_of(annotation["titleFormat"] + annotation["textFormat"]) | {annotation["tagKeys"]} <= kept


def test_every_id_is_unique() -> None:
    everything = [p["id"] for panel in DASHBOARD["panels"] for p in (panel, *panel.get("panels", []))]
    assert [number for number, count in Counter(everything).items() if count > 1] == []


def test_no_two_panels_overlap() -> None:
    cells: Counter[tuple[int, int]] = Counter()
    for place in [p["gridPos"] for panel in DASHBOARD["panels"] for p in (panel, *panel.get("panels", []))]:
        assert place["x"] + place["w"] <= 24
        rows, columns = range(place["y"], place["y"] + place["h"]), range(place["x"], place["x"] + place["w"])
        cells.update((row, column) for row in rows for column in columns)
    assert max(cells.values()) == 1


# ---- Variables (template-datasource, template-job, template-instance, template-label-promql,
# template-on-time-change-reload)


def test_the_data_source_can_be_chosen() -> None:
    variable = VARIABLES["datasource"]
    assert (variable["type"], variable["query"], variable["label"]) == ("datasource", "prometheus", "Data source")


def test_the_variables_are_there_in_the_order_in_which_they_depend_on_each_other() -> None:
    assert list(VARIABLES) == ["datasource", "job", "instance", "workspace", "model", "reason"]


@pytest.mark.parametrize("name", QUERIES)
def test_a_variable_offers_all_and_several_and_follows_the_time_range(name: str) -> None:
    variable = QUERIES[name]
    assert variable["datasource"] == SOURCE
    assert variable["refresh"] == 2
    assert (variable["includeAll"], variable["multi"], variable["allValue"]) == (True, True, ".+")
    assert variable["current"]["value"] == ["$__all"]
    assert variable["label"] == name.capitalize()


@pytest.mark.parametrize("name", QUERIES)
def test_a_variable_asks_for_a_label_of_a_metric_within_what_is_chosen_before(name: str) -> None:
    query = QUERIES[name]["query"]["query"]
    assert QUERIES[name]["definition"] == query
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert match is not None
    assert match[2] == name
    (selector,) = selectors(concrete(match[1]))
    assert name in known_labels(str(selector.name))
    names = list(QUERIES)
    assert matched_labels(selector) == set(names[: names.index(name)])


# ---- Panels (panel-datasource, panel-title-description, panel-units, panel-no-targets)


@each_panel
def test_a_panel_is_titled_described_and_says_what_no_data_means(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["noValue"]
    assert panel["targets"]
    assert panel["type"] in {"stat", "timeseries", "table"}, "not in every Grafana from 10 to 12"
    assert not {"libraryPanel", "pluginVersion", "repeat"} & panel.keys()


@each_panel
def test_a_title_fits_at_1600_pixels(panel: dict[str, Any]) -> None:
    # Measured in Grafana 12.2: 66 pixels for each 24th of the page, 8 for a letter, 50 for the rest of the header.
    assert 8 * len(panel["title"]) + 50 < 66 * panel["gridPos"]["w"]


@each_panel
def test_a_panel_has_units_that_grafana_knows(panel: dict[str, Any]) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert {options["unit"] for options in options_of(panel) if "unit" in options} <= UNITS


@each_panel
def test_a_panel_asks_the_chosen_data_source(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == SOURCE
    assert all(target["datasource"] == SOURCE for target in panel["targets"])
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@each_panel
def test_a_figure_without_data_is_not_coloured_as_good_or_bad(panel: dict[str, Any]) -> None:
    if panel["type"] == "stat":
        thresholds = [options["thresholds"] for options in options_of(panel) if "thresholds" in options]
        assert all(levels["steps"][0] == {"color": NEUTRAL, "value": None} for levels in thresholds)


@each_panel
def test_a_graph_has_a_table_of_its_series_with_last_or_total_and_maximum(panel: dict[str, Any]) -> None:
    if panel["type"] == "timeseries":
        shown = panel["options"]["legend"]
        assert (shown["showLegend"], shown["displayMode"]) == (True, "table")
        bars = panel["fieldConfig"]["defaults"]["custom"]["drawStyle"] == "bars"
        assert shown["calcs"] == ["sum" if bars else "lastNotNull", "max"]
        assert all(target["legendFormat"] not in ("", "__auto") for target in panel["targets"])
        assert "decimals" not in panel["fieldConfig"]["defaults"], "an axis with decimals says 2 K, 2 K, 1 K"
        assert "interval" not in panel, "a fixed step leaves two points of ten minutes"


@each_panel
def test_an_empty_cell_says_nothing_of_the_whole_table(panel: dict[str, Any]) -> None:
    if panel["type"] == "table":
        titles = next(t["options"]["renameByName"] for t in panel["transformations"] if t["id"] == "organize")
        nothing = panel["fieldConfig"]["defaults"]["noValue"]
        for title in titles.values():
            assert properties(panel, name=title)["noValue"] != nothing


@each_panel
def test_a_name_that_looks_like_a_number_stays_a_name(panel: dict[str, Any]) -> None:
    if panel["type"] == "table":
        titles = next(t["options"]["renameByName"] for t in panel["transformations"] if t["id"] == "organize")
        for name in titles.keys() - {"Value"}:
            is_text = not name.startswith("Value #")
            assert (properties(panel, name=titles[name])["unit"] == "string") is is_text, titles[name]


# ---- Colours


# Labels of legends whose values are known here, and those values.
NAMED: dict[str, set[str]] = {
    "status": {"done", "failed", "pending", "running", "unknown"},
    "reason": set(BUILT_IN),
    "owner": {owner for owner, _ in BUILT_IN.values()},
    "cause": set(history.CAUSES),
}


def colors_of_series(panel: dict[str, Any]) -> dict[str, str]:
    """Return the fixed colours of a panel by the names, or the queries, of the series."""
    return {
        override["matcher"]["options"]: p["value"]["fixedColor"]
        for override in panel["fieldConfig"]["overrides"]
        for p in override["properties"]
        if p["id"] == "color" and p["value"].get("fixedColor", "transparent") != "transparent"
    }


def is_red(color: str) -> bool:
    """Tell whether a colour looks red, in the dark theme or in the light one."""
    if not color.startswith("#"):
        return "red" in color
    red, green, blue = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
    hue, _, saturation = colorsys.rgb_to_hls(red, green, blue)
    return saturation > 0.25 and (hue < 18 / 360 or hue > 330 / 360)


def nearest(color: str, named: dict[str, str]) -> str:
    """Return the name of the colour that has the hue most like that of a colour; greys are like greys."""

    def hue(text: str) -> float | None:
        angle, _, saturation = colorsys.rgb_to_hls(*(int(text[n : n + 2], 16) / 255 for n in (1, 3, 5)))
        return angle if saturation > 0.1 else None

    def distance(other: float | None) -> float:
        wanted = hue(color)
        if wanted is None or other is None:
            return 0 if wanted == other else 1
        return min(abs(wanted - other), 1 - abs(wanted - other))

    return min(named, key=lambda name: distance(hue(named[name])))


def test_no_two_reasons_share_a_colour_and_their_owners_have_colours_of_their_own() -> None:
    reasons = colors_of_series(BY_TITLE["Failures by reason"])
    assert reasons.keys() == BUILT_IN.keys()
    assert len(set(reasons.values())) == len(reasons)
    owners = colors_of_series(BY_TITLE["Failures by owner"])
    assert owners.keys() == {owner for owner, _ in BUILT_IN.values()}
    assert len(set(owners.values())) == len(owners)
    # Who has to act is seen before the names are read.
    assert {reason: nearest(color, owners) for reason, color in reasons.items()} == {
        reason: owner for reason, (owner, _) in BUILT_IN.items()
    }


def test_failed_is_the_only_red_among_statuses_models_workspaces_reasons_and_causes() -> None:
    assert (is_red("red"), is_red("#e24d42"), is_red("#ff9830"), is_red("#8e8e8e")) == (True, True, False, False)
    for panel in PANELS:
        if panel["type"] != "timeseries":
            continue
        red = {name for name, color in colors_of_series(panel).items() if is_red(color)}
        assert red <= {"failed"}, panel["title"]
        # Grafana's palette has red in its fifth place: nothing that a label names must take its colour from it.
        scheme = panel["fieldConfig"]["defaults"]["color"]
        shades = scheme["mode"] == "shades" and not is_red(scheme["fixedColor"])
        for target in panel["targets"]:
            colored, by = colors_of_series(panel).keys(), labels_of(target["legendFormat"])
            if by:
                named = set().union(*(NAMED[label] for label in by if label in NAMED))
                assert shades or target["refId"] in colored or (named and named <= colored), panel["title"]
    assert colors_of_series(BY_TITLE["Submitted and finished tasks"])["failed"] == "red"
    assert colors_of_series(BY_TITLE["Submitted and finished tasks"])["done"] == "green"


# ---- Links


def links_of(title: str, column: str) -> dict[str, str]:
    return {link["title"]: link["url"] for link in properties(BY_TITLE[title], name=column)["links"]}


@pytest.mark.parametrize(
    ("title", "column", "variable", "document"),
    [
        ("Workspaces", "Workspace", "workspace", None),
        ("Models over the time range", "Model", "model", "docs/runbook.md#CreatifyModelFailureSpike"),
        ("Reasons over the time range", "Reason", "reason", "docs/failure-reasons.md#${__value.text}"),
        ("Reasons over the time range", "Reason", "reason", "docs/runbook.md#CreatifyFailureReasonSpike"),
        ("Alerts that fire", "Workspace", "workspace", None),
        ("Alerts that fire", "Model", "model", None),
        ("Alerts that fire", "Reason", "reason", "docs/failure-reasons.md#${__value.text}"),
        ("Alerts that fire", "Alert", None, "docs/runbook.md#${__value.text}"),
    ],
)
def test_a_name_leads_to_the_view_of_it_alone_and_to_what_to_do(
    title: str, column: str, variable: str | None, document: str | None
) -> None:
    urls = links_of(title, column).values()
    if variable:
        (filtered,) = (url for url in urls if url.startswith("/d/creatify-text-generator?"))
        assert filtered.count(f"var-{variable}=") == 1
        assert f"${{{variable}:queryparam}}" not in filtered, "the variable would have both values"
        assert set(re.findall(r"\$\{(\w+):queryparam\}", filtered)) <= VARIABLES.keys()
    if document:
        assert DOCS + document in urls


# ---- Queries (target-promql, target-rate-interval, target-job, target-instance, target-counter-agg)


@each_target
def test_a_query_is_valid_promql(target: Target) -> None:
    promql_parser.parse(concrete(target.expr))


@each_target
def test_a_query_asks_only_for_metrics_and_labels_that_there_are(target: Target) -> None:
    for selector in selectors(concrete(target.expr)):
        if selector.name not in OF_RULES:
            assert matched_labels(selector) <= labels_known(str(selector.name))
            assert not {"le"} & matched_labels(selector), "le is written otherwise in Prometheus 3"


@each_target
def test_a_query_uses_only_variables_that_are_defined(target: Target) -> None:
    used = {name for pair in re.findall(r"\$(?:{(\w+)}|(\w+))", target.expr) for name in pair if name}
    assert used <= VARIABLES.keys() | {"__rate_interval", "__range", "__interval", "__interval_ms"}


def test_every_selector_is_within_the_chosen_jobs_and_instances() -> None:
    everything = [target.expr for target in TARGETS] + [a["expr"] for a in ANNOTATIONS.values()]
    for expr in everything:
        for selector in selectors(_parsable(expr)):
            chosen = {m.name: m.value for m in selector.matchers.matchers}
            absent = "|" if selector.name in OF_RULES else ""
            assert (chosen["job"], chosen["instance"]) == (f"$job{absent}", f"$instance{absent}"), expr


@each_target
def test_every_selector_is_within_the_chosen_workspaces_and_models(target: Target) -> None:
    for selector in selectors(_parsable(target.expr)):
        if selector.name in OF_RULES:
            continue
        chosen = {m.name: m.value for m in selector.matchers.matchers}
        if "workspace" in labels_known(str(selector.name)):
            assert chosen["workspace"] == "$workspace"
        if chosen.get("model") != "other":
            assert chosen.get("model", "$model") == "$model"
        assert chosen.get("reason", "$reason") == "$reason"


def _parsable(expr: str) -> str:
    """Return a query with its durations put in, and its other variables as they are."""
    for name, value in {"__rate_interval": "4m", "__range": "6h", "__interval_ms": "60000", "__interval": "1m"}.items():
        expr = expr.replace(f"${name}", value)
    return expr


@each_target
def test_rates_follow_the_scrape_interval_and_totals_the_time_range_or_a_window_that_the_title_says(
    target: Target,
) -> None:
    raw = re.findall(r"(\w+)\([\w:]+{[^}]*}\[([^]]+)\]", target.expr)
    steps = re.findall(r"\)\[([^]]+)\]", target.expr)
    assert len(raw) + len(steps) == target.expr.count("["), target.expr
    allowed = {
        "rate": {"$__rate_interval"},
        "last_over_time": {"1h", "15m", "$__range"},
        "increase": {"$__range", "5m", "15m"},
    }
    assert all(window in allowed[function] for function, window in raw)
    growth = {"$__rate_interval:$__interval", "5m:1m"}
    assert set(steps) <= growth | {"$__range:$__interval", "15m:1m", "1h:1m"}
    assert target.expr.count("irate(") == sum(window in growth for window in steps)


@each_target
def test_a_counter_is_only_shown_as_a_rate_or_an_increase(target: Target) -> None:
    under_rate = {
        str(selector.name)
        for node in nodes(concrete(target.expr))
        if isinstance(node, promql_parser.Call) and node.func.name in ("rate", "irate", "increase")
        for selector in nodes(node)
        if isinstance(selector, promql_parser.VectorSelector)
    }
    assert {str(s.name) for s in selectors(concrete(target.expr))} & counters() == under_rate


@each_target
def test_replicas_are_one_truth_before_anything_is_added_up(target: Target) -> None:
    of_exporter = {around for name, around in innermost_aggregations(concrete(target.expr)) if name not in OF_RULES}
    assert of_exporter <= {"max"}


@each_target
def test_every_label_of_a_legend_is_in_the_result(target: Target) -> None:
    if target.expr.startswith("count_values("):
        assert labels_of(target.legend) == {"n"}
        return
    parsed = promql_parser.parse(concrete(target.expr))
    outermost = next((node for node in nodes(parsed) if isinstance(node, promql_parser.AggregateExpr)), None)
    assert outermost is not None
    kept = set(outermost.modifier.labels) if outermost.modifier else set()
    assert labels_of(target.legend) <= kept


# ---- In a real Prometheus, in every situation


@dataclass(frozen=True)
class Past:
    """A Prometheus that holds all scenarios, each in its own time; it is asked once for the same thing."""

    prometheus: Prometheus
    asked: dict[tuple[str, float, float, float], list[Series]] = field(default_factory=dict)

    def ask(self, target: Target, scenario: Scenario, time_range: float, later: float = 0) -> list[Series]:
        """Return what Grafana would get for a query at the end of a scenario, or some seconds later."""
        end, scrape = end_of(scenario) + later, scenario.scrape
        between = step(target.panel, scrape=scrape, time_range=time_range)
        expr = substitute(target.expr, scrape=scrape, interval=between, time_range=time_range)
        start, last = ((end - time_range) // between * between, end // between * between)
        key = expr, end, time_range, between
        if key not in self.asked:
            if target.instant:
                self.asked[key] = self.prometheus.query(expr, end)
            else:
                self.asked[key] = self.prometheus.query_range(expr, start, last, between)
        return self.asked[key]

    def answers(
        self, title: str, scenario: Scenario, time_range: float = 3600, later: float = 0
    ) -> dict[str, list[Series]]:
        """Return the answers to all queries of a panel."""
        return {target.ref: self.ask(target, scenario, time_range, later) for target in targets_of(BY_TITLE[title])}

    def grown(self, metric: str, scenario: Scenario, start: float, end: float) -> list[tuple[dict[str, str], float]]:
        """Return by how much each series of a counter grew, by its raw samples: the truth that panels are held to."""
        of_one = f'last_over_time({metric}{{instance="{scenario.replicas[0]}"}}[1h])'
        before, after = self.prometheus.query(of_one, start), self.prometheus.query(of_one, end)
        first = {tuple(sorted(series.labels.items())): series.value for series in before}
        return [(dict(s.labels), s.value - first.get(tuple(sorted(s.labels.items())), 0)) for s in after]

    def stat(self, title: str, scenario: Scenario) -> list[tuple[str, str, str]]:
        """Return names, texts and colours of a stat; a value without a text of its own is a rounded number."""
        shown = stat(BY_TITLE[title], self.answers(title, scenario))
        return [(name, value.text or f"{value.value:.3g}", value.color) for name, value in shown]

    def table(
        self, title: str, scenario: Scenario, time_range: float = 3600, later: float = 0
    ) -> list[dict[str, Shown]]:
        """Return the lines of a table."""
        return table(BY_TITLE[title], self.answers(title, scenario, time_range, later))


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Past]:
    directory: Path = tmp_path_factory.mktemp("past")
    history.write_tsdb(directory / "tsdb")
    configuration = {"global": {"scrape_interval": "60s"}}
    with Prometheus(directory, configuration, "--storage.tsdb.retention.time=10000d") as prometheus:
        yield Past(prometheus)


GREEN, RED, ORANGE = "green", "red", "orange"
QUIET = [("firing", "none", GREEN)]
UP = [("", "up", GREEN)]
NO_EXPORTER = [("", "no exporter", NEUTRAL)]
# What the first screen says of alerts, workspaces and the ledger; the state of each workspace; the first alert.
FIRST_SCREEN: dict[str, tuple[Any, Any, Any, Any, Any]] = {
    "all is well": (
        QUIET,
        [("of 2", "none", GREEN)],
        UP,
        {"marketing": ("up", GREEN), "sales": ("up", GREEN)},
        ("all quiet", GREEN, "no alert fires"),
    ),
    "one workspace down": (
        [("critical", "1", RED), ("warning", "1", ORANGE)],
        [("of 2", "1", RED)],
        UP,
        {"sales": ("down: http", RED), "marketing": ("up", GREEN)},
        ("critical", RED, "CreatifyWorkspaceDown"),
    ),
    "all workspaces down": (
        [("critical", "2", RED)],
        [("of 2", "all", RED)],
        UP,
        {"marketing": ("down: auth", RED), "sales": ("down: auth", RED)},
        ("critical", RED, "CreatifyCredentialsRefused"),
    ),
    "ledger down": (
        [("critical", "1", RED)],
        [("of 2", "none", GREEN)],
        [("", "down", RED)],
        {"marketing": ("not recorded", ORANGE), "sales": ("not recorded", ORANGE)},
        ("critical", RED, "CreatifyLedgerDown"),
    ),
    "held back": (
        [("warning", "1", ORANGE)],
        [("of 2", "1", RED)],
        UP,
        {"sales": ("down: rate_limited", RED), "marketing": ("up", GREEN)},
        ("warning", ORANGE, "CreatifyBalanceUnknown"),
    ),
    "no exporter": (
        [("critical", "1", RED)],
        NO_EXPORTER,
        [("", "unknown", NEUTRAL)],
        {"marketing": ("no exporter", NEUTRAL), "sales": ("no exporter", NEUTRAL)},
        ("critical", RED, "CreatifyExporterAbsent"),
    ),
    "no rules": (
        [("", "no rules", NEUTRAL)],
        [("of 2", "none", GREEN)],
        UP,
        {"marketing": ("up", GREEN), "sales": ("up", GREEN)},
        None,
    ),
    "fresh start": (QUIET, [("of 1", "none", GREEN)], UP, {"default": ("up", GREEN)}, None),
    "crowd": (
        [("critical", "2", RED), ("warning", "3", ORANGE), ("info", "2", "blue")],
        [("of 5", "none", GREEN)],
        [("", "down", RED)],
        dict.fromkeys(sorted(history.FIVE), ("not recorded", ORANGE)),
        ("critical", RED, "CreatifyCreditsLow"),
    ),
    "nothing": ([("", "no rules", NEUTRAL)], NO_EXPORTER, [("", "unknown", NEUTRAL)], {}, None),
}


def test_each_trouble_is_told_apart_within_the_first_500_pixels() -> None:
    def bottom(title: str) -> int:
        place = BY_TITLE[title]["gridPos"]
        return int((place["y"] + place["h"]) * PIXELS)

    assert bottom("Workspaces") < 500
    # Its title, its header, and one alert, which is the worst.
    assert BY_TITLE["Alerts that fire"]["gridPos"]["y"] * PIXELS + 40 + 36 + 36 <= 500
    # Five workspaces are seen without scrolling: a title, a header and five lines.
    assert BY_TITLE["Workspaces"]["gridPos"]["h"] * PIXELS - 8 >= 40 + 36 + 5 * 36
    told = {name: json.dumps(expected) for name, expected in FIRST_SCREEN.items() if name not in {"fresh start"}}
    assert len(set(told.values())) == len(told)


@pytest.mark.process
@pytest.mark.parametrize("name", FIRST_SCREEN)
def test_the_first_screen_tells_the_truth(past: Past, name: str) -> None:
    alerts, down, ledger, states, first = FIRST_SCREEN[name]
    scenario = by_name(name)
    assert past.stat("Firing alerts", scenario) == alerts
    assert past.stat("Workspaces down", scenario) == down
    assert past.stat("Ledger", scenario) == ledger
    lines = past.table("Workspaces", scenario)
    assert [(line["Workspace"].value, (line["State"].value, line["State"].color)) for line in lines] == [
        *states.items()
    ]
    rows = past.table("Alerts that fire", scenario)
    if first is not None:
        assert (rows[0]["Severity"].text, rows[0]["Severity"].color, rows[0]["Alert"].value) == first
    severities = [row["Severity"].value for row in rows]
    assert severities == sorted(severities)


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "failed", "oldest", "credits_last"),
    [
        ("all is well", GREEN, GREEN, GREEN),
        ("no failures", GREEN, GREEN, GREEN),
        ("four tasks an hour", NEUTRAL, GREEN, GREEN),
        ("fresh start", NEUTRAL, GREEN, NEUTRAL),
        ("all workspaces down", NEUTRAL, NEUTRAL, NEUTRAL),
        ("held back", GREEN, GREEN, NEUTRAL),
        ("no exporter", NEUTRAL, NEUTRAL, NEUTRAL),
        ("crowd", GREEN, RED, RED),
        ("nothing", NEUTRAL, NEUTRAL, NEUTRAL),
    ],
)
def test_figures_are_green_or_red_only_where_there_is_something_to_judge_by(
    past: Past, name: str, failed: str, oldest: str, credits_last: str
) -> None:
    titles = {"Failed (15 min)": failed, "Oldest unfinished": oldest, "Credits last": credits_last}
    for title, color in titles.items():
        assert [shown[2] for shown in past.stat(title, by_name(name))] == [color], title


@pytest.mark.process
def test_a_balance_that_cannot_be_read_is_said_and_the_others_do_not_reassure(past: Past) -> None:
    scenario = by_name("held back")
    assert past.stat("Credits last", scenario) == [("", "not all known", NEUTRAL)]
    credits = {line["Workspace"].value: line["Credits"].text for line in past.table("Workspaces", scenario)}
    assert credits == {"sales": "", "marketing": "unknown"}
    knows = past.table("What the exporter knows of each workspace", scenario)
    balance = {line["Workspace"].value: (line["Balance"].text, line["Balance"].color) for line in knows}
    assert balance == {"sales": ("read", GREEN), "marketing": ("failed", RED)}


@pytest.mark.process
def test_a_workspace_that_waits_and_its_unsettled_tasks_are_pointed_out(past: Past) -> None:
    lines = past.table("What the exporter knows of each workspace", by_name("held back"))
    shown = {line["Workspace"].value: line for line in lines}
    assert (shown["sales"]["Held back"].value, shown["sales"]["Held back"].color) == (95, ORANGE)
    assert (shown["sales"]["Unsettled"].value, shown["sales"]["Unsettled"].color) == (7, ORANGE)
    assert "Held back" not in shown["marketing"]
    assert (shown["marketing"]["Unsettled"].value, shown["marketing"]["Unsettled"].color) == (0, "text")


@pytest.mark.process
@pytest.mark.parametrize("name", ["all is well", "crowd"])
def test_each_workspace_and_replica_has_one_line_and_the_same_colour_in_every_graph(past: Past, name: str) -> None:
    scenario = by_name(name)
    for titles, label, values in (
        (("Balance (credits)", *OF_WORKSPACES[:4]), "workspace", scenario.workspaces),
        (OF_WORKSPACES[4:], "instance", scenario.replicas),
    ):
        colors = set()
        for title in titles:
            answers = past.answers(title, scenario)
            drawn = [(s.labels[label], colors_of_series(BY_TITLE[title])[ref]) for ref in answers for s in answers[ref]]
            assert sorted(value for value, _ in drawn) == sorted(values)
            assert len({color for _, color in drawn}) == len(drawn)
            colors.add(tuple(sorted(drawn)))
        assert len(colors) == 1, colors


@pytest.mark.process
def test_few_tasks_make_no_percentage(past: Past) -> None:
    scenario = by_name("four tasks an hour")
    ((name, _, color),) = past.stat("Failed (15 min)", scenario)
    assert re.fullmatch(r"failed of \d finished", name)
    assert color == NEUTRAL
    (line,) = past.table("Workspaces", scenario)
    assert "Failed" not in line
    assert line["Finished/h"].value >= 0  # type: ignore[operator]


@pytest.mark.process
def test_a_table_without_anything_to_tell_says_so_only_where_that_is_known(past: Past) -> None:
    (line,) = past.table("Reasons over the time range", by_name("no failures"))
    assert (line["Reason"].value, line["Count"].value) == ("no failures", 0)
    assert past.table("Reasons over the time range", by_name("nothing")) == []
    # A quantile of no tasks is NaN, and Grafana would show it.
    assert all("p90" not in line for line in past.table("Models over the time range", by_name("fresh start")))
    assert past.table("Alerts that fire", by_name("no rules")) == []


# What has no data in a scenario, and why; everything else has.
OWN_TROUBLE = {"Alerts that fire": {"B"}, "Firing alerts": {"A", "B", "C", "D"}, "Failed (15 min)": {"A", "B"}}
RANKS = set("ABCDEFGHI")
OF_WORKSPACES = ("Listing time", "Listing size", "Tasks in the ledger", "Malformed records", "Memory", "CPU")
WITHOUT_DATA: dict[str, dict[str, set[str]]] = {
    "all is well": {
        "Balance (credits)": RANKS,
        "Credits used by model": RANKS,
        "Credits per finished task": RANKS,
        "Failure ratio by model": RANKS,
        **dict.fromkeys(OF_WORKSPACES, RANKS),
    },
    "crowd": {"Failure ratio by model": RANKS, "Balance (credits)": RANKS, **dict.fromkeys(OF_WORKSPACES, RANKS)},
}


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "time_range"),
    [
        *((scenario.name, 3600 if scenario.name == "crowd" else 6 * 3600) for scenario in SCENARIOS),
        *((name, 600) for name in ("nothing", "fresh start", "all is well", "no exporter")),
        *((name, 30 * 86400) for name in ("nothing", "a month")),
    ],
)
def test_every_query_of_every_panel_runs_in_every_scenario(past: Past, name: str, time_range: float) -> None:
    scenario = by_name(name)
    for target in TARGETS:
        series = past.ask(target, scenario, time_range)
        if name == "nothing":
            assert series == [], f"{target} says something of nothing"
        for each in series:
            assert labels_of(target.legend) <= each.labels.keys() | {"workspace", "reason", "owner"}
            assert len({legend(target.legend, s.labels) for s in series}) == len(series) or target.legend == "__auto"


@pytest.mark.process
@pytest.mark.parametrize("name", ["all is well", "crowd"])
def test_every_panel_has_data_where_there_is_work(past: Past, name: str) -> None:
    scenario = by_name(name)
    for panel in PANELS:
        answers = past.answers(panel["title"], scenario, 3600)
        values = [v for series in answers.values() for s in series for _, v in s.points if math.isfinite(v)]
        assert values, f"{panel['title']} is empty"
        empty = {ref for ref, series in answers.items() if not series}
        allowed = {**OWN_TROUBLE, **WITHOUT_DATA[name]}.get(panel["title"], set())
        if panel["title"] == "What the exporter knows of each workspace":
            allowed = {"B", "F"}
        assert empty <= allowed, panel["title"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "annotation", "marked"),
    [
        ("all is well", "Alerts: critical", set()),
        ("all is well", "Alerts: warning", {"CreatifyModelFailureSpike"}),
        ("crowd", "Alerts: critical", {"CreatifyCreditsLow", "CreatifyLedgerDown"}),
        ("one workspace down", "Alerts: critical", {"CreatifyWorkspaceDown"}),
    ],
)
def test_alerts_that_need_somebody_are_marked_and_those_that_only_inform_are_not(
    past: Past, name: str, annotation: str, marked: set[str]
) -> None:
    expr = substitute(ANNOTATIONS[annotation]["expr"], scrape=60, interval=60, time_range=6 * 3600)
    end = end_of(by_name(name))
    assert {s.labels["alertname"] for s in past.prometheus.query_range(expr, end - 6 * 3600, end, 60)} == marked


@pytest.mark.process
def test_a_restart_of_the_exporter_is_marked_when_it_happened(past: Past) -> None:
    scenario = by_name("all is well")
    annotation, end = ANNOTATIONS["Exporter started"], end_of(scenario)
    assert annotation["useValueForTime"] is True
    expr = substitute(annotation["expr"], scrape=60, interval=60, time_range=6 * 3600)
    for series in past.prometheus.query_range(expr, end - 6 * 3600, end, 60):
        starts = sorted({value / 1000 for _, value in series.points})
        assert starts == [end - scenario.hours * 3600, end - scenario.restart * 60 + 40]


# ---- Totals


SUBMITTED = "creatify_text_generator_tasks_submitted_total"
FINISHED = "creatify_text_generator_tasks_finished_total"
FAILURES = "creatify_text_generator_failures_total"
CREDITS = "creatify_text_generator_credits_used_total"
RANGES = {
    "all is well": [600, 3600, 6 * 3600],
    "no failures": [600, 3600],
    "one workspace down": [600, 3600],
    "all workspaces down": [3600],
    "ledger down": [600, 3600],
    "held back": [600],
    "no exporter": [3600],
    # The exporter was away for 25 minutes, and then counted in one go what had happened.
    "no rules": [5400],
    "four tasks an hour": [3600, 6 * 3600],
    "crowd": [600, 3600],
    "a month": [86400, 7 * 86400, 30 * 86400],
}
Key = Callable[[dict[str, str]], str | None]
# The name of a bar, or of a line of a table, by the labels of a series; None: it does not count there.
BARS: dict[str, tuple[str, Key]] = {
    "Submitted and finished tasks": (FINISHED, lambda labels: labels["status"]),
    "Failures by reason": (FAILURES, lambda labels: labels["reason"]),
    "Failures by owner": (FAILURES, lambda labels: history.OWNERS[labels["reason"]]),
    "Credits used by model": (CREDITS, lambda labels: labels["model"]),
}


def having(status: str, label: str) -> Key:
    return lambda labels: labels[label] if labels["status"] == status else None


# Tables, the column with the name of a line, and the columns with totals: over an hour, or over the time range.
TABLES: dict[str, tuple[str, float | None, dict[str, tuple[str, Key]]]] = {
    "Models over the time range": (
        "Model",
        None,
        {
            "Submitted": (SUBMITTED, lambda labels: labels["model"]),
            "Done": (FINISHED, having("done", "model")),
            "Failed": (FINISHED, having("failed", "model")),
            "Credits": (CREDITS, lambda labels: labels["model"]),
        },
    ),
    "Reasons over the time range": ("Reason", None, {"Count": (FAILURES, lambda labels: labels["reason"])}),
    "Workspaces": (
        "Workspace",
        3600,
        {
            "Finished/h": (FINISHED, lambda labels: labels["workspace"]),
            "Failed/h": (FINISHED, having("failed", "workspace")),
            "Credits/h": (CREDITS, lambda labels: labels["workspace"]),
        },
    ),
}


def summed(grown: list[tuple[dict[str, str], float]], key: Key) -> dict[str, float]:
    """Return the growth of a counter by what is shown."""
    found: dict[str, float] = {}
    for labels, growth in grown:
        if (name := key(labels)) is not None:
            found[name] = found.get(name, 0) + growth
    return found


@pytest.mark.process
@pytest.mark.parametrize("title", BARS)
@pytest.mark.parametrize("name", RANGES)
def test_bars_add_up_to_what_the_counters_grew_by(past: Past, name: str, title: str) -> None:
    scenario = by_name(name)
    metric, bar_of = BARS[title]
    for time_range in RANGES[name]:
        between = step(BY_TITLE[title], scrape=scenario.scrape, time_range=time_range)
        end = end_of(scenario) // between * between
        start = (end_of(scenario) - time_range) // between * between - between
        drawn: Counter[str] = Counter()
        for ref, series in past.answers(title, scenario, time_range).items():
            template = next(t.legend for t in targets_of(BY_TITLE[title]) if t.ref == ref)
            for each in series:
                drawn[legend(template, each.labels)] += sum(value for _, value in each.points)  # type: ignore[assignment]
        truth = summed(past.grown(metric, scenario, start, end), bar_of)
        for bar, grown in truth.items():
            if bar in drawn or title != "Credits used by model":
                assert drawn[bar] == pytest.approx(grown, abs=1), (bar, time_range)
        if title.startswith("Failures"):
            assert drawn["all failures"] == pytest.approx(sum(truth.values()), abs=1)
        if title == "Credits used by model":
            assert sum(drawn.values()) == pytest.approx(sum(truth.values()), abs=1)


@pytest.mark.process
@pytest.mark.parametrize("title", TABLES)
@pytest.mark.parametrize("name", RANGES)
def test_totals_in_tables_are_what_the_counters_grew_by(past: Past, name: str, title: str) -> None:
    scenario = by_name(name)
    by, window, columns = TABLES[title]
    # Now is hardly ever a whole minute: a total ends with the last whole step, as the bars do.
    for time_range, later in [(RANGES[name][0], 7), *((time_range, 0) for time_range in RANGES[name])]:
        lines = past.table(title, scenario, time_range, later)
        between = 60 if window else step(BY_TITLE[title], scrape=scenario.scrape, time_range=time_range)
        end = (end_of(scenario) + later) // between * between
        start = (end_of(scenario) + later - (window or time_range)) // between * between
        for column, (metric, line_of) in columns.items():
            shown = {str(line[by].value): float(line[column].value) for line in lines if column in line}
            truth = summed(past.grown(metric, scenario, start, end), line_of)
            names = truth.keys() | shown.keys() - {"no failures"}
            told = {name: shown.get(name, 0) for name in names}
            assert told == pytest.approx({name: truth.get(name, 0) for name in names}, abs=1), (column, time_range)


def test_a_scrape_that_fails_neither_loses_growth_nor_shows_it_twice(tmp_path: Path) -> None:
    """Prometheus marks series as stale when a scrape fails, which no backfilled history has."""
    (promtool,) = require("promtool")
    labels = 'job="creatify", instance="a:9877", workspace="w"'
    series = {
        f'{SUBMITTED}{{{labels}, model="m"}}': "0 2 5 stale 9 12",
        f"creatify_up{{{labels}}}": "1 1 1 stale 1 1",
    }
    (bar,) = (t.expr for t in targets_of(BY_TITLE["Submitted and finished tasks"]) if t.legend == "submitted")
    total = targets_of(BY_TITLE["Models over the time range"])[0].expr
    expected = {("2m", bar): ("{}", 3), ("3m", bar): None, ("4m", bar): ("{}", 4), ("5m", bar): ("{}", 3)}
    expected["5m", total] = ('{model="m"}', 12)
    checks = [
        {
            "expr": substitute(expr, scrape=60, interval=60, time_range=300),
            "eval_time": at,
            "exp_samples": [{"labels": shown[0], "value": shown[1]}] if shown else [],
        }
        for (at, expr), shown in expected.items()
    ]
    given = [{"series": name, "values": values} for name, values in series.items()]
    tests = [{"interval": "1m", "input_series": given, "promql_expr_test": checks}]
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "1m", "tests": tests}))
    output(promtool, "test", "rules", file)


@pytest.mark.process
@pytest.mark.parametrize("name", RANGES)
def test_the_share_of_failed_tasks_is_that_of_the_counters(past: Past, name: str) -> None:
    scenario = by_name(name)
    end = end_of(scenario)
    grown = summed(past.grown(FINISHED, scenario, end - 900, end), lambda labels: labels["status"])
    finished, failed = sum(grown.values()), grown.get("failed", 0)
    if name == "no exporter":
        assert past.stat("Failed (15 min)", scenario) == NO_EXPORTER
        return
    series = [s for answer in past.answers("Failed (15 min)", scenario).values() for s in answer]
    ((of, value),) = ((int(s.labels["n"]), s.value) for s in series)
    assert of == pytest.approx(finished, abs=1)
    assert (value * of if of >= 10 else value) == pytest.approx(failed, abs=1)


@pytest.mark.process
@pytest.mark.parametrize(("name", "time_range"), [("all is well", 6 * 3600), ("crowd", 3600), ("a month", 30 * 86400)])
def test_reasons_have_their_owners_and_their_shares_make_a_whole(past: Past, name: str, time_range: float) -> None:
    lines = past.table("Reasons over the time range", by_name(name), time_range)
    for line in lines:
        assert line["Owner"].value == history.OWNERS[str(line["Reason"].value)]
    assert sum(float(line["Share"].value) for line in lines) == pytest.approx(1, abs=0.01)
