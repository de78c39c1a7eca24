"""Write grafana/dashboards/creatify-text-generator.json.

Usage: python grafana/generate.py [--print]
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from grafana_foundation_sdk.builders import common, piechart, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.piechart import PieChartLegendValues, PieChartType
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TARGET = Path(__file__).resolve().parent / "dashboards" / "creatify-text-generator.json"
DOCS = "https://github.com/creatify-exporter/creatify-exporter/blob/main/docs"
SOURCE = options.DataSourceRef("prometheus", "${datasource}")

EXPORTER = 'job=~"$job", instance=~"$instance"'
WORKSPACE = f'{EXPORTER}, workspace=~"$workspace"'
MODEL = f'{WORKSPACE}, model=~"$model"'

GREEN, YELLOW, ORANGE, RED, BLUE, NEUTRAL = "green", "yellow", "orange", "red", "blue", "text"
# The same meaning has the same colour in every panel, and failed is never green.
COLORS = {
    "done": GREEN,
    "failed": RED,
    "running": BLUE,
    "pending": YELLOW,
    "unknown": NEUTRAL,
    "submitted": NEUTRAL,
}

Thresholds = tuple[tuple[float, str], ...]
AnyPanel = stat.Panel | timeseries.Panel | table.Panel | piechart.Panel


@dataclass(frozen=True)
class Query:
    """One query of a panel; without a legend its labels are columns or nothing at all."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """What a panel shows.

    `empty` is what it says instead of data, `width` counts 24ths of the page, `interval` is the shortest step of its
    queries, and so the shortest `$__rate_interval`.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    empty: str
    width: int = 8
    interval: str = ""
    decimals: int | None = None


@dataclass(frozen=True)
class Stat(Panel):
    """One figure, or a few: instant values, coloured by thresholds above a neutral base.

    `series` has the thresholds, and the unit if it is another one, of figures that are unlike the rest.
    """

    thresholds: Thresholds = ()
    series: dict[str, tuple[str, Thresholds]] = field(default_factory=dict)
    texts: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph(Panel):
    """Lines over time, or stacked areas."""

    stacked: bool = False
    highest: float | None = None


@dataclass(frozen=True)
class Share(Panel):
    """The parts of a whole over the time range."""


@dataclass(frozen=True)
class Table(Panel):
    """Instant values as rows: `columns` renames and orders the fields, all others are hidden."""

    columns: dict[str, str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    links: dict[str, tuple[str, str]] = field(default_factory=dict)
    order: str = ""


@dataclass(frozen=True)
class Row:
    """A heading and the panels below it."""

    title: str
    height: int
    panels: tuple[Panel, ...]
    collapsed: bool = False


def newest(metric: str, labels: str, selector: str = MODEL) -> str:
    """Return a gauge as one truth: replicas of the exporter show the same figures, so the greatest stands for all."""
    return f"max by ({labels}) ({metric}{{{selector}}})"


def per_second(metric: str, labels: str, selector: str = MODEL) -> str:
    """Return the rate of a counter, once however many replicas show it."""
    return f"max by ({labels}) (rate({metric}{{{selector}}}[$__rate_interval]))"


def in_range(metric: str, labels: str, selector: str = MODEL) -> str:
    """Return how much a counter grew over the time range, once however many replicas show it."""
    return f"max by ({labels}) (increase({metric}{{{selector}}}[$__range]))"


def total(by: str, expr: str) -> str:
    """Return the sum by some labels; by none, the sum of everything."""
    return f"sum by ({by}) ({expr})" if by else f"sum({expr})"


UP = newest("creatify_up", "workspace", WORKSPACE)
TASKS = "creatify_text_generator_tasks"
OLDEST = "creatify_text_generator_oldest_unfinished_task_timestamp_seconds"
SUBMITTED = "creatify_text_generator_tasks_submitted_total"
FINISHED = "creatify_text_generator_tasks_finished_total"
FAILURES = "creatify_text_generator_failures_total"
CREDITS = "creatify_text_generator_credits_used_total"
DURATION = "creatify_text_generator_task_duration_seconds_bucket"
BALANCE = newest("creatify_remaining_credits", "workspace", WORKSPACE)

BY_MODEL = "workspace, model"
BY_STATUS = "workspace, model, status"
BY_REASON = "workspace, model, reason"

FINISHED_RATE = per_second(FINISHED, BY_STATUS)
FAILED_RATE = per_second(FINISHED, BY_STATUS, f'{MODEL}, status="failed"')
CREDITS_RATE = per_second(CREDITS, BY_MODEL)
FAILURES_IN_RANGE = in_range(FAILURES, BY_REASON)
FAILURE_COUNTS = f"round({total('reason', FAILURES_IN_RANGE)})"
DURATION_RATE = total("le", per_second(DURATION, f"{BY_STATUS}, le"))

HEALTH = Row(
    "Is it all right?",
    4,
    (
        Stat(
            "Workspaces up",
            "Workspaces whose newest listing succeeded, and the others.",
            "short",
            (Query(f"sum({UP})", "up"), Query(f"sum(1 - {UP})", "down")),
            "no exporter",
            width=4,
            decimals=0,
            series={"up": ("", ((1, GREEN),)), "down": ("", ((1, RED),))},
        ),
        Stat(
            "Age of the last listing",
            "Time since the last successful listing of the workspace that waits longest.",
            "s",
            (
                Query(
                    "max(time() - "
                    + newest("creatify_exporter_last_success_timestamp_seconds", "workspace", WORKSPACE)
                    + ")"
                ),
            ),
            "none yet",
            width=4,
            decimals=0,
            thresholds=((0, GREEN), (300, ORANGE), (900, RED)),
        ),
        Stat(
            "Failure ratio now",
            "Failed tasks as a share of those that finished in the last quarter of an hour.",
            "percentunit",
            (Query(f"sum({FAILED_RATE}) / sum({FINISHED_RATE})"),),
            "none finished",
            width=4,
            interval="15m",
            decimals=1,
            thresholds=((0, GREEN), (0.1, ORANGE), (0.25, RED)),
        ),
        Stat(
            "Tasks in flight",
            "Listed tasks that are pending or running.",
            "short",
            (Query(total("status", newest(TASKS, BY_STATUS, f'{MODEL}, status=~"pending|running"')), "{{status}}"),),
            "no listing",
            width=4,
            decimals=0,
        ),
        Stat(
            "Credits left",
            "The balance of each workspace, for all products of Creatify.",
            "suffix:credits",
            (Query(BALANCE, "{{workspace}}"),),
            "unknown",
            width=4,
            decimals=0,
            thresholds=((0, RED), (100, ORANGE), (500, GREEN)),
        ),
        Stat(
            "Credits per hour, and time to empty",
            "What text generation used in the last hour, and how long the balance of the workspace that runs out first "
            "lasts at that pace. Other products of Creatify may use it up sooner.",
            "suffix:credits",
            (
                Query(f"sum({CREDITS_RATE}) * 3600", "per hour"),
                Query(
                    f"min({BALANCE} / (sum by (workspace) ({per_second(CREDITS, BY_MODEL, WORKSPACE)}) > 0))",
                    "time to empty",
                ),
            ),
            "none used",
            width=4,
            interval="1h",
            decimals=1,
            series={"time to empty": ("s", ((0, RED), (86400, ORANGE), (3 * 86400, GREEN)))},
        ),
    ),
)

WORK = Row(
    "Work",
    8,
    (
        Graph(
            "Tasks by status",
            "Listed tasks by what they are now.",
            "short",
            (Query(total("status", newest(TASKS, BY_STATUS)), "{{status}}"),),
            "no listing",
            stacked=True,
            decimals=0,
        ),
        Graph(
            "Tasks by model",
            "Listed tasks by model.",
            "short",
            (Query(total("model", newest(TASKS, BY_STATUS)), "{{model}}"),),
            "no listing",
            stacked=True,
            decimals=0,
        ),
        Graph(
            "Submitted and finished per minute",
            "Tasks that were submitted, done and failed. Submitted above the others for long: tasks pile up.",
            "cpm",
            (
                Query(f"sum({per_second(SUBMITTED, BY_MODEL)}) * 60", "submitted"),
                Query(f"{total('status', FINISHED_RATE)} * 60", "{{status}}"),
            ),
            "nothing counted yet",
        ),
        Graph(
            "Oldest unfinished task",
            "Age of the oldest task that is pending or running.",
            "s",
            (Query(f"max by (workspace, status) (time() - {newest(OLDEST, BY_STATUS)})", "{{workspace}} {{status}}"),),
            "nothing unfinished",
            width=12,
        ),
        Graph(
            "Task duration, as reported by the API",
            "From creation to the last update of finished tasks. The API may not move the time of the update when a "
            "task finishes: no alert rests on these figures.",
            "s",
            tuple(Query(f"histogram_quantile(0.{p}, {DURATION_RATE})", f"p{p}") for p in (50, 90, 99)),
            "none finished",
            width=12,
        ),
    ),
)

FAILED = Row(
    "Failures",
    9,
    (
        Graph(
            "Failure ratio by model",
            "Failed tasks as a share of the finished ones.",
            "percentunit",
            (Query(f"{total('model', FAILED_RATE)} / {total('model', FINISHED_RATE)}", "{{model}}"),),
            "none finished",
            width=12,
            interval="5m",
            highest=1,
        ),
        Graph(
            "Failures per hour by reason",
            "Failed tasks by the reason that the exporter reads from their failure texts.",
            "short",
            (Query(f"{total('reason', per_second(FAILURES, BY_REASON))} * 3600 > 0", "{{reason}}"),),
            "no failures",
            width=12,
            interval="5m",
            stacked=True,
        ),
        Table(
            "Top reasons",
            "Failures of the time range by reason, and how many models they hit. A reason leads to what it means.",
            "short",
            (
                Query(f"{FAILURE_COUNTS} > 0"),
                Query(f"{FAILURE_COUNTS} / on () group_left () sum({FAILURE_COUNTS}) > 0"),
                Query(f"count by (reason) (round({total('reason, model', FAILURES_IN_RANGE)}) > 0)"),
            ),
            "no failures",
            width=12,
            decimals=0,
            columns={"reason": "Reason", "Value #A": "Count", "Value #B": "Share", "Value #C": "Models"},
            units={"Share": "percentunit"},
            links={"Reason": ("What ${__value.text} means", f"{DOCS}/failure-reasons.md#${{__value.text}}")},
            order="Count",
        ),
        Table(
            "Firing alerts",
            "Alerts of prometheus/alerts.yml that fire now. A name leads to the runbook.",
            "short",
            (
                Query(
                    "max by (alertname, severity, workspace, model, reason, instance) "
                    '(ALERTS{alertname=~"Creatify.+", alertstate="firing", workspace=~"$workspace|"})'
                ),
            ),
            "all quiet",
            width=12,
            decimals=0,
            columns={
                "alertname": "Alert",
                "severity": "Severity",
                "workspace": "Workspace",
                "model": "Model",
                "reason": "Reason",
                "instance": "Exporter",
            },
            links={"Alert": ("Runbook", f"{DOCS}/runbook.md#${{__value.text}}")},
        ),
    ),
)

SPENDING = Row(
    "Credits",
    8,
    (
        Graph(
            "Credits used per hour by model",
            "What text generation costs.",
            "suffix:credits",
            (Query(f"{total('model', CREDITS_RATE)} * 3600", "{{model}}"),),
            "nothing counted yet",
            width=12,
            stacked=True,
        ),
        Graph(
            "Credits per finished task",
            "Credits used, divided by the tasks that finished in the same time.",
            "suffix:credits",
            (Query(f"{total('model', CREDITS_RATE)} / ({total('model', FINISHED_RATE)} > 0)", "{{model}}"),),
            "none finished",
            width=12,
            interval="5m",
        ),
        Share(
            "Share of models",
            "Credits used over the time range.",
            "suffix:credits",
            (Query(total("model", in_range(CREDITS, BY_MODEL)), "{{model}}"),),
            "nothing counted yet",
            width=12,
            decimals=1,
        ),
        Graph(
            "Balance",
            "Credits left, for all products of Creatify. It rises when credits are bought.",
            "suffix:credits",
            (Query(BALANCE, "{{workspace}}"),),
            "unknown",
            width=12,
        ),
    ),
)

ITSELF = Row(
    "Exporter",
    7,
    (
        Graph(
            "Listing time",
            "How long the newest listing took. It must fit into the scrape timeout, or figures are one scrape old.",
            "s",
            (Query(newest("creatify_exporter_listing_duration_seconds", "workspace", WORKSPACE), "{{workspace}}"),),
            "no listing",
        ),
        Graph(
            "Listing size",
            "Size of the newest listing, decompressed.",
            "bytes",
            (Query(newest("creatify_exporter_listing_size_bytes", "workspace", WORKSPACE), "{{workspace}}"),),
            "no listing",
        ),
        Graph(
            "Listing errors per hour by cause",
            "Failed listings, of the replica that has most. ledger: the listing succeeded, but could not be recorded.",
            "short",
            (
                Query(
                    total(
                        "cause",
                        per_second("creatify_exporter_listing_errors_total", "workspace, cause", WORKSPACE),
                    )
                    + " * 3600",
                    "{{cause}}",
                ),
            ),
            "no exporter",
        ),
        Graph(
            "API requests per minute by code",
            "Requests to Creatify, of the replica that sends most, by HTTP status; error: there was no answer.",
            "cpm",
            (
                Query(
                    total(
                        "endpoint, code",
                        per_second("creatify_exporter_api_requests_total", "workspace, endpoint, code", WORKSPACE),
                    )
                    + " * 60",
                    "{{endpoint}} {{code}}",
                ),
            ),
            "no requests",
        ),
        Stat(
            "Ledger",
            "Whether the ledger of each replica answered last time. Counters stand still while it does not.",
            "short",
            (Query(newest("creatify_exporter_ledger_up", "instance", EXPORTER), "{{instance}}"),),
            "unknown",
            texts={"0": ("down", RED), "1": ("up", GREEN)},
        ),
        Graph(
            "Tasks in the ledger",
            "Tasks that are remembered so that none counts twice.",
            "short",
            (Query(newest("creatify_exporter_ledger_tasks", "workspace", WORKSPACE), "{{workspace}}"),),
            "no ledger",
            decimals=0,
        ),
        Graph(
            "Malformed records",
            "Records of the newest listing that could not be used.",
            "short",
            (Query(newest("creatify_exporter_malformed_tasks", "workspace", WORKSPACE), "{{workspace}}"),),
            "no listing",
            decimals=0,
        ),
        Graph(
            "Models, and overflow into other",
            "Known models, and listed tasks of models beyond labels.max_models, which go by the name of other.",
            "short",
            (
                Query(f"count by (workspace) ({newest(TASKS, BY_MODEL, WORKSPACE)})", "{{workspace}} models"),
                Query(
                    total("workspace", newest(TASKS, BY_STATUS, f'{WORKSPACE}, model="other"')),
                    "{{workspace}} tasks in other",
                ),
            ),
            "no listing",
            decimals=0,
        ),
        Graph(
            "Memory",
            "Resident memory of each replica.",
            "bytes",
            (Query(newest("process_resident_memory_bytes", "instance", EXPORTER), "{{instance}}"),),
            "unknown",
            width=4,
        ),
        Graph(
            "CPU",
            "Cores that each replica keeps busy.",
            "percentunit",
            (Query(per_second("process_cpu_seconds_total", "instance", EXPORTER), "{{instance}}"),),
            "unknown",
            width=4,
        ),
    ),
    collapsed=True,
)

ROWS = (HEALTH, WORK, FAILED, SPENDING, ITSELF)

VARIABLES = (
    ("job", "Job", "label_values(creatify_up, job)"),
    ("instance", "Instance", 'label_values(creatify_up{job=~"$job"}, instance)'),
    ("workspace", "Workspace", f"label_values(creatify_up{{{EXPORTER}}}, workspace)"),
    ("model", "Model", f"label_values({SUBMITTED}{{{WORKSPACE}}}, model)"),
)


def _color(color: str) -> model.DynamicConfigValue:
    return model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})


def _names(panel: Panel) -> set[str]:
    """Return the names of series that have a colour of their own and may occur in a panel."""
    legends = {query.legend for query in panel.queries}
    by_status = {"done", "failed", "running", "pending", "unknown"} if "{{status}}" in legends else set()
    return by_status | (legends & COLORS.keys())


def _steps(thresholds: Thresholds) -> list[model.Threshold]:
    # A stat without data takes the first colour: that one must say nothing.
    return [model.Threshold(None, NEUTRAL), *(model.Threshold(value, color) for value, color in thresholds)]


def _stat(panel: Stat) -> stat.Panel:
    built = (
        stat.Panel()
        .thresholds(build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(_steps(panel.thresholds)))
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .color_mode(options.BigValueColorMode.VALUE)
        .graph_mode(options.BigValueGraphMode.NONE)
        .text_mode(
            options.BigValueTextMode.VALUE_AND_NAME
            if any(query.legend for query in panel.queries)
            else options.BigValueTextMode.VALUE
        )
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        # A long time range makes no longer $__rate_interval: what is said of now stays about now.
        .max_data_points(20_000)
    )
    if panel.texts:
        results = {
            value: model.ValueMappingResult(text=text, color=color) for value, (text, color) in panel.texts.items()
        }
        built.mappings([model.ValueMap(options=results)])
    for name, (unit, thresholds) in panel.series.items():
        levels = [step.to_json() for step in _steps(thresholds)]
        properties = [model.DynamicConfigValue("thresholds", {"mode": "absolute", "steps": levels})]
        if unit:
            properties.append(model.DynamicConfigValue("unit", unit))
        built.override_by_name(name, properties)
    return built


def _graph(panel: Graph) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .line_width(1)
        .fill_opacity(40 if panel.stacked else 0)
        .show_points(options.VisibilityMode.AUTO)
        .min(0)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(options.LegendDisplayMode.LIST)
            .placement(options.LegendPlacement.BOTTOM)
            .calcs([])
        )
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    )
    if panel.stacked:
        built.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A"))
    if panel.highest is not None:
        built.max(panel.highest)
    return built


def _share() -> piechart.Panel:
    return (
        piechart.Panel()
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .pie_type(PieChartType.DONUT)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .legend(
            piechart.PieChartLegendOptions()
            .show_legend(True)
            .display_mode(options.LegendDisplayMode.TABLE)
            .placement(options.LegendPlacement.RIGHT)
            .values([PieChartLegendValues.VALUE, PieChartLegendValues.PERCENT])
        )
    )


def _table(panel: Table) -> table.Panel:
    shown = list(panel.columns)
    built = table.Panel().transformations(
        [
            model.DataTransformerConfig(id_val="merge", options={}),
            model.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": shown}}),
            model.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {},
                    "indexByName": {name: index for index, name in enumerate(shown)},
                    "renameByName": dict(panel.columns),
                },
            ),
        ]
    )
    if panel.order:
        built.sort_by([common.TableSortByFieldState().display_name(panel.order).desc(True)])
    for name, unit in panel.units.items():
        decimals = model.DynamicConfigValue("decimals", 1)
        built.override_by_name(name, [model.DynamicConfigValue("unit", unit), decimals])
    for name, (title, url) in panel.links.items():
        link = {"title": title, "url": url, "targetBlank": True}
        built.override_by_name(name, [model.DynamicConfigValue("links", [link])])
    return built


def _panel(panel: Panel, number: int, place: model.GridPos) -> AnyPanel:
    built: AnyPanel
    match panel:
        case Stat():
            built = _stat(panel)
        case Graph():
            built = _graph(panel)
        case Table():
            built = _table(panel)
        case _:
            built = _share()
    built.id(number).grid_pos(place).datasource(SOURCE)
    built.title(panel.title).description(panel.description).unit(panel.unit).no_value(panel.empty)
    if panel.interval:
        built.interval(panel.interval)
    if panel.decimals is not None:
        built.decimals(panel.decimals)
    for name in sorted(_names(panel)):
        built.override_by_name(name, [_color(COLORS[name])])
    for index, query in enumerate(panel.queries):
        target = prometheus.Dataquery().ref_id("ABC"[index]).datasource(SOURCE).expr(query.expr)
        target.legend_format(query.legend or "__auto")
        if isinstance(panel, Graph):
            target.range()
        else:
            target.instant()
        if isinstance(panel, Table):
            target.format(PromQueryFormat.TABLE)
        built.with_target(target)
    return built


def _add_rows(board: build.Dashboard) -> None:
    number, top = 1, 0
    for row in ROWS:
        heading = build.Row(row.title).id(number).grid_pos(model.GridPos(x=0, y=top, w=24, h=1)).collapsed(False)
        number, top, left, panels = number + 1, top + 1, 0, []
        for panel in row.panels:
            if left + panel.width > 24:
                left, top = 0, top + row.height
            panels.append(_panel(panel, number, model.GridPos(x=left, y=top, w=panel.width, h=row.height)))
            number, left = number + 1, left + panel.width
        top += row.height
        if row.collapsed:
            for built in panels:
                heading.with_panel(built)
        board.with_row(heading)
        if not row.collapsed:
            for built in panels:
                board.with_panel(built)


def _variables() -> list[build.QueryVariable]:
    everything = model.VariableOption(text=["All"], value=["$__all"], selected=True)
    return [
        build.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": "StandardVariableQuery"})
        .definition(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(everything)
        for name, label, query in VARIABLES
    ]


def _link(title: str, url: str) -> build.DashboardLink:
    return build.DashboardLink(title).type(model.DashboardLinkType.LINK).icon("doc").url(url).target_blank(True)


def dashboard() -> model.Dashboard:
    """Return the dashboard."""
    board = (
        build.Dashboard("Creatify text generator")
        .uid("creatify-text-generator")
        .description("Tasks, failures and credits of Creatify's text generator, as creatify-exporter sees them.")
        .tags(["creatify", "prometheus"])
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("1m")
        .readonly()
        .with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .annotation(
            build.AnnotationQuery()
            .name("Alerts")
            .datasource(SOURCE)
            .enable(True)
            .icon_color(RED)
            .expr('ALERTS{alertname=~"Creatify.+", alertstate="firing", workspace=~"$workspace|"}')
            .title_format("{{alertname}}")
            .text_format("{{workspace}} {{model}} {{reason}}")
            .tag_keys("severity")
            .step("60s")
        )
        .link(_link("Metrics", f"{DOCS}/metrics.md"))
        .link(_link("Runbook", f"{DOCS}/runbook.md"))
        .link(_link("Exporter", DOCS.removesuffix("/blob/main/docs")))
    )
    for variable in _variables():
        board.with_variable(variable)
    _add_rows(board)
    return board.build()


def render() -> str:
    """Return the dashboard as JSON text."""
    board = json.loads(json.dumps(dashboard(), cls=JSONEncoder))
    # Where the SDK puts them, Grafana 12.3 and later hide them in a menu.
    for shown in board["links"] + board["annotations"]["list"]:
        del shown["placement"]
    return json.dumps(board, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(render())
    else:
        TARGET.write_text(render(), encoding="utf-8")
