"""One listing on its way into the ledger, inside one transaction that holds the workspace's row.

The life of a new series, from its row in `totals`:

    joins (`late` unless it is of the baseline)
      |
    held: every answer shows 0 ---- the first answer that carries it: `answered_at`
      |
    answered: still 0 ---- `zero_hold` later if it is late, at the next commit if not: `shown`
      |
    shown: every answer shows `value`, for good

Times are microseconds since the epoch of two clocks: what concerns tasks goes by the API's, `at`; what concerns
answers by this machine's, `clock`.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from creatify_exporter import schema as db
from creatify_exporter.draft import Change, chunks
from creatify_exporter.listing import ModelLabels
from creatify_exporter.schema import BOUNDS, bucket_label
from creatify_exporter.tasks import FINISHED, HOUR, SECOND

FIRST_INTERVAL = 30 * SECOND
LONGEST_INTERVAL = HOUR
"""Between two questions for one task: it doubles while the task is missing."""

_LARGEST = 2**63 - 1  # what a total may be; a sum beyond it would make every later commit fail
_NEW_TASK = [column.name for column in db.tasks.c if column.name not in ("unlisted_since", "ask_at")]
_INSERT_TASK, _VALUES = str(sa.insert(db.tasks).compile(column_keys=_NEW_TASK)).split(" VALUES ")


class Key(NamedTuple):
    """One counter series of a workspace: `metric` is one of submitted, finished, failures, credits, duration, bucket.

    `label` is the status, the reason, or for a histogram bucket what `bucket_label` says.
    """

    model: str
    metric: str
    label: str


@dataclass(frozen=True, slots=True)
class Total:
    """What was counted for one series, and whether it may be shown yet; `late` if it joined after the baseline."""

    value: int
    late: bool
    answered_at: int | None
    shown: bool
    exemplar: str | None


@dataclass(frozen=True, slots=True)
class Policy:
    """How to count: the closed set of reasons and settings of the configuration, durations in seconds."""

    reasons: Sequence[str]
    max_models: int
    count_existing: bool
    retention: float
    zero_hold: float


class Step(NamedTuple):
    """How far a series gets in its life: when it was first answered, and whether it may show its value."""

    key: Key
    answered_at: int
    shown: bool


def steps(series: Mapping[Key, Total], answered: Mapping[Key, int], policy: Policy, clock: int) -> Iterator[Step]:
    """Return the series that get further at `clock`; `answered` are first answers that are not written down yet.

    A first answer in the future was noted by a clock that was wrong: the hold begins anew.
    """
    for key, total in series.items():
        first = answered.get(key) if total.answered_at is None else total.answered_at
        if total.shown or first is None:
            continue
        first = min(first, clock)
        shown = first + (policy.zero_hold * SECOND if total.late else 0) <= clock
        if shown or first != total.answered_at:
            yield Step(key, first, shown)


def next_question(unlisted_since: int, at: int) -> int:
    """Return when to ask again at the earliest for a task that was asked for at `at`.

    A task that left the list in the future left it by a clock that was wrong: it waits as long as one of the past.
    """
    return at + min(abs(at - unlisted_since) + FIRST_INTERVAL, LONGEST_INTERVAL)


class Recording:
    """Record one listing; `at` is the time by the API's clock, `clock` by this machine's."""

    def __init__(
        self, tx: Connection, row: Row[Any], series: Mapping[Key, Total], policy: Policy, at: int, clock: int
    ) -> None:
        self._tx = tx
        self._row = row
        self._series = series
        self._policy = policy
        self._at = at
        self._clock = clock
        self._baseline = row.baseline_at is None
        self._floor = at - HOUR if self._baseline else row.floor
        self._tasks = row.tasks
        self._labels = ModelLabels({key.model for key in series}, policy.max_models)
        self._added: Counter[Key] = Counter()
        self._newest: dict[Key, tuple[int, str]] = {}
        self._started = row.baseline_at
        self._touched = False
        self._ours = db.tasks.c.workspace == row.name

    def join(self, models: Iterable[str]) -> None:
        """Add the series of models and reasons that are not known yet, at 0; the first time counting begins."""
        if self._baseline:
            self._started, self._touched = self._at, True
        for model in models:
            self._labels(model)
        shown = self._baseline and self._policy.count_existing
        self._write(
            sa.insert(db.totals).values(workspace=self._row.name, value=0, late=not self._baseline, shown=shown),
            [
                {"model": key.model, "metric": key.metric, "label": key.label}
                for key in _expected(self._labels.known, self._policy.reasons)
                if key not in self._series
            ],
        )

    def merge(self, chunk: Sequence[Change]) -> Iterator[int]:
        """Merge listed tasks with what the ledger holds of them; yield the new state of each."""
        found = {} if self._baseline else self._rows([change.id for change in chunk])
        inserted, updated = [], []
        for change in chunk:
            old = found.get(change.id)
            if old is None:
                model, credits_, finished = self._appear(change)
                inserted.append((self._row.name, change.id, model, finished, credits_, change.created, self._at))
            else:
                credits_, finished = self._advance(old, change)
                if (credits_, finished, None) != (old.credits, old.finished, old.unlisted_since):
                    updated.append({"key": change.id, "credits": credits_, "finished": finished})
            yield credits_ << 1 | (finished is not None)
        self._insert(inserted)
        self._write(self._task().values(unlisted_since=None, ask_at=None), updated)

    def _rows(self, ids: Sequence[str]) -> dict[str, Row[Any]]:
        query = sa.select(db.tasks).where(self._ours, db.tasks.c.id.in_(ids))
        return {row.id: row for row in self._tx.execute(query)}

    def _appear(self, change: Change) -> tuple[str, int, str | None]:
        """Count an unknown task if it is neither of the baseline nor from before the floor; return how it is kept."""
        model = self._labels(change.model)
        if self._baseline:
            counts = self._policy.count_existing
        else:
            # A floor in the future was set by a clock that was wrong.
            counts = change.created is None or change.created >= min(self._floor, self._at)
        if counts:
            self._added[Key(model, "submitted", "")] += 1
            self._added[Key(model, "credits", "")] += change.credits
            self._finish(model, change)
        return model, change.credits, change.finished

    def _advance(self, old: Row[Any], change: Change) -> tuple[int, str | None]:
        """Count what happened to a known task; return its credits and its end."""
        credits_ = max(old.credits, change.credits)
        self._added[Key(old.model, "credits", "")] += credits_ - old.credits
        if old.finished is None:
            self._finish(old.model, change)
        return credits_, old.finished or change.finished

    def _finish(self, model: str, change: Change) -> None:
        if change.finished is None:
            return
        self._added[Key(model, "finished", change.status)] += 1
        if change.reason is not None:
            key = Key(model, "failures", change.reason)
            self._added[key] += 1
            rank = min(max(change.created or 0, 0), self._at), change.id
            self._newest[key] = max(self._newest.get(key, (0, "")), rank)
        if change.duration is not None:
            bound = BOUNDS[bisect_left(BOUNDS, change.duration / SECOND)]
            self._added[Key(model, "bucket", bucket_label(change.status, bound))] += 1
            self._added[Key(model, "duration", change.status)] += change.duration

    def _insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            # All rows in one statement take a third of the time of one after the other with parameters by name.
            values = re.sub(r":\w+", "?" if self._tx.dialect.name == "sqlite" else "%s", _VALUES)
            places = ", ".join([values] * len(rows))
            self._tx.exec_driver_sql(f"{_INSERT_TASK} VALUES {places}", tuple(chain.from_iterable(rows)))
            self._tasks += len(rows)
            self._touched = True

    def leave(self, ids: Sequence[str]) -> None:
        """Write down since when tasks are no longer listed; the unfinished ones may be asked for at once."""
        for chunk in chunks(ids):
            self._tx.execute(
                sa.update(db.tasks)
                .where(self._ours, db.tasks.c.id.in_(chunk), db.tasks.c.unlisted_since.is_(None))
                .values(unlisted_since=self._at, ask_at=sa.case((db.tasks.c.finished.is_(None), self._at)))
            )
        self._touched |= bool(ids)

    def settle(self, answers: Mapping[str, Change | None], unanswered: Sequence[str]) -> None:
        """Merge what was read of tasks by id (None: the API has no such task); ask again for those not at their end."""
        updated = []
        for task_id, row in self._rows([*answers, *unanswered]).items():
            credits_, finished, change = row.credits, row.finished, answers.get(task_id)
            if change is not None:
                credits_, finished = self._advance(row, change)
            over = finished or row.unlisted_since is None or (task_id in answers and change is None)
            ask_at = None if over else next_question(row.unlisted_since, self._at)
            updated.append({"key": task_id, "credits": credits_, "finished": finished, "ask_at": ask_at})
        self._write(self._task().values(ask_at=sa.bindparam("ask_at")), updated)

    def relist(self, listed: Callable[[str], bool], since: int) -> None:
        """Take back that tasks left the list since then: another replica wrote so, and this listing has them."""
        query = sa.select(db.tasks.c.id).where(self._ours, db.tasks.c.unlisted_since >= since)
        self._take_back([task_id for task_id in self._tx.scalars(query) if listed(task_id)])

    def _take_back(self, ids: Sequence[str]) -> None:
        for chunk in chunks(ids):
            self._tx.execute(
                sa.update(db.tasks).where(self._ours, db.tasks.c.id.in_(chunk)).values(unlisted_since=None, ask_at=None)
            )
        self._touched |= bool(ids)

    def prune(self, listed: Callable[[str], bool]) -> None:
        """Drop the tasks that were not listed for the retention time, and raise the floor so that none counts again."""
        old = db.tasks.c.unlisted_since <= self._at - int(self._policy.retention * SECOND)
        rows = self._tx.execute(sa.select(db.tasks).where(self._ours, old)).all()
        # Another replica may have missed in its last listing what this one lists all the time.
        self._take_back([row.id for row in rows if listed(row.id)])
        dropped = [row for row in rows if not listed(row.id)]
        for chunk in chunks([row.id for row in dropped]):
            self._tx.execute(sa.delete(db.tasks).where(self._ours, old, db.tasks.c.id.in_(chunk)))
        for row in dropped:
            # A created_at that was in the future while the task was listed says nothing.
            plausible = row.created is not None and row.created < row.unlisted_since
            self._floor = max(self._floor, (row.created if plausible else row.first_seen) + 1)
        self._tasks -= len(dropped)
        self._touched |= bool(dropped)

    def show(self, answered: Mapping[Key, int]) -> None:
        """Write down which series were in an answer, and which may show their value from now on."""
        self._write(
            self._total(answered_at=sa.bindparam("first"), shown=sa.bindparam("show")),
            [
                {"m": step.key.model, "n": step.key.metric, "l": step.key.label, "first": first, "show": step.shown}
                for step in steps(self._series, answered, self._policy, self._clock)
                for first in [step.answered_at]
            ],
        )

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

    def _keep_newer_exemplars(self) -> None:
        """Leave the exemplars that are newer than what was listed late."""
        former = {key: self._series[key].exemplar for key in self._newest if key in self._series}
        if not former:
            return
        rows = self._rows([one for one in former.values() if one])
        for key, one in former.items():
            row = rows.get(one or "")
            if row and (min(row.created or 0, row.first_seen), one) > self._newest[key]:
                del self._newest[key]

    def _task(self) -> sa.Update:
        """Return an UPDATE of one task, whose credits and end are always written."""
        return sa.update(db.tasks).where(self._ours, db.tasks.c.id == sa.bindparam("key"))

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
            for bound in BOUNDS:
                yield Key(model, "bucket", bucket_label(status, bound))
