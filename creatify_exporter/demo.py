"""The simulated Creatify API of `--demo`: same seed and clock, same bytes.

The life of a task is drawn when it arrives; what a listing shows of it depends on the time alone. Like the real API it
lists a window of the newest tasks, answers for each task by its id, and loses some that are deleted.
"""

import heapq
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from email.message import Message
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Self
from uuid import UUID

CREDENTIALS = API_ID, API_KEY = "simulated-id", "simulated-key"
LIST_PATH, BALANCE_PATH = "/sse/text_generator/", "/api/remaining_credits/"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC).astimezone(timezone(timedelta(hours=-7)))
_LEAST, _REFILL = 50_000, 450_000  # hundredths of a credit
_SECOND = 1_000_000
_REMEMBERED = 5000  # tasks that are answered for by their id, beyond the listed ones


@dataclass(frozen=True)
class Model:
    """Describe a model: share of traffic, median run time in s, failure ratio, credits, first use in s."""

    name: str
    weight: float
    duration: float
    failure_ratio: float
    hundredths: int
    since: float = -math.inf


MODELS = (
    Model("gemini-2.5-flash", 5, 2.0, 0.05, 5),
    Model("gemini-2.5-pro", 3, 9.0, 0.07, 125),
    Model("gemini-3-flash-preview", 2, 4.0, 0.06, 25),
    Model("gemini-3.1-pro-preview", 2, 14.0, 0.1, 200, since=15.0),
)


@dataclass(frozen=True)
class Spike:
    """Fail this ratio of the tasks that arrive between two times (Unix seconds), on one model or on all (None)."""

    begin: float
    end: float
    model: str | None
    ratio: float


@cache
def _failures() -> tuple[Sequence[str | None], Sequence[int]]:
    """Return failure texts as upstream words them, with weights; `#` stands for a number."""
    texts: Mapping[str, int] = json.loads(Path(__file__).with_name("failure_texts.json").read_text("utf-8"))
    return [*texts, None], [*texts.values(), 2]


def members(**fields: object) -> bytes:
    """Return members of a JSON object, without its braces."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()[1:-1]


_PROMPT = members(messages=[{"role": "user", "content": "A hook for our product launch"}], config={})
_ANSWER = members(response_text="Stop scrolling: this one is new.", response_function_calls=[])


def _stamp(microseconds: int) -> str:
    return (_EPOCH + timedelta(microseconds=microseconds)).isoformat(timespec="microseconds")


@dataclass(frozen=True, slots=True)
class Life:
    """Hold the whole life of a simulated task; times in microseconds since the epoch, credits in hundredths."""

    id: str
    model: str
    created: int
    started: int
    charged: int
    finished: int
    deleted: float  # infinity: never
    outcome: str
    failure_text: str | None
    hundredths: int
    content: tuple[bytes, bytes]

    def status(self, now: int) -> str:
        """Return the status that the API reports at a time."""
        return self.outcome if now >= self.finished else "running" if now >= self.started else "pending"

    def record(self, now: int) -> bytes:
        """Return the JSON object that the API shows at a time."""
        status, credits_used = self.status(now), self.hundredths / 100 if now >= self.charged else 0
        updated = max(t for t in (self.created, self.started, self.charged, self.finished) if t <= now)
        head = f'{{"id":"{self.id}","model_name":"{self.model}"'.encode()
        tail = f'"credits_used":{credits_used},"created_at":"{_stamp(self.created)}"'
        parts = [head, self.content[0], f'"status":"{status}"'.encode()]
        if status == "failed" and self.failure_text is not None:
            parts.append(members(failed_reason=self.failure_text))
        parts.append(self.content[1] if status == "done" else b'"response_text":"","response_function_calls":[]')
        return b",".join((*parts, f'{tail},"updated_at":"{_stamp(updated)}"}}'.encode()))


@dataclass
class Simulation:
    """Simulate one workspace; methods take the time in Unix seconds, which never runs backwards in here."""

    seed: int
    start: float
    rate: float = 2.0  # tasks per second
    history: int = 0  # tasks that exist at the start
    window: int | None = None  # the server lists so many of the newest tasks; None: all
    models: Sequence[Model] = MODELS
    deleted_share: float = 0.0  # of the tasks are deleted while they run
    slow_share: float = 0.0  # of the tasks run twenty times as long
    spikes: Sequence[Spike] = ()

    def __post_init__(self) -> None:
        self._random, self._rare, self._lock = Random(self.seed), Random(self.seed + 1), threading.RLock()
        self.tasks: deque[Life] = deque(maxlen=self.window)
        self._remembered: dict[str, Life] = {}
        self._charges: list[tuple[int, int]] = []  # when, and how much
        self._charged = 0
        self._origin = self._reached = round(self.start * _SECOND)
        gaps = [self._gap() for _ in range(self.history)]
        self._next = self._origin - sum(gaps)
        for gap in gaps:
            self._arrive(self._next)
            self._next += gap
        self._next = self._origin + self._gap()

    def _gap(self) -> int:
        return round(self._random.expovariate(self.rate) * _SECOND)

    def _failure_ratio(self, at: float, model: str) -> float:
        return max(
            (one.ratio for one in self.spikes if one.begin <= at < one.end and one.model in (None, model)), default=0
        )

    def _arrive(self, at: int) -> None:
        random, since = self._random, at - self._origin
        model = random.choices(self.models, [m.weight * (since >= m.since * _SECOND) for m in self.models])[0]
        started = at + random.randrange(200_000, 3_000_000)
        duration = min(max(random.lognormvariate(math.log(model.duration), 0.6), 0.3), 60)
        luck, overload = random.random(), self._failure_ratio(at / _SECOND, model.name)
        failed, charged_early = luck < max(overload, model.failure_ratio), random.random() < 0.2
        text, number = random.choices(*_failures())[0], str(random.randrange(10**6, 10**7))
        if luck < overload:
            text, duration = _failures()[0][0], min(duration, 1.0)
        slow = self._rare.random() < self.slow_share
        finished = started + round(duration * _SECOND) * (20 if slow else 1)
        deleted = self._rare.random() < self.deleted_share
        life = Life(
            str(UUID(int=random.getrandbits(128), version=4)),
            model.name,
            created=at,
            started=started,
            charged=random.randrange(started, finished) if charged_early else finished,
            finished=finished,
            deleted=self._rare.uniform(started, finished) if deleted else math.inf,
            outcome="failed" if failed else "done",
            failure_text=text and text.replace("#", number) if failed else None,
            hundredths=model.hundredths * random.randrange(1, 5) * (charged_early or not failed),
            content=self._content(),
        )
        self.tasks.append(life)
        self._remembered[life.id] = life
        if len(self._remembered) > len(self.tasks) + _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        if life.charged < life.deleted:
            heapq.heappush(self._charges, (life.charged, life.hundredths))

    def _content(self) -> tuple[bytes, bytes]:
        """Return the serialised members for a prompt and its answer."""
        return _PROMPT, _ANSWER

    def advance(self, now: float) -> int:
        """Play everything up to a time, in steps of any size; return the time reached in microseconds."""
        with self._lock:
            reached = self._reached = max(self._reached, round(now * _SECOND))
            while self._next <= reached:
                self._arrive(self._next)
                self._next += self._gap()
            while self._charges and self._charges[0][0] <= reached:
                self._charged += heapq.heappop(self._charges)[1]
            return reached

    def balance(self, now: float) -> float:
        """Return the credits left; refilled when they run low."""
        with self._lock:
            self.advance(now)
            return (_LEAST + _REFILL - self._charged % _REFILL) / 100

    def listing(self, now: float) -> Iterator[bytes]:
        """Return the chunks of the JSON array at a time, newest task first, made as they are read."""
        with self._lock:
            reached, tasks = self.advance(now), list(self.tasks)
        return joined(life.record(reached) for life in reversed(tasks) if reached < life.deleted)

    def one(self, task_id: str, now: float) -> bytes | None:
        """Return the JSON object of one task at a time, listed or not; None when it is deleted or unknown."""
        with self._lock:
            reached, life = self.advance(now), self._remembered.get(task_id)
        return life.record(reached) if life and reached < life.deleted else None


def joined(records: Iterator[bytes]) -> Iterator[bytes]:
    """Return chunks of 64 KiB or one record more of the JSON array of these records."""
    chunk, separator = bytearray(b"["), b""
    for record in records:
        chunk += separator + record
        separator = b","
        if len(chunk) >= 1 << 16:
            yield bytes(chunk)
            chunk.clear()
    yield bytes(chunk + b"]")


class _Handler(BaseHTTPRequestHandler):
    server: "Server"
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, 1 << 16

    def do_GET(self) -> None:
        status, headers, body = self.server.api.answer(self.path.partition("?")[0], self.headers)
        self.send_response_only(status)
        usual = {
            "Date": self.date_time_string(),
            "Content-Type": "application/json",
            "Transfer-Encoding": "chunked",
        }
        for name, value in (usual | headers).items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in body:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


class Server(ThreadingHTTPServer):
    """The HTTP server of a simulated API."""

    daemon_threads, request_queue_size = True, 256
    api: "SimulatedApi"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error of ours."""
        if not isinstance(sys.exception(), OSError):  # a client that went away is none
            super().handle_error(request, client_address)


@dataclass
class SimulatedApi:
    """Serve workspaces, keyed by (API id, API key), over HTTP on `url` while entered."""

    workspaces: Mapping[tuple[str, str], Simulation]
    clock: Callable[[], float] = time.time
    server: ClassVar[type[Server]] = Server

    def __post_init__(self) -> None:
        self._server = self.server(("127.0.0.1", 0), _Handler)
        self._server.api = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str, headers: Message) -> tuple[int, dict[str, str], Iterator[bytes]]:
        """Return status, headers and body of the answer to a request."""
        simulation = self.workspaces.get((headers.get("X-API-ID", ""), headers.get("X-API-KEY", "")))
        if simulation is None:
            return 401, {}, iter([b'{"detail":"Refused by the simulated API"}'])
        now = self.clock()
        if path == LIST_PATH:
            return 200, {}, simulation.listing(now)
        if path == BALANCE_PATH:
            return 200, {}, iter([b'{"remaining_credits":%r}' % simulation.balance(now)])
        record = simulation.one(path.removeprefix(LIST_PATH).removesuffix("/"), now)
        if record is None:
            return 404, {}, iter([b'{"detail":"Not found by the simulated API"}'])
        return 200, {}, iter([record])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


SPIKE = Spike(90, 330, "gemini-2.5-pro", 0.9)
"""The demo's failure spike, in seconds from its start, again each hour: CreatifyModelFailureSpike fires."""


def demo(clock: Callable[[], float] = time.time) -> SimulatedApi:
    """Return an API that is lively enough to show every metric in motion within half a minute."""
    start = clock()
    hours = [start + 3600 * hour for hour in range(24)]
    spikes = [Spike(hour + SPIKE.begin, hour + SPIKE.end, SPIKE.model, SPIKE.ratio) for hour in hours]
    simulation = Simulation(
        13, start, rate=4.0, history=300, window=400, deleted_share=0.01, slow_share=0.02, spikes=spikes
    )
    return SimulatedApi({CREDENTIALS: simulation}, clock)


def spike_times(clock: Callable[[], float] = time.time) -> dict[str, str]:
    """Return what to tell of the next failure spike of a demo that starts now: model and local times."""
    begin, end = (datetime.fromtimestamp(clock() + seconds).astimezone() for seconds in (SPIKE.begin, SPIKE.end))
    return {"model": str(SPIKE.model), "begins": f"{begin:%H:%M:%S}", "ends": f"{end:%H:%M:%S}"}
