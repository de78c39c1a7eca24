"""The rules of the ledger, one by one."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from creatify_exporter.database import LedgerError, LedgerMissingError, LedgerUnusableError
from creatify_exporter.ledger import Book, Key, Ledger
from creatify_exporter.tasks import HOUR, NANO, Record
from tests.support.postgres import Postgres
from tests.support.records import POLICY, SECOND, START, commit, counted, record, shown

DAY = 24 * HOUR
SHORT = replace(POLICY, retention=3600)


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Callable[..., Ledger]]:
    """Make ledgers, by default all of the same file, that are closed at the end."""
    with ExitStack() as stack:

        def make(url: str = f"sqlite:///{tmp_path}/ledger.db", *, read_only: bool = False) -> Ledger:
            made = Ledger(url, read_only=read_only)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def ledger(open_ledger: Callable[..., Ledger]) -> Ledger:
    return open_ledger()


@pytest.fixture
def reopened(open_ledger: Callable[..., Ledger]) -> Callable[[], Book]:
    """Return the workspace as another process would see it."""
    return lambda: open_ledger().book("w")


@pytest.fixture
def book(ledger: Ledger) -> Book:
    """A workspace after an empty baseline at START."""
    book = ledger.book("w")
    commit(book, [])
    return book


# What counts


def test_the_first_listing_counts_nothing_and_what_changes_after_it_does(ledger: Ledger) -> None:
    book = ledger.book("w")
    commit(book, [record("old", credits=5), record("busy", "running", credits=1)])
    assert counted(book) == {}
    commit(book, [record("old", credits=5), record("busy", "done", credits=1.5)], at=SECOND)
    assert counted(book) == {("m", "finished", "done"): 1, ("m", "credits", ""): NANO // 2}


def test_count_existing_counts_the_first_listing_and_shows_it_at_once(ledger: Ledger) -> None:
    book = ledger.book("w")
    policy = replace(POLICY, count_existing=True, zero_hold=180)
    commit(book, [record("old", "failed", credits=5, created=-DAY, failed_reason="timeout")], policy=policy)
    assert counted(book) == {
        ("m", "submitted", ""): 1,
        ("m", "finished", "failed"): 1,
        ("m", "failures", "timeout"): 1,
        ("m", "credits", ""): 5 * NANO,
    }
    assert shown(book)["m", "submitted", ""] == 1


def test_an_unknown_task_from_before_the_floor_is_remembered_and_counts_only_what_happens_later(book: Book) -> None:
    commit(book, [record("late", "running", credits=2, created=-HOUR - 1)], at=SECOND)
    assert counted(book) == {}
    commit(book, [record("late", "failed", credits=3, created=-HOUR - 1, failed_reason="timeout")], at=2 * SECOND)
    assert counted(book) == {
        ("m", "finished", "failed"): 1,
        ("m", "failures", "timeout"): 1,
        ("m", "credits", ""): NANO,
    }


def test_an_unknown_task_created_at_the_floor_or_without_a_date_is_new(book: Book) -> None:
    commit(book, [record("edge", created=-HOUR), record("undated", created=None)], at=SECOND)
    assert counted(book)["m", "submitted", ""] == 2


def test_a_contradiction_changes_nothing_that_was_committed(book: Book) -> None:
    """Done, later failed; the reason a listing late; another model; credits refunded: the first one stands."""
    commit(book, [record("a", "done", credits=4), record("b", "failed", failed_reason=None)], at=SECOND)
    before = counted(book)
    commit(
        book,
        [
            record("a", "failed", credits=1, model="n", failed_reason="timeout"),
            record("b", "failed", failed_reason="timeout"),
        ],
        at=2 * SECOND,
    )
    assert counted(book) == before
    assert before["m", "failures", "other"] == 1
    # The highest value counts, so what is charged again after the refund is not counted again.
    commit(book, [record("a", "failed", credits=4.5, model="n")], at=3 * SECOND)
    assert counted(book)["m", "credits", ""] == 4.5 * NANO


def test_ten_thousand_tenths_are_exactly_a_thousand(book: Book) -> None:
    commit(book, [record(f"t{number}", credits=0.1) for number in range(10_000)], at=SECOND)
    assert counted(book)["m", "credits", ""] == 1000 * NANO


def test_sums_beyond_what_the_ledger_holds_stay_at_the_largest_and_the_others_go_on(book: Book) -> None:
    """Ten thousand tasks of a million credits; two hundred that took as long as from the year 1 till now."""
    dear = [record(f"dear-{number}", credits=1_000_000) for number in range(10_000)]
    commit(book, dear, at=SECOND)
    long = [replace_dates(record(f"long-{number}", "running", credits=1)) for number in range(200)]
    commit(book, [*dear, *long], at=2 * SECOND)
    ended = [replace_dates(record(f"long-{number}", "done", credits=2)) for number in range(200)]
    for at in (3, 4):
        commit(book, [*dear, *ended], at=at * SECOND)
    assert book.totals is not None
    assert book.totals.series[Key("m", "duration", "done")].value == 2**63 - 1
    assert counted(book) == {
        ("m", "submitted", ""): 10_000,
        ("m", "finished", "done"): 10_200,
        ("m", "credits", ""): 2**63 - 1,
    }


def replace_dates(one: Record) -> Record:
    one.created_at, one.updated_at = "0001-01-01T00:00:00Z", "2025-10-09T08:53:20Z"
    return one


def test_durations_fall_into_the_bucket_whose_bound_they_do_not_exceed(book: Book) -> None:
    seconds = {"exact": 0.5, "above": 0.500001, "longest": 601, "negative": -1}
    commit(book, [record(name, duration=int(value * SECOND)) for name, value in seconds.items()], at=SECOND)
    assert book.totals is not None
    buckets = {key.label: total.value for key, total in book.totals.series.items() if key.metric == "bucket"}
    assert {label: count for label, count in buckets.items() if count} == {
        "done/le=0.5": 1,
        "done/le=1": 1,
        "done/le=inf": 1,
    }
    assert book.totals.series[Key("m", "duration", "done")].value == 602_000_001
    assert counted(book)["m", "finished", "done"] == 4


def test_models_beyond_the_cap_share_a_label_and_the_first_ones_keep_theirs(
    reopened: Callable[[], Book], book: Book
) -> None:
    policy = replace(POLICY, max_models=2)
    commit(book, [record(f"{model}1", model=model) for model in "abcd"], at=SECOND, policy=policy)
    again = reopened()
    commit(again, [record(f"{model}2", model=model) for model in "dcba"], at=2 * SECOND, policy=policy)
    submitted = {key[0]: value for key, value in counted(again).items() if key[1] == "submitted"}
    assert submitted == {"a": 2, "b": 2, "other": 4}


def test_the_exemplar_is_the_newest_failed_task(book: Book) -> None:
    def failed(name: str, created: int) -> Record:
        return record(name, "failed", created=created, failed_reason="timeout")

    commit(book, [failed("newer", 20), failed("older", 10)], at=SECOND)
    assert book.totals is not None
    assert book.totals.series[Key("m", "failures", "timeout")].exemplar == "newer"


def test_the_exemplar_stays_the_newest_when_an_older_task_is_listed_late(book: Book) -> None:
    key, tasks = Key("m", "failures", "timeout"), list[Record]()
    steps = [("first", 20, "first"), ("late", 10, "first"), ("future", 10**15, "future"), ("next", 16 * SECOND, "next")]
    for at, (name, created, expected) in enumerate(steps, 1):
        tasks.append(record(name, "failed", created=created, failed_reason="timeout"))
        commit(book, tasks, at=at * 5 * SECOND)
        assert book.totals is not None
        assert book.totals.series[key].exemplar == expected
    for at, odd in (30, None), (31, -2_000_000_000 * SECOND):
        tasks.append(record(f"odd-{at}", "running", created=odd))
        commit(book, tasks, at=at * SECOND)
        tasks[-1] = record(f"odd-{at}", "failed", created=odd, failed_reason="timeout")
        commit(book, tasks, at=at * SECOND + 1)
        assert book.totals is not None
        assert book.totals.series[key].exemplar == "next"
    assert book.totals is not None
    assert book.totals.series[key].value == len(tasks)


def test_an_hour_before_the_baseline_is_an_hour(book: Book) -> None:
    hour = 3_600_000_000
    commit(book, [record("within", created=-hour), record("before", created=-hour - 1)], at=SECOND)
    assert counted(book)["m", "submitted", ""] == 1


@pytest.mark.parametrize("restarts", [False, True], ids=["one process", "a restart before each listing"])
def test_a_task_counts_its_growth_and_its_end_once_through_its_life(
    open_ledger: Callable[..., Ledger], book: Book, restarts: bool
) -> None:
    life = [("pending", 0.1), ("running", 0.3), ("running", 0.3), ("done", 5), ("done", 5), ("done", 4)]
    for at, (status, credits_) in enumerate(life, 1):
        if restarts:
            book = open_ledger().book("w")
        commit(book, [record("a", status, created=0, credits=credits_)], at=at * SECOND)
        assert counted(book)["m", "submitted", ""] == 1
        assert counted(book)["m", "credits", ""] == round(max(c for _, c in life[:at]) * NANO)
        assert counted(book).get(("m", "finished", "done"), 0) == (status == "done")


def test_an_id_twice_in_the_middle_of_a_batch_hides_none_of_those_after_it(book: Book) -> None:
    names = ["a", "b", "b", "c", "a", "d"]
    listing = commit(book, [record(name, created=0, credits=1) for name in names], at=SECOND)
    assert counted(book) == {("m", "submitted", ""): 4, ("m", "finished", "done"): 4, ("m", "credits", ""): 4 * NANO}
    assert sum(cell.tasks for cell in listing.cells.values()) == 4
    listing = commit(book, [record(name, created=0, credits=2) for name in names], at=2 * SECOND)  # all are known now
    assert counted(book)["m", "credits", ""] == 8 * NANO
    assert sum(cell.tasks for cell in listing.cells.values()) == 4


def test_tasks_that_take_the_places_of_those_that_left_are_told_apart(book: Book) -> None:
    """What is known of a task must not be what was known of one that left."""

    def listed(*names: str, status: str = "running") -> None:
        book_at[0] += 1
        commit(book, [record(name, status, created=0, credits=1) for name in names], at=book_at[0] * SECOND)

    book_at = [0]
    listed("a", "b", "c", status="done")
    listed("b")
    listed("b", "d", "e", "f")
    listed("b", "d", "e", "f", status="done")
    listed("d", "g", "h", status="done")
    listed("a", "g", "h", "d", status="done")
    assert counted(book) == {("m", "submitted", ""): 8, ("m", "finished", "done"): 8, ("m", "credits", ""): 8 * NANO}


# Retention


@pytest.mark.parametrize(
    "created", [2_000_000_000 * SECOND, -1_700_000_000 * SECOND, None], ids=["2099", "1970", "none"]
)
def test_a_task_with_an_odd_date_that_is_dropped_does_not_keep_later_ones_from_counting(
    book: Book, created: int | None
) -> None:
    commit(book, [record("odd", created=created)], at=SECOND, policy=SHORT)
    before = counted(book).get(("m", "submitted", ""), 0)
    commit(book, [], at=2 * SECOND, policy=SHORT)
    commit(book, [], at=2 * HOUR, policy=SHORT)
    assert book.totals is not None
    assert book.totals.tasks == 0
    commit(book, [record("later", created=HOUR)], at=3 * HOUR, policy=SHORT)
    assert counted(book)["m", "submitted", ""] == before + 1


@pytest.mark.parametrize("ahead", [0, 5 * SECOND], ids=["on time", "clock of the API ahead"])
def test_a_dropped_task_that_returns_is_not_counted_again(reopened: Callable[[], Book], book: Book, ahead: int) -> None:
    task = record("gone", credits=2, created=SECOND + ahead)
    commit(book, [task], at=SECOND, policy=SHORT)
    before = counted(book)
    commit(book, [], at=60 * SECOND, policy=SHORT)
    commit(book, [], at=2 * HOUR, policy=SHORT)
    commit(reopened(), [task], at=3 * HOUR, policy=SHORT)
    commit(book, [task], at=4 * HOUR, policy=SHORT)
    assert counted(book) == before


def test_a_task_that_this_exporter_lists_is_not_dropped_because_another_one_missed_it(
    reopened: Callable[[], Book], book: Book
) -> None:
    tasks = [record("steady", "running", credits=1, created=0)]
    commit(book, tasks, at=SECOND, policy=SHORT)
    other = reopened()
    commit(other, [], at=2 * SECOND, policy=SHORT)  # a hiccup that only the other one saw
    commit(book, tasks, at=3 * HOUR, policy=SHORT)
    commit(book, [record("steady", "done", credits=3, created=0)], at=4 * HOUR, policy=SHORT)
    assert counted(book)["m", "credits", ""] == 3 * NANO
    assert counted(book)["m", "finished", "done"] == 1


# Born at 0


def test_a_series_of_the_baseline_shows_0_in_its_first_answer_and_its_value_in_the_next(ledger: Ledger) -> None:
    book = ledger.book("w")
    policy = replace(POLICY, zero_hold=180)
    commit(book, [record("old")], policy=policy)
    commit(book, [record("old"), record("new", created=SECOND)], at=SECOND, policy=policy)
    assert shown(book, now=SECOND)["m", "submitted", ""] == 0  # no answer went out between the two listings
    commit(book, [record("old"), record("new", created=SECOND)], at=2 * SECOND, policy=policy)
    assert shown(book, now=2 * SECOND)["m", "submitted", ""] == 1


def test_a_new_model_is_held_at_0_from_its_first_answer_through_a_restart(
    reopened: Callable[[], Book], book: Book
) -> None:
    policy = replace(POLICY, zero_hold=180)
    failed = record("f", "failed", model="new", created=SECOND, failed_reason="timeout")
    key = ("new", "failures", "timeout")
    commit(book, [failed], at=SECOND, policy=policy)
    assert shown(book, now=100 * SECOND)[key] == 0
    commit(book, [failed], at=200 * SECOND, policy=policy)
    assert shown(book, now=200 * SECOND)[key] == 0
    again = reopened()
    commit(again, [failed], at=279 * SECOND, policy=policy)
    assert shown(again, now=279 * SECOND)[key] == 0
    assert not again.due(policy, START + 279 * SECOND)
    assert again.due(policy, START + 280 * SECOND)
    again.commit(None, (), policy, START + 280 * SECOND)  # no listing is needed
    assert shown(again)[key] == 1
    # For good: neither a restart nor a longer hold takes it back.
    final = reopened()
    commit(final, [failed], at=281 * SECOND, policy=replace(policy, zero_hold=3600))
    assert shown(final)[key] == 1


def test_every_reason_of_a_known_model_is_there_and_a_new_one_joins_at_0(book: Book) -> None:
    commit(book, [record("a")], at=SECOND)
    answer = shown(book, now=SECOND)
    assert {label for _, metric, label in answer if metric == "failures"} == {"timeout", "other"}
    policy = replace(POLICY, reasons=("brand", "timeout", "other"), zero_hold=180)
    failed = record("b", "failed", created=SECOND, failed_reason="brand")
    commit(book, [record("a"), failed], at=2 * SECOND, policy=policy)
    assert shown(book, now=2 * SECOND)["m", "failures", "brand"] == 0
    commit(book, [record("a"), failed], at=182 * SECOND, policy=policy)
    assert shown(book)["m", "failures", "brand"] == 1
    commit(book, [record("a"), failed], at=183 * SECOND)  # the rule goes, the series stays
    assert shown(book)["m", "failures", "brand"] == 1


# The file


def test_an_unchanged_listing_writes_nothing(tmp_path: Path, book: Book) -> None:
    tasks = [record("a", created=SECOND), record("b", "running", created=SECOND)]
    for at in (1, 2, 3):
        commit(book, tasks, at=at * SECOND)
        shown(book, now=at * SECOND)
    wal = (tmp_path / "ledger.db-wal").read_bytes()
    commit(book, tasks, at=4 * SECOND)
    assert (tmp_path / "ledger.db-wal").read_bytes() == wal


def test_a_commit_is_durable_before_it_is_exposed(ledger: Ledger) -> None:
    pragmas = ("synchronous", "journal_mode")
    found = ledger.transact(lambda tx: [tx.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in pragmas])
    assert found == [2, "wal"]


def copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as reading, closing(sqlite3.connect(target)) as writing:
        reading.backup(writing)


def test_a_ledger_restored_from_a_backup_is_merged_anew(tmp_path: Path, book: Book) -> None:
    commit(book, [record("a", created=SECOND)], at=SECOND)
    copy_database(tmp_path / "ledger.db", tmp_path / "backup.db")
    tasks = [record("a", created=SECOND), record("b", created=SECOND), record("c", created=SECOND)]
    for size in (2, 3):
        commit(book, [*tasks[:size], record("x", model=f"only-later-{size}")], at=size * SECOND)
        shown(book, now=size * SECOND)
    copy_database(tmp_path / "backup.db", tmp_path / "ledger.db")
    with pytest.raises(LedgerError, match="older"):
        commit(book, tasks, at=4 * SECOND)
    commit(book, tasks, at=5 * SECOND)
    assert counted(book)["m", "submitted", ""] == 3


def test_a_ledger_that_comes_up_during_a_listing_counts_from_the_next_one(
    tmp_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/later/ledger.db")
    book = ledger.book("w")
    draft = book.draft()
    assert not ledger.up
    (tmp_path / "later").mkdir()
    with pytest.raises(LedgerError, match="does not exist"):
        book.commit(draft, (), POLICY, START)
    assert book.totals is None
    commit(book, [])
    assert ledger.up


def test_a_reader_sees_the_totals_and_leaves_everything_as_it_is(
    tmp_path: Path, open_ledger: Callable[..., Ledger], book: Book
) -> None:
    commit(book, [record("a", created=SECOND)], at=SECOND)
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir() if path.suffix == ".db")
    reader = open_ledger(read_only=True)
    reader.open()
    reader.book("w").read()
    assert counted(reader.book("w")) == counted(book)
    reader.book("unknown").read()
    assert reader.book("unknown").totals is None
    with pytest.raises(LedgerError):
        commit(reader.book("w"), [record("b")], at=SECOND)
    reader.close()
    assert before == sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir() if path.suffix == ".db")


def test_a_fresh_process_knows_the_counters_before_its_first_listing_has_ended(
    reopened: Callable[[], Book], book: Book
) -> None:
    commit(book, [record("a", created=SECOND)], at=SECOND)
    again = reopened()
    again.draft()
    assert counted(again) == counted(book)


def test_only_the_newest_listing_of_a_workspace_may_commit(book: Book) -> None:
    former = book.draft()
    commit(book, [record("a", created=SECOND)], at=SECOND)
    with pytest.raises(LedgerError, match="another listing"):
        book.commit(former, (), POLICY, START + 2 * SECOND)
    assert counted(book)["m", "submitted", ""] == 1


def test_a_reader_makes_no_ledger(tmp_path: Path, open_ledger: Callable[..., Ledger]) -> None:
    with pytest.raises(LedgerMissingError, match="there is no ledger"):
        open_ledger(f"sqlite:///{tmp_path}/none.db", read_only=True).open()
    assert list(tmp_path.iterdir()) == []


def test_workspaces_share_a_file_and_nothing_else(ledger: Ledger) -> None:
    one, two = ledger.book("one"), ledger.book("two")
    commit(one, [])
    commit(two, [])
    commit(one, [record("same", created=SECOND)], at=SECOND)
    assert counted(one)["m", "submitted", ""] == 1
    assert counted(two) == {}


# PostgreSQL


@pytest.mark.process
def test_postgresql_gives_the_same_totals_to_replicas_that_commit_at_the_same_time(
    postgres: Postgres, open_ledger: Callable[..., Ledger]
) -> None:
    url = postgres.create_database()
    books = [open_ledger(url).book("w") for _ in range(2)]
    commit(books[0], [])
    errors: list[Exception] = []

    def replicate(book: Book) -> None:
        try:
            for size in range(1, 31):
                tasks = [record(f"t{n}", "failed", credits=n, created=0, failed_reason="timeout") for n in range(size)]
                commit(book, tasks, at=size * SECOND)
        except Exception as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=replicate, args=(book,)) for book in books]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for book in books:
        book.commit(None, (), POLICY, START + HOUR)
        assert counted(book) == {
            ("m", "submitted", ""): 30,
            ("m", "finished", "failed"): 30,
            ("m", "failures", "timeout"): 30,
            ("m", "credits", ""): sum(range(30)) * NANO,
        }


@pytest.mark.process
def test_a_postgresql_that_is_down_is_waited_for_and_a_session_that_it_ended_is_replaced(
    postgres: Postgres, open_ledger: Callable[..., Ledger]
) -> None:
    ledger = open_ledger(postgres.create_database())
    postgres.stop()
    try:
        with pytest.raises(LedgerError) as down:
            ledger.open()
        assert not isinstance(down.value, LedgerUnusableError)
        assert not ledger.up
    finally:
        postgres.start()
    commit(ledger.book("w"), [record("a")])
    assert ledger.up
    postgres.end_sessions()
    commit(ledger.book("w"), [record("a"), record("b", created=SECOND)], at=SECOND)
    assert counted(ledger.book("w"))["m", "submitted", ""] == 1
