"""The shipped rules over what the real exporter exposes, in simulated time: the demo, and a day and a half."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from creatify_exporter.demo import CREDENTIALS, SPIKE, Model, demo, spike_times
from prometheus import simulate
from tests.support.exporter import Exporter
from tests.support.packages import require
from tests.support.processes import eventually
from tests.support.scraped import DatedApi, Lived, intervals
from tests.support.simulation import Simulation

pytestmark = pytest.mark.process

START = 1_790_000_000.0
RULES = yaml.safe_load(simulate.ALERTS_FILE.read_text(encoding="utf-8"))
Fired = dict[str, list[tuple[dict[str, str], int, int]]]
"""Alerts by name: labels, first and last minute."""


def fired(lived: Lived, scrape: int, minutes: range) -> Fired:
    """Return what fires over the samples of a life."""
    times = defaultdict[tuple[tuple[str, str], ...], list[int]](list)
    for minute, labels in simulate.fired(lived.samples.series(), scrape, minutes, RULES):
        times[tuple(labels.items())].append(minute)
    found: Fired = defaultdict(list)
    for pairs, moments in times.items():
        found[dict(pairs)["alertname"]] += [(dict(pairs), *row) for row in intervals(moments, minutes.step)]
    return found


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep the exporter's log to itself."""
    with capture_logs():
        yield


@pytest.mark.parametrize("scrape", [15, 60])
def test_the_demos_failure_spike_fires_a_shipped_alert_within_ten_minutes_and_the_log_says_when(
    tmp_path: Path, scrape: int
) -> None:
    require("promtool")

    def dated(clock: Any) -> DatedApi:
        with demo(clock) as api:
            (simulation,) = api.workspaces.values()
        return DatedApi({CREDENTIALS: simulation}, clock)  # type: ignore[dict-item]  # it keeps no account

    lived = Lived(tmp_path, START, dated, exposition={"zero_hold": "0s"})
    lived.run(scrape, 900 // scrape + 1, lambda _: {})
    alerts = fired(lived, scrape, range(16))
    ((labels, first, last),) = alerts["CreatifyModelFailureSpike"]
    begins = datetime.fromtimestamp(START + SPIKE.begin)
    told = spike_times(lambda: START)
    assert (labels["model"], f"{begins:%H:%M:%S}") == (told["model"], told["begins"])
    assert SPIKE.begin / 60 < first < SPIKE.end / 60 < 10
    assert last > first
    assert alerts.keys() <= {"CreatifyModelFailureSpike", "CreatifyFailureSpike", "CreatifyFailureReasonSpike"}


def test_the_demos_log_says_when_the_spike_begins(tmp_path: Path) -> None:
    with Exporter(tmp_path, "--demo") as exporter:
        said = eventually(lambda: re.findall(r"the demo has a failure spike soon.*", exporter.log()), 20, "the log")
    assert f"model={SPIKE.model}" in said[0]
    assert re.search(r"begins=\d\d:\d\d:\d\d ends=\d\d:\d\d:\d\d", said[0])


# ---- A day and a half: an exporter and its Prometheus live through it, at one scrape a minute. The exporter lists
# every minute when something begins or ends, and every five minutes otherwise.

MINUTE, HOURS, EVERY = 60, 36, 2
MODELS = (Model("steady", 2, 4, 0.05, 5), Model("thin", 1, 8, 0.05, 5), Model("new", 1, 3, 0.05, 5, since=240 * MINUTE))


@dataclass(frozen=True)
class Incident:
    """What happens in some minutes, and the alerts that say so, each with the minutes that it may take.

    `may` are those that may say so too, and `after` is for how many minutes the alerts may go on.
    """

    begin: int
    minutes: int
    alerts: Mapping[str, int] = field(default_factory=dict)
    may: frozenset[str] = frozenset()
    after: int = 15

    def holds(self, minute: float) -> bool:
        return self.begin <= minute < self.begin + self.minutes


# The window of an alert, or how long it waits, and 5 minutes.
OUTAGE = Incident(420, 120, {"CreatifyWorkspaceDown": 15, "CreatifyListingStale": 20, "CreatifyBalanceUnknown": 65})
THIN_FAILS = Incident(
    720, 60, {"CreatifyModelFailureSpike": 20}, may=frozenset({"CreatifyFailureReasonSpike"}), after=75
)
REFUSED = Incident(960, 45, {"CreatifyCredentialsRefused": 15, "CreatifyListingStale": 20})
STUCK = Incident(1140, 120, {"CreatifyTasksStuck": 35})
DEAR = Incident(1400, 90, {"CreatifySpendingSpike": 65}, after=80)
ALL_FAIL = Incident(
    1800,
    60,
    {"CreatifyFailureSpike": 20, "CreatifyModelFailureSpike": 20, "CreatifyFailureReasonSpike": 65},
    after=75,
)
INCIDENTS = (OUTAGE, THIN_FAILS, REFUSED, STUCK, DEAR, ALL_FAIL)
# The exporter begins anew: in calm, and amid failures; Prometheus is away.
RESTARTS, AWAY = (360, 1830, 1980), Incident(660, 10)


class Eventful(Simulation):
    """A simulated workspace in which the incidents happen."""

    def _arrive(self, at: int) -> None:
        minute = (at / 1e6 - self.start) / MINUTE
        self.models = [replace(model, hundredths=50) for model in MODELS] if DEAR.holds(minute) else MODELS
        super()._arrive(at)
        if STUCK.holds(minute) and "stuck" not in self._remembered:
            end = round((self.start + (STUCK.begin + STUCK.minutes) * MINUTE) * 1e6)
            begun = round((self.start + STUCK.begin * MINUTE - 10) * 1e6)
            stuck = replace(self.tasks[-1], id="stuck", created=begun, started=begun, charged=end, finished=end)
            self.tasks.append(stuck)
            self._remembered["stuck"] = stuck


def eventful(clock: Any) -> DatedApi:
    simulation = Eventful(
        5, clock(), rate=96 / 3600, history=100, window=400, record_size=0, media_share=0.0, models=MODELS
    )
    simulation.spike(START + THIN_FAILS.begin * MINUTE, THIN_FAILS.minutes * MINUTE, "thin", 1.0)
    simulation.spike(START + ALL_FAIL.begin * MINUTE, ALL_FAIL.minutes * MINUTE, None, 1.0)

    def fault(_: str) -> tuple[int, dict[str, str]] | None:
        minute = (clock() - START) / MINUTE
        return (503, {}) if OUTAGE.holds(minute) else (401, {}) if REFUSED.holds(minute) else None

    return DatedApi({CREDENTIALS: simulation}, clock, fault)


def what_happens(minute: int) -> Mapping[str, bool]:
    """Return what is special about a minute, for `Lived.run`."""
    since_restart = min((minute - restart for restart in RESTARTS if minute >= restart), default=math.inf)
    turns = [turn for incident in INCIDENTS for turn in (incident.begin, incident.begin + incident.minutes)]
    return {
        "restart": since_restart == 2,
        "gone": since_restart < 2,
        "unwatched": AWAY.holds(minute),
        "same": minute % 5 > 0 and since_restart > 5 and not any(turn <= minute < turn + 20 for turn in turns),
    }


@pytest.mark.timeout(280)
def test_in_a_day_and_a_half_every_incident_raises_its_alert_in_time_and_nothing_else_fires(tmp_path: Path) -> None:
    require("promtool")
    lived = Lived(tmp_path, START, eventful)
    lived.run(MINUTE, HOURS * 60, what_happens)
    alerts = fired(lived, MINUTE, range(0, HOURS * 60, EVERY))
    for incident in INCIDENTS:
        for alert, within in incident.alerts.items():
            begun = [first for _, first, _ in alerts[alert] if incident.holds(first)]
            # The rules are evaluated half as often here.
            assert min(begun, default=math.inf) <= incident.begin + within + EVERY - 1, (alert, alerts[alert])
    for alert, times in alerts.items():
        meant = [incident for incident in INCIDENTS if alert in incident.alerts or alert in incident.may]
        for labels, first, last in times:
            assert any(i.holds(first) and last <= i.begin + i.minutes + i.after for i in meant), (labels, first, last)
    failing = alerts["CreatifyModelFailureSpike"]
    assert [labels["model"] for labels, first, _ in failing if THIN_FAILS.holds(first)] == ["thin"]
    assert {labels["model"] for labels, first, _ in failing if ALL_FAIL.holds(first)} == {"steady", "thin", "new"}
