"""The ledger against a model: whatever happens, the totals are what a dozen lines over the history say."""

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from sqlalchemy.engine import Connection

from creatify_exporter.database import LedgerError
from creatify_exporter.ledger import Book, Ledger, Policy
from creatify_exporter.tasks import FINISHED, HOUR, NANO, SECOND, TaskReader
from tests.support.records import POLICY, START, classify, counted, read_task, record, shown

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


class ForgetfulLedger(Ledger):
    """A ledger whose database can lose the answer to a COMMIT that took effect."""

    forgets = False

    def _run(self, work: Callable[[Connection], T]) -> T:
        result = super()._run(work)
        if self.forgets:
            raise sqlite3.OperationalError("the connection is gone")
        return result


class Machine(RuleBasedStateMachine):
    """A simulated API, its listings early and late, and one or more exporters that share a ledger file."""

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
        self.answered_404: set[str] = set()
        self.last: list[dict[tuple[str, str, str], int]] = [{} for _ in range(self.replicas)]
        self.born: dict[tuple[str, str, str], int] = {}
        self.ledgers: list[ForgetfulLedger] = []
        self.books: list[Book] = []
        for _ in range(self.replicas):
            self.ledgers.append(self.fresh())
            self.books.append(self.ledgers[-1].book("w"))

    def fresh(self) -> ForgetfulLedger:
        return ForgetfulLedger(f"sqlite:///{self.directory.name}/ledger.db")

    def teardown(self) -> None:
        for ledger in self.ledgers:
            ledger.close()
        self.directory.cleanup()

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

    def committed(self, one: Committed, asked: Sequence[str]) -> None:
        """Take note of a committed listing, and of what was asked for in it."""
        for fact in one.facts:
            self.asked_at.pop(fact.id, None)
            self.answered_404.discard(fact.id)
        before = model_of(self.history, self.policy)
        for task_id in asked:
            assert before.seen[task_id][1] is None, "a finished task was asked for"
            assert task_id not in {fact.id for fact in one.facts}
            if self.replicas == 1:
                assert task_id not in self.answered_404, "a task that is gone was asked for again"
                assert one.now - self.asked_at.get(task_id, 0) >= 30 * SECOND
            self.asked_at[task_id] = one.now
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
                self.attempt(replica, [*self.facts], lambda: setattr(ledger, "forgets", True))
        finally:
            ledger.forgets = False
        self.committed(*self.under_way)

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
    def fail(self, replica: int, statement: int) -> None:
        """The database fails at any statement or at the commit: all or nothing."""
        left = [statement]

        def run_out(*_: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise sqlite3.OperationalError("database or disk is full")

        events = ("before_cursor_execute", "commit")
        for event in events:
            sa.event.listen(sa.Engine, event, run_out)
        try:
            with suppress(LedgerError):
                self.attempt(replica % self.replicas, [*self.facts])
                self.committed(*self.under_way)
        finally:
            for event in events:
                sa.event.remove(sa.Engine, event, run_out)

    @rule(replica=st.integers(0, 5))
    def restart(self, replica: int) -> None:
        replica %= self.replicas
        self.ledgers[replica].close()
        self.ledgers[replica] = self.fresh()
        self.books[replica] = self.ledgers[replica].book("w")


class Replicas(Machine):
    """Several exporters, whose listings also arrive late and out of order."""

    replicas = 2
    policy = replace(POLICY, max_models=2, retention=100 * 365 * 86400)

    @rule(replica=st.integers(0, 5), which=st.integers(0, 100))
    def list_late(self, replica: int, which: int) -> None:
        self.listed(replica, self.earlier[which % len(self.earlier)])


class Counting(Machine):
    """The same with `count_existing`."""

    policy = replace(Machine.policy, count_existing=True)


_settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
TestOneExporter = Machine.TestCase
TestReplicas = Replicas.TestCase
TestCounting = Counting.TestCase
TestOneExporter.settings = TestReplicas.settings = TestCounting.settings = _settings
