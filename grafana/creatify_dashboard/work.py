"""Work: what is submitted, what becomes of it, what waits, and how long it takes."""

from creatify_dashboard.colors import STATUSES, TEXT
from creatify_dashboard.panels import Area, Bars, Graph, Query, Row
from creatify_dashboard.queries import (
    AGE_OF_OLDEST,
    BY_MODEL,
    BY_STATUS,
    DURATION,
    FINISHED,
    MODEL,
    SUBMITTED,
    TASKS,
    newest,
    per_bar,
    per_second,
    total,
)

_DURATIONS = total("le", per_second(DURATION, f"{BY_STATUS}, le"))

ROW = Row(
    "Work",
    (
        Bars(
            "Submitted and finished tasks",
            "Tasks in each bar: done and failed as bars, submitted as a line. The line above the bars for long: tasks "
            "pile up.",
            "locale",
            "nothing counted yet",
            (
                Query(total("status", per_bar(FINISHED, BY_STATUS)), "{{status}}"),
                Query(total("", per_bar(SUBMITTED, BY_MODEL)), "submitted"),
            ),
            width=12,
            names=STATUSES | {"submitted": TEXT},
            lines=("submitted",),
        ),
        Area(
            "Tasks in flight",
            "Listed tasks that are pending or running.",
            "locale",
            "no listing",
            (Query(total("status", newest(TASKS, BY_STATUS, f'{MODEL}, status=~"pending|running"')), "{{status}}"),),
            width=12,
            names=STATUSES,
        ),
        Area(
            "Listed tasks",
            "All tasks in the list, by what they are now. Tasks leave the list: it says nothing about totals.",
            "locale",
            "no listing",
            (Query(total("status", newest(TASKS, BY_STATUS)), "{{status}}"),),
            names=STATUSES,
        ),
        Graph(
            "Oldest unfinished task",
            "Age of the oldest task that is pending or running; a gap where there is none.",
            "s",
            "nothing unfinished, or no listing",
            (Query(f"max by (status) ({AGE_OF_OLDEST})", "{{status}}"),),
            names=STATUSES,
        ),
        Graph(
            "Task duration, as reported by the API",
            "From creation to the last update of finished tasks. The API may not move the time of the update when a "
            "task finishes: no alert rests on these figures.",
            "s",
            "none finished",
            tuple(Query(f"histogram_quantile(0.{p}, {_DURATIONS}) >= 0", f"p{p}") for p in (50, 90, 99)),
            points=100,
            names={"p50": "#8ab8ff", "p90": "#3274d9", "p99": "#b877d9"},
        ),
    ),
)
