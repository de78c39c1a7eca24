"""The status page: what is known of the workspaces -> what the template shows; the words are the template's.

Nothing here asks anybody: the page shows the newest finished listings and the counters as last committed.
"""

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from creatify_exporter.listing import Listing
from creatify_exporter.metrics import ExporterView, WorkspaceView
from creatify_exporter.tasks import FINISHED, NANO, SECOND, UNFINISHED, UNKNOWN

if TYPE_CHECKING:
    from jinja2 import Template

STYLE = (files(__package__) / "templates" / "status.css").read_text(encoding="utf-8")
"""What the one style element of the page holds; the content security policy names it by its hash."""
RENEWED_EVERY = 30
"""Seconds."""

_STATUSES = (*FINISHED, *reversed(UNFINISHED), UNKNOWN)  # as in a bar
_STATES = ("down", "stale", "waiting", "up")
_SHORTEST_RATE = 3600.0  # seconds of counting before a rate is told
_LATEST_EMPTY = 366 * 86400.0
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


@dataclass(frozen=True, slots=True)
class Tasks:
    """Listed tasks: how many of each status, the oldest unfinished `created_at` (epoch seconds), their credits."""

    counts: Counter[str]
    oldest: float | None = None
    credits: float = 0.0

    @property
    def unfinished(self) -> int:
        """How many are not finished."""
        return sum(self.counts[status] for status in UNFINISHED)

    @property
    def failed_share(self) -> float | None:
        """Which share of the finished ones failed, in percent; None without a finished one."""
        finished = sum(self.counts[status] for status in FINISHED)
        return 100 * self.counts["failed"] / finished if finished else None


@dataclass(frozen=True, slots=True)
class Card:
    """One workspace. `state` is one of up, down, stale, waiting; `tasks` is None without a listing.

    `models` are names with their tasks, those with most first. `empty_in` is in seconds, `counted_since` epoch seconds.
    """

    view: WorkspaceView
    state: str
    tasks: Tasks | None
    models: Sequence[tuple[str, Tasks]]
    credits_used: float | None
    counted_since: float | None
    empty_in: float | None


@dataclass(frozen=True, slots=True)
class Reason:
    """One failure reason over all workspaces: listed failed tasks, counted ones, and the workspace that has most."""

    name: str
    owner: str
    listed: int
    counted: int
    most: str


@dataclass(frozen=True, slots=True)
class Page:
    """All that the template shows; `now` in epoch seconds.

    `tasks` are those of all listings, `oldest` is where the oldest unfinished one is: the workspace and the model.
    Credits are None where none are known. `empty_first` is the workspace whose credits end first.
    """

    now: float
    cards: Sequence[Card]
    tasks: Tasks
    oldest: Sequence[str]
    reasons: Sequence[Reason]
    credits_used: float | None
    credits_left: float | None
    empty_first: Card | None
    exporter: ExporterView
    metrics: str
    paused: bool


def render_page(
    views: Sequence[WorkspaceView], exporter: ExporterView, *, metrics: str, now: float, paused: bool
) -> str:
    """Return the page; `metrics` is the relative link to the metrics, `now` the time in epoch seconds."""
    return _template().render(page=page_of(views, exporter, metrics=metrics, now=now, paused=paused))


def page_of(views: Sequence[WorkspaceView], exporter: ExporterView, *, metrics: str, now: float, paused: bool) -> Page:
    """Return what the page shows; workspaces that need somebody come first."""
    cards = sorted((_card(view, now) for view in views), key=lambda card: _STATES.index(card.state))
    tasks = _together(card.tasks for card in cards if card.tasks)
    places = ((card.view.name, name) for card in cards for name, one in card.models if one.oldest == tasks.oldest)
    empty = [card for card in cards if card.empty_in is not None]
    return Page(
        now=now,
        cards=cards,
        tasks=tasks,
        oldest=next(places, ()),
        reasons=_reasons(views),
        credits_used=_sum(card.credits_used for card in cards),
        credits_left=_sum(view.balance for view in views),
        empty_first=min(empty, key=lambda card: card.empty_in or 0, default=None),
        exporter=exporter,
        metrics=metrics,
        paused=paused,
    )


def _card(view: WorkspaceView, now: float) -> Card:
    models = _by_model(view.listing) if view.listing else {}
    used = started = None
    if view.totals and view.totals.started is not None:
        started = view.totals.started / SECOND
        used = sum(total.value for key, total in view.totals.series.items() if key.metric == "credits") / NANO
    return Card(
        view=view,
        state=_state(view),
        tasks=_together(models.values()) if view.listing else None,
        models=sorted(models.items(), key=lambda model: (-model[1].counts.total(), model[0])),
        credits_used=used,
        counted_since=started,
        empty_in=_empty_in(view.balance, used, now - (started or now)),
    )


def _state(view: WorkspaceView) -> str:
    if view.up:
        return "up"
    if view.cause is not None:
        return "down"
    return "waiting" if view.finished_at is None else "stale"


def _by_model(listing: Listing) -> dict[str, Tasks]:
    models: dict[str, list[Tasks]] = {}
    for (model, status), cell in listing.cells.items():
        oldest = None if cell.oldest is None else cell.oldest / SECOND
        models.setdefault(model, []).append(Tasks(Counter({status: cell.tasks}), oldest, cell.credits / NANO))
    return {model: _together(parts) for model, parts in models.items()}


def _together(parts: Iterable[Tasks]) -> Tasks:
    parts, counts = list(parts), Counter[str]()
    for part in parts:
        counts.update(part.counts)
    oldest = min((part.oldest for part in parts if part.oldest is not None), default=None)
    return Tasks(counts, oldest, sum(part.credits for part in parts))


def _empty_in(left: float | None, used: float | None, seconds: float) -> float | None:
    """Return in how many seconds the credits end at the mean rate since counting began; None where nobody can tell."""
    if left is None or not used or seconds < _SHORTEST_RATE:
        return None
    empty_in = max(left, 0) / (used / seconds)
    return empty_in if empty_in < _LATEST_EMPTY else None


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _reasons(views: Sequence[WorkspaceView]) -> list[Reason]:
    listed: dict[str, Counter[str]] = {}
    counted: Counter[str] = Counter()
    owners: dict[str, str] = {}
    for view in views:
        owners |= view.owners
        for (_, reason), count in (view.listing.failed if view.listing else {}).items():
            listed.setdefault(reason, Counter())[view.name] += count
        for key, total in (view.totals.series if view.totals else {}).items():
            if key.metric == "failures" and total.value:
                counted[key.label] += total.value
    reasons = []
    for name in {**listed, **counted}:
        where = listed.get(name, Counter[str]())
        [(most, _)] = where.most_common(1) or [("", 0)]
        reasons.append(Reason(name, owners.get(name, "unknown"), where.total(), counted[name], most))
    return sorted(reasons, key=lambda one: (-one.listed, -one.counted, one.name))


@cache
def _template() -> "Template":
    # Loaded when the first visitor comes: most exporters never have one.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"duration": duration, "number": number, "utc": utc}
    environment.globals |= {"STATUSES": _STATUSES, "STYLE": STYLE, "RENEWED_EVERY": RENEWED_EVERY}
    return environment.get_template("status.html")


def duration(seconds: float) -> str:
    """Return a time span in its two largest units, such as `2 h 5 min`; negative ones are none."""
    rest = round(max(seconds, 0))
    first = next((n for n, (_, size) in enumerate(_UNITS) if rest >= size), len(_UNITS) - 1)
    parts: list[str] = []
    for unit, size in _UNITS[first : first + 2]:
        count, rest = divmod(rest, size)
        parts += [f"{count} {unit}"] if count or not parts else []
    return " ".join(parts)


def number(value: float) -> str:
    """Return a number for people: groups of three digits, at most two decimals, none above 1,000."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.2f}"


def utc(seconds: float) -> str:
    """Return a point in time as `2026-11-25 01:02:03 UTC`."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
