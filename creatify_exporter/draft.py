"""What one listing would change in the ledger, in few bytes a task."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from creatify_exporter.tasks import FINISHED, Task

T = TypeVar("T")

CHUNK = 1000
_ABSENT = -(2**63)
_COLUMNS = 4


class Known:
    """What this process knows the ledger to hold of the listed tasks, in about 170 bytes a task.

    A task's state is `credits << 1 | finished`.
    """

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.states = array("q")
        self._free: list[int] = []

    def set(self, task_id: str, state: int) -> None:
        """Take note that the ledger holds a task in this state."""
        slot = self.slots.get(task_id)
        if slot is None:
            slot = self._free.pop() if self._free else len(self.states)
            self.slots[task_id] = slot
        if slot == len(self.states):
            self.states.append(state)
        else:
            self.states[slot] = state

    def forget(self, task_id: str) -> None:
        """Forget a task that is no longer listed."""
        self._free.append(self.slots.pop(task_id))

    def replace(self, slots: dict[str, int], states: "array[int]") -> None:
        """Take these columns for everything that is known."""
        self.slots, self.states = slots, states
        self._free.clear()


class Change(msgspec.Struct, gc=False):
    """What the ledger has to hear about one task; an absent time is None."""

    id: str
    model: str
    status: str
    reason: str | None
    credits: int
    created: int | None
    duration: int | None

    @property
    def finished(self) -> str | None:
        """The status if it is an end, done or failed."""
        return self.status if self.status in FINISHED else None


class Draft:
    """What one listing would change in the ledger; nothing is written before `Book.commit`.

    `ask` finds the tasks to ask for by id, given the draft, the most it may return, and the times of `missing`.
    """

    def __init__(self, known: Known, ask: "Callable[[Draft, int, int, int | None], list[str]] | None" = None) -> None:
        self.known = known
        self.answers: dict[str, Change | None] = {}
        """What the API said of tasks asked for by id; None: it has no such task."""
        self.unanswered: list[str] = []
        """The tasks asked for in vain."""
        self._ask = ask
        self._seen = bytearray(len(known.states))
        # The tasks that are news, as rows of numbers: as whole objects a million would take three times the memory.
        self._news: dict[str, int] = {}
        self._numbers = array("q")
        self._words: dict[tuple[str, str, str | None], int] = {}
        self._order: list[str] = []
        self.departed: list[str] = []
        """The ids that were listed before and are not now, once the draft is complete."""

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
            created, duration = (_ABSENT if time is None else time for time in task.times())
            word = self._words.setdefault((task.model, task.status, task.reason), len(self._words))
            news[task.id] = len(news)
            self._numbers.extend((task.credits, created, duration, word))
        return fresh

    def complete(self) -> None:
        """Do before the transaction, in which somebody waits for each answer, what takes long with a million tasks."""
        self._order, self.departed = sorted(self._news), self.left()

    def changes(self) -> Iterator[list[Change]]:
        """Return the tasks whose state is news, in chunks, by id: so a B-tree takes them in half the time."""
        words = list(self._words)
        return ([self._change(task_id, words) for task_id in ids] for ids in chunks(self._order))

    def _change(self, task_id: str, words: Sequence[tuple[str, str, str | None]]) -> Change:
        start = _COLUMNS * self._news[task_id]
        credits_, created, duration, word = self._numbers[start : start + _COLUMNS]
        times = (None if time == _ABSENT else time for time in (created, duration))
        return Change(task_id, *words[word], credits_, *times)

    def missing(self, limit: int, now: int, date: int | None = None) -> list[str]:
        """Return up to `limit` ids to ask for now that the listing is read, longest missing first.

        They are known, unfinished and not in this listing, and were not asked for a while ago. `now` and `date` are as
        in `Book.commit`. Never raises LedgerError: while the ledger does not answer there is nothing to ask for.
        """
        return self._ask(self, limit, now, date) if self._ask and limit > 0 else []

    def settle(self, task: Task) -> None:
        """Take in a task that was read by its id; unless it is at its end, it is asked for again later."""
        self.answers[task.id] = Change(task.id, task.model, task.status, task.reason, task.credits, *task.times())

    def gone(self, task_id: str) -> None:
        """Take note that the API has no such task: it is not asked for again."""
        self.answers[task_id] = None

    def postpone(self, task_id: str) -> None:
        """Take note that a task could not be read by its id: it is asked for again later, at growing intervals."""
        self.unanswered.append(task_id)

    def left(self, *, unfinished: bool = False) -> list[str]:
        """Return the ids that were listed before and are not now, all or only those of unfinished tasks."""
        if self._seen.count(1) == len(self.known.slots):
            return []
        states, seen = self.known.states, self._seen
        return [
            task_id
            for task_id, slot in self.known.slots.items()
            if not seen[slot] and not (unfinished and states[slot] & 1)
        ]

    def committed(self, states: "array[int]") -> None:
        """Remember what the ledger holds from now on; `states` are those of the changes, in their order."""
        for task_id in self.departed:
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


def chunks(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """Return ids or rows in pieces that one statement can take."""
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
