"""What the rules of prometheus/alerts.yml have to record, worked out from the samples of a promtool case.

By definition, and with the formulas as textbooks write them: nothing of PromQL is in here. Times are minutes.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Labels = frozenset[tuple[str, str]]
Values = dict[Labels, float]
WINDOWS = {"15m": 15, "1h": 60, "6h": 360}
LATELY = {"15m": 5, "1h": 20, "6h": 20}
_T = "creatify_text_generator_"


def expand(values: str) -> list[str]:
    """Return the samples of promtool's notation one by one."""
    samples: list[str] = []
    for token in values.split():
        if match := re.fullmatch(r"(-?[\d.]+)(?:([+-][\d.]+))?x(\d+)", token):
            start, step, times = float(match[1]), float(match[2] or 0), int(match[3])
            samples += [f"{start + step * n:.10g}" for n in range(times + 1)]
        elif match := re.fullmatch(r"_x(\d+)", token):
            samples += ["_"] * int(match[1])
        else:
            samples.append(token)
    return samples


def wilson(failed: float, finished: float, z: float) -> float:
    """Return the lower bound of Wilson's interval of a ratio, as its textbooks write it."""
    p, n = failed / finished, finished
    return (p + z**2 / (2 * n) - z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))) / (1 + z**2 / n)


def by(aggregate: Callable[[Sequence[float]], float], values: Values, *names: str) -> Values:
    """Return values aggregated by some labels."""
    groups = defaultdict[Labels, list[float]](list)
    for labels, value in values.items():
        groups[frozenset(pair for pair in labels if pair[0] in names)].append(value)
    return {labels: aggregate(group) for labels, group in groups.items()}


def tagged(values: Values, **more: str) -> Values:
    """Return values with further labels."""
    return {labels | set(more.items()): value for labels, value in values.items()}


class Figures:
    """What is recorded at a minute, when the rules are evaluated every `step` minutes."""

    def __init__(self, case: Mapping[str, Any], at: int, step: int, settings: Mapping[str, float]) -> None:
        self._at, self._step, self._settings = at, step, settings
        self._series: dict[str, dict[Labels, list[str]]] = defaultdict(dict)
        for one in case["input_series"]:
            metric, _, labels = one["series"].partition("{")
            self._series[metric][frozenset(re.findall(r'(\w+)="([^"]*)"', labels))] = expand(one["values"])

    def _samples(self, metric: str, first: int, last: int) -> Iterator[tuple[Labels, list[float]]]:
        for labels, samples in self._series[metric].items():
            found = [float(sample) for sample in samples[max(first, 0) : last + 1] if sample not in ("_", "stale")]
            if found:
                yield labels, found

    def grown(self, metric: str, window: int, last: int = 15, at: int | None = None) -> Values:
        """Return what each counter of a replica grew by in a window: the newest value less the smallest."""
        now = self._at if at is None else at
        newest = {labels: found[-1] for labels, found in self._samples(_T + metric, now - last, now)}
        least = {labels: min(found) for labels, found in self._samples(_T + metric, now - window, now)}
        return {labels: value - least[labels] for labels, value in newest.items()}

    def finished(self, window: str, at: int | None = None) -> Values:
        """Return the tasks that finished in a window, by workspace, model and status."""
        return by(max, self.grown("tasks_finished_total", WINDOWS[window], at=at), "workspace", "model", "status")

    def failures(self, window: str, at: int | None = None) -> Values:
        """Return the failures of a window by workspace and reason."""
        of_models = by(max, self.grown("failures_total", WINDOWS[window], at=at), "workspace", "model", "reason")
        return by(sum, of_models, "workspace", "reason")

    def credits_used(self, window: str, at: int | None = None, share: Values | None = None) -> Values:
        """Return the credits of a window by workspace, of each replica the share that is of that window."""
        grown = self.grown("credits_used_total", WINDOWS[window], at=at)
        if share is not None:
            keys = by(max, tagged(grown), "job", "instance", "workspace")
            grown = {
                labels: value * share[key]
                for labels, value in grown.items()
                for key in keys
                if key <= labels and key in share
            }
        return by(sum, by(max, grown, "workspace", "model"), "workspace")

    def known(self, at: int) -> Values:
        """Return of how many hours the counts of 6 hours are, by workspace."""
        metric, window = "creatify_exporter_last_success_timestamp_seconds", WINDOWS["6h"]
        newest = {labels: found[-1] for labels, found in self._samples(metric, at - 15, at)}
        oldest = {labels: found[0] for labels, found in self._samples(metric, at - window, at)}
        begun = {
            labels: found[-1]
            for labels, found in self._samples("creatify_exporter_ledger_start_timestamp_seconds", at - 15, at)
        }
        seconds = {labels: value - max(oldest[labels], begun.get(labels, 0)) for labels, value in newest.items()}
        return by(max, {labels: value / 3600 for labels, value in seconds.items()}, "workspace")

    def day(self, of: Callable[[int], Values]) -> Values:
        """Return the sum of the four times 6 hours that end an hour ago."""
        total = defaultdict[Labels, float](float)
        for hours in (1, 7, 13, 19):
            for labels, value in of(self._at - 60 * hours).items():
                total[labels] += value
        return dict(total)

    def recorded(self, at: int) -> Values:
        """Return the replicas that list and record a workspace, with the time in seconds."""
        errors = "creatify_exporter_listing_errors_total"
        failing = {
            labels - {("cause", "ledger")}
            for labels, found in self._samples(errors, at - 5, at)
            if ("cause", "ledger") in labels and found[-1] > found[0]
        }
        up = {labels for labels, found in self._samples("creatify_up", at, at) if found[-1] == 1}
        return dict.fromkeys(up - failing, 60.0 * at)

    def shares_of_an_hour(self) -> Values:
        """Return for each replica which part of the growth of an hour is from that hour, and 5 minutes."""
        last: Values = {}
        for moment in range(self._step * math.ceil(max(self._at - 1500, 0) / self._step), self._at - 59, self._step):
            last |= self.recorded(moment)
        return {labels: min(3900 / (60 * self._at - then), 1) for labels, then in last.items()}

    def all(self) -> dict[str, Values]:
        """Return every figure by the name of its rule."""
        z, factor = self._settings["confidence_z"], self._settings["reason_factor"]
        finished = self._windows(self.finished)
        failed = {labels: value for labels, value in finished.items() if ("status", "failed") in labels}
        failures = self._windows(self.failures)
        lately = {
            window: by(max, self.grown("tasks_finished_total", minutes, minutes), "workspace", "model", "status")
            for window, minutes in LATELY.items()
        }
        hours, in_a_day = self.day(self.known), self.day(lambda at: by(sum, self.finished("6h", at), "workspace"))
        day = self.day(lambda at: self.failures("6h", at))
        in_a_window = by(sum, finished, "workspace", "window")
        shares = {
            labels | {("window", window)}: max(
                part / known, in_a_window.get(labels | {("window", window)}, 0) / in_a_day.get(labels, math.inf)
            )
            for labels, known in hours.items()
            for window, part in (("15m", 0.25), ("1h", 1.0))
        }
        bounds = {
            labels: max(math.sqrt(failures[labels]) - z / 2, 0) ** 2 / share
            for labels in failures
            for of, share in shares.items()
            if of <= labels
        }
        above = {
            labels: bound
            for labels, bound in bounds.items()
            for reason, usual in day.items()
            if reason <= labels and bound > factor * (usual + 1)
        }
        still = by(max, self.grown("failures_total", 20, 20), "workspace", "reason")
        spikes = {labels: bound for labels, bound in by(max, above, "workspace", "reason").items() if still[labels] > 0}
        owners = by(len, dict.fromkeys(self._owners(), 1.0), "workspace", "reason")
        used = self.credits_used("1h", share=self.shares_of_an_hour())
        usual_credits = self.day(lambda at: self.credits_used("6h", at))
        in_an_hour = {labels: value for labels, value in in_a_window.items() if ("window", "1h") in labels}
        counted = {labels - {("window", "1h")} for labels in in_an_hour}
        tasks = in_an_hour | {labels: value for labels, value in used.items() if labels not in counted}
        mean = {
            labels: (usual_credits[labels] + value / of_tasks) / hours[labels]
            for labels, value in used.items()
            for of, of_tasks in tasks.items()
            if labels <= of
        }
        balance = {
            labels: found[-1] for labels, found in self._samples("creatify_remaining_credits", self._at - 5, self._at)
        }
        return {
            f"workspace_model_status:{_T}tasks_finished:increase": finished,
            f"workspace_model_status:{_T}tasks_finished:recent": {
                labels: value for window in lately for labels, value in tagged(lately[window], window=window).items()
            },
            f"workspace:{_T}tasks_finished:increase": in_a_window,
            f"workspace:{_T}tasks_failed:increase": by(sum, failed, "workspace", "window"),
            f"workspace_model:{_T}tasks_finished:increase": by(sum, finished, "workspace", "model", "window"),
            f"workspace_model:{_T}tasks_failed:increase": by(sum, failed, "workspace", "model", "window"),
            f"workspace_reason:{_T}failures:increase": failures,
            f"workspace_reason:{_T}failures:day": day,
            f"workspace:{_T}tasks_finished:day": in_a_day,
            "workspace:creatify_exporter_last_success:increase6h": {
                labels: 3600 * value for labels, value in self.known(self._at).items()
            },
            "workspace:creatify_exporter_last_success:day_hours": hours,
            f"workspace:{_T}tasks_finished:share_of_day": shares,
            f"workspace_reason:{_T}failures:lower_bound": bounds,
            f"workspace_reason:{_T}failures:spike": spikes,
            f"workspace_reason:{_T}failure_reason:info": {
                labels: 1.0 for labels in self._owners() for of, count in owners.items() if of <= labels and count == 1
            },
            "creatify:recorded:timestamp_seconds": self.recorded(self._at),
            "creatify:recorded:share1h": self.shares_of_an_hour(),
            f"workspace:{_T}credits_used:increase1h": used,
            f"workspace:{_T}credits_used:increase6h": self.credits_used("6h"),
            f"workspace:{_T}credits_used:day": usual_credits,
            f"workspace:{_T}credits_used:tasks1h": tasks,
            f"workspace:{_T}credits_used:mean_hour": mean,
            "workspace:creatify_remaining_credits:max": by(max, balance, "workspace"),
        }

    def _windows(self, of: Callable[[str], Values]) -> Values:
        return {labels: value for window in WINDOWS for labels, value in tagged(of(window), window=window).items()}

    def _owners(self) -> set[Labels]:
        found = self._samples(f"{_T}failure_reason_info", self._at, self._at)
        return {
            frozenset(pair for pair in labels if pair[0] in ("workspace", "reason", "owner")) for labels, _ in found
        }
