"""One workspace: a listing at a time, shared by the scrapes that wait for it, its freshness, and back-off."""

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import structlog

from creatify_exporter.api import CAUSES, ApiError, Client, as_api_error
from creatify_exporter.attempt import Attempt, Clock, policy
from creatify_exporter.config import Config
from creatify_exporter.ledger import Book
from creatify_exporter.listing import Listing
from creatify_exporter.metrics import WorkspaceView
from creatify_exporter.reasons import Classifier
from creatify_exporter.tasks import OTHER

LIST, TASK, BALANCE = "text_generator", "text_generator_task", "remaining_credits"
"""The kinds of requests, as the label `endpoint` names them."""

_BACK_OFF = 30.0
_LONGEST_BACK_OFF = 300.0
_MANY_FAILURES = 20
_MANY_UNKNOWN = 0.2
_WRONG_CLOCK = 300.0

T = TypeVar("T")
_log = structlog.get_logger(__name__)


class Tally:
    """The counters of one workspace that live as long as the process, whatever is reloaded."""

    def __init__(self) -> None:
        self.errors = Counter(dict.fromkeys(CAUSES, 0))
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()

    def request(self, endpoint: str, code: str) -> None:
        """Count a request that was sent; for any thread."""
        with self._lock:
            self._requests[endpoint, code] += 1

    def requests(self) -> dict[tuple[str, str], int]:
        """Return the requests so far by endpoint and code."""
        with self._lock:
            return dict(self._requests)


class BackOff:
    """Until when requests of each kind are held back, because the API asked for it."""

    def __init__(self, workspace: str, clock: Clock) -> None:
        self._workspace = workspace
        self._clock = clock
        self._until: dict[str, tuple[float, float]] = {}

    def take(self, error: ApiError, endpoints: Iterable[str]) -> None:
        """Hold back requests to `endpoints` if `error` asks for it: 429, or 503 with Retry-After (section 3)."""
        if error.cause != "rate_limited" and (error.status != 503 or error.retry_after is None):
            return
        seconds = min(_BACK_OFF if error.retry_after is None else error.retry_after, _LONGEST_BACK_OFF)
        if seconds > 0:
            _log.warning(
                "backing off", workspace=self._workspace, endpoints=",".join(endpoints), seconds=round(seconds, 1)
            )
        for endpoint in endpoints:
            self._until[endpoint] = self._clock.monotonic() + seconds, self._clock.now() + seconds

    def holds(self, endpoint: str) -> bool:
        """Tell whether requests to `endpoint` are held back now."""
        return self._clock.monotonic() < self._until.get(endpoint, (-math.inf,))[0]

    def until(self) -> dict[str, float]:
        """Return until when, in seconds since the epoch, by endpoint; only those held back now."""
        return {endpoint: until for endpoint, (_, until) in self._until.items() if self.holds(endpoint)}


@dataclass(eq=False)
class Round:
    """A listing under way, and the reading of the balance if one began beside it."""

    listing: asyncio.Task[None]
    balance_read: asyncio.Task[None] | None = None
    balance: float | None = None


class Workspace:
    """One workspace under one pair of credentials; lives in the event loop, and so needs no lock."""

    def __init__(self, name: str, client: Client, book: Book, tally: Tally, clock: Clock, *, writes: bool) -> None:
        self.name = name
        self.client = client
        self._book = book
        self._tally = tally
        self._clock = clock
        self._writes = writes
        self._back_off = BackOff(name, clock)
        self._newest: Attempt | None = None
        self._round: Round | None = None
        self._last_success: float | None = None
        self._started = -math.inf
        self._balance_read: asyncio.Task[None] | None = None
        self._balance_up = False
        self._wrong: dict[str, bool] = {}

    def configure(self, config: Config, classify: Classifier) -> None:
        """Take a new configuration; a listing under way goes on under the former one."""
        self._config = config
        self._classify = classify

    def begin(self) -> Round | None:
        """Start a listing, or join the one under way; return None when there is nothing to wait for."""
        if self._retired:
            return None
        if self._round and not self._round.listing.done():
            return self._round
        if (
            not self._back_off.holds(LIST)
            and self._clock.monotonic() >= self._started + self._config.listing.min_interval
        ):
            self._started = self._clock.monotonic()
            self._round = Round(asyncio.create_task(self._list()))
            self._round.balance_read = self._begin_to_read_balance(self._round)
            return self._round
        if self._book.due(policy(self._config, self._classify), self._clock.microseconds()):
            balance = self._round.balance if self._round else None
            self._round = Round(asyncio.create_task(self._show_what_is_due()), None, balance)
            return self._round
        return None

    def view(self, waited_for: Round | None = None) -> WorkspaceView:
        """Return what an answer says now; `waited_for` is the listing that its request waited for."""
        newest = self._newest
        current = waited_for or self._round
        return WorkspaceView(
            name=self.name,
            up=self._up,
            listing=newest.listing if newest else None,
            cause=newest.error.cause if newest and newest.error else None,
            finished_at=newest.finished_at if newest else None,
            duration=newest.duration if newest else None,
            last_success=self._last_success,
            clock_offset=newest.clock_offset if newest else None,
            totals=self._book.totals,
            balance=current.balance if current else None,
            balance_up=self._balance_up if self._config.api.remaining_credits else None,
            errors=dict(self._tally.errors),
            requests=self._tally.requests(),
            backoff=self._back_off.until(),
            owners=self._classify.owners,
        )

    def answered(self, view: WorkspaceView) -> None:
        """Take note that an answer carries the series of `view`."""
        if view.totals is not None:
            self._book.answered(view.totals, self._clock.microseconds())

    def retire(self) -> None:
        """Break off what is running, release those who wait for it, and discard its result, for good."""
        self.client.given_up.set()
        for task in (self._round and self._round.listing, self._balance_read):
            if task:
                task.cancel()

    @property
    def _retired(self) -> bool:
        return self.client.given_up.is_set()

    @property
    def _up(self) -> bool:
        """Whether the newest finished listing succeeded and is not too old."""
        newest = self._newest
        if newest is None or newest.error is not None:
            return False
        return self._clock.monotonic() - newest.finished <= self._config.listing.max_age

    def _attempt(self) -> Attempt:
        return Attempt(
            self.client, self._book, self._config, self._classify, self._clock, still=lambda: not self._retired
        )

    async def _list(self) -> None:
        attempt, settles = self._attempt(), not self._back_off.holds(TASK)
        try:
            await self._in_thread(lambda: attempt.run(writes=self._writes, settles=settles))
        except Exception as failure:  # noqa: BLE001 - no thread can be started, for example
            attempt.fail(failure)
        self._take(attempt)

    async def _show_what_is_due(self) -> None:
        """Have the ledger show the series whose time has come, although no listing may start."""
        attempt = self._attempt()
        await self._in_thread(attempt.record)
        if attempt.ledger_error:
            _log.debug("the ledger cannot show what is due", workspace=self.name, error=str(attempt.ledger_error))

    def _begin_to_read_balance(self, current: Round) -> asyncio.Task[None] | None:
        running = self._balance_read and not self._balance_read.done()
        if running or not self._config.api.remaining_credits or self._back_off.holds(BALANCE):
            return None
        self._balance_read = asyncio.create_task(self._read_balance(current))
        return self._balance_read

    async def _read_balance(self, current: Round) -> None:
        error = None
        try:
            balance = await self._in_thread(self.client.remaining_credits)
            # A round that only shows what is due, while the API asks to wait, has no balance of its own.
            shown = current if self._back_off.holds(LIST) else self._round or current
            shown.balance = balance
        except Exception as failure:  # noqa: BLE001 - a mistake of ours takes the balance alone
            error = as_api_error(failure, "the balance")
            self._back_off.take(error, [BALANCE])
        self._balance_up = not error
        details = {"cause": error.cause, "error": str(error)} if error else {}
        self._tell(bool(error), _log.warning, "balance not read", "balance read again", **details)

    def _take(self, attempt: Attempt) -> None:
        """Make `attempt` the newest one, and count and log what changed."""
        former, self._newest = self._newest, attempt
        error, ledger_error = attempt.error, attempt.ledger_error
        if error:
            self._tally.errors[error.cause] += 1
            _log.warning(
                "listing failed", workspace=self.name, cause=error.cause, status=error.status, error=str(error)
            )
            self._back_off.take(error, [LIST, BALANCE])
            if self._back_off.holds(LIST):
                self._round = None  # later answers must not show its balance
        else:
            self._last_success = attempt.finished_at
            if former and former.error:
                _log.info("listing works again", workspace=self.name)
            self._tally.errors["ledger"] += bool(ledger_error)
        if attempt.refusal:
            self._back_off.take(attempt.refusal, [TASK])
        self._tell(
            bool(ledger_error),
            _log.error,
            "the ledger cannot record",
            "the ledger records again",
            error=str(ledger_error),
        )
        if (offset := attempt.clock_offset) is not None:
            self._tell(
                abs(offset) > _WRONG_CLOCK,
                _log.warning,
                "this machine's clock is wrong",
                "this machine's clock is right again",
                offset_seconds=round(offset),
            )
        if attempt.listing:
            self._hint(attempt.listing, attempt.ignored_credits)

    def _hint(self, listing: Listing, ignored_credits: int) -> None:
        """Say once what the user should know of the tasks themselves."""
        if ignored_credits:
            text = "credits_used was ignored: negative, above the limit or no number"
            self._tell(True, _log.warning, text, tasks=ignored_credits)
        failures = sum(listing.failed.values())
        unknown = sum(count for (_, reason), count in listing.failed.items() if reason == OTHER)
        if failures >= _MANY_FAILURES and unknown > _MANY_UNKNOWN * failures:
            text = "many failures have no known reason: --reasons shows examples to write rules from"
            self._tell(True, _log.info, text, share=round(unknown / failures, 2))

    def _tell(
        self, wrong: bool, log: Callable[..., object], problem: str, recovery: str = "", **details: object
    ) -> None:
        """Log `problem` once when something goes wrong, and `recovery` once when it is right again."""
        if wrong != self._wrong.get(problem, False):
            self._wrong[problem] = wrong
            if wrong:
                log(problem, workspace=self.name, **details)
            else:
                _log.info(recovery, workspace=self.name)

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run `work` in a thread of its own."""
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()

        def run() -> None:
            try:
                done.set_result(work())
            except Exception as error:  # noqa: BLE001 - who waits for it deals with it
                done.set_exception(error)

        # Not a pool: a thread that hangs must block neither the others nor the end of the process.
        threading.Thread(target=run, name=f"listing {self.name}", daemon=True).start()
        return asyncio.wrap_future(done)
