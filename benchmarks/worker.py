"""One contender in a process of its own, and what a piece of its work takes: CPU, time, peak of memory.

`python -m benchmarks.worker KIND ARGUMENT...` says when it is ready; for each line on its standard input it works
once and answers with a `Cost` as JSON. `Worker` is the other end.
"""

import asyncio
import json
import re
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import requests
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from benchmarks.api import ROOT
from creatify_exporter.config import Config
from creatify_exporter.draft import Draft, Known
from creatify_exporter.ledger import Book, Ledger
from creatify_exporter.reasons import BUILT_IN, MAX_TEXT, Classifier
from creatify_exporter.service import Service
from creatify_exporter.tasks import Task

_LIST = "/sse/text_generator/"


class Cost(NamedTuple):
    """CPU and wall-clock seconds, and by how many bytes memory rose at most above the idle process.

    `outcome` is what the work found, to see that all contenders did the same.
    """

    cpu: float
    wall: float
    memory: int
    outcome: float


def _memory(field: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measured(work: Callable[[], float], idle: int) -> Cost:
    """Return what `work` costs; `idle` is the memory of the process before its first work."""
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # VmHWM starts anew
    cpu, wall = _cpu(), time.perf_counter()
    outcome = work()
    return Cost(_cpu() - cpu, time.perf_counter() - wall, max(_memory("VmHWM") - idle, 0), outcome)


def drain(url: str, size: str) -> Callable[[], float]:
    """Return the work of reading a body by pieces of `size` without a look at it; it finds the number of bytes."""

    def work() -> float:
        with requests.get(url + _LIST, stream=True, timeout=600) as response:
            return sum(map(len, response.iter_content(int(size))))

    return work


def recv(url: str) -> Callable[[], float]:
    """Return the work of nothing but reading from the socket, into the same memory all the time."""
    buffer = memoryview(bytearray(256 * 1024))

    def work() -> float:
        with requests.get(url + _LIST, stream=True, timeout=600) as response:
            return sum(iter(lambda: response.raw.readinto(buffer), 0))

    return work


def naive(url: str) -> Callable[[], float]:
    """Return the work of the exporter one would write first: the whole body as objects, one loop, some gauges."""
    registry = CollectorRegistry()
    tasks_gauge = Gauge("tasks", "Tasks.", ("model", "status"), registry=registry)
    failed_gauge = Gauge("failed_tasks", "Failed tasks.", ("model", "reason"), registry=registry)
    credits_gauge = Gauge("credits", "Credits.", ("model",), registry=registry)
    quota = re.compile("quota|rate limit|exhausted", re.IGNORECASE)

    def work() -> float:
        tasks = requests.get(url + _LIST, timeout=600).json()
        counts: Counter[tuple[str, str]] = Counter()
        failed: Counter[tuple[str, str]] = Counter()
        credits_: defaultdict[str, float] = defaultdict(float)
        for task in tasks:
            model, status = task["model_name"], task["status"]
            counts[model, status] += 1
            credits_[model] += float(task["credits_used"] or 0)
            if status == "failed":
                failed[model, "quota" if quota.search(task.get("failed_reason") or "") else "other"] += 1
        for labels, count in counts.items():
            tasks_gauge.labels(*labels).set(count)
        for labels, count in failed.items():
            failed_gauge.labels(*labels).set(count)
        for model, sum_ in credits_.items():
            credits_gauge.labels(model).set(sum_)
        generate_latest(registry)
        return counts.total()

    return work


class _NoDraft(Draft):
    """What is left of a draft without a ledger: every task is news to nobody."""

    def add(self, tasks: Iterable[Task]) -> list[Task]:
        return list(tasks)


class _NoBook(Book):
    def draft(self) -> Draft:
        return _NoDraft(Known())

    def commit(self, *_arguments: object, **_named: object) -> None:
        pass


class _NoLedger(Ledger):
    """A ledger that counts nothing: what an exporter costs less with it is what the ledger costs."""

    def book(self, workspace: str) -> Book:
        return _NoBook(self, workspace)


def ours(url: str, ledger_url: str, workspaces: str = "1") -> Callable[[], float]:
    """Return the work of one scrape, all of it but the exporter's HTTP server; it finds the number of tasks.

    A ledger URL of "none" leaves the ledger out.
    """
    config = Config.model_validate(
        {
            "workspaces": [
                {"name": f"workspace-{n}", "api_id": "id", "api_key": "key"} for n in range(int(workspaces))
            ],
            "api": {"base_url": url, "timeout": "10m"},
            "exposition": {"zero_hold": "0s"},
        }
    )
    ledger = _NoLedger("sqlite://") if ledger_url == "none" else Ledger(ledger_url)
    ledger.open()
    loop = asyncio.new_event_loop()

    async def scrape() -> bytes:
        return await exporter.scrape(None, timeout=600, openmetrics=False)

    def work() -> float:
        answer = loop.run_until_complete(scrape()).decode()
        found = re.findall(r"^creatify_text_generator_tasks\{.*\} ([0-9.e+]+)$", answer, re.MULTILINE)
        return sum(map(float, found))

    exporter = Service(config, ledger)
    return work


def classification(kind: str, count: str) -> Callable[[], float]:
    """Return the work of naming the reasons of long texts, all equal or all distinct; it finds their number."""
    texts = [("x" * (MAX_TEXT - 40) + f" {n if kind == 'distinct' else 0:08} no rule knows it") for n in range(500)]

    def work() -> float:
        classify, found = Classifier(), 0
        for start in range(0, int(count), len(texts)):
            for text in texts:
                # Distinct within the work, though memory holds few: the text of one round ends in another number.
                found += classify(text.replace("no rule", f"{start:08}", 1) if kind == "distinct" else text) in BUILT_IN
        return found

    return work


CONTENDERS: Mapping[str, Callable[..., Callable[[], float]]] = {
    contender.__name__: contender for contender in (recv, drain, naive, ours, classification)
}


class Worker(AbstractContextManager["Worker"]):
    """A contender in a process of its own."""

    def __init__(self, kind: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", kind, *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a contender ended with {self._process.wait()}")
        return answer

    def repeated(self) -> Cost:
        """Let it work three times, and return the median by CPU time."""
        return sorted(self.run() for _ in range(3))[1]

    def run(self) -> Cost:
        """Let it work once."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Cost(*json.loads(self._answer()))

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def main(kind: str, *arguments: str) -> None:
    """Work for each line of standard input."""
    work = CONTENDERS[kind](*arguments)
    print("ready", flush=True)
    idle = 0
    for _ in sys.stdin:
        idle = idle or _memory("VmRSS")
        print(json.dumps(measured(work, idle)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
