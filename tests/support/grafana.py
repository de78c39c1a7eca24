"""The dashboard as Grafana would use it: panels, queries, and variables put in."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD_FILE = Path(__file__).resolve().parents[2] / "grafana" / "dashboards" / "creatify-text-generator.json"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Target:
    """One query of a panel."""

    panel: Mapping[str, Any]
    expr: str
    legend: str
    instant: bool

    def __str__(self) -> str:
        return f"{self.panel['title']} ({self.legend or self.expr})"


def load() -> dict[str, Any]:
    """Return the dashboard."""
    loaded: dict[str, Any] = json.loads(DASHBOARD_FILE.read_text(encoding="utf-8"))
    return loaded


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all panels but rows, those of collapsed rows too."""
    everything = [p for panel in dashboard["panels"] for p in (panel, *panel.get("panels", []))]
    return [panel for panel in everything if panel["type"] != "row"]


def targets(dashboard: Mapping[str, Any]) -> list[Target]:
    """Return the queries of all panels."""
    return [
        Target(panel, target["expr"], target.get("legendFormat", ""), bool(target.get("instant")))
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def labels_of(template: str) -> set[str]:
    """Return the names of the labels in a legend or an annotation."""
    return set(re.findall(r"{{\s*(\w+)\s*}}", template))


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
    values = {"job": ".+", "instance": ".+", "workspace": ".+", "model": ".+"} | dict(variables or {})
    values |= {
        "__rate_interval": f"{max(interval + scrape, 4 * scrape):.0f}s",
        "__interval": f"{interval:.0f}s",
        "__range": f"{time_range:.0f}s",
    }
    return re.sub(r"\$(?:{(\w+)}|(\w+))", lambda match: values[match[1] or match[2]], expr)
