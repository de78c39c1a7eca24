"""The demo's API for tests: with an account of what really happened, spikes on demand, and faults."""

import base64
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from email.message import Message
from email.utils import formatdate
from functools import cache
from random import Random
from socket import SHUT_RDWR, socket
from typing import Any, ClassVar

from creatify_exporter import demo
from creatify_exporter.demo import Life, Spike


@dataclass(frozen=True)
class Truth:
    """Say what really happened since the first task: the simulation's own account, listed or not."""

    submitted: Counter[str] = field(default_factory=Counter)
    finished: Counter[tuple[str, str]] = field(default_factory=Counter)  # (model, status)
    failures: Counter[tuple[str, str | None]] = field(default_factory=Counter)  # (model, failure text)
    hundredths: Counter[str] = field(default_factory=Counter)  # credits by model
    microseconds: Counter[tuple[str, str]] = field(default_factory=Counter)  # durations of finished, summed
    listed: Counter[tuple[str, str]] = field(default_factory=Counter)  # in the listing now: (model, status)

    @property
    def credits(self) -> dict[str, float]:
        """Return the credits used by model."""
        return {model: hundredths / 100 for model, hundredths in self.hundredths.items()}

    def since(self, earlier: "Truth") -> "Truth":
        """Return what happened after an earlier account; `listed` stays that of now."""
        growth = {f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        return replace(self, **growth | {"listed": self.listed})


_WORDS = (
    'product launch video hook scene "call to action" voiceover upbeat warm light close-up jump cut caption '
    'offer discount café naïve 日本語 🎬 \\frame {scene:1} [beat] 100% 3-5s \n• \t},{"id":"x"} brand tone'
)


@cache
def _texts(record_size: int) -> tuple[Sequence[bytes], Sequence[bytes]]:
    """Return serialised members for prompts and answers, sizes spread exponentially around the mean."""
    random, prompts, answers = Random(record_size), [], []
    corpus = " ".join(random.choices(_WORDS.split(" "), k=20_000))
    for rank in range(128):
        length = int(max(record_size - 400, 0) * -math.log(1 - (rank + 0.5) / 128) * 0.44)
        at = random.randrange(50_000)
        prompt, system, answer = (corpus[at : at + n] for n in (length, length // 4, length * 7 // 8))
        turns = ["user", "model", "user"][: 1 if rank % 3 else 3]
        messages = [{"role": role, "content": prompt[n :: len(turns)]} for n, role in enumerate(turns)]
        config = {"temperature": 0.7, "max_output_tokens": 8192} if rank % 4 else {}
        prompts.append(demo.members(messages=messages, system_instruction=system, config=config))
        # Arguments are whatever a model made up, integers beyond 64 bits included.
        calls = [{"name": "render", "args": {"seed": 1 << rank, "scenes": [{"id": rank}]}}][: rank % 16 == 0]
        answers.append(demo.members(response_text=answer, response_function_calls=calls))
    return prompts, answers


@cache
def _media() -> Sequence[bytes]:
    """Return serialised members for prompts with base64 parts, 131 kB on average."""
    prompts = []
    for size, mime in (24, "image/png"), (72, "image/jpeg"), (192, "video/mp4"):
        data = base64.b64encode(Random(size).randbytes(size << 10)).decode()
        parts = [{"type": "text", "text": "What is it?"}, {"type": mime[:5], "data": data, "mime_type": mime}]
        prompts.append(demo.members(messages=[{"role": "user", "content": parts}], config={}))
    return prompts


@dataclass
class Simulation(demo.Simulation):
    """Simulate a workspace, and keep the account; a share of the tasks carries base64 parts of 131 kB, mean."""

    record_size: int = 2700  # bytes, mean
    media_share: float = 0.002

    def __post_init__(self) -> None:
        self._lives: list[Life] = []
        super().__post_init__()

    def _arrive(self, at: int) -> None:
        super()._arrive(at)
        self._lives.append(self.tasks[-1])

    def _content(self) -> tuple[bytes, bytes]:
        prompts, answers = _texts(self.record_size)
        prompt = self._random.choice(_media() if self._random.random() < self.media_share else prompts)
        return prompt, self._random.choice(answers)

    def spike(self, start: float, duration: float, model: str | None = None, ratio: float = 0.9) -> None:
        """Fail this ratio of the tasks that arrive from now on within that time, on one model or on all."""
        with self._lock:
            self.spikes = [*self.spikes, Spike(start, start + duration, model, ratio)]

    def listed(self, now: float) -> tuple[int, list[Life]]:
        """Return the time reached in microseconds, and the tasks that are listed then."""
        with self._lock:
            reached = self.advance(now)
            return reached, self._listed(reached)

    def end_arrivals(self) -> None:
        """Let no more tasks arrive."""
        with self._lock:
            self._next = 2**62

    def truth(self, now: float) -> Truth:
        """Return the account at a time."""
        with self._lock:
            reached = self.advance(now)
            truth = Truth(listed=Counter((life.model, life.status(reached)) for life in self._listed(reached)))
            for life in self._lives:
                truth.submitted[life.model] += 1
                until = min(reached, life.deleted - 1)
                truth.hundredths[life.model] += life.hundredths * (life.charged <= until)
                if life.finished <= until:
                    truth.finished[life.model, life.outcome] += 1
                    truth.microseconds[life.model, life.outcome] += life.finished - life.created
                    truth.failures[life.model, life.failure_text] += life.outcome == "failed"
            return truth.since(Truth())

    def _listed(self, reached: int) -> list[Life]:
        return [life for life in self.tasks if reached < life.deleted]


class _Server(demo.Server):
    """Break the connections that are open when it is closed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._connections: set[socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)


@dataclass
class SimulatedApi(demo.SimulatedApi):
    """Serve workspaces; `fault`, when set, may answer a path with a status and headers instead.

    `requests` has the newest (path, status). With an `offset` the header `Date` is the time of `clock` and so many
    seconds, otherwise this machine's.
    """

    workspaces: Mapping[tuple[str, str], Simulation]
    fault: Callable[[str], tuple[int, dict[str, str]] | None] | None = None
    offset: float | None = None
    server: ClassVar[type[demo.Server]] = _Server

    def __post_init__(self) -> None:
        super().__post_init__()
        self.requests: deque[tuple[str, int]] = deque(maxlen=10_000)

    def answer(self, path: str, headers: Message) -> tuple[int, dict[str, str], Iterator[bytes]]:
        """Return status, headers and body of the answer to a request."""
        if fault := self.fault and self.fault(path):
            status, more, body = *fault, iter([b'{"detail":"Refused by the simulated API"}'])
        else:
            status, more, body = super().answer(path, headers)
        self.requests.append((path, status))
        return status, self.date() | more, body

    def date(self) -> dict[str, str]:
        """Return the header that says the API's time."""
        return {} if self.offset is None else {"Date": formatdate(self.clock() + self.offset, usegmt=True)}
