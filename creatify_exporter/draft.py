"""What one listing would change in the ledger, in few bytes a task."""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from creatify_exporter.tasks import FINISHED, Task

CHUNK = 1000


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


class Draft:
    """What one listing would change in the ledger; nothing is written before `Book.commit`."""

    _ABSENT = -(2**63)

    def __init__(self, known: Known) -> None:
        self.known = known
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

    def changes(self) -> Iterator[list[Change]]:
        """Return the tasks whose state is news, in chunks, by id: so a B-tree takes them in half the time."""
        words, self._order = list(self._words), sorted(self._news)
        for ids in chunks(self._order):
            chunk = []
            for task_id in ids:
                row = self._news[task_id]
                created, duration = self._created[row], self._duration[row]
                chunk.append(
                    Change(
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


def chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Return the ids in pieces that one statement can take."""
    return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))
