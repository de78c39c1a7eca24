"""The first screen: is it all right, where is it not, and which alerts fire."""

from creatify_dashboard.colors import BLUE, GREEN, NEUTRAL, ORANGE, RED, TEXT
from creatify_dashboard.panels import DOCS, Column, Link, Look, Query, Row, Stat, Table, only
from creatify_dashboard.queries import (
    AGE_OF_OLDEST,
    ALERTS,
    BALANCE,
    BY_MODEL,
    BY_STATUS,
    CREDITS,
    ENOUGH,
    ERRORS,
    EXPORTER,
    FAILED,
    FINISHED,
    FIRING,
    MODEL,
    RULES_ARE_LOADED,
    TASKS,
    UP,
    WORKSPACE,
    failure_ratio,
    grown,
    newest,
    total,
)

OLD = ((0.0, GREEN), (900.0, ORANGE), (1800.0, RED))
OFTEN = ((0.0, GREEN), (0.1, ORANGE), (0.25, RED))
ENOUGH_SECONDS = 3 * 86400
SOON = ((0.0, RED), (86400.0, ORANGE), (float(ENOUGH_SECONDS), GREEN))
FEW = ((0.0, RED), (100.0, ORANGE), (500.0, TEXT))

USED_IN_AN_HOUR = total("workspace", grown(CREDITS, BY_MODEL, "1h", WORKSPACE))
# A workspace without credits uses none: it is empty now, and not at no time.
TIME_TO_EMPTY = f"0 * ({BALANCE} < 1) or 3600 * {BALANCE} / ({USED_IN_AN_HOUR} > 0)"
_SOONEST = f"min({TIME_TO_EMPTY})"
# Others whose credits last say nothing about a workspace whose balance cannot be read.
_UNREAD = f"max(({newest('creatify_exporter_balance_up', 'workspace', WORKSPACE)} == 0) + 1 and on () {_SOONEST})"
NOT_RECORDED = f'max by (workspace) (increase({ERRORS}{{{WORKSPACE}, cause="ledger"}}[5m])) > 0'

FINISHED_LATELY = f"round({total('', grown(FINISHED, BY_STATUS, '15m'))})"
FAILED_LATELY = f"round({total('', grown(FINISHED, BY_STATUS, '15m', FAILED))})"


def _firing(severity: str) -> str:
    return f"count({FIRING.removesuffix('}')}, severity{severity}}})"


def _of(count: str, value: str) -> str:
    """Return a value with a count as its label `n`, to be said in a legend."""
    return f'count_values("n", {count}) * on () group_left () ({value})'


STATS = (
    Stat(
        "Firing alerts",
        "Alerts of prometheus/alerts.yml that fire now, by severity. No rules: Prometheus has not loaded that file, so "
        "nobody would be told.",
        "locale",
        "no rules",
        (
            Query(_firing('="critical"'), "critical", Look(color=RED)),
            Query(_firing('="warning"'), "warning", Look(color=ORANGE)),
            Query(_firing('!~"critical|warning"'), "info", Look(color=BLUE)),
            Query(
                f"0 * {RULES_ARE_LOADED} unless on () count({FIRING})",
                "firing",
                Look(values=((0, "none", GREEN),), color=GREEN),
            ),
        ),
        width=5,
        height=3,
    ),
    Stat(
        "Workspaces down",
        "Workspaces whose newest listing failed or is too old, and how many there are.",
        "locale",
        "no exporter",
        (Query(_of(f"count({UP})", f"sum(1 - {UP}) < count({UP}) or -count({UP})"), "of {{n}}"),),
        width=4,
        height=3,
        look=Look(values=((0, "none", GREEN),), ranges=((None, -1, "all", RED),), thresholds=((1, RED),)),
    ),
    Stat(
        "Ledger",
        "Whether the ledger of every replica answered last time. While it does not, counters stand still.",
        "short",
        "unknown",
        (
            Query(
                f"min({newest('creatify_exporter_ledger_up', 'job, instance', EXPORTER)} "
                # Targets of /sd show nothing about the exporter itself: there, the errors tell.
                f'or max by (job, instance) (increase({ERRORS}{{{WORKSPACE}, cause="ledger"}}[5m])) == bool 0)'
            ),
        ),
        width=3,
        height=3,
        look=Look(values=((0, "down", RED), (1, "up", GREEN))),
    ),
    Stat(
        "Failed (15 min)",
        "Failed tasks as a share of those that finished in the last 15 minutes; of fewer than "
        f"{ENOUGH} only how many failed.",
        "percentunit",
        "no exporter",
        (
            Query(_of(f"{FINISHED_LATELY} >= {ENOUGH}", f"{FAILED_LATELY} / {FINISHED_LATELY}"), "of {{n}} finished"),
            Query(
                _of(f"{FINISHED_LATELY} < {ENOUGH}", FAILED_LATELY),
                "failed of {{n}} finished",
                Look(unit="locale", decimals=0, color=NEUTRAL),
            ),
        ),
        width=4,
        height=3,
        look=Look(decimals=1, thresholds=OFTEN),
    ),
    Stat(
        "Oldest unfinished",
        "Age of the oldest listed task that is pending or running.",
        "s",
        "no listing",
        (Query(f"max({AGE_OF_OLDEST}) or 0 * max({UP} == 1)"),),
        width=4,
        height=3,
        look=Look(decimals=1, values=((0, "none", GREEN),), thresholds=OLD),
    ),
    Stat(
        "Credits last",
        "How long the balance of the workspace that runs out first lasts at the pace of the last hour. Other products "
        "of Creatify may use it up sooner. Not all known: the balance of a workspace could not be read, and the others "
        "last.",
        "s",
        "unknown",
        (Query(f"{_SOONEST} < {ENOUGH_SECONDS} or -2 * {_UNREAD} or {_SOONEST} or -max({BALANCE} >= bool 0)"),),
        width=4,
        height=3,
        look=Look(
            decimals=1,
            values=((0, "empty", RED), (-1, "none used", NEUTRAL), (-2, "not all known", NEUTRAL)),
            thresholds=SOON,
        ),
    ),
)

_CAUSE = f'max by (workspace, cause) (increase({ERRORS}{{{WORKSPACE}, cause!="ledger"}}[15m])) > 0'
_LAST_SUCCESS = newest("creatify_exporter_last_success_timestamp_seconds", "workspace", WORKSPACE)

# A workspace whose exporter is not scraped any more must not go without a word.
KNOWN = f"max by (workspace) (last_over_time(creatify_up{{{WORKSPACE}}}[1h]))"
_DOWN = f"topk by (workspace) (1, {_CAUSE}) and on (workspace) ({UP} == 0)"


def _state(vector: str, text: str) -> str:
    return f'label_replace({vector}, "state", "{text}", "", "")'


STATE = " or on (workspace) ".join(
    (
        _state(f"({UP} == 1) and on (workspace) ({NOT_RECORDED})", "not recorded"),
        _state(f"{UP} == 1", "up"),
        f'label_join(label_replace({_DOWN}, "down", "down", "", ""), "state", ": ", "down", "cause")',
        _state(f"({UP} == 0) unless on (workspace) {_LAST_SUCCESS}", "no listing yet"),
        _state(f"{UP} == 0", "down"),
        _state(KNOWN, "no exporter"),
    )
)

WORKSPACES = Table(
    "Workspaces",
    "One line per workspace, those in trouble first. Finished, failed and credits per hour are those of the last hour. "
    "The failed ones have no percentage when few tasks finished. A click on a name shows that workspace alone.",
    "locale",
    "no exporter",
    width=24,
    height=7,
    columns=(
        Column("Workspace", label="workspace", links=(only("workspace", "Only this workspace", "model", "reason"),)),
        Column(
            "State",
            label="state",
            expr=f"max by (workspace, state) ({STATE})",
            cell="background",
            width=190,
            look=Look(
                patterns=(
                    ("^down.*$", "", RED),
                    ("^not recorded$", "", ORANGE),
                    ("^no .*$", "", NEUTRAL),
                    ("^up$", "", GREEN),
                )
            ),
        ),
        Column(
            "Listed",
            expr=f"time() - {_LAST_SUCCESS}",
            look=Look("s", 0, ((0, GREEN), (300, ORANGE), (900, RED))),
            width=110,
            always=KNOWN,
        ),
        Column(
            "In flight",
            expr=total("workspace", newest(TASKS, BY_STATUS, f'{MODEL}, status=~"pending|running"')),
            look=Look(decimals=0),
            width=100,
            always=KNOWN,
        ),
        Column(
            "Oldest",
            expr=f"max by (workspace) ({AGE_OF_OLDEST}) or 0 * ({UP} == 1)",
            look=Look("s", 1, OLD, values=((0, "none", GREEN),)),
            width=110,
            always=KNOWN,
        ),
        Column(
            "Finished/h",
            expr=f"round({total('workspace', grown(FINISHED, BY_STATUS, '1h'))})",
            look=Look(decimals=0),
            width=110,
        ),
        Column(
            "Failed/h",
            expr=f"round({total('workspace', grown(FINISHED, BY_STATUS, '1h', FAILED))})",
            look=Look(decimals=0),
            width=100,
        ),
        Column(
            "Failed",
            # The past hour of a workspace that is down says nothing about now.
            expr=f"{failure_ratio('workspace', '1h')} and on (workspace) ({UP} == 1)",
            look=Look("percentunit", 1, OFTEN),
            cell="gauge",
            empty="",
            width=200,
        ),
        Column(
            "Credits", expr=BALANCE, look=Look(decimals=0, thresholds=FEW), empty="unknown", width=110, always=KNOWN
        ),
        Column("Credits/h", expr=f"round({USED_IN_AN_HOUR}, 0.1)", width=110),
        Column(
            "Time to empty",
            expr=TIME_TO_EMPTY,
            look=Look("s", 1, SOON, values=((0, "empty", RED),)),
            width=140,
            always=KNOWN,
        ),
    ),
    order="State",
)

_ALERT = "alertname, workspace, model, reason, instance"
_SEVERITIES = " or ".join(
    f"{rank} * max by ({_ALERT}) ({FIRING.removesuffix('}')}, severity{severity}}})"
    for rank, severity in ((1, '="critical"'), (2, '="warning"'), (3, '!~"critical|warning"'))
)
_NONE_FIRES = (
    f'label_replace(0 * {RULES_ARE_LOADED} unless on () count({FIRING}), "alertname", "no alert fires", "", "")'
)

ALERTS_TABLE = Table(
    "Alerts that fire",
    "The worst first. A name leads to the runbook, a workspace or a model to the view of it alone.",
    "locale",
    "no rules: load prometheus/alerts.yml into Prometheus",
    width=24,
    height=7,
    columns=(
        Column(
            "Severity",
            expr=f"{_SEVERITIES} or {_NONE_FIRES}",
            look=Look(
                values=((0, "all quiet", GREEN), (1, "critical", RED), (2, "warning", ORANGE), (3, "info", BLUE)),
            ),
            cell="background",
            width=110,
            align="left",
        ),
        Column(
            "Alert",
            label="alertname",
            width=280,
            links=(Link("What to do: the runbook", f"{DOCS}/runbook.md#${{__value.text}}"),),
        ),
        Column("Workspace", label="workspace", links=(only("workspace", "Only this workspace"),)),
        Column("Model", label="model", links=(only("model", "Only this model", "workspace"),)),
        Column(
            "Reason",
            label="reason",
            width=200,
            links=(
                only("reason", "Only this reason", "workspace"),
                Link("What it means", f"{DOCS}/failure-reasons.md#${{__value.text}}"),
            ),
        ),
        Column("Exporter", label="instance"),
        Column(
            "Since",
            expr=f"1000 * max by ({_ALERT}) (ALERTS_FOR_STATE{{{ALERTS}}}) and on ({_ALERT}) {FIRING}",
            look=Look("dateTimeFromNow"),
            width=150,
            align="left",
        ),
    ),
    order="Severity",
)

ROW = Row("", (*STATS, WORKSPACES, ALERTS_TABLE))
