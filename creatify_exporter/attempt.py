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
    """How a listing ended: `listing` is by label, and None when it failed with `error`. Times are seconds."""

    listing: Listing | None
    error: ApiError | None
    ledger_error: LedgerError | None
    finished: float
    finished_at: float
    duration: float


class Attempt:
    """List a workspace once and record it.

    `still` says whether the result is still wanted; when not, nothing is recorded.
    """

    def __init__(
        self, client: Client, book: Book, config: Config, classify: Classifier, clock: Clock, still: Callable[[], bool]
    ) -> None:
        self._client = client
        self._book = book
        self._config = config
        self._policy = policy(config, classify)
        self._classify = classify
        self._clock = clock
        self._still = still

    def run(self, *, writes: bool) -> Outcome:
        """List, record if `writes`, and say how it ended; an error of ours fails this workspace only."""
        started = self._clock.monotonic()
        listing, draft, error = Listing(), None, None
        try:
            draft = self._book.draft()
            self._read(draft, listing)
        except ApiError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001 - whatever an answer sets off in our code fails its workspace only
            error = ApiError("payload", f"the list could not be read ({type(failure).__name__})")
        finally:
            self._client.close()
        finished, finished_at = self._clock.monotonic(), self._clock.now()
        ledger_error = None
        if self._still():
            ledger_error = self.record(None if error else draft, listing) if writes else self._look_up()
        known = self._book.totals.models if self._book.totals else ()
        labelled = None if error else listing.labelled(ModelLabels(known, self._policy.max_models))
        return Outcome(labelled, error, ledger_error, finished, finished_at, finished - started)

    def record(self, draft: Draft | None, listing: Listing) -> LedgerError | None:
        """Commit a draft, or without one what is due; return what went wrong."""
        return _attempted(lambda: self._book.commit(draft, listing.models, self._policy, self._clock.microseconds()))

    def _look_up(self) -> LedgerError | None:
        return _attempted(self._book.read)

    def _read(self, draft: Draft, listing: Listing) -> None:
        read = TaskReader(self._classify, draft.known.slots)
        stream = self._client.tasks()
        for batch in stream:
            tasks = read(batch)
            listing.malformed += len(batch) - len(tasks)
            listing.add(draft.add(tasks))
        listing.size = stream.size


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
