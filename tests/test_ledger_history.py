"""The ledger against a model: whatever happens, the totals are what a dozen lines over the history say."""

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from creatify_exporter.database import LedgerError
from creatify_exporter.ledger import Book, Ledger, Policy
from creatify_exporter.tasks import FINISHED, HOUR, NANO, SECOND, TaskReader
from tests.support.records import POLICY, START, classify, commit, counted, record, shown

MODELS = ("a", "b", "c", "d")


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


def model_of(history: Iterable[tuple[int, Sequence[Fact]]], policy: Policy) -> Counter[tuple[str, str, str]]:
    """Return what must have been counted, computed from the committed listings (time, facts) alone."""
    floor, labels, totals = None, list[str](), Counter[tuple[str, str, str]]()
    seen, created = dict[str, list[Any]](), dict[str, int | None]()
    first, left = dict[str, int](), dict[str, int]()
    for now, facts in history:
        baseline, floor = floor is None, now - HOUR if floor is None else floor
        unique = {fact.id: fact for fact in reversed(facts)}  # of an id listed twice, the first one counts
        for fact in (fact for fact in facts if unique[fact.id] is fact):
            named = fact.model in labels or len([one for one in labels if one != "other"]) < policy.max_models
            labels += [label] if (label := fact.model if named else "other") not in labels else []
            finished, credits_ = fact.status if fact.status in FINISHED else None, round(fact.credits * NANO)
            if fact.id not in seen:
                counts = policy.count_existing if baseline else fact.created is None or fact.created >= floor
                seen[fact.id], first[fact.id] = ([label, None, 0] if counts else [label, finished, credits_]), now
                totals[label, "submitted", ""] += counts
            task = seen[fact.id]
            if finished and not task[1]:
                totals[task[0], "finished", finished] += 1
                totals[task[0], "failures", fact.reason] += finished == "failed"
            totals[task[0], "credits", ""] += max(credits_ - task[2], 0)
            task[1:] = task[1] or finished, max(task[2], credits_)
            left.pop(fact.id, None)
            created.setdefault(fact.id, fact.created)
        for task_id in seen.keys() - unique.keys():
            left.setdefault(task_id, now)
        for task_id in [one for one, since in left.items() if now - since >= policy.retention * SECOND]:
            since, known = left.pop(task_id), created.pop(task_id)
            floor = max(floor, (first[task_id] if known is None or known >= since else known) + 1)
            del seen[task_id]
    totals["", "tasks", ""] = len(seen)
    return +totals


class Machine(RuleBasedStateMachine):
    """A simulated API, its listings early and late, and one or more exporters that share a ledger file."""

    replicas = 1
    policy = replace(POLICY, max_models=2, retention=2 * 3600)

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.now = 0
        self.facts: list[Fact] = []
        self.gone: list[Fact] = []
        self.earlier: list[list[Fact]] = [[]]
        self.history: list[tuple[int, list[Fact]]] = []
        self.last: list[dict[tuple[str, str, str], int]] = [{} for _ in range(self.replicas)]
        self.born: dict[tuple[str, str, str], int] = {}
        self.ledgers: list[Ledger] = []
        self.books: list[Book] = []
        for _ in range(self.replicas):
            self.ledgers.append(self.fresh())
            self.books.append(self.ledgers[-1].book("w"))

    def fresh(self) -> Ledger:
        return Ledger(f"sqlite:///{self.directory.name}/ledger.db")

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

    @rule(which=st.integers(0, 100), credits_=st.sampled_from((0, 7)))
    def list_twice(self, which: int, credits_: float) -> None:
        """An id that is listed a second time, with other facts."""
        if self.facts:
            self.listed(0, [*self.facts, replace(self.facts[which % len(self.facts)], credits=credits_)])

    @rule(seconds=st.sampled_from((1, 60, 1800, 3700, 7300)))
    def wait(self, seconds: int) -> None:
        self.now += seconds * SECOND

    # What the exporters do.

    def listed(self, replica: int, facts: list[Fact]) -> None:
        replica %= self.replicas
        self.now += SECOND
        commit(self.books[replica], [fact.record() for fact in facts], at=self.now, policy=self.policy)
        self.history.append((self.now + START, self.absolute(facts)))
        totals = self.books[replica].totals
        assert totals is not None
        assert +Counter(counted(self.books[replica]) | {("", "tasks", ""): totals.tasks}) == model_of(
            self.history, self.policy
        )
        self.answer(replica)

    @staticmethod
    def absolute(facts: list[Fact]) -> list[Fact]:
        return [replace(fact, created=None if fact.created is None else fact.created + START) for fact in facts]

    def answer(self, replica: int) -> None:
        self.now += SECOND
        answer = shown(self.books[replica], self.now)
        for key, value in answer.items():
            # Nothing falls, and what another replica has not shown yet begins at 0.
            assert value >= self.last[replica].get(key, 0), key
            self.born.setdefault(key, value)
            assert self.born[key] == 0, key
        assert self.last[replica].keys() <= answer.keys()
        self.last[replica] = answer

    @rule(replica=st.integers(0, 5))
    def list(self, replica: int) -> None:
        self.earlier.append([*self.facts])
        self.listed(replica, [*self.facts])

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
            with suppress(LedgerError, sqlite3.OperationalError):
                commit(
                    self.books[replica % self.replicas],
                    [fact.record() for fact in self.facts],
                    at=self.now,
                    policy=self.policy,
                )
                self.history.append((self.now + START, self.absolute(self.facts)))
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
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
TestOneExporter = Machine.TestCase
TestReplicas = Replicas.TestCase
TestOneExporter.settings = TestReplicas.settings = _settings
