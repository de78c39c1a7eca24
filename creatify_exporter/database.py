"""The SQLite or PostgreSQL database behind the ledger: transactions that hold nobody for long, and clear refusals."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from creatify_exporter import schema

T = TypeVar("T")

# Of the deadline: the more exactly somebody can tell what is wrong, the sooner he gives up.
_LOCK = 0.6
_STATEMENT = 0.7
_CONNECTION = 0.85
_CONNECT_TIMEOUT = 5
_AT_THE_END = 2.0  # a process that is told to end has 5 s

# What a later listing may find cured; all else at the start is for somebody to look at.
_SQLITE_PASSES = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_NOMEM", "SQLITE_INTERRUPT")
_POSTGRES_STAYS = ("28", "3D", "3F", "42")
_WORDS = {
    "SQLITE_NOTADB": "the file is not a SQLite database",
    "SQLITE_CORRUPT": "the file is corrupt",
    "SQLITE_READONLY": "no permission to write",
    "SQLITE_PERM": "no permission",
    "SQLITE_CANTOPEN": "the file cannot be opened",
    "SQLITE_FULL": "the disk is full",
    "SQLITE_BUSY": "somebody else holds a lock",
    "28": "the login was refused",
    "3D": "there is no such database",
    "42501": "no permission",
    "55P03": "somebody else holds a lock",
    "57014": "no answer in time",
}


class LedgerError(Exception):
    """The ledger is out of reach; what was committed stands, and a later listing catches up."""


class LedgerUnusableError(LedgerError):
    """The ledger can never work as it is: a corrupt file, another schema, no permission, a wrong password."""


class LedgerMissingError(LedgerUnusableError):
    """There is no ledger, and none may be made."""


class LedgerUncertainError(LedgerError):
    """The ledger may hold something else than what is known, such as after a lost answer to a COMMIT: read it anew."""


class LedgerSupersededError(LedgerError):
    """Nothing was written because nobody wants it any more; the ledger itself is fine."""


class _Transaction(Future[Any]):
    """One transaction in a thread of its own: pending, running from COMMIT on, and cancelled when it is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.progressed = time.monotonic()


class Database:
    """The database behind the ledger: SQLite, or PostgreSQL when several replicas share it.

    One transaction at a time, in a thread of its own. A caller whose statement is not answered in time leaves it
    there, and it is rolled back when it moves again. Until then nobody starts another one, so threads do not pile up.
    """

    def __init__(self, url: str, *, read_only: bool = False, deadline: float = 10.0) -> None:
        """Prepare the database at `url`, a SQLAlchemy URL of SQLite or PostgreSQL; nothing is connected yet.

        No statement holds a caller for more than `deadline` seconds.
        """
        self._url = sa.make_url(url)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        self._path = self._url.database if self._is_sqlite and self._url.database != ":memory:" else None
        self._name = f"ledger {_printable(self._url)}"
        self._silent = f"{self._name}: no answer within {deadline:g} s"
        self._read_only = read_only
        self._deadline = deadline
        self.up = False
        """Whether the ledger answered last time."""
        self._opened = self._connected = False
        self._engine: sa.Engine | None = None
        self._file: tuple[int, int] | None = None
        self._turn = threading.Lock()
        self._nobody = _Transaction()
        self._nobody.set_result(None)
        self._running = self._nobody

    # Transactions

    def transact(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in one transaction and return its result; raise LedgerError when the database fails.

        `work` runs in another thread, and must not change anything that a caller who gave up would still believe.
        """
        try:
            result = self._bounded(lambda: self._run(work))
        except LedgerError as error:
            self.up = isinstance(error, LedgerSupersededError)
            raise
        self.up = True
        return result

    def progress(self) -> None:
        """Take note that the database answered; to be called now and then while many rows are read."""
        if self._running.cancelled():
            raise LedgerError(f"{self._name}: the transaction was given up before")
        self._running.progressed = time.monotonic()

    def _bounded(self, job: Callable[[], T]) -> T:
        """Run `job` when it is its turn, and wait for it as long as the database answers."""
        self._wait(lambda seconds: self._turn.acquire(timeout=seconds), LedgerError)
        running = self._running = _Transaction()
        try:
            threading.Thread(target=self._work, args=(job, running), name="ledger", daemon=True).start()
        except RuntimeError as error:
            self._running = self._nobody
            self._turn.release()
            raise LedgerError(f"{self._name}: no thread can be started") from error
        self._wait(lambda seconds: wait([running], seconds) and running.done(), LedgerUncertainError)
        if running.cancelled():
            raise LedgerError(self._silent)
        result: T = running.result()
        return result

    def _wait(self, over: Callable[[float], object], in_commit: type[LedgerError]) -> None:
        """Wait until `over`, as long as the database answers whose turn it is; then give that transaction up.

        Raises LedgerError, or `in_commit` when it is too late to give that transaction up.
        """
        while not over(max(self._running.progressed + self._deadline - time.monotonic(), 0.001)):
            running = self._running
            if time.monotonic() < running.progressed + self._deadline:
                continue
            if running.cancel():
                raise LedgerError(self._silent)
            if running.running():
                raise in_commit(self._silent)

    def _work(self, job: Callable[[], object], running: _Transaction) -> None:
        try:
            end = partial(running.set_result, job())
        except LedgerError as error:
            end = partial(running.set_exception, error)
        except Exception as error:  # noqa: BLE001 - raised in the thread of the caller
            explained = self._explained(error)
            if running.running():
                explained = LedgerUncertainError(str(explained))
            explained.__cause__ = error
            end = partial(running.set_exception, explained)
        self._running = self._nobody
        self._turn.release()
        with suppress(InvalidStateError):  # it was given up
            end()

    def _run(self, work: Callable[[Connection], T]) -> T:
        if self._path:
            self._look_at_the_file(self._path)
        engine = self._engine = self._engine or self._make_engine()
        if not self._opened:
            with engine.begin() as connection:
                self._open(connection)
            self._opened = True
        with engine.begin() as connection:
            result = work(connection)
            if not self._running.set_running_or_notify_cancel():
                raise LedgerError(f"{self._name}: the transaction was given up before its end")
        return result

    def _look_at_the_file(self, path: str) -> None:
        if self._file is None:
            if self._read_only and not os.path.exists(path):
                raise LedgerMissingError(f"{self._name}: there is no ledger")
            if obstacle := _obstacle(path, writing=not self._read_only):
                raise LedgerUnusableError(f"{self._name}: {obstacle}")
        elif _identity(path) != self._file:
            raise LedgerError(
                f"{self._name}: the file was deleted or replaced while the exporter ran, and nothing is counted; "
                "move the same file back, or restart the exporter to go on with what is there now"
            )

    # Connections

    def _make_engine(self) -> sa.Engine:
        engine = self._make_sqlite() if self._is_sqlite else self._make_postgres()
        for event in ("before_cursor_execute", "after_cursor_execute"):
            sa.event.listen(engine, event, lambda *_: self.progress())
        return engine

    def _make_sqlite(self) -> sa.Engine:
        url = self._url
        if self._read_only and self._path:
            # A file nobody has open is read as it lies: any other way of reading leaves files beside it.
            idle = {} if os.path.exists(f"{self._path}-wal") else {"immutable": "1"}
            url = url.set(database=f"file:{quote(self._path)}", query={"mode": "ro", "uri": "true", **idle})
        engine = sa.create_engine(
            url,
            poolclass=sa.QueuePool,
            pool_size=1,
            max_overflow=0,
            connect_args={"timeout": self._deadline * _LOCK, "check_same_thread": False},
        )
        sa.event.listen(engine, "connect", self._prepare_sqlite)
        begin = "BEGIN" if self._read_only else "BEGIN IMMEDIATE"
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine

    def _prepare_sqlite(self, connection: Any, _record: object) -> None:
        connection.isolation_level = None
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        # Not even the header of somebody else's file is touched.
        if not self._read_only and (not tables or schema.version.name in tables):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        if self._path and not self._read_only:
            self._file = _identity(self._path)

    def _make_postgres(self) -> sa.Engine:
        statement, waiting = (int(self._deadline * part * 1000) for part in (_STATEMENT, _LOCK))
        defaults = {
            "connect_timeout": str(_CONNECT_TIMEOUT),
            "tcp_user_timeout": str(int(self._deadline * 1000)),
            "application_name": "creatify-exporter",
            "options": f"-c statement_timeout={statement} -c lock_timeout={waiting} -c synchronous_commit=on"
            + (" -c default_transaction_read_only=on" if self._read_only else ""),
        }
        url = self._url.set(drivername="postgresql+psycopg")
        try:
            engine = sa.create_engine(
                url.update_query_dict({k: v for k, v in defaults.items() if k not in url.query}),
                pool_size=1,
                max_overflow=0,
                pool_pre_ping=True,
            )
        except ImportError as error:
            raise LedgerUnusableError(
                f'{self._name}: PostgreSQL needs its driver: pip install "creatify-exporter[postgres]"'
            ) from error
        sa.event.listen(engine, "do_connect", self._connect_postgres)
        return engine

    def _connect_postgres(self, _dialect: object, _record: object, arguments: Any, parameters: Any) -> Any:
        from creatify_exporter import postgres

        connection = postgres.connect(
            self._deadline * _CONNECTION, *arguments, explain=not self._connected, **parameters
        )
        self._connected = True
        return connection

    def _explained(self, error: Exception) -> LedgerError:
        """Return what an error of the database means, by its code: its text may be in any language."""
        if isinstance(error, schema.SchemaError):
            return LedgerUnusableError(f"{self._name}: {error}")
        if not isinstance(error, sa.exc.SQLAlchemyError):  # its text may hold anything
            return LedgerError(f"{self._name}: the transaction failed ({type(error).__name__})")
        cause = getattr(error, "orig", None) or error
        code = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or ""
        words = next((text for start, text in _WORDS.items() if code.startswith(start)), "")
        lines = str(cause).strip().splitlines() or [""]
        text = f"{self._name}: {words}{': ' if words else ''}{lines[0]} ({code or type(cause).__name__})"
        stays = bool(code) and not code.startswith(_SQLITE_PASSES) if self._is_sqlite else code[:2] in _POSTGRES_STAYS
        return LedgerUnusableError(text) if stays else LedgerError(text)

    # At the start

    def open(self) -> None:
        """Connect, create or upgrade the tables, and find out whether they can be read and written.

        Raises LedgerUnusableError when it can never work, LedgerError when the database is down: then later
        transactions try again.
        """
        self.transact(self._verify)

    def check(self) -> None:
        """Find out what `open` would say, without writing or creating anything.

        Raises LedgerUnusableError where a start would stop, LedgerError when the database is down.
        """
        if self._path:
            self._look_at_the_file(self._path)
        if self._is_sqlite and not (self._path and os.path.exists(self._path)):
            return
        probe = Database(
            self._url.render_as_string(hide_password=False), read_only=self._is_sqlite, deadline=self._deadline
        )
        probe._opened = True  # an older schema is fine, and no schema is as well
        try:
            probe.transact(probe._rehearse)
        finally:
            probe.close()

    def _rehearse(self, connection: Connection) -> None:
        """Do what a start does, and take it back; SQLite, which has one writer, and an older ledger are only read.

        To upgrade one takes time and locks, which those who use it should not feel.
        """
        if not self._is_sqlite and not schema.to_upgrade(connection):
            self._open(connection)
        self._verify(connection)
        connection.rollback()

    def _open(self, connection: Connection) -> None:
        if not self._read_only:
            schema.prepare(connection)
            return
        found = schema.found_version(connection)
        if found is None:
            raise LedgerMissingError(f"{self._name}: there is no ledger")
        if found != schema.SCHEMA_VERSION:
            raise schema.SchemaError(f"its schema version is {found}; the exporter upgrades it when it starts")

    def _verify(self, connection: Connection) -> None:
        if self._is_sqlite and connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one() != "ok":
            raise schema.SchemaError("the file is corrupt")
        if schema.found_version(connection) == schema.SCHEMA_VERSION:
            schema.try_tables(connection, writing=not self._read_only)

    def ping(self) -> None:
        """Find out whether the ledger can be written to, for `up`."""
        same = sa.update(schema.version).values(version=schema.version.c.version)
        with suppress(LedgerError):
            self.transact(lambda connection: connection.execute(same).rowcount)

    def close(self) -> None:
        """Close the connections, unless the database does not answer."""
        self._deadline = min(self._deadline, _AT_THE_END)
        engine = self._engine
        if engine:
            with suppress(LedgerError):
                self._bounded(engine.dispose)


def _printable(url: sa.URL) -> str:
    """Return the URL without a secret: passwords may be in the query as well, under several names."""
    shown = {name: value for name, value in url.query.items() if name in ("host", "port")}
    return url.set(query=shown).render_as_string(hide_password=True)


def _identity(path: str) -> tuple[int, int] | None:
    """Return what tells a file from another one of the same name, None when there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _obstacle(path: str, *, writing: bool) -> str | None:
    """Return why a SQLite file cannot be used, as far as the file system tells."""
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        return "this is a directory, not a file; name a file in ledger.url"
    if not os.path.isdir(directory):
        return f"the directory {directory} does not exist, or may not be entered"
    if os.path.exists(path) and not os.access(path, os.R_OK):
        return "no permission to read the file"
    if writing and os.path.exists(path) and not os.access(path, os.W_OK):
        return "no permission to write to the file"
    if writing and not os.access(directory, os.W_OK | os.X_OK):
        return f"no permission to write to the directory {directory}"
    return None
