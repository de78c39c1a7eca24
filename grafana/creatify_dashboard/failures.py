"""Failures: how many, of which models, for which reasons, and who has to act."""

from creatify_dashboard.colors import NEUTRAL, OWN_REASONS, OWNERS, REASONS
from creatify_dashboard.panels import DOCS, Bars, Column, Graph, Link, Look, Query, Row, Table, only, ranked
from creatify_dashboard.queries import (
    BY_REASON,
    BY_STATUS,
    ENOUGH,
    FAILED,
    FAILURES,
    FINISHED,
    REASON,
    grown,
    owned,
    per_bar,
    per_second,
    total,
)

_PER_BAR = per_bar(FAILURES, BY_REASON, REASON)
_IN_RANGE = grown(FAILURES, BY_REASON, "$__range", REASON)
_COUNT = f"round({total('reason, owner', owned(_IN_RANGE))})"
# Of the rounded counts, so that the shares add up to the whole.
_ALL = total("", _COUNT)
_FINISHED_RATE = total("model", per_second(FINISHED, BY_STATUS))
_FAILED_RATE = total("model", per_second(FINISHED, BY_STATUS, FAILED))
_MOST_FAILED = total("model", f"max by ({BY_STATUS}) (increase({FINISHED}{{{FAILED}}}[$__range] @ end()))")
_REASON_LINKS = (
    only("reason", "Only this reason", "workspace", "model"),
    Link("What it means and what to do", f"{DOCS}/failure-reasons.md#${{__value.text}}"),
    Link("Runbook: more failures than usual", f"{DOCS}/runbook.md#CreatifyFailureReasonSpike"),
)
# Drawn by nothing: a legend with the total says "0" where no reason has a bar.
_TOTAL = Query(total("", _PER_BAR), "all failures", color="transparent")

ROW = Row(
    "Failures",
    (
        Bars(
            "Failures by owner",
            "Failed tasks in each bar by who has to act: caller (what was sent is wrong), account (the workspace's "
            "credits or permissions), upstream (Creatify or the model provider), unknown.",
            "locale",
            "nothing counted yet",
            (Query(f"{total('owner', owned(_PER_BAR))} > 0", "{{owner}}"), _TOTAL),
            names=OWNERS,
            width=10,
            height=9,
            lines=(_TOTAL.legend,),
        ),
        Bars(
            "Failures by reason",
            "Failed tasks in each bar by the reason that the exporter reads from their failure texts. Blue: the caller "
            "has to act, purple: the account, orange and yellow: upstream, grey: unknown.",
            "locale",
            "nothing counted yet",
            (Query(f"{total('reason', _PER_BAR)} > 0", "{{reason}}"), _TOTAL),
            width=14,
            height=9,
            names={reason: color for reasons in REASONS.values() for reason, color in reasons.items()},
            lines=(_TOTAL.legend,),
            shades=OWN_REASONS,
        ),
        Table(
            "Reasons over the time range",
            "Failures by reason, who has to act, and how many models and workspaces they hit.",
            "locale",
            "nothing counted yet",
            width=14,
            height=9,
            points=100,
            columns=(
                Column("Reason", label="reason", links=_REASON_LINKS),
                Column(
                    "Owner",
                    label="owner",
                    cell="background",
                    width=110,
                    look=Look(patterns=tuple((f"^{owner}$", "", color) for owner, color in OWNERS.items())),
                    empty="",
                ),
                Column(
                    "Count",
                    expr=f'{_COUNT} > 0 or label_replace({_ALL} == 0, "reason", "no failures", "", "")',
                    look=Look(decimals=0),
                    width=110,
                ),
                Column(
                    "Share",
                    expr=f"{_COUNT} / on () group_left () {_ALL} > 0",
                    look=Look("percentunit", 1, color=NEUTRAL),
                    cell="bar",
                    empty="",
                    width=220,
                ),
                Column(
                    "Models",
                    expr=f"count by (reason, owner) (round({total('reason, owner, model', owned(_IN_RANGE))}) > 0)",
                    look=Look(decimals=0),
                    width=90,
                ),
                Column(
                    "Workspaces",
                    expr=f"count by (reason, owner) (round({total('reason, owner, workspace', owned(_IN_RANGE))}) > 0)",
                    look=Look(decimals=0),
                    width=110,
                ),
            ),
            order="Count",
            descending=True,
        ),
        Graph(
            "Failure ratio by model",
            "Failed tasks as a share of the finished ones, for the models with most failures, and only where at least "
            f"{ENOUGH} tasks of a model finished between two points. A longer time range has more of them.",
            "percentunit",
            f"fewer than {ENOUGH} finished tasks between two points",
            ranked(
                f"{_FAILED_RATE} / ({_FINISHED_RATE} * $__interval_ms / 1000 >= {ENOUGH}) * $__interval_ms / 1000",
                f"({_MOST_FAILED} > 0)",
            ),
            width=10,
            height=9,
            points=30,
            highest=1,
            links=(Link("Runbook: a model fails", f"{DOCS}/runbook.md#CreatifyModelFailureSpike"),),
        ),
    ),
)
