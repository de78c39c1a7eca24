"""What one complete pass over the tasks of a workspace adds up to."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from creatify_exporter.tasks import OTHER, STATUSES, UNFINISHED, Task


@dataclass(slots=True)
class Cell:
    """The tasks of one model and status: how many, their credits in billionths, the oldest `created_at`."""

    tasks: int = 0
    credits: int = 0
    oldest: int | None = None

    def merge(self, other: "Cell") -> None:
        """Add the tasks of `other`."""
        self.tasks += other.tasks
        self.credits += other.credits
        if other.oldest is not None and (self.oldest is None or other.oldest < self.oldest):
            self.oldest = other.oldest


@dataclass(slots=True)
class Listing:
    """The sums over the tasks of one listing, by model.

    Keys are (model, status) and (model, reason). `size` is in decoded bytes, `malformed` counts the records that
    could not be used. Only the sums are kept, never the tasks.
    """

    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    failed: dict[tuple[str, str], int] = field(default_factory=dict)
    malformed: int = 0
    size: int = 0

    def add(self, tasks: Iterable[Task]) -> None:
        """Add tasks."""
        cells, failed = self.cells, self.failed
        for task in tasks:
            key = task.model, task.status
            cell = cells.get(key)
            if cell is None:
                cell = cells[key] = Cell()
            cell.tasks += 1
            cell.credits += task.credits
            if task.reason is not None:
                failed[task.model, task.reason] = failed.get((task.model, task.reason), 0) + 1
            elif task.status in UNFINISHED:
                created = task.created()
                if created is not None and (cell.oldest is None or created < cell.oldest):
                    cell.oldest = created

    @property
    def models(self) -> list[str]:
        """The models listed, first come first."""
        return list(dict.fromkeys(model for model, _ in self.cells))

    def labelled(self, labels: "ModelLabels") -> "Listing":
        """Return the same listing by label: models without a label merged, every known model with every status."""
        given = {model: labels(model) for model in self.models}
        result = Listing(malformed=self.malformed, size=self.size)
        result.cells = {(label, status): Cell() for label in labels.known for status in STATUSES}
        for (model, status), cell in self.cells.items():
            result.cells.setdefault((given[model], status), Cell()).merge(cell)
        for (model, reason), count in self.failed.items():
            key = given[model], reason
            result.failed[key] = result.failed.get(key, 0) + count
        return result


class ModelLabels:
    """Give each model its label: its name while there is room, `other` beyond; first come, first served.

    A label once given stays: the ledger keeps the known ones. `other` itself takes no room.
    """

    def __init__(self, known: Iterable[str], limit: int) -> None:
        self.known = dict.fromkeys(known)
        self._room = limit - len(self.known.keys() - {OTHER})

    def __call__(self, model: str) -> str:
        """Return the label of `model`, which is known from now on."""
        if model not in self.known:
            if model != OTHER:
                if self._room <= 0:
                    return self(OTHER)
                self._room -= 1
            self.known[model] = None
        return model
