"""Models: all of them over the time range, one line each."""

from creatify_dashboard.colors import BLUE, GREEN, ORANGE, RED
from creatify_dashboard.panels import DOCS, Column, Link, Look, Row, Table, only
from creatify_dashboard.queries import (
    BY_MODEL,
    BY_STATUS,
    CREDITS,
    DURATION,
    FAILED,
    FINISHED,
    MODEL,
    SUBMITTED,
    failure_ratio,
    grown,
    total,
)

_SUBMITTED = f"round({total('model', grown(SUBMITTED, BY_MODEL, '$__range'))})"
_CREDITS = total("model", grown(CREDITS, BY_MODEL, "$__range"))
_FINISHED = total("model", grown(FINISHED, BY_STATUS, "$__range"))
_DURATIONS = total("model, le", f"max by ({BY_STATUS}, le) (increase({DURATION}{{{MODEL}}}[$__range]))")


def _finished(selector: str) -> str:
    return f"round({total('model', grown(FINISHED, BY_STATUS, '$__range', selector))})"


ROW = Row(
    "Models",
    (
        Table(
            "Models over the time range",
            "A click on a name shows that model alone, or what to do when it fails. Few finished tasks make no "
            "percentage. p90: nine of ten tasks took no longer, as reported by the API.",
            "locale",
            "nothing counted yet",
            width=24,
            height=16,
            points=100,
            columns=(
                Column(
                    "Model",
                    label="model",
                    links=(
                        only("model", "Only this model", "workspace", "reason"),
                        Link("Runbook: a model fails", f"{DOCS}/runbook.md#CreatifyModelFailureSpike"),
                    ),
                ),
                Column("Submitted", expr=_SUBMITTED, look=Look(decimals=0), width=120),
                Column("Done", expr=_finished(f'{MODEL}, status="done"'), look=Look(decimals=0), width=120),
                Column("Failed", expr=_finished(FAILED), look=Look(decimals=0), width=120),
                Column(
                    "Failed %",
                    expr=failure_ratio("model", "$__range"),
                    look=Look("percentunit", 1, ((0, GREEN), (0.1, ORANGE), (0.25, RED))),
                    cell="gauge",
                    empty="",
                    width=220,
                ),
                Column("p90", expr=f"histogram_quantile(0.9, {_DURATIONS}) >= 0", look=Look("s", 1), width=120),
                Column("Credits", expr=f"round({_CREDITS}, 0.01)", look=Look(color=BLUE), cell="bar", width=260),
                Column("Credits/task", expr=f"{_CREDITS} / ({_FINISHED} >= 1)", look=Look(decimals=2), width=140),
            ),
            order="Credits",
            descending=True,
        ),
    ),
)
