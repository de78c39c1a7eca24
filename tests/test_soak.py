"""Nothing leaks and nothing falls over in the long run; `make soak` runs the long form."""

import signal
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from tests.support.exporter import Exporter
from tests.support.load import Scraping
from tests.support.processes import eventually
from tests.support.stage import Stage, Watch

pytestmark = [pytest.mark.process, pytest.mark.soak, pytest.mark.timeout(3600)]


def configurations(stage: Stage) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield one configuration after the other, and whether it is valid; every third is not."""
    alone = stage.config()
    alone["workspaces"] = alone["workspaces"][:1]
    renewed = stage.config(api={"timeout": "21s"})
    rules = stage.config(failure_reasons={"rules": [{"reason": "brand_policy", "match": "brand"}]})
    wrong = [
        stage.config(listing={"max_age": "long"}),
        stage.config(ledger={"url": "sqlite:///other.db"}),
        stage.config() | {"nonsense": True},
    ]
    invalid = cycle(wrong)
    for first, second in cycle([(stage.config(), alone), (renewed, rules)]):
        yield first, True
        yield second, True
        yield next(invalid), False


def test_reloads_under_fire_fail_no_scrape_and_leak_nothing(tmp_path: Path, soak: bool) -> None:
    warm_up, reloads = (100, 1000) if soak else (30, 150)
    with (
        Stage("main", "guest", window=150) as stage,
        Exporter(tmp_path, "--web.enable-lifecycle", "--log.level=error", config=stage.config()) as exporter,
    ):
        stage.baseline()
        exporter.scrape()
        stage.time.run(5)
        before = exporter.threads(), exporter.open_files(), exporter.memory()
        with Scraping(exporter, threads=2, workspace="main") as scraping:
            for number, (config, valid) in zip(range(reloads), configurations(stage), strict=False):
                exporter.configure(config)
                if number == warm_up:
                    before = exporter.threads(), exporter.open_files(), exporter.memory()
                if number % 3 == 0:
                    scraping.wait_for(1)
                if number % 10 == 9:
                    exporter.signal(signal.SIGHUP)
                else:
                    answer = exporter.session.post(exporter.url + "/-/reload", timeout=30)
                    assert answer.status_code == (200 if valid else 500), answer.text
        assert scraping.lost == 0
        assert scraping.answers > reloads / 3
        exporter.configure(stage.config())
        assert exporter.session.post(exporter.url + "/-/reload", timeout=30).ok
        threads, files, memory = before
        eventually(lambda: exporter.threads() <= threads + 2, 20, "no thread is left over")
        eventually(lambda: exporter.open_files() <= files + 5, 20, "no file is left open")
        assert exporter.memory() < 1.1 * memory
        assert exporter.running()
        assert "Traceback" not in exporter.log()


def test_memory_stays_where_it_is(tmp_path: Path, soak: bool) -> None:
    block, blocks = (1000, 10) if soak else (150, 4)
    means = []
    with (
        Stage(window=200, history=200) as stage,
        Exporter(tmp_path, config=stage.config()) as exporter,
    ):
        watch = Watch()
        stage.time.run(5)
        for _ in range(blocks):
            samples = []
            for number in range(block):
                answer = exporter.get("/metrics")
                assert answer.status_code == 200
                if number % 10 == 0:
                    watch.check(answer.text)
                    samples.append(exporter.memory())
            means.append(sum(samples) / len(samples))
        assert means[-1] < 1.05 * means[1], [round(mean / 1e6, 1) for mean in means]
        assert "level=warning" not in exporter.log()
