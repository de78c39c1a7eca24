"""Tasks that leave the list before their end: asked for by id, and counted like listed ones."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa

from creatify_exporter.ledger import Book, Ledger, LedgerError
from creatify_exporter.tasks import HOUR, NANO, Record
from tests.support.faults import full_disk
from tests.support.records import POLICY, SECOND, START, commit, commit_asking, counted, record, shown

MINUTE = 60 * SECOND
DAY = 24 * HOUR


@pytest.fixture
def reopened(tmp_path: Path) -> Iterator[Callable[[], Book]]:
    """Return the workspace as another process sees it, each time it is called."""
    with ExitStack() as stack:

        def make() -> Book:
            ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
            stack.callback(ledger.close)
            return ledger.book("w")

        yield make


@pytest.fixture
def book(reopened: Callable[[], Book]) -> Book:
    """A workspace after an empty baseline at START and one running task a second later."""
    book = reopened()
    commit(book, [])
    commit(book, [running("a")], at=SECOND)
    return book


def running(name: str, credits_: float = 1) -> Record:
    return record(name, "running", created=SECOND, credits=credits_)


def failed(name: str, credits_: float = 2) -> Record:
    return record(name, "failed", created=SECOND, credits=credits_, failed_reason="timeout")


def unsettled(book: Book) -> int:
    assert book.totals is not None
    return book.totals.unsettled


FAILED = {
    ("m", "submitted", ""): 1,
    ("m", "finished", "failed"): 1,
    ("m", "failures", "timeout"): 1,
    ("m", "credits", ""): 2 * NANO,
}


def test_the_end_of_a_task_that_left_the_list_counts_as_if_it_were_listed(book: Book) -> None:
    listing, asked = commit_asking(book, [], {"a": failed("a")}, at=2 * SECOND)
    assert asked == ["a"]
    assert listing.models == []
    assert counted(book) == FAILED
    assert book.totals is not None
    assert {key.label for key, total in book.totals.series.items() if key.metric == "bucket" and total.value} == {
        "failed/le=5"
    }
    assert [total.exemplar for key, total in book.totals.series.items() if key.label == "timeout"] == ["a"]
    assert unsettled(book) == 0
    assert commit_asking(book, [], {}, at=DAY)[1] == []
    assert counted(book) == FAILED


def test_nothing_is_asked_and_nothing_is_read_while_nothing_is_missing(book: Book) -> None:
    statements: list[str] = []

    def note(*event: object) -> None:
        statements.append(str(event[2]))

    draft = book.draft()
    draft.add([])
    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        for tasks in ([running("a")], [running("a"), running("b")]):
            listing, asked = commit_asking(book, tasks, {}, at=2 * SECOND)
            assert asked == []
            assert listing.models == ["m"]
        commit(book, [failed("a"), failed("b")], at=3 * SECOND)
        statements.clear()
        draft = book.draft()
        assert draft.missing(10, START + 4 * SECOND) == []  # finished tasks may leave
        assert statements == []
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def test_a_task_still_running_is_asked_for_at_growing_intervals_up_to_an_hour(
    book: Book, reopened: Callable[[], Book]
) -> None:
    """The intervals are kept in the ledger: each listing is one of another process."""
    asked_at, still = list[int](), {"a": running("a")}
    for at in range(2, 5 * 3600, 30):
        if commit_asking(reopened() if at % 900 == 2 else book, [], still, at=at * SECOND)[1]:
            asked_at.append(at)
    gaps = [later - earlier for earlier, later in pairwise(asked_at)]
    assert asked_at[0] == 2
    assert gaps == sorted(gaps)
    assert gaps[:4] == [30, 60, 120, 240]
    assert gaps[-1] == 3600
    assert commit_asking(book, [], {"a": failed("a")}, at=12 * HOUR)[1] == ["a"]
    assert counted(book) == FAILED


def test_credits_that_grow_while_a_task_is_missing_count(book: Book) -> None:
    commit_asking(book, [], {"a": running("a", 5)}, at=2 * SECOND)
    assert counted(book)["m", "credits", ""] == 5 * NANO
    commit_asking(book, [], {"a": failed("a", 3)}, at=HOUR)
    assert counted(book) == FAILED | {("m", "credits", ""): 5 * NANO}


@pytest.mark.parametrize("status", ["running", "pending", "odd"])
def test_what_is_not_at_its_end_stays_unsettled(book: Book, status: str) -> None:
    commit_asking(book, [], {"a": record("a", status)}, at=2 * SECOND)
    assert unsettled(book) == 1
    assert commit_asking(book, [], {"a": failed("a")}, at=MINUTE)[1] == ["a"]


def test_a_task_that_is_gone_is_not_asked_for_again_unless_it_was_listed_again(book: Book) -> None:
    commit_asking(book, [], {"a": None}, at=2 * SECOND)
    assert unsettled(book) == 0
    for at in (MINUTE, HOUR, DAY):
        assert commit_asking(book, [], {}, at=at)[1] == []
    commit(book, [running("a")], at=2 * DAY)
    assert commit_asking(book, [], {"a": failed("a")}, at=3 * DAY)[1] == ["a"]
    assert counted(book) == FAILED


def test_a_task_whose_request_fails_is_asked_for_later(book: Book) -> None:
    assert commit_asking(book, [], {}, at=2 * SECOND)[1] == ["a"]
    assert commit_asking(book, [], {}, at=12 * SECOND)[1] == []
    assert commit_asking(book, [], {}, at=40 * SECOND)[1] == ["a"]
    assert commit_asking(book, [], {"a": failed("a")}, at=HOUR)[1] == ["a"]
    assert counted(book) == FAILED


def test_a_task_nobody_had_time_to_ask_for_is_asked_for_at_the_next_listing(book: Book) -> None:
    commit_asking(book, [], {}, at=2 * SECOND, settle=0)
    assert unsettled(book) == 1
    assert commit_asking(book, [], {"a": failed("a")}, at=3 * SECOND)[1] == ["a"]


def test_a_task_that_is_listed_again_is_simply_listed(book: Book) -> None:
    commit_asking(book, [], {}, at=2 * SECOND)
    listing, asked = commit_asking(book, [running("a")], {}, at=HOUR)
    assert (listing.models, asked, unsettled(book)) == (["m"], [], 0)
    commit(book, [failed("a")], at=HOUR + MINUTE)
    assert commit_asking(book, [], {}, at=DAY)[1] == []
    assert counted(book) == FAILED


def test_the_longest_missing_ones_come_first_and_no_more_than_the_limit(book: Book) -> None:
    names = [f"t{number}" for number in range(6)]
    commit(book, [running("a"), *map(running, names)], at=2 * SECOND)
    commit(book, [running(name) for name in names[:3]], at=3 * SECOND)  # a, t3, t4, t5 leave
    commit(book, [running("t0")], at=4 * SECOND)  # t1, t2 leave
    draft = book.draft()
    draft.add([])
    assert draft.missing(10, START + 5 * SECOND) == ["a", "t3", "t4", "t5", "t1", "t2", "t0"]
    assert draft.missing(2, START + 5 * SECOND) == ["a", "t3"]
    assert draft.missing(0, START + 5 * SECOND) == []


def test_a_task_asked_for_before_waits_while_others_have_their_turn(book: Book) -> None:
    names = [f"t{number}" for number in range(5)]
    commit(book, list(map(running, names)), at=2 * SECOND)
    asked = [commit_asking(book, [], {}, at=at * SECOND, settle=2)[1] for at in (3, 4, 5)]
    assert asked == [["a", "t0"], ["t1", "t2"], ["t3", "t4"]]


def test_replicas_ask_once_between_them(book: Book, reopened: Callable[[], Book]) -> None:
    other = reopened()
    commit(other, [running("a")], at=2 * SECOND)
    assert commit_asking(book, [], {}, at=3 * SECOND)[1] == ["a"]
    assert commit_asking(other, [], {}, at=4 * SECOND)[1] == []
    assert commit_asking(other, [], {"a": failed("a")}, at=MINUTE)[1] == ["a"]
    assert commit_asking(book, [], {}, at=2 * MINUTE)[1] == []
    assert counted(book) == counted(other) == FAILED


def test_what_a_replica_lists_another_one_may_settle_too(book: Book, reopened: Callable[[], Book]) -> None:
    """Both have the end of the task, one from its list, one by id; it counts once and stays listed."""
    other = reopened()
    commit(other, [running("a")], at=2 * SECOND)
    draft = other.draft()
    assert draft.missing(10, START + 3 * SECOND) == ["a"]
    commit(book, [failed("a")], at=3 * SECOND)
    commit_asking(other, [], {"a": failed("a")}, at=4 * SECOND)
    assert counted(other) == FAILED
    assert unsettled(other) == 0


def test_a_task_from_before_the_baseline_counts_its_end_alone(reopened: Callable[[], Book]) -> None:
    book = reopened()
    commit(book, [record("old", "running", credits=4, created=-DAY)])
    commit_asking(book, [], {"old": record("old", "done", credits=5, created=-DAY)}, at=SECOND)
    assert counted(book) == {("m", "finished", "done"): 1, ("m", "credits", ""): NANO}


def test_the_model_is_the_one_the_task_was_listed_with(book: Book) -> None:
    commit_asking(book, [], {"a": record("a", "done", model="renamed", credits=2, created=SECOND)}, at=2 * SECOND)
    assert counted(book)["m", "finished", "done"] == 1
    assert {key[0] for key in counted(book)} == {"m"}


def test_a_listing_that_is_not_committed_settles_nothing(book: Book) -> None:
    draft = book.draft()
    assert draft.missing(10, START + 2 * SECOND) == ["a"]
    draft.gone("a")
    assert commit_asking(book, [], {"a": failed("a")}, at=3 * SECOND)[1] == ["a"]
    assert counted(book) == FAILED


def test_what_cannot_be_recorded_is_not_asked_again_and_again(book: Book) -> None:
    """A full disk often refuses the COMMIT alone."""
    end, asked = {"a": failed("a")}, list[str]()
    with full_disk():
        for second in range(2, 6):
            draft = book.draft()
            asked += draft.missing(10, START + second * SECOND)
            with pytest.raises(LedgerError):
                book.commit(draft, [], POLICY, START + second * SECOND)
    assert asked == ["a"]
    assert [commit_asking(book, [], end, at=second * SECOND)[1] for second in (6, 7)] == [[], ["a"]]
    assert counted(book) == FAILED


def test_retention_drops_an_unsettled_task_in_the_end(book: Book) -> None:
    short = replace(POLICY, retention=7200)
    for at in (2 * SECOND, HOUR, 3 * HOUR):
        commit_asking(book, [], {}, at=at, policy=short)
    assert book.totals is not None
    assert (book.totals.tasks, book.totals.unsettled) == (0, 0)
    assert commit_asking(book, [], {}, at=5 * HOUR, policy=short)[1] == []


def test_an_answer_for_a_task_that_was_dropped_or_never_known_counts_nothing(book: Book) -> None:
    before = counted(book)
    commit_asking(book, [running("a")], {}, at=SECOND)
    draft = book.draft()
    draft.add([])
    for name in ("stranger", "nobody", "nothing"):
        draft.gone(name)
        draft.postpone(name)
    book.commit(draft, [], POLICY, START + 2 * SECOND)
    assert counted(book) == before


def test_a_task_settled_while_its_series_is_held_shows_with_it(reopened: Callable[[], Book]) -> None:
    book, policy = reopened(), replace(POLICY, zero_hold=180)
    commit(book, [], policy=policy)
    commit(book, [running("a")], at=SECOND, policy=policy)
    assert shown(book, now=SECOND)["m", "finished", "failed"] == 0
    commit_asking(book, [], {"a": failed("a")}, at=MINUTE, policy=policy)
    assert shown(book)["m", "finished", "failed"] == 0
    book.commit(None, (), policy, START + 181 * SECOND)
    assert shown(book)["m", "finished", "failed"] == 1


def test_more_missing_tasks_than_one_statement_takes_are_all_asked_for_in_time(reopened: Callable[[], Book]) -> None:
    book, names = reopened(), [f"t{number}" for number in range(2500)]
    commit(book, [])
    commit(book, map(running, names), at=SECOND)
    ends = {name: failed(name) for name in names}
    found: list[str] = []
    for at in (2, 3, 4, 5):
        found += commit_asking(book, [], ends, at=at * SECOND, settle=1000)[1]
    assert sorted(found) == sorted(names)
    assert counted(book)["m", "finished", "failed"] == 2500
    assert unsettled(book) == 0


def test_replicas_that_list_different_tasks_for_good_lose_none_of_them(
    book: Book, reopened: Callable[[], Book]
) -> None:
    """One lists the task all the time, the other one never does, and neither is ever restarted."""
    short, other = replace(POLICY, retention=7200), reopened()
    for hour in range(1, 8):
        commit_asking(other, [], {}, at=hour * HOUR, policy=short)
        commit(book, [running("a")], at=hour * HOUR + SECOND, policy=short)
    assert book.totals is not None
    assert (book.totals.tasks, book.totals.unsettled) == (1, 0)
    commit(other, [], at=8 * HOUR, policy=short)
    commit(book, [failed("a")], at=8 * HOUR + SECOND, policy=short)
    assert counted(book) == FAILED


def test_what_only_a_replica_that_is_gone_for_good_had_listed_is_asked_for_within_two_hours(
    book: Book, reopened: Callable[[], Book]
) -> None:
    other = reopened()
    commit(other, [running("a"), running("short")], at=2 * SECOND)
    asked = []
    for minute in range(1, 121):
        asked += commit_asking(book, [running("a")], {"short": failed("short")}, at=minute * MINUTE)[1]
    assert asked == ["short"]
    assert counted(book)["m", "finished", "failed"] == 1
