"""Single flight, deadlines, freshness, reloads: the exporter in this process, a real API and ledger, no real clock."""

import asyncio
import functools
import sqlite3
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import structlog
import trustme
from structlog.testing import capture_logs

from creatify_exporter import service
from creatify_exporter.api import Client
from creatify_exporter.attempt import Clock
from creatify_exporter.config import Config
from creatify_exporter.ledger import Book, Ledger
from creatify_exporter.once import reasons
from creatify_exporter.service import Service
from creatify_exporter.tasks import TaskReader
from tests.support.exporter import Scrape, parse
from tests.support.upstream import Exchange, Upstream, task, tasks

P = ParamSpec("P")
NOW = "2025-10-09T08:53:20Z"
UP = "creatify_up"
SUBMITTED = "creatify_text_generator_tasks_submitted_total"
TASKS = "creatify_text_generator_tasks"
ERRORS = "creatify_exporter_listing_errors_total"
BALANCE = "creatify_remaining_credits"
NO_BALANCE = {"remaining_credits": False}
"""For tests in which it does not matter, for it may come a little before or after the listing."""


def asynchronous(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def whole() -> None:
            await test(*args, **kwargs)

        asyncio.run(asyncio.wait_for(whole(), 60))

    return run


async def until(check: Callable[[], bool]) -> None:
    """Let the others work until it is so."""
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.005)


class Gate:
    """An answer that is held back until the gate is opened."""

    def __init__(self, answer: Callable[[Exchange], None]) -> None:
        self._answer, self._opened = answer, threading.Event()

    def __call__(self, exchange: Exchange) -> None:
        while not self._opened.wait(0.01) and not exchange.upstream.ended.is_set():
            pass
        self._answer(exchange)

    def open(self) -> None:
        self._opened.set()


def refuse(status: int, **headers: str) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.reply({"detail": "upstream's own words"}, status, **headers)


class Scene:
    """An exporter on a stage: its API, its ledger file, and the time, which passes when told to."""

    def __init__(self, api: Upstream, directory: Path) -> None:
        self.api, self.seconds, self.path = api, 0.0, directory / "ledger.db"
        self.clock = Clock(now=lambda: 1_760_000_000 + self.seconds, monotonic=lambda: 5000 + self.seconds)
        api.clock = self.clock.now
        self.ledger = Ledger(f"sqlite:///{self.path}")
        self.exporters: list[Service] = []

    def config(self, *names: str, **sections: Any) -> Config:
        return Config.model_validate(self.api.config(*names, **sections))

    def start(self, *names: str, writes: bool = True, **sections: Any) -> Service:
        exporter = Service(self.config(*names, **sections), self.ledger, clock=self.clock, writes=writes)
        self.exporters.append(exporter)
        return exporter

    async def scrape(self, *names: str, timeout: float = 30) -> Scrape:
        return parse((await self.exporters[-1].scrape(frozenset(names) or None, timeout, False)).decode())

    def on_ledger(self, statement: str) -> None:
        connection = sqlite3.connect(self.path)
        with connection:
            connection.execute(statement)
        connection.close()


@pytest.fixture
def api() -> Iterator[Upstream]:
    with Upstream(w=tasks(task())) as api:
        yield api


@pytest.fixture
def scene(api: Upstream, tmp_path: Path) -> Iterator[Scene]:
    structlog.reset_defaults()
    scene = Scene(api, tmp_path)
    yield scene
    for exporter in scene.exporters:
        exporter.stop()
    scene.ledger.close()


def listed(scrape: Scrape, workspace: str = "w") -> float | None:
    return scrape.value(TASKS, workspace=workspace, status="done")


def state(scene: Scene) -> tuple[bool, float | None, str | None]:
    """Return whether the first workspace is up, how old its newest finished listing is, and why it failed."""
    view = scene.exporters[-1].views()[0]
    return view.up, None if view.finished_at is None else scene.clock.now() - view.finished_at, view.cause


def errors(scrape: Scrape, workspace: str = "w") -> dict[str, float]:
    found = scrape.values(ERRORS, "workspace", "cause")
    return {cause: count for (name, cause), count in found.items() if name == workspace and count}


# One at a time, and in time


@asynchronous
async def test_a_hundred_scrapes_at_once_cause_one_listing_and_share_one_answer(scene: Scene) -> None:
    gate = scene.api.answers["w"] = Gate(tasks(task()))
    exporter = scene.start(api=NO_BALANCE)
    scrapes = [asyncio.create_task(exporter.scrape(None, 30, False)) for _ in range(100)]
    await until(lambda: scene.api.listings("w") == 1)
    gate.open()
    answers = await asyncio.gather(*scrapes)
    assert all(answer is answers[0] for answer in answers)
    assert scene.api.listings("w") == 1


@asynchronous
async def test_each_scrape_after_a_listing_starts_a_new_one(scene: Scene) -> None:
    scene.start()
    for count in (1, 2, 3):
        scene.api.answers["w"] = tasks(*(task(number) for number in range(count)))
        assert listed(await scene.scrape()) == count
    assert scene.api.listings("w") == 3


@asynchronous
async def test_only_the_selected_workspaces_are_listed_and_shown(scene: Scene) -> None:
    scene.api.answers |= {"v": tasks(), "u": tasks()}
    scene.start()
    scrape = await scene.scrape("w", "u")
    assert scrape.values(UP, "workspace") == {("w",): 1, ("u",): 1}
    assert "creatify_exporter_ledger_up" not in scrape.families
    assert scene.api.listings("v") == 0
    assert set((await scene.scrape()).values(UP, "workspace")) == {("w",), ("v",), ("u",)}


@asynchronous
async def test_workspaces_are_listed_in_parallel_and_a_slow_one_takes_nothing_from_the_others(scene: Scene) -> None:
    gate = Gate(tasks(task()))
    scene.api.answers = {"slow": gate, "w": tasks(task())}
    exporter = scene.start()
    await scene.scrape(timeout=0.05)
    await until(lambda: exporter.views()[1].up is True)
    scrape = await scene.scrape(timeout=0.05)
    assert scrape.values(UP, "workspace") == {("slow",): 0, ("w",): 1}
    assert scene.api.listings("slow") == 1
    gate.open()
    assert (await scene.scrape()).values(UP, "workspace") == {("slow",): 1, ("w",): 1}


@asynchronous
async def test_an_answer_is_in_time_with_the_last_good_values_and_the_running_listing_becomes_the_newest(
    scene: Scene,
) -> None:
    scene.start()
    await scene.scrape()
    second = scene.api.answers["w"] = Gate(tasks(task(1), task(2, created_at=NOW)))
    for _ in range(2):  # the second scrape joins the same listing
        started = time.monotonic()
        scrape = await scene.scrape(timeout=0.1)
        assert time.monotonic() - started < 5
        assert (listed(scrape), scrape.value(UP), scrape.value(SUBMITTED)) == (1, 1, 0)
    assert scene.api.listings("w") == 2
    scene.seconds = 9
    third = scene.api.answers["w"] = Gate(tasks())
    second.open()
    await until(lambda: state(scene)[1] == 0)
    scrape = await scene.scrape(timeout=0.1)
    assert (listed(scrape), scrape.value(SUBMITTED), scene.api.listings("w")) == (2, 1, 3)
    third.open()


@asynchronous
async def test_before_the_first_listing_is_done_nothing_is_claimed(scene: Scene) -> None:
    gate = scene.api.answers["w"] = Gate(tasks(task()))
    scene.start()
    assert state(scene) == (False, None, None)
    scrape = await scene.scrape(timeout=0.05)
    assert scrape.value(UP) == 0
    claims = {name for name in scrape.families if "generator" in name or "ledger_tasks" in name}
    assert claims == {"creatify_text_generator_failure_reason_info"}
    gate.open()
    assert (await scene.scrape()).value(UP) == 1
    assert state(scene) == (True, 0, None)


@asynchronous
async def test_no_new_listing_starts_within_the_minimum_interval_after_the_start_of_the_last(scene: Scene) -> None:
    scene.start(listing={"min_interval": "30s"})
    gate = scene.api.answers["w"] = Gate(tasks(task()))
    first = asyncio.create_task(scene.scrape())
    await until(lambda: scene.api.listings("w") == 1)
    scene.seconds = 20  # the listing takes 20 of the 30 seconds
    gate.open()
    assert (await first).value("creatify_exporter_listing_duration_seconds") == 20
    scene.seconds = 29.9
    while (scrape := await scene.scrape()).value(BALANCE) is None:
        assert scrape.value(UP) == 1
    assert (listed(scrape), scene.api.listings("w"), scrape.value(BALANCE)) == (1, 1, 7)
    scene.seconds = 30
    await scene.scrape()
    await until(lambda: (scene.api.listings("w"), scene.api.looks_at_balance("w")) == (2, 2))


@asynchronous
async def test_a_listing_that_is_older_than_the_maximum_age_is_no_longer_shown_and_counters_stay(scene: Scene) -> None:
    scene.start(listing={"max_age": "1m"})
    await scene.scrape()
    gate = scene.api.answers["w"] = Gate(tasks())
    scene.seconds = 60
    assert (await scene.scrape(timeout=0.05)).value(UP) == 1
    scene.seconds = 60.125
    scrape = await scene.scrape(timeout=0.05)
    assert (scrape.value(UP), listed(scrape), scrape.value(SUBMITTED)) == (0, None, 0)
    assert scrape.value("creatify_exporter_last_success_timestamp_seconds") == 1_760_000_000
    assert state(scene) == (False, 60.125, None)
    gate.open()


@asynchronous
async def test_records_that_cannot_be_used_are_counted_and_a_second_one_of_an_id_is_skipped(scene: Scene) -> None:
    scene.api.answers["w"] = tasks(task(1), task(1, status="failed"), {"id": "no good"}, None, 7, task(2))
    scene.start()
    scrape = await scene.scrape()
    assert scrape.value("creatify_exporter_malformed_tasks") == 3
    assert (listed(scrape), scrape.value(TASKS, status="failed")) == (2, 0)
    size = scrape.value("creatify_exporter_listing_size_bytes")
    assert size is not None
    assert size > 500


# Refusals


@pytest.mark.parametrize(
    ("status", "headers", "held"),
    [
        (429, {"Retry_After": "120"}, 120),
        (429, {}, 30),
        (429, {"Retry_After": "soon"}, 30),
        (429, {"Retry_After": "86400"}, 300),
        (429, {"Retry_After": "0"}, 0),
        (503, {"Retry_After": "60"}, 60),
        (503, {}, 0),
        (500, {"Retry_After": "60"}, 0),
    ],
)
@asynchronous
async def test_a_refused_list_holds_back_listing_and_balance_and_suppressed_scrapes_count_no_error(
    scene: Scene, status: int, headers: dict[str, str], held: int
) -> None:
    scene.start()
    scene.api.answers["w"] = refuse(status, **headers)
    await scene.scrape()
    if held:
        for scene.seconds in (0, held / 2, held - 0.001):
            scrape = await scene.scrape()
            assert (scrape.value(UP), scrape.value(BALANCE)) == (0, None)
            assert errors(scrape) == {"rate_limited" if status == 429 else "http": 1}
        await until(lambda: (scene.api.listings("w"), scene.api.looks_at_balance("w")) == (1, 1))
    scene.seconds = held
    scene.api.answers["w"] = tasks(task())
    scrape = await scene.scrape()
    assert (scrape.value(UP), scene.api.listings("w")) == (1, 2)
    if held:
        await until(lambda: scene.api.looks_at_balance("w") == 2)


@asynchronous
async def test_a_refused_balance_holds_back_no_listing(scene: Scene) -> None:
    scene.start()
    scene.api.balances["w"] = refuse(429, Retry_After="60")
    requests = "creatify_exporter_api_requests_total"
    while (await scene.scrape()).value(requests, endpoint="remaining_credits", code="429") is None:
        pass
    before = scene.api.listings("w")
    for scene.seconds in (0, 30, 59.9):
        scrape = await scene.scrape()
        assert (scrape.value(UP), scrape.value(BALANCE), errors(scrape)) == (1, None, {})
    assert (scene.api.listings("w"), scene.api.looks_at_balance("w")) == (before + 3, 1)
    del scene.api.balances["w"]
    scene.seconds = 60
    await scene.scrape()
    await until(lambda: scene.api.looks_at_balance("w") == 2)


# The balance


@asynchronous
async def test_a_balance_that_hangs_delays_no_answer_and_is_asked_for_once(scene: Scene) -> None:
    scene.start()
    gate = scene.api.balances["w"] = Gate(lambda exchange: exchange.reply({"remaining_credits": 7}))
    for _ in range(3):
        scrape = await scene.scrape()
        assert (scrape.value(UP), scrape.value(BALANCE)) == (1, None)
    await until(lambda: (scene.api.listings("w"), scene.api.looks_at_balance("w")) == (3, 1))
    # It belongs to the scrape during which it arrives.
    listing = scene.api.answers["w"] = Gate(tasks(task()))
    waiting = asyncio.create_task(scene.scrape())
    await until(lambda: scene.api.listings("w") == 4)
    gate.open()
    counted = "creatify_exporter_api_requests_total"

    async def read() -> bool:
        return (await scene.scrape(timeout=0.02)).value(counted, endpoint="remaining_credits") == 1

    while not await read():
        pass
    listing.open()
    assert (await waiting).value(BALANCE) == 7


@asynchronous
async def test_a_balance_is_shown_only_when_it_was_read_in_this_scrape(scene: Scene) -> None:
    scene.start()

    def after_the_balance(exchange: Exchange) -> None:
        asked = scene.api.looks_at_balance("w")
        while not answered.get(asked) and not exchange.upstream.ended.wait(0.01):
            pass
        tasks(task())(exchange)

    answered: dict[int, bool] = {}

    def look(answer: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
        def reply(exchange: Exchange) -> None:
            answer(exchange)
            answered[scene.api.looks_at_balance("w")] = True

        return reply

    scene.api.answers["w"] = after_the_balance
    scene.api.balances["w"] = look(lambda exchange: exchange.reply({"remaining_credits": 7.5}))
    await scene.scrape()
    scene.api.balances["w"] = look(refuse(500))
    scrape = await scene.scrape()
    assert (scrape.value(BALANCE), scrape.value(UP), errors(scrape)) == (None, 1, {})
    requests = scrape.values("creatify_exporter_api_requests_total", "endpoint", "code")
    assert requests == {
        ("text_generator", "200"): 2,
        ("remaining_credits", "200"): 1,
        ("remaining_credits", "500"): 1,
    }


@asynchronous
async def test_a_balance_that_comes_a_moment_after_a_short_listing_is_in_the_answer(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_BALANCE_MOMENT", 60)
    scene.start()
    gate = scene.api.balances["w"] = Gate(lambda exchange: exchange.reply({"remaining_credits": 7}))
    waiting = asyncio.create_task(scene.scrape(timeout=60))
    await until(lambda: scene.exporters[-1].views()[0].up is True)
    gate.open()
    assert (await waiting).value(BALANCE) == 7


@asynchronous
async def test_a_balance_that_fails_is_told_until_it_works_again(scene: Scene) -> None:
    gauge = "creatify_exporter_balance_up"
    scene.start()
    with capture_logs() as logs:
        for refusals in (False, True, True, False, False):
            if refusals:
                scene.api.balances["w"] = refuse(500)
            else:
                scene.api.balances.pop("w", None)
            asked = scene.api.looks_at_balance("w")
            while (scrape := await scene.scrape()).value(gauge) != (not refusals):
                pass
            await until(lambda asked=asked: scene.api.looks_at_balance("w") > asked)  # type: ignore[misc]
    assert scrape.value(UP) == 1
    assert [(one["event"], one["log_level"]) for one in logs] == [
        ("balance not read", "warning"),
        ("balance read again", "info"),
    ]


@asynchronous
async def test_a_pause_that_the_api_asked_for_is_told_and_logged_once(scene: Scene) -> None:
    scene.start()
    scene.api.answers["w"] = refuse(429, Retry_After="120")
    with capture_logs() as logs:
        for scene.seconds in (0, 119):
            scrape = await scene.scrape()
            assert scrape.values("creatify_exporter_backoff_until_timestamp_seconds", "endpoint") == {
                ("text_generator",): 1_760_000_120,
                ("remaining_credits",): 1_760_000_120,
            }
    assert [(one["endpoints"], one["seconds"]) for one in logs if one["event"] == "backing off"] == [
        ("text_generator,remaining_credits", 120)
    ]
    scene.seconds = 120
    scene.api.answers["w"] = tasks()
    assert "creatify_exporter_backoff_until_timestamp_seconds" not in (await scene.scrape()).families


@asynchronous
async def test_a_balance_that_nobody_wants_is_not_asked_for(scene: Scene) -> None:
    scene.start(api=NO_BALANCE)
    assert (await scene.scrape()).value(BALANCE) is None
    assert scene.api.looks_at_balance("w") == 0


# What goes wrong


@asynchronous
async def test_a_failed_listing_keeps_the_counters_and_harms_no_other_workspace(scene: Scene) -> None:
    scene.api.answers["v"] = tasks()
    scene.start()
    await scene.scrape()
    scene.api.answers["w"] = tasks(task(), task(2, created_at=NOW))
    await scene.scrape()
    scene.api.answers["w"] = refuse(500)
    for count in (1, 2):
        scrape = await scene.scrape()
        assert scrape.values(UP, "workspace") == {("w",): 0, ("v",): 1}
        assert scrape.value(SUBMITTED, workspace="w") == 1
        assert listed(scrape) is None
        assert (errors(scrape), errors(scrape, "v")) == ({"http": count}, {})
        assert scrape.value("creatify_exporter_last_success_timestamp_seconds", workspace="w") == 1_760_000_000
    assert state(scene) == (False, 0, "http")


@asynchronous
async def test_what_a_listing_counts_is_seen_after_the_next_good_one(scene: Scene) -> None:
    scene.start()
    await scene.scrape()
    scene.api.answers["w"] = lambda exchange: exchange.reply(b'[{"id": "cut", "model_name": "m"}, {"id"')
    scrape = await scene.scrape()
    assert (errors(scrape), scrape.value("creatify_exporter_ledger_tasks")) == ({"payload": 1}, 1)
    scene.api.answers["w"] = tasks({"id": "cut", "model_name": "m"})
    assert (await scene.scrape()).value(SUBMITTED) == 1


@asynchronous
async def test_a_ledger_that_fails_leaves_the_workspace_up_and_the_next_listing_catches_up(scene: Scene) -> None:
    scene.start()
    await scene.scrape()
    scene.on_ledger("CREATE TRIGGER full BEFORE INSERT ON tasks BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    scene.api.answers["w"] = tasks(task(), task(2, created_at=NOW))
    with capture_logs() as logs:
        for count in (1, 2):
            scrape = await scene.scrape()
            assert (scrape.value(UP), listed(scrape), scrape.value(SUBMITTED)) == (1, 2, 0)
            assert errors(scrape) == {"ledger": count}
            assert scrape.value("creatify_exporter_ledger_up") == 0
        await until(scene.exporters[0].ready)  # it answers, and only cannot record
        scene.on_ledger("DROP TRIGGER full")
        scrape = await scene.scrape()
    assert (scrape.value(SUBMITTED), scrape.value("creatify_exporter_ledger_up"), errors(scrape)) == (
        1,
        1,
        {"ledger": 2},
    )
    assert scene.exporters[0].ready()
    assert [(one["event"], one["log_level"]) for one in logs] == [
        ("the ledger cannot record", "error"),
        ("the ledger records again", "info"),
    ]


@asynchronous
async def test_a_ledger_and_a_list_that_fail_together_count_one_error(scene: Scene) -> None:
    scene.start()
    await scene.scrape()
    scene.on_ledger("ALTER TABLE workspaces RENAME TO elsewhere")
    scene.api.answers["w"] = refuse(500)
    scrape = await scene.scrape()
    assert (errors(scrape), scrape.value("creatify_exporter_ledger_up")) == ({"http": 1}, 0)
    assert scrape.value(SUBMITTED) == 0
    scene.on_ledger("ALTER TABLE elsewhere RENAME TO workspaces")


@asynchronous
async def test_a_ledger_that_is_not_there_yet_shows_gauges_and_no_counter(scene: Scene, tmp_path: Path) -> None:
    scene.ledger.close()
    scene.ledger = Ledger(f"sqlite:///{tmp_path}/later/ledger.db")
    scene.start()
    scrape = await scene.scrape()
    assert (scrape.value(UP), listed(scrape), errors(scrape)) == (1, 1, {"ledger": 1})
    assert not {
        name for name in scrape.families if "submitted" in name or "credits_used" in name or "tasks_finished" in name
    }
    (tmp_path / "later").mkdir()
    assert (await scene.scrape()).value(SUBMITTED) == 0


@asynchronous
async def test_an_exporter_that_only_reads_shows_the_ledger_and_changes_nothing(scene: Scene) -> None:
    scene.start()
    await scene.scrape()
    scene.api.answers["w"] = tasks(task(), task(2, created_at=NOW))
    scene.start(writes=False)
    scrape = await scene.scrape()
    assert (listed(scrape), scrape.value(SUBMITTED), scrape.value("creatify_exporter_ledger_tasks")) == (2, 0, 1)
    assert errors(scrape) == {}


@asynchronous
async def test_a_reader_without_a_ledger_misses_nothing_but_the_counters(scene: Scene, tmp_path: Path) -> None:
    scene.ledger = Ledger(f"sqlite:///{tmp_path}/none.db", read_only=True)
    scene.start(writes=False)
    with capture_logs() as logs:
        scrape = await scene.scrape()
    assert (scrape.value(UP), errors(scrape), logs) == (1, {}, [])


@pytest.mark.parametrize("place", ["read", "draft", "commit"])
@asynchronous
async def test_a_mistake_of_ours_fails_its_workspace_and_nothing_else(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    scene.api.answers["v"] = tasks(task(model_name="wrong"))
    scene.start()
    await scene.scrape()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("words of upstream")

    with monkeypatch.context() as patch, capture_logs() as logs:
        if place == "read":
            read = TaskReader.__call__
            patch.setattr(
                TaskReader,
                "__call__",
                lambda self, batch: fail() if batch[0].model_name == "wrong" else read(self, batch),
            )
        else:
            former = getattr(Book, place)
            broken = scene.ledger.book("v")
            patch.setattr(
                Book, place, lambda self, *args, **kwargs: fail() if self is broken else former(self, *args, **kwargs)
            )
        scrape = await scene.scrape()
        assert scrape.value(UP, workspace="w") == 1
        assert sum(errors(scrape, "v").values()) == 1
        assert errors(scrape) == {}
        assert "words of upstream" not in str(logs)
        assert "RuntimeError" in str(logs)
    scrape = await scene.scrape()
    assert scrape.values(UP, "workspace") == {("w",): 1, ("v",): 1}


@asynchronous
async def test_a_thread_that_cannot_be_started_fails_the_listing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.start()
    await scene.scrape()
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "listing w":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        scrape = await scene.scrape()
    assert (scrape.value(UP), scrape.value(BALANCE), errors(scrape)) == (0, None, {"payload": 1})
    assert scrape.values("creatify_text_generator_tasks", "workspace") == {}
    scrape = await scene.scrape()
    assert (scrape.value(UP), errors(scrape)) == (1, {"payload": 1})


@asynchronous
async def test_a_mistake_of_ours_with_the_balance_takes_the_balance_alone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.start()

    def fail(_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(Client, "remaining_credits", fail)
    scrape = await scene.scrape()
    assert (scrape.value(UP), scrape.value(BALANCE)) == (1, None)


@asynchronous
async def test_failure_and_recovery_are_logged_in_our_own_words(scene: Scene) -> None:
    scene.start()
    with capture_logs() as logs:
        await scene.scrape()
        scene.api.answers["w"] = refuse(500)
        await scene.scrape()
        scene.api.answers["w"] = tasks(task())
        await scene.scrape()
        await scene.scrape()
    assert logs == [
        {
            "event": "listing failed",
            "log_level": "warning",
            "workspace": "w",
            "cause": "http",
            "status": 500,
            "error": "the API answered HTTP 500",
        },
        {"event": "listing works again", "log_level": "info", "workspace": "w"},
    ]


@pytest.mark.parametrize(("unknown", "hints"), [(4, 0), (5, 1)])
@asynchronous
async def test_a_hint_about_unknown_reasons_is_logged_once(scene: Scene, unknown: int, hints: int) -> None:
    texts = ["zxcvb qwert"] * unknown + ["429 RESOURCE_EXHAUSTED"] * 16
    scene.api.answers["w"] = tasks(
        *(task(number, status="failed", failed_reason=text) for number, text in enumerate(texts))
    )
    scene.start()
    with capture_logs() as logs:
        await scene.scrape()
        await scene.scrape()
    assert [one["share"] for one in logs if "--reasons" in one["event"]] == [0.24] * hints


# Tasks that left the list, clocks and credits


def by_id(scene: Scene, **answers: Callable[[Exchange], None]) -> dict[str, int]:
    """Answer for single tasks, by id; return how often each was asked for, as it goes on."""
    asked: dict[str, int] = defaultdict(int)

    def answer(exchange: Exchange) -> None:
        task_id = exchange.path.rstrip("/").rpartition("/")[2]
        if task_id == "text_generator":
            listing(exchange)
            return
        asked[task_id] += 1
        answers[task_id](exchange)

    listing = scene.api.answers["w"]
    scene.api.answers["w"] = answer
    return asked


def running(number: int) -> dict[str, object]:
    return task(number, status="running", created_at=NOW)


@asynchronous
async def test_a_task_that_left_the_list_unfinished_is_asked_for_and_counted_once(scene: Scene) -> None:
    scene.api.answers["w"] = tasks()
    scene.start(api=NO_BALANCE)
    await scene.scrape()
    scene.api.answers["w"] = tasks(running(1))
    await scene.scrape()
    scene.api.answers["w"] = tasks()
    ended = task(1, status="failed", failed_reason="429 RESOURCE_EXHAUSTED", credits_used=3, created_at=NOW)
    asked = by_id(scene, **{str(ended["id"]): lambda exchange: exchange.reply(ended)})
    for _ in range(3):
        scrape = await scene.scrape()
        assert scrape.value("creatify_text_generator_failures_total", reason="quota_exceeded") == 1
        assert scrape.value("creatify_text_generator_credits_used_total") == 3
        assert scrape.value("creatify_exporter_unsettled_tasks") == 0
        assert not scrape.values("creatify_text_generator_failed_tasks", "reason"), "gauges show the list alone"
    assert set(asked.values()) == {1}
    requests = scrape.values("creatify_exporter_api_requests_total", "endpoint", "code")
    assert requests["text_generator_task", "200"] == 1


@pytest.mark.parametrize(
    ("answer", "asked_at_once", "unsettled", "held"),
    [
        (refuse(404), 3, 0, False),
        (refuse(500), 3, 3, False),
        (lambda exchange: exchange.reply(b"<html>"), 3, 3, False),
        (lambda exchange: exchange.reply({"id": "another-one"}), 3, 3, False),
        (refuse(401), 1, 3, False),
        (refuse(403), 1, 3, False),
        (refuse(429, Retry_After="120"), 1, 3, True),
        (refuse(503, Retry_After="120"), 1, 3, True),
    ],
)
@asynchronous
async def test_whatever_is_answered_for_a_task_fails_no_listing_and_is_not_asked_too_often(
    scene: Scene, answer: Callable[[Exchange], None], asked_at_once: int, unsettled: int, held: bool
) -> None:
    scene.api.answers["w"] = tasks(*(running(number) for number in range(3)))
    scene.start(api=NO_BALANCE)
    await scene.scrape()
    scene.api.answers["w"] = tasks()
    asked = by_id(scene, **{str(running(number)["id"]): answer for number in range(3)})
    scrape = await scene.scrape()
    assert (scrape.value(UP), errors(scrape), sum(asked.values())) == (1, {}, asked_at_once)
    assert scrape.value("creatify_exporter_unsettled_tasks") == unsettled
    backoff = scrape.values("creatify_exporter_backoff_until_timestamp_seconds", "endpoint")
    assert backoff == ({("text_generator_task",): 1_760_000_120} if held else {})
    if held:
        scene.seconds = 119
        await scene.scrape()
        assert sum(asked.values()) == asked_at_once


@asynchronous
async def test_a_task_that_is_not_answered_for_delays_no_answer_beyond_its_deadline(scene: Scene) -> None:
    scene.api.answers["w"] = tasks()
    scene.start(api=NO_BALANCE)
    await scene.scrape()
    scene.api.answers["w"] = tasks(running(1))
    await scene.scrape()
    scene.api.answers["w"] = tasks()
    ended = task(1, created_at=NOW)
    gate = Gate(lambda exchange: exchange.reply(ended))
    asked = by_id(scene, **{str(ended["id"]): gate})
    for _ in range(2):  # the second scrape joins the same listing
        started = time.monotonic()
        scrape = await scene.scrape(timeout=0.1)
        assert time.monotonic() - started < 5
        assert scrape.value(UP) == 1
    gate.open()
    finished = "creatify_text_generator_tasks_finished_total"
    assert (await scene.scrape()).value(finished, status="done") == 1
    assert set(asked.values()) == {1}


@asynchronous
async def test_at_most_so_many_tasks_are_asked_for_after_a_listing_as_configured(scene: Scene) -> None:
    scene.api.answers["w"] = tasks(*(running(number) for number in range(5)))
    exporter = scene.start(api=NO_BALANCE, listing={"settle": 0})
    await scene.scrape()
    scene.api.answers["w"] = tasks()
    asked = by_id(scene, **{str(running(number)["id"]): refuse(404) for number in range(5)})
    await scene.scrape()
    assert asked == {}
    exporter.configure(scene.config(api=NO_BALANCE, listing={"settle": 2}))
    for total in (2, 4, 5, 5):
        await scene.scrape()
        assert sum(asked.values()) == total


@pytest.mark.parametrize("ahead", [-3 * 86400, 3 * 86400])
@asynchronous
async def test_a_wrong_clock_is_told_logged_once_and_loses_no_count(scene: Scene, ahead: int) -> None:
    scene.api.clock = lambda: 1_760_000_000 + scene.seconds - ahead
    created = datetime.fromtimestamp(1_760_000_000 - ahead, UTC).isoformat()
    scene.api.answers["w"] = tasks()
    scene.start(api=NO_BALANCE)
    with capture_logs() as logs:
        await scene.scrape()
        scene.api.answers["w"] = tasks(task(1, created_at=created))
        await scene.scrape()
        scrape = await scene.scrape()
        assert scrape.value("creatify_exporter_clock_offset_seconds") == pytest.approx(ahead, abs=1)
        assert scrape.value(SUBMITTED) == 1
        scene.api.clock = scene.clock.now
        await scene.scrape()
    assert [one["event"] for one in logs] == ["this machine's clock is wrong", "this machine's clock is right again"]


@asynchronous
async def test_credits_that_are_no_usable_number_are_told_once(scene: Scene) -> None:
    scene.api.answers["w"] = tasks(task(1, credits_used=-1), task(2, credits_used=2e6), task(3, credits_used=1))
    scene.start(api=NO_BALANCE)
    with capture_logs() as logs:
        await scene.scrape()
        await scene.scrape()
    assert [(one["event"].partition(":")[0], one["tasks"]) for one in logs] == [("credits_used was ignored", 2)]


# Reloads and the end


@asynchronous
async def test_a_reload_with_the_same_credentials_keeps_the_running_listing_and_takes_the_new_settings(
    scene: Scene,
) -> None:
    exporter = scene.start()
    gate = scene.api.answers["w"] = Gate(tasks(task()))
    waiting = asyncio.create_task(scene.scrape())
    await until(lambda: scene.api.listings("w") == 1)
    exporter.configure(
        scene.config(listing={"min_interval": "1m"}, failure_reasons={"rules": [{"reason": "brand", "match": "x"}]})
    )
    gate.open()
    assert listed(await waiting) == 1
    await scene.scrape()
    assert scene.api.listings("w") == 1
    scene.seconds = 60
    scrape = await scene.scrape()
    assert scrape.value("creatify_text_generator_failures_total", reason="brand") == 0


@pytest.mark.parametrize("change", ["credentials", "API"])
@asynchronous
async def test_what_was_listed_under_other_credentials_or_another_api_is_discarded(scene: Scene, change: str) -> None:
    exporter = scene.start()
    gate = scene.api.answers["w"] = Gate(tasks(task(7), task(8)))
    waiting = asyncio.create_task(scene.scrape())
    await until(lambda: scene.api.listings("w") == 1)
    config = scene.config()
    if change == "API":
        config = scene.config(api={"base_url": scene.api.url.replace("127.0.0.1", "localhost")})
    else:
        (workspace,) = scene.config().workspaces
        other = scene.config("other").workspaces[0].api_key
        config = config.model_copy(update={"workspaces": (workspace.model_copy(update={"api_key": other}),)})
    with capture_logs() as logs:
        exporter.configure(config)
        assert (await waiting).value(UP) == 0
        scene.api.answers["w"] = tasks(task(1))
        gate.open()
        scrape = await scene.scrape()
    assert (listed(scrape), scrape.value("creatify_exporter_ledger_tasks"), errors(scrape)) == (1, 1, {})
    assert [one for one in logs if one["log_level"] != "debug"] == []


@asynchronous
async def test_a_workspace_that_goes_and_comes_back_keeps_its_counters(scene: Scene) -> None:
    scene.api.answers["v"] = tasks()
    exporter = scene.start()
    await scene.scrape()
    scene.api.answers["w"] = tasks(task(), task(2, created_at=NOW))
    await scene.scrape()
    scene.seconds = 5
    exporter.configure(scene.config("v"))
    scrape = await scene.scrape()
    assert not {labels for labels in scrape.text.splitlines() if 'workspace="w"' in labels}
    assert [one.name for one in exporter.views()] == ["v"]
    assert scrape.value("creatify_exporter_config_last_reload_success_timestamp_seconds") == 1_760_000_005
    exporter.configure(scene.config())
    scrape = await scene.scrape()
    assert scrape.value(SUBMITTED, workspace="w") == 1
    # What this process counted goes on, too: a counter that fell would look like a restart.
    requests = scrape.values("creatify_exporter_api_requests_total", "workspace", "endpoint", "code")
    assert requests["w", "text_generator", "200"] == 3


@asynchronous
async def test_a_renewed_authority_is_trusted_after_a_reload_and_one_that_stays_changes_nothing(
    scene: Scene, tmp_path: Path
) -> None:
    path, authority, context = tmp_path / "ca.pem", trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    scene.api.serve_tls(context)
    trustme.CA().cert_pem.write_to_path(path)
    exporter = scene.start(api=NO_BALANCE | {"ca_file": str(path)})
    assert errors(await scene.scrape()) == {"connection": 1}
    path.write_bytes("# Zürich\n".encode() + authority.cert_pem.bytes())
    for _ in range(2):
        exporter.configure(scene.config(api=NO_BALANCE | {"ca_file": str(path)}))
    scrape = await scene.scrape()
    assert (scrape.value(UP), errors(scrape)) == (1, {"connection": 1})
    config = scene.config(api=NO_BALANCE | {"ca_file": str(path)})
    path.unlink()  # what was validated is put in force
    exporter.configure(config)
    assert exporter.views()[0].up


@asynchronous
async def test_a_refused_reload_is_told_until_one_succeeds(scene: Scene) -> None:
    exporter = scene.start()
    scene.seconds = 5
    exporter.reload_failed()
    scrape = await scene.scrape()
    assert scrape.value("creatify_exporter_config_last_reload_successful") == 0
    assert scrape.value("creatify_exporter_config_last_reload_success_timestamp_seconds") == 1_760_000_000
    exporter.configure(scene.config())
    assert (await scene.scrape()).value("creatify_exporter_config_last_reload_successful") == 1


@asynchronous
async def test_at_the_end_waiting_scrapes_get_what_is_there(scene: Scene) -> None:
    exporter = scene.start()
    await scene.scrape()
    scene.api.answers["w"] = Gate(tasks())
    waiting = [asyncio.create_task(scene.scrape()) for _ in range(5)]
    await until(lambda: scene.api.listings("w") == 2)
    exporter.stop()
    for scrape in await asyncio.gather(*waiting):
        assert (listed(scrape), scrape.value(UP), scrape.value(SUBMITTED)) == (1, 1, 0)
    assert listed(await scene.scrape()) == 1
    assert scene.api.listings("w") == 2


# Answers


@asynchronous
async def test_scrapes_at_the_same_time_share_one_rendering_of_the_same_answer(scene: Scene) -> None:
    exporter = scene.start(listing={"min_interval": "1m"}, api=NO_BALANCE)
    await exporter.scrape(None, 30, False)  # after it, series may show their values
    both = [exporter.scrape(None, 30, openmetrics) for openmetrics in (False, False, True)]
    first, second, other = await asyncio.gather(*both)
    assert first is second
    assert first is not other
    assert await exporter.scrape(None, 30, False) is not first


@asynchronous
async def test_a_series_held_at_0_shows_its_value_in_time_even_when_no_listing_may_start(scene: Scene) -> None:
    scene.api.answers["w"] = tasks()
    scene.start(exposition={"zero_hold": "1m"}, listing={"min_interval": "5m"})
    await scene.scrape()
    scene.api.answers["w"] = tasks(task(created_at=NOW))
    for scene.seconds, value in (300.0, 0), (359.9, 0), (360.0, 1), (361.0, 1):
        scrape = await scene.scrape()
        assert scrape.value(SUBMITTED) == value
    assert scene.api.listings("w") == 2


@asynchronous
async def test_an_answer_that_nobody_sees_is_not_the_first_one(scene: Scene) -> None:
    scene.api.answers["w"] = tasks()
    exporter = scene.start(exposition={"zero_hold": "0s"})
    await scene.scrape()
    scene.api.answers["w"] = tasks(task(created_at=NOW))
    await exporter.scrape(None, 30, False, seen=False)
    assert (await scene.scrape()).value(SUBMITTED) == 0
    assert (await scene.scrape()).value(SUBMITTED) == 1


@asynchronous
async def test_a_series_held_at_0_shows_its_value_in_time_while_the_api_refuses(scene: Scene) -> None:
    scene.api.answers["w"] = tasks()
    scene.start(exposition={"zero_hold": "1m"})
    await scene.scrape()
    scene.api.answers["w"] = tasks(task(created_at=NOW))
    assert (await scene.scrape()).value(SUBMITTED) == 0
    scene.seconds = 30
    scene.api.answers["w"] = refuse(429, Retry_After="300")
    assert (await scene.scrape()).value(SUBMITTED) == 0
    scene.seconds = 61
    assert (await scene.scrape()).value(SUBMITTED) == 1
    assert scene.api.listings("w") == 3


@asynchronous
async def test_a_balance_that_comes_while_the_api_asks_to_wait_is_not_shown(scene: Scene) -> None:
    scene.api.answers["w"] = tasks()
    scene.start(exposition={"zero_hold": "1m"})
    await scene.scrape()
    scene.api.answers["w"] = tasks(task(created_at=NOW))
    assert (await scene.scrape()).value(SUBMITTED) == 0
    scene.seconds = 30
    scene.api.answers["w"] = refuse(429, Retry_After="300")
    gate = scene.api.balances["w"] = Gate(lambda exchange: exchange.reply({"remaining_credits": 7}))
    await scene.scrape()
    scene.seconds = 61
    scrape = await scene.scrape()
    assert (scrape.value(SUBMITTED), scrape.value(BALANCE)) == (1, None)
    reading = scene.exporters[-1]._workspaces["w"]._balance_read
    assert reading is not None
    gate.open()
    await reading
    assert (await scene.scrape()).value(BALANCE) is None


@asynchronous
async def test_a_ledger_that_fails_while_no_listing_may_start_is_no_error_of_a_listing(scene: Scene) -> None:
    scene.start(listing={"min_interval": "5m"}, exposition={"zero_hold": "1m"})
    await scene.scrape()
    scene.on_ledger("ALTER TABLE totals RENAME TO elsewhere")
    with capture_logs() as logs:
        scrape = await scene.scrape()
    assert (scrape.value(SUBMITTED), errors(scrape), [one["log_level"] for one in logs]) == (0, {}, ["debug"])
    scene.on_ledger("ALTER TABLE elsewhere RENAME TO totals")


# --reasons


def test_the_report_counts_failed_tasks_once_and_masks_their_texts(scene: Scene) -> None:
    scene.api.answers["w"] = tasks(
        task(1, status="failed", failed_reason="the zxcvb broke at 12345"),
        task(1, status="failed", failed_reason="the zxcvb broke at 12345"),
        task(2, status="failed", failed_reason="429 RESOURCE_EXHAUSTED"),
        task(3, status="failed", failed_reason="our own rule"),
        task(4, failed_reason="not failed"),
        {"id": "not usable!", "status": "failed"},
        None,
    )
    rules = {"rules": [{"reason": "ours", "match": "own rule", "owner": "caller"}]}
    report, complete = reasons(scene.config(failure_reasons=rules))
    assert complete
    lines = [line.split() for line in report.splitlines()]
    assert {tuple(line[:3]) for line in lines[1:]} == {
        ("other", "unknown", "1"),
        ("quota_exceeded", "upstream", "1"),
        ("ours", "caller", "1"),
    }
    assert "the zxcvb broke at <n>" in report
    assert "12345" not in report


def test_a_report_without_one_workspace_says_so(scene: Scene) -> None:
    scene.api.answers = {"broken": refuse(403), "w": tasks(task(1, status="failed"))}
    with capture_logs() as logs:
        report, complete = reasons(scene.config())
    assert not complete
    assert "unspecified" in report
    assert [(one["event"], one["workspace"], one["cause"]) for one in logs] == [("listing failed", "broken", "auth")]
