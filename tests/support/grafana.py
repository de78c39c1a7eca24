"""The dashboard as Grafana would use it: panels, queries, variables put in, and the texts and colours of values."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.prometheus import Series

GRAFANA = Path(__file__).resolve().parents[2] / "grafana"
DASHBOARD_FILE = GRAFANA / "dashboards" / "creatify-text-generator.json"
VARIABLES = ("job", "instance", "workspace", "model", "reason")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Target:
    """One query of a panel."""

    panel: Mapping[str, Any]
    ref: str
    expr: str
    legend: str
    instant: bool

    def __str__(self) -> str:
        return f"{self.panel['title']} ({self.ref})"


@dataclass(frozen=True)
class Shown:
    """A value as it is seen: its text, where a mapping gives it one, and the colour of the text or the ground."""

    value: float | str
    text: str
    color: str


def load(path: Path = DASHBOARD_FILE) -> dict[str, Any]:
    """Return a dashboard."""
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all panels but rows, those of collapsed rows too."""
    everything = [p for panel in dashboard["panels"] for p in (panel, *panel.get("panels", []))]
    return [panel for panel in everything if panel["type"] != "row"]


def targets(dashboard: Mapping[str, Any]) -> list[Target]:
    """Return the queries of all panels."""
    return [target for panel in panels(dashboard) for target in targets_of(panel)]


def targets_of(panel: Mapping[str, Any]) -> list[Target]:
    """Return the queries of a panel."""
    return [
        Target(panel, t["refId"], t["expr"], t.get("legendFormat", ""), bool(t.get("instant")))
        for t in panel["targets"]
    ]


def labels_of(template: str) -> set[str]:
    """Return the names of the labels in a legend or an annotation."""
    return set(re.findall(r"{{\s*(\w+)\s*}}", template))


def legend(template: str, labels: Mapping[str, str]) -> str:
    """Return the name of a series."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), template)


def seconds(duration: str) -> float:
    """Return a duration like 15m in seconds."""
    return int(duration[:-1]) * _UNITS[duration[-1]]


def substitute(
    expr: str,
    *,
    scrape: float,
    interval: float,
    time_range: float,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Return a query with its variables put in, as Grafana does it.

    Times are seconds: `scrape` is the data source's timeInterval, `interval` the step of the query, `time_range` what
    the dashboard shows. Variables are All unless given.
    """
    values = dict.fromkeys(VARIABLES, ".+") | dict(variables or {})
    values |= {
        "__rate_interval": f"{max(interval + scrape, 4 * scrape):.0f}s",
        "__interval": f"{interval:.0f}s",
        "__interval_ms": f"{interval * 1000:.0f}",
        "__range": f"{time_range:.0f}s",
    }
    return re.sub(r"\$(?:{(\w+)}|(\w+))", lambda match: values[match[1] or match[2]], expr)


def step(panel: Mapping[str, Any], *, scrape: float, time_range: float, width: int = 800) -> float:
    """Return the seconds between two points of a graph: what its width or its limit of points admits."""
    points = int(panel.get("maxDataPoints", width))
    return max(scrape, math.ceil(time_range / points / scrape) * scrape)


def properties(panel: Mapping[str, Any], *, name: str = "", ref: str = "") -> dict[str, Any]:
    """Return the options of a field: the panel's, overruled by those for its query and its name."""
    found = dict(panel["fieldConfig"]["defaults"])
    for override in panel["fieldConfig"]["overrides"]:
        wanted = {"byName": name, "byFrameRefID": ref}[override["matcher"]["id"]]
        if wanted and override["matcher"]["options"] == wanted:
            found |= {p["id"]: p["value"] for p in override["properties"]}
    return found


def show(options: Mapping[str, Any], value: float | str) -> Shown:
    """Return how a value looks: mappings come first, then a fixed colour, then thresholds."""
    mapped = next(filter(None, (_mapped(m, value) for m in options.get("mappings") or [])), {})
    color = mapped.get("color") or _colored(options, value)
    return Shown(value, mapped.get("text", value if isinstance(value, str) else ""), color)


def _colored(options: Mapping[str, Any], value: float | str) -> str:
    scheme = options.get("color") or {}
    if scheme.get("mode") == "fixed":
        return str(scheme["fixedColor"])
    steps = (options.get("thresholds") or {}).get("steps", [])
    reached = [s["color"] for s in steps if s["value"] is None or (not isinstance(value, str) and value >= s["value"])]
    return str(reached[-1]) if reached else ""


def _mapped(mapping: Mapping[str, Any], value: float | str) -> Mapping[str, Any] | None:
    options: Any = mapping["options"]
    result: Mapping[str, Any]
    match mapping["type"], value:
        case "value", _:
            found: Mapping[str, Any] | None = options.get(value if isinstance(value, str) else f"{value:g}")
            return found
        case "regex", str():
            result = options["result"]
            return result if re.search(options["pattern"].strip("/"), value) else None
        case "range", float():
            low, high = options["from"], options["to"]
            inside = (low is None or value >= low) and (high is None or value <= high)
            result = options["result"]
            return result if inside else None
        case "special", float():
            result = options["result"]
            return result if options["match"] == "null+nan" and math.isnan(value) else None
    return None


def stat(panel: Mapping[str, Any], answers: Mapping[str, Sequence[Series]]) -> list[tuple[str, Shown]]:
    """Return names and values of a stat by the answers to its queries; without any, what it says instead."""
    found = [
        (legend(target.legend, series.labels) if target.legend != "__auto" else "", series.value, target.ref)
        for target in targets_of(panel)
        for series in answers[target.ref]
    ]
    if not found:
        empty = panel["fieldConfig"]["defaults"]
        return [("", Shown(math.nan, empty["noValue"], empty["thresholds"]["steps"][0]["color"]))]
    return [(name, show(properties(panel, name=name, ref=ref), value)) for name, value, ref in found]


def table(panel: Mapping[str, Any], answers: Mapping[str, Sequence[Series]]) -> list[dict[str, Shown]]:
    """Return the lines of a table, by the titles of the columns, in the order in which they are shown.

    Answers are joined as the transformation `merge` does it: by the labels that they have in common.
    """
    titles = next(t["options"]["renameByName"] for t in panel["transformations"] if t["id"] == "organize")
    given = [answer for answer in answers.values() if answer]
    common = set.intersection(*({label for s in answer for label in s.labels} for answer in given)) if given else set()
    merged: dict[tuple[str, ...], dict[str, float | str]] = {}
    for ref, answer in answers.items():
        for series in answer:
            line = merged.setdefault(tuple(series.labels.get(label, "") for label in sorted(common)), {})
            line |= {**series.labels, f"Value #{ref}": series.value}
    lines = [
        {title: show(properties(panel, name=title), line[name]) for name, title in titles.items() if name in line}
        for line in merged.values()
    ]
    for order in panel["options"].get("sortBy") or []:
        column = order["displayName"]
        lines.sort(key=lambda line: line[column].value if column in line else 0, reverse=bool(order.get("desc")))
    return lines
