"""What docs/counters.md says about counters, shown with Prometheus' own `increase()` and with the real ledger."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from creatify_exporter.ledger import Ledger
from creatify_exporter.tasks import HOUR, NANO, Record
from tests.support.commands import output
from tests.support.packages import require
from tests.support.records import POLICY, SECOND, commit, counted, record, shown

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "counters.md"
MINUTES = 100
EVENT = 50
MINUTE = 60 * SECOND
HELD = replace(POLICY, zero_hold=180)

Series = list[float | None]
Listing = Callable[[int], Sequence[Record]]


def credits_of(records: Sequence[Record]) -> float:
    """Return what a listing adds up to."""
    return float(sum(one.credits_used for one in records))


def exposed(directory: Path, listing: Listing, key: tuple[str, str, str], *, restarts: bool = False) -> Series:
    """Return what the exporter answers minute by minute for one series; None where it has no such series."""
    ledger = Ledger(f"sqlite:///{directory}/ledger.db")
    answers: Series = []
    for minute in range(MINUTES + 1):
        if restarts and minute == EVENT:
            ledger.close()
            ledger = Ledger(f"sqlite:///{directory}/ledger.db")
        book = ledger.book("w")
        commit(book, listing(minute), at=minute * MINUTE, policy=HELD)
        value = shown(book, minute * MINUTE).get(key)
        answers.append(value if value is None or key[1] != "credits" else value / NANO)
    ledger.close()
    return answers


# The stories that the table tells: the obvious way beside ours.


def old_task_leaves(minute: int) -> Sequence[Record]:
    rest = [record("rest", credits=800, created=-24 * HOUR)]
    return rest if minute >= EVENT else [record("old", credits=200, created=-24 * HOUR), *rest]


def task_leaves_before_a_restart(minute: int) -> Sequence[Record]:
    rest = [record("rest", credits=900, created=-24 * HOUR)]
    return rest if minute >= EVENT - 10 else [record("old", credits=100, created=-24 * HOUR), *rest]


def new_model_fails(minute: int) -> Sequence[Record]:
    failed = [
        record(f"f{number}", "failed", model="new", created=EVENT * MINUTE, failed_reason="timeout")
        for number in range(3)
    ]
    return failed if minute >= EVENT else []


def seeded_from_the_list(listing: Listing) -> Series:
    """Count in memory, never down, and begin anew with what is listed when the process restarts."""
    values: Series = []
    highest = 0.0
    for minute in range(MINUTES + 1):
        highest = max(0.0 if minute == EVENT else highest, credits_of(listing(minute)))
        values.append(highest)
    return values


def born_late(listing: Listing) -> Series:
    """Count failures in memory; a series appears with its first failure."""
    return [float(len(found)) if (found := listing(minute)) else None for minute in range(MINUTES + 1)]


@dataclass(frozen=True)
class Story:
    truth: int
    obvious: Series
    ours: Series


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> list[Story]:
    def ours(listing: Listing, key: tuple[str, str, str], *, restarts: bool = False) -> Series:
        return exposed(tmp_path_factory.mktemp("ledger"), listing, key, restarts=restarts)

    spent = ("m", "credits", "")
    leaves, restart = old_task_leaves, task_leaves_before_a_restart
    return [
        Story(0, [credits_of(leaves(minute)) for minute in range(MINUTES + 1)], ours(leaves, spent)),
        Story(0, seeded_from_the_list(restart), ours(restart, spent, restarts=True)),
        Story(3, born_late(new_model_fails), ours(new_model_fails, ("new", "failures", "timeout"))),
    ]


def prometheus_agrees(directory: Path, series: Mapping[str, Series], expected: Mapping[str, float]) -> None:
    """Let promtool evaluate expressions over series with a sample a minute."""
    test = {
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": " ".join("_" if one is None else f"{one:g}" for one in values)}
                    for name, values in series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": expression,
                        "eval_time": f"{MINUTES}m",
                        "exp_samples": [{"labels": "{}", "value": value}],
                    }
                    for expression, value in expected.items()
                ],
            }
        ],
    }
    path = directory / "test.yml"
    path.write_text(yaml.safe_dump(test, width=1_000_000), encoding="utf-8")
    (promtool,) = require("promtool")
    output(promtool, "test", "rules", path)


# A second more than the samples cover: whether a range takes in its left end depends on the version of Prometheus.
WINDOW = f"{MINUTES}m1s"


def table() -> list[list[float]]:
    """Return the figures of the document's experiment: what happened, the obvious way's answer, the exporter's."""
    rows = [line.strip("| ").split(" | ")[1:] for line in DOCUMENT.read_text("utf-8").splitlines()]
    found = [[re.match(r"\d+", cell) for cell in cells] for cells in rows if len(cells) == 3]
    return [[float(figure[0]) for figure in figures if figure] for figures in found if all(figures)]


def test_the_experiment_in_the_document_is_what_prometheus_computes(stories: list[Story], tmp_path: Path) -> None:
    rows = table()
    assert [row[0] for row in rows] == [story.truth for story in stories]
    assert [row[1] for row in rows] == [800, 900, 0]  # the finding that the ledger answers
    for number, (story, (_, obvious, ours)) in enumerate(zip(stories, rows, strict=True)):
        assert ours == story.truth
        prometheus_agrees(
            tmp_path,
            {f"obvious{number}": story.obvious, f"ours{number}": story.ours},
            {
                f"round(sum(increase(obvious{number}[{WINDOW}])))": obvious,
                f"round(sum(increase(ours{number}[{WINDOW}])))": ours,
            },
        )


def test_a_new_series_is_0_for_as_long_as_zero_hold_says(stories: list[Story]) -> None:
    born = stories[2].ours
    assert born[EVENT - 1 : EVENT + 5] == [None, 0, 0, 0, 3, 3]


# Replicas


def test_replicas_count_once_with_max_by_before_sum_and_double_without(tmp_path: Path) -> None:
    steps: Series = [float(minute // 10) for minute in range(MINUTES + 1)]
    late: Series = [0.0, *steps[:-1]]  # the other replica is scraped a little later
    replicas = {
        'credits_total{instance="a",workspace="w",model="m"}': steps,
        'credits_total{instance="b",workspace="w",model="m"}': late,
        'credits_total{instance="a",workspace="w",model="n"}': steps,
        'credits_total{instance="b",workspace="w",model="n"}': late,
    }
    increase = f"increase(credits_total[{WINDOW}])"
    prometheus_agrees(
        tmp_path,
        replicas,
        {
            f"round(sum(max by (workspace, model) ({increase})))": 20,
            f"round(sum({increase}))": 38,
        },
    )


@pytest.mark.parametrize(("instances", "reported"), [(("a", "a"), 9), (("pod-1", "pod-2"), 6)])
def test_a_fixed_instance_shows_what_happened_while_the_exporter_was_down(
    tmp_path: Path, instances: tuple[str, str], reported: int
) -> None:
    """Three tasks before, three during and three after an outage of twenty minutes."""
    before: Series = [*(float(min(minute, 3)) for minute in range(40))]
    outage: Series = [None] * 20
    after: Series = [*(float(6 + min(minute, 3)) for minute in range(MINUTES - 59))]
    series: dict[str, Series] = {}
    first, second = (f'tasks_total{{instance="{instance}",workspace="w"}}' for instance in instances)
    series[first] = [*before, *outage, *(after if first == second else [])]
    if first != second:
        series[second] = [*[None] * len(before), *outage, *after]
    # Differences of raw samples: an extrapolation over the outage is beside the point here.
    grown = f"max_over_time(tasks_total[{WINDOW}]) - min_over_time(tasks_total[{WINDOW}])"
    prometheus_agrees(tmp_path, series, {f"sum({grown})": reported})


# What the ledger does in the cases that the document names


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    yield ledger
    ledger.close()


SUBMITTED = ("m", "submitted", "")


def test_a_task_that_appears_and_goes_between_two_listings_is_never_counted(ledger: Ledger) -> None:
    book = ledger.book("w")
    commit(book, [])
    commit(book, [], at=MINUTE)
    assert counted(book) == {}


def test_a_task_seen_only_once_it_was_finished_counts_as_submitted_and_finished_at_once(ledger: Ledger) -> None:
    book = ledger.book("w")
    commit(book, [])
    commit(book, [record("quick", credits=2, created=SECOND)], at=MINUTE)
    assert counted(book) == {SUBMITTED: 1, ("m", "finished", "done"): 1, ("m", "credits", ""): 2 * NANO}


def test_credits_seen_while_a_task_ran_count_even_if_it_never_comes_back(ledger: Ledger) -> None:
    book = ledger.book("w")
    commit(book, [])
    commit(book, [record("gone", "running", credits=2, created=SECOND)], at=MINUTE)
    commit(book, [], at=2 * MINUTE)
    assert counted(book) == {SUBMITTED: 1, ("m", "credits", ""): 2 * NANO}


def test_a_task_that_moves_to_another_model_counts_under_the_first_and_is_listed_under_the_second(
    ledger: Ledger,
) -> None:
    book = ledger.book("w")
    commit(book, [])
    commit(book, [record("moves", "running", model="m", created=SECOND)], at=MINUTE)
    listing = commit(book, [record("moves", "done", model="n", created=SECOND)], at=2 * MINUTE)
    assert counted(book) == {SUBMITTED: 1, ("m", "finished", "done"): 1}
    assert listing.models == ["n"]


@pytest.mark.parametrize(
    ("created", "again"),
    [(None, 2), (2_000_000_000 * SECOND, 2), (30 * SECOND, 1), (-2_000_000_000 * SECOND, 0)],
    ids=["no date", "in the future", "a plain date", "long ago"],
)
def test_a_task_that_returns_after_it_was_dropped_counts_again_only_without_a_date_that_is_past(
    ledger: Ledger, created: int | None, again: int
) -> None:
    book, short = ledger.book("w"), replace(POLICY, retention=3600)
    task = record("back", created=created)
    for at, tasks in (0, []), (1, [task]), (2, []), (63, []), (64, [task]):
        commit(book, tasks, at=at * MINUTE, policy=short)
    assert counted(book).get(SUBMITTED, 0) == again


def test_a_task_that_returns_before_retention_is_over_is_known(ledger: Ledger) -> None:
    book, short = ledger.book("w"), replace(POLICY, retention=3600)
    task = record("back", created=None)
    for at, tasks in (0, []), (1, [task]), (2, []), (61, []), (61.5, [task]), (63, []), (122, [task]):
        commit(book, tasks, at=int(at * MINUTE), policy=short)
    assert counted(book)[SUBMITTED] == 1


def test_once_a_task_was_dropped_nothing_older_than_it_counts_by_appearing(ledger: Ledger) -> None:
    book, short = ledger.book("w"), replace(POLICY, retention=3600)
    commit(book, [])
    commit(book, [record("dropped", created=30 * SECOND)], at=MINUTE, policy=short)
    commit(book, [], at=2 * MINUTE, policy=short)
    commit(book, [], at=63 * MINUTE, policy=short)
    older = [record("older", "running", created=29 * SECOND), record("younger", "running", created=31 * SECOND)]
    commit(book, older, at=64 * MINUTE, policy=short)
    assert counted(book)[SUBMITTED] == 2
    commit(
        book, [record("older", "failed", created=29 * SECOND, failed_reason="timeout")], at=65 * MINUTE, policy=short
    )
    assert counted(book)["m", "failures", "timeout"] == 1


def test_a_lost_ledger_begins_anew_at_0_and_counts_nothing_twice(tmp_path: Path) -> None:
    tasks = [record("a", created=SECOND)]
    for name in ("first", "second"):
        ledger = Ledger(f"sqlite:///{tmp_path}/{name}.db")
        commit(ledger.book("w"), [] if name == "first" else tasks)
        commit(ledger.book("w"), tasks, at=MINUTE)
        assert counted(ledger.book("w")).get(SUBMITTED, 0) == (1 if name == "first" else 0)
        ledger.close()


def test_a_restored_ledger_falls_back_and_counts_again_what_is_still_listed(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger.db", tmp_path / "copy.db"

    def start(tasks: Sequence[Record], at: int) -> int:
        ledger = Ledger(f"sqlite:///{path}")
        commit(ledger.book("w"), tasks, at=at * MINUTE)
        found = counted(ledger.book("w")).get(SUBMITTED, 0)
        ledger.close()
        return found

    tasks = [record(f"task-{number}", created=number * MINUTE) for number in range(1, 4)]
    assert start([], 0) == 0
    copy.write_bytes(path.read_bytes())
    assert start(tasks, 4) == 3
    path.write_bytes(copy.read_bytes())
    assert start(tasks[1:], 5) == 2  # the first one has left the list, so the counter falls from 3 to 2


def test_two_replicas_see_one_hold(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    ledgers = [Ledger(url), Ledger(url)]
    first, second = (ledger.book("w") for ledger in ledgers)
    commit(first, [], policy=HELD)
    commit(second, [], policy=HELD)
    task, key = record("new", created=MINUTE), SUBMITTED
    commit(first, [task], at=MINUTE, policy=HELD)
    assert shown(first, MINUTE)[key] == 0
    commit(first, [task], at=2 * MINUTE, policy=HELD)
    for book in (first, second):
        commit(book, [task], at=4 * MINUTE, policy=HELD)
        assert shown(book)[key] == 1  # the hold began with the first answer of either
    for ledger in ledgers:
        ledger.close()
