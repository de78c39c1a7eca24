"""The exporter itself: its listings, its ledger, its process."""

from creatify_dashboard.colors import CAUSES, GREEN, ORANGE, RED, TEXT
from creatify_dashboard.panels import Column, Graph, Look, Query, Row, Table, each_ranked
from creatify_dashboard.queries import (
    BUSIEST,
    BY_MODEL,
    BY_STATUS,
    ERRORS,
    EXPORTER,
    LARGEST,
    TASKS,
    WORKSPACE,
    newest,
    per_second,
    total,
)

# Answers that are no trouble; all others are shades of orange.
_REQUESTS = {"text_generator 200": "#5794f2", "remaining_credits 200": "#37b7a4", "text_generator_task 200": "#b877d9"}


def _verdict(title: str, metric: str, wrong: str, right: str) -> Column:
    look = Look(values=((0, wrong, RED), (1, right, GREEN)))
    return Column(title, expr=newest(metric, "instance", EXPORTER), look=look, cell="background", width=75)


def _by_workspace(title: str, description: str, unit: str, metric: str, empty: str = "no listing") -> Graph:
    queries = each_ranked(newest(metric, "workspace", WORKSPACE), BUSIEST, "workspace")
    return Graph(title, description, unit, empty, queries, width=6, height=9, legend_right=False)


def _by_replica(title: str, description: str, unit: str, expr: str) -> Graph:
    queries = each_ranked(expr, LARGEST, "instance")
    return Graph(title, description, unit, "unknown", queries, width=6, height=9, legend_right=False)


ROW = Row(
    "Exporter",
    (
        Table(
            "Replicas",
            "What Prometheus scrapes: version, whether the ledger answered last time, whether the last reload of the "
            "configuration worked.",
            "short",
            "no exporter",
            width=10,
            height=7,
            columns=(
                Column("Replica", label="instance"),
                Column(
                    "Version",
                    label="version",
                    expr=newest(
                        "creatify_exporter_build_info", "instance, version, revision, python_version", EXPORTER
                    ),
                    width=70,
                ),
                Column("Revision", label="revision", width=80),
                Column("Python", label="python_version", width=70),
                _verdict("Ledger", "creatify_exporter_ledger_up", "down", "up"),
                _verdict("Reload", "creatify_exporter_config_last_reload_successful", "refused", "done"),
                Column(
                    "Started",
                    expr=f"1000 * {newest('process_start_time_seconds', 'instance', EXPORTER)}",
                    look=Look("dateTimeFromNow"),
                    width=115,
                ),
            ),
            order="Replica",
        ),
        Table(
            "What the exporter knows of each workspace",
            "Balance: whether its newest reading succeeded. Held back: how long requests still wait because the API "
            "asked for it. Unsettled: unfinished tasks that left the list and are asked for by id. Clock: this "
            "machine's clock minus the API's.",
            "locale",
            "no exporter",
            width=14,
            height=7,
            columns=(
                Column("Workspace", label="workspace"),
                Column(
                    "Balance",
                    expr=newest("creatify_exporter_balance_up", "workspace", WORKSPACE),
                    look=Look(values=((0, "failed", RED), (1, "read", GREEN))),
                    cell="background",
                    empty="not asked for",
                    width=110,
                ),
                Column(
                    "Held back",
                    expr="max by (workspace) (clamp_min("
                    + newest("creatify_exporter_backoff_until_timestamp_seconds", "workspace, endpoint", WORKSPACE)
                    + " - time(), 0))",
                    look=Look("s", 0, ((0, ORANGE),)),
                    width=110,
                ),
                Column(
                    "Unsettled",
                    expr=newest("creatify_exporter_unsettled_tasks", "workspace", WORKSPACE),
                    look=Look(decimals=0, thresholds=((0, TEXT), (1, ORANGE))),
                    width=100,
                ),
                Column(
                    "Clock",
                    expr="max by (workspace) (creatify_exporter_clock_offset_seconds{" + WORKSPACE + "})",
                    look=Look("s", 1, ((-300, TEXT), (300, RED))),
                    empty="unknown",
                    width=100,
                ),
                Column(
                    "Models",
                    expr=f"count by (workspace) (sum by ({BY_MODEL}) ({newest(TASKS, BY_STATUS, WORKSPACE)}))",
                    look=Look(decimals=0),
                    width=90,
                ),
                Column(
                    "Tasks in other",
                    expr=total("workspace", newest(TASKS, BY_STATUS, f'{WORKSPACE}, model="other"')),
                    look=Look(decimals=0, thresholds=((0, TEXT), (1, ORANGE))),
                    width=130,
                ),
                Column(
                    "Counting since",
                    expr="1000 * " + newest("creatify_exporter_ledger_start_timestamp_seconds", "workspace", WORKSPACE),
                    look=Look("dateTimeFromNow"),
                    width=150,
                ),
            ),
            order="Workspace",
        ),
        _by_workspace(
            "Listing time",
            "How long the newest listing took. It must fit into the scrape timeout, or figures are one scrape old.",
            "s",
            "creatify_exporter_listing_duration_seconds",
        ),
        _by_workspace(
            "Listing size",
            "Size of the newest listing, decompressed.",
            "bytes",
            "creatify_exporter_listing_size_bytes",
        ),
        _by_workspace(
            "Tasks in the ledger",
            "Tasks that are remembered so that none counts twice.",
            "locale",
            "creatify_exporter_ledger_tasks",
            "no ledger",
        ),
        _by_workspace(
            "Malformed records",
            "Records of the newest listing that could not be used.",
            "locale",
            "creatify_exporter_malformed_tasks",
        ),
        Graph(
            "Failed listings by cause",
            "Failed listings per minute, of the replica that has most. ledger: the listing succeeded, but could not be "
            "recorded.",
            "cpm",
            "no exporter",
            (Query(f"{total('cause', per_second(ERRORS, 'workspace, cause', WORKSPACE))} * 60", "{{cause}}"),),
            width=6,
            height=9,
            names=CAUSES,
            legend_right=False,
        ),
        Graph(
            "API requests per minute",
            "Requests to Creatify, of the replica that sends most, by HTTP status; error: there was no answer.",
            "cpm",
            "no requests",
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
            width=6,
            height=9,
            names=_REQUESTS,
            shades=ORANGE,
            legend_right=False,
        ),
        _by_replica(
            "Memory",
            "Resident memory of each replica.",
            "bytes",
            newest("process_resident_memory_bytes", "instance", EXPORTER),
        ),
        _by_replica(
            "CPU",
            "Cores that each replica keeps busy.",
            "percentunit",
            per_second("process_cpu_seconds_total", "instance", EXPORTER),
        ),
    ),
    collapsed=True,
)
