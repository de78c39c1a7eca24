"""The exporter in simulated time: its real answers, scrape by scrape, as series for promtool."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from typing import Any

from creatify_exporter import demo
from creatify_exporter.attempt import Clock
from creatify_exporter.config import Config
from creatify_exporter.ledger import Ledger
from creatify_exporter.service import Service
from tests.support.simulation import SimulatedApi

TARGET = 'job="creatify", instance="a"'
# What no rule asks for, and is much.
WITHOUT = ("creatify_text_generator_task_duration_seconds", "python_", "process_")


class DatedApi(SimulatedApi):
    """A simulated API whose answers carry the date of its own clock."""

    def answer(self, path: str, headers: Message) -> tuple[int, dict[str, str], Iterator[bytes]]:
        """Return status, headers and body of the answer to a request."""
        status, more, body = super().answer(path, headers)
        return status, {**more, "Date": formatdate(self.clock(), usegmt=True)}, body


class Samples:
    """What a Prometheus stored of one target, a scrape after the other; promtool's time begins at `origin`."""

    def __init__(self, origin: float) -> None:
        self._values: dict[str, list[str]] = {}
        self._scrapes, self._origin = 0, origin

    def take(self, answer: str | None) -> None:
        """Take one scrape: an answer in the text format, or None where it failed."""
        found = {}
        for line in (answer or "").splitlines():
            if not line.startswith(("#", *WITHOUT)):
                name, _, value = line.rpartition(" ")
                metric, _, labels = name.partition("{")
                if metric.endswith("_timestamp_seconds"):
                    value = f"{float(value) - self._origin:.10g}"
                found[f"{metric}{{{TARGET}{', ' + labels if labels else '}'}"] = value
        for name in found:
            self._values.setdefault(name, ["_"] * self._scrapes)
        for name, values in self._values.items():
            gone = "_" if not values or values[-1] in ("_", "stale") else "stale"
            values.append(found.get(name, gone))
        self._scrapes += 1

    def skip(self) -> None:
        """Take note that Prometheus itself was away: no sample, and no marker of staleness."""
        for values in self._values.values():
            values.append("_")
        self._scrapes += 1

    def series(self) -> list[dict[str, str]]:
        """Return what was stored in promtool's notation."""
        return [{"series": name, "values": " ".join(values)} for name, values in self._values.items()]


class Lived:
    """An exporter with a ledger before a simulated API, and the time, which is `now` in seconds since the epoch.

    `make` makes the API, given the clock; `sections` are of the exporter's configuration.
    """

    def __init__(
        self,
        directory: Path,
        start: float,
        make: Callable[[Callable[[], float]], demo.SimulatedApi],
        **sections: Any,
    ) -> None:
        self.start = self.now = start
        self.samples = Samples(start)
        self._clock = Clock(now=lambda: self.now, monotonic=lambda: self.now)
        self.api = make(lambda: self.now)
        self._url, self._sections = f"sqlite:///{directory}/ledger.db", sections

    def run(self, step: float, scrapes: int, at: Callable[[int], Mapping[str, Any]]) -> None:
        """Scrape so many times, `step` seconds apart; `at` is asked before each, by its number.

        What it may say: `restart` (the exporter is another process from now on), `gone` (it does not answer),
        `unwatched` (nobody asks) or `same` (the exporter answers as before, as it does within listing.min_interval).
        """
        with self.api:
            asyncio.run(self._run(step, scrapes, at))

    async def _run(self, step: float, scrapes: int, at: Callable[[int], Mapping[str, Any]]) -> None:
        (ledger, service), answer = self._begin(), ""
        for number in range(scrapes):
            self.now = self.start + number * step
            said = at(number)
            if said.get("restart"):
                service.stop()
                ledger.close()
                ledger, service = self._begin()
            if said.get("unwatched"):
                self.samples.skip()
            elif said.get("gone"):
                self.samples.take(None)
            else:
                answer = answer if said.get("same") else (await service.scrape(None, 30, False)).decode()
                self.samples.take(answer)
        service.stop()
        ledger.close()

    def _begin(self) -> tuple[Ledger, Service]:
        ((api_id, api_key),) = self.api.workspaces
        config = Config.model_validate(
            {
                "workspaces": [{"name": "w", "api_id": api_id, "api_key": api_key}],
                "api": {"base_url": self.api.url},
                **self._sections,
            }
        )
        ledger = Ledger(self._url)
        return ledger, Service(config, ledger, clock=self._clock)


def intervals(minutes: Sequence[int], step: int) -> list[tuple[int, int]]:
    """Return the first and the last of minutes that are `step` apart, for each row of them."""
    rows: list[tuple[int, int]] = []
    for minute in sorted(minutes):
        if rows and minute - rows[-1][1] <= step:
            rows[-1] = rows[-1][0], minute
        else:
            rows.append((minute, minute))
    return rows
