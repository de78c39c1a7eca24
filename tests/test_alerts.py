"""The alerts fire when they should and stay silent when they should, with one replica or two, at 15 s and at 60 s."""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from creatify_exporter.metrics import METRICS
from tests.support.commands import output, run
from tests.support.figures import Figures, Values, expand, wilson
from tests.support.packages import require
from tests.support.promql import innermost_aggregations, known_labels, matched_labels, nodes, selectors

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[1]
PROMETHEUS = ROOT / "prometheus"
ALERTS_FILE = PROMETHEUS / "alerts.yml"
TEST_FILES = sorted((PROMETHEUS / "tests").glob("*.yml"))
RUNBOOK = '{{ with query "creatify:dashboard:info" }}{{ . | first | label "runbook_url" }}{{ end }}'
# What is kept for each replica, because it says whose figures can be relied on.
BY_REPLICA = "creatify:recorded:"

WITHOUT_LABELS = {metric.name for metric in METRICS if not metric.labels}

Rule = dict[str, Any]


@cache
def load(path: Path) -> Any:
    """Return what a YAML file holds; not to be changed."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def name_of(rule: Rule) -> str:
    """Return the name of a rule, with its window where there is one for each window."""
    name = str(rule.get("alert") or rule["record"])
    return f"{name} [{rule['labels']['window']}]" if "window" in rule.get("labels", {}) else name


RULES: dict[str, Rule] = {name_of(rule): rule for group in load(ALERTS_FILE)["groups"] for rule in group["rules"]}
ALERTS = {name: rule for name, rule in RULES.items() if "alert" in rule}
RECORDED = {str(rule["record"]) for rule in RULES.values() if "record" in rule}
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
    said = {word for text in texts for word in re.findall(r"[\w:]+", text)}
    direct = {other for other, rule in RULES.items() if rule.get("record") in said}
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


ROUTES = [
    ("severity=critical alertname=CreatifyFailureSpike", "on-call"),
    ("severity=critical owner=caller", "on-call"),
    ("severity=info alertname=CreatifyModelOverflow", "notes"),
    ("severity=warning alertname=CreatifyFailureReasonSpike owner=caller", "developers"),
    ("severity=warning alertname=CreatifyFailureReasonSpike owner=account", "accounts"),
    ("severity=warning alertname=CreatifyFailureReasonSpike owner=upstream", "operators"),
    ("severity=warning alertname=CreatifyFailureReasonSpike owner=unknown", "operators"),
    ("severity=warning alertname=CreatifySpendingSpike", "accounts"),
    ("severity=warning alertname=CreatifyModelFailureSpike", "operators"),
]


@pytest.mark.parametrize(("labels", "receiver"), ROUTES)
def test_alertmanager_routes_by_severity_and_owner(labels: str, receiver: str) -> None:
    (amtool,) = require("amtool")
    path = PROMETHEUS / "alertmanager.yml"
    assert output(amtool, "config", "routes", "test", f"--config.file={path}", *labels.split()).strip() == receiver


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
        re.sub(r"%(\[\d\])?s", "1h", re.sub(r"%(\[\d\])?q", '""', query.replace('\\"', '"')))
        for alert in ALERTS.values()
        for text in alert["annotations"].values()
        for query in re.findall(r'(?:query|printf) "((?:[^"\\]|\\.)*[({:](?:[^"\\]|\\.)*)"', text)
    ]
    assert len(templated) > 10
    for expression in [rule["expr"] for rule in RULES.values()] + templated:
        for selector in selectors(expression):
            name = str(selector.name)
            if ":" in name:
                assert name in RECORDED
            else:
                assert matched_labels(selector) <= known_labels(name), expression


@pytest.mark.parametrize("name", [name for name in RULES if not name.startswith(BY_REPLICA)])
def test_replicas_are_one_truth_before_anything_is_added_up(name: str) -> None:
    assert {around for _, around in innermost_aggregations(RULES[name]["expr"])} <= {"max", "min", "group", "absent"}


@pytest.mark.parametrize("name", [name for name in RULES if name.startswith(BY_REPLICA)])
def test_what_guards_a_replicas_figures_is_kept_for_each_replica(name: str) -> None:
    assert {around for _, around in innermost_aggregations(RULES[name]["expr"])} <= {""}


# ---- promtool


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


def is_named_in(text: str, name: str) -> bool:
    """Return whether a text names a rule, and not only another one whose name holds its name."""
    return re.search(rf"(?<![\w:]){name}(?![\w:])", text) is not None


def in_directory(tests: Mapping[str, Any], directory: Path, name: str, more: Sequence[Rule] = ()) -> Path:
    """Write promtool tests to a directory, with some more rules, and without those that they cannot notice."""
    text = json.dumps([[case.get("promql_expr_test"), case.get("alert_rule_test")] for case in tests["tests"]])
    asked = RULES if "alertname)" in text else [rule for rule in RULES if is_named_in(text, rule.split(" ")[0])]
    wanted = set[str]().union(*(needs(rule) for rule in asked))
    groups = [
        {**group, "rules": [rule for rule in group["rules"] if name_of(rule) in wanted]}
        for group in load(ALERTS_FILE)["groups"]
    ]
    groups = [group for group in [*groups, {"name": "more", "rules": list(more)}] if group["rules"]]
    rules, path, order = directory / f"rules-{name}", directory / name, [group["name"] for group in groups]
    rules.write_text(json.dumps({"groups": groups}), encoding="utf-8")
    path.write_text(json.dumps({**tests, "rule_files": [str(rules)], "group_eval_order": order}), encoding="utf-8")
    return path


# No more than one core and few collections of garbage, which halves what promtool costs.
FRUGAL = {"GOMAXPROCS": "1", "GOGC": "off", "GOMEMLIMIT": "500MiB"}


def judged(promtool: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run promtool tests."""
    return run(promtool, "test", "rules", path, env=os.environ | FRUGAL, timeout=600)


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_alerts_are_right_at_one_scrape_a_minute_and_at_four(promtool: str, tmp_path: Path, path: Path) -> None:
    for tests in (load(path), four_times_as_often(load(path))):
        ended = judged(promtool, in_directory(tests, tmp_path, path.name))
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_file_of_tests_is_about_all_rules() -> None:
    order = [group["name"] for group in load(ALERTS_FILE)["groups"]]
    for path in TEST_FILES:
        assert load(path)["rule_files"] == ["../alerts.yml"]
        assert load(path)["group_eval_order"] == order


def test_the_notation_of_series_is_understood() -> None:
    assert expand("1x2 stale _x2 10-2.5x1 _ 7") == ["1", "1", "1", "stale", "_", "_", "10", "7.5", "_", "7"]


SETTINGS = {
    name.rpartition(":")[2]: float(RULES[name]["expr"].removeprefix("vector(").removesuffix(")")) for name in THRESHOLDS
}


def values_asked(query: Mapping[str, Any]) -> Values:
    """Return the samples that a query of promtool expects, by their labels."""
    return {frozenset(re.findall(r'(\w+)="([^"]*)"', each["labels"])): each["value"] for each in query["exp_samples"]}


def test_each_figure_that_the_rules_record_is_worked_out_again_from_the_samples() -> None:
    tests = load(PROMETHEUS / "tests" / "figures.yml")
    (case,) = tests["tests"]
    queries = {query["expr"].removeprefix("round(").partition(" ")[0]: query for query in case["promql_expr_test"]}
    figures = Figures(case, 1600, int(tests["evaluation_interval"].removesuffix("m")), SETTINGS).all()
    assert queries.keys() == figures.keys()
    for name, values in figures.items():
        assert queries[name]["eval_time"] == "1600m"
        assert values_asked(queries[name]) == {
            labels: pytest.approx(1000 * value, abs=0.51) for labels, value in values.items()
        }, name
    bounds = {name for name in RECORDED if name.endswith("ratio:lower_bound")}
    assert queries.keys() | bounds == {
        name for name in RECORDED if name not in THRESHOLDS | {"creatify:dashboard:info"}
    }


def test_the_lower_bound_of_a_ratio_that_the_cases_ask_for_is_wilsons() -> None:
    cases = load(PROMETHEUS / "tests" / "failure-spike.yml")["tests"]
    finished = {"15m": (10, 9), "1h": (30, 29), "6h": (60, 59)}
    for index, level in enumerate(("workspace", "workspace_model")):
        record = f"{level}:creatify_text_generator_failure_ratio:lower_bound"
        (query,) = [
            q for case in cases for q in case.get("promql_expr_test", []) if q["expr"].startswith(f"round({record}")
        ]
        for labels, value in values_asked(query).items():
            n = finished[dict(labels)["window"]][index]
            assert value == pytest.approx(1e6 * wilson(7, n, SETTINGS["confidence_z"]), abs=0.51)


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


# ---- Mutants: each comparison, clause, number, duration and threshold changed once; some test must go red.
# All mutants that a file of tests may notice go through promtool together: those of a recording rule as queries beside
# the ones that ask for its values, those of an alert as alerts of other names.


@dataclass(frozen=True)
class Mutant:
    """A rule changed in one place, in some wrong ways of which one has to be noticed."""

    rule: str
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
        if {str(each.name) for each in selectors(node.expr.prettify())} <= WITHOUT_LABELS:
            return  # by instance they are one series each, however they are aggregated
        wrong = {"max": ("sum", "min"), "min": ("sum", "max")}[str(node.op)]
        labels = ", ".join(node.modifier.labels) if node.modifier else ""
        texts = tuple(f"{op} by ({labels}) ({node.expr.prettify()})" for op in wrong)
        yield f"{node.op} by ({labels}) is another aggregation", texts
    elif isinstance(node, promql_parser.BinaryExpr):
        operator, left, right = str(node.op), node.lhs.prettify(), node.rhs.prettify()
        other = _FLIPPED.get(operator, "+" if operator == "-" else "")
        if other:
            yield f"{operator} flipped", (f"({left}) {other} {node.modifier or ''} ({right})",)
        else:
            yield f"no {operator} {' '.join(right.split())[:60]}", (f"({left})",)
        if operator == "or":
            yield f"no {left[:60]} or", (f"({right})",)


def mutants(rule: Rule) -> Iterator[Mutant]:
    """Yield every mutant of a rule."""
    name = name_of(rule)
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

                with suppress(ValueError):  # what is left is no expression: nobody could write that by mistake
                    changed = promql_parser.transform(original, swap).prettify()
                    promql_parser.parse(changed)
                    alternatives.append({**rule, "expr": changed})
            if alternatives:
                yield Mutant(name, change, tuple(alternatives))
    for key in ("for", "keep_firing_for"):
        if key in rule:
            yield Mutant(name, f"no {key}", ({k: v for k, v in rule.items() if k != key},))
            minutes = int(rule[key].removesuffix("m"))
            yield Mutant(name, f"{key} four times as long", ({**rule, key: f"{4 * minutes}m"},))


def threshold_mutants(threshold: str) -> Iterator[Mutant]:
    """Yield the mutants of a threshold: half as much again, and half, in every rule that asks for it."""
    value = float(RULES[threshold]["expr"].removeprefix("vector(").removesuffix(")"))
    users = [rule for rule in RULES.values() if threshold in rule["expr"]]
    for factor in (1.5, 0.5):
        wrong = [
            {**rule, "expr": rule["expr"].replace(f"scalar({threshold})", f"{value * factor:g}")} for rule in users
        ]
        yield Mutant(threshold, f"times {factor}", tuple(wrong))


ALL_MUTANTS = [
    *(mutant for threshold in sorted(THRESHOLDS) for mutant in threshold_mutants(threshold)),
    *(
        mutant
        for name, rule in RULES.items()
        if not name.startswith("creatify:") or BY_REPLICA in name
        for mutant in mutants(rule)
    ),
]


def values_told(case: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the words of an alert that fires tell about its value, as a query with the name of the alert."""
    for told in case.get("alert_rule_test", []):
        if told["exp_alerts"] and "$value" in ALERTS[told["alertname"]]["annotations"]["description"]:
            yield {"expr": told["alertname"], "eval_time": told["eval_time"]}


def wrong_names(asked: str) -> Iterator[tuple[int, Rule, str, str]]:
    """Yield the mutants that a query may notice: number, wrong rule, the query of the right and of the wrong rule."""
    for number, mutant in enumerate(ALL_MUTANTS):
        for index, wrong in enumerate(mutant.alternatives):
            name = str(wrong.get("alert") or wrong["record"])
            if not is_named_in(asked, name):
                continue
            if "alert" in wrong and asked != name:
                other = f"{name}_{number}_{index}"
                yield number, {**wrong, "alert": other}, asked, asked.replace(f'"{name}"', f'"{other}"')
            else:
                right = RULES[name_of(wrong)]["expr"]
                yield number, wrong, asked.replace(name, f"({right})"), asked.replace(name, f"({wrong['expr']})")


def noticed(promtool: str, path: Path, directory: Path) -> set[int]:
    """Return the numbers of the mutants that a file of tests notices: a query gives another answer."""
    tests, alerts, cases = load(path), dict[str, Rule](), []
    asked: list[tuple[int, str, str]] = []  # a mutant for each pair of queries
    for case in tests["tests"]:
        queries = []
        for query in [*case.get("promql_expr_test", []), *values_told(case)]:
            for number, wrong, right, other in wrong_names(query["expr"]):
                alerts |= {wrong["alert"]: wrong} if "ALERTS" in other else {}
                for expression in (right, other):
                    # Whatever it gives, it is not this: so it is printed.
                    never = [{"labels": "never", "value": 0}]
                    queries.append({"expr": expression, "eval_time": query["eval_time"], "exp_samples": never})
                asked.append((number, right, other))
        if queries:
            cases.append({**case, "alert_rule_test": [], "promql_expr_test": queries})
    if not asked:
        return set()
    said = judged(promtool, in_directory({**tests, "tests": cases}, directory, path.name, list(alerts.values())))
    answers = re.findall(r'expr: "(?:[^"\\]|\\.)*", time: \S+,\s+(?:exp: .*\n\s+got: (.*)|(err: .*))', said.stderr)
    assert len(answers) == 2 * len(asked), said.stderr[:3000]
    # The names of alerts differ, and must not count.
    plain = [re.sub(r"_\d+_\d+", "", " ".join(answer)) for answer in answers]
    return {
        number for (number, _, _), right, other in zip(asked, plain[::2], plain[1::2], strict=True) if right != other
    }


@pytest.fixture(scope="module")
def all_noticed(promtool: str, tmp_path_factory: pytest.TempPathFactory) -> set[int]:
    directory = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(2) as pool:
        return set().union(*pool.map(lambda path: noticed(promtool, path, directory), TEST_FILES))


@pytest.mark.parametrize("name", dict.fromkeys(mutant.rule for mutant in ALL_MUTANTS))
def test_a_change_of_any_threshold_or_operator_is_noticed(all_noticed: set[int], name: str) -> None:
    assert [m.change for number, m in enumerate(ALL_MUTANTS) if m.rule == name and number not in all_noticed] == []
