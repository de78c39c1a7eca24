"""Counters against the truth while the exporter, its disk and its database fail: real processes, real databases."""

import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import psycopg
import pytest

from creatify_exporter.demo import Model
from creatify_exporter.ledger import Ledger
from creatify_exporter.tasks import NANO
from tests.support.clock import DAY, STEPS, WrongClock
from tests.support.commands import run
from tests.support.exporter import Exporter
from tests.support.lister import credits_of, ends, list_once
from tests.support.load import Scraping
from tests.support.postgres import PASSWORD, Postgres, Proxy
from tests.support.processes import eventually
from tests.support.prometheus import Prometheus
from tests.support.records import counted
from tests.support.stage import PREFIX, Stage, Watch, counter_series, counts

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as running:
        yield running


def count_from_here(stage: Stage, exporter: Exporter) -> None:
    """Make the first listing the baseline, and show every series once at 0."""
    stage.baseline()
    assert counts(exporter.scrape()) == {}
    assert set(counter_series(exporter.scrape()).values()) == {0.0}


Silence = Callable[[], AbstractContextManager[None]]


def kill_again_and_again(stage: Stage, exporter: Exporter, clock: WrongClock, silence: Silence, times: int) -> None:
    """Kill the exporter at random moments of constant scraping; it starts again each time.

    Meanwhile its clock and that of the API are stepped by days, before and while it runs, and every other time its
    ledger has just gone silent, once for so long that the exporter gives it up.
    """
    chance = random.Random(times)
    with Scraping(exporter, threads=2, pause=0.05) as scraping:
        for number in range(times):
            scraping.wait_for(1)
            clock.step(chance.choice(STEPS))
            stage.api.offset = chance.choice((-3 * DAY, 0, 3 * DAY))
            with ExitStack() as stack:
                if number % 2:
                    stack.enter_context(silence())
                if number == 1:
                    eventually(lambda: exporter.get("/-/ready").status_code == 503, 30, "the ledger is missed")
                threading.Event().wait(chance.uniform(0, 0.4))  # the moment is what is random here
                exporter.kill()
            clock.step(chance.choice(STEPS))
            exporter.start(within=90)
    assert scraping.answers > times
    assert scraping.lost > 0
    stage.time.run(0)
    stage.api.offset = 0
    clock.step(100 * DAY)
    offset = stage.wait_until_exact(exporter).value("creatify_exporter_clock_offset_seconds")
    assert offset == pytest.approx(100 * DAY, abs=DAY)


@contextmanager
def locked(ledger: Path) -> Iterator[None]:
    """Hold the lock of a SQLite file, as another process does."""
    with closing(sqlite3.connect(ledger, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def silenced(proxy: Proxy, chance: random.Random) -> Iterator[None]:
    """Let nothing through, or no answer; at the end what was asked arrives, or is lost."""
    proxy.silence(answers_only=chance.random() < 0.5)
    yield
    if chance.random() < 0.5:
        proxy.lose_connections()
    proxy.resume()


@pytest.mark.soak
def test_a_kill_while_the_ledger_is_made_does_not_stop_the_next_start(tmp_path: Path, soak: bool) -> None:
    chance = random.Random(7)
    with Stage() as stage:
        for number in range(50 if soak else 3):
            exporter = Exporter(tmp_path / str(number), config=stage.config())
            exporter.launch()
            ledger = exporter.directory() / "creatify-exporter.db"
            eventually(ledger.exists, 30, "the file is there", every=0.001)
            threading.Event().wait(chance.uniform(0, 0.03))  # the moment is what is random here
            exporter.kill()
            with exporter:
                assert exporter.scrape().value("creatify_exporter_ledger_up") == 1
                assert set(counter_series(exporter.scrape()).values()) == {0.0}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_kills_at_random_moments_lose_nothing_and_double_nothing(tmp_path: Path, soak: bool) -> None:
    clock, ledger = WrongClock(tmp_path), tmp_path / "creatify-exporter.db"
    with (
        Stage(rate=6) as stage,
        Exporter(tmp_path, config=stage.config(), environment=clock.environment) as exporter,
    ):
        count_from_here(stage, exporter)
        stage.time.run(10)
        kill_again_and_again(stage, exporter, clock, partial(locked, ledger), 300 if soak else 10)
        assert sum(stage.truth().submitted.values()) > 1000
        assert exporter.stop() == 0
        assert "Traceback" not in exporter.log()
        with closing(sqlite3.connect(ledger)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_kills_at_random_moments_lose_nothing_in_postgresql(tmp_path: Path, postgres: Postgres, soak: bool) -> None:
    clock = WrongClock(tmp_path)
    with Stage(rate=6) as stage, Proxy(postgres.port) as proxy:
        config = stage.config(ledger={"url": proxy.url(postgres.create_database())})
        silence = partial(silenced, proxy, random.Random(0))
        with Exporter(tmp_path, config=config, environment=clock.environment) as exporter:
            count_from_here(stage, exporter)
            stage.time.run(10)
            kill_again_and_again(stage, exporter, clock, silence, 100 if soak else 4)
            assert exporter.stop() == 0
            assert "Traceback" not in exporter.log()


@pytest.mark.soak
@pytest.mark.parametrize(("backend", "replicas"), [("sqlite", 1), ("postgresql", 2)])
def test_kills_lose_no_end_of_a_task_that_left_the_list(
    tmp_path: Path, postgres: Postgres, soak: bool, backend: str, replicas: int
) -> None:
    """The API lists a window only; whatever was listed once is counted to its end, by its id.

    The clocks are stepped by days all the time, and every other time the ledger is silent in the end.
    """
    url = f"sqlite:///{tmp_path}/ledger.db" if backend == "sqlite" else postgres.create_database()
    chance, clock, tick = random.Random(replicas), tmp_path / "clock", 0

    def tell_the_time() -> None:
        (tmp_path / "next").write_text(f"{tick} {chance.choice(STEPS)}")
        (tmp_path / "next").rename(clock)

    with closing(Ledger(url)) as ledger:
        list_once(ledger, 0, [])
    with Proxy(postgres.port) as proxy:
        command = [sys.executable, "-m", "tests.support.lister", proxy.url(url), str(clock)]
        silence = partial(locked, tmp_path / "ledger.db") if backend == "sqlite" else partial(silenced, proxy, chance)
        for number in range(60 if soak else 4):
            tick += chance.randrange(1, 3)
            tell_the_time()
            running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(replicas)]
            with ExitStack() as stack:
                for process in running:
                    stack.callback(process.communicate)
                    stack.callback(process.kill)
                for _ in range(4):
                    for process in running:
                        assert process.stdout
                        assert process.stdout.readline() == "listed\n"
                    tick += 1
                    tell_the_time()
                if number % 2:
                    stack.enter_context(silence())
                threading.Event().wait(chance.uniform(0, 0.05))  # the moment is what is random here
                for process in running:
                    process.kill()
    with closing(Ledger(url)) as ledger:
        book = ledger.book("w")
        for hour in range(1, 1000):  # every task has ended, and nothing is listed any more
            list_once(ledger, tick + 61 * hour, [])
            if book.totals and not book.totals.unsettled:
                break
        known = ledger.transact(lambda tx: tx.exec_driver_sql("SELECT id FROM tasks").scalars().all())
        numbers = [int(task_id.removeprefix("task-")) for task_id in known]
        ended = Counter(map(ends, numbers))
        assert len(numbers) >= 70
        assert counted(book) == {
            ("m", "submitted", ""): len(numbers),
            ("m", "finished", "done"): ended["done"],
            ("m", "finished", "failed"): ended["failed"],
            ("m", "failures", "timeout"): ended["failed"],
            ("m", "credits", ""): round(sum(map(credits_of, numbers)) * NANO),
        }


def test_replicas_on_one_postgresql_ledger_agree_whatever_happens_to_it(tmp_path: Path, postgres: Postgres) -> None:
    with Stage("first", "second", rate=10) as stage, ExitStack() as stack:
        config = stage.config(ledger={"url": postgres.create_database()})
        replicas = [Exporter(tmp_path / name, config=config) for name in ("one", "two")]
        stage.baseline()
        for replica in replicas:
            replica.launch()  # both at once: one of them makes the tables
        for replica in replicas:
            stack.enter_context(replica)
            eventually(replica.ready, 30, "a replica answers")
        for replica in (*replicas, *replicas):
            replica.scrape()
        stage.time.run(10)
        one, two = (stack.enter_context(Scraping(replica, threads=2)) for replica in replicas)

        def both_go_on() -> None:
            one.wait_for(4)
            two.wait_for(4)

        both_go_on()
        postgres.end_sessions()
        both_go_on()
        postgres.stop()
        eventually(lambda: replicas[0].scrape().value("creatify_exporter_ledger_up") == 0, 20, "the ledger is missed")
        both_go_on()
        assert replicas[1].scrape().value("creatify_up", workspace="first") == 1
        assert replicas[1].get("/-/ready").status_code == 503
        postgres.start()
        eventually(lambda: replicas[0].get("/-/ready").ok, 20, "the ledger is back")
        both_go_on()
        replicas[1].kill()
        replicas[1].start()
        both_go_on()
        stage.time.run(0)
        shown = [counter_series(stage.wait_until_exact(replica)) for replica in replicas]
        assert shown[0] == shown[1]
        assert sum(shown[0].values()) > 1000
        errors = replicas[0].scrape().values("creatify_exporter_listing_errors_total", "workspace", "cause")
        assert errors["first", "ledger"] > 0
        assert {cause for (_, cause), count in errors.items() if count} == {"ledger"}


def test_a_database_that_is_down_at_the_start_is_waited_for(tmp_path: Path, postgres: Postgres) -> None:
    with Stage() as stage:
        config = stage.config(ledger={"url": postgres.create_database()})
        postgres.stop()
        try:
            with Exporter(tmp_path, config=config) as exporter:
                assert exporter.get("/-/ready").status_code == 503
                assert exporter.get("/-/healthy").ok
                for scrape in (exporter.scrape(), exporter.scrape()):
                    assert scrape.value("creatify_up") == 1
                    assert scrape.value("creatify_exporter_ledger_up") == 0
                    assert counter_series(scrape) == {}
                    assert "creatify_exporter_ledger_tasks" not in scrape.families
                    assert scrape.value(PREFIX + "tasks", model="gemini-2.5-pro", status="done")
                assert scrape.value("creatify_exporter_listing_errors_total", cause="ledger") == 2
                postgres.start()
                eventually(lambda: exporter.scrape().value("creatify_exporter_ledger_up") == 1, 20, "the ledger")
                assert exporter.get("/-/ready").ok
                stage.baseline()
                assert set(counter_series(exporter.scrape()).values()) == {0.0}
                stage.time.jump(30)
                stage.wait_until_exact(exporter)
                assert PASSWORD not in exporter.log()
        finally:
            if not postgres.running():
                postgres.start()


def test_a_postgresql_that_goes_silent_leaves_the_gauges_fresh_and_is_back_with_the_network(
    tmp_path: Path, postgres: Postgres
) -> None:
    with Stage() as stage, Proxy(postgres.port) as proxy:
        config = stage.config(ledger={"url": proxy.url(postgres.create_database())})
        with Exporter(tmp_path, config=config) as exporter:
            count_from_here(stage, exporter)
            stage.time.jump(30)
            before = counts(stage.wait_until_exact(exporter))
            proxy.silence()
            stage.time.jump(30)

            def fresh_without_the_ledger() -> bool:
                scrape = exporter.scrape()
                listed = scrape.values(PREFIX + "tasks", "model", "status")
                assert counts(scrape) == before
                return (
                    scrape.value("creatify_exporter_ledger_up") == 0
                    and scrape.value("creatify_up") == 1
                    and {key: n for key, n in listed.items() if n} == stage.listed()
                )

            for _ in range(2):
                eventually(fresh_without_the_ledger, 25, "gauges are fresh, and the ledger is missed")
                stage.time.jump(30)
            assert exporter.get("/-/ready").status_code == 503
            proxy.resume()
            eventually(lambda: exporter.get("/-/ready").ok, 10, "the ledger is back")
            stage.wait_until_exact(exporter)
            assert "the ledger cannot record" in exporter.log()


class FileSizeLimit:
    """Let no file of the exporter grow."""

    def __init__(self, exporter: Exporter) -> None:
        self._process = psutil.Process(exporter.pid)

    def fill(self) -> None:
        self._process.rlimit(psutil.RLIMIT_FSIZE, (16 * 1024, resource.RLIM_INFINITY))

    def free(self) -> None:
        self._process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class SmallDisk:
    """Fill the file system on which the ledger lies."""

    def __init__(self, directory: Path) -> None:
        self._ballast = directory / "ballast"

    def fill(self) -> None:
        with self._ballast.open("wb", buffering=0) as ballast, suppress(OSError):
            while ballast.write(bytes(4096)):
                pass

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {mounted.stderr.strip()}")
    yield disk
    run("umount", "--lazy", disk)


def lose_nothing_while_full(stage: Stage, exporter: Exporter, disk: FileSizeLimit | SmallDisk) -> None:
    watch = Watch()
    count_from_here(stage, exporter)
    for _ in range(2):
        stage.time.jump(60)
        watch.check(stage.wait_until_exact(exporter).text)
        disk.fill()

        def fails() -> bool:
            stage.time.jump(60)  # the write-ahead log may still have room
            return exporter.scrape().value("creatify_exporter_ledger_up") == 0

        eventually(fails, 20, "the ledger is missed")
        before = counts(exporter.scrape())
        stage.time.jump(60)
        scrape = exporter.scrape()
        watch.check(scrape.text)
        assert scrape.value("creatify_up") == 1
        assert scrape.value("creatify_exporter_ledger_up") == 0
        assert counts(scrape) == before
        listed = scrape.values(PREFIX + "tasks", "model", "status")
        assert {key: n for key, n in listed.items() if n} == stage.listed()
        disk.free()
        watch.check(stage.wait_until_exact(exporter).text)
        assert exporter.get("/-/ready").ok
    errors = exporter.scrape().values("creatify_exporter_listing_errors_total", "cause")
    assert errors["ledger",] >= 2
    assert sum(errors.values()) == errors["ledger",]
    assert exporter.log().count("the ledger cannot record") == 2
    assert exporter.log().count("the ledger records again") == 2


def test_a_ledger_file_that_cannot_grow_loses_nothing(tmp_path: Path) -> None:
    with Stage(rate=20) as stage, Exporter(tmp_path, config=stage.config()) as exporter:
        lose_nothing_while_full(stage, exporter, FileSizeLimit(exporter))


def test_a_full_disk_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    with Stage(rate=20) as stage:
        config = stage.config(ledger={"url": f"sqlite:///{small_disk}/ledger.db"})
        with Exporter(tmp_path, config=config) as exporter:
            lose_nothing_while_full(stage, exporter, SmallDisk(small_disk))


def test_prometheus_sees_the_truth_through_restarts_and_the_first_failures_of_a_new_model(tmp_path: Path) -> None:
    models = (
        Model("steady", 3, 0.5, 0.2, 25),
        Model("doomed", 3, 0.5, 1.0, 10, since=40.0),
    )
    with Stage(models=models, rate=5) as stage:
        config = stage.config(exposition={"zero_hold": "2s"})
        with Exporter(tmp_path, config=config) as exporter:
            target = {"job_name": "creatify", "static_configs": [{"targets": [f"127.0.0.1:{exporter.port}"]}]}
            settings = {"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"}, "scrape_configs": [target]}
            stage.baseline()
            with Prometheus(tmp_path / "prometheus", settings) as prometheus:
                prometheus.wait_for_scrapes(2)

                def scrapes() -> int:
                    return len(prometheus.query("up[1h]")[0].points)

                def more_than(count: int) -> bool:
                    return scrapes() > count

                stage.time.run(10)
                for end in (exporter.stop, exporter.kill, exporter.stop):
                    eventually(partial(more_than, scrapes() + 3), 20, "more scrapes")
                    end()
                    exporter.start()
                eventually(lambda: stage.truth().finished["doomed", "failed"] > 20, 30, "failures of the new model")
                stage.time.run(0)
                expected = stage.expected()

                def increases() -> dict[tuple[str, ...], float]:
                    found = {}
                    for family, label in (
                        ("tasks_submitted", None),
                        ("tasks_finished", "status"),
                        ("failures", "reason"),
                        ("credits_used", None),
                    ):
                        sample = f"{family}_total"
                        for series in prometheus.query(f"{PREFIX}{sample}[1h]"):
                            values = [value for _, value in series.points]
                            assert values == sorted(values), f"{series.labels} fell"
                            assert values[0] == 0, f"{series.labels} was born at {values[0]}"
                            if values[-1]:
                                key = (series.labels[name] for name in ("model", label) if name)
                                found[sample, *key] = values[-1] - values[0]
                    return found

                totals = {key: value for key, value in expected.items() if key[0].endswith("_total")}
                eventually(lambda: increases() == totals, 30, "the increase of raw samples equals the truth")
                scrape = stage.wait_until_exact(exporter)
                failures = sum(n for key, n in totals.items() if key[:2] == ("failures_total", "doomed"))
                seen = prometheus.values(f'sum(increase({PREFIX}failures_total{{model="doomed"}}[1h]))')
                assert seen[()] == pytest.approx(failures, rel=0.15)
                listed = prometheus.values(PREFIX + "tasks", "model", "status")
                assert {key: n for key, n in listed.items() if n} == stage.listed()
                for gauge in ("creatify_remaining_credits", "creatify_up", "creatify_exporter_ledger_tasks"):
                    assert prometheus.values(gauge) == {(): scrape.value(gauge)}
                assert prometheus.values("creatify_remaining_credits") == {
                    (): stage.simulations["main"].balance(stage.time())
                }


class Unprivileged(Exporter):
    """An exporter whose root may no more than any user: without this, no directory is read-only to it."""

    def command(self) -> Sequence[str]:
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"] if os.geteuid() == 0 else []
        return [*drop, *super().command()]


def refusals(*exporters: Exporter) -> list[str]:
    """Return the one line that each of some exporters prints before it exits with 1."""
    for exporter in exporters:
        exporter.launch()
    for exporter in exporters:
        assert exporter.wait(60) == 1, exporter.log_file
        assert exporter.log().count("\n") == 1, exporter.log()
    return [exporter.log() for exporter in exporters]


def make_ledger(stage: Stage, directory: Path) -> Path:
    """Return the file of a ledger that an exporter has written and closed."""
    with Exporter(directory, config=stage.config()) as exporter:
        exporter.scrape()
        assert exporter.stop() == 0
    exporter.log_file.unlink()
    return directory / "creatify-exporter.db"


def all_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".log"}


def test_a_ledger_that_cannot_be_used_stops_the_start_and_is_left_alone(tmp_path: Path) -> None:
    with Stage() as stage:
        original = make_ledger(stage, tmp_path / "original").read_bytes()
        directories = []

        def copy(name: str, content: bytes = original) -> Path:
            directories.append(tmp_path / name)
            directories[-1].mkdir()
            (directories[-1] / "creatify-exporter.db").write_bytes(content)
            return directories[-1] / "creatify-exporter.db"

        copy("random", random.Random(1).randbytes(8192))
        middle = len(original) // 8192 * 4096
        copy("corrupt", original[:middle] + random.Random(2).randbytes(4096) + original[middle + 4096 :])
        copy("cut-short", original[: len(original) // 2])
        for name, statement in {
            "newer": "UPDATE ledger_version SET version = 3",
            "foreign": "DROP TABLE ledger_version",
            "table-gone": "DROP TABLE tasks",
        }.items():
            with closing(sqlite3.connect(copy(name))) as connection:
                connection.execute(statement)
                connection.commit()
        exporters = [Exporter(directory, config=stage.config()) for directory in directories]
        before = [all_bytes(directory) for directory in directories]
        for directory, line in zip(directories, refusals(*exporters), strict=True):
            assert "ledger sqlite:///creatify-exporter.db: " in line, (directory, line)
        assert [all_bytes(directory) for directory in directories] == before


@pytest.mark.parametrize("content", ["with a ledger", "empty"])
def test_a_read_only_directory_stops_the_start(tmp_path: Path, content: str) -> None:
    directory = tmp_path / "ledger"
    with Stage() as stage:
        if content == "empty":
            directory.mkdir()
        else:
            make_ledger(stage, directory).chmod(0o444)
        before = all_bytes(directory)
        directory.chmod(0o555)
        config = stage.config(ledger={"url": f"sqlite:///{directory}/creatify-exporter.db"})
        try:
            (line,) = refusals(Unprivileged(tmp_path / "run", config=config))
        finally:
            directory.chmod(0o755)
        assert f"ledger sqlite:///{directory}/creatify-exporter.db: " in line
        assert all_bytes(directory) == before


def test_a_wrong_password_or_a_database_that_does_not_exist_stops_the_start(tmp_path: Path, postgres: Postgres) -> None:
    secret = "a-wrong-password-48151623"
    with Stage() as stage:
        urls = postgres.url("postgres", secret), postgres.url("no_such_database")
        configs = [stage.config(ledger={"url": url}) for url in urls]
        for line in refusals(*(Exporter(tmp_path / str(n), config=one) for n, one in enumerate(configs))):
            assert f"ledger postgresql://exporter:***@127.0.0.1:{postgres.port}/" in line
            assert secret not in line
            assert PASSWORD not in line


def test_a_newer_schema_or_foreign_tables_in_postgresql_stop_the_start(tmp_path: Path, postgres: Postgres) -> None:
    with Stage() as stage:
        url = postgres.create_database()
        config = stage.config(ledger={"url": url})
        with Exporter(tmp_path / "first", config=config) as exporter:
            exporter.scrape()
        for statement in ("UPDATE ledger_version SET version = 3", "DROP TABLE ledger_version"):
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(statement)
                before = connection.execute("SELECT * FROM totals ORDER BY 1, 2, 3, 4").fetchall()
            (line,) = refusals(Exporter(tmp_path / statement.split()[0], config=config))
            assert f"ledger postgresql://exporter:***@127.0.0.1:{postgres.port}/" in line
            with psycopg.connect(url) as connection:
                assert connection.execute("SELECT * FROM totals ORDER BY 1, 2, 3, 4").fetchall() == before
