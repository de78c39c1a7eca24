"""One attempt to list a workspace, in a thread of its own: body, tasks, draft, ledger."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from creatify_exporter.api import ApiError, Client
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a listing ended: `listing` is by label, and None when it failed with `error`.

    `refusal` is the answer that ended the asking by id before its time. `clock_offset` is this machine's clock minus
    the API's; `ignored_credits` counts the tasks whose `credits_used` was no usable number. Times are seconds.
    """

    listing: Listing | None
    error: ApiError | None
    ledger_error: LedgerError | None
    refusal: ApiError | None
    finished: float
    finished_at: float
    duration: float
    clock_offset: float | None
    ignored_credits: int


class Attempt:
    """List a workspace once and record it; `still` says whether the result is still wanted."""

    def __init__(
        self, client: Client, book: Book, config: Config, classify: Classifier, clock: Clock, still: Callable[[], bool]
    ) -> None:
        self._client = client
        self._book = book
        self._settle_at_most = config.listing.settle
        self._policy = policy(config, classify)
        self._clock = clock
        self._still = still
        self._classify = classify
        self._listing = Listing()
        self._date: int | None = None  # of the API, microseconds
        self._clock_offset: float | None = None

    def run(self, *, writes: bool = True, settles: bool = True) -> Outcome:
        """List, ask for tasks that left the list if `settles`, record if `writes`, and say how it ended.

        An error of ours fails this workspace and nothing else.
        """
        started = self._clock.monotonic()
        draft = refusal = error = None
        read = TaskReader(self._classify)
        try:
            draft = self._book.draft()
            read = TaskReader(self._classify, draft.known.slots)
            self._list(draft, read)
        except ApiError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001 - whatever an answer sets off in our code fails its workspace only
            error = ApiError("payload", f"the list could not be read ({type(failure).__name__})")
        finished, finished_at = self._clock.monotonic(), self._clock.now()
        if draft and not error and writes and settles:
            refusal = self._settle(draft, read)
        self._client.close()
        ledger_error = None
        if self._still():
            ledger_error = self.record(None if error else draft) if writes else _attempted(self._book.read)
        known = self._book.totals.models if self._book.totals else ()
        labelled = None if error else self._listing.labelled(ModelLabels(known, self._policy.max_models))
        return Outcome(
            labelled,
            error,
            ledger_error,
            refusal,
            finished,
            finished_at,
            finished - started,
            self._clock_offset,
            read.ignored_credits,
        )

    def record(self, draft: Draft | None = None) -> LedgerError | None:
        """Commit a draft, or without one what is due; return what went wrong."""
        models, now = self._listing.models, self._clock.microseconds()
        return _attempted(lambda: self._book.commit(draft, models, self._policy, now, self._date, still=self._still))

    def _list(self, draft: Draft, read: TaskReader) -> None:
        """Read the whole list into the listing and the draft."""
        listing, stream = self._listing, self._client.tasks()
        for batch in stream:
            self._compare_clocks(stream.date)
            tasks = read(batch)
            listing.malformed += len(batch) - len(tasks)
            listing.add(draft.add(tasks))
        self._compare_clocks(stream.date)
        listing.size = stream.size

    def _compare_clocks(self, date: float | None) -> None:
        """Take the API's time of the answer, the first time that it is known."""
        if self._date is None and date is not None:
            self._date = int(date * SECOND)
            self._clock_offset = self._clock.now() - date

    def _settle(self, draft: Draft, read: TaskReader) -> ApiError | None:
        """Ask for the unfinished tasks that left the list, each by its id; return the refusal that ended it."""
        for task_id in draft.missing(self._settle_at_most, self._clock.microseconds(), self._date):
            if not self._still():
                return None
            try:
                record = self._client.task(task_id)
            except ApiError as error:
                draft.postpone(task_id)
                if error.cause in ("auth", "rate_limited", "timeout") or error.retry_after is not None:
                    return error
                continue
            if record is None:
                draft.gone(task_id)
            elif tasks := read([record]):
                draft.settle(tasks[0])
            else:
                draft.postpone(task_id)
        return None


def policy(config: Config, classify: Classifier) -> Policy:
    """Return how the ledger counts under `config`."""
    return Policy(
        reasons=classify.reasons,
        max_models=config.labels.max_models,
        count_existing=config.ledger.count_existing,
        retention=config.ledger.retention,
        zero_hold=config.exposition.zero_hold,
    )


def _attempted(work: Callable[[], None]) -> LedgerError | None:
    try:
        work()
    except LedgerMissingError:
        return None  # only a reader meets this, and it shows the ledger if there is one
    except LedgerError as error:
        return error
    except Exception as error:  # noqa: BLE001 - or nobody would ever end the round
        return LedgerError(f"the listing could not be recorded ({type(error).__name__})")
    return None
