"""Durable counters that count every task exactly once.

What is promised (`docs/counters.md`): a task is submitted once, finishes once, fails with one reason, and of its
credits the highest value seen counts; merging a record twice, late or out of order changes nothing; a listing is one
transaction; a series starts at 0, and shows more only after that was written down; a task that leaves the list before
its end is asked for by id.

What is not: a task that was never listed is never counted, and a ledger that is lost, or restored from a backup,
cannot know what it once said.

Times are microseconds since the epoch, credits billionths, durations microseconds.
"""

import threading
from array import array
from collections.abc import Callable, Iterable
from itertools import filterfalse, islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from creatify_exporter import schema as db
from creatify_exporter.database import Database, LedgerError, LedgerSupersededError, LedgerUncertainError
from creatify_exporter.draft import CHUNK, Draft, Known
from creatify_exporter.recording import LONGEST_INTERVAL, Key, Policy, Recording, Total, Totals, steps
from creatify_exporter.tasks import HOUR, SECOND

__all__ = ["Book", "Key", "Ledger", "LedgerError", "Policy", "Totals"]

_UNKNOWN = -1  # a revision that no ledger has
_RIGHT = 5 * 60 * SECOND  # a clock that differs less from the API's is not wrong: listings take their time


class Ledger(Database):
    """What was counted in each workspace."""

    def __init__(self, url: str, *, read_only: bool = False, deadline: float = 10.0) -> None:
        """Prepare the ledger at `url`, a SQLAlchemy URL of SQLite or PostgreSQL; nothing is connected yet.

        No statement holds a caller for more than `deadline` seconds.
        """
        super().__init__(url, read_only=read_only, deadline=deadline)
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
        self._answered: dict[Key, int] = {}  # this machine's time of the first answer, not written down yet
        self._answered_totals: Totals | None = None
        self._offset = 0  # of this machine's clock, where it is wrong
        self._committed_at = 0
        self._listed_at: int | None = None
        self._loaded_at: int | None = None
        self._others = False  # whether other replicas wrote since
        self._records = True  # whether the newest commit worked

    def draft(self) -> Draft:
        """Return an empty draft for one listing; the first one in a process reads what the ledger holds."""
        with self._lock:
            if self._known is None:
                try:
                    known, revision, totals = self._ledger.transact(self._load)
                except LedgerError as error:
                    self._draft, self._unreadable = None, error  # `commit` says what is wrong
                    return Draft(Known())  # good for the gauges
                self._known, self._loaded_at = known, None
                if totals:
                    self._revision, self.totals = revision, totals
            self._draft, self._unreadable = Draft(self._known, self._missing), None
            return self._draft

    def commit(
        self,
        draft: Draft | None,
        models: Iterable[str],
        policy: Policy,
        now: int,
        date: int | None = None,
        still: Callable[[], bool] = lambda: True,
    ) -> None:
        """Commit one complete listing in one transaction: tasks, totals, departures, retention, what is shown.

        `models` are the listed models, first come first; `now` is the end of the listing by this machine's clock,
        `date` what the API's clock said, None when it said nothing. Without a draft (the listing failed) the totals
        are brought up to date and shown all the same. Raises LedgerError, also when it is not `still` wanted; then
        nothing changed, and the next listing brings it all again.
        """
        with self._lock:
            if draft and draft is not self._draft:
                raise self._unreadable or LedgerSupersededError("another listing of the workspace began meanwhile")
            if date is not None:
                self._offset = now - date if abs(now - date) > _RIGHT else 0
            clock = now - self._offset
            at = clock if date is None else date
            answered = self._first_answers(clock)
            if draft:
                draft.complete()

            def record(tx: Connection) -> "tuple[int, Totals, array[int], bool]":
                row = self._locked(tx)
                _ask(still)
                others = row.revision != self._revision
                recording = Recording(tx, row, self._view(tx, row), policy, at, clock)
                states = self._record(recording, draft, models, others=others) if draft else array("q")
                recording.show(answered)
                revision, totals = recording.finish()
                _ask(still)
                return revision, totals, states, others

            self._records = False
            try:
                self._revision, self.totals, states, others = self._ledger.transact(record)
            except LedgerUncertainError:
                self._known, self._revision = None, _UNKNOWN  # the next listing reads what the ledger holds
                raise
            # Only what a transaction has committed may be exposed or believed.
            self._records, self._committed_at = True, clock
            self._others |= others
            self._forget_answers(self.totals)
            if draft:
                self._listed_at = at
                draft.committed(states)
                self._load_now_and_then(clock)

    def _record(self, recording: Recording, draft: Draft, models: Iterable[str], *, others: bool) -> "array[int]":
        """Record a listing; return the new states of its changes."""
        states = array("q")
        recording.join(models)
        for chunk in draft.changes():
            states.extend(recording.merge(chunk))
        if others and self._listed_at is not None:
            recording.relist(draft.lists, self._listed_at - HOUR)
        recording.leave(draft.departed)
        recording.settle(draft.answers, draft.unanswered)
        recording.prune(draft.lists)
        return states

    def _load_now_and_then(self, clock: int) -> None:
        """Read anew what the ledger holds, an hour after other replicas wrote: one may have gone for good.

        What it alone had listed would never leave the list.
        """
        self._loaded_at = clock if self._loaded_at is None else self._loaded_at
        if self._others and not 0 <= clock - self._loaded_at < HOUR:
            self._known, self._others = None, False

    def _forget_answers(self, totals: Totals) -> None:
        """Forget the first answers that the ledger knows from now on."""
        for key in list(self._answered):
            if key not in totals.series or totals.series[key].answered_at is not None:
                del self._answered[key]

    def read(self) -> None:
        """Bring `totals` up to date without writing anything. Raises LedgerError."""

        def view(tx: Connection) -> Totals | None:
            row = self._row(tx)
            return self._view(tx, row) if row else None

        with self._lock:
            self.totals = self._ledger.transact(view)

    def due(self, policy: Policy, now: int) -> bool:
        """Return whether a commit would show a series, listing or not."""
        series, clock = self.totals.series if self.totals else {}, now - self._offset
        return any(total.shown for _, total in steps(series, self._first_answers(clock), policy, clock))

    def answered(self, totals: Totals, now: int) -> None:
        """Take note that an answer at `now` carried the series of `totals`; a later transaction writes it."""
        if totals is not self._answered_totals:
            self._answered_totals = totals
            for key, total in totals.series.items():
                if total.answered_at is None:
                    self._answered.setdefault(key, now)

    def _first_answers(self, clock: int) -> dict[Key, int]:
        """Return when series were first answered, set right: after the commit that brought them, and not later."""
        return {
            key: min(max(first - self._offset, self._committed_at), clock)
            for key, first in list(self._answered.items())
        }

    def _missing(self, draft: Draft, limit: int, now: int, date: int | None) -> list[str]:
        """Return the ids to ask for, longest missing first; none while the ledger does not record.

        A full disk can be read: without a note of them the same tasks would be asked for in each listing.
        """
        left = draft.left(unfinished=True)
        if not self._records or not (left or (self.totals and self.totals.unsettled)):
            return []
        at = now - self._offset if date is None else date
        ours, ask_at = db.tasks.c.workspace == self._name, db.tasks.c.ask_at
        # A question further away than any interval was put off by a clock that was wrong.
        due = sa.select(db.tasks.c.id).where(ours, (ask_at <= at) | (ask_at > at + LONGEST_INTERVAL))
        unfinished = db.tasks.c.finished.is_(None) & db.tasks.c.unlisted_since.is_(None)

        def find(tx: Connection) -> list[str]:
            ordered = due.order_by(db.tasks.c.unlisted_since, db.tasks.c.id).execution_options(yield_per=CHUNK)
            with tx.scalars(ordered) as former:
                found = list(islice(filterfalse(draft.lists, former), limit))
            # Another replica may have missed and asked for them before.
            newly = sa.select(db.tasks.c.id).where(ours, unfinished, db.tasks.c.id.in_(left[:CHUNK]))
            return (found + sorted(tx.scalars(newly)))[:limit]

        try:
            return self._ledger.transact(find)
        except LedgerError:
            return []  # `commit` says what is wrong

    def _row(self, tx: Connection) -> Row[Any] | None:
        return tx.execute(sa.select(db.workspaces).where(db.workspaces.c.name == self._name)).first()

    def _load(self, tx: Connection) -> tuple[Known, int, Totals | None]:
        known, row = Known(), self._row(tx)
        listed = sa.select(db.tasks.c.id, db.tasks.c.credits, db.tasks.c.finished).where(
            db.tasks.c.workspace == self._name, db.tasks.c.unlisted_since.is_(None)
        )
        for rows in tx.execute(listed.execution_options(yield_per=CHUNK)).partitions():
            self._ledger.progress()
            for task_id, credits_, finished in rows:
                known.set(task_id, credits_ << 1 | (finished is not None))
        return known, row.revision if row else 0, self._view(tx, row) if row else None

    def _locked(self, tx: Connection) -> Row[Any]:
        """Return the workspace's row, locked until the end of the transaction; create it when there is none."""
        insert = "INSERT INTO workspaces (name, revision, tasks) VALUES (:name, 0, 0) ON CONFLICT DO NOTHING"
        tx.execute(sa.text(insert), {"name": self._name})
        row = tx.execute(sa.select(db.workspaces).where(db.workspaces.c.name == self._name).with_for_update()).one()
        if row.revision < self._revision:
            raise LedgerUncertainError(
                "the ledger is older than it was: it was replaced; the next listing is merged anew"
            )
        return row

    def _view(self, tx: Connection, row: Row[Any]) -> Totals:
        if self.totals is not None and row.revision == self._revision:
            return self.totals
        columns = [column for column in db.totals.c if column.name != "workspace"]
        rows = tx.execute(sa.select(*columns).where(db.totals.c.workspace == self._name))
        series = {Key(*row[:3]): Total(*row[3:]) for row in rows}
        unsettled = sa.select(sa.func.count()).where(db.tasks.c.workspace == self._name, db.tasks.c.ask_at.is_not(None))
        return Totals(series, row.baseline_at, row.tasks, tx.scalars(unsettled).one())


def _ask(still: Callable[[], bool]) -> None:
    if not still():
        raise LedgerSupersededError("the listing was superseded while it waited for the ledger")
