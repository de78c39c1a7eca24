"""Durable counters that count every task exactly once.

What is promised (design section 2, `docs/counters.md`): a task is submitted once, finishes once, fails with one
reason, and of its credits the highest value seen counts; merging a record twice, late or out of order changes
nothing; a listing is one transaction; a series starts at 0, and shows more only after that was written down.

What is not: a task that was never listed is never counted, and a ledger that is lost, or restored from a backup,
cannot know what it once said.

Times are microseconds since the epoch, credits billionths, durations microseconds.
"""

import os
import re
import threading
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Row

from creatify_exporter.listing import ModelLabels
from creatify_exporter.tasks import FINISHED, Task

SCHEMA_VERSION = 1
BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the duration histogram, in seconds; one more bucket takes what is above."""

HOUR = 3_600_000_000
SECOND = 1_000_000

_CHUNK = 1000
_LARGEST = 2**63 - 1  # what a total may be; a sum beyond it would make every later commit fail
_metadata = sa.MetaData()

_version = sa.Table("ledger_version", _metadata, sa.Column("version", sa.Integer, nullable=False))

_workspaces = sa.Table(
    "workspaces",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("baseline_at", sa.BigInteger),  # when counting began; null before the first listing
    sa.Column("floor", sa.BigInteger),  # unknown tasks created before it count nothing by appearing
    sa.Column("revision", sa.BigInteger, nullable=False),  # rises with every change of this workspace
    sa.Column("tasks", sa.BigInteger, nullable=False),
)

_tasks = sa.Table(
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
_NEW_TASK = [column.name for column in _tasks.c if column.name != "unlisted_since"]
_INSERT_TASK, _VALUES = str(sa.insert(_tasks).compile(column_keys=_NEW_TASK)).split(" VALUES ")
_unlisted = _tasks.c.unlisted_since.is_not(None)
sa.Index(
    "tasks_unlisted",
    _tasks.c.workspace,
    _tasks.c.unlisted_since,
    sqlite_where=_unlisted,
    postgresql_where=_unlisted,
)

_totals = sa.Table(
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


class Key(NamedTuple):
    """One counter series of a workspace: `metric` is one of submitted, finished, failures, credits, duration, bucket.

    `label` is the status, the reason, or for a histogram bucket `STATUS/INDEX`.
    """

    model: str
    metric: str
    label: str


@dataclass(frozen=True, slots=True)
class Total:
    """What was counted for one series, and whether it may be shown yet."""

    value: int
    held: bool
    answered_at: int | None
    shown: bool
    exemplar: str | None


@dataclass(frozen=True, slots=True)
class Totals:
    """The committed counters of one workspace. `started` is None before the baseline."""

    series: Mapping[Key, Total]
    started: int | None
    tasks: int

    @property
    def models(self) -> list[str]:
        """The known models, first come first."""
        return list(dict.fromkeys(key.model for key in self.series))


@dataclass(frozen=True, slots=True)
class Policy:
    """How to count: the closed set of reasons and the settings of design section 5, durations in seconds."""

    reasons: Sequence[str]
    max_models: int
    count_existing: bool
    retention: float
    zero_hold: float


class _Known:
    """What this process knows the ledger to hold of the listed tasks, in about 170 bytes a task.

    A task's state is `credits << 1 | finished`.
    """

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.states = array("q")
        self._free: list[int] = []

    def set(self, task_id: str, state: int) -> None:
        slot = self.slots.get(task_id)
        if slot is None:
            slot = self._free.pop() if self._free else len(self.states)
            self.slots[task_id] = slot
        if slot == len(self.states):
            self.states.append(state)
        else:
            self.states[slot] = state

    def forget(self, task_id: str) -> None:
        self._free.append(self.slots.pop(task_id))

    def replace(self, slots: dict[str, int], states: "array[int]") -> None:
        self.slots, self.states = slots, states
        self._free.clear()


class _Change(msgspec.Struct, gc=False):
    """What the ledger has to hear about one task; an absent time is None."""

    id: str
    model: str
    status: str
    reason: str | None
    credits: int
    created: int | None
    duration: int | None


class Draft:
    """What one listing would change in the ledger; nothing is written before `Book.commit`."""

    _ABSENT = -(2**63)

    def __init__(self, known: _Known, unreadable: LedgerError | None = None) -> None:
        self.known = known
        self.unreadable = unreadable
        self._seen = bytearray(len(known.states))
        # The tasks that are news, by column: as whole objects a million would take three times the memory.
        self._news: dict[str, int] = {}
        self._credits, self._created, self._duration, self._word = array("q"), array("q"), array("q"), array("I")
        self._words: dict[tuple[str, str, str | None], int] = {}
        self._order: list[str] = []

    def add(self, tasks: Iterable[Task]) -> list[Task]:
        """Take in listed tasks; return them, but for those whose id this listing had before."""
        slots, states, seen, news, fresh = self.known.slots, self.known.states, self._seen, self._news, []
        for task in tasks:
            slot = slots.get(task.id)
            if slot is None:
                if task.id in news:
                    continue
            elif seen[slot]:
                continue
            fresh.append(task)
            if slot is not None:
                seen[slot] = 1
                state = states[slot]
                if task.credits <= state >> 1 and (state & 1 or task.status not in FINISHED):
                    continue
            created, duration = task.times()
            news[task.id] = len(news)
            self._credits.append(task.credits)
            self._created.append(self._ABSENT if created is None else created)
            self._duration.append(self._ABSENT if duration is None else duration)
            self._word.append(self._words.setdefault((task.model, task.status, task.reason), len(self._words)))
        return fresh

    def changes(self) -> Iterator[list[_Change]]:
        """Return the tasks whose state is news, in chunks, by id: so a B-tree takes them in half the time."""
        words, self._order = list(self._words), sorted(self._news)
        for ids in _chunks(self._order):
            chunk = []
            for task_id in ids:
                row = self._news[task_id]
                created, duration = self._created[row], self._duration[row]
                chunk.append(
                    _Change(
                        task_id,
                        *words[self._word[row]],
                        self._credits[row],
                        None if created == self._ABSENT else created,
                        None if duration == self._ABSENT else duration,
                    )
                )
            yield chunk

    def left(self) -> list[str]:
        """Return the ids that were listed before and are not now."""
        if self._seen.count(1) == len(self.known.slots):
            return []
        return [task_id for task_id, slot in self.known.slots.items() if not self._seen[slot]]

    def committed(self, left: Iterable[str], states: "array[int]") -> None:
        """Remember what the ledger holds from now on; `states` are those of the changes, in their order."""
        for task_id in left:
            self.known.forget(task_id)
        if self.known.slots:
            for task_id, state in zip(self._order, states, strict=True):
                self.known.set(task_id, state)
        else:  # a million ids are not held twice
            for slot, task_id in enumerate(self._order):
                self._news[task_id] = slot
            self.known.replace(self._news, states)

    def lists(self, task_id: str) -> bool:
        """Return whether this listing had the task."""
        slot = self.known.slots.get(task_id)
        return task_id in self._news or (slot is not None and bool(self._seen[slot]))


class Ledger:
    """The database behind the counters: SQLite, or PostgreSQL when several replicas share it."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """Prepare the ledger at `url`, a SQLAlchemy URL of SQLite or PostgreSQL; nothing is connected yet."""
        self._url = sa.make_url(url)
        self._read_only = read_only
        self.up = False
        self._opened = False
        self._opening = threading.Lock()
        self._books: dict[str, Book] = {}
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
        if not self._read_only and (not tables or _version.name in tables):
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
            if _version.name in found:
                versions = connection.scalars(sa.select(_version.c.version)).all()
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
                connection.execute(sa.insert(_version).values(version=SCHEMA_VERSION))
            self._opened = True

    def ping(self) -> None:
        """Find out whether the ledger can be written to, for `up`."""
        with suppress(LedgerError), self.transaction() as connection:
            connection.execute(sa.update(_version).values(version=SCHEMA_VERSION))

    def book(self, workspace: str) -> "Book":
        """Return the workspace's part of the ledger, always the same object."""
        return self._books.setdefault(workspace, Book(self, workspace))

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


class Book:
    """The ledger's part about one workspace; its methods may be called from any thread."""

    def __init__(self, ledger: Ledger, workspace: str) -> None:
        self.totals: Totals | None = None
        """The counters as last committed; None until the ledger answered."""
        self._ledger = ledger
        self._name = workspace
        self._lock = threading.Lock()
        self._known: _Known | None = None
        self._draft: Draft | None = None
        self._revision = 0
        self._answered: dict[Key, int] = {}
        self._noted: Totals | None = None

    def draft(self) -> Draft:
        """Return an empty draft for one listing; the first one in a process reads what the ledger holds."""
        with self._lock:
            if self._known is None:
                try:
                    with self._ledger.transaction() as tx:
                        known, row = self._load(tx), self._row(tx)
                        totals = self._view(tx, row) if row else None
                except LedgerError as error:
                    return Draft(_Known(), error)  # good for the gauges; `commit` says what is wrong
                self._known = known
                if row and totals:
                    self._revision, self.totals = row.revision, totals
            self._draft = Draft(self._known)
            return self._draft

    def commit(self, draft: Draft | None, models: Iterable[str], policy: Policy, now: int) -> None:
        """Commit one complete listing in one transaction: tasks, totals, departures, retention, what is revealed.

        `models` are the listed models, first come first; `now` is the end of the listing. Without a draft (the
        listing failed) the totals are brought up to date and revealed all the same. Raises LedgerError; then
        nothing changed, and the next listing brings it all again.
        """
        with self._lock:
            if draft and draft is not self._draft:
                raise draft.unreadable or LedgerError("another listing of the workspace began meanwhile")
            states, left = array("q"), list[str]()
            with self._ledger.transaction() as tx:
                row = self._locked(tx)
                recording = _Recording(tx, row, self._view(tx, row).series, policy, now)
                if draft:
                    recording.join(models)
                    for chunk in draft.changes():
                        states.extend(recording.merge(chunk))
                    left = draft.left()
                    recording.leave(left)
                    recording.prune(draft.lists)
                recording.reveal(self._answered)
                if recording.finish():
                    row = self._locked(tx)
                totals = self._view(tx, row)
            # Only what a transaction has committed may be exposed or believed.
            self._revision, self.totals = row.revision, totals
            for key in [key for key in self._answered if totals.series[key].answered_at is not None]:
                del self._answered[key]
            if draft:
                draft.committed(left, states)

    def read(self) -> None:
        """Bring `totals` up to date without writing anything. Raises LedgerError."""
        with self._lock, self._ledger.transaction() as tx:
            row = self._row(tx)
            self.totals = self._view(tx, row) if row else None

    def due(self, policy: Policy, now: int) -> bool:
        """Return whether a commit would reveal a series, listing or not."""
        return any(
            shown for _, _, shown in _due(self.totals.series if self.totals else {}, self._answered, policy, now)
        )

    def answered(self, totals: Totals, now: int) -> None:
        """Take note that an answer at `now` carried the series of `totals`; a later transaction writes it."""
        if totals is not self._noted:
            self._noted = totals
            for key, total in totals.series.items():
                if total.answered_at is None:
                    self._answered.setdefault(key, now)

    def _row(self, tx: Connection) -> Row[Any] | None:
        return tx.execute(sa.select(_workspaces).where(_workspaces.c.name == self._name)).first()

    def _load(self, tx: Connection) -> _Known:
        known = _Known()
        listed = sa.select(_tasks.c.id, _tasks.c.credits, _tasks.c.finished).where(
            _tasks.c.workspace == self._name, _tasks.c.unlisted_since.is_(None)
        )
        for task_id, credits_, finished in tx.execute(listed.execution_options(yield_per=_CHUNK)):
            known.set(task_id, credits_ << 1 | (finished is not None))
        return known

    def _locked(self, tx: Connection) -> Row[Any]:
        """Return the workspace's row, locked until the end of the transaction; create it when there is none."""
        query = sa.select(_workspaces).where(_workspaces.c.name == self._name).with_for_update()
        row = tx.execute(query).first()
        if row is None:
            insert = sqlite.insert if tx.dialect.name == "sqlite" else postgresql.insert
            tx.execute(insert(_workspaces).values(name=self._name, revision=0, tasks=0).on_conflict_do_nothing())
            row = tx.execute(query).one()
        if row.revision < self._revision:
            self._known, self._revision = None, 0
            raise LedgerError("the ledger is older than it was: it was replaced; the next listing is merged anew")
        return row

    def _view(self, tx: Connection, row: Row[Any]) -> Totals:
        if self.totals is not None and row.revision == self._revision:
            return self.totals
        columns = [column for column in _totals.c if column.name != "workspace"]
        rows = tx.execute(sa.select(*columns).where(_totals.c.workspace == self._name))
        series = {Key(*row[:3]): Total(*row[3:]) for row in rows}
        return Totals(series, row.baseline_at, row.tasks)


def _due(
    series: Mapping[Key, Total], answered: Mapping[Key, int], policy: Policy, now: int
) -> list[tuple[Key, int, bool]]:
    """Return the series whose first answer is to be written down or that may show their value: (key, first, shown)."""
    due = []
    for key, total in series.items():
        first = answered.get(key) if total.answered_at is None else total.answered_at
        if not total.shown and first is not None:
            shown = first + (policy.zero_hold * SECOND if total.held else 0) <= now
            if shown or total.answered_at is None:
                due.append((key, first, shown))
    return due


class _Recording:
    """One listing on its way into the ledger, inside one transaction that holds the workspace's lock."""

    def __init__(self, tx: Connection, row: Row[Any], series: Mapping[Key, Total], policy: Policy, now: int) -> None:
        self._tx = tx
        self._row = row
        self._series = series
        self._policy = policy
        self._now = now
        self._baseline = row.baseline_at is None
        self._floor = now - HOUR if self._baseline else row.floor
        self._tasks = row.tasks
        self._labels = ModelLabels({key.model for key in series}, policy.max_models)
        self._added: Counter[Key] = Counter()
        self._newest: dict[Key, tuple[int, str]] = {}
        self._started = row.baseline_at
        self._touched = False

    def join(self, models: Iterable[str]) -> None:
        """Add the series of models and reasons that are not known yet, at 0; the first time counting begins."""
        if self._baseline:
            self._started, self._touched = self._now, True
        for model in models:
            self._labels(model)
        shown = self._baseline and self._policy.count_existing
        self._write(
            sa.insert(_totals).values(workspace=self._row.name, value=0, held=not self._baseline, shown=shown),
            [
                {"model": key.model, "metric": key.metric, "label": key.label}
                for key in _expected(self._labels.known, self._policy.reasons)
                if key not in self._series
            ],
        )

    def merge(self, chunk: Sequence[_Change]) -> Iterator[int]:
        """Merge listed tasks with what the ledger holds of them; yield the new state of each."""
        found = {}
        if not self._baseline:
            where = (_tasks.c.workspace == self._row.name) & _tasks.c.id.in_([change.id for change in chunk])
            found = {row.id: row for row in self._tx.execute(sa.select(_tasks).where(where))}
        inserted, updated = [], []
        for change in chunk:
            old = found.get(change.id)
            finished = change.status if change.status in FINISHED else None
            if old is None:
                model, credits_ = self._labels(change.model), change.credits
                inserted.append((self._row.name, change.id, model, finished, credits_, change.created, self._now))
                if self._counts(change):
                    self._added[Key(model, "submitted", "")] += 1
                    self._added[Key(model, "credits", "")] += credits_
                    self._finish(model, change)
            else:
                credits_ = max(old.credits, change.credits)
                self._added[Key(old.model, "credits", "")] += credits_ - old.credits
                if old.finished is None:
                    self._finish(old.model, change)
                finished = old.finished or finished
                if (credits_, finished, None) != (old.credits, old.finished, old.unlisted_since):
                    updated.append({"key": change.id, "credits": credits_, "finished": finished})
            yield credits_ << 1 | (finished is not None)
        if inserted:
            # All rows in one statement take a third of the time of one after the other with parameters by name.
            values = re.sub(r":\w+", "?" if self._tx.dialect.name == "sqlite" else "%s", _VALUES)
            rows = ", ".join([values] * len(inserted))
            self._tx.exec_driver_sql(f"{_INSERT_TASK} VALUES {rows}", tuple(chain.from_iterable(inserted)))
            self._tasks += len(inserted)
            self._touched = True
        self._write(
            sa.update(_tasks)
            .where(_tasks.c.workspace == self._row.name, _tasks.c.id == sa.bindparam("key"))
            .values(unlisted_since=None),
            updated,
        )

    def _counts(self, change: _Change) -> bool:
        """Return whether an unknown task counts by appearing: it is neither baseline nor from before the floor."""
        if self._baseline:
            return self._policy.count_existing
        return change.created is None or change.created >= self._floor

    def _finish(self, model: str, change: _Change) -> None:
        if change.status not in FINISHED:
            return
        self._added[Key(model, "finished", change.status)] += 1
        if change.reason is not None:
            key = Key(model, "failures", change.reason)
            self._added[key] += 1
            rank = min(max(change.created or 0, 0), self._now), change.id
            self._newest[key] = max(self._newest.get(key, (0, "")), rank)
        if change.duration is not None:
            bucket = bisect_left(BUCKETS, change.duration / SECOND)
            self._added[Key(model, "bucket", f"{change.status}/{bucket}")] += 1
            self._added[Key(model, "duration", change.status)] += change.duration

    def leave(self, ids: Sequence[str]) -> None:
        """Write down since when tasks are no longer listed."""
        for chunk in _chunks(ids):
            self._tx.execute(
                sa.update(_tasks)
                .where(_tasks.c.workspace == self._row.name, _tasks.c.id.in_(chunk))
                .values(unlisted_since=self._now)
            )

    def prune(self, listed: Callable[[str], bool]) -> None:
        """Drop the tasks that were not listed for the retention time, and raise the floor so that none counts again."""
        old = (_tasks.c.workspace == self._row.name) & (
            _tasks.c.unlisted_since <= self._now - int(self._policy.retention * SECOND)
        )
        rows = self._tx.execute(sa.select(_tasks).where(old)).all()
        # Another replica may have missed in its last listing what this one lists all the time.
        back = [row.id for row in rows if listed(row.id)]
        gone = [row for row in rows if not listed(row.id)]
        for chunk in _chunks(back):
            self._tx.execute(sa.update(_tasks).where(old, _tasks.c.id.in_(chunk)).values(unlisted_since=None))
        for chunk in _chunks([row.id for row in gone]):
            self._tx.execute(sa.delete(_tasks).where(old, _tasks.c.id.in_(chunk)))
        for row in gone:
            # A created_at that is ahead of this clock by a little is still the better bound; one in 2099 is none.
            plausible = row.created is not None and row.created < row.unlisted_since
            self._floor = max(self._floor, (row.created if plausible else row.first_seen) + 1)
        self._tasks -= len(gone)
        self._touched |= bool(gone)

    def reveal(self, answered: Mapping[Key, int]) -> None:
        """Write down which series were in an answer, and which may show their value from now on."""
        self._write(
            self._total(answered_at=sa.bindparam("first"), shown=sa.bindparam("show")),
            [
                {"m": key.model, "n": key.metric, "l": key.label, "first": first, "show": shown}
                for key, first, shown in _due(self._series, dict(answered), self._policy, self._now)
            ],
        )

    def _keep_newer_exemplars(self) -> None:
        """Leave the exemplars that are newer than what was listed late."""
        former = {key: self._series[key].exemplar for key in self._newest if key in self._series}
        query = sa.select(_tasks.c.id, _tasks.c.created, _tasks.c.first_seen).where(
            _tasks.c.workspace == self._row.name, _tasks.c.id.in_([one for one in former.values() if one])
        )
        known = {one.id: min(one.created or 0, one.first_seen) for one in self._tx.execute(query)} if former else {}
        for key, one in former.items():
            if one in known and (known[one], one) > self._newest[key]:
                del self._newest[key]

    def finish(self) -> bool:
        """Write the totals and the workspace's row; return whether anything changed."""
        self._keep_newer_exemplars()
        self._write(
            self._total(
                value=_totals.c.value + sa.bindparam("added"),
                exemplar=sa.func.coalesce(sa.bindparam("newest", type_=sa.Text), _totals.c.exemplar),
            ),
            [
                {
                    "m": key.model,
                    "n": key.metric,
                    "l": key.label,
                    "added": min(added, _LARGEST - (self._series[key].value if key in self._series else 0)),
                    "newest": self._newest.get(key, (0, None))[1],
                }
                for key, added in self._added.items()
                if added
            ],
        )
        if self._touched:
            self._tx.execute(
                sa.update(_workspaces)
                .where(_workspaces.c.name == self._row.name)
                .values(
                    baseline_at=self._started,
                    floor=self._floor,
                    tasks=self._tasks,
                    revision=_workspaces.c.revision + 1,
                )
            )
        return self._touched

    def _total(self, **values: Any) -> sa.Update:
        return (
            sa.update(_totals)
            .where(
                _totals.c.workspace == self._row.name,
                _totals.c.model == sa.bindparam("m"),
                _totals.c.metric == sa.bindparam("n"),
                _totals.c.label == sa.bindparam("l"),
            )
            .values(**values)
        )

    def _write(self, statement: sa.Insert | sa.Update, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._tx.execute(statement, rows)
            self._touched = True


def _expected(models: Iterable[str], reasons: Iterable[str]) -> Iterator[Key]:
    """Return the series that every known model has: each status, each reason, each bucket."""
    for model in models:
        yield Key(model, "submitted", "")
        yield Key(model, "credits", "")
        for reason in reasons:
            yield Key(model, "failures", reason)
        for status in FINISHED:
            yield Key(model, "finished", status)
            yield Key(model, "duration", status)
            for bucket in range(len(BUCKETS) + 1):
                yield Key(model, "bucket", f"{status}/{bucket}")


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))
