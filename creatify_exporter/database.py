"""The ledger's tables, and the SQLite or PostgreSQL database that holds them."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import Connection

SCHEMA_VERSION = 1

_metadata = sa.MetaData()

version = sa.Table("ledger_version", _metadata, sa.Column("version", sa.Integer, nullable=False))

workspaces = sa.Table(
    "workspaces",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("baseline_at", sa.BigInteger),  # when counting began; null before the first listing
    sa.Column("floor", sa.BigInteger),  # unknown tasks created before it count nothing by appearing
    sa.Column("revision", sa.BigInteger, nullable=False),  # rises with every change of this workspace
    sa.Column("tasks", sa.BigInteger, nullable=False),
)

tasks = sa.Table(
    "tasks",
    _metadata,
    sa.Column("workspace", sa.Text, primary_key=True),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),  # the label it had when first seen
    sa.Column("finished", sa.Text),  # done, failed, or null
    sa.Column("credits", sa.BigInteger, nullable=False),  # the highest value seen
    sa.Column("created", sa.BigInteger),
    sa.Column("first_seen", sa.BigInteger, nullable=False),
    sa.Column("unlisted_since", sa.BigInteger),
    sqlite_with_rowid=False,
)
unlisted = tasks.c.unlisted_since.is_not(None)
sa.Index(
    "tasks_unlisted",
    tasks.c.workspace,
    tasks.c.unlisted_since,
    sqlite_where=unlisted,
    postgresql_where=unlisted,
)

totals = sa.Table(
    "totals",
    _metadata,
    sa.Column("workspace", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("metric", sa.Text, primary_key=True),
    sa.Column("label", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
    sa.Column("held", sa.Boolean, nullable=False),  # joined after the baseline, so zero_hold applies
    sa.Column("answered_at", sa.BigInteger),  # the first answer that carried it
    sa.Column("shown", sa.Boolean, nullable=False),  # it may show its value, for good
    sa.Column("exemplar", sa.Text),  # the newest task behind it
    sqlite_with_rowid=False,
)


class LedgerError(Exception):
    """The ledger is out of reach; what was committed stands, and a later listing catches up."""


class LedgerUnusableError(LedgerError):
    """The ledger can never work as it is: a corrupt file, another schema, no permission, a wrong password."""


class LedgerMissingError(LedgerUnusableError):
    """There is no ledger, and none may be made."""


class Database:
    """The database behind the ledger: SQLite, or PostgreSQL when several replicas share it."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """Prepare the database at `url`, a SQLAlchemy URL of SQLite or PostgreSQL; nothing is connected yet."""
        self._url = sa.make_url(url)
        self._read_only = read_only
        self.up = False
        self._opened = False
        self._opening = threading.Lock()
        self._engine = self._make_engine()

    def _make_engine(self) -> sa.Engine:
        if self._url.get_backend_name() == "sqlite":
            url = self._url
            if self._read_only and url.database:
                # A file nobody has open is read as it lies: any other way of reading leaves files beside it.
                idle = {} if os.path.exists(f"{url.database}-wal") else {"immutable": "1"}
                url = url.set(database=f"file:{quote(url.database)}", query={"mode": "ro", "uri": "true", **idle})
            # One connection: SQLite has one writer, and waiting for it in line is fair.
            engine = sa.create_engine(
                url,
                poolclass=sa.QueuePool,
                pool_size=1,
                max_overflow=0,
                pool_timeout=60,
                connect_args={"timeout": 10, "check_same_thread": False},
            )
            sa.event.listen(engine, "connect", self._prepare_sqlite)
            begin = "BEGIN" if self._read_only else "BEGIN IMMEDIATE"
            sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
            return engine
        defaults = {
            "connect_timeout": "5",
            "tcp_user_timeout": "10000",
            "application_name": "creatify-exporter",
            "options": "-c statement_timeout=60s -c lock_timeout=30s -c synchronous_commit=on"
            + (" -c default_transaction_read_only=on" if self._read_only else ""),
        }
        url = self._url.set(drivername="postgresql+psycopg")
        return sa.create_engine(
            url.update_query_dict({k: v for k, v in defaults.items() if k not in url.query}),
            pool_pre_ping=True,
        )

    def _prepare_sqlite(self, connection: Any, _record: object) -> None:
        connection.isolation_level = None
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        # Not even the header of somebody else's file is touched.
        if not self._read_only and (not tables or version.name in tables):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Run one transaction; raise LedgerError, with the URL but no password, when the database fails."""
        if (
            self._read_only
            and self._url.get_backend_name() == "sqlite"
            and not os.path.exists(self._url.database or "")
        ):
            raise LedgerMissingError(f"ledger {self._url}: there is no ledger")
        try:
            if not self._opened:
                self._open()
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.SQLAlchemyError as error:
            self.up = False
            raise self._explained(error) from error
        except LedgerError:
            self.up = False
            raise
        self.up = True

    def _explained(self, error: sa.exc.SQLAlchemyError) -> LedgerError:
        cause = getattr(error, "orig", None) or error
        lines = str(cause).strip().splitlines() or [""]
        text = f"ledger {self._url.render_as_string(hide_password=True)}: {lines[0]} ({type(cause).__name__})"
        if self._url.get_backend_name() == "sqlite":
            unusable = not re.search("locked|busy|full|QueuePool", str(cause))
        else:
            unusable = bool(re.search("authentication|does not exist|pg_hba|no password", str(cause)))
        return LedgerUnusableError(text) if unusable else LedgerError(text)

    def open(self) -> None:
        """Connect, create the schema when there is none, and verify it.

        Raises LedgerUnusableError when it can never work, LedgerError when the database is down: then later
        transactions try again.
        """
        with self.transaction() as connection:
            for table in _metadata.sorted_tables:
                connection.execute(sa.select(table).limit(1)).all()
            if connection.dialect.name == "sqlite":
                verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
                if verdict != "ok":
                    raise LedgerUnusableError(f"ledger {self._url}: the file is corrupt")

    def _open(self) -> None:
        with self._opening, self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                # Two replicas that start at once must not create the schema twice.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x63726561)))
            found = set(sa.inspect(connection).get_table_names())
            name = self._url.render_as_string(hide_password=True)
            if version.name in found:
                versions = connection.scalars(sa.select(version.c.version)).all()
                if versions != [SCHEMA_VERSION]:
                    raise LedgerUnusableError(
                        f"ledger {name}: its schema version is {versions}, this exporter needs [{SCHEMA_VERSION}]; "
                        "use the exporter version that wrote it, or another ledger.url"
                    )
            elif found and (connection.dialect.name == "sqlite" or found & _metadata.tables.keys()):
                raise LedgerUnusableError(f"ledger {name}: the database holds tables that are not a ledger's")
            elif self._read_only:
                raise LedgerMissingError(f"ledger {name}: there is no ledger")
            else:
                _metadata.create_all(connection)
                connection.execute(sa.insert(version).values(version=SCHEMA_VERSION))
            self._opened = True

    def ping(self) -> None:
        """Find out whether the ledger can be written to, for `up`."""
        with suppress(LedgerError), self.transaction() as connection:
            connection.execute(sa.update(version).values(version=SCHEMA_VERSION))

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()
