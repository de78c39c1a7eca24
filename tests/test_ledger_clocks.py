"""Clocks that are wrong or stepped: `at` is this machine's, `date` the API's, which is right."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from creatify_exporter.ledger import Book, Ledger
from creatify_exporter.tasks import HOUR, Record
from tests.support.records import POLICY, SECOND, START, commit, commit_asking, counted, record, shown

MINUTE, DAY = 60 * SECOND, 24 * HOUR
WRONG = [pytest.param(days * DAY, id=f"{days:+} days") for days in (-400, -3, 3, 100)]
HELD = replace(POLICY, zero_hold=180)


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    yield ledger.book("w")
    ledger.close()


def wrong(book: Book, records: list[Record], date: int, offset: int, **options: object) -> None:
    """Commit a listing at `date`, while this machine's clock is off."""
    commit(book, records, at=date + offset, date=date, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [*WRONG, pytest.param(240 * SECOND, id="+4 minutes")])
def test_a_baseline_taken_by_a_wrong_clock_loses_no_task_and_counts_no_old_one(book: Book, offset: int) -> None:
    wrong(book, [], 0, offset)
    tasks = [record(f"new-{n}", created=n * SECOND) for n in range(5)]
    old = record("old", created=-2 * HOUR)
    wrong(book, [*tasks, old], 10 * SECOND, offset)
    assert counted(book)["m", "submitted", ""] == 5
    assert book.totals is not None
    assert book.totals.started == START


@pytest.mark.parametrize("offset", WRONG)
def test_one_listing_by_a_wrong_clock_drops_nothing_and_forgets_no_end(book: Book, offset: int) -> None:
    policy = replace(POLICY, retention=86400)
    wrong(book, [], 0, 0)
    wrong(book, [record("listed", "running", created=0), record("missing", "running", created=0)], SECOND, 0)
    wrong(book, [record("listed", "running", created=0)], HOUR, 0, policy=policy)
    wrong(book, [record("listed", "running", created=0)], 2 * HOUR, offset, policy=policy)
    assert book.totals is not None
    assert (book.totals.tasks, book.totals.unsettled) == (2, 1)
    wrong(book, [record("listed", created=0), record("missing", created=0)], 3 * HOUR, 0, policy=policy)
    assert counted(book) == {("m", "submitted", ""): 2, ("m", "finished", "done"): 2}


@pytest.mark.parametrize("offset", WRONG)
def test_retention_goes_by_the_clock_of_the_api(book: Book, offset: int) -> None:
    policy = replace(POLICY, retention=86400)
    wrong(book, [record("a", created=0)], 0, offset, policy=policy)
    wrong(book, [], HOUR, offset, policy=policy)
    wrong(book, [], DAY, offset, policy=policy)
    assert book.totals is not None
    assert book.totals.tasks == 1
    wrong(book, [], DAY + HOUR, offset, policy=policy)
    assert book.totals.tasks == 0


@pytest.mark.parametrize("offset", WRONG)
def test_a_series_first_answered_by_a_wrong_clock_is_held_no_longer_than_the_hold_after_it_is_right(
    book: Book, offset: int
) -> None:
    tasks = [record("a", model="new", created=SECOND)]
    wrong(book, [], 0, 0, policy=HELD)
    commit(book, tasks, at=SECOND + offset, policy=HELD)  # no date: the step goes unnoticed
    shown(book, now=2 * SECOND + offset)
    commit(book, tasks, at=3 * SECOND + offset, policy=HELD)
    assert shown(book, now=3 * SECOND + offset)["new", "submitted", ""] == 0
    wrong(book, tasks, 10 * SECOND, 0, policy=HELD)
    wrong(book, tasks, 191 * SECOND, 0, policy=HELD)
    assert shown(book)["new", "submitted", ""] == 1


@pytest.mark.parametrize("offset", WRONG)
def test_a_hold_is_the_hold_by_a_clock_that_is_wrong_all_the_time(book: Book, offset: int) -> None:
    tasks = [record("a", model="new", created=SECOND)]
    wrong(book, [], 0, offset, policy=HELD)
    wrong(book, tasks, SECOND, offset, policy=HELD)
    shown(book, now=2 * SECOND + offset)
    wrong(book, tasks, 100 * SECOND, offset, policy=HELD)
    wrong(book, tasks, 181 * SECOND, offset, policy=HELD)
    assert not book.due(HELD, START + offset + 181 * SECOND)
    assert shown(book)["new", "submitted", ""] == 0
    assert book.due(HELD, START + offset + 182 * SECOND)
    wrong(book, tasks, 182 * SECOND, offset, policy=HELD)
    assert shown(book)["new", "submitted", ""] == 1


@pytest.mark.parametrize("before", WRONG)
def test_a_hold_does_not_end_early_when_the_clock_is_set_right_after_the_first_answer(book: Book, before: int) -> None:
    tasks = [record("a", model="new", created=SECOND)]
    wrong(book, [], 0, before, policy=HELD)
    wrong(book, tasks, SECOND, before, policy=HELD)
    shown(book, now=2 * SECOND + before)
    wrong(book, tasks, 10 * SECOND, 0, policy=HELD)
    assert shown(book)["new", "submitted", ""] == 0
    wrong(book, tasks, 170 * SECOND, 0, policy=HELD)
    assert shown(book)["new", "submitted", ""] == 0
    wrong(book, tasks, 191 * SECOND, 0, policy=HELD)
    assert shown(book)["new", "submitted", ""] == 1


@pytest.mark.parametrize("offset", WRONG)
def test_a_missing_task_is_asked_for_again_soon_after_the_clock_is_right(book: Book, offset: int) -> None:
    wrong(book, [], 0, 0)
    wrong(book, [record("a", "running", created=0)], SECOND, 0)
    commit_asking(book, [], {}, at=2 * SECOND + offset)  # no date: the ledger notes the wrong time
    assert counted(book).get(("m", "finished", "done"), 0) == 0
    end = {"a": record("a", created=0)}
    asked = [commit_asking(book, [], end, at=at, date=at)[1] for at in (HOUR + 3 * SECOND, 2 * HOUR + 4 * SECOND)]
    assert ["a"] in asked
    assert counted(book)["m", "finished", "done"] == 1


@pytest.mark.parametrize("offset", WRONG)
def test_a_task_that_left_by_a_wrong_clock_is_asked_for_no_more_often_than_any_other(book: Book, offset: int) -> None:
    wrong(book, [record("a", "running", created=0)], 0, 0)
    commit_asking(book, [], {}, at=SECOND + offset)  # no date: the ledger notes the wrong time
    times, policy = range(10 * MINUTE, 610 * MINUTE, 10 * MINUTE), replace(POLICY, retention=1000 * 86400)
    asked = [commit_asking(book, [], {}, at=at, date=at, policy=policy)[1] for at in times]
    assert 9 <= asked.count(["a"]) <= 14  # once an hour, and before that at doubling intervals


@pytest.mark.parametrize("offset", WRONG)
def test_a_step_of_the_clock_asks_nobody_sooner(book: Book, offset: int) -> None:
    wrong(book, [record("a", "running", created=0)], 0, 0)
    asked = [
        commit_asking(book, [], {}, at=at * SECOND + step, date=at * SECOND)[1]
        for at, step in ((1, 0), (20, offset), (31, offset), (60, 0), (91, offset))
    ]
    assert asked == [["a"], [], ["a"], [], ["a"]]


def test_a_floor_of_the_future_loses_nothing_once_the_api_says_the_time(book: Book) -> None:
    """As version 0.1.0 left it when its clock was ahead at the baseline."""
    commit(book, [], at=3 * DAY)
    wrong(book, [record("before", created=-HOUR), record("after", created=20 * SECOND)], 10 * SECOND, 0)
    assert counted(book)["m", "submitted", ""] == 1


def test_a_clock_that_differs_a_little_is_not_corrected(book: Book) -> None:
    """A listing of minutes: its date is that of its beginning, and must not shorten the hold."""
    tasks = [record("a", model="new", created=0)]
    commit(book, [], policy=HELD, date=0)
    commit(book, tasks, at=240 * SECOND, date=SECOND, policy=HELD)
    shown(book, now=241 * SECOND)
    commit(book, tasks, at=400 * SECOND, date=160 * SECOND, policy=HELD)
    commit(book, tasks, at=420 * SECOND, date=419 * SECOND, policy=HELD)
    assert shown(book)["new", "submitted", ""] == 0
    commit(book, tasks, at=421 * SECOND, date=420 * SECOND, policy=HELD)
    assert shown(book)["new", "submitted", ""] == 1


def test_the_exemplar_is_the_newest_one_by_the_clock_of_the_api(book: Book) -> None:
    wrong(book, [], 0, 100 * DAY)
    tasks: list[Record] = []
    for n, created in enumerate((50 * DAY, SECOND, 2 * SECOND), 1):  # the first one's date is in the future
        tasks.append(record(f"t{n}", "failed", created=created, failed_reason="timeout"))
        wrong(book, tasks, n * 10 * SECOND, 100 * DAY)
    assert book.totals is not None
    assert {total.exemplar for key, total in book.totals.series.items() if key.label == "timeout"} == {"t1"}
