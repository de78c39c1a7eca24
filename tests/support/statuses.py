"""Every state that the status page is designed for, as the views it is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from creatify_exporter.ledger import Totals
from creatify_exporter.listing import Cell, Listing
from creatify_exporter.metrics import ExporterView, WorkspaceView
from creatify_exporter.reasons import BUILT_IN
from creatify_exporter.recording import Key, Total
from creatify_exporter.tasks import NANO, SECOND

NOW = 1_795_570_000.0
EXPORTER = ExporterView(True, True, NOW - 70_000, "1.2.3", "abc", "3.11.7")
MARKUP = "<script>alert(1)</script><b>&amp;\"'"
OWNERS = dict.fromkeys(BUILT_IN, "upstream") | {
    "token_limit": "caller",
    "content_blocked": "caller",
    "invalid_request": "caller",
    "insufficient_credits": "account",
    "permission_denied": "account",
    "other": "unknown",
    "unspecified": "unknown",
}
MODELS = ["gemini-2.5-pro", "gpt-5-mini", "claude-opus-4-7", "nova-pro-v1", "mistral-large-2512", "qwen3-max"]


def listing(
    models: Sequence[str], *, done: int = 812, failed: Mapping[str, int] | None = None, unfinished: bool = True
) -> Listing:
    """Return a listing in which the first model has the most tasks, and all failures are the first model's."""
    result = Listing(size=123_456)
    for number, model in enumerate(models):
        share = max(done // (number + 1), 1) if done else 0
        result.cells[model, "done"] = Cell(share, share * 3 * NANO // 2)
        result.cells[model, "failed"] = Cell(sum((failed or {}).values()) if number == 0 else 0)
        for status, count, age in (("pending", 2, 40 + number), ("running", 5, 150 + 60 * number)):
            oldest = int((NOW - age) * SECOND)
            result.cells[model, status] = Cell(count, 0, oldest) if unfinished else Cell()
    if models:
        result.failed = {(models[0], reason): count for reason, count in (failed or {}).items()}
    return result


def totals(models: Sequence[str], credits_used: float, failures: Mapping[str, int], days: float = 9) -> Totals:
    """Return counters since `days` ago, all of them the first model's."""
    model = models[0] if models else "unknown"
    series = {Key(model, "credits", ""): Total(int(credits_used * NANO), False, 1, True, None)}
    for reason, count in failures.items():
        series[Key(model, "failures", reason)] = Total(count, False, 1, True, None)
    return Totals(series, int((NOW - days * 86400) * SECOND), 5_000)


FAILED = {"quota_exceeded": 31, "content_blocked": 12, "overloaded": 9, "insufficient_credits": 3, "other": 1}
COUNTED = {"quota_exceeded": 412, "content_blocked": 97, "overloaded": 88, "insufficient_credits": 9, "timeout": 4}


def well(name: str = "marketing", models: Sequence[str] = MODELS, **changes: object) -> WorkspaceView:
    """Return a workspace that works."""
    view = WorkspaceView(
        name=name,
        up=True,
        listing=listing(models, failed=FAILED),
        finished_at=NOW - 12,
        duration=0.4,
        last_success=NOW - 12,
        clock_offset=0.3,
        totals=totals(models, 10_384.25, COUNTED),
        balance=15_048.0,
        balance_up=True,
        owners=OWNERS,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def down(name: str = "sales-emea", cause: str = "auth", **changes: object) -> WorkspaceView:
    """Return a workspace whose newest listing failed."""
    failed = well(name, up=False, listing=None, cause=cause, balance=None, balance_up=False, last_success=NOW - 4_000)
    return replace(failed, **changes)  # type: ignore[arg-type]


def first(name: str) -> WorkspaceView:
    """Return a workspace before its first listing."""
    return WorkspaceView(name=name, balance_up=False, owners=OWNERS)


def unsettled(view: WorkspaceView, tasks: int) -> WorkspaceView:
    """Return a workspace with tasks that left the list unfinished, and with records that could not be used."""
    assert view.listing is not None
    assert view.totals is not None
    return replace(view, totals=replace(view.totals, unsettled=tasks), listing=replace(view.listing, malformed=3))


_QUIET = listing(MODELS[:2], unfinished=False)
_MARKED = listing([MARKUP], failed={"other": 2})
_DOWN = replace(EXPORTER, ledger_up=False, reload_successful=False)
_FIVE = ["marketing-us", "product-video", "internal-experiments", "sales-apac"]

STATES: dict[str, tuple[Sequence[WorkspaceView], ExporterView]] = {
    "first": ([first("marketing"), first("sales")], EXPORTER),
    "well": ([well(), well("product-video", MODELS[:3])], EXPORTER),
    "one-down": ([*map(well, _FIVE), down()], EXPORTER),
    "all-down": ([down("marketing", "connection"), down("sales", "timeout")], EXPORTER),
    "ledger-down": ([well(totals=None), well("sales", MODELS[:2], totals=None)], _DOWN),
    "back-off": (
        [
            well(backoff={"remaining_credits": NOW + 100}, balance=None, balance_up=False),
            down("sales", "rate_limited", backoff={"text_generator": NOW + 25, "remaining_credits": NOW - 1}),
        ],
        EXPORTER,
    ),
    "clock-off": ([unsettled(well(clock_offset=-7_210.0), 7), well("sales", MODELS[:1])], EXPORTER),
    "stale": ([well(up=False, finished_at=NOW - 4_000)], EXPORTER),
    "no-failures": ([well(listing=_QUIET, totals=totals(MODELS, 12.5, {}, days=0.01))], EXPORTER),
    "no-models": ([well(listing=Listing(), totals=totals([], 0, {}), balance=0.0)], EXPORTER),
    "many": ([well(f"workspace-{n:02}", [f"model-{m:02}" for m in range(20)]) for n in range(20)], EXPORTER),
    "markup": (
        [
            well(MARKUP, [MARKUP], listing=_MARKED, owners={}),
            down("x" * 128, "payload"),
        ],
        replace(EXPORTER, version=MARKUP, revision=MARKUP),
    ),
}
