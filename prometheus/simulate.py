"""Say what the spike alerts see, after how many minutes, and how often they are wrong.

Usage: python prometheus/simulate.py [--short] [--seed=N] [--write]

Workspaces of many volumes and usual failure ratios are simulated, some with an incident; their series go through the
rules of alerts.yml in promtool, and what fires is counted. --short takes a part of the workspaces, as CI does; --write
puts the tables into docs/runbook.md. To tune the alerts: change a threshold in alerts.yml, and run it again.
"""

import argparse
import bisect
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

ALERTS_FILE = Path(__file__).resolve().parent / "alerts.yml"
RUNBOOK = ALERTS_FILE.parents[1] / "docs" / "runbook.md"
BEGIN, END = "<!-- make alerts-report: begin -->\n", "<!-- make alerts-report: end -->\n"

DAY = 24 * 60
# An incident begins after the longest window of the failure alerts, and is watched for as long as it lasts.
QUIET, INCIDENT = 6 * 60, 2 * 60
VOLUMES = (6, 20, 60, 300)
USUAL = (0.01, 0.05, 0.10, 0.15)
INCIDENTS = (1.0, 0.7, 0.45)
# So few failures among so few tasks that nobody could be sure of them within 2 hours.
NOT_TO_BE_SEEN = {(6, 0.7), (6, 0.45), (20, 0.45)}
FAILURE_SPIKE = "CreatifyFailureSpike"
SPIKES = (FAILURE_SPIKE, "CreatifyModelFailureSpike", "CreatifyFailureReasonSpike", "CreatifySpendingSpike")
# What fails now and then, the most frequent reason first; an incident has a reason of its own.
REASONS = {"content_blocked": 5, "invalid_request": 3, "timeout": 1}
INCIDENT_REASON = "overloaded"
MODEL = "m"
# So many at once: what promtool does for each rule and minute costs as much as a few workspaces do.
BATCH = 32


@dataclass(frozen=True)
class Life:
    """What surrounds the exporter: seconds between scrapes, share of failed listings, breaks as (minute, minutes)."""

    scrape: int = 60
    failing: float = 0.0
    outage: tuple[int, int] | None = None  # the API does not answer
    restart: int | None = None  # the exporter is away for two scrapes
    unwatched: tuple[int, int] | None = None  # Prometheus is away


@dataclass(frozen=True)
class Workspace:
    """One workspace: tasks an hour, the share that usually fails, minutes, and the share that fails in an incident."""

    volume: int
    usual: float
    minutes: int
    life: Life
    incident: float | None = None


@dataclass
class Work:
    """When tasks finished, in minutes, by status and by reason; and the credits used after each done one."""

    finished: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    credits: list[float] = field(default_factory=lambda: [0.0])


def work(workspace: Workspace, rng: random.Random) -> Work:
    """Return what a workspace does: tasks that finish at random times, each with an end and a price."""
    result, moment = Work(), 0.0
    while (moment := moment + rng.expovariate(workspace.volume / 60)) < workspace.minutes:
        incident = workspace.incident is not None and moment >= QUIET
        share = workspace.incident if incident and workspace.incident else workspace.usual
        if rng.random() >= share:
            result.finished["done"].append(moment)
            result.credits.append(result.credits[-1] + round(rng.lognormvariate(0.5, 0.7), 2))
            continue
        result.finished["failed"].append(moment)
        (reason,) = [INCIDENT_REASON] if incident else rng.choices(list(REASONS), list(REASONS.values()))
        result.failures[reason].append(moment)
    return result


def looks(workspace: Workspace, rng: random.Random) -> list[tuple[str, float]]:
    """Return what each scrape finds: `up`, `down`, `stale` or `_` (none), and until which minute work is counted."""
    life, step, found, counted = workspace.life, workspace.life.scrape / 60, [], 0.0

    def within(moment: float, span: tuple[int, int] | None) -> bool:
        return span is not None and span[0] <= moment < sum(span)

    for index in range(int(workspace.minutes / step) + 1):
        moment = index * step
        state = "up"
        if within(moment, life.unwatched):
            state = "_"
        elif life.restart is not None and life.restart <= moment < life.restart + 2 * step:
            state = "stale"
        elif within(moment, life.outage) or rng.random() < life.failing:
            state = "down"
        if state == "up":
            counted = max(moment - step / 2, 0.0)  # the rules look some time after the scrape
        found.append((state, counted))
    return found


def series(name: str, workspace: Workspace, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield the series of a workspace in promtool's notation."""
    result, seen = work(workspace, rng), looks(workspace, rng)
    common = f'job="creatify", instance="a", workspace="{name}"'

    def one(metric: str, labels: str, values: Sequence[float]) -> dict[str, str]:
        pairs = zip(seen, values, strict=True)
        texts = (state if state in ("_", "stale") else f"{value:.10g}" for (state, _), value in pairs)
        return {"series": f"{metric}{{{common}{labels}}}", "values": " ".join(texts)}

    def counts(moments: Sequence[float]) -> list[int]:
        return [bisect.bisect_right(moments, until) for _, until in seen]

    yield one("creatify_up", "", [state == "up" for state, _ in seen])
    yield one("creatify_exporter_last_success_timestamp_seconds", "", [60 * until for _, until in seen])
    for status in ("done", "failed"):
        labels = f', model="{MODEL}", status="{status}"'
        yield one("creatify_text_generator_tasks_finished_total", labels, counts(result.finished[status]))
    for reason in (*REASONS, INCIDENT_REASON):
        labels = f', model="{MODEL}", reason="{reason}"'
        yield one("creatify_text_generator_failures_total", labels, counts(result.failures[reason]))
    spent = [result.credits[count] for count in counts(result.finished["done"])]
    yield one("creatify_text_generator_credits_used_total", f', model="{MODEL}"', spent)


def rules_of(alerts: Sequence[str], path: Path = ALERTS_FILE) -> dict[str, Any]:
    """Return the groups of a rule file with the rules that some alerts are made from, and no others."""
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    every = [rule for group in groups for rule in group["rules"]]
    wanted, new = set[str](), set(alerts)
    while new:
        wanted |= new
        texts = " ".join(rule["expr"] for rule in every if (rule.get("alert") or rule["record"]) in wanted)
        new = {rule["record"] for rule in every if rule.get("record") in re.findall(r"[\w:]+", texts)} - wanted
    kept = [
        {**group, "rules": [rule for rule in group["rules"] if (rule.get("alert") or rule["record"]) in wanted]}
        for group in groups
    ]
    return {"groups": [group for group in kept if group["rules"]]}


def fired(
    series: Sequence[Mapping[str, str]], scrape: int, minutes: range, rules: Mapping[str, Any]
) -> list[tuple[int, dict[str, str]]]:
    """Return what fires in each of some minutes, as promtool finds it: the minute and the labels of the alert.

    `series` are in promtool's notation, with `scrape` seconds between two values; the rules are evaluated at each step
    of `minutes`. RuntimeError: promtool does not understand them.
    """
    expression = 'ALERTS{alertstate="firing"}'
    case = {
        "interval": f"{scrape}s",
        "input_series": series,
        # What is found to differ from the nothing that is expected is printed, minute by minute.
        "promql_expr_test": [{"expr": expression, "eval_time": f"{m}m", "exp_samples": []} for m in minutes],
    }
    order = [group["name"] for group in rules["groups"]]
    tests = {
        "rule_files": ["rules.yml"],
        "group_eval_order": order,
        "evaluation_interval": f"{minutes.step}m",
        "tests": [case],
    }
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "rules.yml").write_text(json.dumps(rules), encoding="utf-8")
        Path(directory, "tests.yml").write_text(json.dumps(tests), encoding="utf-8")
        # The promtool on PATH, as everywhere here.
        command = ["promtool", "test", "rules", str(Path(directory, "tests.yml"))]
        environment = os.environ | {"GOMAXPROCS": "1", "GOGC": "off", "GOMEMLIMIT": "500MiB"}
        answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603 - promtool, on files of ours
    said = answer.stdout + answer.stderr
    found = re.findall(r"time: (\w+),\s+exp: ?\S+\s+got: ?(.+)", said)
    if answer.returncode and not found:
        raise RuntimeError(f"promtool: {said[:2000]}")
    return [
        (_minutes(time), dict(re.findall(r'(\w+)="([^"]*)"', labels)))
        for time, got in found
        for labels in re.findall(r'\{(__name__="ALERTS".*?)\}', got)
    ]


def firing(workspaces: Sequence[Workspace], alerts: Sequence[str], seed: str) -> list[dict[str, list[int]]]:
    """Return for each of some alike workspaces the minutes in which each alert fires.

    Of workspaces with an incident, those after its begin.
    """
    rng = random.Random(seed)  # noqa: S311 - nothing here is a secret
    named = {f"w{number}": workspace for number, workspace in enumerate(workspaces)}
    minutes = range(QUIET if workspaces[0].incident else 0, workspaces[0].minutes)
    every = [each for name, workspace in named.items() for each in series(name, workspace, rng)]
    found: dict[str, dict[str, list[int]]] = {name: defaultdict(list) for name in named}
    for minute, labels in fired(every, workspaces[0].life.scrape, minutes, rules_of(alerts)):
        times = found[labels["workspace"]][labels["alertname"]]
        if minute not in times[-1:]:  # of several models or reasons
            times.append(minute)
    return list(found.values())


def _minutes(duration: str) -> int:
    units = {"d": DAY, "h": 60, "m": 1, "s": 0}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", duration))


@dataclass(frozen=True)
class Fate:
    """A workspace, and the minutes in which each alert fires."""

    workspace: Workspace
    minutes: Mapping[str, list[int]]


def starts(minutes: Sequence[int]) -> int:
    """Return how often an alert began to fire, given the minutes in which it does."""
    return sum(minute - 1 not in minutes for minute in minutes)


def batches(workspaces: Iterable[Workspace]) -> list[list[Workspace]]:
    """Return workspaces in groups of what one promtool test can hold: the same scrapes, the same length."""
    groups: dict[tuple[int, int, bool], list[Workspace]] = defaultdict(list)
    for workspace in workspaces:
        groups[workspace.life.scrape, workspace.minutes, workspace.incident is None].append(workspace)
    return [group[i : i + BATCH] for group in groups.values() for i in range(0, len(group), BATCH)]


def simulate(workspaces: Iterable[Workspace], alerts: Sequence[str], seed: int) -> list[Fate]:
    """Return the workspaces, each with the minutes in which each of some alerts fires."""
    groups = batches(workspaces)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda each: firing(each[1], alerts, f"{seed}/{each[0]}"), enumerate(groups))
        fates = zip(itertools.chain(*groups), itertools.chain(*results), strict=True)
        return [Fate(workspace, minutes) for workspace, minutes in fates]


@dataclass(frozen=True)
class Seen:
    """How one kind of incident is seen: of how many workspaces in how many, and after how many minutes."""

    volume: int
    incident: float
    life: Life
    workspaces: int
    delays: Sequence[int]

    @property
    def share(self) -> float:
        """Return the share of the incidents that is seen."""
        return len(self.delays) / self.workspaces

    @property
    def median(self) -> float:
        """Return after how many minutes half of all incidents is seen, those that are not seen included."""
        never = [INCIDENT] * (self.workspaces - len(self.delays))
        return statistics.median([*self.delays, *never])


@dataclass(frozen=True)
class Wrong:
    """How often each alert fires without an incident; of a hard day the life is what it is without its breaks."""

    volume: int
    usual: float
    life: Life
    days: int
    alarms: Mapping[str, int]


LIVES = tuple(Life(scrape=scrape, failing=failing) for scrape in (60, 15) for failing in (0.0, 0.05))
# A day with an outage of the API, a restart of the exporter and one of Prometheus.
HARD_DAY = Life(outage=(9 * 60, 150), restart=15 * 60, unwatched=(18 * 60, 25))


def incidents(
    each: int, lives: Sequence[Life], seed: int, more: Mapping[tuple[int, float], int] | None = None
) -> list[Seen]:
    """Return how the incidents are seen, with so many workspaces of each kind, of some kinds `more`."""
    kinds = [(v, i) for v in VOLUMES for i in INCIDENTS if (v, i) not in NOT_TO_BE_SEEN]
    numbers = dict.fromkeys(kinds, each) | (dict(more) if more else {})
    workspaces = [
        Workspace(volume, USUAL[number % len(USUAL)], QUIET + INCIDENT, life, incident)
        for life in lives
        for volume, incident in kinds
        for number in range(numbers[volume, incident])
    ]
    delays: dict[tuple[int, float, Life], list[int]] = defaultdict(list)
    for fate in simulate(workspaces, [FAILURE_SPIKE], seed):
        minutes = fate.minutes.get(FAILURE_SPIKE)
        assert fate.workspace.incident is not None
        key = fate.workspace.volume, fate.workspace.incident, fate.workspace.life
        delays[key] += [min(minutes) - QUIET] if minutes else []
    return [Seen(v, i, life, numbers[v, i], delays[v, i, life]) for life in lives for v, i in kinds]


def calm_days(each: int, lives: Sequence[Life], alerts: Sequence[str], seed: int) -> list[Wrong]:
    """Return the false alarms of days without an incident, with so many of each kind of workspace and of life."""
    kinds = [(v, u) for v in VOLUMES for u in USUAL]
    workspaces = [
        Workspace(
            v,
            u,
            DAY,
            replace(HARD_DAY, scrape=life.scrape, failing=life.failing) if (number + USUAL.index(u)) % 2 else life,
        )
        for life in lives
        for v, u in kinds
        for number in range(each)
    ]
    alarms: dict[tuple[int, float, Life], Counter[str]] = defaultdict(Counter)
    for fate in simulate(workspaces, alerts, seed):
        counted = {alert: starts(minutes) for alert, minutes in fate.minutes.items()}
        life = Life(fate.workspace.life.scrape, fate.workspace.life.failing)
        alarms[fate.workspace.volume, fate.workspace.usual, life].update(counted)
    return [Wrong(v, u, life, each, alarms[v, u, life]) for life in lives for v, u in kinds]


def table(seen: Sequence[Seen], wrong: Sequence[Wrong]) -> str:
    """Return the tables in Markdown: what is seen, and the false alarms by surroundings and by workspace."""
    lives = list(dict.fromkeys(each.life for each in seen))
    lines = [
        f"Incidents of 2 hours, {seen[0].workspaces} of each kind: how many `{FAILURE_SPIKE}` sees; after how many",
        "minutes half of these, and nine in ten.",
        "",
        f"| tasks an hour | failing | {' | '.join(map(_title, lives))} |",
        f"| --- | --- |{' --- |' * len(lives)}",
    ]
    for (volume, incident), group in itertools.groupby(sorted(seen, key=_kind), key=_kind):
        by_life = {each.life: each for each in group}
        cells = " | ".join(_cell(by_life[life]) for life in lives)
        lines.append(f"| {volume} | {-incident:.0%} | {cells} |")
    lives = list(dict.fromkeys(each.life for each in wrong))
    alerts = sorted({alert for each in wrong for alert in each.alarms} | {FAILURE_SPIKE}, key=SPIKES.index)
    lines += [
        "",
        f"False alarms in 100 days, from {sum(each.days for each in wrong)} days without an incident, half of them",
        "with an outage of the API, a restart of the exporter and one of Prometheus.",
        "",
        f"| | {' | '.join(map(_title, lives))} |",
        f"| --- |{' --- |' * len(lives)}",
    ]
    by_lives = [[each for each in wrong if each.life == life] for life in lives]
    lines += [f"| `{name}` | {' | '.join(f'{per_100_days(row, name):.1f}' for row in by_lives)} |" for name in alerts]
    lines += [
        f"| all | {' | '.join(f'{per_100_days(row):.1f}' for row in by_lives)} |",
        "",
        f"| tasks an hour | {' | '.join(f'{usual:.0%} fails as usual' for usual in USUAL)} |",
        f"| --- |{' --- |' * len(USUAL)}",
    ]
    for volume in VOLUMES:
        rows = [[each for each in wrong if (each.volume, each.usual) == (volume, usual)] for usual in USUAL]
        lines.append(f"| {volume} | {' | '.join(f'{per_100_days(row):.1f}' for row in rows)} |")
    lines += ["", f"Over all of them: {per_100_days(wrong):.1f}."]
    return "\n".join(lines) + "\n"


def _title(life: Life) -> str:
    return f"{life.scrape} s{', 1 of 20 listings fails' if life.failing else ''}"


def per_100_days(wrong: Sequence[Wrong], alert: str | None = None) -> float:
    """Return the false alarms, of one alert or of all, in 100 days."""
    alarms = sum(count for each in wrong for name, count in each.alarms.items() if alert in (None, name))
    return 100 * alarms / sum(each.days for each in wrong)


def _kind(seen: Seen) -> tuple[int, float]:
    return seen.volume, -seen.incident


def _cell(seen: Seen) -> str:
    if not seen.delays:
        return f"0 of {seen.workspaces}"
    ninth = sorted(seen.delays)[min(len(seen.delays) * 9 // 10, len(seen.delays) - 1)]
    return f"{len(seen.delays)} of {seen.workspaces}: {statistics.median(seen.delays):.0f}, {ninth}"


def short(seed: int = 1) -> tuple[list[Seen], list[Wrong]]:
    """Simulate what CI can afford; more of the incidents whose median of a few would hang on chance."""
    return incidents(4, [LIVES[0], LIVES[1]], seed, {(20, 0.7): 32}), calm_days(1, [LIVES[1]], [FAILURE_SPIKE], seed)


def long(seed: int = 1, each: int = 10) -> tuple[list[Seen], list[Wrong]]:
    """Simulate what the runbook shows."""
    return incidents(each, LIVES, seed), calm_days(max(each // 10, 1), LIVES, SPIKES, seed)


def main() -> None:
    """Print the tables, and write them into the runbook if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a part of the workspaces, as in CI")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", type=int, default=10, help="workspaces of each kind in the long form")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/runbook.md")
    given = parser.parse_args()
    text = table(*(short(given.seed) if given.short else long(given.seed, given.each)))
    sys.stdout.write(text)
    if given.write:
        before, _, rest = RUNBOOK.read_text(encoding="utf-8").partition(BEGIN)
        RUNBOOK.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
