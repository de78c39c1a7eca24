"""A simulated API that notes what it showed of each task, and holds the exporter to what it may ask by id."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message

from creatify_exporter.demo import LIST_PATH, Life
from creatify_exporter.reasons import Classifier
from tests.support.simulation import SimulatedApi, Simulation
from tests.support.stage import Counts, Stage

ById = tuple[int, Mapping[str, str], bytes]
"""Status, headers and body of an answer for one task."""


@dataclass
class Witness(SimulatedApi):
    """Serve one workspace; `by_id`, when set, may answer for a task instead of the simulation.

    What an answer showed is believed by `believe`, once the exporter must have recorded it. What the exporter did
    against the contract is in `offences`.
    """

    by_id: Callable[[str], ById | None] | None = None
    before_an_answer: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.offset = 0.0
        self.steps = 0
        (self._simulation,) = self.workspaces.values()
        assert isinstance(self._simulation, Simulation)
        self._guard, self._classify = threading.Lock(), Classifier()
        self.lives: dict[str, Life] = {}
        self.listed: set[str] = set()
        self.seen: dict[str, int] = {}
        """The newest time at which the exporter saw a task, in microseconds."""
        self.gone: set[str] = set()
        self.baseline: dict[str, int] = {}
        self._seen_lately: dict[str, int] = {}
        self._gone_lately: set[str] = set()
        self.listings, self.asked = 0, list[str]()
        self.asked_at: dict[str, set[int]] = {}
        """The dates of the questions for a task, in seconds, those of one date only once."""
        self.left_as: Counter[str] = Counter()
        """In which state tasks were when they were last listed, by those that were asked for."""
        self.offences: list[str] = []

    def step(self, offset: float) -> None:
        """Step the clock that the API tells, so that it is wrong by so many seconds."""
        self.steps += offset != self.offset
        self.offset = offset

    def answer(self, path: str, headers: Message) -> tuple[int, dict[str, str], Iterator[bytes]]:
        task_id = path.removeprefix(LIST_PATH).removesuffix("/")
        if task_id:
            with self._guard:
                self._note_question(task_id)
            if self.before_an_answer:
                self.before_an_answer()
            if fault := self.by_id and self.by_id(task_id):
                status, more, body = fault
                if status == 404:
                    self._gone_lately.add(task_id)
                return status, self.date() | dict(more), iter([body])
        status, more, chunks = super().answer(path, headers)
        with self._guard:
            reached, listed = self._simulation.listed(self.clock())
            if not task_id:
                self.listings += 1
                self.listed = {life.id for life in listed}
                self.lives |= {life.id: life for life in listed}
                self._seen_lately |= dict.fromkeys(self.listed, reached)
            elif status == 200:
                self._seen_lately[task_id] = reached
            else:
                self._gone_lately.add(task_id)
        return status, more, chunks

    def _note_question(self, task_id: str) -> None:
        self.asked.append(task_id)
        seen = self.seen.get(task_id)
        if seen is None:
            self.offences.append(f"{task_id} was asked for and never listed")
            return
        if task_id in self.listed:
            self.offences.append(f"{task_id} was asked for and is listed")
        if task_id in self.gone:
            self.offences.append(f"{task_id} was asked for after a 404")
        if self.lives[task_id].finished <= seen:
            self.offences.append(f"{task_id} was asked for after its end")
        if task_id not in self.asked_at:
            life = self.lives[task_id]
            charged = ", charged" if life.charged <= seen else ""
            self.left_as[life.status(seen) + charged] += 1
        self.asked_at.setdefault(task_id, set()).add(int(self.clock()))

    def believe(self) -> None:
        """Take what was shown for recorded: every exporter has listed since, and has committed it."""
        with self._guard:
            self.seen |= self._seen_lately
            self.gone |= self._gone_lately
            self._seen_lately.clear()
            self._gone_lately.clear()

    def count_from_here(self) -> None:
        """Take what was shown so far for the baseline."""
        self.believe()
        self.baseline = dict(self.seen)

    def begin(self) -> None:
        """Count listings and questions anew."""
        with self._guard:
            self.listings, self.asked = 0, []

    def most_questions(self, task_id: str) -> float:
        """Return how often a task may have been asked for: after 30 s, twice that, and so on up to an hour.

        Once more where the API's clock was stepped: what time it is then is for the API to say.
        """
        times = self.asked_at[task_id]
        elapsed = max(times) - min(times) + 1
        return 2 + math.log2(elapsed / 30 + 1) + elapsed / 3600 + self.steps

    def expected(self) -> Counts:
        """Return the counters that are not 0, from what was shown and the lives of the tasks alone."""
        sums = Counter[tuple[str, ...]]()
        for task_id, seen in self.seen.items():
            life, before = self.lives[task_id], self.baseline.get(task_id, -1)
            model, end = life.model, life.outcome
            sums["tasks_submitted_total", model] += before < 0
            if before < life.charged <= seen:
                sums["credits_used_total", model] += life.hundredths
            if before < life.finished <= seen:
                sums["tasks_finished_total", model, end] += 1
                sums["task_duration_seconds_count", model, end] += 1
                sums["task_duration_seconds_sum", model, end] += life.finished - life.created
                if end == "failed":
                    sums["failures_total", model, self._classify(life.failure_text)] += 1
        units = {"credits_used_total": 100, "task_duration_seconds_sum": 1e6}
        return {key: value / units.get(key[0], 1) for key, value in sums.items() if value}


class WatchedStage(Stage):
    """A stage whose API is a witness."""

    api_type = Witness
    api: Witness
