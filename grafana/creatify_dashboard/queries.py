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


def grown(metric: str, labels: str, window: str, selector: str = MODEL) -> str:
    """Return how much a counter grew within a window that ends now, once however many replicas show it."""
    return f"max by ({labels}) (increase({metric}{{{selector}}}[{window}]))"


def per_second(metric: str, labels: str, selector: str = MODEL) -> str:
    """Return the rate of a counter, once however many replicas show it."""
    return f"max by ({labels}) (rate({metric}{{{selector}}}[$__rate_interval]))"


def per_bar(metric: str, labels: str, selector: str = MODEL) -> str:
    """Return how much a counter of the ledger grew between two points of a graph, so that bars add up to the growth.

    irate() over a subquery takes its last two points, which are the two ends of the bar, and extrapolates nothing:
    rate() alone shows seven eighths of the first failure of a reason. It fills in where a scrape failed at an end.
    One replica is taken for each workspace: two that are scraped half a minute apart have a task in different bars,
    and the greatest of both would show it twice.
    """
    series = f"{metric}{{{selector}}}"
    growth = f"irate({series}[$__rate_interval:$__interval]) or rate({series}[$__rate_interval])"
    replica = f"topk by (workspace) (1, creatify_up{{{WORKSPACE}}})"
    return f"max by ({labels}) (({growth}) and on (job, instance, workspace) {replica}) * $__interval_ms / 1000"


def total(by: str, expr: str) -> str:
    """Return the sum by some labels; by none, the sum of everything."""
    return f"sum by ({by}) ({expr})" if by else f"sum({expr})"


def owned(failures: str) -> str:
    """Return failures by workspace, model and reason with the owner of the reason as a further label."""
    # While replicas reload one after the other they may name two owners: one is taken.
    owner = f"topk by (workspace, reason) (1, max by (workspace, reason, owner) (last_over_time({OWNER}{{{WORKSPACE}}}"
    return f"{failures} * on (workspace, reason) group_left (owner) {owner}[$__range])))"


UP = newest("creatify_up", "workspace", WORKSPACE)
BALANCE = newest("creatify_remaining_credits", "workspace", WORKSPACE)
AGE_OF_OLDEST = f"clamp_min(time() - {newest(OLDEST, BY_STATUS)}, 1)"


def failure_ratio(by: str, window: str) -> str:
    """Return the failed tasks as a share of the finished ones, where enough of them finished within a window."""
    finished = total(by, grown(FINISHED, BY_STATUS, window))
    return f"{total(by, grown(FINISHED, BY_STATUS, window, FAILED))} / ({finished} >= {ENOUGH})"
