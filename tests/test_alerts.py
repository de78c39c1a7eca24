"""The alerts fire when they should and stay silent when they should, with one replica or two, at 15 s and at 60 s."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from creatify_exporter.metrics import METRICS
from tests.support.commands import output, run
from tests.support.packages import require
from tests.support.promql import innermost_aggregations, known_labels, matched_labels, nodes, selectors

ROOT = Path(__file__).resolve().parents[1]
PROMETHEUS = ROOT / "prometheus"
ALERTS_FILE = PROMETHEUS / "alerts.yml"
TEST_FILES = sorted((PROMETHEUS / "tests").glob("*.yml"))
RUNBOOK = "https://github.com/creatify-exporter/creatify-exporter/blob/main/docs/runbook.md"

WITHOUT_LABELS = {metric.name for metric in METRICS if not metric.labels}

Rule = dict[str, Any]


@cache
def load(path: Path) -> Any:
    """Return what a YAML file holds; not to be changed."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def name_of(rule: Rule) -> str:
    return str(rule.get("alert") or rule["record"])


RULES: dict[str, Rule] = {name_of(rule): rule for group in load(ALERTS_FILE)["groups"] for rule in group["rules"]}
ALERTS = {name: rule for name, rule in RULES.items() if "alert" in rule}
THRESHOLDS = {name for name in RULES if name.startswith("creatify:threshold:")}


@pytest.fixture(scope="module")
def promtool() -> str:
    (program,) = require("promtool")
    return program


def kebab(alert: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", alert.removeprefix("Creatify")).lower()


@cache
def needs(name: str) -> set[str]:
    """Return the names of the rules that a rule is made from, its own included."""
    texts = [RULES[name]["expr"], *RULES[name].get("annotations", {}).values()]
    direct = {other for other in RULES if any(re.search(rf"(?<![\w:]){other}(?![\w:])", text) for text in texts)}
    return {name}.union(*(needs(other) for other in direct - {name}))


def test_the_rules_are_valid_and_pass_the_lint(promtool: str) -> None:
    output(promtool, "check", "rules", "--lint=all", "--lint-fatal", ALERTS_FILE)


def test_prometheus_accepts_the_example_configuration(promtool: str) -> None:
    output(promtool, "check", "config", PROMETHEUS / "prometheus.yml")


def test_alertmanager_accepts_the_example_configuration_and_knows_every_alert_it_names() -> None:
    (amtool,) = require("amtool")
    output(amtool, "check-config", PROMETHEUS / "alertmanager.yml")
    named = set(re.findall(r"Creatify\w+", (PROMETHEUS / "alertmanager.yml").read_text(encoding="utf-8")))
    assert named <= ALERTS.keys()


@pytest.mark.parametrize("alert", ALERTS.values(), ids=name_of)
def test_an_alert_says_how_bad_what_and_where_to_look(alert: Rule) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    annotations = alert["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url", "dashboard_url"}
    if not alert["expr"].startswith("absent("):
        assert re.search(r"\$(value|labels)", annotations["description"]), "no value"
    assert annotations["runbook_url"] == f"{RUNBOOK}#{alert['alert'].lower()}"
    assert "/d/creatify-text-generator" in annotations["dashboard_url"]


@pytest.mark.parametrize("alert", ALERTS)
def test_the_runbook_has_a_section_that_says_meaning_first_look_and_what_to_do(alert: str) -> None:
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    for part in ("**Meaning.**", "**First look.**", "**What to do.**"):
        assert part in sections[alert]


def test_the_runbook_has_no_section_without_an_alert() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### (\w+)$", text, re.MULTILINE)) == ALERTS.keys()


def test_every_threshold_stands_at_the_top_and_is_in_use() -> None:
    groups = load(ALERTS_FILE)["groups"]
    assert groups[0]["name"] == "creatify-settings"
    assert {rule["record"] for rule in groups[0]["rules"]} == {*THRESHOLDS, "creatify:dashboard:info"}
    assert set().union(*(needs(alert) for alert in ALERTS)) == RULES.keys()


def test_rules_ask_only_for_metrics_and_labels_that_there_are() -> None:
    templated = [
        query.replace('\\"', '"').replace("%q", '""')
        for alert in ALERTS.values()
        for text in alert["annotations"].values()
        for query in re.findall(r'(?:query|printf) "((?:[^"\\]|\\.)*[({:](?:[^"\\]|\\.)*)"', text)
    ]
    assert len(templated) > 10
    for expression in [rule["expr"] for rule in RULES.values()] + templated:
        for selector in selectors(expression):
            name = str(selector.name)
            if ":" in name:
                assert name in RULES
            else:
                assert matched_labels(selector) <= known_labels(name), expression


@pytest.mark.parametrize("name", [name for name in RULES if not name.startswith("creatify:steady:")])
def test_replicas_are_one_truth_before_anything_is_added_up(name: str) -> None:
    assert {around for _, around in innermost_aggregations(RULES[name]["expr"])} <= {"max", "min", "absent"}


@pytest.mark.parametrize("name", [name for name in RULES if name.startswith("creatify:steady:")])
def test_what_guards_a_replicas_figures_is_kept_for_each_replica(name: str) -> None:
    assert {around for _, around in innermost_aggregations(RULES[name]["expr"])} == {""}


# ---- promtool


def expand(values: str) -> list[str]:
    """Return the samples of promtool's notation one by one."""
    samples: list[str] = []
    for token in values.split():
        if match := re.fullmatch(r"(-?[\d.]+)(?:([+-][\d.]+))?x(\d+)", token):
            start, step, times = float(match[1]), float(match[2] or 0), int(match[3])
            samples += [f"{start + step * n:.10g}" for n in range(times + 1)]
        elif match := re.fullmatch(r"_x(\d+)", token):
            samples += ["_"] * int(match[1])
        else:
            samples.append(token)
    return samples


def four_times_as_often(tests: Mapping[str, Any]) -> dict[str, Any]:
    """Return promtool tests whose series of one sample a minute are scraped every 15 seconds."""

    def often(case: Mapping[str, Any]) -> dict[str, Any]:
        assert case["interval"] == "1m"
        series = [
            {"series": s["series"], "values": " ".join(v for v in expand(s["values"]) for _ in range(4))}
            for s in case["input_series"]
        ]
        return {**case, "interval": "15s", "input_series": series}

    return {**tests, "tests": [often(case) for case in tests["tests"]]}


def in_directory(tests: Mapping[str, Any], directory: Path, rules: Path = ALERTS_FILE) -> Path:
    """Write promtool tests of some rules to a directory."""
    path = directory / "tests.yml"
    path.write_text(json.dumps({**tests, "rule_files": [str(rules)]}), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_alerts_are_right_at_one_scrape_a_minute(promtool: str, path: Path) -> None:
    output(promtool, "test", "rules", path)


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_alerts_are_right_at_four_scrapes_a_minute(promtool: str, path: Path, tmp_path: Path) -> None:
    output(promtool, "test", "rules", in_directory(four_times_as_often(load(path)), tmp_path))


def test_the_notation_of_series_is_understood() -> None:
    assert expand("1x2 stale _x2 10-2.5x1 _ 7") == ["1", "1", "1", "stale", "_", "_", "10", "7.5", "_", "7"]


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_tested_firing_with_its_words_and_silent_in_another_case(alert: str) -> None:
    cases = load(PROMETHEUS / "tests" / f"{kebab(alert)}.yml")["tests"]
    spoken = [t for case in cases for t in case.get("alert_rule_test", []) if t["alertname"] == alert]
    assert any(t["exp_alerts"] for t in spoken)
    assert any(not t["exp_alerts"] for t in spoken)

    def fires(case: Mapping[str, Any]) -> bool:
        asked = [t for t in case.get("promql_expr_test", []) if f'"{alert}"' in t["expr"]]
        return any(t["exp_samples"] for t in asked)

    assert any(fires(case) for case in cases)
    assert any(not fires(case) for case in cases)


# ---- Mutants: each comparison, clause, number and duration changed once; some test must go red.


@dataclass(frozen=True)
class Mutant:
    """A rule changed in one place; `alternatives` are changes of which one has to be noticed."""

    change: str
    alternatives: tuple[Rule, ...]


_FLIPPED = {">": "<", "<": ">", ">=": "<", "<=": ">", "==": "!=", "!=": "=="}


def replacements(node: promql_parser.Expr) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what may be wrong about one node: what it would be, and the texts of the wrong expressions."""
    if isinstance(node, promql_parser.NumberLiteral):
        yield f"{node.val} otherwise", (str(node.val * 1.5 if node.val else 1e9),)
        if node.val:
            yield f"{node.val} halved", (str(node.val / 2),)
    elif isinstance(node, promql_parser.AggregateExpr) and str(node.op) in ("max", "min"):
        if isinstance(node.expr, promql_parser.VectorSelector) and str(node.expr.name) in WITHOUT_LABELS:
            return  # by instance they are one series each, however they are aggregated
        wrong = {"max": ("sum", "min"), "min": ("sum", "max")}[str(node.op)]
        labels = ", ".join(node.modifier.labels) if node.modifier else ""
        texts = tuple(f"{op} by ({labels}) ({node.expr.prettify()})" for op in wrong)
        yield f"{node.op} by ({labels}) is another aggregation", texts
    elif isinstance(node, promql_parser.BinaryExpr):
        operator, left, right = str(node.op), node.lhs.prettify(), node.rhs.prettify()
        if operator in _FLIPPED:
            yield f"{operator} flipped", (f"({left}) {_FLIPPED[operator]} ({right})",)
        elif operator == "-":
            yield "- flipped", (f"({left}) + ({right})",)
        else:
            yield f"no {operator} {' '.join(right.split())[:60]}", (f"({left})",)
            if operator == "or":
                yield f"no {left[:60]} or", (f"({right})",)


def mutants(rule: Rule) -> Iterator[Mutant]:
    """Yield every mutant of a rule."""
    original = promql_parser.parse(rule["expr"])
    for index, node in enumerate(nodes(original)):
        for change, texts in replacements(node):
            alternatives = []
            for text in texts:
                position = -1

                def swap(_: promql_parser.Expr, index: int = index, text: str = text) -> promql_parser.Expr | None:
                    nonlocal position
                    position += 1
                    return promql_parser.parse(text) if position == index else None

                changed = promql_parser.transform(original, swap).prettify()
                promql_parser.parse(changed)
                alternatives.append({**rule, "expr": changed})
            yield Mutant(change, tuple(alternatives))
    for key in ("for", "keep_firing_for"):
        if key in rule:
            yield Mutant(f"no {key}", ({k: v for k, v in rule.items() if k != key},))
            minutes = int(rule[key].removesuffix("m"))
            yield Mutant(f"{key} four times as long", ({**rule, key: f"{4 * minutes}m"},))


@cache
def cases_of(alert: str) -> list[dict[str, Any]]:
    """Return what is asked of one alert, case by case: in its own file, the shortest first, then in situations."""
    own, situations = (load(PROMETHEUS / "tests" / f"{stem}.yml") for stem in (kebab(alert), "situations"))
    cases = []
    for case in sorted(own["tests"], key=lambda c: sum(len(expand(s["values"])) for s in c["input_series"])):
        spoken = [t for t in case.get("alert_rule_test", []) if t["alertname"] == alert]
        asked = [t for t in case.get("promql_expr_test", []) if f'"{alert}"' in t["expr"]]
        cases.append({**own, "tests": [{**case, "alert_rule_test": spoken, "promql_expr_test": asked}]})
    for case in situations["tests"]:
        asked = [
            {
                **t,
                "expr": f'count by (alertname) (ALERTS{{alertstate="firing", alertname="{alert}"}})',
                "exp_samples": [sample for sample in t["exp_samples"] if f'"{alert}"' in sample["labels"]],
            }
            for t in case["promql_expr_test"]
        ]
        cases.append({**situations, "tests": [{**case, "promql_expr_test": asked}]})
    return cases


def fails(promtool: str, alert: str, changed: Rule | None, directory: Path) -> bool:
    """Say whether a case of an alert fails when one of the rules that it is made from is another one."""
    rules, wanted = directory / "alerts.yml", needs(alert)
    groups = [
        {
            **group,
            "rules": [
                changed if changed and name_of(changed) == name_of(rule) else rule
                for rule in group["rules"]
                if name_of(rule) in wanted
            ],
        }
        for group in load(ALERTS_FILE)["groups"]
    ]
    rules.write_text(json.dumps({"groups": [group for group in groups if group["rules"]]}), encoding="utf-8")
    thrifty = os.environ | {"GOMAXPROCS": "1", "GOGC": "400"}
    return any(
        run(promtool, "test", "rules", in_directory(case, directory, rules), env=thrifty).returncode
        for case in cases_of(alert)
    )


@pytest.mark.parametrize("alert", ALERTS)
def test_the_cases_of_an_alert_need_no_rules_but_those_it_is_made_from(
    promtool: str, alert: str, tmp_path: Path
) -> None:
    assert not fails(promtool, alert, None, tmp_path)


@pytest.mark.parametrize("name", [name for name in RULES if name != "creatify:dashboard:info"])
def test_a_change_of_any_threshold_or_operator_is_noticed(promtool: str, name: str, tmp_path: Path) -> None:
    concerned = [alert for alert in ALERTS if name in needs(alert)]
    survived = [
        mutant.change
        for mutant in mutants(RULES[name])
        if not any(fails(promtool, alert, wrong, tmp_path) for wrong in mutant.alternatives for alert in concerned)
    ]
    assert not survived
