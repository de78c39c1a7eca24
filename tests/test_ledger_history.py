"""The ledger against a model: whatever happens, the totals are what a dozen lines over the history say."""

import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from sqlalchemy.engine import Connection

from creatify_exporter.database import LedgerError
from creatify_exporter.ledger import Book, Ledger, Policy
from creatify_exporter.tasks import FINISHED, HOUR, NANO, SECOND, TaskReader
from tests.support.faults import full_disk, refuse
from tests.support.postgres import Postgres, Proxy
from tests.support.processes import eventually
from tests.support.records import POLICY, START, classify, counted, read_task, record, shown

pytestmark = pytest.mark.timeout(900)  # to tell how it fails in few steps takes hypothesis minutes

T = TypeVar("T")
MODELS = ("a", "b", "c", "d")
DAY = 24 * HOUR


@dataclass(frozen=True)
class Fact:
    """One task as the simulated API lists it; `created` is in microseconds since START, or None."""

    id: str
    model: str
    status: str
    credits: float
    created: int | None
    reason: str = "timeout"

    def record(self) -> Any:
        text = self.reason if self.status == "failed" else None
        return record(
            self.id, self.status, model=self.model, credits=self.credits, created=self.created, failed_reason=text
        )


@dataclass(frozen=True)
class Committed:
    """One committed listing: when, what it had, and what the API said of tasks by their id."""

    now: int
    facts: Sequence[Fact]
    by_id: Sequence[Fact] = ()


@dataclass
class Model:
    """What must have been counted, computed from the committed listings alone."""

    policy: Policy
    floor: int | None = None
    labels: list[str] = field(default_factory=list)
    totals: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    seen: dict[str, list[Any]] = field(default_factory=dict)
    """Label, end, credits of each task that the ledger holds."""
    created: dict[str, int | None] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def merge(self, fact: Fact) -> None:
        task, finished = self.seen[fact.id], fact.status if fact.status in FINISHED else None
        credits_ = round(fact.credits * NANO)
        if finished and not task[1]:
            self.totals[task[0], "finished", finished] += 1
            self.totals[task[0], "failures", fact.reason] += finished == "failed"
        self.totals[task[0], "credits", ""] += max(credits_ - task[2], 0)
        task[1:] = task[1] or finished, max(task[2], credits_)

    def list(self, now: int, facts: Sequence[Fact]) -> None:
        baseline, self.floor = self.floor is None, now - HOUR if self.floor is None else self.floor
        unique = {fact.id: fact for fact in reversed(facts)}  # of an id listed twice, the first one counts
        for fact in (fact for fact in facts if unique[fact.id] is fact):
            known = [one for one in self.labels if one != "other"]
            label = fact.model if fact.model in self.labels or len(known) < self.policy.max_models else "other"
            self.labels += [label] if label not in self.labels else []
            if fact.id not in self.seen:
                counts = fact.created is None or fact.created >= self.floor
                counts = self.policy.count_existing if baseline else counts
                end, credits_ = fact.status if fact.status in FINISHED else None, round(fact.credits * NANO)
                self.seen[fact.id], self.first[fact.id] = ([label, None, 0] if counts else [label, end, credits_]), now
                self.totals[label, "submitted", ""] += counts
            self.merge(fact)
            self.left.pop(fact.id, None)
            self.created.setdefault(fact.id, fact.created)
        for task_id in self.seen.keys() - unique.keys():
            self.left.setdefault(task_id, now)

    def prune(self, now: int) -> None:
        assert self.floor is not None
        old = [one for one, since in self.left.items() if now - since >= self.policy.retention * SECOND]
        for task_id in old:
            since, known = self.left.pop(task_id), self.created.pop(task_id)
            bound = self.first[task_id] if known is None or known >= since else known
            self.floor = max(self.floor, bound + 1)
            del self.seen[task_id]


def model_of(history: Iterable[Committed], policy: Policy) -> Model:
    """Replay the committed listings."""
    model = Model(policy)
    for one in history:
        model.list(one.now, one.facts)
        for fact in one.by_id:
            if fact.id in model.seen:
                model.merge(fact)
        model.prune(one.now)
    return model


def nothing() -> None:
    pass


class FaultyLedger(Ledger):
    """A ledger whose database can fail, or be silent, when a COMMIT has taken effect; `at_rest` when nothing runs."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.at_rest = threading.Event()
        self.after_commit: Callable[..., None] = nothing

    def _run(self, work: Callable[[Connection], T]) -> T:
        self.at_rest.clear()
        try:
            result = super()._run(work)
            self.after_commit()
            return result
        finally:
            self.at_rest.set()

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Do not wait long for an answer; only where none is expected, or a busy machine would fail the test."""
        patient, self._deadline = self._deadline, 0.05
        try:
            yield
        finally:
            self._deadline = patient


@contextmanager
def on_event(ledger: FaultyLedger, moment: str, number: int, act: Callable[..., None]) -> Iterator[None]:
    """Act when the database is about to do something for the `number`th time, and each time after that."""
    left = [number]

    def come(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            act(*arguments)

    if moment == "committed":
        ledger.after_commit = come
    else:
        sa.event.listen(sa.Engine, moment, come)
    try:
        yield
    finally:
        if moment == "committed":
            ledger.after_commit = nothing
        else:
            sa.event.remove(sa.Engine, moment, come)


class Machine(RuleBasedStateMachine):
    """A simulated API, its listings early and late, and one or more exporters that share a ledger file."""

    workspace = "w"
    replicas = 1
    policy = replace(POLICY, max_models=2, retention=2 * 3600)

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.now = 0
        self.skew = 0
        self.dated = False
        self.facts: list[Fact] = []
        self.gone: list[Fact] = []
        self.deleted: set[str] = set()
        self.silent: set[str] = set()
        self.earlier: list[list[Fact]] = [[]]
        self.history: list[Committed] = []
        self.under_way: tuple[Committed, list[str]]
        self.asked_at: dict[str, int] = {}
        self.unrecorded: set[str] = set()
        self.answered_404: set[str] = set()
        self.last: list[dict[tuple[str, str, str], int]] = [{} for _ in range(self.replicas)]
        self.born: dict[tuple[str, str, str], int] = {}
        self.ledgers: list[FaultyLedger] = []
        self.books: list[Book] = []
        for _ in range(self.replicas):
            self.ledgers.append(self.fresh())
            self.ledgers[-1].open()
            self.books.append(self.ledgers[-1].book(self.workspace))

    def fresh(self) -> FaultyLedger:
        return FaultyLedger(f"sqlite:///{self.directory.name}/ledger.db")

    def teardown(self) -> None:
        for ledger in self.ledgers:
            ledger.close()
        self.directory.cleanup()

    @initialize(running=st.integers(0, 3))
    def begin(self, running: int) -> None:
        """Let there mostly be tasks that the ledger knows and that will end: with them most happens."""
        if running:
            self.submit(running, "a", "running", 0, 0.1)
            self.list(0)

    # What happens at the API.

    @rule(
        count=st.integers(1, 4),
        model=st.sampled_from(MODELS),
        status=st.sampled_from(("pending", "running", "done", "failed", "odd")),
        age=st.sampled_from((0, 60, 7200, 90 * 86400, None, -3600, -80 * 365 * 86400)),
        credits_=st.sampled_from((0, 0.1, 0.25, 3)),
    )
    def submit(self, count: int, model: str, status: str, age: int | None, credits_: float) -> None:
        created = None if age is None else self.now - age * SECOND
        start = len(self.facts) + len(self.gone)
        for number in range(start, start + count):
            self.facts.insert(0, Fact(f"task-{number}", model, status, credits_, created))

    @rule(
        which=st.integers(0, 100),
        status=st.sampled_from(("running", "done", "failed")),
        credits_=st.sampled_from((0, 0.1, 0.3, 5)),
        model=st.sampled_from((None, None, *MODELS)),
        reason=st.sampled_from(("timeout", "other")),
    )
    def change(self, which: int, status: str, credits_: float, model: str | None, reason: str) -> None:
        if self.facts:
            at = which % len(self.facts)
            fact = self.facts[at]
            self.facts[at] = replace(fact, status=status, credits=credits_, model=model or fact.model, reason=reason)

    @rule(which=st.integers(0, 100), count=st.integers(1, 5))
    def vanish(self, which: int, count: int) -> None:
        for _ in range(min(count, len(self.facts))):
            self.gone.append(self.facts.pop(which % len(self.facts)))

    @rule(which=st.integers(0, 100))
    def come_back(self, which: int) -> None:
        if self.gone:
            self.facts.append(self.gone.pop(which % len(self.gone)))
            self.deleted.discard(self.facts[-1].id)

    @rule(
        which=st.integers(0, 100),
        status=st.sampled_from(("running", "done", "failed")),
        credits_=st.sampled_from((0, 0.1, 0.3, 5)),
    )
    def change_unlisted(self, which: int, status: str, credits_: float) -> None:
        if self.gone:
            at = which % len(self.gone)
            self.gone[at] = replace(self.gone[at], status=status, credits=credits_)

    @rule(which=st.integers(0, 100), how=st.sampled_from(("deleted", "silent", "answers")))
    def answer_by_id(self, which: int, how: str) -> None:
        """Decide how the API answers for a task that it does not list."""
        if self.gone:
            task_id = self.gone[which % len(self.gone)].id
            if how == "deleted":
                self.deleted.add(task_id)
            elif how == "silent":
                self.silent.add(task_id)
            else:
                self.silent.discard(task_id)

    @rule(days=st.sampled_from((-400, -3, 0, 3, 100)))
    def step_the_clock(self, days: int) -> None:
        """Set the clock of the exporters wrong, or right again; from then on the API says the time."""
        self.skew, self.dated = days * DAY, True

    @rule(which=st.integers(0, 100), credits_=st.sampled_from((0, 7)))
    def list_twice(self, which: int, credits_: float) -> None:
        """An id that is listed a second time, with other facts."""
        if self.facts:
            self.listed(0, [*self.facts, replace(self.facts[which % len(self.facts)], credits=credits_)])

    @rule(seconds=st.sampled_from((1, 60, 1800, 3700, 7300)))
    def wait(self, seconds: int) -> None:
        self.now += seconds * SECOND

    # What the exporters do.

    def attempt(self, replica: int, facts: list[Fact], at_commit: Callable[[], None] = lambda: None) -> None:
        """List and commit; `under_way` is what is committed, and the ids that were asked for."""
        book, now = self.books[replica], START + self.now
        draft, read = book.draft(), TaskReader(classify)
        draft.add(read(fact.record() for fact in facts))
        known = {fact.id: fact for fact in (*self.facts, *self.gone)}
        date = now if self.dated else None
        asked = draft.missing(3, now + self.skew, date)
        self.check_questions(asked, now, {fact.id for fact in facts})
        answers = []
        for task_id in asked:
            if task_id in self.silent:
                draft.postpone(task_id)
            elif task_id in self.deleted:
                draft.gone(task_id)
            else:
                draft.settle(read_task(known[task_id].record()))
                answers.append(known[task_id])
        self.under_way = Committed(now, self.absolute(facts), self.absolute(answers)), asked
        at_commit()
        models = list(dict.fromkeys(fact.model for fact in facts))
        book.commit(draft, models, self.policy, now + self.skew, date)

    def check_questions(self, asked: Sequence[str], now: int, listed: set[str]) -> None:
        """Compare what is asked with what may be; an answer that could not be recorded may be asked for again."""
        before = model_of(self.history, self.policy)
        for task_id in asked:
            assert before.seen[task_id][1] is None, "a finished task was asked for"
            assert task_id not in listed
            if self.replicas == 1:
                assert task_id not in self.answered_404, "a task that is gone was asked for again"
                assert now - self.asked_at.get(task_id, 0) >= 30 * SECOND, "a task was asked for too often"
            self.asked_at[task_id] = now
        self.unrecorded |= set(asked)

    def forget_questions(self, ids: Iterable[str]) -> None:
        for task_id in ids:
            self.asked_at.pop(task_id, None)

    def committed(self, one: Committed, asked: Sequence[str]) -> None:
        """Take note of a committed listing, and of what was asked for in it."""
        self.forget_questions([*(fact.id for fact in one.facts), *(self.unrecorded - set(asked))])
        self.unrecorded.clear()
        self.answered_404 -= {fact.id for fact in one.facts}
        self.answered_404 |= set(asked) & self.deleted - self.silent
        self.history.append(one)

    def listed(self, replica: int, facts: list[Fact]) -> None:
        replica %= self.replicas
        self.now += SECOND
        self.attempt(replica, facts)
        self.committed(*self.under_way)
        self.check(replica)

    def check(self, replica: int) -> None:
        """Compare with the model, and answer."""
        totals, model = self.books[replica].totals, model_of(self.history, self.policy)
        assert totals is not None
        assert +Counter(counted(self.books[replica])) == +model.totals
        assert totals.tasks == len(model.seen)
        self.answer(replica)

    @staticmethod
    def absolute(facts: list[Fact]) -> list[Fact]:
        return [replace(fact, created=None if fact.created is None else fact.created + START) for fact in facts]

    def answer(self, replica: int) -> None:
        self.now += SECOND
        answer = shown(self.books[replica], self.now + self.skew)
        for key, value in answer.items():
            # Nothing falls, and what another replica has not shown yet begins at 0.
            assert value >= self.last[replica].get(key, 0), key
            self.born.setdefault(key, value)
            assert self.born[key] == 0 or self.policy.count_existing, key
        assert self.last[replica].keys() <= answer.keys()
        self.last[replica] = answer

    @rule(replica=st.integers(0, 5))
    def list(self, replica: int) -> None:
        self.earlier.append([*self.facts])
        self.listed(replica, [*self.facts])

    @rule(replica=st.integers(0, 5))
    def lose_the_answer_to_commit(self, replica: int) -> None:
        """The listing took effect, and the exporter cannot know."""
        replica %= self.replicas
        ledger = self.ledgers[replica]
        self.now += SECOND
        try:
            with pytest.raises(LedgerError, match="OperationalError"):
                self.attempt(replica, [*self.facts], lambda: setattr(ledger, "after_commit", refuse))
        finally:
            ledger.after_commit = nothing
        self.committed(*self.under_way)

    @rule(
        replica=st.integers(0, 5),
        moment=st.sampled_from(("before_cursor_execute", "after_cursor_execute", "commit", "committed")),
        number=st.integers(0, 12),
        listings=st.integers(0, 2),
    )
    def go_silent(self, replica: int, moment: str, number: int, listings: int) -> None:
        """The database leaves anything unanswered, and moves again much later: it may have done what it was told."""
        replica %= self.replicas
        number %= 3 if moment in ("commit", "committed") else 13
        self.now += SECOND
        revision = self.revision()
        with self.silence(replica, moment, number) as silent:
            try:
                self.attempt(replica, [*self.facts])
                self.committed(*self.under_way)
                lost = None
            except LedgerError:
                lost = self.under_way
            for _ in range(listings if silent() else 0):
                self.now += SECOND
                with pytest.raises(LedgerError, match="no answer"):
                    self.attempt(replica, [*self.facts])
                assert self.under_way[1] == [], "tasks were asked for while nothing could be recorded"
                if self.books[replica].totals:
                    self.answer(replica)
        if lost and self.revision() != revision:
            self.committed(*lost)

    @contextmanager
    def silence(self, replica: int, moment: str, number: int) -> Iterator[Callable[[], bool]]:
        """Let the database hang at a moment, if it comes; at the end it moves on, and comes to rest."""
        ledger, moves, silent = self.ledgers[replica], threading.Event(), threading.Event()

        def hang(*_: object) -> None:
            silent.set()
            moves.wait(30)

        with on_event(ledger, moment, number, hang), ledger.impatient():
            try:
                yield silent.is_set
            finally:
                moves.set()
                assert ledger.at_rest.wait(30)

    def revision(self) -> int:
        """Return what the database itself says of how often a transaction changed something."""
        with closing(sqlite3.connect(Path(self.directory.name, "ledger.db"))) as connection:
            return int(connection.execute("SELECT coalesce(sum(revision), 0) FROM workspaces").fetchone()[0])

    @rule(replica=st.integers(0, 5))
    def catch_up(self, replica: int) -> None:
        """Once the API answers for a task, its end is in the counters at most an hour later, listed or not."""
        self.silent.clear()
        self.now += 3700 * SECOND
        for number in range(len(self.gone) // 3 + 1 + self.replicas):
            self.listed(replica + number, [*self.facts])
        model = model_of(self.history, self.policy)
        for fact in self.gone:
            if fact.id in model.seen and fact.id not in self.deleted | self.answered_404 and fact.status in FINISHED:
                assert model.seen[fact.id][1] is not None, f"{fact.id} has ended, and nobody counted that"

    @rule(replica=st.integers(0, 5), done=st.integers(0, 10))
    def break_off(self, replica: int, done: int) -> None:
        """A listing that ends in the middle leaves no trace."""
        draft, read = self.books[replica % self.replicas].draft(), TaskReader(classify)
        draft.add(read(fact.record() for fact in self.facts[:done]))

    @rule(replica=st.integers(0, 5), statement=st.integers(0, 12))
    def fail_anywhere(self, replica: int, statement: int) -> None:
        """The database fails at any statement: all or nothing."""
        replica %= self.replicas
        with on_event(self.ledgers[replica], "before_cursor_execute", statement, refuse), suppress(LedgerError):
            self.attempt(replica, [*self.facts])
            self.committed(*self.under_way)

    @rule(replica=st.integers(0, 5), listings=st.integers(1, 4))
    def fill_the_disk(self, replica: int, listings: int) -> None:
        """Whatever is to be written fails at its COMMIT, and can be read all the same."""
        replica %= self.replicas
        with full_disk():
            for _ in range(listings):
                self.now += SECOND
                with suppress(LedgerError):
                    self.attempt(replica, [*self.facts])
                    self.committed(*self.under_way)

    @rule(replica=st.integers(0, 5))
    def restart(self, replica: int) -> None:
        replica %= self.replicas
        self.ledgers[replica].close()
        self.ledgers[replica] = self.fresh()
        self.books[replica] = self.ledgers[replica].book(self.workspace)
        self.forget_questions(self.unrecorded)


class Replicas(Machine):
    """Several exporters, whose listings also arrive late and out of order."""

    replicas = 2
    policy = replace(POLICY, max_models=2, retention=100 * 365 * 86400)

    @rule(replica=st.integers(0, 5), which=st.integers(0, 100))
    def list_late(self, replica: int, which: int) -> None:
        self.listed(replica, self.earlier[which % len(self.earlier)])


class OnPostgres(Replicas):
    """The same with a PostgreSQL behind a proxy that goes silent."""

    url: str
    proxy: Proxy
    names = count(1)

    def __init__(self) -> None:
        self.workspace = f"w{next(self.names)}"
        super().__init__()

    def fresh(self) -> FaultyLedger:
        return FaultyLedger(self.proxy.url(self.url))

    @contextmanager
    def silence(self, replica: int, moment: str, number: int) -> Iterator[Callable[[], bool]]:
        """Let nothing get through, or no answer; what was asked arrives at last, or is lost with the connection."""
        silent = threading.Event()
        asked_in_vain = moment in ("before_cursor_execute", "commit")

        def hang(connection: Any, *_: object) -> None:
            connection.connection.dbapi_connection.patience = 0.1
            self.proxy.silence(answers_only=not asked_in_vain)
            silent.set()

        event = {"committed": "commit", "after_cursor_execute": "before_cursor_execute"}.get(moment, moment)
        try:
            with on_event(self.ledgers[replica], event, number, hang):
                yield lambda: False  # to connect again takes seconds
        finally:
            if number % 2:
                self.proxy.lose_connections()
            self.proxy.resume()
            with psycopg.connect(self.url, autocommit=True) as connection:
                busy = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> %s"
                busy += " AND xact_start IS NOT NULL"

                def at_rest() -> bool:
                    found = connection.execute(busy, [connection.info.backend_pid]).fetchone()
                    return found == (0,)

                eventually(at_rest, 30, "no transaction is left")

    def revision(self) -> int:
        with psycopg.connect(self.url) as connection:
            query = "SELECT coalesce(sum(revision), 0) FROM workspaces WHERE name = %s"
            found = connection.execute(query, [self.workspace]).fetchone()
            assert found is not None
            return int(found[0])


class Counting(Machine):
    """The same with `count_existing`."""

    policy = replace(Machine.policy, count_existing=True)


_settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=set(Phase) - {Phase.explain},  # which takes minutes
)
TestOneExporter = Machine.TestCase
TestReplicas = Replicas.TestCase
TestCounting = Counting.TestCase
TestOneExporter.settings = TestReplicas.settings = TestCounting.settings = _settings


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")  # a cursor of a lost connection
def test_replicas_on_a_postgresql_that_goes_silent() -> None:
    with Postgres() as postgres, Proxy(postgres.port) as proxy:
        OnPostgres.url, OnPostgres.proxy = postgres.create_database(), proxy
        run_state_machine_as_test(OnPostgres, settings=settings(_settings, max_examples=6))
