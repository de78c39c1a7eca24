"""A simulated API with steerable time, and what the counters of an exporter before it must say."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import quote

from creatify_exporter.demo import LIST_PATH
from creatify_exporter.reasons import Classifier
from tests.support.exporter import Exporter, Scrape
from tests.support.processes import eventually
from tests.support.simulation import SimulatedApi, Simulation, Truth

Counts = dict[tuple[str, ...], float]
"""Values by (sample, model[, status or reason])."""

PREFIX = "creatify_text_generator_"
_FAMILIES = ("tasks_submitted", "tasks_finished", "failures", "credits_used", "task_duration_seconds")
_COUNTERS = tuple(PREFIX + family for family in _FAMILIES)
_LABELS = {
    "tasks_submitted_total": ("model",),
    "tasks_finished_total": ("model", "status"),
    "failures_total": ("model", "reason"),
    "credits_used_total": ("model",),
    "task_duration_seconds_count": ("model", "status"),
    "task_duration_seconds_sum": ("model", "status"),
}


class Time:
    """Seconds since the epoch that run at `speed`, 0 at first; read it by calling it."""

    def __init__(self) -> None:
        self._lock, self._speed = threading.Lock(), 0.0
        self._shown, self._read = time.time(), time.monotonic()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._shown, self._read = self._shown + (now - self._read) * self._speed, now
            return self._shown

    def run(self, speed: float) -> float:
        """Let time pass at `speed` (0: stop it); return the time."""
        now = self()
        with self._lock:
            self._speed = speed
        return now

    def jump(self, seconds: float) -> float:
        """Let so many seconds pass at once; return the time."""
        with self._lock:
            self._shown += seconds
        return self()


class Stage:
    """Serve one simulated workspace for each of `names`; time stands still until `time.run`."""

    api_type: type[SimulatedApi] = SimulatedApi

    def __init__(self, *names: str, **simulation: Any) -> None:
        self.time = Time()
        options = {"rate": 10.0, "history": 100, "record_size": 600, "media_share": 0.0} | simulation
        self.simulations = {
            name: Simulation(seed, self.time(), **options) for seed, name in enumerate(names or ("main",), 1)
        }
        keyed = {credentials(name): one for name, one in self.simulations.items()}
        self.api = self.api_type(keyed, self.time)
        self._baselines: dict[str, Truth] = {}
        self._classify = Classifier()

    def config(self, **sections: Any) -> dict[str, Any]:
        """Return a configuration of the exporter; `sections` are merged into it."""
        workspaces = [
            {"name": name, "api_id": credentials(name)[0], "api_key": credentials(name)[1]} for name in self.simulations
        ]
        config: dict[str, Any] = {
            "workspaces": workspaces,
            "api": {"base_url": self.api.url, "timeout": "20s"},
            "exposition": {"zero_hold": "0s"},
        }
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values} if isinstance(values, Mapping) else values
        return config

    def listings(self) -> int:
        """Return how many listings were asked for so far, of the newest ten thousand requests."""
        return sum(path == LIST_PATH for path, _ in list(self.api.requests))

    def baseline(self) -> None:
        """Take note that counting begins now; call it while time stands still."""
        self._baselines = {name: one.truth(self.time()) for name, one in self.simulations.items()}

    def truth(self, name: str = "main") -> Truth:
        """Return what happened since the baseline."""
        return self.simulations[name].truth(self.time()).since(self._baselines[name])

    def listed(self, name: str = "main") -> dict[tuple[str, str], int]:
        """Return how many tasks are listed now, by model and status."""
        return dict(self.simulations[name].truth(self.time()).listed)

    def expected(self, name: str = "main") -> Counts:
        """Return the counters that are not 0, as they must be now."""
        truth = self.truth(name)
        counts: Counts = {}
        for model, tasks in truth.submitted.items():
            counts["tasks_submitted_total", model] = tasks
        for (model, status), tasks in truth.finished.items():
            counts["tasks_finished_total", model, status] = tasks
            counts["task_duration_seconds_count", model, status] = tasks
        for key, microseconds in truth.microseconds.items():
            counts["task_duration_seconds_sum", *key] = microseconds / 1e6
        for model, credits_used in truth.credits.items():
            counts["credits_used_total", model] = credits_used
        reasons = Counter[tuple[str, str]]()
        for (model, text), tasks in truth.failures.items():
            reasons[model, self._classify(text)] += tasks
        for (model, reason), tasks in reasons.items():
            counts["failures_total", model, reason] = tasks
        return {key: value for key, value in counts.items() if value}

    def wait_until_exact(self, exporter: Exporter, *names: str, within: float = 20) -> Scrape:
        """Scrape until the counters equal the truth, while time stands still; return the scrape."""
        last: list[Scrape] = []

        def exact() -> bool:
            last[:] = [exporter.scrape()]
            return all(counts(last[0], name) == self.expected(name) for name in names or self.simulations)

        try:
            eventually(exact, within, "the counters equal the truth")
        except AssertionError:
            for name in names or self.simulations:
                shown, expected = counts(last[0], name), self.expected(name)
                assert shown == expected, (name, dict(shown.items() ^ expected.items()))
        return last[0]

    def __enter__(self) -> Self:
        self.api.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.api.__exit__()


class Watch:
    """Look at one answer after the other: no counter of the ledger falls, no series of one goes away.

    Of all workspaces, or of one.
    """

    def __init__(self, workspace: str | None = None) -> None:
        self._label = f'workspace="{workspace}"' if workspace else ""
        self._highest: dict[str, float] = {}

    def check(self, text: str) -> None:
        """Compare an answer in the text format with all before; those of one process must come in their order."""
        found = (line for line in text.splitlines() if line.startswith(_COUNTERS) and self._label in line)
        lines = (line.rpartition(" ") for line in found)
        shown = {series: float(value) for series, _, value in lines}
        fallen = {series: value for series, value in self._highest.items() if shown.get(series, -1) < value}
        assert not fallen, {series: (value, shown.get(series, "gone")) for series, value in fallen.items()}
        self._highest = shown


def credentials(name: str) -> tuple[str, str]:
    """Return API id and key of a workspace of a stage."""
    return f"id-of-{quote(name)}", f"key-of-{quote(name)}"


def counts(scrape: Scrape, workspace: str = "main") -> Counts:
    """Return the ledger's counters of one workspace that are not 0; of histograms count and sum."""
    found: Counts = {}
    for sample, labels in _LABELS.items():
        for key, value in scrape.values(PREFIX + sample, "workspace", *labels).items():
            if key[0] == workspace and value:
                found[sample, *key[1:]] = value
    return found


def counter_series(scrape: Scrape) -> dict[tuple[str, ...], float]:
    """Return all counters of the ledger by workspace, without the histogram."""
    return {
        (sample, *key): value
        for sample, labels in _LABELS.items()
        if sample.endswith("_total")
        for key, value in scrape.values(PREFIX + sample, "workspace", *labels).items()
    }
