"""Listings on demand: one at a time per workspace, shared by the scrapes that wait, and answers in time."""

import asyncio
import math
import platform
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import structlog

from creatify_exporter import config as config_
from creatify_exporter.api import CAUSES, ApiError, Client
from creatify_exporter.config import Config
from creatify_exporter.database import LedgerError, LedgerMissingError
from creatify_exporter.draft import Draft
from creatify_exporter.ledger import Book, Ledger, Policy
from creatify_exporter.listing import Listing, ModelLabels
from creatify_exporter.metrics import ExporterView, WorkspaceView, render, render_process
from creatify_exporter.reasons import Classifier, Report
from creatify_exporter.tasks import OTHER, SECOND, TaskReader

_BACK_OFF = 30.0
_LONGEST_BACK_OFF = 300.0
_BALANCE_MOMENT = 0.1  # seconds
_MANY_UNKNOWN = 0.2
_SHARED_ANSWERS = 32

T = TypeVar("T")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall-clock seconds since the epoch, and monotonic seconds; tests bring their own."""

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic

    def microseconds(self) -> int:
        """Return the wall-clock time in microseconds since the epoch."""
        return int(self.now() * SECOND)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says about every workspace."""

    classify: Classifier
    policy: Policy
    balance: bool
    min_interval: float
    max_age: float

    @classmethod
    def of(cls, config: Config) -> "Settings":
        """Return the settings of `config`."""
        classify = Classifier([(rule.reason, rule.match) for rule in config.failure_reasons.rules])
        policy = Policy(
            reasons=classify.reasons,
            max_models=config.labels.max_models,
            count_existing=config.ledger.count_existing,
            retention=config.ledger.retention,
            zero_hold=config.exposition.zero_hold,
        )
        return cls(classify, policy, config.api.remaining_credits, config.listing.min_interval, config.listing.max_age)


class Tally:
    """The counters of one workspace that live as long as the process, whatever is reloaded; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._errors = Counter(dict.fromkeys(CAUSES, 0))

    def request(self, endpoint: str, code: str) -> None:
        """Count a request that was sent."""
        with self._lock:
            self._requests[endpoint, code] += 1

    def error(self, cause: str) -> None:
        """Count a failed listing."""
        with self._lock:
            self._errors[cause] += 1

    def requests(self) -> dict[tuple[str, str], int]:
        """Return the requests so far by endpoint and code."""
        with self._lock:
            return dict(self._requests)

    def errors(self) -> dict[str, int]:
        """Return the failed listings so far by cause."""
        with self._lock:
            return dict(self._errors)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a listing ended: `listing` is by label, and None when it failed with `error`. Times are seconds."""

    listing: Listing | None
    error: ApiError | None
    ledger_error: LedgerError | None
    finished: float
    finished_at: float
    duration: float


class Round:
    """A listing under way, and the look at the balance beside it; the futures belong to the event loop."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.looking: asyncio.Future[None] | None = None
        self.balance: float | None = None

    def end(self) -> None:
        """Release those who wait."""
        if not self.done.done():
            self.done.set_result(None)


class Workspace:
    """One workspace under one pair of credentials.

    Everything but `_list`, `_settle` and `_read_balance` runs in the event loop, and so needs no lock.
    """

    def __init__(
        self, name: str, client: Client, book: Book, tally: Tally, settings: Settings, clock: Clock, *, writes: bool
    ) -> None:
        self.name = name
        self.settings = settings
        self.newest: Outcome | None = None
        self._client = client
        self._book = book
        self._tally = tally
        self._clock = clock
        self._writes = writes
        self._retired = False
        self._round: Round | None = None
        self._last_success: float | None = None
        self._started = self._held_until = self._balance_held_until = -math.inf
        self._balance_running = False
        self._hinted = False

    def begin(self) -> Round | None:
        """Start a listing, or join the one under way; return None when there is nothing to wait for."""
        if self._retired:
            return None
        if self._round and not self._round.done.done():
            return self._round
        now = self._clock.monotonic()
        if now < self._held_until or now < self._started + self.settings.min_interval:
            if not self._book.due(self.settings.policy, self._clock.microseconds()):
                return None
            former, current = self._round, Round()
            current.balance = former.balance if former and now >= self._held_until else None
            self._round = current
            self._in_thread(lambda: self._settle(self.settings), lambda _: current.end())
            return current
        current = self._round = Round()
        self._started = now
        if self.settings.balance and now >= self._balance_held_until and not self._balance_running:
            self._balance_running = True
            looking = current.looking = asyncio.get_running_loop().create_future()

            def take_balance(balance: float | ApiError) -> None:
                self._balance_running = False
                looking.set_result(None)
                if isinstance(balance, float):
                    (self._round or current).balance = balance
                elif balance.retry_after is not None or balance.cause == "rate_limited":
                    self._balance_held_until = self._clock.monotonic() + _back_off(balance)

            self._in_thread(self._read_balance, take_balance)
        settings = self.settings

        def take_outcome(outcome: Outcome) -> None:
            if not self._retired:
                self._take(outcome)
            current.end()

        self._in_thread(lambda: self._list(settings), take_outcome)
        return current

    def view(self, waited_for: Round | None) -> WorkspaceView:
        """Return what an answer says now; `waited_for` is the listing that its request waited for."""
        newest = self.newest
        held = self._clock.monotonic() < self._held_until
        current = waited_for or (None if held else self._round)
        return WorkspaceView(
            name=self.name,
            up=self.up,
            listing=newest.listing if newest else None,
            totals=self._book.totals,
            balance=current.balance if current else None,
            last_success=self._last_success,
            duration=newest.duration if newest else None,
            errors=self._tally.errors(),
            requests=self._tally.requests(),
        )

    def answered(self, view: WorkspaceView) -> None:
        """Take note that an answer carries the series of `view`."""
        if view.totals is not None:
            self._book.answered(view.totals, self._clock.microseconds())

    @property
    def up(self) -> bool:
        """Whether the newest finished listing succeeded and is not too old."""
        newest = self.newest
        return (
            newest is not None
            and newest.listing is not None
            and self._clock.monotonic() - newest.finished <= self.settings.max_age
        )

    def state(self) -> "WorkspaceState":
        """Return how the workspace is doing."""
        newest = self.newest
        if newest is None:
            return WorkspaceState(self.name, None, None, None)
        cause = newest.error.cause if newest.error else None
        return WorkspaceState(self.name, self.up, self._clock.monotonic() - newest.finished, cause)

    def retire(self) -> None:
        """Break off what is running, release those who wait for it, and discard its result, for good."""
        self._retired = True
        if self._round:
            self._round.end()
        self._client.abort()
        self._client.close()

    def _take(self, outcome: Outcome) -> None:
        """Make `outcome` the newest one, count what went wrong, and log what changed."""
        former, self.newest = self.newest, outcome
        error = outcome.error
        if error is not None:
            self._tally.error(error.cause)
            if error.cause == "rate_limited" or (error.status == 503 and error.retry_after is not None):
                self._held_until = self._balance_held_until = outcome.finished + _back_off(error)
            _log.warning(
                "listing failed", workspace=self.name, cause=error.cause, status=error.status, error=str(error)
            )
        else:
            self._last_success = outcome.finished_at
            if former and former.error:
                _log.info("listing works again", workspace=self.name)
            if outcome.ledger_error:
                self._tally.error("ledger")
        if outcome.ledger_error and not (former and former.ledger_error):
            _log.error("the ledger cannot record", workspace=self.name, error=str(outcome.ledger_error))
        elif former and former.ledger_error and not outcome.ledger_error:
            _log.info("the ledger records again", workspace=self.name)
        if outcome.listing and not self._hinted:
            failed = outcome.listing.failed
            unknown = sum(count for (_, reason), count in failed.items() if reason == OTHER)
            if unknown > _MANY_UNKNOWN * sum(failed.values()):
                self._hinted = True
                _log.info(
                    "many failures have no known reason: --reasons shows examples to write rules from",
                    workspace=self.name,
                    share=round(unknown / sum(failed.values()), 2),
                )

    def _list(self, settings: Settings) -> Outcome:
        started = self._clock.monotonic()
        listing = Listing()
        error = ledger_error = draft = None
        try:
            draft = self._book.draft()
            read = TaskReader(settings.classify, draft.known.slots)
            stream = self._client.tasks()
            for batch in stream:
                tasks = read(batch)
                listing.malformed += len(batch) - len(tasks)
                listing.add(draft.add(tasks))
            listing.size = stream.size
        except ApiError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001 - whatever an answer sets off in our code fails its workspace only
            error = ApiError("payload", f"the list could not be read ({type(failure).__name__})")
        finished, finished_at = self._clock.monotonic(), self._clock.now()
        if not self._retired:
            ledger_error = self._record(None if error else draft, listing, settings)
        known = self._book.totals.models if self._book.totals else ()
        labelled = None if error else listing.labelled(ModelLabels(known, settings.policy.max_models))
        return Outcome(labelled, error, ledger_error, finished, finished_at, finished - started)

    def _record(self, draft: Draft | None, listing: Listing, settings: Settings) -> LedgerError | None:
        try:
            if self._writes:
                self._book.commit(draft, listing.models, settings.policy, self._clock.microseconds())
            else:
                self._book.read()
        except LedgerMissingError:
            return None  # only a reader meets this, and it shows the ledger if there is one
        except LedgerError as error:
            return error
        except Exception as error:  # noqa: BLE001 - or nobody would ever end the round
            return LedgerError(f"the listing could not be recorded ({type(error).__name__})")
        return None

    def _settle(self, settings: Settings) -> None:
        if error := self._record(None, Listing(), settings):
            _log.debug("the ledger cannot settle", workspace=self.name, error=str(error))

    def _read_balance(self) -> float | ApiError:
        try:
            return self._client.remaining_credits()
        except ApiError as error:
            _log.debug("balance not read", workspace=self.name, cause=error.cause, status=error.status)
            return error
        except Exception as failure:  # noqa: BLE001 - as with the list
            _log.debug("balance not read", workspace=self.name, error=type(failure).__name__)
            return ApiError("payload", "the balance could not be read")

    def _in_thread(self, work: Callable[[], T], take: Callable[[T], None]) -> None:
        """Run `work` in a thread of its own, and `take` its result in the event loop."""
        loop = asyncio.get_running_loop()

        def run() -> None:
            result = work()
            with suppress(RuntimeError):  # the process stopped meanwhile
                loop.call_soon_threadsafe(take, result)

        # Not a pool: a thread that hangs in the look-up of a name must block neither the others nor the end.
        threading.Thread(target=run, name=f"listing {self.name}", daemon=True).start()


def _back_off(error: ApiError) -> float:
    return min(_BACK_OFF if error.retry_after is None else error.retry_after, _LONGEST_BACK_OFF)


@dataclass(frozen=True, slots=True)
class WorkspaceState:
    """How a workspace is doing: `up` is None before the first listing ended, `age` the seconds since the newest did."""

    name: str
    up: bool | None
    age: float | None
    cause: str | None


class Exporter:
    """All workspaces, and the answers made of them; lives in the event loop."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        *,
        version: str,
        revision: str,
        clock: Clock | None = None,
        writes: bool = True,
    ) -> None:
        self._ledger = ledger
        self._clock = clock or Clock()
        self._writes = writes
        self._build = (version, revision, platform.python_version())
        self._workspaces: dict[str, Workspace] = {}
        self._clients: dict[str, dict[str, Any]] = {}
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self._answers: dict[tuple[frozenset[str] | None, bool], tuple[object, asyncio.Task[bytes]]] = {}
        self._asking: threading.Thread | None = None
        self._whole: tuple[object, bytes] = (None, b"")
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Put `config` in force: workspaces whose credentials and API stay the same go on as they are."""
        self._reloaded_at = self._clock.now()
        self._reload_successful = True
        settings = Settings.of(config)
        former, self._workspaces = self._workspaces, {}
        for one in config.workspaces:
            access = _access(config, one)
            if one.name in former and self._clients[one.name] == access:
                workspace = former.pop(one.name)
                workspace.settings = settings
            else:
                tally, book = self._tallies[one.name], self._ledger.book(one.name)
                client = Client(**access, on_request=tally.request)
                workspace = Workspace(one.name, client, book, tally, settings, self._clock, writes=self._writes)
            self._workspaces[one.name] = workspace
            self._clients[one.name] = access
        for workspace in former.values():
            workspace.retire()

    def reload_failed(self) -> None:
        """Take note that a new configuration was refused; the one in force stays."""
        self._reload_successful = False

    async def scrape(
        self, names: frozenset[str] | None, timeout: float, openmetrics: bool, *, seen: bool = True
    ) -> bytes:
        """Return the exposition of the workspaces `names` (None: of everything) within `timeout` seconds.

        Starts a listing of each, or joins the one under way. What is not done in time is answered with what the
        newest finished listing gave. Unless it will be `seen`, an answer is nobody's first one.
        """
        chosen = [one for one in self._workspaces.values() if names is None or one.name in names]
        rounds = [one.begin() for one in chosen]
        latest = asyncio.get_running_loop().time() + timeout
        if waits := [one.done for one in rounds if one]:
            await asyncio.wait(waits, timeout=timeout)
        # A short listing is often done a moment before the balance; without this moment that would come and go.
        if late := [one.looking for one in rounds if one and one.looking and one.done.done()]:
            moment = min(_BALANCE_MOMENT, latest - asyncio.get_running_loop().time())
            await asyncio.wait(late, timeout=max(moment, 0))
        views = [one.view(waited_for) for one, waited_for in zip(chosen, rounds, strict=True)]
        for one, view in zip(chosen, views, strict=True):
            if seen:
                one.answered(view)
        exporter = None
        if names is None:
            exporter = ExporterView(self._ledger.up, self._reload_successful, self._reloaded_at, *self._build)
        # Scrapes that get the same answer share one rendering.
        contents = (views, exporter)
        before, answer = self._answers.get((names, openmetrics), (None, None))
        if answer is None or before != contents:
            if len(self._answers) >= _SHARED_ANSWERS:
                self._answers.clear()
            answer = asyncio.create_task(asyncio.to_thread(render, views, exporter, openmetrics=openmetrics))
            self._answers[names, openmetrics] = contents, answer
        exposition = await asyncio.shield(answer)
        return exposition if names is not None else self._with_process(exposition, openmetrics)

    def _with_process(self, exposition: bytes, openmetrics: bool) -> bytes:
        """Add the process metrics; the answers of one second share the whole."""
        made_of = exposition, openmetrics, int(self._clock.monotonic())
        if self._whole[0] != made_of:
            self._whole = made_of, exposition.removesuffix(b"# EOF\n") + render_process(openmetrics=openmetrics)
        return self._whole[1]

    def workspaces(self) -> list[WorkspaceState]:
        """Return how each workspace is doing, in the order of the configuration."""
        return [one.state() for one in self._workspaces.values()]

    def ready(self) -> bool:
        """Return whether the ledger answered last time; when not, ask it again for the next time."""
        if not self._ledger.up and not (self._asking and self._asking.is_alive()):
            self._asking = threading.Thread(target=self._ledger.ping, name="ledger", daemon=True)
            self._asking.start()
        return self._ledger.up

    def stop(self) -> None:
        """Let the waiting scrapes have what is there, and break off the listings."""
        for workspace in self._workspaces.values():
            workspace.retire()


def reasons_report(config: Config) -> tuple[str, bool]:
    """List every workspace once; return the table of the failure reasons, and whether all could be listed."""
    classify = Settings.of(config).classify
    report, complete = Report(classify), True
    for one in config.workspaces:
        read, seen = TaskReader(classify), set()
        client = Client(**_access(config, one), on_request=lambda _endpoint, _code: None)
        try:
            for record in chain.from_iterable(client.tasks()):
                for task in read([record]):
                    if record and task.status == "failed" and task.id not in seen:
                        report.add(record.failed_reason)
                    seen.add(task.id)
        except ApiError as error:
            complete = False
            _log.error("listing failed", workspace=one.name, cause=error.cause, status=error.status, error=str(error))
    return report.render(), complete


def _access(config: Config, workspace: config_.Workspace) -> dict[str, Any]:
    return {
        "api_id": workspace.api_id.get_secret_value(),
        "api_key": workspace.api_key.get_secret_value(),
        "base_url": config.api.base_url,
        "timeout": config.api.timeout,
        "max_response_size": config.api.max_response_size,
        "ca_file": str(config.api.ca_file) if config.api.ca_file else None,
    }
