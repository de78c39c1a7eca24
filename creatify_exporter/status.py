"""The status page: what is known of the workspaces -> what the template shows.

Nothing here asks anybody: the page shows the newest finished listings and the counters as last committed.
"""

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING
from urllib.parse import quote

from creatify_exporter.listing import Listing
from creatify_exporter.metrics import ExporterView, WorkspaceView
from creatify_exporter.tasks import NANO, SECOND, UNFINISHED

if TYPE_CHECKING:
    from jinja2 import Template

STYLE = (files(__package__) / "templates" / "status.css").read_text(encoding="utf-8")
"""What the one style element of the page holds; the content security policy names it by its hash."""
RENEWED_EVERY = 30
"""Seconds."""

_STATUSES = ("done", "failed", "running", "pending", "unknown")
_SHORTEST_RATE = 3600.0  # seconds of counting before a rate is told
_LATEST_EMPTY = 366 * 86400.0
_LONGEST_IN_HEADLINE = 40
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_WHY_DOWN = {
    "auth": "The API refuses the credentials. Check api_id and api_key.",
    "rate_limited": "The API asks to slow down. The exporter waits and tries again by itself.",
    "http": "The API answered with an error or a redirect. The log tells the status.",
    "timeout": "The API did not answer within api.timeout.",
    "connection": "No connection to the API: check DNS, network, proxy and TLS.",
    "payload": "The answer of the API could not be read. The log tells more.",
    "too_large": "The list is larger than api.max_response_size.",
}
_STALE = "No recent listing: nobody has asked for metrics lately. Check that Prometheus scrapes this exporter."
_WAITING = "No listing yet. One starts when Prometheus scrapes, or when you open the metrics."
_OWNERS = {
    "caller": "You: what was sent is wrong",
    "account": "Your Creatify account: credits or permissions",
    "upstream": "Creatify or the model provider",
    "unknown": "Not known",
}
_ENDPOINTS = {"text_generator": "listings", "text_generator_task": "single tasks", "remaining_credits": "the balance"}


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a bar: the tasks of one status; `x` and `width` in percent of the bar."""

    status: str
    count: int
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Tasks:
    """Listed tasks: how many of each status, the oldest unfinished `created_at` (epoch seconds), their credits."""

    counts: Mapping[str, int]
    oldest: float | None
    credits: float

    @property
    def total(self) -> int:
        """How many in all."""
        return sum(self.counts.values())

    @property
    def unfinished(self) -> int:
        """How many are not finished."""
        return sum(self.counts[status] for status in UNFINISHED)

    @property
    def failed_share(self) -> float | None:
        """Which share of the finished ones failed, in percent; None without a finished one."""
        finished = self.counts["done"] + self.counts["failed"]
        return 100 * self.counts["failed"] / finished if finished else None

    def bar(self) -> list[Segment]:
        """Return the parts of the bar, in the order of the statuses; only those that are there."""
        segments, x = [], 0.0
        for status in _STATUSES:
            if count := self.counts[status]:
                width = 100 * count / self.total
                segments.append(Segment(status, count, round(x, 3), round(width, 3)))
                x += width
        return segments


@dataclass(frozen=True, slots=True)
class Model:
    """One row of a workspace's models."""

    name: str
    tasks: Tasks


@dataclass(frozen=True, slots=True)
class Card:
    """One workspace. `state` is one of up, down, stale, waiting; `tasks` is None without a listing."""

    name: str
    query: str
    state: str
    why: str
    cause: str | None
    held: Sequence[tuple[str, float]]
    listed_at: float | None
    last_success: float | None
    tasks: Tasks | None
    models: Sequence[Model]
    credits_used: float | None
    credits_left: float | None
    balance_up: bool | None
    empty_in: float | None
    counted_since: float | None


@dataclass(frozen=True, slots=True)
class Reason:
    """One failure reason over all workspaces: listed failed tasks, and counted ones if the ledger answered."""

    name: str
    owner: str
    listed: int
    counted: int | None
    width: float
    most: str


@dataclass(frozen=True, slots=True)
class Page:
    """All that the template shows. `level` is good, warning, bad or waiting; `now` in epoch seconds."""

    now: float
    level: str
    headline: str
    detail: str
    cards: Sequence[Card]
    tasks: Tasks
    listed: bool
    oldest_where: str
    reasons: Sequence[Reason]
    credits_used: float | None
    credits_left: float | None
    balances: int
    empty_first: Card | None
    exporter: ExporterView
    metrics: str
    paused: bool
    renewed_every: int = RENEWED_EVERY


def render_page(
    views: Sequence[WorkspaceView], exporter: ExporterView, *, metrics: str, now: float, paused: bool
) -> str:
    """Return the page; `metrics` is the relative link to the metrics, `now` the time in epoch seconds."""
    return _template().render(page=page_of(views, exporter, metrics=metrics, now=now, paused=paused), style=STYLE)


def page_of(views: Sequence[WorkspaceView], exporter: ExporterView, *, metrics: str, now: float, paused: bool) -> Page:
    """Return what the page shows; workspaces that need somebody come first."""
    order = ("down", "stale", "waiting", "up")
    cards = sorted((_card(view, now) for view in views), key=lambda card: order.index(card.state))
    listings = [card.tasks for card in cards if card.tasks]
    tasks = _together(listings)
    level, headline, detail = _verdict(cards, exporter)
    empty = [card for card in cards if card.empty_in is not None]
    return Page(
        now=now,
        level=level,
        headline=headline,
        detail=detail,
        cards=cards,
        tasks=tasks,
        listed=bool(listings),
        oldest_where=_where_oldest(cards, tasks.oldest),
        reasons=_reasons(views),
        credits_used=_sum(card.credits_used for card in cards),
        credits_left=_sum(card.credits_left for card in cards),
        balances=sum(card.credits_left is not None for card in cards),
        empty_first=min(empty, key=lambda card: card.empty_in or 0, default=None),
        exporter=exporter,
        metrics=metrics,
        paused=paused,
    )


def _card(view: WorkspaceView, now: float) -> Card:
    state, why = _state(view)
    listing = view.listing
    cells = _by_model(listing) if listing else {}
    models = [Model(name, tasks) for name, tasks in cells.items()]
    started = view.totals.started / SECOND if view.totals and view.totals.started is not None else None
    used = _counted(view, "credits") / NANO if started is not None else None
    return Card(
        name=view.name,
        query=f"?workspace={quote(view.name, safe='')}",
        state=state,
        why=why,
        cause=view.cause,
        held=[(_ENDPOINTS.get(endpoint, endpoint), until) for endpoint, until in view.backoff.items() if until > now],
        listed_at=view.finished_at,
        last_success=view.last_success,
        tasks=_together(cells.values()) if listing else None,
        models=sorted(models, key=lambda model: (-model.tasks.total, model.name)),
        credits_used=used,
        credits_left=view.balance,
        balance_up=view.balance_up,
        empty_in=_empty_in(view.balance, used, None if started is None else now - started),
        counted_since=started,
    )


def _state(view: WorkspaceView) -> tuple[str, str]:
    if view.up:
        return "up", ""
    if view.cause is not None:
        return "down", _WHY_DOWN.get(view.cause, "")
    return ("waiting", _WAITING) if view.finished_at is None else ("stale", _STALE)


def _verdict(cards: Sequence[Card], exporter: ExporterView) -> tuple[str, str, str]:
    """Return the level, the headline and what stands below it: the worst comes first."""
    states = Counter(card.state for card in cards)
    broken = states["down"] + states["stale"]
    details = []
    if not exporter.ledger_up:
        details.append("The ledger is out of reach: counters stay as last committed, gauges are fresh.")
    if not exporter.reload_successful:
        details.append("The last reload was refused: the former configuration is in force, the log tells why.")
    detail = " ".join(details)
    if states["stale"] == len(cards):
        return "bad", "No recent listing", detail
    if broken == len(cards):
        return "bad", "No workspace works" if broken > 1 else f"{_short(cards[0].name)} does not work", detail
    if broken:
        names = ", ".join(_short(card.name) for card in cards[: min(broken, 3)]) + (" and more" if broken > 3 else "")
        return "bad", f"{broken} of {len(cards)} workspaces not working: {names}", detail
    if not exporter.ledger_up:
        return "bad", "Listings work, but nothing is being counted", detail
    if states["waiting"]:
        return "waiting", "Waiting for the first listing", detail or _WAITING
    well = {1: "The workspace works", 2: "Both workspaces work"}.get(len(cards), f"All {len(cards)} workspaces work")
    return ("warning" if details else "good"), well, detail


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_IN_HEADLINE else f"{name[: _LONGEST_IN_HEADLINE - 1]}…"


def _by_model(listing: Listing) -> dict[str, Tasks]:
    counts: dict[str, Counter[str]] = {}
    oldest: dict[str, list[int]] = {}
    credits_: Counter[str] = Counter()
    for (model, status), cell in listing.cells.items():
        counts.setdefault(model, Counter())[status if status in _STATUSES else "unknown"] += cell.tasks
        credits_[model] += cell.credits
        if cell.oldest is not None:
            oldest.setdefault(model, []).append(cell.oldest)
    return {
        model: Tasks(count, min(oldest[model]) / SECOND if model in oldest else None, credits_[model] / NANO)
        for model, count in counts.items()
    }


def _together(parts: Iterable[Tasks]) -> Tasks:
    parts = list(parts)
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    oldest = min((part.oldest for part in parts if part.oldest is not None), default=None)
    return Tasks(counts, oldest, sum(part.credits for part in parts))


def _where_oldest(cards: Sequence[Card], oldest: float | None) -> str:
    for card in cards:
        for model in card.models:
            if oldest is not None and model.tasks.oldest == oldest:
                return f"{card.name}, {model.name}"
    return ""


def _counted(view: WorkspaceView, metric: str) -> int:
    return sum(total.value for key, total in view.totals.series.items() if key.metric == metric) if view.totals else 0


def _empty_in(left: float | None, used: float | None, seconds: float | None) -> float | None:
    """Return in how many seconds the credits end at the mean rate since counting began; None where nobody can tell."""
    if left is None or not used or seconds is None or seconds < _SHORTEST_RATE:
        return None
    empty_in = max(left, 0) / (used / seconds)
    return empty_in if empty_in < _LATEST_EMPTY else None


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _reasons(views: Sequence[WorkspaceView]) -> list[Reason]:
    listed: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    where: dict[str, Counter[str]] = {}
    owners: dict[str, str] = {}
    for view in views:
        owners |= view.owners
        for (_, reason), count in (view.listing.failed if view.listing else {}).items():
            listed[reason] += count
            where.setdefault(reason, Counter())[view.name] += count
        for key, total in (view.totals.series if view.totals else {}).items():
            if key.metric == "failures" and total.value:
                counted[key.label] += total.value
    told = any(view.totals for view in views)
    most = max(listed.values(), default=0)
    reasons = [
        Reason(
            name=name,
            owner=_OWNERS[owners.get(name, "unknown")],
            listed=listed[name],
            counted=counted[name] if told else None,
            width=round(100 * listed[name] / most, 3) if most else 0,
            most=where[name].most_common(1)[0][0] if name in where else "",
        )
        for name in {**listed, **counted}
    ]
    return sorted(reasons, key=lambda one: (-one.listed, -(one.counted or 0), one.name))


@cache
def _template() -> "Template":
    # Loaded when the first visitor comes: most exporters never have one.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"duration": duration, "number": number, "utc": utc}
    environment.globals["STATUSES"] = _STATUSES
    return environment.get_template("status.html")


def duration(seconds: float) -> str:
    """Return a time span in its two largest units, such as `2 h 5 min`; negative ones are none."""
    rest = round(max(seconds, 0))
    parts: list[str] = []
    for unit, size in _UNITS:
        if rest >= size and len(parts) < 2:
            parts.append(f"{rest // size} {unit}")
            rest %= size
        elif parts:
            break
    return " ".join(parts) or "0 s"


def number(value: float) -> str:
    """Return a number for people: groups of three digits, at most two decimals, none above 1,000."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.2f}"


def utc(seconds: float) -> str:
    """Return a point in time as `2026-11-25 01:02:03 UTC`."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
