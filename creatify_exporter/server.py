"""The HTTP server: Granian inside the exporter's event loop, and how its certificates are renewed without a pause."""

import array
import asyncio
import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.server.embed import Server
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from creatify_exporter.config import ConfigError, Tls
from creatify_exporter.web import local_host

_BACKLOG = 2048  # with Granian's default of 128, a few hundred idle clients make a connect hang
_BUFFER = 64 * 1024  # bytes per connection; also the limit of a request's head
_STRAGGLERS = 1.0  # seconds that handshakes under way get before their listener closes
_LISTEN = re.compile(r"(\[(?P<address>[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]*)):(?P<port>[0-9]{1,5})")
_TRIAL = "import asyncio, sys; from creatify_exporter.server import trial; asyncio.run(trial(sys.argv[1]))"
_SO_ATTACH_REUSEPORT_CBPF = 51
_PMTU = slice(60, 64)  # of struct tcp_info; 0 in a socket that was never connected


def parse_listen_address(text: str) -> tuple[str, int]:
    """Return host and port of `:PORT`, `HOST:PORT` or `[ADDRESS]:PORT`; the host is empty for all interfaces.

    Raises ValueError when `text` is none of them.
    """
    match = _LISTEN.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ValueError("must be :PORT, HOST:PORT or [IPV6]:PORT")
    return match["address"] or match["host"], int(match["port"])


class WebServer:
    """Serve `app` on `listen` (host, port; see parse_listen_address) inside the running event loop.

    Clients that do not finish a request's head within `header_timeout` seconds are dropped, and so are those that take
    in nothing more of their answer for `write_timeout` seconds (the latter on Linux).

    Renewed certificates get a server of their own on the same address (SO_REUSEPORT). From the moment it listens, the
    kernel gives it every new connection, and the former one ends when its clients have gone; none of them is cut off.
    """

    def __init__(
        self,
        app: ASGIApp,
        listen: tuple[str, int],
        tls: Tls | None = None,
        *,
        header_timeout: float = 20.0,
        write_timeout: float = 30.0,
    ) -> None:
        self._app = app
        self._tls = tls
        self._header_timeout = header_timeout
        self._write_timeout = write_timeout
        self._hurry = asyncio.Event()
        self._replacing = asyncio.Lock()
        self._retiring: asyncio.Task[None] | None = None
        self._retired: set[asyncio.Task[None]] = set()
        self.address = listen

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the server."""
        host, port = self.address
        return f"{'https' if self._tls else 'http'}://{local_host(host)}:{port}/"

    async def start(self) -> None:
        """Listen, and set `address` to the real one (port 0 means any free port).

        Raises ConfigError when the address is in use or not ours, or the certificates cannot be used.
        """
        reserved = await _reserve(*self.address)
        with reserved:
            self.address = reserved.getsockname()[:2]
            self._current = await self._launch(self._tls)
        self._tune()

    async def replace(self, tls: Tls | None) -> None:
        """Serve with these certificates from now on, if the settings or the files changed.

        Changes in quick succession wait for each other, about a second each. Raises ConfigError when the files cannot
        be used; those in force stay.
        """
        async with self._replacing:
            if _fingerprint(tls) == self._fingerprint:
                return
            if self._retiring:
                # The kernel is told to prefer the second listener: there must not be three.
                self._hurry.set()
                await asyncio.wait({self._retiring}, timeout=2 * _STRAGGLERS)
            former = self._current
            self._current = await self._launch(tls)
            self._tls = tls
            self._tune()
            self._hurry.clear()
            self._retiring = asyncio.create_task(self._retire(former))
            self._retired.add(self._retiring)
            self._retiring.add_done_callback(self._retired.discard)

    async def stop(self, grace: float) -> None:
        """Stop listening, and give the answers under way up to `grace` seconds."""
        for task in self._retired:
            task.cancel()
        await self._current.stop(grace)

    async def _launch(self, tls: Tls | None) -> "_Generation":
        fingerprint = _fingerprint(tls)
        if tls:
            await _try(tls)
        generation = _Generation(self._app, self.address, tls, self._header_timeout)
        await generation.start()
        self._fingerprint = fingerprint
        return generation

    async def _retire(self, generation: "_Generation") -> None:
        generation.leaving = True
        await asyncio.sleep(_STRAGGLERS)
        with contextlib.suppress(TimeoutError):
            # By then every idle connection has timed out; the others were told to close by their last answer.
            await asyncio.wait_for(self._hurry.wait(), self._header_timeout)
        await generation.stop(self._write_timeout)

    def _tune(self) -> None:
        if sys.platform != "linux":
            return
        # A classic BPF program of one instruction, `return 1`: new connections go to the second listener of the
        # address, which is the newer one. While there is just one, the kernel ignores the answer.
        code = array.array("B", struct.pack("HBBI", 6, 0, 0, 1))
        program = struct.pack("HP", 1, code.buffer_info()[0])
        for number, own in _sockets_at(self.address):
            if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                with contextlib.suppress(OSError):  # then the kernel goes on distributing by a hash
                    own.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)
                # Accepted sockets inherit it; Granian itself has no limit for a client that does not read.
                own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._write_timeout * 1000))
            elif own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[_PMTU] == b"\0\0\0\0":
                # Granian binds one more socket to try the address, and forgets it: one leaked file per server.
                os.close(number)


class _Generation:
    """One Granian server, with the certificates of its time."""

    def __init__(self, app: ASGIApp, address: tuple[str, int], tls: Tls | None, header_timeout: float) -> None:
        self._app = app
        self.leaving = False
        self._server = Server(
            self._serve,
            address=address[0],
            port=address[1],
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=int(header_timeout * 1000), max_buffer_size=_BUFFER),
            websockets=False,
            backlog=_BACKLOG,
            backpressure=_BACKLOG,
            log_enabled=False,
            # Without this, Granian's logging set-up would close the handlers of the whole process.
            log_dictconfig={"incremental": True, "formatters": {}, "handlers": {}, "loggers": {}},
            ssl_cert=tls.cert_file if tls else None,
            ssl_key=tls.key_file if tls else None,
            ssl_ca=tls.client_ca_file if tls else None,
            ssl_client_verify=tls.client_auth if tls else False,
            ssl_protocol_min=SSLProtocols.tls13 if tls and tls.min_version == "TLS13" else SSLProtocols.tls12,
        )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if self.leaving and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_last)

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._server.serve())
        # The worker listens in the first step of its own task; when it cannot, `serve` ends a few steps later.
        while not self._serving.done() and not self._server.wrks:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        if self._serving.done():
            raise _unusable(type(self._serving.exception()).__name__)

    async def stop(self, grace: float) -> None:
        self.leaving = True
        self._server.stop()
        await asyncio.wait({self._serving}, timeout=grace)


def _unusable(reason: str) -> ConfigError:
    return ConfigError([("tls_server_config", f"the server cannot use these files: {reason}")])


async def _try(tls: Tls) -> None:
    """Raise ConfigError when the TLS library, which ends the process over files that it does not like, does not."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _TRIAL, tls.model_dump_json()),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if await child.wait() != 0:
        raise _unusable("it needs a key of type RSA (2048 bits or more), ECDSA (P-256, P-384) or Ed25519")


async def trial(settings: str) -> None:
    """End this process, without an error if a server starts with these TLS settings (JSON)."""
    await _Generation(_nothing, ("127.0.0.1", 0), Tls(**json.loads(settings)), 1.0).start()
    os._exit(0)


async def _nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    return


def _fingerprint(tls: Tls | None) -> tuple[Tls, tuple[bytes, ...]] | None:
    if tls is None:
        return None
    files = (tls.cert_file, tls.key_file, tls.client_ca_file)
    try:
        return tls, tuple(hashlib.sha256(file.read_bytes()).digest() for file in files if file)
    except OSError as error:
        raise _unusable((error.strerror or type(error).__name__).lower()) from None


async def _reserve(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address until Granian, which would share one in use without a word, listens."""
    try:
        if host:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, *_, address = min(found, key=lambda one: one[0])  # IPv4 first, as other exporters do for localhost
            return _bind(family, (str(address[0]), port))
        try:
            return _bind(socket.AF_INET6, ("::", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            return _bind(socket.AF_INET, ("0.0.0.0", port))  # noqa: S104 - all interfaces is the documented default
    except OSError as error:
        reason = (error.strerror or "unknown error").lower()
        raise ConfigError([("--web.listen-address", f"cannot listen on {host}:{port}: {reason}")]) from None


def _bind(family: int, address: tuple[str, int]) -> socket.socket:
    one = socket.socket(family)
    try:
        if address[0] == "::" and one.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            raise OSError(errno.EAFNOSUPPORT, "no dual stack")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(address)
        # Only from here on: the bind above has to fail when any other socket has the address.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        one.close()
        raise
    return one


def _sockets_at(address: tuple[str, int]) -> Iterator[tuple[int, socket.socket]]:
    """Yield this process's TCP sockets bound to `address`: their file descriptor, and a duplicate until the next."""
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            duplicate = os.dup(number)
        except OSError:
            continue
        try:
            own = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            continue
        with own:
            if own.family in {socket.AF_INET, socket.AF_INET6} and own.getsockname()[:2] == address:
                yield number, own
