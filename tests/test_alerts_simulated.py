"""What the spike alerts see, and how often they are wrong: the short simulation, and what the runbook says."""

import re
import statistics
from collections import defaultdict

import pytest

from prometheus import simulate
from tests.support.packages import require

pytestmark = pytest.mark.process

# By tasks an hour and failing share: which part has to be seen, and after how many minutes half of them.
PROMISED = {
    (6, 1.0): (0.9, 60),
    (20, 1.0): (1.0, 15),
    (60, 1.0): (1.0, 12),
    (300, 1.0): (1.0, 12),
    (20, 0.7): (0.95, 35),
    (60, 0.7): (1.0, 15),
    (300, 0.45): (1.0, 20),
}
FALSE_ALARMS_IN_100_DAYS = 5.0

Result = tuple[list[simulate.Seen], list[simulate.Wrong]]


@pytest.fixture(scope="module")
def simulated() -> Result:
    require("promtool")
    return simulate.short()


@pytest.mark.timeout(280)
def test_incidents_are_seen_at_any_volume_and_while_listings_fail(simulated: Result) -> None:
    delays: dict[tuple[int, float], list[int]] = defaultdict(list)
    workspaces: dict[tuple[int, float], int] = defaultdict(int)
    for seen in simulated[0]:
        delays[seen.volume, seen.incident] += seen.delays
        workspaces[seen.volume, seen.incident] += seen.workspaces
    for kind, (share, median) in PROMISED.items():
        assert len(delays[kind]) >= share * workspaces[kind], kind
        assert statistics.median(delays[kind]) <= median, (kind, delays[kind])


def test_calm_days_are_silent(simulated: Result) -> None:
    assert simulate.per_100_days(simulated[1]) <= FALSE_ALARMS_IN_100_DAYS


def test_the_runbook_shows_a_table_that_keeps_the_promises_too() -> None:
    text = simulate.RUNBOOK.read_text(encoding="utf-8").partition(simulate.BEGIN)[2].partition(simulate.END)[0]
    rows = dict(re.findall(r"^\| (\d+ \| \d+%) \| (.+) \|$", text, re.MULTILINE))
    for (volume, incident), (share, median) in PROMISED.items():
        cells = re.findall(r"(\d+) of (\d+): (\d+), \d+", rows[f"{volume} | {incident:.0%}"])
        assert len(cells) == len(simulate.LIVES)
        assert sum(int(seen) for seen, _, _ in cells) >= share * sum(int(of) for _, of, _ in cells), (volume, incident)
        assert statistics.median(int(half) for _, _, half in cells) <= median, (volume, incident)
    (row,) = re.findall(r"^\| all \| (.+) \|$", text, re.MULTILINE)
    false_alarms = [float(rate) for rate in row.split(" | ")]
    assert len(false_alarms) == len(simulate.LIVES), "both scrape intervals, with and without failing listings"
    assert max(false_alarms) <= FALSE_ALARMS_IN_100_DAYS


def test_an_alarm_is_counted_once_however_long_it_lasts() -> None:
    assert [simulate.starts(minutes) for minutes in ([], [3], [3, 4, 5], [3, 4, 9, 10])] == [0, 1, 1, 2]


def test_the_rules_of_an_alert_are_those_that_it_is_made_from() -> None:
    groups = simulate.rules_of([simulate.FAILURE_SPIKE])["groups"]
    names = {rule.get("alert") or rule["record"] for group in groups for rule in group["rules"]}
    assert "creatify:threshold:confidence_z" in names
    assert names & set(simulate.SPIKES) == {simulate.FAILURE_SPIKE}
    assert not any("credits" in name for name in names)
