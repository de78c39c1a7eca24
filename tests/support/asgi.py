"""Ask an ASGI application in this process."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


async def ask(
    app: ASGIApp,
    path: str = "/metrics",
    *headers: tuple[str, str],
    method: str = "GET",
    query: bytes = b"",
    scheme: str = "http",
    server: tuple[str, str] = ("127.0.0.1", "9877"),
) -> Answer:
    """Return the answer to one request; the application must not raise."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "method": method,
        "path": path,
        "query_string": query,
        "scheme": scheme,
        "server": server,
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
    }
    await app(scope, receive, send)
    start, *bodies = sent
    received = [(name.decode(), value.decode()) for name, value in start["headers"]]
    assert len(received) == len(dict(received)), "a header was sent twice"
    return Answer(start["status"], dict(received), b"".join(one.get("body", b"") for one in bodies))


def ask_once(app: ASGIApp, *args: Any, **kwargs: Any) -> Answer:
    """Return the answer to one request, in an event loop of its own."""
    return asyncio.run(ask(app, *args, **kwargs))


def header(name: str, values: Sequence[str]) -> list[tuple[str, str]]:
    """Return the same header several times."""
    return [(name, value) for value in values]
