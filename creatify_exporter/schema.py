"""The ledger's tables, their versions, and how an older one becomes the current one."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

SCHEMA_VERSION = 2

BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the duration histogram, in seconds."""

BOUNDS = (*BUCKETS, float("inf"))
"""The same with the last bucket, which takes what is above."""

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
    sa.Column("ask_at", sa.BigInteger),  # when to ask for it by id; only of unsettled tasks
    sqlite_with_rowid=False,
)


def _index(name: str, column: sa.Column[int]) -> sa.Index:
    present = column.is_not(None)
    return sa.Index(name, tasks.c.workspace, column, sqlite_where=present, postgresql_where=present)


_index("tasks_unlisted", tasks.c.unlisted_since)
_unsettled = _index("tasks_unsettled", tasks.c.ask_at)

totals = sa.Table(
    "totals",
    _metadata,
    sa.Column("workspace", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("metric", sa.Text, primary_key=True),
    sa.Column("label", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
    sa.Column("late", sa.Boolean, nullable=False),  # joined after the baseline, so zero_hold applies
    sa.Column("answered_at", sa.BigInteger),  # the first answer that carried it
    sa.Column("shown", sa.Boolean, nullable=False),  # it may show its value, for good
    sa.Column("exemplar", sa.Text),  # the newest task behind it
    sqlite_with_rowid=False,
)


class SchemaError(Exception):
    """The database holds something else than a ledger of this version."""


def bucket_label(status: str, bound: float) -> str:
    """Return the label of a series that counts the durations up to `bound` seconds and above the bound before it.

    It names the bound, not its place among the bounds: other bounds in a later version cannot change what it means.
    """
    return f"{status}/le={bound:g}"


def found_version(connection: Connection) -> int | None:
    """Return the schema version of the ledger in a database, None when there is no ledger; raise SchemaError."""
    found = set(sa.inspect(connection).get_table_names())
    ours = _metadata.tables.keys()
    if version.name not in found:
        # Other tables in a PostgreSQL database disturb nobody; a SQLite file with other tables is not ours to fill.
        if found and (connection.dialect.name == "sqlite" or found & ours):
            raise SchemaError("the database holds tables that are not a ledger's; use another ledger.url")
        return None
    versions = connection.scalars(sa.select(version.c.version)).all()
    if len(versions) != 1 or not 1 <= versions[0] <= SCHEMA_VERSION:
        raise SchemaError(
            f"its schema version is {versions}, this exporter needs [{SCHEMA_VERSION}]; "
            "use the exporter version that wrote it, or another ledger.url"
        )
    if missing := sorted(ours - found):
        raise SchemaError(f"the tables {', '.join(missing)} are missing; use another ledger.url")
    return int(versions[0])


def prepare(connection: Connection) -> None:
    """Create the tables, or upgrade older ones in place; raise SchemaError when that cannot be."""
    if connection.dialect.name == "postgresql":
        # No second replica does the same at the same time; SQLite has one writer anyway.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x63726561)))
    found = found_version(connection)
    if found is None:
        _metadata.create_all(connection)
        connection.execute(sa.insert(version).values(version=SCHEMA_VERSION))
    elif found < SCHEMA_VERSION:
        _upgrade_from_1(connection)
        connection.execute(sa.update(version).values(version=SCHEMA_VERSION))


def to_upgrade(connection: Connection) -> bool:
    """Return whether `prepare` would upgrade a PostgreSQL ledger; raise SchemaError when it must not."""
    if (found_version(connection) or SCHEMA_VERSION) == SCHEMA_VERSION:
        return False
    may = (
        "SELECT bool_and(pg_has_role(relowner, 'USAGE')) AND has_schema_privilege(current_schema(), 'CREATE')"
        " FROM pg_class WHERE oid IN (to_regclass('tasks'), to_regclass('totals'))"
    )
    if not connection.scalar(sa.text(may)):
        raise SchemaError("no permission to upgrade its tables: only a role that owns them may")
    return True


def _upgrade_from_1(connection: Connection) -> None:
    """Ask by id for the tasks that had left the list unfinished; name buckets by bound, `held` what it says."""
    connection.execute(sa.text("ALTER TABLE tasks ADD COLUMN ask_at BIGINT"))
    connection.execute(sa.text("ALTER TABLE totals RENAME COLUMN held TO late"))
    _unsettled.create(connection)
    connection.execute(
        sa.update(tasks)
        .where(tasks.c.finished.is_(None), tasks.c.unlisted_since.is_not(None))
        .values(ask_at=tasks.c.unlisted_since)
    )
    for status in ("done", "failed"):
        for index, bound in enumerate(BOUNDS):
            connection.execute(
                sa.update(totals)
                .where(totals.c.metric == "bucket", totals.c.label == f"{status}/{index}")
                .values(label=bucket_label(status, bound))
            )


def try_tables(connection: Connection, *, writing: bool) -> None:
    """Read a row of each table, so that a missing permission or a corrupt table is found at the start.

    With `writing`, send each table one INSERT, UPDATE and DELETE that concern no row as well.
    """
    for table in _metadata.sorted_tables:
        connection.execute(sa.select(table).limit(1)).all()
        if writing:
            column = next(iter(table.c))
            connection.execute(sa.insert(table).from_select(list(table.c), sa.select(table).where(sa.false())))
            connection.execute(sa.update(table).where(sa.false()).values({column: column}))
            connection.execute(sa.delete(table).where(sa.false()))


def put(connection: Connection, table: sa.Table, rows: Sequence[Sequence[Any]]) -> None:
    """Write whole rows, in the order of the columns, each over the one of the same key if there is one.

    All rows in one statement take a third of the time of one after the other with parameters by name.
    """
    keys, names = table.primary_key.columns.keys(), table.columns.keys()
    row = "({})".format(", ".join(["?" if connection.dialect.name == "sqlite" else "%s"] * len(names)))
    updates = ", ".join(f"{name} = excluded.{name}" for name in names if name not in keys)
    connection.exec_driver_sql(
        f"INSERT INTO {table.name} ({', '.join(names)}) VALUES {', '.join([row] * len(rows))}"  # noqa: S608 - the names are those above
        f" ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {updates}",
        tuple(chain.from_iterable(rows)),
    )
