"""One attempt to list a workspace, in a thread of its own: body, tasks, draft, ledger."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass

from creatify_exporter.api import ApiError, Client, TaskStream, as_api_error
from creatify_exporter.config import Config
from creatify_exporter.database import LedgerError, LedgerMissingError
from creatify_exporter.draft import Draft
from creatify_exporter.ledger import Book, Policy
from creatify_exporter.listing import Listing, ModelLabels
from creatify_exporter.reasons import Classifier
from creatify_exporter.tasks import SECOND, TaskReader


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall-clock seconds since the epoch, and monotonic seconds; tests bring their own."""

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic

    def microseconds(self) -> int:
        """Return the wall-clock time in microseconds since the epoch."""
        return int(self.now() * SECOND)


@dataclass
class Attempt:
    """List a workspace once and record it; `still` says whether the result is still wanted.

    Afterwards `listing` is by label, and None when it failed with `error`. `refusal` is the answer that ended the
    asking by id before its time. `clock_offset` is this machine's clock minus the API's; `ignored_credits` counts the
    tasks whose `credits_used` was no usable number. Times are seconds.
    """

    client: Client
    book: Book
    config: Config
    classify: Classifier
    clock: Clock
    still: Callable[[], bool]
    listing: Listing | None = None
    error: ApiError | None = None
    ledger_error: LedgerError | None = None
    refusal: ApiError | None = None
    finished: float = 0
    finished_at: float = 0
    duration: float = 0
    date: int | None = None  # of the API, microseconds
    clock_offset: float | None = None
    ignored_credits: int = 0

    def __post_init__(self) -> None:
        self._started = self.clock.monotonic()

    def run(self, *, writes: bool = True, settles: bool = True) -> None:
        """List, ask for tasks that left the list if `settles`, and record if `writes`.

        An error of ours fails this workspace and nothing else.
        """
        draft, read, listing = None, TaskReader(self.classify), Listing()
        try:
            draft = self.book.draft()
            read = TaskReader(self.classify, draft.known.slots)
            with closing(self.client.tasks()) as stream:
                self._list(stream, draft, read, listing)
                self._end()
                if writes and settles:
                    self._settle(stream, draft, read)
        except Exception as failure:  # noqa: BLE001 - whatever an answer sets off in our code fails its workspace only
            self.fail(failure)
        self.ignored_credits = read.ignored_credits
        if self.still() and writes:
            self.record(None if self.error else draft, listing.models)
        elif self.still():
            self._on_ledger(self.book.read)
        known = self.book.totals.models if self.book.totals else ()
        self.listing = None if self.error else listing.labelled(ModelLabels(known, self.config.labels.max_models))

    def fail(self, failure: Exception) -> None:
        """Make `failure` the outcome."""
        self.error, self.listing = as_api_error(failure, "the list"), None
        self._end()

    def record(self, draft: Draft | None = None, models: Iterable[str] = ()) -> None:
        """Commit a draft with its `models`, or without one what is due."""
        how, now = policy(self.config, self.classify), self.clock.microseconds()
        self._on_ledger(lambda: self.book.commit(draft, models, how, now, self.date, still=self.still))

    def _on_ledger(self, work: Callable[[], None]) -> None:
        try:
            work()
        except LedgerMissingError:
            pass  # only a reader meets this, and it shows the ledger if there is one
        except LedgerError as error:
            self.ledger_error = error
        except Exception as error:  # noqa: BLE001 - or nobody would ever end the round
            self.ledger_error = LedgerError(f"the listing could not be recorded ({type(error).__name__})")

    def _list(self, stream: TaskStream, draft: Draft, read: TaskReader, listing: Listing) -> None:
        """Read the whole list into the listing and the draft."""
        for batch in stream:
            self._compare_clocks(stream.date)
            tasks = read(batch)
            listing.malformed += len(batch) - len(tasks)
            listing.add(draft.add(tasks))
        self._compare_clocks(stream.date)
        listing.size = stream.size

    def _compare_clocks(self, date: float | None) -> None:
        """Take the API's time of the answer, the first time that it is known."""
        if self.date is None and date is not None:
            self.date = int(date * SECOND)
            self.clock_offset = self.clock.now() - date

    def _end(self) -> None:
        self.finished, self.finished_at = self.clock.monotonic(), self.clock.now()
        self.duration = self.finished - self._started

    def _settle(self, stream: TaskStream, draft: Draft, read: TaskReader) -> None:
        """Ask for the unfinished tasks that left the list, each by its id, until one is refused."""
        for task_id in draft.missing(self.config.listing.settle, self.clock.microseconds(), self.date):
            if not self.still():
                return
            try:
                record = stream.task(task_id)
            except ApiError as error:
                draft.postpone(task_id)
                if error.cause in ("auth", "rate_limited", "timeout") or error.retry_after is not None:
                    self.refusal = error
                    return
                continue
            if record is None:
                draft.gone(task_id)
            elif tasks := read([record]):
                draft.settle(tasks[0])
            else:
                draft.postpone(task_id)


def policy(config: Config, classify: Classifier) -> Policy:
    """Return how the ledger counts under `config`."""
    return Policy(
        reasons=classify.reasons,
        max_models=config.labels.max_models,
        count_existing=config.ledger.count_existing,
        retention=config.ledger.retention,
        zero_hold=config.exposition.zero_hold,
    )
