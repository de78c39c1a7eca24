"""Databases that fail, in this process."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import sqlalchemy as sa


def refuse(*_: object) -> None:
    """Fail as SQLite does."""
    raise sqlite3.OperationalError("database or disk is full")


@contextmanager
def full_disk() -> Iterator[None]:
    """Let everything be read, and each COMMIT fail of what was written."""
    written = list[str]()

    def execute(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            written.append(statement)

    def commit(_: object) -> None:
        if written:
            written.clear()
            refuse()

    listeners: dict[str, Callable[..., None]] = {"before_cursor_execute": execute, "commit": commit}
    for event, listener in listeners.items():
        sa.event.listen(sa.Engine, event, listener)
    try:
        yield
    finally:
        for event, listener in listeners.items():
            sa.event.remove(sa.Engine, event, listener)
