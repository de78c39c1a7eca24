"""Listings for the tests of the counting: plain values in, drafts out."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from creatify_exporter.ledger import Book, Policy
from creatify_exporter.listing import Listing
from creatify_exporter.tasks import Record, TaskReader

SECOND = 1_000_000
START = 1_760_000_000 * SECOND
"""The tests' time begins here, in microseconds."""

POLICY = Policy(reasons=("timeout", "other"), max_models=100, count_existing=False, retention=90 * 86400, zero_hold=0)


def stamp(microseconds: int) -> str:
    """Return a time as the API writes it."""
    return datetime.fromtimestamp(microseconds / SECOND, UTC).isoformat()


def record(task_id: str, status: str = "done", **fields: Any) -> Record:
    """Return a record; times are microseconds since START, None is left out."""
    created = fields.pop("created", 0)
    duration = fields.pop("duration", 3 * SECOND)
    return Record(
        id=task_id,
        status=status,
        model_name=fields.pop("model", "m"),
        credits_used=fields.pop("credits", 0),
        created_at=None if created is None else stamp(START + created),
        updated_at=None if created is None else stamp(START + created + duration),
        **fields,
    )


def classify(text: object) -> str:
    """Name a reason the simple way."""
    return text if isinstance(text, str) and text else "other"


def commit(book: Book, records: Iterable[Record], *, at: int = 0, policy: Policy = POLICY) -> Listing:
    """Commit one listing at START + `at` microseconds, and return its sums."""
    draft, listing, read = book.draft(), Listing(), TaskReader(classify)
    listing.add(draft.add(read(records)))
    book.commit(draft, listing.models, policy, START + at)
    return listing


def shown(book: Book, now: int | None = None) -> dict[tuple[str, str, str], int]:
    """Return what an answer shows; with `now`, take note that it was given then (microseconds since START)."""
    assert book.totals is not None
    if now is not None:
        book.answered(book.totals, START + now)
    return {
        (key.model, key.metric, key.label): total.value if total.shown else 0
        for key, total in book.totals.series.items()
    }


def counted(book: Book) -> dict[tuple[str, str, str], int]:
    """Return what was counted, without the zeros and the histogram."""
    assert book.totals is not None
    return {
        (key.model, key.metric, key.label): total.value
        for key, total in book.totals.series.items()
        if total.value and key.metric not in ("bucket", "duration")
    }
