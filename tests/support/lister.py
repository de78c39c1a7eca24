"""A process that lists a made-up API into a ledger until it is killed: `python -m tests.support.lister URL CLOCK`.

The API lists only the two newest ticks. A task ends five ticks after it was created, so nearly always unlisted, and
the API says so by id. Everything follows from the number of a task and the tick in the file CLOCK. After the tick the
file has the seconds by which this machine's clock is wrong.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from creatify_exporter.ledger import Ledger, LedgerError
from creatify_exporter.tasks import Record
from tests.support.records import SECOND, commit_asking, record

PER_TICK = 5
MINUTE = 60 * SECOND


def ends(number: int) -> str:
    return "failed" if number % 3 == 0 else "done"


def credits_of(number: int) -> float:
    return number % 7 / 10


def task(number: int, tick: int) -> Record:
    """Return what the API says of a task at a tick."""
    created = number // PER_TICK
    status = ends(number) if tick >= created + 5 else "running"
    spent = credits_of(number) if tick >= created + 5 else 0
    text = "timeout" if status == "failed" else None
    return record(f"task-{number}", status, created=created * MINUTE, credits=spent, failed_reason=text)


def window(tick: int) -> Iterator[Record]:
    """Return what the API lists at a tick."""
    return (task(number, tick) for number in range(max(tick - 1, 1) * PER_TICK, (tick + 1) * PER_TICK))


def list_once(ledger: Ledger, tick: int, listed: Iterable[Record] | None = None, wrong: float = 0) -> None:
    """Commit one listing, of the window unless something else is `listed`, with ten tasks asked for by id."""
    numbers = range(PER_TICK, (tick + 1) * PER_TICK)
    by_id = {f"task-{number}": task(number, tick) for number in numbers}
    date = tick * MINUTE
    at = date + int(wrong * SECOND)
    commit_asking(ledger.book("w"), window(tick) if listed is None else listed, by_id, at=at, date=date)


if __name__ == "__main__":
    ledger, clock = Ledger(sys.argv[1]), Path(sys.argv[2])
    while True:
        try:
            now, wrong = clock.read_text().split()
            list_once(ledger, int(now), wrong=float(wrong))
            print("listed", flush=True)
        except LedgerError as error:  # another replica may hold the lock
            print(error, file=sys.stderr, flush=True)
