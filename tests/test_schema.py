"""Ledgers of earlier versions, upgraded in place: the data is what version 0.1.0 wrote."""

import shutil
import sqlite3
import threading
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from creatify_exporter.database import LedgerError, LedgerUnusableError
from creatify_exporter.ledger import Book, Key, Ledger
from creatify_exporter.tasks import NANO, Record
from tests.support.records import POLICY, SECOND, START, commit, counted, read_task, record, shown

OLD = Path(__file__).parent / "data" / "ledger-0.1.0"
LISTED = ("old", "busy", "new-0", "new-1", "new-2", "new-3", "other")


@pytest.fixture(
    params=[pytest.param("sqlite"), pytest.param("postgresql", marks=pytest.mark.process)],
)
def old_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a ledger that version 0.1.0 wrote."""
    if request.param == "sqlite":
        shutil.copy(OLD / "ledger.db", tmp_path / "ledger.db")
        return f"sqlite:///{tmp_path}/ledger.db"
    url: str = request.getfixturevalue("postgres").create_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((OLD / "postgresql.sql").read_bytes())
    return url


def listed() -> list[Record]:
    """Return what the last listing of version 0.1.0 had."""
    halves = (1, 2, 5, 1300)
    return [
        record("old", "done", credits=5),
        record("busy", "running", credits=3),
        *(
            record(f"new-{n}", "failed", created=SECOND, duration=d * SECOND // 2, credits=0.1, failed_reason="timeout")
            for n, d in enumerate(halves)
        ),
        record("other", "done", model="n", created=SECOND, duration=100 * SECOND),
    ]


def buckets(book: Book) -> Counter[tuple[str, str]]:
    assert book.totals is not None
    return +Counter(
        {(key.model, key.label): t.value for key, t in book.totals.series.items() if key.metric == "bucket"}
    )


def test_an_old_ledger_goes_on_with_what_it_counted(old_ledger: str) -> None:
    ledger = Ledger(old_ledger)
    ledger.open()
    book = ledger.book("w")
    draft = book.draft()
    assert sorted(draft.known.slots) == sorted(LISTED)
    assert counted(book) == {
        ("m", "submitted", ""): 6,
        ("m", "finished", "done"): 1,
        ("m", "finished", "failed"): 4,
        ("m", "failures", "timeout"): 4,
        ("m", "credits", ""): round(4.65 * NANO),
        ("n", "submitted", ""): 1,
        ("n", "finished", "done"): 1,
    }
    assert buckets(book) == {
        ("m", "failed/le=0.5"): 1,
        ("m", "failed/le=1"): 1,
        ("m", "failed/le=2.5"): 1,
        ("m", "failed/le=inf"): 1,
        ("m", "done/le=10"): 1,
        ("n", "done/le=120"): 1,
    }
    before, policy = counted(book), replace(POLICY, zero_hold=180)
    assert shown(book)["m", "finished", "failed"] == 4
    assert shown(book, now=130 * SECOND)["n", "submitted", ""] == 0
    commit(book, listed(), at=140 * SECOND, policy=policy)
    assert counted(book) == before
    commit(book, [*listed(), record("later", created=150 * SECOND)], at=150 * SECOND, policy=policy)
    assert counted(book)["m", "submitted", ""] == 7
    ledger.close()


def test_a_task_that_left_an_old_ledger_unfinished_is_asked_for(old_ledger: str) -> None:
    ledger = Ledger(old_ledger)
    book = ledger.book("w")
    draft = book.draft()
    assert book.totals is not None
    assert book.totals.unsettled == 1
    draft.add(read_task(one) for one in listed())
    assert draft.missing(10, START + 200 * SECOND) == ["left-running"]
    draft.settle(read_task(record("left-running", "done", created=SECOND, credits=1)))
    book.commit(draft, ["m", "n"], POLICY, START + 200 * SECOND)
    assert book.totals.unsettled == 0
    assert counted(book)["m", "finished", "done"] == 2
    assert counted(book)["m", "credits", ""] == round(5.4 * NANO)
    ledger.close()


def test_replicas_that_start_at_the_same_time_upgrade_once(old_ledger: str) -> None:
    ledgers = [Ledger(old_ledger) for _ in range(4)]
    errors: list[Exception] = []

    def start(ledger: Ledger) -> None:
        try:
            ledger.open()
        except Exception as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=start, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for ledger in ledgers:
        assert len(ledger.book("w").draft().known.slots) == len(LISTED)
        ledger.close()


def test_checking_an_old_ledger_is_content_and_changes_nothing(old_ledger: str, tmp_path: Path) -> None:
    def content() -> list[bytes]:
        return [path.read_bytes() for path in sorted(tmp_path.iterdir())]

    before, ledger = content(), Ledger(old_ledger, deadline=3)
    with ExitStack() as stack:
        if old_ledger.startswith("postgresql"):  # nobody who uses it meanwhile is locked out, or in the way
            user = stack.enter_context(psycopg.connect(old_ledger))
            user.execute("SELECT count(*) FROM tasks, totals")
        ledger.check()
    assert content() == before
    reader = Ledger(old_ledger, read_only=True)
    with pytest.raises(LedgerUnusableError, match="its schema version is 1; the exporter upgrades it when it starts"):
        reader.open()
    reader.close()
    ledger.open()
    reader = Ledger(old_ledger, read_only=True)
    reader.open()
    reader.book("w").read()
    totals = reader.book("w").totals
    assert totals is not None
    assert totals.series[Key("m", "submitted", "")].value == 6
    reader.close()
    ledger.close()


@pytest.mark.parametrize("statement", ["ALTER TABLE", "CREATE INDEX", "UPDATE totals", "UPDATE ledger_version"])
def test_an_upgrade_that_fails_anywhere_leaves_the_old_ledger(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "ledger.db"
    shutil.copy(OLD / "ledger.db", path)

    def fail(*event: Any) -> None:
        if event[2].startswith(statement):
            raise sqlite3.OperationalError

    def dump() -> list[str]:
        with closing(sqlite3.connect(path)) as connection:
            return list(connection.iterdump())

    before, ledger = dump(), Ledger(f"sqlite:///{path}")
    sa.event.listen(sa.Engine, "before_cursor_execute", fail)
    try:
        with pytest.raises(LedgerError):
            ledger.open()
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", fail)
    ledger.close()
    assert dump() == before
