"""Scrapes without a pause, from threads."""

import threading
from typing import Self

import requests

from tests.support.exporter import Exporter
from tests.support.processes import eventually
from tests.support.stage import Watch


class Scraping:
    """Scrape an exporter from some threads, each with a watch of its own, until the block ends.

    A connection that fails is `lost` (the exporter may be down just then); any other answer than 200 and a counter that
    fell fail the block. `pause` is in seconds; with a `workspace` only its counters are watched.
    """

    def __init__(self, exporter: Exporter, threads: int = 2, pause: float = 0.01, workspace: str | None = None) -> None:
        self.answers = self.lost = 0
        self._exporter, self._pause, self._workspace = exporter, pause, workspace
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._scrape, daemon=True) for _ in range(threads)]

    def _scrape(self) -> None:
        watch = Watch(self._workspace)
        try:
            while not self._stop.wait(self._pause):
                try:
                    response = self._exporter.get("/metrics")
                except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                    with self._lock:
                        self.lost += 1
                    continue
                assert response.status_code == 200, response.text
                watch.check(response.text)
                with self._lock:
                    self.answers += 1
        except BaseException as failure:  # noqa: BLE001 - it is raised where the block ends
            self._failures.append(failure)

    def wait_for(self, answers: int, within: float = 60) -> None:
        """Wait until so many more answers have come."""
        enough = self.answers + answers
        eventually(lambda: self._failures or self.answers >= enough, within, f"{answers} more answers")

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(40)
        if self._failures:
            raise self._failures[0]
