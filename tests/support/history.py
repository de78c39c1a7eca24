"""Hours of an exporter's life, made in seconds: what a Prometheus would have scraped, in situations worth a look.

Each scenario has a time of its own, so that one Prometheus holds all of them: ask it `at` the end of a scenario.
`python -m tests.support.history DIRECTORY [NAME ...]` writes a TSDB for looking at it with Grafana.
"""

import argparse
import math
import os
import random
import subprocess
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

from creatify_exporter.reasons import BUILT_IN
from tests.support.packages import require

MINUTE, HOUR, DAY = 60, 3600, 86400
# Between two scrapes, as in prometheus/prometheus.yml.
SCRAPE = 60
# Scrapes come at any second; the steps of a graph are whole minutes.
OFFSET = 17.25
# Of durations; those of failed tasks would only cost time.
BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, math.inf)
BOUNDS = [*(str(float(bound)) for bound in BUCKETS[:-1]), "+Inf"]
CAUSES = ("auth", "rate_limited", "http", "timeout", "connection", "payload", "too_large", "ledger")
OWNERS = {reason: owner for reason, (owner, _) in BUILT_IN.items()}
REASONS = tuple(OWNERS)
# How often each reason comes up, among a hundred failures.
USUAL = {
    "quota_exceeded": 30,
    "content_blocked": 19,
    "overloaded": 15,
    "timeout": 11,
    "invalid_request": 8,
    "other": 7,
    "token_limit": 6,
    "internal_error": 3,
    "insufficient_credits": 1,
}


@dataclass(frozen=True)
class Model:
    """A model: its share of the tasks, how long they take, how many of them fail, what one costs."""

    name: str
    share: float
    seconds: float = 5
    failing: float = 0.04
    credits: float = 0.25


FEW_MODELS = (
    Model("gemini-2.5-flash", 5, 2, 0.03, 0.05),
    Model("gemini-2.5-pro", 3, 9, 0.05, 1.25),
    Model("gemini-3-flash-preview", 2, 4, 0.04, 0.25),
    Model("gemini-3.1-pro-preview", 2, 14, 0.06, 2),
)
_NAMES = (
    *("gemini-2.5-flash", "gemini-2.5-pro", "gemini-3-flash-preview", "gemini-3.1-pro-preview", "gpt-5-mini", "gpt-5"),
    *("gpt-5.2-codex-preview", "claude-haiku-4-5-20251001", "claude-sonnet-4-6", "claude-opus-4-7"),
    *("llama-4-maverick-17b-128e-instruct", "mistral-large-2512", "qwen3-max", "deepseek-v3.2-exp"),
    *("grok-4-fast-reasoning", "nova-pro-v1", "command-a-03-2025", "kimi-k2-thinking", "glm-4.6", "other"),
)
MANY_MODELS = tuple(
    Model(name, 1 + n * 7 % 5, 1 + n * 11 % 20, 0.01 + n * 3 % 8 / 100, (0.05, 0.25, 1.25, 2)[n % 4])
    for n, name in enumerate(_NAMES)
)


@dataclass(frozen=True)
class Alert:
    """An alert that fires in the last minutes of a scenario, or until so many minutes before its end."""

    name: str
    severity: str
    minutes: float
    labels: Mapping[str, str] = field(default_factory=dict)
    until: float = 0


@dataclass(frozen=True)
class Spike:
    """Minutes before the end, from and to, in which most tasks of a model fail for one reason."""

    workspace: str
    model: str
    start: float
    end: float
    reason: str = "overloaded"


@dataclass(frozen=True)
class Scenario:
    """A situation: who uses the text generator how much, and what is wrong at the end.

    `down` are workspaces whose listings fail in the last minutes, with the cause; `ledger_down` and `gone` are minutes
    before the end in which the ledger, or the exporter, does not answer. `restart` is how many minutes before the end
    the exporter ended, `outage` how many minutes later it was there again. `per_minute` is what the first workspace
    submits. `no_balance` are workspaces whose balance cannot be read, `held_back` those whose listing waits, with the
    seconds after the end until when, `unsettled` those with unfinished tasks that left the list, with their number.
    `sparse` leaves out, but for the last two hours, the series that would only make a long history slow to write.
    """

    name: str
    workspaces: Mapping[str, float]
    hours: float = 2
    models: Sequence[Model] = FEW_MODELS
    per_minute: float = 12
    replicas: Sequence[str] = ("exporter-1:9877",)
    down: Mapping[str, str] = field(default_factory=dict)
    down_minutes: float = 40
    ledger_down: float = 0
    gone: float = 0
    restart: float = 0
    outage: float = 1
    failures: bool = True
    rules: bool = True
    spikes: Sequence[Spike] = ()
    alerts: Sequence[Alert] = ()
    stuck: tuple[str, str] | None = None
    no_balance: Sequence[str] = ()
    held_back: Mapping[str, float] = field(default_factory=dict)
    unsettled: Mapping[str, int] = field(default_factory=dict)
    scrape: int = SCRAPE
    sparse: bool = False
    reasons: Sequence[str] = REASONS


TWO = {"marketing": 250000.0, "sales": 180000.0}
FIVE = {
    "internal-experiments": 60.0,
    "marketing-emea": 11000.0,
    "marketing-us": 8200.0,
    "product-video-team": 16000.0,
    "sales-enablement-apac": 12500.0,
}
CROWD_ALERTS = (
    Alert("CreatifyModelFailureSpike", "warning", 10, {"workspace": "marketing-us", "model": "gpt-5-mini"}),
    Alert("CreatifyFailureReasonSpike", "warning", 8, {"workspace": "marketing-us", "reason": "overloaded"}),
    Alert("CreatifyCreditsLow", "critical", 83, {"workspace": "internal-experiments"}),
    Alert(
        "CreatifyTasksStuck",
        "warning",
        66,
        {"workspace": "sales-enablement-apac", "model": "gpt-5", "status": "running"},
    ),
    Alert("CreatifyLedgerDown", "critical", 5, {"job": "creatify", "instance": "exporter-1:9877"}),
    Alert("CreatifyModelOverflow", "info", 100, {"workspace": "marketing-emea"}),
    Alert("CreatifyUnknownFailureReasons", "info", 100, {"workspace": "marketing-emea"}),
)

SCENARIOS = (
    # Prometheus knows of neither the exporter nor the rules.
    Scenario("nothing", {}, replicas=(), rules=False),
    Scenario(
        "all is well",
        TWO,
        hours=7,
        replicas=("exporter-1:9877", "exporter-2:9877"),
        restart=200,
        spikes=(Spike("marketing", "gemini-2.5-pro", 140, 120),),
        alerts=(
            Alert(
                "CreatifyModelFailureSpike", "warning", 130, {"workspace": "marketing", "model": "gemini-2.5-pro"}, 105
            ),
            Alert("CreatifyModelOverflow", "info", 400, {"workspace": "marketing"}, 100),
        ),
    ),
    Scenario("no failures", TWO, failures=False),
    Scenario(
        "one workspace down",
        TWO,
        down={"sales": "http"},
        alerts=(
            Alert("CreatifyWorkspaceDown", "critical", 30, {"workspace": "sales"}),
            Alert("CreatifyListingStale", "warning", 25, {"workspace": "sales"}),
        ),
    ),
    Scenario(
        "all workspaces down",
        TWO,
        down=dict.fromkeys(TWO, "auth"),
        alerts=tuple(Alert("CreatifyCredentialsRefused", "critical", 30, {"workspace": name}) for name in TWO),
    ),
    Scenario(
        "ledger down",
        TWO,
        ledger_down=15,
        alerts=(Alert("CreatifyLedgerDown", "critical", 10, {"job": "creatify", "instance": "exporter-1:9877"}),),
    ),
    # The API asks one workspace to wait, and refuses to tell the balance of the other.
    Scenario(
        "held back",
        TWO,
        down={"sales": "rate_limited"},
        down_minutes=12,
        held_back={"sales": 95},
        unsettled={"sales": 7},
        no_balance=("marketing",),
        alerts=(Alert("CreatifyBalanceUnknown", "warning", 5, {"workspace": "marketing"}),),
    ),
    Scenario("no exporter", TWO, gone=20, alerts=(Alert("CreatifyExporterAbsent", "critical", 10),)),
    Scenario("no rules", TWO, rules=False, restart=70, outage=25),
    Scenario("fresh start", {"default": 412.0}, hours=4 / 60, per_minute=0),
    Scenario("four tasks an hour", {"default": 412.0}, hours=8, per_minute=4 / 60),
    Scenario(
        "crowd",
        FIVE,
        hours=1.25,
        models=MANY_MODELS,
        reasons=tuple(USUAL),
        per_minute=20,
        ledger_down=5,
        stuck=("sales-enablement-apac", "gpt-5"),
        spikes=(Spike("marketing-us", "gpt-5-mini", 20, 0),),
        alerts=CROWD_ALERTS,
    ),
    Scenario(
        "a month",
        {"default": 90000.0},
        hours=30 * 24 + 12,
        models=FEW_MODELS[:1],
        per_minute=1.5,
        scrape=288,
        sparse=True,
        reasons=tuple(USUAL),
    ),
)
# Long before today, so that no time of a test is near it; the scenarios lie a day apart.
_EPOCH = 1_700_000_000 // DAY * DAY


def end_of(scenario: Scenario) -> float:
    """Return the Unix time at which a scenario ends."""
    end = _EPOCH
    for other in SCENARIOS:
        end += math.ceil(other.hours * HOUR / DAY) * DAY + DAY
        if other.name == scenario.name:
            return end
    raise LookupError(scenario.name)


def by_name(name: str) -> Scenario:
    """Return a scenario."""
    return next(scenario for scenario in SCENARIOS if scenario.name == name)


class _Counters:
    """What the ledger counted of one model of one workspace, and what the list shows of it."""

    def __init__(self, model: Model, reasons: Sequence[str]) -> None:
        self.model = model
        self.submitted = 0
        self.finished = {"done": 0, "failed": 0}
        self.reasons = dict.fromkeys(reasons, 0)
        self.buckets = [0] * len(BUCKETS)
        self.credits = 0.0
        self.pending = self.running = 0

    def finish(self, status: str, seconds: float, chance: random.Random, reason: str) -> float:
        """Count one more task; return its credits."""
        self.finished[status] += 1
        if status == "failed":
            self.reasons[reason] += 1
            return 0.0
        self.buckets[bisect_left(BUCKETS, seconds)] += 1
        cost = self.model.credits * chance.randrange(1, 5)
        self.credits += cost
        return cost


def _often(chance: random.Random, mean: float) -> int:
    """Return how often something happens that happens `mean` times on average (Poisson)."""
    if mean <= 0:
        return 0
    if mean > 30:
        return max(0, round(chance.gauss(mean, math.sqrt(mean))))
    count, product, limit = 0, chance.random(), math.exp(-mean)
    while product > limit:
        count, product = count + 1, product * chance.random()
    return count


class _Simulation:
    def __init__(self, scenario: Scenario, end: float) -> None:
        self.scenario, self.end = scenario, end
        self.start = end - scenario.hours * HOUR
        self.chance = random.Random(scenario.name)
        self.models = {
            w: [_Counters(model, scenario.reasons) for model in scenario.models] for w in scenario.workspaces
        }
        self.balance = dict(scenario.workspaces)
        self.last_success = dict.fromkeys(scenario.workspaces, self.start)
        self.errors = {w: dict.fromkeys(CAUSES, 0) for w in scenario.workspaces}
        self.requests: dict[str, dict[tuple[str, str], int]] = {w: {} for w in scenario.workspaces}

    def minutes_left(self, moment: float) -> float:
        return (self.end - moment) / MINUTE

    def is_down(self, workspace: str, moment: float) -> bool:
        return workspace in self.scenario.down and self.minutes_left(moment) < self.scenario.down_minutes

    def ledger_is_down(self, moment: float) -> bool:
        return self.minutes_left(moment) < self.scenario.ledger_down

    def advance(self, moment: float, minutes: float) -> None:
        """Let some minutes pass."""
        for number, workspace in enumerate(self.scenario.workspaces):
            down = self.is_down(workspace, moment)
            cause = self.scenario.down.get(workspace, "http")
            code = "200" if not down else {"auth": "401", "rate_limited": "429"}.get(cause, "502")
            balance = "401" if code == "401" else "403" if workspace in self.scenario.no_balance else "200"
            for key in (("text_generator", code), ("remaining_credits", balance)):
                self.requests[workspace][key] = self.requests[workspace].get(key, 0) + 1
            if down:
                self.errors[workspace][cause] += 1
                continue
            self.last_success[workspace] = moment
            if self.ledger_is_down(moment):
                self.errors[workspace]["ledger"] += 1
                continue
            rate = self.scenario.per_minute * (1 if number == 0 else 0.6) * minutes
            for counters in self.models[workspace]:
                self._work(workspace, counters, rate, moment)

    def _work(self, workspace: str, counters: _Counters, rate: float, moment: float) -> None:
        model, left = counters.model, self.minutes_left(moment)
        mean = rate * model.share / sum(other.share for other in self.scenario.models)
        failing, only = (model.failing if self.scenario.failures else 0), ""
        for spike in self.scenario.spikes:
            if (spike.workspace, spike.model) == (workspace, model.name) and spike.end <= left < spike.start:
                failing, only = 0.65, spike.reason
        count = _often(self.chance, mean * (1 + 0.4 * math.sin(moment / DAY * 2 * math.pi)))
        counters.submitted += count
        for _ in range(count):
            status = "failed" if self.chance.random() < failing else "done"
            reason = only or self.chance.choices(list(USUAL), list(USUAL.values()))[0]
            seconds = min(self.chance.lognormvariate(math.log(model.seconds), 0.6), 580)
            self.balance[workspace] -= counters.finish(status, seconds, self.chance, reason)
        self.balance[workspace] = max(self.balance[workspace], 12)
        counters.pending = _often(self.chance, mean / 8)
        # One at least: a gauge that goes stays for five minutes, as there are no staleness markers in OpenMetrics.
        counters.running = max(1, _often(self.chance, mean * model.seconds / 60)) if rate > 1 else 0

    def samples(self, moment: float) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield name, labels and value of all that a replica exposes now."""
        yield "up", {}, 1
        yield "creatify_exporter_ledger_up", {}, 0 if self.ledger_is_down(moment) else 1
        yield "creatify_exporter_config_last_reload_successful", {}, 1
        yield "process_resident_memory_bytes", {}, 41e6 + 2e6 * self.chance.random()
        yield "process_cpu_seconds_total", {}, (moment - self.start) * 0.012
        build = {"version": "1.0.0", "revision": "510e038", "python_version": "3.11.7"}
        yield "creatify_exporter_build_info", build, 1
        for workspace in self.scenario.workspaces:
            for name, labels, value in self._workspace(workspace, moment):
                yield name, {"workspace": workspace, **labels}, value

    def figures(self, moment: float) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield what is listed and what the ledger counted, and the least that goes with it."""
        for workspace in self.scenario.workspaces:
            yield "creatify_up", {"workspace": workspace}, 1
            yield "creatify_remaining_credits", {"workspace": workspace}, round(self.balance[workspace], 2)
            for reason in self.scenario.reasons:
                labels = {"workspace": workspace, "reason": reason, "owner": OWNERS[reason]}
                yield "creatify_text_generator_failure_reason_info", labels, 1
            for counters in self.models[workspace]:
                for name, labels, value in (*self._listed(workspace, counters, moment), *self._counted(counters)):
                    yield name, {"workspace": workspace, **labels}, value

    def _workspace(self, workspace: str, moment: float) -> Iterator[tuple[str, dict[str, str], float]]:
        down = self.is_down(workspace, moment)
        unread = (down and self.scenario.down[workspace] == "auth") or workspace in self.scenario.no_balance
        yield "creatify_up", {}, 0 if down else 1
        yield "creatify_exporter_last_success_timestamp_seconds", {}, self.last_success[workspace] + 0.4
        yield "creatify_exporter_listing_duration_seconds", {}, round(self.chance.uniform(0.6, 1.4), 3)
        yield "creatify_exporter_ledger_start_timestamp_seconds", {}, self.start
        yield "creatify_exporter_ledger_tasks", {}, 600 + sum(c.submitted for c in self.models[workspace])
        yield "creatify_exporter_unsettled_tasks", {}, self.scenario.unsettled.get(workspace, 0)
        if down and workspace in self.scenario.held_back:
            until = self.end + self.scenario.held_back[workspace]
            yield "creatify_exporter_backoff_until_timestamp_seconds", {"endpoint": "text_generator"}, until
        yield "creatify_exporter_clock_offset_seconds", {}, round(self.chance.uniform(-0.4, 0.4), 3)
        yield "creatify_exporter_balance_up", {}, 0 if unread else 1
        if not unread:
            yield "creatify_remaining_credits", {}, round(self.balance[workspace], 2)
        for cause, count in self.errors[workspace].items():
            yield "creatify_exporter_listing_errors_total", {"cause": cause}, count
        for (endpoint, code), count in self.requests[workspace].items():
            yield "creatify_exporter_api_requests_total", {"endpoint": endpoint, "code": code}, count
        for reason in self.scenario.reasons:
            labels = {"reason": reason, "owner": OWNERS[reason]}
            yield "creatify_text_generator_failure_reason_info", labels, 1
        if not down:
            listed = sum(sum(c.finished.values()) for c in self.models[workspace])
            yield "creatify_exporter_listing_size_bytes", {}, 2700 * min(900, listed)
            yield "creatify_exporter_malformed_tasks", {}, 0
        for counters in self.models[workspace]:
            if not down:
                yield from self._listed(workspace, counters, moment)
            yield from self._counted(counters)

    def _listed(
        self, workspace: str, counters: _Counters, moment: float
    ) -> Iterator[tuple[str, dict[str, str], float]]:
        model = counters.model
        unfinished = {"pending": counters.pending, "running": counters.running}
        stuck = self.scenario.stuck == (workspace, model.name)
        if stuck:
            unfinished["running"] += 1
        counts = unfinished | {status: min(count, _LISTED[status]) for status, count in counters.finished.items()}
        for status, count in counts.items():
            yield "creatify_text_generator_tasks", {"model": model.name, "status": status}, count
        for status, count in unfinished.items():
            if count:
                age = 5000.0 if stuck and status == "running" else self.chance.uniform(0.3, 3) * model.seconds
                name = "creatify_text_generator_oldest_unfinished_task_timestamp_seconds"
                yield name, {"model": model.name, "status": status}, round(moment - age, 2)

    def _counted(self, counters: _Counters) -> Iterator[tuple[str, dict[str, str], float]]:
        model = {"model": counters.model.name}
        yield "creatify_text_generator_tasks_submitted_total", model, counters.submitted
        yield "creatify_text_generator_credits_used_total", model, round(counters.credits, 2)
        for reason, count in counters.reasons.items():
            yield "creatify_text_generator_failures_total", {**model, "reason": reason}, count
        for status, count in counters.finished.items():
            yield "creatify_text_generator_tasks_finished_total", {**model, "status": status}, count
        for bound, count in zip(BOUNDS, accumulate(counters.buckets), strict=True):
            labels = {**model, "status": "done", "le": bound}
            yield "creatify_text_generator_task_duration_seconds_bucket", labels, count


# The list holds the newest tasks.
_LISTED = {"done": 400, "failed": 16}
# The lines of each series, by its name and the values of its labels, which each name has in one order.
Lines = dict[tuple[str, ...], list[str]]


def _write(lines: Lines, name: str, labels: Mapping[str, str], value: float, moment: float) -> None:
    series = lines.setdefault((name, *labels.values()), [])
    if not series:
        series.append(name + "{" + ",".join(f'{label}="{text}"' for label, text in labels.items()) + "}")
    series.append(f" {value} {moment}\n")


def openmetrics(scenario: Scenario, end: float) -> str:
    """Return the samples of a scenario as OpenMetrics text, series by series."""
    lines: Lines = {}
    simulation = _Simulation(scenario, end)
    # Replicas are scraped one after the other, as far apart as can be, and show what is true at their time.
    tick = scenario.scrape / len(scenario.replicas)
    ticks = int(scenario.hours * HOUR / tick)
    for number in range(ticks + 1):
        moment = end - (ticks - number) * tick - scenario.scrape + OFFSET
        if number:
            simulation.advance(moment, tick / MINUTE)
        _write_rules(lines, scenario, end, moment)
        replica = scenario.replicas[number % len(scenario.replicas)]
        if simulation.minutes_left(moment) < scenario.gone or _restarts(scenario, simulation, moment):
            continue
        labels = {"job": "creatify", "instance": replica}
        restarted = end - (scenario.restart - scenario.outage) * MINUTE - 20
        started = restarted if _restarted(scenario, simulation, moment) else simulation.start
        _write(lines, "process_start_time_seconds", labels, started, moment)
        lasting = not scenario.sparse or simulation.minutes_left(moment) < 120
        for name, more, value in simulation.samples(moment) if lasting else simulation.figures(moment):
            _write(lines, name, {**labels, **more}, value, moment)
    return "".join(name + line for name, *samples in lines.values() for line in samples) + "# EOF\n"


def _restarts(scenario: Scenario, simulation: _Simulation, moment: float) -> bool:
    """Tell whether a scrape fails because the exporter restarts."""
    return bool(scenario.restart) and 0 <= scenario.restart - simulation.minutes_left(moment) < scenario.outage


def _restarted(scenario: Scenario, simulation: _Simulation, moment: float) -> bool:
    return bool(scenario.restart) and simulation.minutes_left(moment) <= scenario.restart - scenario.outage


def _write_rules(lines: Lines, scenario: Scenario, end: float, moment: float) -> None:
    """Write what the rules of prometheus/alerts.yml record and raise."""
    if not scenario.rules:
        return
    _write(lines, "creatify:dashboard:info", {"grafana_url": "http://localhost:3000"}, 1, moment)
    for alert in scenario.alerts:
        if end - alert.minutes * MINUTE <= moment <= end - alert.until * MINUTE:
            labels = {"alertname": alert.name, "severity": alert.severity, **alert.labels}
            _write(lines, "ALERTS", {**labels, "alertstate": "firing"}, 1, moment)
            _write(lines, "ALERTS_FOR_STATE", labels, end - alert.minutes * MINUTE - 300, moment)


def write_tsdb(directory: Path, scenarios: Sequence[Scenario] = SCENARIOS, hours: float | None = None) -> None:
    """Fill an empty directory with the blocks of scenarios; Prometheus takes it as its storage."""
    (promtool,) = require("promtool")
    directory.mkdir(parents=True, exist_ok=True)
    for scenario in scenarios:
        if not scenario.replicas:
            continue
        text = openmetrics(replace(scenario, hours=hours or scenario.hours), end_of(scenario))
        source = directory.parent / "openmetrics.txt"
        source.write_text(text, encoding="utf-8")
        command = [promtool, "tsdb", "create-blocks-from", "--max-block-duration=720h", "openmetrics", "--quiet"]
        # One core, and few collections of garbage, cost less.
        environment = os.environ | {"GOMAXPROCS": "1", "GOGC": "400"}
        subprocess.run([*command, str(source), str(directory)], check=True, stdout=subprocess.DEVNULL, env=environment)
        source.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a TSDB with scenarios.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--hours", type=float)
    arguments = parser.parse_args()
    chosen = [scenario for scenario in SCENARIOS if not arguments.names or scenario.name in arguments.names]
    write_tsdb(arguments.directory, chosen, arguments.hours)
    for shown in chosen:
        print(f"{shown.name}: until {end_of(shown):.0f}")
