"""The running program: command line, scrapes, workspaces, reload, signals, logs."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import requests

from benchmarks.dataset import listing
from creatify_exporter.demo import LIST_PATH
from tests.support.commands import run
from tests.support.exporter import OPENMETRICS, ROOT, Exporter, Scrape, parse
from tests.support.packages import require
from tests.support.processes import eventually
from tests.support.stage import PREFIX, Stage, counter_series, credentials
from tests.support.upstream import Exchange, Upstream, task, tasks

pytestmark = pytest.mark.process


def ended(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the exporter to its end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CREATIFY_")}
    return run(sys.executable, ROOT / "exporter.py", *arguments, cwd=directory, env=inherited | environment)


def test_what_is_wrong_is_said_in_lines_and_with_an_exit_code(tmp_path: Path) -> None:
    """The program as users start it; what each flag does is in tests/test_cli.py."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("workspaces: [{name: a, api_id: i}]\nlisting: {min_interval: soon}\nnonsense: 1\n")
    result = ended(tmp_path, "--config.check", "--config.file", str(bad))
    assert result.returncode == 1
    assert result.stdout == ""
    paths = {line.partition(": ")[0] for line in result.stderr.splitlines()}
    assert paths == {"workspaces[0].api_key", "listing.min_interval", "nonsense"}
    assert {path.name for path in tmp_path.iterdir()} == {"bad.yaml"}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".log"}


@pytest.mark.every_python
def test_once_prints_what_a_scrape_gives_and_writes_nothing(tmp_path: Path) -> None:
    with Stage("one", "two") as stage, Exporter(tmp_path, config=stage.config()) as exporter:
        once = partial(ended, tmp_path, "--once", f"--config.file={exporter.config_file}")
        stage.baseline()
        exporter.scrape()
        stage.time.jump(120)
        served = stage.wait_until_exact(exporter)
        assert exporter.stop() == 0
        before = contents(tmp_path)
        stage.time.jump(60)
        result = once()
        assert result.returncode == 0, result.stderr
        printed = parse(result.stdout)
        assert printed.families.keys() >= served.families.keys()
        assert counter_series(printed) == counter_series(served)
        listed = printed.values(PREFIX + "tasks", "workspace", "model", "status")
        truth = stage.listed("one")
        assert {key[1:]: n for key, n in listed.items() if n and key[0] == "one"} == truth
        assert contents(tmp_path) == before


class Gate:
    """Hold back the listings of an API until they are let through."""

    def __init__(self, stage: Stage) -> None:
        self._passes = threading.Semaphore(0)
        self._open, self._stage = True, stage
        self.held = 0
        stage.api.fault = self._wait

    def _wait(self, path: str) -> None:
        if path == LIST_PATH and not self._open:
            self.held += 1
            self._passes.acquire()

    def close(self) -> None:
        self._open = False

    def let_one_through(self) -> None:
        self._passes.release()

    def open(self) -> None:
        self._open = True
        self._passes.release(1000)


@contextmanager
def gated(stage: Stage) -> Iterator[Gate]:
    gate = Gate(stage)
    try:
        yield gate
    finally:
        gate.open()


def test_a_hundred_scrapes_share_one_listing_and_none_waits_beyond_its_deadline(tmp_path: Path) -> None:
    with Stage() as stage, Exporter(tmp_path, config=stage.config()) as exporter, gated(stage) as gate:
        old = exporter.scrape()
        gate.close()
        listings, files = stage.listings(), exporter.open_files()
        with ThreadPoolExecutor(100) as pool:
            answers = [pool.submit(requests.get, exporter.url + "/metrics", timeout=60) for _ in range(100)]
            eventually(lambda: gate.held == 1 and exporter.open_files() >= files + 100, 30, "all wait")
            assert exporter.get("/-/healthy").ok
            gate.let_one_through()
        assert {answer.result().status_code for answer in answers} == {200}
        assert gate.held == 1
        assert stage.listings() == listings + 1

        stage.time.jump(60)
        tasks_family = PREFIX + "tasks"
        listed = old.values(tasks_family, "model", "status")
        started = monotonic()
        late = exporter.scrape(scrape_timeout=1)
        assert 0.4 < monotonic() - started < 2  # 0.5 s, or a second more on a busy machine
        assert late.values(tasks_family, "model", "status") == listed
        assert late.value("creatify_up") == 1
        assert gate.held == 2
        gate.let_one_through()

        def newest() -> bool:
            scrape = exporter.scrape(scrape_timeout=1)
            return scrape.values(tasks_family, "model", "status").items() >= stage.listed().items()

        eventually(newest, 20, "the listing that took too long becomes the newest")
        exporter.scrape(scrape_timeout=1)
        assert gate.held == 3
        gate.open()
        assert exporter.scrape().value("creatify_exporter_listing_errors_total", cause="timeout") == 0


def assert_wholesome(text: str, openmetrics: str) -> None:
    """Check that promtool has nothing to say, and that neither format has a label set twice."""
    (promtool,) = require("promtool")
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    for exposition, is_openmetrics in ((text, False), (openmetrics, True)):
        families = parse(exposition, openmetrics=is_openmetrics).families.values()
        samples = [(s.name, *sorted(s.labels.items())) for family in families for s in family.samples]
        assert len(samples) == len(set(samples))
        assert not [line for line in exposition.splitlines() if "_created" in line]
    assert openmetrics.endswith("# EOF\n")


def test_several_workspaces_are_wholesome_together_and_one_by_one(tmp_path: Path) -> None:
    names = ["marketing", 'sales "north" \\ <b>&', "düsseldorf"]
    with Stage(*names, history=300) as stage, Exporter(tmp_path, config=stage.config()) as exporter:
        stage.baseline()
        exporter.scrape()
        stage.time.jump(300)
        everything = stage.wait_until_exact(exporter)
        openmetrics = exporter.get("/metrics", headers={"Accept": OPENMETRICS})
        assert openmetrics.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert exporter.get("/metrics").headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert_wholesome(everything.text, openmetrics.text)
        exemplars = [
            sample.exemplar.labels["task_id"]
            for sample in parse(openmetrics.text, openmetrics=True).families[PREFIX + "failures"].samples
            if sample.exemplar
        ]
        assert exemplars
        assert set(exemplars) <= {one.id for each in stage.simulations.values() for one in each.tasks}

        listings = stage.listings()
        one = exporter.get("/metrics", params={"workspace": names[1]})
        assert stage.listings() == listings + 1
        both = exporter.get("/metrics", params={"workspace": names[:2]}, headers={"Accept": OPENMETRICS})
        assert stage.listings() == listings + 3
        assert_wholesome(one.text, both.text)
        for answer, chosen, in_openmetrics in ((one, names[1:2], False), (both, names[:2], True)):
            families = parse(answer.text, openmetrics=in_openmetrics).families.values()
            workspaces = {sample.labels.get("workspace") for family in families for sample in family.samples}
            assert workspaces == set(chosen)
        assert exporter.get("/metrics", params={"workspace": "nobody"}).status_code == 404
        assert exporter.get("/metrics", params={"workspace": [names[0], "nobody"]}).status_code == 404

        host = exporter.url.removeprefix("http://")
        found = exporter.get("/sd").json()
        assert [each["targets"] for each in found] == [[host]] * 3
        assert [each["labels"]["__param_workspace"] for each in found] == names
        assert [each["labels"]["instance"] for each in found] == [f"{host}/{name}" for name in names]
        page = exporter.get("/").text
        assert "sales &#34;north&#34; \\ &lt;b&gt;&amp;" in page
        assert "3 of 3" in page


def reload(exporter: Exporter) -> requests.Response:
    return exporter.session.post(exporter.url + "/-/reload", timeout=30)


def gauges(exporter: Exporter) -> tuple[float, float]:
    """Return whether the last reload succeeded, and when one did."""
    scrape = exporter.scrape()
    name = "creatify_exporter_config_last_reload_success"
    return scrape.values(name + "ful")[()], scrape.values(name + "_timestamp_seconds")[()]


def test_a_reload_takes_all_or_nothing_whichever_way_it_is_asked_for(tmp_path: Path) -> None:
    with Stage("one", "two") as stage, Exporter(tmp_path, config=stage.config()) as exporter:
        config = stage.config()
        assert reload(exporter).status_code == 403
        stage.baseline()
        exporter.scrape()
        stage.time.jump(60)
        stage.wait_until_exact(exporter)

        def by_signal() -> None:
            seen = exporter.log().count("level=error") + exporter.log().count("event=reloaded")
            exporter.signal(signal.SIGHUP)
            eventually(
                lambda: exporter.log().count("level=error") + exporter.log().count("event=reloaded") > seen,
                20,
                "reloaded",
            )

        exporter.stop()
        exporter.flags.append("--web.enable-lifecycle")
        exporter.start()
        stage.wait_until_exact(exporter)
        succeeded = gauges(exporter)
        assert succeeded[0] == 1
        wrong = {
            "workspaces[1].name": config | {"workspaces": [dict(one, name="one") for one in config["workspaces"]]},
            "listing.max_age": stage.config(listing={"max_age": "long"}),
            "nonsense": config | {"nonsense": 1},
            "ledger.url": stage.config(ledger={"url": "sqlite:///other.db"}),
        }
        for path, content in wrong.items():
            exporter.configure(content)
            answer = reload(exporter)
            assert answer.status_code == 500
            assert f"{path}: " in answer.text
            assert gauges(exporter) == (0, succeeded[1])
        exporter.configure({"nonsense": 1, "listing": {"max_age": "long"}, "workspaces": []})
        assert [line.partition(":")[0] for line in sorted(reload(exporter).text.splitlines())] == [
            "listing.max_age", "nonsense", "workspaces",
        ]  # fmt: skip
        by_signal()
        assert gauges(exporter) == (0, succeeded[1])
        assert not (tmp_path / "other.db").exists()
        stage.wait_until_exact(exporter)

        exporter.configure(config | {"workspaces": config["workspaces"][:1]})
        by_signal()
        successful, at = gauges(exporter)
        assert successful == 1
        assert at > succeeded[1]
        scrape = exporter.scrape()
        assert {key[1] for key in counter_series(scrape)} == {"one"}
        assert exporter.get("/metrics", params={"workspace": "two"}).status_code == 404
        stage.time.jump(60)
        stage.wait_until_exact(exporter, "one")
        exporter.configure(stage.config(failure_reasons={"rules": [{"reason": "rules_are_read", "match": "."}]}))
        assert reload(exporter).text == "reloaded\n"
        failed = exporter.scrape().values(PREFIX + "failed_tasks", "workspace", "model", "reason")
        assert {reason for _, _, reason in failed} == {"rules_are_read", "unspecified"}
        joined = counter_series(exporter.scrape())
        assert joined["failures_total", "one", "gemini-2.5-pro", "rules_are_read"] == 0
        assert sum(n for key, n in joined.items() if key[:2] == ("tasks_submitted_total", "two")) == sum(
            stage.truth("two").submitted.values()
        )
        assert "Traceback" not in exporter.log()


def test_a_listing_under_former_credentials_is_discarded(tmp_path: Path) -> None:
    release = threading.Event()

    def held(exchange: Exchange) -> None:
        release.wait(30)
        exchange.reply([task(n, model_name="former") for n in range(5)])

    with Upstream(former=held, present=tasks(task(7))) as api:
        config = api.config("former")
        with Exporter(tmp_path, "--web.enable-lifecycle", config=config) as exporter, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(exporter.scrape, scrape_timeout=60)
            eventually(lambda: api.listings("former"), 20, "the listing runs")
            api_id, api_key = credentials("present")
            exporter.configure(config | {"workspaces": [{"name": "former", "api_id": api_id, "api_key": api_key}]})
            assert reload(exporter).ok
            # Whoever waited is not kept waiting for what nobody wants any more.
            assert "former" not in models(waiting.result(10))
            assert models(exporter.scrape()) == {"m"}
            release.set()
            for _ in range(3):
                scrape = exporter.scrape()
                assert models(scrape) == {"m"}
                assert scrape.value("creatify_exporter_ledger_tasks") == 1
            errors = scrape.values("creatify_exporter_listing_errors_total", "cause")
            assert set(errors.values()) == {0}


def models(scrape: Scrape) -> set[str]:
    return {model for (model,) in {key[:1] for key in scrape.values(PREFIX + "tasks", "model", "status")}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_answers_waiting_scrapes_with_what_is_there(tmp_path: Path, number: signal.Signals) -> None:
    answers: dict[str, Callable[[Exchange], None]] = {"good": tasks(task()), "hang": lambda exchange: exchange.hang()}
    with (
        Upstream(**answers) as api,
        ThreadPoolExecutor(1) as pool,
        Exporter(tmp_path, config=api.config()) as exporter,
    ):
        waiting = pool.submit(exporter.scrape, scrape_timeout=60)
        eventually(lambda: api.listings("hang") and api.listings("good"), 20, "the listing runs")
        started = monotonic()
        exporter.signal(number)
        assert exporter.wait(20) == 0
        assert monotonic() - started < 5
        assert waiting.result().values("creatify_up", "workspace")["hang",] == 0
        assert "Traceback" not in exporter.log()


def test_the_log_has_a_line_when_a_listing_fails_and_when_it_works_again(tmp_path: Path) -> None:
    api = Upstream(flaky=tasks(task()), steady=tasks(task()))
    with api, Exporter(tmp_path, "--log.format=json", config=api.config()) as exporter:

        def events() -> list[dict[str, Any]]:
            return [json.loads(line) for line in exporter.log().splitlines()]

        for _ in range(3):
            exporter.scrape()
        assert [event["event"] for event in events()] == ["listening"]
        api.answers["flaky"] = lambda exchange: exchange.reply({"detail": "words of the API"}, 502)
        for _ in range(2):
            exporter.scrape()
        api.answers["flaky"] = tasks(task())
        for _ in range(3):
            exporter.scrape()
        assert exporter.stop() == 0
        _, *lines, last = events()
        failed, again, recovered = lines
        for line in (failed, again):
            assert (line["level"], line["workspace"], line["cause"], line["status"]) == (
                "warning",
                "flaky",
                "http",
                502,
            )
        assert (recovered["level"], recovered["workspace"]) == ("info", "flaky")
        assert last["event"] == "stopped"
        assert "words of the API" not in exporter.log()


NAIVE = """
import os, requests, sys
from collections import Counter
session = requests.Session()
session.trust_env = False
headers = {"X-API-ID": "id-of-big", "X-API-KEY": "key-of-big"}
statuses = Counter()
before = sum(os.times()[:2])
for task in session.get(sys.argv[1] + "/sse/text_generator/", headers=headers, timeout=60).json():
    statuses[task["model_name"], task["status"]] += 1
print(sum(os.times()[:2]) - before, sum(statuses.values()))
"""


def peak_memory(pid: int) -> int:
    """Return the peak resident memory of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def test_a_hundred_thousand_tasks_take_little_memory_and_less_time_than_the_naive_way(tmp_path: Path) -> None:
    with Upstream(big=lambda exchange: exchange.stream(listing(100_000))) as api:
        with Exporter(tmp_path, config=api.config()) as exporter:
            before = exporter.cpu_seconds()
            scrape = exporter.scrape(scrape_timeout=100)  # the first, for which the ledger costs most
            used = exporter.cpu_seconds() - before
            assert sum(scrape.values(PREFIX + "tasks", "model", "status").values()) == 100_000
            assert (scrape.value("creatify_exporter_listing_size_bytes") or 0) > 260_000_000
            assert peak_memory(exporter.pid) < 120_000_000
        naive, count = run(sys.executable, "-c", NAIVE, api.url).stdout.split()
        assert int(count) == 100_000
        assert used < float(naive)
