"""Real HTTP servers on loopback that behave as badly as a test wants."""

import gzip
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Self


@dataclass
class Exchange:
    """One request, and the means to answer it, or not to."""

    path: str
    headers: dict[str, str]
    """Names in lower case."""
    connection: socket.socket
    stopped: threading.Event
    keep_alive: bool = True

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def hang(self) -> None:
        """Hold the connection until the client gives up or the server stops."""
        self.keep_alive = False
        self.connection.settimeout(0.05)
        while not self.stopped.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue

    def drip(self, data: bytes, every: float = 0.02) -> None:
        """Send one byte at a time, `every` so many seconds, until the client gives up or the server stops."""
        for byte in data:
            if self.stopped.wait(every):
                return
            self.send(bytes([byte]))

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.keep_alive = False
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def close(self) -> None:
        """End the connection in order, once the answer is out."""
        self.keep_alive = False


class InThread:
    """A server of http.server that answers in a thread of its own inside `with`."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


Script = Callable[[Exchange], None]


@dataclass
class Server:
    """Answer each request by the script; with `tls` set, over TLS. `requests` are those read so far."""

    script: Script
    tls: ssl.SSLContext | None = None
    requests: list[Exchange] = field(default_factory=list)
    connections: int = 0

    def __enter__(self) -> "Server":
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://localhost:{self.port}"

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        self._open.add(connection)
        # The client goes away in the middle of most of these tests.
        with suppress(OSError), connection:
            if self.tls:
                self._open.discard(connection)
                connection = self.tls.wrap_socket(connection, server_side=True)
                self._open.add(connection)
            with connection, connection.makefile("rb") as stream:
                while exchange := _read_request(stream, connection, self._stopped):
                    self.requests.append(exchange)
                    self.script(exchange)
                    if not exchange.keep_alive:
                        break
        self._open.discard(connection)


def _read_request(stream: Iterable[bytes], connection: socket.socket, stopped: threading.Event) -> Exchange | None:
    lines = iter(stream)
    first = next(lines, b"").decode("latin-1").split()
    headers = {}
    for line in lines:
        if line in (b"\r\n", b"\n"):
            break
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return Exchange(first[1], headers, connection, stopped) if len(first) == 3 else None


def head(status: int | str = 200, *headers: str) -> bytes:
    """Return a status line and headers, as in `head(200, "Content-Length: 2")`."""
    return "\r\n".join([f"HTTP/1.1 {status} Whatever", *headers, "", ""]).encode("latin-1")


def answer(body: bytes = b"[]", status: int = 200, *headers: str) -> Script:
    """Answer with a complete body."""
    return lambda exchange: exchange.send(head(status, f"Content-Length: {len(body)}", *headers) + body)


def chunked(pieces: Iterable[bytes], *headers: str, end: bool = True) -> Script:
    """Answer in chunks; without the last one if `end` is false."""

    def script(exchange: Exchange) -> None:
        exchange.send(head(200, "Transfer-Encoding: chunked", *headers))
        for piece in pieces:
            exchange.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        if end:
            exchange.send(b"0\r\n\r\n")
        else:
            exchange.close()

    return script


def gzipped(body: bytes) -> Script:
    """Answer with a gzip body."""
    return answer(gzip.compress(body), 200, "Content-Encoding: gzip")


def bomb(size: int, start: bytes = b"[", filler: bytes = b" ") -> Iterator[bytes]:
    """Yield gzip data that grows to `size` bytes, made on the fly."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    yield packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    # A full flush makes this piece independent of its place, so that one serves for all.
    piece = packer.compress(filler * ((1 << 20) // len(filler))) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(size >> 20):
        yield piece


def in_turn(*scripts: Script) -> Script:
    """Answer the first request by the first script, and so on; the last one serves for the rest."""
    waiting = list(scripts)

    def script(exchange: Exchange) -> None:
        (waiting.pop(0) if len(waiting) > 1 else waiting[0])(exchange)

    return script
