"""The table of metrics and the expositions made from it.

Golden files: `tests/data/golden/NAME.json` is what the API lists (`NAME.before.json` what it listed a minute before,
an empty list where there is none); `NAME.txt` and `NAME.om.txt` are the expositions, without the process' own metrics.
After a change that is meant, `UPDATE_GOLDEN=1 pytest tests/test_metrics.py` writes them anew: read the difference.
"""

import os
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from creatify_exporter.api import CAUSES
from creatify_exporter.ledger import Ledger
from creatify_exporter.listing import Listing, ModelLabels
from creatify_exporter.metrics import METRICS, ExporterCollector, ExporterView, WorkspaceView, render
from creatify_exporter.reasons import BUILT_IN, Classifier
from creatify_exporter.schema import BUCKETS
from creatify_exporter.stream import Page
from creatify_exporter.tasks import TaskReader
from docs import generate_metrics
from tests.support.packages import require
from tests.support.records import POLICY, SECOND, START

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.endswith(".before"))
OURS = tuple(metric.name.removesuffix("_total") for metric in METRICS)
PROCESS = re.compile(r"^(# (HELP|TYPE|UNIT) )?(process|python)_")
CLASSIFY = Classifier()
COUNTING = replace(POLICY, reasons=CLASSIFY.reasons, max_models=3, zero_hold=180)
EXPORTER = ExporterView(True, True, START / SECOND, "1.2.3", "0123abc", "3.11.2")


def view(name: str, listing: Listing | None = None, **fields: Any) -> WorkspaceView:
    plain = WorkspaceView(name=name, up=listing is not None, listing=listing, errors=dict.fromkeys(CAUSES, 0))
    return replace(plain, **fields)


EVERYTHING: dict[str, Any] = {
    "balance_up": True,
    "clock_offset": -1.5,
    "backoff": {"text_generator_task": START / SECOND + 90},
    "owners": {"token_limit": "caller", "overloaded": "upstream"},
}


@cache
def seen(case: str) -> WorkspaceView:
    """Return what is known of a workspace after its two listings, a minute apart, each of which was answered."""
    ledger = Ledger("sqlite://")
    book, before = ledger.book("marketing"), GOLDEN / f"{case}.before.json"
    bodies = [before.read_bytes() if before.exists() else b"[]", (GOLDEN / f"{case}.json").read_bytes()]
    listing = Listing()
    for now, body in zip((START, START + 60 * SECOND), bodies, strict=True):
        draft, listing, read = book.draft(), Listing(), TaskReader(CLASSIFY)
        for batch in Page([body]):
            tasks = read(batch)
            listing.malformed += len(batch) - len(tasks)
            listing.add(draft.add(tasks))
        listing.size = len(body)
        book.commit(draft, listing.models, COUNTING, now)
        assert book.totals is not None
        book.answered(book.totals, now)
    assert book.totals is not None
    ledger.close()
    return view(
        "marketing",
        listing.labelled(ModelLabels(book.totals.models, COUNTING.max_models)),
        totals=book.totals,
        balance=379.5,
        last_success=START / SECOND + 60,
        duration=0.25,
        requests={("text_generator", "200"): 2, ("remaining_credits", "200"): 2},
        **(EVERYTHING if case == "lifecycle" else {}),
    )


def exposition(*views: WorkspaceView, exporter: ExporterView | None = EXPORTER, openmetrics: bool = False) -> str:
    return render(views, exporter, openmetrics=openmetrics).decode()


def families(text: str, *, openmetrics: bool) -> list[Family]:
    return list((parse_openmetrics if openmetrics else parse_text)(text))


EACH = pytest.mark.parametrize(
    ("case", "openmetrics"), [(case, openmetrics) for case in CASES for openmetrics in (False, True)]
)


@EACH
def test_what_the_api_lists_becomes_exactly_this_text(case: str, openmetrics: bool) -> None:
    text = exposition(seen(case), openmetrics=openmetrics)
    ours = "".join(line for line in text.splitlines(keepends=True) if not PROCESS.match(line))
    path = GOLDEN / f"{case}{'.om' if openmetrics else ''}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(ours, encoding="utf-8")
    assert ours == path.read_text(encoding="utf-8")


def test_there_is_no_golden_file_without_a_case() -> None:
    assert {path.name.removesuffix(".txt").removesuffix(".om") for path in GOLDEN.glob("*.txt")} == set(CASES)


@EACH
def test_every_exposition_parses_with_the_table_s_names_types_and_labels(case: str, openmetrics: bool) -> None:
    table = {metric.name.removesuffix("_total"): metric for metric in METRICS}
    parsed = families(exposition(seen(case), openmetrics=openmetrics), openmetrics=openmetrics)
    assert len({family.name for family in parsed}) == len(parsed), "a family appears twice"
    for family in parsed:
        if not family.name.startswith("creatify_"):
            assert family.name.startswith(("process_", "python_"))
            continue
        metric = table[family.name]
        assert (family.type, family.documentation) == (metric.type, metric.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
            suffixes = {"histogram": ("_bucket", "_count", "_sum")}.get(metric.type, ("",))
            assert sample.name in {metric.name + suffix for suffix in suffixes}


@EACH
def test_no_label_set_appears_twice_no_sample_has_a_time_stamp_and_none_is_created(
    case: str, openmetrics: bool
) -> None:
    text = exposition(seen(case), view("second"), openmetrics=openmetrics)
    samples = [one for family in families(text, openmetrics=openmetrics) for one in family.samples]
    keys = [(one.name, tuple(sorted(one.labels.items()))) for one in samples]
    assert len(keys) == len(set(keys))
    assert all(one.timestamp is None for one in samples)
    assert not [one.name for one in samples if one.name.endswith("_created")]
    assert not [one.name for one in samples if one.exemplar and one.exemplar.timestamp]


@pytest.mark.parametrize("case", CASES)
def test_promtool_finds_nothing_to_object_to(case: str) -> None:
    (promtool,) = require("promtool")
    text = exposition(seen(case), view("second"))
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False, timeout=60
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_table_has_each_metric_once_with_a_help_and_a_name_that_fits_its_type() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.help.endswith(".")
        assert metric.type in {"gauge", "counter", "histogram"}
        assert metric.name.endswith("_total") == (metric.type == "counter")
        assert metric.name.startswith("creatify_")


def test_the_collector_describes_the_whole_table_and_nothing_else() -> None:
    described = ExporterCollector([], None).describe()
    assert [(one.name, one.type, one.documentation, one.samples) for one in described] == [
        (metric.name.removesuffix("_total"), metric.type, metric.help, []) for metric in METRICS
    ]


def test_every_metric_of_the_table_appears_where_everything_is_known() -> None:
    assert {one.name for one in families(exposition(seen("lifecycle")), openmetrics=False)} >= set(OURS)


def test_a_filtered_exposition_has_series_of_its_workspaces_alone() -> None:
    text = exposition(seen("lifecycle"), view("second"), exporter=None)
    workspaces = {one.labels.get("workspace") for family in families(text, openmetrics=False) for one in family.samples}
    assert workspaces == {"marketing", "second"}


def test_before_the_first_listing_a_workspace_is_down_and_claims_nothing_else() -> None:
    text = exposition(view("new"), exporter=None)
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        'creatify_up{workspace="new"} 0.0',
        *(f'creatify_exporter_listing_errors_total{{cause="{cause}",workspace="new"}} 0.0' for cause in CAUSES),
    ]


def test_gauges_of_a_listing_are_there_if_and_only_if_the_workspace_is_up() -> None:
    whole = seen("lifecycle")
    gone = {family.name for family in families(exposition(whole), openmetrics=False)} - {
        family.name for family in families(exposition(replace(whole, up=False)), openmetrics=False)
    }
    assert gone == {
        "creatify_text_generator_tasks",
        "creatify_text_generator_failed_tasks",
        "creatify_text_generator_listed_credits",
        "creatify_text_generator_oldest_unfinished_task_timestamp_seconds",
        "creatify_exporter_listing_size_bytes",
        "creatify_exporter_malformed_tasks",
    }


@pytest.mark.parametrize("balance", [0.0, -3.5, 379.123456789])
def test_a_balance_is_shown_as_it_is_and_absent_when_it_was_not_read(balance: float) -> None:
    assert f'creatify_remaining_credits{{workspace="w"}} {balance}' in exposition(view("w", balance=balance))
    assert "creatify_remaining_credits" not in exposition(view("w", balance=None))


def exemplars(case: str, *, openmetrics: bool) -> dict[str, dict[str, str]]:
    parsed = families(exposition(seen(case), openmetrics=openmetrics), openmetrics=openmetrics)
    return {
        one.labels["reason"]: dict(one.exemplar.labels) for family in parsed for one in family.samples if one.exemplar
    }


def test_an_exemplar_names_the_newest_failed_task_in_openmetrics_and_only_once_its_series_shows_a_value() -> None:
    assert exemplars("lifecycle", openmetrics=True) == {
        "quota_exceeded": {"task_id": "new-failed"},
        "overloaded": {"task_id": "fails"},
    }
    assert exemplars("lifecycle", openmetrics=False) == {}
    assert "task_id" not in exposition(seen("lifecycle"))
    assert exemplars("new-model", openmetrics=True) == {}


def test_every_known_model_has_every_series_from_the_start() -> None:
    text = exposition(seen("new-model"))
    lines = [line for line in text.splitlines() if 'model="gemini-3-flash-preview"' in line and "_generator_" in line]
    counters = [line for line in lines if "_total{" in line or "_duration_" in line]
    assert len(counters) == 1 + 1 + 2 + len(BUILT_IN) + 2 * (len(BUCKETS) + 3)
    assert all(line.endswith(" 0.0") for line in counters)
    assert 'creatify_text_generator_failed_tasks{model="gemini-3-flash-preview",reason="overloaded"' in text


def test_credits_lose_nothing_on_the_way_into_the_text() -> None:
    found = Listing()
    for nano in (100_000_000, 200_000_000, 1):
        (task,) = TaskReader(CLASSIFY)(next(iter(Page([b'[{"id": "a"}]']))))
        task.credits = nano
        found.add([task])
    text = exposition(view("w", found.labelled(ModelLabels([], 1))))
    assert 'creatify_text_generator_listed_credits{model="unknown",workspace="w"} 0.300000001' in text


# docs/metrics.md


def test_the_reference_is_as_generated() -> None:
    text = generate_metrics.REFERENCE.read_text("utf-8")
    assert generate_metrics.reference(text) == text, "run: make generate"


def test_the_reference_has_every_metric_once_in_its_tables_and_every_cause() -> None:
    rows = re.findall(r"(?m)^ *\| `(\w+)` \|", generate_metrics.REFERENCE.read_text("utf-8"))
    assert [name for name in rows if name.startswith("creatify_")] == [
        metric.name for metrics in generate_metrics.groups().values() for metric in metrics
    ]
    assert [name for name in rows if name in CAUSES] == list(CAUSES)


def test_the_reference_says_how_many_series_a_model_has() -> None:
    lines = [line for line in exposition(seen("new-model")).splitlines() if 'model="gemini-3-flash-preview"' in line]
    counters = [line for line in lines if "_total{" in line or "_duration_" in line]
    assert f"{len(lines)} series per model" in generate_metrics.REFERENCE.read_text("utf-8")
    assert re.search(rf"\b{len(counters)} of\s+them from the ledger", generate_metrics.REFERENCE.read_text("utf-8"))
