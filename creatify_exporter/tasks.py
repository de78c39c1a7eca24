"""Tasks of the text generator, and how one JSON record becomes one."""

import re
from collections.abc import Callable, Container, Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

import msgspec

UNFINISHED = ("pending", "running")
FINISHED = ("done", "failed")
STATUSES = (*UNFINISHED, *FINISHED)
UNKNOWN = "unknown"
OTHER = "other"

SECOND = 1_000_000
HOUR = 3600 * SECOND
"""Times are whole microseconds since the epoch."""

NANO = 1_000_000_000
"""Credits are kept as whole billionths, so that sums are exact."""

MAX_CREDITS = 1_000_000
MAX_MODEL_LENGTH = 128

_REMEMBERED = 1000

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DECIMAL = re.compile(r"[0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40}")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# With or without an offset; fromisoformat takes weeks, bare dates and more for time stamps too.
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})?"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Record(msgspec.Struct, gc=False):
    """The fields of one listed record that the exporter reads, as they came.

    Every value may be any JSON value: what is odd is mapped in `task_of`, not refused by the decoder.
    """

    id: Any = None
    model_name: Any = None
    status: Any = None
    failed_reason: Any = None
    credits_used: Any = None
    created_at: Any = None
    updated_at: Any = None


class Task(msgspec.Struct, gc=False):
    """One listed task: clean values, but for the time stamps, which are read when somebody asks.

    `reason` is None unless the task failed. `credits` are billionths, 0 when unknown. Most tasks of a listing are
    known and their time stamps are not needed; to parse them all would be a third of the work.
    """

    id: str
    model: str
    status: str
    reason: str | None
    credits: int
    created_at: Any
    updated_at: Any

    def created(self) -> int | None:
        """Return when the task was created, in microseconds since the epoch, or None when unknown."""
        return microseconds(self.created_at)

    def times(self) -> tuple[int | None, int | None]:
        """Return `created`, and `updated_at - created_at` in microseconds, None when unknown or negative."""
        created, updated = microseconds(self.created_at), microseconds(self.updated_at)
        if created is None or updated is None or updated < created:
            return created, None
        return created, updated - created


class TaskReader:
    """Turn records into tasks.

    The ids in `known` are usable, so they are not looked at again. `ignored_credits` is the number of tasks so far
    whose `credits_used` could not be used.
    """

    def __init__(self, classify: Callable[[object], str], known: Container[str] = ()) -> None:
        self.ignored_credits = 0
        self._classify = classify
        self._known = known

    def __call__(self, records: Iterable[Record | None]) -> list[Task]:
        """Return the tasks of `records`, but for those whose id is not 1 to 64 characters of `A-Za-z0-9_-`."""
        known = self._known
        return [
            self._task(record)
            for record in records
            if record is not None and type(record.id) is str and (record.id in known or _ID.fullmatch(record.id))
        ]

    def _task(self, record: Record) -> Task:
        status, name, used = record.status, record.model_name, record.credits_used
        if type(status) is not str or status not in STATUSES:
            status = UNKNOWN
        # Most records repeat models and credits. Hostile names may be many and long: what is remembered stays small.
        short = type(name) is str and len(name) <= MAX_MODEL_LENGTH
        nano = _remembered_credits(used) if type(used) is float else nanocredits(used)
        if nano is None:
            self.ignored_credits += used is not None and used != ""
        return Task(
            record.id,
            _remembered_model(name) if short else model_of(name),
            status,
            self._classify(record.failed_reason) if status == "failed" else None,
            nano or 0,
            record.created_at,
            record.updated_at,
        )


def model_of(name: object) -> str:
    """Return the `model` label for a `model_name`: trimmed, printable, at most 128 characters."""
    if type(name) is not str:
        return UNKNOWN
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", name.strip()[:MAX_MODEL_LENGTH].rstrip()) or UNKNOWN


def nanocredits(value: object) -> int | None:
    """Return `credits_used` in billionths of a credit; None for what is no number from 0 to a million.

    Plain decimal text is a number too.
    """
    if type(value) is str and len(value) < 100 and _DECIMAL.fullmatch(value.strip()):
        value = Decimal(value.strip())
    elif type(value) is not float and type(value) is not int:
        return None
    return round(value * NANO) if 0 <= value <= MAX_CREDITS else None


_remembered_model = lru_cache(maxsize=_REMEMBERED)(model_of)
_remembered_credits = lru_cache(maxsize=_REMEMBERED)(nanocredits)


def microseconds(stamp: object) -> int | None:
    """Return an RFC 3339 time stamp in microseconds since the epoch; None when it is broken.

    A naive time stamp is UTC.
    """
    if type(stamp) is not str or not _RFC3339.fullmatch(stamp):
        return None
    try:
        moment = datetime.fromisoformat(stamp.upper())
        return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND
    except (ValueError, OverflowError):
        return None
