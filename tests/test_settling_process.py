"""Tasks that leave the list at any moment of their life: real exporters, ended and failing meanwhile, and the truth."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.support.clock import DAY, STEPS, WrongClock
from tests.support.exporter import Exporter, Scrape
from tests.support.load import Scraping
from tests.support.postgres import Postgres, Proxy
from tests.support.processes import eventually
from tests.support.stage import Watch, counts
from tests.support.witness import ById, WatchedStage, Witness

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

SETTLE = 25
JUMPS = (0.4, 3.0, 1.5, 6.0, 2.0, 45.0, 4.0)
"""Seconds of the API's time between two listings."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as running:
        yield running


def every(parts: int) -> Callable[[str], bool]:
    """Pick one in so many tasks, the same ones each time."""
    return lambda task_id: int(task_id[:6], 16) % parts == 0


def answering(
    status: int, body: bytes = b"{}", share: int = 1, **headers: str
) -> Callable[[Witness, str], ById | None]:
    """Answer for one in `share` tasks like this, for the others with the truth."""
    chosen, named = every(share), {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _, task_id: (status, named, body) if chosen(task_id) else None


def another_task(witness: Witness, task_id: str) -> ById:
    """Answer with a task that was not asked for."""
    other = next(one for one in witness.lives if one != task_id)
    return 200, {}, witness.lives[other].record(2**62)


def closed(_: Witness, task_id: str) -> ById | None:
    """Break the connection for one in three tasks."""
    if every(3)(task_id):
        raise ConnectionResetError
    return None


FAULTS: dict[str, Callable[[Witness, str], ById | None]] = {
    "none": lambda _, task_id: None,
    "500": answering(500, share=2),
    "404": answering(404, share=6),
    "429": answering(429, Retry_After="1"),
    "a page": answering(200, b"<html>Be right back</html>", share=2, Content_Type="text/html"),
    "403": answering(403),
    "another task": another_task,
    "an empty list": answering(200, b"[]", share=2),
    "401": answering(401),
    "cut short": answering(200, b'{"id":"', share=2),
    "503": answering(503, Retry_After="1"),
    "closed": closed,
    "redirect": answering(302, Location="http://127.0.0.1:9/", share=2),
}
COURSES = {
    "sqlite": (*FAULTS, "hang", "none", "404", "500", "none"),
    "postgresql": ("none", "500", "404", "429", "none", "another task", "403", "closed"),
}
"""What is wrong in which round; the clock of the API is stepped in the last four."""
ENDING = {"401", "403", "429", "503", "hang"}
"""After such an answer nothing more is asked in that listing."""


class Course:
    """Lead exporters through one round after the other, and compare with the witness after each."""

    def __init__(
        self, stage: WatchedStage, exporters: Sequence[Exporter], clocks: Sequence[WrongClock], proxy: Proxy | None
    ) -> None:
        self.stage, self.witness, self.exporters, self.clocks, self.proxy = stage, stage.api, exporters, clocks, proxy
        self.chance = random.Random(len(exporters))
        self.watches = {exporter.port: Watch() for exporter in exporters}

    def scrape(self, exporter: Exporter) -> Scrape:
        """Scrape until a listing was recorded."""

        def recorded() -> Scrape | None:
            scrape = exporter.scrape()
            self.watches[exporter.port].check(scrape.text)
            fresh = scrape.value("creatify_up") == 1 and scrape.value("creatify_exporter_ledger_up") == 1
            return scrape if fresh else None

        scrape = eventually(recorded, 40, "a listing is recorded")
        assert scrape is not None
        self.witness.believe()
        return scrape

    def begin(self) -> None:
        """Take the baseline; nothing is missing yet, so nothing is asked for."""
        for exporter in self.exporters:
            self.scrape(exporter)
        self.witness.count_from_here()
        for exporter in self.exporters:
            assert counts(self.scrape(exporter)) == {}
        assert self.witness.asked == []

    def play(self, fault: str, moment: str, seconds: float) -> None:
        """Let time pass, list, and compare; `moment` says what happens to the exporters in this round."""
        victim = self.chance.choice(self.exporters)
        self.chance.choice(self.clocks).step(self.chance.choice(STEPS))
        end = victim.kill if moment.startswith("kill") else victim.stop
        if moment in ("killed", "stopped"):
            end()
        self.witness.begin()
        self.stage.time.jump(seconds)
        self.witness.by_id = self.hanging() if fault == "hang" else partial(FAULTS[fault], self.witness)
        if moment in ("killed", "stopped"):
            victim.start()
        elif moment.endswith("in flight"):
            self.end_in_flight(victim, end)
        elif moment == "silent ledger":
            self.lose_the_ledger()
        for exporter in self.exporters:
            self.scrape(exporter)
        self.compare()
        self.check_questions(fault, calm=moment in ("running", "killed", "stopped"))

    def end_in_flight(self, victim: Exporter, end: Callable[[], object]) -> None:
        """End an exporter in the middle of its listings; nothing that it saw and did not record may be lost."""
        with ExitStack() as stack:
            for exporter in self.exporters:
                stack.enter_context(Scraping(exporter, threads=1))
            threading.Event().wait(self.chance.uniform(0.02, 0.15))  # the moment is what is random here
            end()
            victim.start()

    def lose_the_ledger(self) -> None:
        """Silence the database at the first question by id, and break its connections a moment later."""
        assert self.proxy
        silent, proxy = threading.Event(), self.proxy

        def silence() -> None:
            if not silent.is_set():
                proxy.silence()
                silent.set()

        self.witness.before_an_answer = silence
        scrape = self.exporters[0].scrape(scrape_timeout=2)
        self.watches[self.exporters[0].port].check(scrape.text)
        assert silent.is_set(), "nobody was asked for"
        self.witness.before_an_answer = None
        proxy.lose_connections()
        proxy.resume()

    def hanging(self) -> Callable[[str], ById | None]:
        """Do not answer the first question in time, and refuse the later ones."""
        ended, asked = threading.Event(), list[str]()

        def answer(task_id: str) -> ById | None:
            asked.append(task_id)
            if len(asked) == 1:
                ended.wait(8)
                raise ConnectionResetError
            return 403, {}, b"{}"

        return answer

    def compare(self) -> None:
        """Wait until each exporter shows what was shown to it, no more and no less."""
        for exporter in self.exporters:

            def exact(exporter: Exporter = exporter) -> bool:
                return counts(self.scrape(exporter)) == self.witness.expected()

            try:
                eventually(exact, 20, "the counters equal the truth")
            except AssertionError:
                shown, expected = counts(self.scrape(exporter)), self.witness.expected()
                assert shown == expected, dict(shown.items() ^ expected.items())

    def check_questions(self, fault: str, *, calm: bool) -> None:
        """Compare what was asked by id in this round with what the contract allows."""
        witness = self.witness
        assert not witness.offences, witness.offences[:5]
        assert len(witness.asked) <= witness.listings * (1 if fault in ENDING else SETTLE), fault
        if calm:
            assert len(set(witness.asked)) == len(witness.asked), f"{fault}: a task was asked for twice at one time"
        too_often = {
            task_id: sorted(times)
            for task_id, times in witness.asked_at.items()
            if len(times) > witness.most_questions(task_id)
        }
        assert not too_often, too_often

    def finish(self) -> None:
        """Let the API answer, and every task end; then nothing is missing, and nothing is asked for any more."""
        self.witness.by_id = None
        self.witness.step(0)
        self.stage.simulations["main"].end_arrivals()
        for hour in range(60):
            self.witness.begin()
            self.stage.time.jump(30 if hour < 3 else 3601)
            unsettled = [self.scrape(one).value("creatify_exporter_unsettled_tasks") for one in self.exporters]
            self.compare()
            self.check_questions("none", calm=True)
            if hour > 3 and not any(unsettled):
                break
        for _ in range(2):
            self.witness.begin()
            self.stage.time.jump(3601)
            for exporter in self.exporters:
                self.scrape(exporter)
            assert self.witness.asked == []


MOMENTS = ("running", "killed", "running", "killed in flight", "running", "stopped", "running", "stopped in flight")
STEPS_OF_THE_API = (2 * DAY, 0, -3 * DAY, 3 * DAY)
"""Seconds; less than `ledger.retention`, since what is old is for the API's clock to say."""


@pytest.mark.parametrize("backend", COURSES)
def test_tasks_that_leave_the_list_at_any_moment_count_what_they_came_to(
    tmp_path: Path, postgres: Postgres, backend: str
) -> None:
    """On PostgreSQL there are two replicas; the clocks of the exporters are stepped by days all the time."""
    replicas = ["one"] if backend == "sqlite" else ["one", "two"]
    url = f"sqlite:///{tmp_path}/ledger.db" if backend == "sqlite" else postgres.create_database()
    with ExitStack() as stack:
        stage = stack.enter_context(WatchedStage(rate=8.0, window=30, history=60, deleted_share=0.08, slow_share=0.1))
        proxy = stack.enter_context(Proxy(postgres.port)) if backend == "postgresql" else None
        urls = [proxy.url(url) if proxy and name == "one" else url for name in replicas]
        clocks = [WrongClock(tmp_path, name) for name in replicas]
        exporters = [
            stack.enter_context(
                Exporter(
                    tmp_path / name,
                    environment=clock.environment,
                    config=stage.config(
                        ledger={"url": url},
                        listing={"settle": SETTLE},
                        api={"timeout": "3s", "remaining_credits": False},
                    ),
                )
            )
            for name, url, clock in zip(replicas, urls, clocks, strict=True)
        ]
        course = Course(stage, exporters, clocks, proxy)
        course.begin()
        faults = COURSES[backend]
        for number, fault in enumerate(faults):
            if number >= len(faults) - 4:
                stage.api.step(STEPS_OF_THE_API[number % 4])
            course.play(fault, MOMENTS[number % len(MOMENTS)], JUMPS[number * 3 % len(JUMPS)])
        if proxy:
            course.play("none", "silent ledger", 4)
        course.finish()

        witness = stage.api
        ended = {task_id for task_id, life in witness.lives.items() if life.finished <= witness.seen[task_id]}
        assert witness.lives.keys() - witness.gone <= ended
        assert witness.gone - ended, "no task went away before its end"
        assert {"pending", "running", "running, charged"} <= witness.left_as.keys()
        for exporter in exporters:
            assert exporter.stop() == 0
            assert "Traceback" not in exporter.log()
