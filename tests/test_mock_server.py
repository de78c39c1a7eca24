"""A mock server that others made of the OpenAPI file (Prism, from npm) is scraped right."""

import fcntl
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from creatify_exporter.demo import LIST_PATH
from tests.support import openapi
from tests.support.exporter import Exporter
from tests.support.processes import Daemon, free_port
from tests.support.stage import PREFIX
from tests.support.upstream import Exchange, Upstream

pytestmark = pytest.mark.process

PRISM = "@stoplight/prism-cli@5.14.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "creatify-exporter-tests" / "prism-5.14.2"


@pytest.fixture(scope="module")
def program() -> str:
    """Return the path of Prism, installed by npm into a cache folder when it is not there yet."""
    if found := shutil.which("prism", path=f"{CACHE / 'node_modules/.bin'}:{os.environ.get('PATH', '')}"):
        return found
    if not shutil.which("npm"):
        missing("npm is not installed")
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with CACHE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not CACHE.exists():
            made = CACHE.with_suffix(".new")
            shutil.rmtree(made, ignore_errors=True)
            command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(made), PRISM]
            if subprocess.run(command, check=False, capture_output=True, timeout=200).returncode:
                missing("npm could not install Prism")
            made.rename(CACHE)
    return str(CACHE / "node_modules/.bin/prism")


class Prism(Daemon):
    """Serve the documented API; with `-d` in `flags`, random answers instead of one example."""

    def __init__(self, directory: Path, program: str, flags: Sequence[str]) -> None:
        super().__init__(directory / "prism.log")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [program, "mock", *flags, "-h", "127.0.0.1", "-p", str(self.port), str(openapi.LISTING)]

    def command(self) -> Sequence[str]:
        return self._command

    def ready(self) -> bool:
        return self.list().ok

    def list(self) -> requests.Response:
        return requests.get(self.url + LIST_PATH, headers={"X-API-ID": "a", "X-API-KEY": "b"}, timeout=10)


def missing(message: str) -> None:
    """Skip the test, or fail it when `CI` is `true`."""
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def relay(prism: Prism, sent: list[Any], exchange: Exchange) -> None:
    """Pass on what Prism answers, and note it."""
    answer = prism.list()
    sent.append(answer.json())
    exchange.reply(answer.content, answer.status_code)


@pytest.mark.parametrize("flags", [[], ["-d"]], ids=["static", "dynamic"])
def test_a_mock_server_is_scraped_right(tmp_path: Path, program: str, flags: list[str]) -> None:
    with Prism(tmp_path, program, flags) as prism:
        check(tmp_path, prism)


def check(tmp_path: Path, prism: Prism) -> None:
    sent: list[Any] = []
    upstream = Upstream(**{f"w{number}": partial(relay, prism, sent) for number in range(8)})
    with upstream, Exporter(tmp_path / "relayed", config=upstream.config()) as exporter:
        scrape = exporter.scrape(scrape_timeout=30)
    with Exporter(tmp_path, config=upstream.config("w1", api={"base_url": prism.url})) as exporter:
        assert exporter.scrape(scrape_timeout=30).value("creatify_up") == 1
    assert set(scrape.values("creatify_up", "workspace").values()) == {1}
    assert len(sent) == 8
    listed = Counter[str]()
    for (_, _, status), count in scrape.values(PREFIX + "tasks", "workspace", "model", "status").items():
        listed[status] += int(count)
    assert +listed == Counter(task.get("status", "unknown") for tasks in sent for task in tasks)
    credits_listed = sum(scrape.values(PREFIX + "listed_credits", "workspace", "model").values())
    given = (task.get("credits_used", 0) for tasks in sent for task in tasks)
    assert credits_listed == pytest.approx(sum(one for one in given if 0 <= one <= 1_000_000))
    assert set(scrape.values("creatify_exporter_malformed_tasks", "workspace").values()) == {0}
