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

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


class Key(NamedTuple):
    """One counter series of a workspace: `metric` is one of submitted, finished, failures, credits, duration, bucket.

    `label` is the status, the reason, or for a histogram bucket what `bucket_label` says.
    """

    model: str
    metric: str
    label: str


class Total(NamedTuple):
    """What was counted for one series, and whether it may be shown yet; `late` if it joined after the baseline."""

    value: int
    late: bool
    answered_at: int | None = None
    shown: bool = False
    exemplar: str | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """The committed counters of one workspace. `started` is None before the baseline.

    `unsettled` tasks left the list before their end, and are asked for by id.
    """

    series: Mapping[Key, Total]
    started: int | None
    tasks: int
    unsettled: int = 0

    @property
    def models(self) -> list[str]:
        """The known models, first come first."""
        return list(dict.fromkeys(key.model for key in self.series))


class Entry(NamedTuple):
    """What the ledger holds of one task: a row of `tasks`."""

    workspace: str
    id: str
    model: str
    finished: str | None
    credits: int
    created: int | None
    first_seen: int
    unlisted_since: int | None
    ask_at: int | None


@dataclass(frozen=True, slots=True)
class Policy:
    """How to count: the closed set of reasons and settings of the configuration, durations in seconds."""

    reasons: Sequence[str]
    max_models: int
    count_existing: bool
    retention: float
    zero_hold: float


def steps(
    series: Mapping[Key, Total], answered: Mapping[Key, int], policy: Policy, clock: int
) -> Iterator[tuple[Key, Total]]:
    """Return the series that get further in their life at `clock`, and how far.

    `answered` are first answers that are not written down yet. A first answer in the future was noted by a clock that
    was wrong: the hold begins anew.
    """
    for key, total in series.items():
        first = answered.get(key) if total.answered_at is None else total.answered_at
        if total.shown or first is None:
            continue
        first = min(first, clock)
        shown = first + (policy.zero_hold * SECOND if total.late else 0) <= clock
        if shown or first != total.answered_at:
            yield key, total._replace(answered_at=first, shown=shown)


def next_question(unlisted_since: int, at: int) -> int:
    """Return when to ask again at the earliest for a task that was asked for at `at`.

    A task that left the list in the future left it by a clock that was wrong: it waits as long as one of the past.
    """
    return at + min(abs(at - unlisted_since) + FIRST_INTERVAL, LONGEST_INTERVAL)


class Recording:
    """Record one listing; `at` is the time by the API's clock, `clock` by this machine's.

    `totals` are those that the ledger holds, and `row` is the workspace's, which the transaction has locked.
    """

    def __init__(self, tx: Connection, row: Row[Any], totals: Totals, policy: Policy, at: int, clock: int) -> None:
        self._tx = tx
        self._row = row
        self._name = row.name
        self._totals = totals
        self._policy = policy
        self._at = at
        self._clock = clock
        self._baseline = row.baseline_at is None
        self._floor = at - HOUR if self._baseline else row.floor
        self._tasks = row.tasks
        self._labels = ModelLabels({key.model for key in totals.series}, policy.max_models)
        self._series = dict(totals.series)
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
        new = Total(0, late=not self._baseline, shown=self._baseline and self._policy.count_existing)
        for key in _expected(self._labels.known, self._policy.reasons):
            self._series.setdefault(key, new)

    def merge(self, chunk: Sequence[Change]) -> list[int]:
        """Merge listed tasks with what the ledger holds of them; return the new state of each."""
        found = {} if self._baseline else self._entries([change.id for change in chunk])
        states, entries = [], []
        for change in chunk:
            old = found.get(change.id)
            new = self._advance(old._replace(unlisted_since=None, ask_at=None), change) if old else self._appear(change)
            if new != old:
                entries.append(new)
            states.append(new.credits << 1 | (new.finished is not None))
        self._put(db.tasks, entries)
        self._tasks += len(chunk) - len(found)
        return states

    def _entries(self, ids: Sequence[str]) -> dict[str, Entry]:
        query = sa.select(db.tasks).where(self._ours, db.tasks.c.id.in_(ids))
        return {row.id: Entry(*row) for row in self._tx.execute(query)}

    def _appear(self, change: Change) -> Entry:
        """Count an unknown task if it is neither of the baseline nor from before the floor."""
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
        return Entry(
            self._name, change.id, model, change.finished, change.credits, change.created, self._at, None, None
        )

    def _advance(self, old: Entry, change: Change) -> Entry:
        """Count what happened to a known task."""
        credits_ = max(old.credits, change.credits)
        self._added[Key(old.model, "credits", "")] += credits_ - old.credits
        if old.finished is None:
            self._finish(old.model, change)
        return old._replace(credits=credits_, finished=old.finished or change.finished)

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

    def leave(self, ids: Sequence[str]) -> None:
        """Write down since when tasks are no longer listed; the unfinished ones may be asked for at once."""
        asked = sa.case((db.tasks.c.finished.is_(None), self._at))
        listed = db.tasks.c.unlisted_since.is_(None)
        self._change(sa.update(db.tasks).where(listed).values(unlisted_since=self._at, ask_at=asked), ids)

    def settle(self, answers: Mapping[str, Change | None], unanswered: Sequence[str]) -> None:
        """Merge what was read of tasks by id (None: the API has no such task); ask again for those not at their end."""
        entries = []
        for task_id, old in self._entries([*answers, *unanswered]).items():
            change = answers.get(task_id)
            new = self._advance(old, change) if change else old
            over = new.finished or old.unlisted_since is None or (task_id in answers and change is None)
            entries.append(new._replace(ask_at=None if over else next_question(old.unlisted_since or 0, self._at)))
        self._put(db.tasks, entries)

    def relist(self, listed: Callable[[str], bool], since: int) -> None:
        """Take back that tasks left the list since then: another replica wrote so, and this listing has them."""
        query = sa.select(db.tasks.c.id).where(self._ours, db.tasks.c.unlisted_since >= since)
        self._take_back([task_id for task_id in self._tx.scalars(query) if listed(task_id)])

    def _take_back(self, ids: Sequence[str]) -> None:
        self._change(sa.update(db.tasks).values(unlisted_since=None, ask_at=None), ids)

    def prune(self, listed: Callable[[str], bool]) -> None:
        """Drop the tasks that were not listed for the retention time, and raise the floor so that none counts again."""
        old = db.tasks.c.unlisted_since <= self._at - int(self._policy.retention * SECOND)
        rows = self._tx.execute(sa.select(db.tasks).where(self._ours, old)).all()
        # Another replica may have missed in its last listing what this one lists all the time.
        self._take_back([row.id for row in rows if listed(row.id)])
        dropped = [row for row in rows if not listed(row.id)]
        self._change(sa.delete(db.tasks), [row.id for row in dropped])
        for row in dropped:
            # A created_at that was in the future while the task was listed says nothing.
            plausible = row.created is not None and row.created < row.unlisted_since
            self._floor = max(self._floor, (row.created if plausible else row.first_seen) + 1)
        self._tasks -= len(dropped)

    def show(self, answered: Mapping[Key, int]) -> None:
        """Write down which series were in an answer, and which may show their value from now on."""
        self._series.update(steps(self._totals.series, answered, self._policy, self._clock))

    def finish(self) -> tuple[int, Totals]:
        """Write the totals and the workspace's row; return its revision and the totals, new if anything changed."""
        for key, added in self._added.items():
            total = self._series.get(key, Total(0, late=True))
            self._series[key] = total._replace(value=min(total.value + added, _LARGEST))
        self._name_newest()
        changed = [(key, total) for key, total in self._series.items() if total != self._totals.series.get(key)]
        self._put(db.totals, [(self._name, *key, *total) for key, total in changed])
        if not self._touched:
            return self._row.revision, self._totals
        revision = self._row.revision + 1
        self._put(db.workspaces, [(self._name, self._started, self._floor, revision, self._tasks)])
        unsettled = sa.select(sa.func.count()).where(self._ours, db.tasks.c.ask_at.is_not(None))
        series = dict(sorted(self._series.items()))  # as the ledger keeps them
        return revision, Totals(series, self._started, self._tasks, self._tx.scalars(unsettled).one())

    def _name_newest(self) -> None:
        """Name the newest failed tasks, unless what was listed late is older than those named before."""
        named = [self._series[key].exemplar for key in self._newest]
        entries = self._entries([one for one in named if one]) if any(named) else {}
        for key, newest in self._newest.items():
            former = entries.get(self._series[key].exemplar or "")
            ranks = [newest, (min(former.created or 0, former.first_seen), former.id)] if former else [newest]
            self._series[key] = self._series[key]._replace(exemplar=max(ranks)[1])

    def _put(self, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
        for chunk in chunks(rows):
            db.put(self._tx, table, chunk)
            self._touched = True

    def _change(self, statement: sa.Update | sa.Delete, ids: Sequence[str]) -> None:
        for chunk in chunks(ids):
            self._tx.execute(statement.where(self._ours, db.tasks.c.id.in_(chunk)))
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
