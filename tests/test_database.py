"""The database behind the ledger: nobody waits for it, nothing it does late is believed, and refusals are clear."""

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from creatify_exporter.database import (
    LedgerError,
    LedgerMissingError,
    LedgerSupersededError,
    LedgerUncertainError,
    LedgerUnusableError,
)
from creatify_exporter.ledger import Book, Ledger
from creatify_exporter.tasks import NANO
from tests.support.postgres import PASSWORD, USER, Postgres, Proxy, RefusingServer
from tests.support.processes import eventually
from tests.support.records import POLICY, SECOND, START, commit, commit_asking, counted, record

OLD_LEDGER = Path(__file__).parent / "data" / "ledger-0.1.0" / "postgresql.sql"
DEADLINE = 1.5
SLACK = 3.0  # seconds that a busy machine may take on top

process = pytest.mark.process


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[Proxy]:
    with Proxy(postgres.port) as running:
        yield running


@pytest.fixture
def open_ledger() -> Iterator[Callable[..., Ledger]]:
    with ExitStack() as stack:

        def make(url: str, **options: Any) -> Ledger:
            ledger = Ledger(url, **options)
            stack.callback(ledger.close)
            return ledger

        yield make


@contextmanager
def on_event(name: str, act: Callable[..., object]) -> Iterator[None]:
    """Do something whenever the database is about to execute or commit."""

    def call(*arguments: object) -> None:
        act(*arguments)

    sa.event.listen(sa.Engine, name, call)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, name, call)


def ledger_threads() -> int:
    return sum(thread.name == "ledger" for thread in threading.enumerate())


def fails_in_time(work: Callable[[], object], within: float = DEADLINE + SLACK) -> LedgerError:
    """Return the error of `work`, which has to come in time."""
    started = time.monotonic()
    with pytest.raises(LedgerError) as caught:
        work()
    assert time.monotonic() - started < within
    return caught.value


def recovers(book: Book, tasks: list[Any], within: float = 10) -> None:
    """Commit until it works."""
    until = time.monotonic() + within
    while True:
        with suppress(LedgerError):
            commit(book, tasks, at=9 * SECOND)
            return
        assert time.monotonic() < until, "the ledger is not back in time"


# A database that does not answer


TASKS = [record("a", "running", created=0, credits=1)]
MORE = [record("a", "done", created=0, credits=2), record("b", "running", created=0)]
EXPECTED = {("m", "submitted", ""): 2, ("m", "finished", "done"): 1, ("m", "credits", ""): 2 * NANO}


def counting(open_ledger: Callable[..., Ledger], url: str) -> tuple[Ledger, Book]:
    """Return a ledger that soon gives up, and its book of a workspace with a task."""
    ledger = open_ledger(url, deadline=DEADLINE)
    book = ledger.book("w")
    commit(book, [])
    commit(book, TASKS, at=SECOND)
    return ledger, book


def after(statements: int, act: Callable[[], object]) -> Callable[..., None]:
    left = [statements]

    def count(*_: object) -> None:
        left[0] -= 1
        if left[0] == -1:
            act()

    return count


@process
@pytest.mark.parametrize("statements", [0, 4])
def test_a_postgresql_that_goes_silent_holds_nobody_and_is_back_with_the_network(
    postgres: Postgres, proxy: Proxy, open_ledger: Callable[..., Ledger], statements: int
) -> None:
    """The kernel of something on the way still acknowledges everything."""
    ledger, book = counting(open_ledger, proxy.url(postgres.create_database()))
    before = counted(book)
    with on_event("before_cursor_execute", after(statements, proxy.silence)):
        fails_in_time(lambda: commit(book, MORE, at=2 * SECOND))
    assert not ledger.up
    fails_in_time(lambda: commit(book, MORE, at=3 * SECOND))
    assert ledger_threads() <= 1
    assert counted(book) == before
    proxy.resume()
    recovers(book, MORE)
    assert ledger.up
    assert counted(book) == EXPECTED


@process
def test_a_lost_answer_to_commit_is_looked_up_and_what_leaves_then_is_missed(
    postgres: Postgres, proxy: Proxy, open_ledger: Callable[..., Ledger]
) -> None:
    ledger = open_ledger(proxy.url(postgres.create_database()), deadline=DEADLINE)
    book = ledger.book("w")
    commit(book, [])
    with on_event("commit", after(0, lambda: proxy.silence(answers_only=True))):
        fails_in_time(lambda: commit(book, TASKS, at=SECOND))
    assert counted(book) == {}
    proxy.lose_connections()
    proxy.resume()
    recovers(book, [])  # the task was committed, and left before any listing knew that
    assert book.totals is not None
    assert (book.totals.tasks, book.totals.unsettled) == (1, 1)
    commit_asking(book, [], {"a": record("a", "done", created=0, credits=2)}, at=20 * SECOND)
    assert counted(book)["m", "finished", "done"] == 1


@process
@pytest.mark.parametrize("statements", [1, 4])
def test_a_connection_lost_in_the_middle_costs_one_listing(
    postgres: Postgres, proxy: Proxy, open_ledger: Callable[..., Ledger], statements: int
) -> None:
    ledger, book = counting(open_ledger, proxy.url(postgres.create_database()))
    with on_event("before_cursor_execute", after(statements, proxy.lose_connections)):
        fails_in_time(lambda: commit(book, MORE, at=2 * SECOND))
    assert not ledger.up
    commit(book, MORE, at=3 * SECOND)
    assert counted(book) == EXPECTED


@process
def test_a_silent_postgresql_holds_neither_start_nor_ping_nor_close(
    postgres: Postgres, proxy: Proxy, open_ledger: Callable[..., Ledger]
) -> None:
    url = proxy.url(postgres.create_database())
    proxy.silence()
    ledger = open_ledger(url, deadline=DEADLINE)
    error = fails_in_time(ledger.open, 3 * DEADLINE + SLACK)
    assert not isinstance(error, LedgerUnusableError)
    started = time.monotonic()
    ledger.ping()
    assert not ledger.up
    ledger.close()
    assert time.monotonic() - started < 2 * DEADLINE + SLACK
    proxy.resume()

    def up() -> bool:
        ledger.ping()
        return ledger.up

    eventually(up, 10, "the ledger is back")


@process
def test_workspaces_that_wait_in_line_fail_with_the_first_one(
    postgres: Postgres, proxy: Proxy, open_ledger: Callable[..., Ledger]
) -> None:
    ledger = open_ledger(proxy.url(postgres.create_database()), deadline=DEADLINE)
    books = [ledger.book(f"w{number}") for number in range(20)]
    for book in books:
        commit(book, [])
    proxy.silence()
    took: list[float] = []

    def list_one(book: Book) -> None:
        started = time.monotonic()
        with suppress(LedgerError):
            commit(book, TASKS, at=SECOND)
        took.append(time.monotonic() - started)

    threads = [threading.Thread(target=list_one, args=(book,)) for book in books]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(took) < 2 * DEADLINE + SLACK
    proxy.resume()
    for book in books:
        recovers(book, TASKS)
        assert counted(book)["m", "submitted", ""] == 1


@process
def test_a_connection_that_something_on_the_way_forgot_costs_no_listing(
    postgres: Postgres, proxy: Proxy, open_ledger: Callable[..., Ledger]
) -> None:
    ledger = open_ledger(proxy.url(postgres.create_database()), deadline=4 * DEADLINE)
    books = [ledger.book(f"w{number}") for number in range(4)]
    for book in books:
        commit(book, [])
    proxy.strand()
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(commit, book, TASKS, at=SECOND) for book in books]:
            done.result()
    assert ledger.up


@pytest.mark.parametrize("backend", ["sqlite", pytest.param("postgresql", marks=process)])
def test_a_lock_that_somebody_else_holds_holds_nobody(
    request: pytest.FixtureRequest, tmp_path: Path, open_ledger: Callable[..., Ledger], backend: str
) -> None:
    deadline = 2 * DEADLINE  # on a busy machine the wait for the lock takes longer than SQLite counts, and is told last
    with ExitStack() as stack:
        if backend == "sqlite":
            url = f"sqlite:///{tmp_path}/ledger.db"
            ledger = open_ledger(url, deadline=deadline)
            commit(ledger.book("w"), [])
            holder: Any = stack.enter_context(closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)))
            holder.execute("BEGIN IMMEDIATE")
        else:
            url = request.getfixturevalue("postgres").create_database()
            ledger = open_ledger(url, deadline=deadline)
            commit(ledger.book("w"), [])
            holder = stack.enter_context(psycopg.connect(url))
            holder.execute("SELECT * FROM workspaces FOR UPDATE")
        book = ledger.book("w")
        error = fails_in_time(lambda: commit(book, TASKS, at=SECOND), deadline + SLACK)
        assert "somebody else holds a lock" in str(error)
        assert not isinstance(error, LedgerUnusableError)
        assert not ledger.up
        holder.rollback() if backend == "postgresql" else holder.execute("ROLLBACK")
    commit(book, TASKS, at=2 * SECOND)
    assert ledger.up
    assert counted(book)["m", "submitted", ""] == 1


@pytest.mark.parametrize("event", ["before_cursor_execute", "after_cursor_execute", "commit"])
def test_a_hung_disk_holds_nobody_and_what_it_does_late_is_not_believed(
    tmp_path: Path, open_ledger: Callable[..., Ledger], event: str
) -> None:
    (ledger, book), moves = counting(open_ledger, f"sqlite:///{tmp_path}/ledger.db"), threading.Event()
    before = counted(book)
    try:
        with on_event(event, after(0 if event == "commit" else 4, moves.wait)):
            fails_in_time(lambda: commit(book, MORE, at=2 * SECOND))
            assert not ledger.up
            for _ in range(3):
                fails_in_time(lambda: commit(book, MORE, at=3 * SECOND), SLACK)  # at once: it is known to hang
                assert ledger_threads() == 1
            assert counted(book) == before
    finally:
        moves.set()
    recovers(book, MORE)
    assert ledger.up
    assert counted(book) == EXPECTED
    commit(book, MORE[:1], at=20 * SECOND)
    assert book.totals is not None
    assert book.totals.unsettled == 1
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        assert connection.execute("SELECT id FROM tasks WHERE unlisted_since IS NULL").fetchall() == [("a",)]


def test_who_waits_behind_a_hung_commit_knows_that_nothing_of_his_was_written(
    tmp_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    ledger, moves = open_ledger(f"sqlite:///{tmp_path}/ledger.db", deadline=DEADLINE), threading.Event()
    ledger.open()
    first, second = ledger.book("w"), ledger.book("v")
    try:
        with on_event("commit", lambda _: moves.wait()):
            assert isinstance(fails_in_time(lambda: commit(first, TASKS)), LedgerUncertainError)
            assert not isinstance(fails_in_time(lambda: commit(second, TASKS), SLACK), LedgerUncertainError)
    finally:
        moves.set()
    recovers(second, TASKS)


def test_a_thread_that_cannot_be_started_is_a_failure_of_the_ledger_that_passes(
    open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger("sqlite://")
    book = ledger.book("w")

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert "no thread can be started" in str(fails_in_time(lambda: commit(book, TASKS)))
    assert not ledger.up
    commit(book, TASKS)
    assert ledger.up


def test_what_was_given_up_is_rolled_back_when_the_disk_moves_again(
    tmp_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    ledger, moves = open_ledger(f"sqlite:///{tmp_path}/ledger.db", deadline=DEADLINE), threading.Event()
    book = ledger.book("w")
    commit(book, [])
    with on_event("after_cursor_execute", after(6, moves.wait)):
        fails_in_time(lambda: commit(book, TASKS, at=SECOND))
        moves.set()
        eventually(lambda: ledger_threads() == 0, 10, "the transaction to end")
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        assert connection.execute("SELECT count(*) FROM tasks").fetchone() == (0,)


def test_a_long_transaction_of_many_statements_is_not_given_up(
    tmp_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/ledger.db", deadline=1.0)
    book, pause = ledger.book("w"), threading.Event()
    with on_event("after_cursor_execute", lambda *_: pause.wait(0.1)):
        started = time.monotonic()
        commit(book, [record(f"t{number}") for number in range(12_000)])
    assert time.monotonic() - started > 1.1
    assert book.totals is not None
    assert book.totals.tasks == 12_000


# Errors


@pytest.mark.parametrize("error", [ValueError("a secret"), UnicodeEncodeError("latin-1", "\N{SLOTH}", 0, 1, "no")])
def test_whatever_fails_in_a_transaction_lowers_up_and_shows_no_text(
    tmp_path: Path, open_ledger: Callable[..., Ledger], error: Exception
) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.open()
    assert ledger.up

    def fail(_: object) -> None:
        raise error

    with pytest.raises(LedgerError, match=type(error).__name__) as caught:
        ledger.transact(fail)
    assert not ledger.up
    assert "secret" not in str(caught.value)
    ledger.ping()
    assert ledger.up


@pytest.mark.parametrize("answers", [[False], [True, False]], ids=["before", "at the end"])
def test_a_superseded_listing_is_not_committed_and_is_no_failure_of_the_ledger(
    tmp_path: Path, open_ledger: Callable[..., Ledger], answers: list[bool]
) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/ledger.db")
    book = ledger.book("w")
    commit(book, [])
    draft, left = book.draft(), iter(answers)
    draft.add([])
    with pytest.raises(LedgerSupersededError, match="superseded"):
        book.commit(draft, ["new"], POLICY, START + SECOND, None, lambda: next(left))
    assert ledger.up
    assert book.totals is not None
    assert book.totals.models == []
    commit(book, TASKS, at=2 * SECOND)
    assert counted(book)["m", "submitted", ""] == 1


# A file that is not what it was


@pytest.mark.parametrize("how", ["deleted", "replaced", "replaced by an empty one"])
def test_a_file_deleted_or_replaced_under_a_running_exporter_is_noticed_and_not_made_anew(
    tmp_path: Path, open_ledger: Callable[..., Ledger], how: str
) -> None:
    path, elsewhere = tmp_path / "ledger.db", tmp_path / "elsewhere.db"
    ledger = open_ledger(f"sqlite:///{path}")
    book = ledger.book("w")
    commit(book, [])
    commit(book, TASKS, at=SECOND)
    before = counted(book)
    path.rename(elsewhere)
    if how == "replaced":
        make_ledger(tmp_path / "another.db")
        (tmp_path / "another.db").rename(path)
    elif how != "deleted":
        path.touch()
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"deleted or replaced .* move the same file back, or restart"):
            commit(book, MORE, at=2 * SECOND)
        assert not ledger.up
    assert counted(book) == before
    assert path.exists() == (how != "deleted")
    elsewhere.rename(path)
    commit(book, MORE, at=3 * SECOND)
    assert ledger.up
    assert counted(book) == EXPECTED


def test_a_file_emptied_in_place_is_noticed_and_left_empty(tmp_path: Path, open_ledger: Callable[..., Ledger]) -> None:
    path = tmp_path / "ledger.db"
    ledger = open_ledger(f"sqlite:///{path}")
    book = ledger.book("w")
    commit(book, TASKS)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(b"")
    with pytest.raises(LedgerError):
        commit(book, MORE, at=SECOND)
    assert not ledger.up


# Refusals


def make_directory(path: Path) -> None:
    path.mkdir()


def make_nonsense(path: Path) -> None:
    path.write_bytes(b"This is no database at all. " * 300)


def make_foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE invoices (id INTEGER)")


def make_ledger(path: Path) -> None:
    ledger = Ledger(f"sqlite:///{path}")
    commit(ledger.book("w"), [record(f"task-{number}") for number in range(500)])
    ledger.close()


def make_corrupt(path: Path) -> None:
    make_ledger(path)
    pages = bytearray(path.read_bytes())
    pages[4096:8192] = b"\xa5" * 4096
    path.write_bytes(pages)


def make_newer(path: Path) -> None:
    make_ledger(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE ledger_version SET version = 99")


def make_incomplete(path: Path) -> None:
    make_ledger(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE totals")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_directory, "this is a directory, not a file"),
        (make_nonsense, "the file is not a SQLite database"),
        (make_corrupt, "corrupt"),
        (make_newer, r"its schema version is \[99\], this exporter needs \[2\]"),
        (make_incomplete, "the tables totals are missing"),
        (make_foreign, "tables that are not a ledger's"),
    ],
)
def test_start_and_check_say_in_their_own_words_why_a_file_cannot_be_used(
    tmp_path: Path, open_ledger: Callable[..., Ledger], make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "ledger.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for act in (Ledger.check, Ledger.open):
        with pytest.raises(LedgerUnusableError, match=words) as caught:
            act(open_ledger(f"sqlite:///{path}"))
        assert str(caught.value).startswith(f"ledger sqlite:///{path}: ")
        assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_missing_file_is_fine_and_a_missing_directory_is_not(
    tmp_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    open_ledger(f"sqlite:///{tmp_path}/ledger.db").check()
    open_ledger("sqlite://").check()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LedgerUnusableError, match=f"the directory {tmp_path}/none does not exist"):
        open_ledger(f"sqlite:///{tmp_path}/none/ledger.db").check()
    with pytest.raises(LedgerMissingError, match="there is no ledger"):
        open_ledger(f"sqlite:///{tmp_path}/none/ledger.db", read_only=True).open()


def test_checking_a_good_file_says_nothing_and_writes_nothing(
    tmp_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    make_ledger(tmp_path / "ledger.db")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    open_ledger(f"sqlite:///{tmp_path}/ledger.db").check()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")
ATTEMPT = """
import sys
from creatify_exporter.database import LedgerUnusableError
from creatify_exporter.ledger import Ledger
for act in (Ledger.check, Ledger.open):
    ledger = Ledger(sys.argv[1], deadline=2.0)
    try:
        act(ledger)
    except LedgerUnusableError as error:
        print(error)
    ledger.close()
"""


@pytest.mark.parametrize(
    ("file_mode", "directory_mode", "words"),
    [
        (0o644, 0o555, "no permission to write to the directory"),
        (0o444, 0o755, "no permission to write to the file"),
        (0o000, 0o755, "no permission to read the file"),
        (None, 0o555, "no permission to write to the directory"),
    ],
)
def test_a_missing_permission_is_named(tmp_path: Path, file_mode: int | None, directory_mode: int, words: str) -> None:
    directory = tmp_path / "ledger"
    directory.mkdir()
    if file_mode is not None:
        make_ledger(directory / "ledger.db")
        (directory / "ledger.db").chmod(file_mode)
    directory.chmod(directory_mode)
    try:
        done = subprocess.run(
            [*UNPRIVILEGED, sys.executable, "-c", ATTEMPT, f"sqlite:///{directory}/ledger.db"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    finally:
        directory.chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    assert all(words in line for line in lines), lines


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch, open_ledger: Callable[..., Ledger]) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for act in (Ledger.check, Ledger.open):
        with pytest.raises(LedgerUnusableError, match=r'pip install "creatify-exporter\[postgres\]"'):
            act(open_ledger("postgresql://nobody@127.0.0.1:1/ledger"))


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("postgresql://u:planted@h/db?password=planted&sslpassword=planted", "postgresql://u:***@h/db"),
        ("postgresql://u@/db?host=/run/pg&passfile=planted&port=5", "postgresql://u@/db?host=%2Frun%2Fpg&port=5"),
    ],
)
def test_no_secret_of_a_url_is_printed(open_ledger: Callable[..., Ledger], url: str, printed: str) -> None:
    error = fails_in_time(open_ledger(url).open, 60)
    assert str(error).startswith(f"ledger {printed}: ")
    assert "planted" not in str(error)


@pytest.mark.parametrize(
    ("sqlstate", "stops"),
    [("28P01", True), ("28000", True), ("3D000", True), ("42501", True), ("57P03", False), ("53300", False)],
)
def test_a_refused_login_is_understood_in_any_language(
    open_ledger: Callable[..., Ledger], sqlstate: str, stops: bool
) -> None:
    """psycopg has no SQLSTATE for it. 57P03: the server is starting; 53300: it has too many connections."""
    with RefusingServer(sqlstate, "Passwort-Authentifizierung f\u00fcr Benutzer exporter fehlgeschlagen") as server:
        for act in (Ledger.check, Ledger.open):
            with pytest.raises(LedgerError) as caught:
                act(open_ledger(server.url))
            assert isinstance(caught.value, LedgerUnusableError) == stops
            assert "geheim" not in str(caught.value)


@process
def test_a_login_that_is_refused_later_is_tried_once_in_a_listing(
    postgres: Postgres, open_ledger: Callable[..., Ledger]
) -> None:
    with RefusingServer("28P01", "nein") as server, Proxy(postgres.port) as proxy:
        ledger = open_ledger(proxy.url(postgres.create_database()))
        ledger.open()
        proxy.lead_to(server.port)
        assert not isinstance(fails_in_time(lambda: commit(ledger.book("w"), TASKS)), LedgerUnusableError)
        assert server.logins == 1


# PostgreSQL


@pytest.fixture
def other_role(postgres: Postgres) -> Iterator[Callable[[str], str]]:
    """Return what turns a database's URL into one of a role without any permission."""
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE visitor LOGIN PASSWORD '{PASSWORD}'")
    yield lambda url: url.replace(f"//{USER}:", "//visitor:")
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        names = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'ledger_%'").fetchall()
    for (name,) in names:
        with psycopg.connect(postgres.url(name), autocommit=True) as connection:
            connection.execute("DROP OWNED BY visitor")
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("DROP ROLE visitor")


def refused(open_ledger: Callable[..., Ledger], url: str, words: str) -> None:
    for act in (Ledger.check, Ledger.open):
        with pytest.raises(LedgerUnusableError, match=words):
            act(open_ledger(url))


@process
def test_each_missing_permission_in_postgresql_stops_the_start(
    postgres: Postgres, open_ledger: Callable[..., Ledger], other_role: Callable[[str], str]
) -> None:
    url = postgres.create_database()
    refused(open_ledger, other_role(url), "no permission")  # to create tables
    open_ledger(url).open()
    refused(open_ledger, other_role(url), "no permission")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO visitor")
        open_ledger(other_role(url)).check()
        open_ledger(other_role(url)).open()
        for permission in ("SELECT", "INSERT", "UPDATE", "DELETE"):
            connection.execute(f"REVOKE {permission} ON tasks FROM visitor")
            refused(open_ledger, other_role(url), "no permission")
            connection.execute(f"GRANT {permission} ON tasks TO visitor")
        connection.execute("REVOKE CONNECT ON DATABASE " + url.rpartition("/")[2] + " FROM public")
        refused(open_ledger, other_role(url), "no permission")


@process
def test_a_role_that_may_not_upgrade_an_older_ledger_is_told_at_the_start(
    postgres: Postgres, open_ledger: Callable[..., Ledger], other_role: Callable[[str], str]
) -> None:
    url = postgres.create_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(OLD_LEDGER.read_bytes())
        connection.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO visitor")
    refused(open_ledger, other_role(url), "no permission")


@process
@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_postgresql_that_is_not_utf_8_stops_the_start(
    postgres: Postgres, open_ledger: Callable[..., Ledger], encoding: str
) -> None:
    refused(open_ledger, postgres.create_database(encoding=encoding), f"encoding is {encoding}; make one with CREATE")


@process
def test_a_refused_login_to_a_real_postgresql_stops_the_start(
    postgres: Postgres, open_ledger: Callable[..., Ledger]
) -> None:
    refused(open_ledger, postgres.url("postgres", "wrong"), r"the login was refused: .* \(28P01\)")
    refused(open_ledger, postgres.url("nowhere"), r"there is no such database: .* \(3D000\)")
    refused(open_ledger, postgres.url("postgres").replace(f":{PASSWORD}", ""), r"the login was refused: .* \(28000\)")


@process
def test_other_tables_in_a_postgresql_database_disturb_nobody_unless_they_have_our_names(
    postgres: Postgres, open_ledger: Callable[..., Ledger]
) -> None:
    url = postgres.create_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE invoices (id INTEGER)")
        open_ledger(url).check()
        ledger = open_ledger(url)
        commit(ledger.book("w"), TASKS)
        commit(ledger.book("w"), MORE, at=SECOND)
        assert counted(ledger.book("w"))["m", "finished", "done"] == 1
        assert connection.execute("SELECT count(*) FROM invoices").fetchone() == (0,)
    url = postgres.create_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE tasks (id INTEGER)")
    refused(open_ledger, url, "tables that are not a ledger's")


@process
def test_checking_a_postgresql_writes_nothing_and_reading_it_neither(
    postgres: Postgres, open_ledger: Callable[..., Ledger]
) -> None:
    url = postgres.create_database()
    open_ledger(url).check()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
    with pytest.raises(LedgerMissingError):
        open_ledger(url, read_only=True).open()
    ledger = open_ledger(url)
    commit(ledger.book("w"), TASKS)
    commit(ledger.book("w"), MORE, at=SECOND)
    ledger.check()
    reader = open_ledger(url, read_only=True)
    reader.open()
    reader.book("w").read()
    assert counted(reader.book("w")) == counted(ledger.book("w"))
    with pytest.raises(LedgerError):
        commit(reader.book("w"), [record("c")], at=2 * SECOND)
    commit(ledger.book("w"), MORE, at=3 * SECOND)


@process
def test_a_commit_to_postgresql_is_on_disk_when_it_is_answered(
    postgres: Postgres, open_ledger: Callable[..., Ledger]
) -> None:
    ledger = open_ledger(postgres.create_database())
    settings = ("synchronous_commit", "application_name", "lock_timeout", "statement_timeout")
    found = ledger.transact(lambda tx: [tx.exec_driver_sql(f"SHOW {name}").scalar_one() for name in settings])
    assert found == ["on", "creatify-exporter", "6s", "7s"]


@process
def test_a_model_with_an_emoji_is_counted_in_postgresql(postgres: Postgres, open_ledger: Callable[..., Ledger]) -> None:
    book = open_ledger(postgres.create_database()).book("w")
    commit(book, [])
    commit(book, [record("a", model="\N{SLOTH} model", created=0)], at=SECOND)
    assert counted(book)["\N{SLOTH} model", "submitted", ""] == 1


@process
def test_a_task_lives_through_restarts_in_postgresql(postgres: Postgres, open_ledger: Callable[..., Ledger]) -> None:
    url = postgres.create_database()

    def listing(status: str, credits_: float, at: int) -> Book:
        book = open_ledger(url).book("w")
        commit(book, [record("a", status, created=0, credits=credits_)] if status else [], at=at * SECOND)
        return book

    commit(open_ledger(url).book("w"), [])
    listing("pending", 0.1, 1)
    listing("running", 0.3, 2)
    listing("done", 5, 3)
    listing("", 0, 4)
    book = listing("done", 5, 5)
    assert counted(book) == {
        ("m", "submitted", ""): 1, ("m", "finished", "done"): 1, ("m", "credits", ""): 5 * NANO,
    }  # fmt: skip
    assert book.totals is not None
    assert (book.totals.tasks, book.totals.unsettled) == (1, 0)


@process
def test_settling_and_retention_work_in_postgresql(postgres: Postgres, open_ledger: Callable[..., Ledger]) -> None:
    url = postgres.create_database()
    one, two = (open_ledger(url).book("w") for _ in range(2))
    commit(one, [])
    names = [f"t{number}" for number in range(1500)]
    commit(one, [record(name, "running", created=0) for name in names], at=SECOND)
    ends = {name: record(name, created=0) for name in names[1:]} | {names[0]: None}
    assert len(commit_asking(two, [], ends, at=2 * SECOND, settle=1000)[1]) == 1000
    assert len(commit_asking(one, [], ends, at=3 * SECOND, settle=1000)[1]) == 500
    assert commit_asking(two, [], ends, at=4 * SECOND)[1] == []
    assert counted(two) == {("m", "submitted", ""): 1500, ("m", "finished", "done"): 1499}
    short = replace(POLICY, retention=3600)
    commit(one, [], at=3601 * SECOND, policy=short)
    assert one.totals is not None
    assert one.totals.tasks == 1500
    commit(one, [], at=3602 * SECOND, policy=short)
    assert one.totals.tasks == 0
