"""Connections to PostgreSQL that give up on a server which no longer answers, and why a login was refused.

Imported only for a PostgreSQL ledger: psycopg is an extra.
"""

import os
import re
import select
import time
from typing import Any, TypeVar

import psycopg
from psycopg import pq
from psycopg.abc import PQGen
from psycopg.conninfo import make_conninfo

from creatify_exporter.schema import SchemaError

T = TypeVar("T")
_REFUSAL = re.compile(rb'\tErrorResponse\t.* C "([0-9A-Z]{5})"')


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that is closed when the server leaves one statement unanswered for `patience` seconds.

    Neither the server's own time limits nor TCP's help when something on the way still acknowledges packets.
    """

    patience: float

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait for the server, as psycopg does, but not longer than `patience`."""
        try:
            return super().wait(gen, interval, self.patience if timeout is None else min(timeout, self.patience))
        except psycopg.OperationalError as error:
            if error.sqlstate is None:
                self.close()  # nothing that the server said: what it did with the statement is unknown
            raise


def connect(patience: float, *arguments: Any, explain: bool, **parameters: Any) -> Connection:
    """Connect with the parameters of libpq; raise psycopg.Error, or SchemaError for a database that is not UTF-8.

    To `explain` a failure takes another login, in what is left of `patience` seconds.
    """
    started = time.monotonic()
    try:
        connection = Connection.connect(*arguments, **parameters)
    except psycopg.errors.ConnectionTimeout:
        raise
    except psycopg.OperationalError as error:
        if explain:
            error.sqlstate = _refusal(started + patience, parameters)
        raise
    connection.patience = patience
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        connection.close()
        raise SchemaError(f"the database's encoding is {encoding}; make one with CREATE DATABASE ... ENCODING UTF8")
    return connection


def _refusal(until: float, parameters: dict[str, Any]) -> str | None:
    """Log in once more, and return the SQLSTATE with which the server refuses it, None when it says none in time.

    psycopg and libpq keep only the text of a refused login, in the server's language. What the server sends can be
    had by tracing the protocol (https://www.postgresql.org/docs/current/libpq-control.html#LIBPQ-PQTRACE).
    """
    if not hasattr(os, "memfd_create"):  # the trace may hold a password: it is written to memory or not at all
        return None
    known = {name: value for name, value in parameters.items() if name not in ("context", "row_factory")}
    with open(os.memfd_create("creatify-exporter"), "rb", buffering=0) as trace:
        pgconn = pq.PGconn.connect_start(make_conninfo("", **known).encode())
        try:
            if pgconn.status == pq.ConnStatus.BAD:
                return None
            pgconn.trace(trace.fileno())
            _finish_login(pgconn, until)
            pgconn.untrace()
            needs_password = pgconn.needs_password
        finally:
            pgconn.finish()
        trace.seek(0)
        found = _REFUSAL.search(trace.read())
    if found:
        return found[1].decode()
    return "28000" if needs_password else None


def _finish_login(pgconn: pq.abc.PGconn, until: float) -> None:
    status: int = pq.PollingStatus.WRITING
    while status in (pq.PollingStatus.READING, pq.PollingStatus.WRITING):
        poll, left = select.poll(), until - time.monotonic()
        poll.register(pgconn.socket, select.POLLIN if status == pq.PollingStatus.READING else select.POLLOUT)
        if left <= 0 or not poll.poll(left * 1000):
            return
        status = pgconn.connect_poll()
