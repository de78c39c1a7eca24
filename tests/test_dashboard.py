"""The dashboard is sound: what Grafana's own linter asks for, and what users of dashboards complain about."""

import re
import sys
from collections import Counter
from typing import Any

import promql_parser
import pytest
import yaml

from tests.support.commands import output
from tests.support.exporter import ROOT
from tests.support.grafana import DASHBOARD_FILE, Target, labels_of, load, panels, seconds, substitute, targets
from tests.support.promql import counters, innermost_aggregations, known_labels, matched_labels, nodes, selectors

DASHBOARD = load()
PANELS = panels(DASHBOARD)
TARGETS = targets(DASHBOARD)
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
QUERIES = {name: variable for name, variable in VARIABLES.items() if variable["type"] == "query"}
(ANNOTATION,) = DASHBOARD["annotations"]["list"]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"short", "percentunit", "s", "cpm", "bytes", "suffix:credits"}
DOCS = "https://github.com/creatify-exporter/creatify-exporter/blob/main/"

each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)


def concrete(expr: str) -> str:
    """Return a query with its variables put in."""
    return substitute(expr, scrape=60, interval=60, time_range=6 * 3600)


def test_generating_the_dashboard_again_changes_nothing() -> None:
    generated = output(sys.executable, ROOT / "grafana" / "generate.py", "--print")
    assert DASHBOARD_FILE.read_text(encoding="utf-8") == generated, "stale: run make generate"


# ---- The dashboard as a whole


def test_the_dashboard_imports_by_hand_and_by_provisioning() -> None:
    assert DASHBOARD["uid"] == "creatify-text-generator"
    assert DASHBOARD["schemaVersion"] >= 39
    assert not {"__inputs", "__requires", "id", "gnetId"} & DASHBOARD.keys()
    assert "${DS_" not in DASHBOARD_FILE.read_text(encoding="utf-8")


def test_the_dashboard_has_browser_time_shared_crosshair_tags_and_cannot_be_edited_by_accident() -> None:
    assert DASHBOARD["timezone"] == "browser"
    assert DASHBOARD["graphTooltip"] == 1
    assert DASHBOARD["tags"]
    assert DASHBOARD["editable"] is False


def test_the_rows_go_from_is_it_all_right_to_the_exporter_which_is_collapsed() -> None:
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows] == ["Is it all right?", "Work", "Failures", "Credits", "Exporter"]
    assert [row["collapsed"] for row in rows] == [False, False, False, False, True]
    assert DASHBOARD["panels"][-1]["panels"]


def test_links_lead_to_the_documents_and_the_exporter() -> None:
    text = DASHBOARD_FILE.read_text(encoding="utf-8")
    for path in re.findall(re.escape(DOCS) + r"([\w./-]+)", text):
        assert (ROOT / path).is_file(), path
    assert {link["title"] for link in DASHBOARD["links"]} == {"Metrics", "Runbook", "Exporter"}


def test_alerts_are_annotations() -> None:
    assert ANNOTATION["datasource"] == SOURCE
    assert ANNOTATION["enable"]
    (selector,) = selectors(concrete(ANNOTATION["expr"]))
    assert selector.name == "ALERTS"
    assert matched_labels(selector) == {"alertname", "alertstate", "workspace"}


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
    assert list(VARIABLES) == ["datasource", "job", "instance", "workspace", "model"]


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
    assert panel["type"] in {"stat", "timeseries", "table", "piechart"}, "not in every Grafana from 9 to 12"
    assert not {"libraryPanel", "pluginVersion", "repeat"} & panel.keys()


@each_panel
def test_a_panel_has_a_unit_that_grafana_knows(panel: dict[str, Any]) -> None:
    properties = [p for override in panel["fieldConfig"]["overrides"] for p in override["properties"]]
    units = {p["value"] for p in properties if p["id"] == "unit"} | {panel["fieldConfig"]["defaults"]["unit"]}
    assert units <= UNITS


@each_panel
def test_a_panel_asks_the_chosen_data_source(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == SOURCE
    assert all(target["datasource"] == SOURCE for target in panel["targets"])
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@each_panel
def test_failed_is_red_and_done_is_green_wherever_they_are_drawn(panel: dict[str, Any]) -> None:
    legends = {target["legendFormat"] for target in panel["targets"]}
    drawn = {"done": "green", "failed": "red"} if legends & {"{{status}}", "{{workspace}} {{status}}"} else {}
    if "pending|running" in panel["targets"][0]["expr"] or "oldest" in panel["targets"][0]["expr"]:
        drawn = {}
    colors = {
        override["matcher"]["options"]: p["value"]["fixedColor"]
        for override in panel["fieldConfig"]["overrides"]
        for p in override["properties"]
        if p["id"] == "color"
    }
    assert drawn.items() <= colors.items()
    assert colors.get("failed", "red") == "red"
    assert colors.get("done", "green") == "green"


@each_panel
def test_a_figure_without_data_is_not_coloured_as_good_or_bad(panel: dict[str, Any]) -> None:
    if panel["type"] == "stat":
        lists = [panel["fieldConfig"]["defaults"]["thresholds"]["steps"]] + [
            p["value"]["steps"]
            for override in panel["fieldConfig"]["overrides"]
            for p in override["properties"]
            if p["id"] == "thresholds"
        ]
        assert all(steps[0] == {"color": "text", "value": None} for steps in lists)


@each_panel
def test_a_graph_has_a_legend(panel: dict[str, Any]) -> None:
    if panel["type"] == "timeseries":
        assert panel["options"]["legend"]["showLegend"] is True
        assert all(target["legendFormat"] not in ("", "__auto") for target in panel["targets"])


@each_panel
def test_counts_are_whole_numbers(panel: dict[str, Any]) -> None:
    if any(word in panel["title"] for word in ("Tasks", "Workspaces", "Top reasons", "alerts", "records", "Models")):
        assert panel["fieldConfig"]["defaults"]["decimals"] == 0


def test_a_reason_leads_to_what_it_means() -> None:
    (table,) = (panel for panel in PANELS if panel["title"] == "Top reasons")
    links = [
        link
        for override in table["fieldConfig"]["overrides"]
        if override["matcher"]["options"] == "Reason"
        for p in override["properties"]
        if p["id"] == "links"
        for link in p["value"]
    ]
    assert [link["url"] for link in links] == [f"{DOCS}docs/failure-reasons.md#${{__value.text}}"]


# ---- Queries (target-promql, target-rate-interval, target-job, target-instance, target-counter-agg)


@each_target
def test_a_query_is_valid_promql(target: Target) -> None:
    promql_parser.parse(concrete(target.expr))


@each_target
def test_a_query_asks_only_for_metrics_and_labels_that_there_are(target: Target) -> None:
    for selector in selectors(concrete(target.expr)):
        if selector.name == "ALERTS":
            assert target.panel["title"] == "Firing alerts"
            assert matched_labels(selector) == {"alertname", "alertstate", "workspace"}
        else:
            assert matched_labels(selector) <= known_labels(str(selector.name))
            assert not {"le"} & matched_labels(selector), "le is written otherwise in Prometheus 3"


@each_target
def test_a_query_uses_only_variables_that_are_defined(target: Target) -> None:
    used = {name for pair in re.findall(r"\$(?:{(\w+)}|(\w+))", target.expr) for name in pair if name}
    assert used <= VARIABLES.keys() | {"__rate_interval", "__range"}


@each_target
def test_every_selector_is_within_the_chosen_jobs_instances_workspaces_and_models(target: Target) -> None:
    for selector in selectors(target.expr.replace("$__rate_interval", "4m").replace("$__range", "6h")):
        matchers = {matcher.name: (str(matcher.op), matcher.value) for matcher in selector.matchers.matchers}
        if selector.name == "ALERTS":
            assert matchers["workspace"][1] == "$workspace|", "alerts about the exporter have no workspace"
            continue
        wanted = {"job", "instance"} | (known_labels(str(selector.name)) & {"workspace"})
        assert {name: matchers.get(name, ("", ""))[1] for name in wanted} == {name: f"${name}" for name in wanted}
        if matchers.get("model", ("", "$model"))[1] != "other":
            assert matchers.get("model", ("", "$model"))[1] == "$model"


@each_target
def test_rates_follow_the_scrape_interval_and_totals_the_time_range(target: Target) -> None:
    windows = re.findall(r"(\w+)\([\w:]+{[^}]*}\[([^]]+)\]", target.expr)
    assert len(windows) == target.expr.count("["), target.expr
    assert set(windows) <= {("rate", "$__rate_interval"), ("increase", "$__range")}


@each_target
def test_a_counter_is_only_shown_as_a_rate_or_an_increase(target: Target) -> None:
    under_rate = {
        str(selector.name)
        for node in nodes(concrete(target.expr))
        if isinstance(node, promql_parser.Call) and node.func.name in ("rate", "increase")
        for selector in nodes(node)
        if isinstance(selector, promql_parser.VectorSelector)
    }
    assert {str(s.name) for s in selectors(concrete(target.expr))} & counters() == under_rate


@each_target
def test_replicas_are_one_truth_before_anything_is_added_up(target: Target) -> None:
    assert {around for _, around in innermost_aggregations(concrete(target.expr))} == {"max"}


@each_target
def test_every_label_of_a_legend_is_in_the_result(target: Target) -> None:
    parsed = promql_parser.parse(concrete(target.expr))
    outermost = next((node for node in nodes(parsed) if isinstance(node, promql_parser.AggregateExpr)), None)
    assert outermost is not None
    kept = set(outermost.modifier.labels) if outermost.modifier else set()
    assert labels_of(target.legend) <= kept


# ---- Provisioning


def test_the_data_source_knows_the_scrape_interval() -> None:
    (source,) = yaml.safe_load((ROOT / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    prometheus = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert seconds(prometheus["global"]["scrape_timeout"]) < seconds(prometheus["global"]["scrape_interval"])


def test_the_dashboard_is_provisioned_from_where_it_is_mounted() -> None:
    (provider,) = yaml.safe_load((ROOT / "grafana/provisioning/dashboards/creatify.yml").read_text())["providers"]
    assert provider["type"] == "file"
    compose = (ROOT / "deploy/compose.yaml").read_text()
    assert f"../grafana/dashboards:{provider['options']['path']}:ro" in compose
