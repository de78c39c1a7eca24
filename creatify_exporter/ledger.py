"""Durable counters that count every task exactly once.

What is promised (design section 2, `docs/counters.md`): a task is submitted once, finishes once, fails with one
reason, and of its credits the highest value seen counts; merging a record twice, late or out of order changes
nothing; a listing is one transaction; a series starts at 0, and shows more only after that was written down.

What is not: a task that was never listed is never counted, and a ledger that is lost, or restored from a backup,
cannot know what it once said.

Times are microseconds since the epoch, credits billionths, durations microseconds.
"""

import re
import threading
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Row

from creatify_exporter import database as db
from creatify_exporter.database import Database, LedgerError
from creatify_exporter.draft import CHUNK, Change, Draft, Known, chunks
from creatify_exporter.listing import ModelLabels
from creatify_exporter.tasks import FINISHED, HOUR, SECOND

BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the duration histogram, in seconds; one more bucket takes what is above."""

_LARGEST = 2**63 - 1  # what a total may be; a sum beyond it would make every later commit fail
_NEW_TASK = [column.name for column in db.tasks.c if column.name != "unlisted_since"]
_INSERT_TASK, _VALUES = str(sa.insert(db.tasks).compile(column_keys=_NEW_TASK)).split(" VALUES ")


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
    unsettled: int = 0

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


class Ledger(Database):
    """What was counted in each workspace."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """Prepare the ledger at `url`, a SQLAlchemy URL of SQLite or PostgreSQL; nothing is connected yet."""
        super().__init__(url, read_only=read_only)
        self._books: dict[str, Book] = {}

    def book(self, workspace: str) -> "Book":
        """Return the workspace's part of the ledger, always the same object."""
        return self._books.setdefault(workspace, Book(self, workspace))


class Book:
    """The ledger's part about one workspace; its methods may be called from any thread."""

    def __init__(self, ledger: Ledger, workspace: str) -> None:
        self.totals: Totals | None = None
        """The counters as last committed; None until the ledger answered."""
        self._ledger = ledger
        self._name = workspace
        self._lock = threading.Lock()
        self._known: Known | None = None
        self._draft: Draft | None = None
        self._unreadable: LedgerError | None = None
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
                    self._draft, self._unreadable = None, error  # `commit` says what is wrong
                    return Draft(Known())  # good for the gauges
                self._known = known
                if row and totals:
                    self._revision, self.totals = row.revision, totals
            self._draft, self._unreadable = Draft(self._known), None
            return self._draft

    def commit(self, draft: Draft | None, models: Iterable[str], policy: Policy, now: int) -> None:
        """Commit one complete listing in one transaction: tasks, totals, departures, retention, what is revealed.

        `models` are the listed models, first come first; `now` is the end of the listing. Without a draft (the
        listing failed) the totals are brought up to date and revealed all the same. Raises LedgerError; then
        nothing changed, and the next listing brings it all again.
        """
        with self._lock:
            if draft and draft is not self._draft:
                raise self._unreadable or LedgerError("another listing of the workspace began meanwhile")
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
            for key in list(self._answered):
                if key not in totals.series or totals.series[key].answered_at is not None:
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
        return tx.execute(sa.select(db.workspaces).where(db.workspaces.c.name == self._name)).first()

    def _load(self, tx: Connection) -> Known:
        known = Known()
        listed = sa.select(db.tasks.c.id, db.tasks.c.credits, db.tasks.c.finished).where(
            db.tasks.c.workspace == self._name, db.tasks.c.unlisted_since.is_(None)
        )
        for task_id, credits_, finished in tx.execute(listed.execution_options(yield_per=CHUNK)):
            known.set(task_id, credits_ << 1 | (finished is not None))
        return known

    def _locked(self, tx: Connection) -> Row[Any]:
        """Return the workspace's row, locked until the end of the transaction; create it when there is none."""
        query = sa.select(db.workspaces).where(db.workspaces.c.name == self._name).with_for_update()
        row = tx.execute(query).first()
        if row is None:
            insert = sqlite.insert if tx.dialect.name == "sqlite" else postgresql.insert
            tx.execute(insert(db.workspaces).values(name=self._name, revision=0, tasks=0).on_conflict_do_nothing())
            row = tx.execute(query).one()
        if row.revision < self._revision:
            self._known, self._revision = None, 0
            raise LedgerError("the ledger is older than it was: it was replaced; the next listing is merged anew")
        return row

    def _view(self, tx: Connection, row: Row[Any]) -> Totals:
        if self.totals is not None and row.revision == self._revision:
            return self.totals
        columns = [column for column in db.totals.c if column.name != "workspace"]
        rows = tx.execute(sa.select(*columns).where(db.totals.c.workspace == self._name))
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
            sa.insert(db.totals).values(workspace=self._row.name, value=0, held=not self._baseline, shown=shown),
            [
                {"model": key.model, "metric": key.metric, "label": key.label}
                for key in _expected(self._labels.known, self._policy.reasons)
                if key not in self._series
            ],
        )

    def merge(self, chunk: Sequence[Change]) -> Iterator[int]:
        """Merge listed tasks with what the ledger holds of them; yield the new state of each."""
        found = {}
        if not self._baseline:
            where = (db.tasks.c.workspace == self._row.name) & db.tasks.c.id.in_([change.id for change in chunk])
            found = {row.id: row for row in self._tx.execute(sa.select(db.tasks).where(where))}
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
            sa.update(db.tasks)
            .where(db.tasks.c.workspace == self._row.name, db.tasks.c.id == sa.bindparam("key"))
            .values(unlisted_since=None),
            updated,
        )

    def _counts(self, change: Change) -> bool:
        """Return whether an unknown task counts by appearing: it is neither baseline nor from before the floor."""
        if self._baseline:
            return self._policy.count_existing
        return change.created is None or change.created >= self._floor

    def _finish(self, model: str, change: Change) -> None:
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
        for chunk in chunks(ids):
            self._tx.execute(
                sa.update(db.tasks)
                .where(db.tasks.c.workspace == self._row.name, db.tasks.c.id.in_(chunk))
                .values(unlisted_since=self._now)
            )

    def prune(self, listed: Callable[[str], bool]) -> None:
        """Drop the tasks that were not listed for the retention time, and raise the floor so that none counts again."""
        old = (db.tasks.c.workspace == self._row.name) & (
            db.tasks.c.unlisted_since <= self._now - int(self._policy.retention * SECOND)
        )
        rows = self._tx.execute(sa.select(db.tasks).where(old)).all()
        # Another replica may have missed in its last listing what this one lists all the time.
        back = [row.id for row in rows if listed(row.id)]
        gone = [row for row in rows if not listed(row.id)]
        for chunk in chunks(back):
            self._tx.execute(sa.update(db.tasks).where(old, db.tasks.c.id.in_(chunk)).values(unlisted_since=None))
        for chunk in chunks([row.id for row in gone]):
            self._tx.execute(sa.delete(db.tasks).where(old, db.tasks.c.id.in_(chunk)))
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
        query = sa.select(db.tasks.c.id, db.tasks.c.created, db.tasks.c.first_seen).where(
            db.tasks.c.workspace == self._row.name, db.tasks.c.id.in_([one for one in former.values() if one])
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
                value=db.totals.c.value + sa.bindparam("added"),
                exemplar=sa.func.coalesce(sa.bindparam("newest", type_=sa.Text), db.totals.c.exemplar),
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
                sa.update(db.workspaces)
                .where(db.workspaces.c.name == self._row.name)
                .values(
                    baseline_at=self._started,
                    floor=self._floor,
                    tasks=self._tasks,
                    revision=db.workspaces.c.revision + 1,
                )
            )
        return self._touched

    def _total(self, **values: Any) -> sa.Update:
        return (
            sa.update(db.totals)
            .where(
                db.totals.c.workspace == self._row.name,
                db.totals.c.model == sa.bindparam("m"),
                db.totals.c.metric == sa.bindparam("n"),
                db.totals.c.label == sa.bindparam("l"),
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
