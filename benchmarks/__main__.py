"""Measure the exporter beside simpler ways, print one table, and keep the figures as JSON.

Every contender works in a process of its own, the API in another. Contenders take turns, and a ratio is the median of
the ratios of the rounds: a machine that is busy with other things slows all of a round alike.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import requests

from benchmarks.api import serving
from benchmarks.dataset import listing
from benchmarks.serving import latencies
from benchmarks.worker import Cost, Worker
from tests.support.exporter import Exporter
from tests.support.postgres import Postgres

ROWS: dict[str, dict[str, Any]] = {
    "1k": {"count": 1_000},
    "10k": {"count": 10_000},
    "100k": {"count": 100_000},
    "1M": {"count": 1_000_000, "short": True},
    "media": {"count": 20_000, "media": True},
}
PARTS = (*ROWS, "workspaces", "postgres", "reasons", "serving", "start")
QUICK = ("1k", "10k", "workspaces", "reasons", "serving", "start")


@dataclass(frozen=True)
class Scale:
    """How much is measured: rounds, tasks of the large parts, texts, seconds of load per number of clients."""

    runs: int
    tasks: int
    texts: int
    seconds: float


class Bench:
    """The figures of one run, by name; each has one value per round."""

    def __init__(self, scale: Scale, directory: Path, url: str) -> None:
        self.scale = scale
        self.costs: defaultdict[str, list[Cost]] = defaultdict(list)
        self.figures: dict[str, list[float]] = {}
        self._directory = directory
        self._url = url

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Make a listing that the API serves under `name`."""
        with (self._directory / name).open("wb") as file:
            file.writelines(chunks)

    def point(self, name: str, target: str) -> None:
        """Let the API serve under `name` from now on what is under `target`."""
        link = self._directory / "link"
        link.symlink_to(target)
        link.replace(self._directory / name)

    def remove(self) -> None:
        """Delete the listings."""
        for file in self._directory.iterdir():
            file.unlink()

    def scrapes(self, name: str, ledger: Callable[[], str], workspaces: int = 1) -> None:
        """Measure one fresh process: its first listing, one with no change and one with 1 % changed."""
        self.point("current", "before")
        with Worker("ours", f"{self._url}/current", ledger(), str(workspaces)) as worker:
            self.costs[f"{name} cold"].append(worker.run())
            self.costs[f"{name} steady"].append(worker.repeated())
            self.point("current", "after")
            self.costs[f"{name} 1% changed"].append(worker.run())

    def row(self, name: str) -> None:
        """Measure all ways to read one listing."""
        shape = ROWS[name]
        self.write("before", listing(**shape))
        self.write("after", listing(**shape, step=1))
        with ExitStack() as stack:

            def contender(*arguments: str) -> Worker:
                return stack.enter_context(Worker(arguments[0], f"{self._url}/before", *arguments[1:]))

            plain = {
                "recv": contender("recv"),
                "drain": contender("drain", str(requests.models.CONTENT_CHUNK_SIZE)),
                "drain 64K": contender("drain", str(64 * 1024)),
            }
            naive, bare = contender("naive"), contender("ours", "none")
            bare.run()
            for _ in range(self.scale.runs):
                for kind, worker in plain.items():
                    self.costs[f"{name} {kind}"].append(worker.repeated())
                self.costs[f"{name} naive"].append(naive.run())
                self.scrapes(name, self.sqlite)
                self.costs[f"{name} no ledger"].append(bare.repeated())
        self._agree(name, shape["count"])
        self.remove()

    def _agree(self, name: str, count: int) -> None:
        found = {
            cost.outcome for key in ("naive", "cold", "steady", "no ledger") for cost in self.costs[f"{name} {key}"]
        }
        assert found == {count}, f"the contenders of {name} found {found} tasks"

    def sqlite(self) -> str:
        """Return the URL of a new ledger."""
        return f"sqlite:///{tempfile.mkdtemp(dir=self._directory.parent)}/ledger.db"

    def workspaces(self) -> None:
        """Measure the same number of tasks in 1, 10 and 100 workspaces."""
        for count in (1, 10, 100):
            self.write("before", listing(self.scale.tasks // count))
            self.write("after", listing(self.scale.tasks // count, step=1))
            for _ in range(self.scale.runs):
                self.scrapes(f"{count} workspaces", self.sqlite, count)
        self.remove()

    def postgres(self) -> None:
        """Measure a ledger in PostgreSQL beside one in SQLite."""
        self.write("before", listing(self.scale.tasks))
        self.write("after", listing(self.scale.tasks, step=1))
        with Postgres() as server:
            for _ in range(self.scale.runs):
                self.scrapes("SQLite", self.sqlite)
                self.scrapes("PostgreSQL", server.create_database)
        self.remove()

    def reasons(self) -> None:
        """Measure how fast failure texts of 4,096 characters are named."""
        for kind in ("equal", "distinct"):
            with Worker("classification", kind, str(self.scale.texts)) as worker:
                for _ in range(self.scale.runs):
                    self.costs[f"reasons, {kind} texts"].append(worker.run())

    def exporter(self, workspaces: int) -> Exporter:
        """Return an exporter to be started, of workspaces with 1,000 tasks and 10 models each."""
        if not (self._directory / "served").exists():
            body = b"".join(listing(1000, short=True))
            names = cycle(b'"model_name":"model-%d"' % n for n in range(10))
            self.write("served", [re.sub(rb'"model_name":"[^"]*"', lambda _: next(names), body)])
        config = {
            "workspaces": [{"name": f"w{n}", "api_id": "id", "api_key": "key"} for n in range(workspaces)],
            "api": {"base_url": f"{self._url}/served"},
            "listing": {"min_interval": "5m"},
            "exposition": {"zero_hold": "0s"},
        }
        # As where it is installed, the modules are compiled already: by the first of the exporters started here.
        compiled = {"PYTHONDONTWRITEBYTECODE": ""}
        return Exporter(Path(tempfile.mkdtemp(dir=self._directory.parent)), config=config, environment=compiled)

    def serving(self) -> None:
        """Measure the answers from a fresh listing of 10 and 100 workspaces with 10 models each."""
        for workspaces in (10, 100):
            with self.exporter(workspaces) as exporter:
                for _ in range(3):  # the listing, and the counters' first two answers
                    exporter.scrape(scrape_timeout=60)
                for _ in range(self.scale.runs):
                    for clients in (1, 10, 100):
                        before = exporter.cpu_seconds()
                        one = latencies(f"{exporter.url}/metrics", clients, self.scale.seconds)
                        cpu = (exporter.cpu_seconds() - before) / self.scale.seconds
                        name = f"serving {workspaces} workspaces to {clients} clients"
                        for label, value in zip(("answers/s", "p50 s", "p99 s", "CPU"), (*one, cpu), strict=True):
                            self.figures.setdefault(f"{name}: {label}", []).append(value)
        self.remove()

    def start(self) -> None:
        """Measure the time from starting the program to its first answer, and its CPU when nobody asks."""
        with self.exporter(1):
            pass
        for _ in range(self.scale.runs):
            exporter, started = self.exporter(1), time.perf_counter()
            exporter.launch()
            while True:
                try:
                    exporter.scrape()
                    break
                except OSError:
                    time.sleep(0.005)
            found = {"start to first answer: s": time.perf_counter() - started}
            with exporter:
                before = found["start to first answer: CPU s"] = exporter.cpu_seconds()
                time.sleep(4 * self.scale.seconds)
                found["idle CPU: %"] = 100 * (exporter.cpu_seconds() - before) / (4 * self.scale.seconds)
            for figure, value in found.items():
                self.figures.setdefault(figure, []).append(value)
        self.remove()


class Report:
    """What the figures say: medians, ratios of contenders that took turns, and whether they are what they must be."""

    def __init__(self, costs: Mapping[str, Sequence[Cost]], figures: Mapping[str, Sequence[float]]) -> None:
        self._costs = costs
        self._figures = figures

    def ratio(self, name: str, beside: str, field: str = "cpu") -> float | None:
        """Return the median over the rounds of a ratio, None when one of both was not measured."""
        pairs = zip(self._costs.get(name, ()), self._costs.get(beside, ()), strict=False)
        ratios = [getattr(one, field) / max(getattr(other, field), 1e-6) for one, other in pairs]
        return statistics.median(ratios) if ratios else None

    def median(self, name: str) -> float | None:
        """Return the median of a figure over the rounds, None when it was not measured."""
        return statistics.median(self._figures[name]) if name in self._figures else None

    def table(self) -> Iterator[str]:
        """Yield the lines of the one table: a line per contender of each part, medians."""
        yield f"{'':28}{'CPU s':>9}{'wall s':>9}{'MB':>9}{'CPU/drain':>11}{'CPU/naive':>11}{'MB/naive':>10}"
        for name, costs in self._costs.items():
            cpu, wall, memory, _ = (statistics.median(values) for values in zip(*costs, strict=True))
            row = name.partition(" ")[0]
            ratios = (
                self.ratio(name, f"{row} drain"),
                self.ratio(name, f"{row} naive"),
                self.ratio(name, f"{row} naive", "memory"),
            )
            beside = "".join(
                f"{'' if ratio is None else format(ratio, '.3f'):>{width}}"
                for ratio, width in zip(ratios, (11, 11, 10), strict=True)
            )
            yield f"{name:28}{cpu:9.3f}{wall:9.3f}{memory / 1e6:9.1f}{beside}".rstrip()
        for name in self._figures:
            yield f"{name:60}{self.median(name):9.4g}"

    def promises(self) -> Iterator[str]:
        """Yield a line for each thing that must hold and was measured."""
        share = self.ratio("100k no ledger", "100k steady")
        longer = self.ratio("1M steady", "100k steady"), self.ratio("1M cold", "100k cold")
        million = [(cost.memory - 32 * 2**20) / ROWS["1M"]["count"] for cost in self._costs.get("1M cold", ())]
        rates = {n: self.median(f"serving 10 workspaces to {n} clients: answers/s") for n in (1, 100)}
        spreads = [self._spread(clients) for clients in (1, 10, 100)]
        promises: list[tuple[str, float | None, float]] = [
            ("100k steady: CPU beside naive", self.ratio("100k steady", "100k naive"), 0.4),
            ("100k steady: CPU beside draining as requests does", self.ratio("100k steady", "100k drain"), 3.5),
            ("  ... in pieces of 64 KiB", self.ratio("100k steady", "100k drain 64K"), 3.5),
            ("100k steady: memory beside naive", self.ratio("100k steady", "100k naive", "memory"), 1 / 15),
            ("100k steady: the ledger's share of the CPU", None if share is None else 1 - share, 0.15),
            ("100k cold: CPU beside naive", self.ratio("100k cold", "100k naive"), 0.7),
            ("media steady: CPU beside naive", self.ratio("media steady", "media naive"), 0.5),
            ("media cold: CPU beside naive", self.ratio("media cold", "media naive"), 0.5),
            ("1M steady: CPU beside 100k", longer[0], 11),
            ("1M cold: CPU beside 100k", longer[1], 11),
            ("1M cold: bytes per task above 32 MiB", statistics.median(million) if million else None, 300),
            ("serving 10 workspaces: worst p99 beside p50", None if None in spreads else max(filter(None, spreads)), 5),
            ("serving: rate of 1 beside 100 clients", rates[1] and rates[100] and rates[1] / rates[100], 1),
            ("start to first answer: s", self.median("start to first answer: s"), 1.5),
            ("idle CPU: %", self.median("idle CPU: %"), 0.5),
        ]
        for promise, value, limit in promises:
            if value is not None:
                yield f"{promise:52}{value:9.3f}   at most {limit:6.3f}   {'met' if value <= limit else 'NOT MET'}"

    def _spread(self, clients: int) -> float | None:
        name = f"serving 10 workspaces to {clients} clients: "
        p50, p99 = self.median(f"{name}p50 s"), self.median(f"{name}p99 s")
        return p50 and p99 and p99 / p50


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the flags say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to measure (all): {' '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="the small parts, one round, for a look in a minute")
    parser.add_argument("--runs", type=int, help="rounds (5)")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    flags = parser.parse_args(arguments)
    if unknown := set(flags.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    scale = Scale(1, 2_000, 1_000, 0.3) if flags.quick else Scale(5, 100_000, 100_000, 3)
    if flags.runs:
        scale = replace(scale, runs=flags.runs)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)))
        listings = root / "listings"
        listings.mkdir()
        bench = Bench(scale, listings, stack.enter_context(serving(listings)))
        for part in flags.parts or (QUICK if flags.quick else PARTS):
            print(f"measuring {part} ...", file=sys.stderr, flush=True)
            bench.row(part) if part in ROWS else getattr(bench, part)()
    report = Report(bench.costs, bench.figures)
    print("\n".join([*report.table(), "", *report.promises()]))
    if flags.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        costs = {name: [cost._asdict() for cost in each] for name, each in bench.costs.items()}
        flags.json.write_text(json.dumps({"machine": machine, "costs": costs, "figures": bench.figures}, indent=1))


if __name__ == "__main__":
    main()
