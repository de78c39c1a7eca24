"""An API that answers each workspace as a test wants it to: badly, mostly."""

import json
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from creatify_exporter.demo import BALANCE_PATH, LIST_PATH
from tests.support.servers import InThread
from tests.support.stage import credentials


class Exchange(BaseHTTPRequestHandler):
    """One request to answer; `wfile` and `connection` are there for what no server should do."""

    server: "_Server"
    protocol_version, wbufsize = "HTTP/1.1", 1 << 16

    @property
    def upstream(self) -> "Upstream":
        return self.server.upstream

    def reply(self, body: bytes | object, status: int = 200, **headers: str) -> None:
        """Answer with a body, JSON unless it is bytes; `_` in the names of headers is a hyphen."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._head(status, {"Content_Type": "application/json", "Content_Length": str(len(data))} | headers)
        self.wfile.write(data)
        self.wfile.flush()

    def stream(self, chunks: Iterable[bytes], **headers: str) -> None:
        """Answer with a body of unknown length."""
        self._head(200, {"Content_Type": "application/json", "Transfer_Encoding": "chunked"} | headers)
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def hang(self, seconds: float | None = None) -> None:
        """Wait that long, or until the API ends."""
        self.upstream.ended.wait(seconds)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(self.upstream.clock() if timestamp is None else timestamp)

    def do_GET(self) -> None:
        name = unquote(self.headers.get("X-API-ID", "").removeprefix("id-of-").partition(".")[0])
        path = self.path.partition("?")[0]
        with self.upstream.lock:
            self.upstream.requests[name, path] += 1
        if path == BALANCE_PATH:
            self.upstream.balances.get(name, balance)(self)
        else:
            self.upstream.answers[name](self)

    def do_CONNECT(self) -> None:
        """Note what a client wants to be connected to, and refuse."""
        self.upstream.connects.append(self.path)
        self.reply(b"", 502)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256
    upstream: "Upstream"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let clients go away."""


class Upstream(InThread):
    """Serve on `url` while entered; `answers` and `balances` are by workspace, `requests` by workspace and path,
    `connects` those to a proxy."""

    def __init__(self, **answers: Callable[[Exchange], None]) -> None:
        self.clock: Callable[[], float] = time.time  # what the `Date` of an answer says
        self.answers: dict[str, Callable[[Exchange], None]] = dict(answers)
        self.balances: dict[str, Callable[[Exchange], None]] = {}
        self.requests = defaultdict[tuple[str, str], int](int)
        self.connects: list[str] = []
        self.lock, self.ended = threading.Lock(), threading.Event()
        server = _Server(("127.0.0.1", 0), Exchange)
        server.upstream = self
        super().__init__(server)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def listings(self, name: str) -> int:
        """Return how many listings a workspace asked for."""
        with self.lock:
            return self.requests[name, LIST_PATH]

    def looks_at_balance(self, name: str) -> int:
        """Return how often a workspace asked for its balance."""
        with self.lock:
            return self.requests[name, BALANCE_PATH]

    def config(self, *names: str, **sections: Any) -> dict[str, Any]:
        """Return a configuration of the exporter with these workspaces, by default all."""
        workspaces = [
            {"name": name, "api_id": credentials(name)[0], "api_key": credentials(name)[1]}
            for name in names or self.answers
        ]
        config: dict[str, Any] = {
            "workspaces": workspaces,
            "api": {"base_url": self.url},
            "exposition": {"zero_hold": "0s"},
        }
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values} if isinstance(values, Mapping) else values
        return config

    def serve_tls(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        super().__exit__()


def balance(exchange: Exchange) -> None:
    """Answer with a balance of 7."""
    exchange.reply({"remaining_credits": 7})


def task(number: int = 1, **fields: object) -> dict[str, object]:
    """Return one record as the API lists it."""
    return {
        "id": f"task-{number}",
        "model_name": "m",
        "messages": [],
        "config": {},
        "response_function_calls": [],
        "status": "done",
        "credits_used": 1,
        "created_at": "2026-01-01T00:00:00Z",
        "updated_at": "2026-01-01T00:00:02Z",
    } | fields


def tasks(*records: object) -> Callable[[Exchange], None]:
    """Answer with a list of records."""
    return lambda exchange: exchange.reply(list(records))
