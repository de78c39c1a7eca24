"""The dashboard as a whole: variables, annotations, links, and the rows one below the other."""

import json
from typing import Any

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from creatify_dashboard import exporter, failures, models, overview, spending, work
from creatify_dashboard.build import SOURCE, AnyPanel, panel
from creatify_dashboard.colors import BLUE, ORANGE, RED
from creatify_dashboard.panels import DOCS, Row
from creatify_dashboard.queries import EXPORTER, FAILURES, FIRING, MODEL, SUBMITTED, WORKSPACE, newest

ROWS = (overview.ROW, work.ROW, failures.ROW, spending.ROW, models.ROW, exporter.ROW)

_VARIABLES = (
    ("job", "label_values(creatify_up, job)"),
    ("instance", 'label_values(creatify_up{job=~"$job"}, instance)'),
    ("workspace", f"label_values(creatify_up{{{EXPORTER}}}, workspace)"),
    ("model", f"label_values({SUBMITTED}{{{WORKSPACE}}}, model)"),
    ("reason", f"label_values({FAILURES}{{{MODEL}}}, reason)"),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
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
        .link(_link("Metrics", f"{DOCS}/metrics.md"))
        .link(_link("Runbook", f"{DOCS}/runbook.md"))
        .link(_link("Exporter", DOCS.removesuffix("/blob/main/docs")))
    )
    for annotation in _annotations():
        board.annotation(annotation)
    for variable in _variables():
        board.with_variable(variable)
    _add_rows(board)
    built: dict[str, Any] = json.loads(json.dumps(board.build(), cls=JSONEncoder))
    # Where the SDK puts them, Grafana 12.3 and later hide them in a menu.
    for shown in built["links"] + built["annotations"]["list"]:
        del shown["placement"]
    return built


def _annotations() -> list[build.AnnotationQuery]:
    """Return what is marked in every graph: alerts that need somebody, and starts of the exporter."""
    found = []
    for severity, color in (("critical", RED), ("warning", ORANGE)):
        firing = f'{FIRING.removesuffix("}")}, severity="{severity}"}}'
        # No label that an alert may lack: it would leave a hole in the text. And only when it began: a ground that is
        # red for as long as an alert fires changes the colours of all that is drawn on it.
        began = f"count by (alertname) ({firing}) unless count by (alertname) ({firing} offset 1m)"
        annotation = _annotation(f"Alerts: {severity}", color, began)
        found.append(annotation.title_format("{{alertname}}").text_format(severity).tag_keys("alertname"))
    starts = f"1000 * {newest('process_start_time_seconds', 'instance', EXPORTER)}"
    annotation = _annotation("Exporter started", BLUE, starts).use_value_for_time(True)
    found.append(annotation.title_format("Exporter started").text_format("{{instance}}").tag_keys("instance"))
    return found


def _annotation(name: str, color: str, expr: str) -> build.AnnotationQuery:
    return build.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(expr).step("60s")


def _link(title: str, url: str) -> build.DashboardLink:
    return build.DashboardLink(title).type(model.DashboardLinkType.LINK).icon("doc").url(url).target_blank(True)


def _variables() -> list[build.QueryVariable]:
    everything = model.VariableOption(text=["All"], value=["$__all"], selected=True)
    return [
        build.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query({"query": query, "refId": "StandardVariableQuery"})
        .definition(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(everything)
        for name, query in _VARIABLES
    ]


def _add_rows(board: build.Dashboard) -> None:
    number, top = 1, 0
    for row in ROWS:
        heading = build.Row(row.title).id(number).grid_pos(model.GridPos(x=0, y=top, w=24, h=1)).collapsed(False)
        number += 1
        panels, bottom = _placed(row, number, top + bool(row.title))
        number, top = number + len(panels), bottom
        if row.title:
            for built in panels if row.collapsed else ():
                heading.with_panel(built)
            board.with_row(heading)
        for built in () if row.collapsed else panels:
            board.with_panel(built)


def _placed(row: Row, number: int, top: int) -> tuple[list[AnyPanel], int]:
    """Return the panels of a row from left to right, line by line, and where the next row begins."""
    panels: list[AnyPanel] = []
    left = bottom = 0
    for described in row.panels:
        if left + described.width > 24:
            left, top = 0, bottom
        place = model.GridPos(x=left, y=top, w=described.width, h=described.height)
        panels.append(panel(described, number + len(panels), place))
        left, bottom = left + described.width, top + described.height
    return panels, bottom
