"""Panels in Grafana's words."""

from collections.abc import Iterable
from typing import Any

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from creatify_dashboard.colors import NEUTRAL, TEXT
from creatify_dashboard.panels import Area, Bars, Graph, Link, Look, Panel, Stat, Table

SOURCE = options.DataSourceRef("prometheus", "${datasource}")
AnyPanel = stat.Panel | timeseries.Panel | table.Panel
_COUNTS = ("locale", "cpm")
Properties = list[model.DynamicConfigValue]
_CELLS: dict[str, dict[str, Any]] = {
    "background": {"type": "color-background", "mode": "basic"},
    "gauge": {"type": "gauge", "mode": "basic", "valueDisplayMode": "text"},
    "bar": {"type": "gauge", "mode": "basic", "valueDisplayMode": "text"},
    "colored": {"type": "color-text"},
}


def panel(described: Panel, number: int, place: model.GridPos) -> AnyPanel:
    """Return a panel with its number and its place."""
    built: AnyPanel
    match described:
        case Stat():
            built = _stat(described)
        case Graph():
            built = _graph(described)
        case Table():
            built = _table(described)
        case _:
            raise TypeError(f"no panel of Grafana for {type(described).__name__}")
    built.id(number).grid_pos(place).datasource(SOURCE).title(described.title).description(described.description)
    return built.unit(described.unit).no_value(described.empty)


def _property(name: str, value: Any) -> model.DynamicConfigValue:
    return model.DynamicConfigValue(name, value)


def _fixed(color: str) -> model.DynamicConfigValue:
    return _property("color", {"mode": "fixed", "fixedColor": color})


def _target(query: str, index: int) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id("ABCDEFGHIJKLMN"[index]).datasource(SOURCE).expr(query)


def _steps(look: Look, base: str) -> list[dict[str, Any]]:
    return [{"value": None, "color": base}, *({"value": value, "color": color} for value, color in look.thresholds)]


def _mappings(look: Look) -> list[dict[str, Any]]:
    """Return the texts for values, ranges and patterns; an empty text leaves the value as it is."""

    def result(text: str, color: str, index: int) -> dict[str, Any]:
        return {"color": color, "index": index} | ({"text": text} if text else {})

    found: list[dict[str, Any]] = []
    if look.values:
        by_value = {f"{value:g}": result(text, color, n) for n, (value, text, color) in enumerate(look.values)}
        found.append({"type": "value", "options": by_value})
    for low, high, text, color in look.ranges:
        found.append({"type": "range", "options": {"from": low, "to": high, "result": result(text, color, len(found))}})
    for pattern, text, color in look.patterns:
        options_ = {"pattern": f"/{pattern}/", "result": result(text, color, len(found))}
        found.append({"type": "regex", "options": options_})
    return found


def _looks(look: Look, base: str, nothing: str = "") -> Properties:
    """Return what a look sets; `base` is the colour of all other values, `nothing` the text for NaN."""
    found: Properties = []
    if look.unit:
        found.append(_property("unit", look.unit))
    if look.decimals is not None:
        found.append(_property("decimals", look.decimals))
    mappings = _mappings(look)
    if nothing:
        mappings.append(
            {"type": "special", "options": {"match": "null+nan", "result": {"text": nothing, "color": TEXT}}}
        )
    if mappings:
        found.append(_property("mappings", mappings))
    if look.thresholds or not look.color:
        found.append(_property("thresholds", {"mode": "absolute", "steps": _steps(look, base)}))
    if look.color:
        found.append(_fixed(look.color))
    return found


def _links(links: Iterable[Link]) -> model.DynamicConfigValue:
    return _property("links", [{"title": x.title, "url": x.url, "targetBlank": x.new_tab} for x in links])


def _stat(described: Stat) -> stat.Panel:
    named = any(query.legend for query in described.queries)
    built = (
        stat.Panel()
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .color_mode(options.BigValueColorMode.BACKGROUND_SOLID)
        .graph_mode(options.BigValueGraphMode.NONE)
        .text_mode(options.BigValueTextMode.VALUE_AND_NAME if named else options.BigValueTextMode.VALUE)
        .text(common.VizTextDisplayOptions().title_size(13).value_size(32))
        .wide_layout(False)
        .justify_mode(options.BigValueJustifyMode.CENTER)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    look = described.look
    # A stat without data takes the first colour: that one must say nothing.
    steps = [model.Threshold(step["value"], step["color"]) for step in _steps(look, NEUTRAL)]
    built.thresholds(build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
    if look.decimals is not None:
        built.decimals(look.decimals)
    if _mappings(look):
        built.mappings([_mapping(mapping) for mapping in _mappings(look)])
    for index, query in enumerate(described.queries):
        target = _target(query.expr, index).instant().legend_format(query.legend or "__auto")
        built.with_target(target)
        if query.look:
            built.override_by_query("ABCDEFGHIJKLMN"[index], _looks(query.look, NEUTRAL))
    return built


def _mapping(mapping: dict[str, Any]) -> model.ValueMap | model.RangeMap | model.RegexMap:
    match mapping["type"]:
        case "value":
            return model.ValueMap.from_json(mapping)
        case "range":
            return model.RangeMap.from_json(mapping)
        case _:
            return model.RegexMap.from_json(mapping)


def _graph(described: Graph) -> timeseries.Panel:
    bars, right = isinstance(described, Bars), described.legend_right
    calcs, sorted_by = (["sum", "max"], "Total") if bars else (["lastNotNull", "max"], "Max")
    legend = (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(options.LegendDisplayMode.TABLE)
        .placement(options.LegendPlacement.RIGHT if right else options.LegendPlacement.BOTTOM)
        .calcs(calcs)
        .sort_by(sorted_by)
        .sort_desc(True)
    )
    built = (
        timeseries.Panel()
        .color_scheme(_scheme(described))
        .draw_style(options.GraphDrawStyle.BARS if bars else options.GraphDrawStyle.LINE)
        .line_width(0 if bars else 1)
        .fill_opacity({Bars: 90, Area: 50}.get(type(described), 0))
        .show_points(options.VisibilityMode.NEVER if bars else options.VisibilityMode.AUTO)
        .min(0)
        .legend(legend)
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    )
    if isinstance(described, Bars | Area):
        built.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A"))
    if described.unit in _COUNTS:
        # Or the axis of what is 0 all the time ends at 100.
        built.axis_soft_max(1)
    if described.points:
        built.max_data_points(described.points)
    if described.highest is not None:
        built.max(described.highest)
    if described.links:
        built.data_links([build.DashboardLink(x.title).url(x.url).target_blank(True) for x in described.links])
    _draw_series(built, described)
    return built


def _scheme(described: Graph) -> build.FieldColor:
    if described.shades:
        return build.FieldColor().mode(model.FieldColorModeId.SHADES).fixed_color(described.shades)
    return build.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC)


def _draw_series(built: timeseries.Panel, described: Graph) -> None:
    for index, query in enumerate(described.queries):
        built.with_target(_target(query.expr, index).range().legend_format(query.legend))
        if query.color:
            built.override_by_query("ABCDEFGHIJKLMN"[index], [_fixed(query.color)])
    for name, color in described.names.items():
        built.override_by_name(name, [_fixed(color)])
    for name in described.lines if isinstance(described, Bars) else ():
        line = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 0, "showPoints": "never"}
        stacking = _property("custom.stacking", {"mode": "none", "group": "A"})
        built.override_by_name(name, [*(_property(f"custom.{key}", value) for key, value in line.items()), stacking])


def _table(described: Table) -> table.Panel:
    with_query = [column for column in described.columns if column.expr]
    fields = _fields(described)
    order = {name: index for index, name in enumerate(fields)}
    organize = {"excludeByName": {}, "indexByName": order, "renameByName": fields}
    built = (
        table.Panel()
        .cell_height(options.TableCellHeight.SM)
        .transformations(
            [
                model.DataTransformerConfig(id_val="merge", options={}),
                model.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": list(fields)}}),
                model.DataTransformerConfig(id_val="organize", options=organize),
            ]
        )
    )
    for index, column in enumerate(with_query):
        expr = f"{column.expr} or NaN * {column.always}" if column.always else column.expr
        target = _target(expr, index).instant().format(PromQueryFormat.TABLE).legend_format("__auto")
        built.with_target(target)
    for column in described.columns:
        built.override_by_name(column.title, _column(column))
    if described.points:
        built.max_data_points(described.points)
    if described.order:
        built.sort_by([common.TableSortByFieldState().display_name(described.order).desc(described.descending)])
    return built


def _fields(described: Table) -> dict[str, str]:
    """Return the fields that are shown and their titles, in the order of the columns.

    A column with both a label and a query shows the label. Of one query that alone has data, Grafana names the values
    `Value`, without its letter.
    """
    letters = {
        column.title: letter
        for column, letter in zip((c for c in described.columns if c.expr), "ABCDEFGHIJKLMN", strict=False)
    }
    fields: dict[str, str] = {}
    for column in described.columns:
        if column.label:
            fields[column.label] = column.title
            continue
        fields[f"Value #{letters[column.title]}"] = column.title
        if letters[column.title] == "A":
            fields["Value"] = column.title
    return fields


def _column(column: Any) -> Properties:
    look: Look = column.look
    cell = "colored" if column.cell == "text" and (look.thresholds or look.values) else column.cell
    found = [_property("noValue", column.empty), *_looks(look, TEXT, column.empty if column.always else "")]
    if column.label:
        # With any other unit Grafana takes the revision 510e038, or a model named 007, for a number.
        found.append(_property("unit", "string"))
    if cell in _CELLS:
        found.append(_property("custom.cellOptions", _CELLS[cell]))
    if not look.color:
        found.append(_property("color", {"mode": "thresholds"}))
    if column.cell == "gauge":
        found += [_property("min", 0), _property("max", 1)]
    if column.cell == "bar":
        # Without it a bar is as long as the greatest number of the whole table lets it.
        found += [_property("min", 0), _property("fieldMinMax", True)]
    if column.width:
        found.append(_property("custom.width", column.width))
    if column.align:
        found.append(_property("custom.align", column.align))
    if column.links:
        found.append(_links(column.links))
    return found
