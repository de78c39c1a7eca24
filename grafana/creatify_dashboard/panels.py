"""What a panel is made of, before it is written in Grafana's words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from creatify_dashboard import colors

Thresholds = tuple[tuple[float, str], ...]
# A value, a range of values (None: without a bound), or a regular expression, and the text and colour shown for it.
Value = tuple[float | str, str, str]
Range = tuple[float | None, float | None, str, str]
Pattern = tuple[str, str, str]

DOCS = "https://github.com/creatify-exporter/creatify-exporter/blob/main/docs"
_HERE = (
    "/d/creatify-text-generator?${datasource:queryparam}&${job:queryparam}&${instance:queryparam}&${__url_time_range}"
)


@dataclass(frozen=True)
class Link:
    """Where a cell or a series leads."""

    title: str
    url: str
    new_tab: bool = True


def only(variable: str, title: str, *kept: str) -> Link:
    """Return a link to the same dashboard with a variable set to what was clicked, and others kept as they are."""
    rest = "".join(f"&${{{name}:queryparam}}" for name in kept)
    return Link(title, f"{_HERE}{rest}&var-{variable}=${{__value.text:percentencode}}", new_tab=False)


@dataclass(frozen=True)
class Look:
    """How a value is shown: texts for values, ranges and patterns, then thresholds, then the unit.

    `color` holds without regard to the value.
    """

    unit: str = ""
    decimals: int | None = None
    thresholds: Thresholds = ()
    values: Sequence[Value] = ()
    ranges: Sequence[Range] = ()
    patterns: Sequence[Pattern] = ()
    color: str = ""


@dataclass(frozen=True)
class Query:
    """One query of a panel; `look` is for its values alone, `color` for its series."""

    expr: str
    legend: str = ""
    look: Look | None = None
    color: str = ""


@dataclass(frozen=True)
class Panel:
    """What a panel shows.

    `empty` is what it says instead of data, `width` counts 24ths of the page, `height` units of 38 pixels.
    """

    title: str
    description: str
    unit: str
    empty: str
    queries: tuple[Query, ...] = ()
    width: int = 8
    height: int = 8


@dataclass(frozen=True)
class Stat(Panel):
    """Figures on a coloured ground: instant values, neutral where there are none."""

    look: Look = field(default_factory=Look)


@dataclass(frozen=True)
class Graph(Panel):
    """Lines over time.

    Without `points` there are as many as the page is wide. `names` have a colour of their own.
    """

    points: int | None = None
    names: dict[str, str] = field(default_factory=dict)
    highest: float | None = None
    shades: str = ""
    links: tuple[Link, ...] = ()
    legend_right: bool = True


@dataclass(frozen=True)
class Area(Graph):
    """Areas over time, stacked: the parts of what is there at each moment."""


@dataclass(frozen=True)
class Bars(Graph):
    """Bars over time, stacked: what happened between a point and the one before.

    A query whose legend is in `lines` is no bar: it is drawn as a line, or not at all where its colour is transparent.
    """

    points: int | None = 100
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """One column of a table: a label, or the value of a query.

    `cell` is text, background, gauge or bar. `empty` stands in cells without a value. `always` is a query of lines that
    have the column in any case: Grafana leaves out a column without any value.
    """

    title: str
    label: str = ""
    expr: str = ""
    look: Look = field(default_factory=Look)
    cell: str = "text"
    empty: str = "-"
    width: int | None = None
    links: tuple[Link, ...] = ()
    align: str = ""
    always: str = ""


@dataclass(frozen=True)
class Table(Panel):
    """Instant values as rows: one column after the other, joined by the labels that they share.

    `points` gives totals over the time range the steps of a graph with so many points.
    """

    columns: tuple[Column, ...] = ()
    points: int | None = None
    order: str = ""
    descending: bool = False


@dataclass(frozen=True)
class Row:
    """A heading, unless it is empty, and the panels below it."""

    title: str
    panels: tuple[Panel, ...]
    collapsed: bool = False


def ranked(value: str, order: str, by: str = "model") -> tuple[Query, ...]:
    """Return queries of a value by model, or by another label: those that lead an order, each with its own colour.

    Grafana gives colours by place, and one of its first five is red: with a query for each place we choose them.
    """
    return tuple(
        Query(f"{value} and on ({by}) ({_place(place, order)})", f"{{{{{by}}}}}", color=color)
        for place, color in enumerate(colors.RANKS, start=1)
    )


def rest(value: str, order: str) -> Query:
    """Return the query for the sum over all models that ranked() leaves out."""
    return Query(f"sum({_others(value, order, 'model')})", "all others", color=colors.REST)


def each_ranked(value: str, order: str, by: str) -> tuple[Query, ...]:
    """Return queries as ranked() does, and one for each of the others."""
    return *ranked(value, order, by), Query(_others(value, order, by), f"{{{{{by}}}}}", color=colors.REST)


def _others(value: str, order: str, by: str) -> str:
    return f"{value} unless on ({by}) topk({len(colors.RANKS)}, {order})"


def _place(place: int, order: str) -> str:
    return f"topk({place}, {order})" + (f" unless topk({place - 1}, {order})" if place > 1 else "")
