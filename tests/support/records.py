"""Listings for the tests of the counting: plain values in, drafts out."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from creatify_exporter.ledger import Book, Policy
from creatify_exporter.listing import Listing
from creatify_exporter.tasks import Record, Task, TaskReader

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


def read_task(one: Record) -> Task:
    """Return the task of one record."""
    return TaskReader(classify)([one])[0]


def commit(
    book: Book, records: Iterable[Record], *, at: int = 0, policy: Policy = POLICY, date: int | None = None
) -> Listing:
    """Commit one listing at START + `at` microseconds, and return its sums.

    `date` is what the API's clock says, in microseconds since START.
    """
    return commit_asking(book, records, {}, at=at, policy=policy, date=date, settle=0)[0]


def commit_asking(
    book: Book,
    records: Iterable[Record],
    by_id: Mapping[str, Record | None],
    *,
    at: int = 0,
    policy: Policy = POLICY,
    date: int | None = None,
    settle: int = 10,
) -> tuple[Listing, list[str]]:
    """Commit one listing, and return its sums and the ids of the tasks that were asked for.

    Asked for by its id each task is what `by_id` says: a record, None when the API has no such task, and when it is
    not there the API does not answer.
    """
    draft, listing, read = book.draft(), Listing(), TaskReader(classify)
    listing.add(draft.add(read(records)))
    api_time = None if date is None else START + date
    asked = draft.missing(settle, START + at, api_time)
    for task_id in asked:
        if task_id not in by_id:
            draft.postpone(task_id)
        elif one := by_id[task_id]:
            draft.settle(read_task(one))
        else:
            draft.gone(task_id)
    book.commit(draft, listing.models, policy, START + at, api_time)
    return listing, asked


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
