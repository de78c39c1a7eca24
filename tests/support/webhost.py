"""The endpoints with a made-up site behind: in this process for the routes, in one of its own for the server.

The process takes its settings as one JSON object on the command line, prints `{"host": ..., "port": ...}` when it
listens, and then answers each line on standard input, a JSON object of TLS settings or null, with one line: "replaced",
or what was wrong with it. It ends, gracefully, with its standard input.
"""

import asyncio
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from creatify_exporter.config import ConfigError, Tls
from creatify_exporter.metrics import ExporterView, WorkspaceView
from creatify_exporter.server import WebServer, parse_listen_address
from creatify_exporter.web import application
from creatify_exporter.webauth import Authentication
from tests.support import statuses
from tests.support.statuses import EXPORTER

ROOT = Path(__file__).absolute().parents[2]


@dataclass
class FakeSite:
    """A site that notes what it was asked."""

    telemetry_path: str = "/metrics"
    lifecycle: bool = False
    workspaces: Sequence[WorkspaceView] = (WorkspaceView(name="marketing"), WorkspaceView(name="sales"))
    exporter: ExporterView = EXPORTER
    body: bytes = b"creatify_up 1\n"
    failure: Exception | None = None
    is_ready: bool = True
    scrapes: list[tuple[frozenset[str] | None, float, bool]] = field(default_factory=list)
    seen: list[bool] = field(default_factory=list)
    reloads: int = 0

    def views(self) -> Sequence[WorkspaceView]:
        return self.workspaces

    def exporter_view(self) -> ExporterView:
        return self.exporter

    async def scrape(
        self, names: frozenset[str] | None, timeout: float, openmetrics: bool, *, seen: bool = True
    ) -> bytes:
        self.scrapes.append((names, timeout, openmetrics))
        self.seen.append(seen)
        if self.failure:
            raise self.failure
        return self.body

    def ready(self) -> bool:
        return self.is_ready

    async def reload(self) -> None:
        self.reloads += 1
        if self.failure:
            raise self.failure


def app_of(site: FakeSite, authentication: Authentication | None = None, **options: Any) -> ASGIApp:
    """Return the endpoints of a site, by default for everybody."""
    return application(
        site,
        authentication or Authentication({}),
        telemetry_path=site.telemetry_path,
        reload=site.reload if site.lifecycle else None,
        **options,
    )


def _every_state() -> ASGIApp:
    """Return the endpoints below `/STATE/` for each state of the status page."""
    apps = {
        state: app_of(FakeSite(workspaces=views, exporter=exporter), now=lambda: statuses.NOW)
        for state, (views, exporter) in statuses.STATES.items()
    }

    async def choose(scope: Scope, receive: Receive, send: Send) -> None:
        _, state, path = scope["path"].split("/", 2)
        await apps[state]({**scope, "path": f"/{path}"}, receive, send)

    return choose


async def _host(settings: Mapping[str, Any]) -> None:
    site = FakeSite(
        workspaces=[WorkspaceView(name=name) for name in settings.get("workspaces", ["marketing", "sales"])],
        body=b"# a line of sixty-four bytes, as many of them as were asked for\n" * settings.get("lines", 1000),
    )
    tls = settings.get("tls")
    server = WebServer(
        _every_state() if settings.get("states") else app_of(site, Authentication(settings.get("users", {}))),
        parse_listen_address(settings.get("listen", "127.0.0.1:0")),
        Tls(**tls) if tls else None,
        **settings.get("limits", {}),
    )
    try:
        await server.start()
    except ConfigError as error:
        sys.exit(str(error))
    print(json.dumps({"host": server.address[0], "port": server.address[1], "url": server.url}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        tls = json.loads(line)
        try:
            await server.replace(Tls(**tls) if tls else None)
        except ConfigError as error:
            print(error, flush=True)
        else:
            print("replaced", flush=True)
    await server.stop(settings.get("grace", 3.0))


@dataclass
class Host:
    """A running process."""

    process: "subprocess.Popen[str]"
    host: str
    port: int
    url: str

    def replace(self, tls: Mapping[str, str] | None) -> str:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(tls) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> int:
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(20)

    def connect(self, context: ssl.SSLContext | None = None, slow: bool = False) -> socket.socket:
        """Return a connection, with TLS when there is a context; its reads give up after 10 seconds.

        On a slow one little is under way at a time, as on a bad network: the kernel takes only some of a large answer.
        """
        one = socket.socket()
        if slow:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        one.settimeout(10)
        one.connect((self.host, self.port))
        return context.wrap_socket(one, server_hostname="localhost") if context else one

    def get(
        self, path: str = "/metrics", context: ssl.SSLContext | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Return status and body of one request on a connection of its own."""
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        with self.connect(context) as one:
            one.sendall("\r\n".join([*lines, "", ""]).encode())
            return answer_of(read_all(one))


def read_all(one: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    parts = []
    while part := one.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def answer_of(data: bytes) -> tuple[int, bytes]:
    """Return status and body of a raw answer."""
    head, separator, body = data.partition(b"\r\n\r\n")
    assert separator, f"no answer: {data[:200]!r}"
    return int(head.split(b" ", 2)[1]), body


def hosting_command(**settings: Any) -> list[str]:
    """Return the command line of the process."""
    return [sys.executable, "-m", "tests.support.webhost", json.dumps(settings)]


@contextmanager
def hosting(**settings: Any) -> Iterator[Host]:
    """Run the process; end it if the test has not done so."""
    with subprocess.Popen(
        hosting_command(**settings),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            host = Host(process, **json.loads(process.stdout.readline()))
            yield host
            if process.poll() is None:
                assert host.end() == 0
        finally:
            if process.poll() is None:
                process.kill()


if __name__ == "__main__":
    asyncio.run(_host(json.loads(sys.argv[1])))
