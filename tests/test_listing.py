"""What one listing adds up to, and which labels its models get."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creatify_exporter.listing import Cell, Listing, ModelLabels
from creatify_exporter.stream import Page
from creatify_exporter.tasks import STATUSES, TaskReader

NAMES = st.sampled_from(["a", "b", "c", "d", "other", "unknown"])


def listing(*records: dict[str, Any]) -> Listing:
    """Add up records as the API writes them; an id is added where there is none."""
    result, read = Listing(), TaskReader(lambda text: str(text or "unspecified"))
    numbered = [{"id": f"task-{number}", **one} for number, one in enumerate(records)]
    for batch in Page([json.dumps(numbered).encode()]):
        result.add(read(batch))
    return result


def of(model: str, status: str, **fields: Any) -> dict[str, Any]:
    return {"model_name": model, "status": status, **fields}


def test_tasks_and_credits_add_up_by_model_and_status() -> None:
    found = listing(
        of("a", "done", credits_used=0.1),
        of("a", "done", credits_used=0.2),
        of("a", "failed", credits_used=1),
        of("b", "done", credits_used="2.5"),
        of("b", "done", credits_used=-1),
    )
    assert found.cells == {
        ("a", "done"): Cell(2, 300_000_000),
        ("a", "failed"): Cell(1, 1_000_000_000),
        ("b", "done"): Cell(2, 2_500_000_000),
    }


def test_failed_tasks_add_up_by_reason_and_others_have_none() -> None:
    found = listing(
        of("a", "failed", failed_reason="timeout"),
        of("a", "failed", failed_reason="timeout"),
        of("b", "failed", failed_reason="timeout"),
        of("a", "failed"),
        of("a", "done", failed_reason="timeout"),
        of("a", "running", failed_reason="timeout"),
    )
    assert found.failed == {("a", "timeout"): 2, ("b", "timeout"): 1, ("a", "unspecified"): 1}


def test_the_oldest_unfinished_task_is_found_for_pending_and_running_alone() -> None:
    stamps = ["1970-01-01T00:00:03Z", "1970-01-01T00:00:01Z", "1970-01-01T00:00:02+00:00", None, "broken"]
    records = [of("a", status, created_at=stamp) for status in (*STATUSES, "odd") for stamp in stamps]
    oldest = {status: cell.oldest for (_, status), cell in listing(*records).cells.items()}
    assert oldest == {"pending": 1_000_000, "running": 1_000_000, "done": None, "failed": None, "unknown": None}


def test_models_are_in_the_order_in_which_they_are_listed() -> None:
    assert listing(of("b", "done"), of("a", "done"), of("b", "failed"), of("", "done")).models == ["b", "a", "unknown"]


def test_every_known_model_has_every_status_and_an_unknown_one_only_where_there_is_any() -> None:
    found = listing(of("new", "done"), of("new", "odd")).labelled(ModelLabels(["gone"], 100))
    assert {key: cell.tasks for key, cell in found.cells.items()} == {
        **{("gone", status): 0 for status in STATUSES},
        **{("new", status): int(status == "done") for status in STATUSES},
        ("new", "unknown"): 1,
    }


def test_models_beyond_the_limit_are_merged_into_other() -> None:
    found = listing(
        of("a", "done", credits_used=1),
        of("b", "pending", credits_used=2, created_at="1970-01-01T00:00:09Z"),
        of("c", "pending", credits_used=3, created_at="1970-01-01T00:00:05Z"),
        of("d", "pending", credits_used=4),
        of("b", "failed", failed_reason="timeout"),
        of("c", "failed", failed_reason="timeout"),
    )
    found.size, found.malformed = 7, 8
    merged = found.labelled(ModelLabels([], 1))
    assert merged.cells["other", "pending"] == Cell(3, 9_000_000_000, 5_000_000)
    assert merged.failed == {("other", "timeout"): 2}
    assert {model for model, _ in merged.cells} == {"a", "other"}
    assert (merged.size, merged.malformed) == (7, 8)
    assert found.cells["b", "pending"].tasks == 1  # the original stays as it is


@pytest.mark.parametrize(
    ("known", "limit", "models", "labels"),
    [
        ([], 2, ["a", "b", "c", "a"], ["a", "b", "other", "a"]),
        (["z"], 2, ["a", "b", "z"], ["a", "other", "z"]),
        (["x", "y", "z"], 2, ["a", "z"], ["other", "z"]),  # the limit was lowered: the known ones stay
        (["a", "other"], 2, ["b", "c"], ["b", "other"]),
        ([], 1, ["other", "a", "b"], ["other", "a", "other"]),  # `other` takes no room
    ],
)
def test_labels_go_to_the_first_that_come(known: list[str], limit: int, models: list[str], labels: list[str]) -> None:
    given_labels = ModelLabels(known, limit)
    assert [given_labels(model) for model in models] == labels


@given(st.lists(NAMES), st.lists(NAMES), st.integers(1, 4))
def test_a_label_once_given_stays_and_there_are_never_more_than_the_limit(
    known: list[str], models: list[str], limit: int
) -> None:
    labels = ModelLabels(known, limit)
    first = [labels(model) for model in models]
    assert [labels(model) for model in models] == first
    assert list(labels.known)[: len(set(known))] == list(dict.fromkeys(known))
    assert len(labels.known.keys() - {"other"}) <= max(limit, len(set(known) - {"other"}))
    assert set(first) <= labels.known.keys()


@given(
    st.lists(st.tuples(NAMES, st.sampled_from((*STATUSES, "odd")), st.integers(0, 9), st.sampled_from("rst"))),
    st.integers(1, 4),
)
def test_labels_change_no_sum(tasks: list[tuple[str, str, int, str]], limit: int) -> None:
    found = listing(
        *(of(model, status, credits_used=credits_, failed_reason=text) for model, status, credits_, text in tasks)
    )
    merged = found.labelled(ModelLabels([], limit))
    for attribute in ("tasks", "credits"):
        assert sum(getattr(cell, attribute) for cell in merged.cells.values()) == sum(
            getattr(cell, attribute) for cell in found.cells.values()
        )
    assert sum(merged.failed.values()) == sum(status == "failed" for _, status, *_ in tasks)
