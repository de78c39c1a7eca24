"""The rules of prometheus/alerts.yml in fast motion, for tests against a running Prometheus."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ALERTS_FILE = Path(__file__).resolve().parents[2] / "prometheus" / "alerts.yml"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# Scraped and evaluated every second, looked back for 5: a minute of the rules is a second here.
FASTER = 60
FLAGS = ("--query.lookback-delta=5s", "--rules.alert.resend-delay=1s", "--rules.alert.for-grace-period=1s")


def _shorter(duration: str) -> str:
    seconds = int(duration[:-1]) * _UNITS[duration[-1]]
    assert seconds % FASTER == 0, duration
    return f"{seconds // FASTER}s"


def _faster(rule: Mapping[str, Any]) -> dict[str, Any]:
    def window(match: re.Match[str]) -> str:
        return "[" + ":".join(_shorter(duration) for duration in match[1].split(":")) + "]"

    expression = re.sub(r"\[([\d\w:]+)\]", window, rule["expr"])
    expression = re.sub(r"(?<=offset )\w+", lambda match: _shorter(match[0]), expression)
    expression = re.sub(r"\b3[69]00\b", lambda match: str(int(match[0]) // FASTER), expression)
    if re.fullmatch("creatify:threshold:.*_seconds", rule.get("record", "")):
        expression = re.sub(r"\d+", lambda match: str(int(match[0]) // FASTER), expression)
    durations = {key: _shorter(rule[key]) for key in ("for", "keep_firing_for") if key in rule}
    return {**rule, "expr": expression, **durations}


def fast_motion() -> dict[str, Any]:
    """Return the rules with every window, duration and age 60 times as short, to be evaluated every second."""
    groups = yaml.safe_load(ALERTS_FILE.read_text(encoding="utf-8"))["groups"]
    return {"groups": [{**g, "interval": "1s", "rules": [_faster(rule) for rule in g["rules"]]} for g in groups]}
