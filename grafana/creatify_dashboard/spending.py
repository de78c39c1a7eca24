"""Credits: what text generation costs, and what is left."""

from creatify_dashboard.panels import Bars, Graph, Row, each_ranked, ranked, rest
from creatify_dashboard.queries import (
    BALANCE,
    BUSIEST,
    BY_MODEL,
    BY_STATUS,
    CREDITS,
    FINISHED,
    MODEL,
    per_bar,
    per_second,
    total,
)

_PER_BAR = total("model", per_bar(CREDITS, BY_MODEL))
_MOST_USED = total("model", f"max by ({BY_MODEL}) (increase({CREDITS}{{{MODEL}}}[$__range] @ end()))")
_USED_RATE = total("model", per_second(CREDITS, BY_MODEL))
_FINISHED_RATE = total("model", per_second(FINISHED, BY_STATUS))

ROW = Row(
    "Credits",
    (
        Bars(
            "Credits used by model",
            "Credits in each bar, by the models that use most.",
            "locale",
            "nothing counted yet",
            (*ranked(_PER_BAR, _MOST_USED), rest(_PER_BAR, _MOST_USED)),
            width=12,
            height=9,
        ),
        Graph(
            "Credits per finished task",
            "Credits used, divided by the tasks that finished in the same time, of the models that use most.",
            "locale",
            "none finished",
            ranked(f"{_USED_RATE} / ({_FINISHED_RATE} > 0)", _MOST_USED),
            points=30,
            width=12,
            height=9,
        ),
        Graph(
            "Balance (credits)",
            "Credits left, for all products of Creatify. It rises when credits are bought.",
            "locale",
            "unknown",
            each_ranked(BALANCE, BUSIEST, "workspace"),
            width=24,
            height=7,
        ),
    ),
)
