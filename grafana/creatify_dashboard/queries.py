"""PromQL that the panels share: what is selected, and how replicas are taken for one truth."""

EXPORTER = 'job=~"$job", instance=~"$instance"'
WORKSPACE = f'{EXPORTER}, workspace=~"$workspace"'
MODEL = f'{WORKSPACE}, model=~"$model"'
REASON = f'{MODEL}, reason=~"$reason"'
FAILED = f'{MODEL}, status="failed"'
# Alerts and rules have few of these labels, and an absent label is an empty one.
ALERTS = 'alertname=~"Creatify.+", job=~"$job|", instance=~"$instance|", workspace=~"$workspace|", model=~"$model|"'
FIRING = f'ALERTS{{{ALERTS}, alertstate="firing"}}'
RULES_ARE_LOADED = 'max(creatify:dashboard:info{job=~"$job|", instance=~"$instance|"})'

TASKS = "creatify_text_generator_tasks"
OLDEST = "creatify_text_generator_oldest_unfinished_task_timestamp_seconds"
SUBMITTED = "creatify_text_generator_tasks_submitted_total"
FINISHED = "creatify_text_generator_tasks_finished_total"
FAILURES = "creatify_text_generator_failures_total"
CREDITS = "creatify_text_generator_credits_used_total"
DURATION = "creatify_text_generator_task_duration_seconds_bucket"
OWNER = "creatify_text_generator_failure_reason_info"
ERRORS = "creatify_exporter_listing_errors_total"

BY_MODEL = "workspace, model"
BY_STATUS = "workspace, model, status"
BY_REASON = "workspace, model, reason"

# Fewer finished tasks than this make no percentage: one failed of one is not 100 %.
ENOUGH = 10


def newest(metric: str, labels: str, selector: str = MODEL) -> str:
    """Return a gauge as one truth: replicas of the exporter show the same figures, so the greatest stands for all."""
    return f"max by ({labels}) ({metric}{{{selector}}})"


def per_second(metric: str, labels: str, selector: str = MODEL) -> str:
    """Return the rate of a counter, once however many replicas show it."""
    return f"max by ({labels}) (rate({metric}{{{selector}}}[$__rate_interval]))"


def per_bar(metric: str, labels: str, selector: str = MODEL) -> str:
    """Return how much a counter of the ledger grew between two points of a graph, so that bars add up to the growth."""
    growth = _growth(f"{metric}{{{selector}}}", "$__rate_interval:$__interval")
    return f"{_once(growth, labels)} * $__interval_ms / 1000"


def grown(metric: str, labels: str, window: str, selector: str = MODEL) -> str:
    """Return how much a counter of the ledger grew within a window that ends now: what the bars in it add up to.

    increase() would stretch what it saw to the ends of the window: 508 tasks in an hour where there were 500.
    """
    series = f"{metric}{{{selector}}}"
    # A fixed window has steps of its own: those of the page may be longer than it.
    of_range = window == "$__range"
    step, seconds = ("$__interval", "$__interval_ms / 1000") if of_range else ("1m", "60")
    growth = _growth(series, "$__rate_interval:$__interval" if of_range else "5m:1m")
    # Most series stand still at most steps: without those it takes a third of the time.
    steps = f"{_once(f'({growth}) > 0', labels)} * {seconds}"
    # A step that ends where the window begins is outside of it: Prometheus 2 would take it in, but for the offset.
    none = f"0 * max by ({labels}) (last_over_time({series}[{window}]))"
    return f"(sum_over_time(({steps})[{window}:{step}] offset -1ms) or {none})"


def _growth(series: str, steps: str) -> str:
    """Return the growth per second from one step to the next, exactly.

    irate() over a subquery takes its last two points, which are the two ends of a step, and extrapolates nothing. A
    value lasts for an hour: a scrape may fail, and what is counted in one go after an outage belongs to the step that
    it ended in. A series that was born since the step before has grown from 0: rate() sees that.
    """
    growth = f"irate(last_over_time({series}[1h])[{steps}])"
    return f"{growth} or rate({series}[$__rate_interval])" if "$__" in steps else growth


def _once(growth: str, labels: str) -> str:
    """Return a growth by some labels, once however many replicas show it.

    One replica is taken for each workspace: two that are scraped half a minute apart have a task in different steps,
    and the greatest of both would show it twice.
    """
    replica = f"topk by (workspace) (1, creatify_up{{{WORKSPACE}}})"
    return f"max by ({labels}) (({growth}) and on (job, instance, workspace) {replica})"


def total(by: str, expr: str) -> str:
    """Return the sum by some labels; by none, the sum of everything."""
    return f"sum by ({by}) ({expr})" if by else f"sum({expr})"


def owned(failures: str) -> str:
    """Return failures by workspace, model and reason with the owner of the reason as a further label."""
    # While replicas reload one after the other they may name two owners: one is taken.
    owner = f"topk by (workspace, reason) (1, max by (workspace, reason, owner) (last_over_time({OWNER}{{{WORKSPACE}}}"
    return f"{failures} * on (workspace, reason) group_left (owner) {owner}[$__range])))"


UP = newest("creatify_up", "workspace", WORKSPACE)
# The order in which workspaces have their colours: it holds while a workspace is down, too.
BUSIEST = f"max by (workspace) (last_over_time(creatify_exporter_ledger_tasks{{{WORKSPACE}}}[$__range] @ end()))"
LARGEST = f"max by (instance) (last_over_time(process_resident_memory_bytes{{{EXPORTER}}}[$__range] @ end()))"
BALANCE = newest("creatify_remaining_credits", "workspace", WORKSPACE)
AGE_OF_OLDEST = f"clamp_min(time() - {newest(OLDEST, BY_STATUS)}, 1)"


def failure_ratio(by: str, window: str) -> str:
    """Return the failed tasks as a share of the finished ones, where enough of them finished within a window."""
    finished = total(by, grown(FINISHED, BY_STATUS, window))
    return f"{total(by, grown(FINISHED, BY_STATUS, window, FAILED))} / ({finished} >= {ENOUGH})"
