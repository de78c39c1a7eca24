"""The HTTP server: where it listens, its limits, its certificates and how they are renewed without a pause."""

import asyncio
import errno
import hashlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from starlette.types import ASGIApp

from creatify_exporter.config import ConfigError, Tls
from creatify_exporter.embedded import BACKLOG, Embedded, TlsFiles
from creatify_exporter.web import local_host

_LISTEN = re.compile(r"(\[(?P<address>[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]*)):(?P<port>[0-9]{1,5})")


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
        self._replacing = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()
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
        self._listener = await _bound(*self.address)
        self.address = self._listener.getsockname()[:2]
        # Accepted sockets inherit both options. Granian itself has no limit for a client that does not read.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._write_timeout * 1000))
        self._listener.listen(BACKLOG)
        self._current = await self._launch(self._tls)

    async def replace(self, tls: Tls | None) -> None:
        """Serve with these certificates from now on, if the settings or the files changed.

        A second server accepts from the same socket, then the former one ends: no connection is refused, and answers
        under way are finished. Raises ConfigError when the files cannot be used; those in force stay.
        """
        async with self._replacing:
            if _fingerprint(tls) == self._fingerprint:
                return
            former = self._current
            self._current = await self._launch(tls)
            self._tls = tls
            leaving = asyncio.create_task(former.finish())
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def stop(self, grace: float) -> None:
        """Stop listening, and give the answers under way up to `grace` seconds."""
        self._listener.close()
        await self._current.finish(grace)
        for leaving in self._leaving:
            leaving.cancel()

    async def _launch(self, tls: Tls | None) -> Embedded:
        fingerprint = _fingerprint(tls)
        if tls:
            await check(tls)
        server = Embedded(self._app, self._listener, _files(tls) if tls else None, self._header_timeout)
        await server.start()
        self._fingerprint = fingerprint
        return server


async def check(tls: Tls) -> None:
    """Raise ConfigError unless a server with these settings speaks TLS.

    Tried in a process of its own: the TLS library ends the one in which it meets files that it does not like.
    """
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "creatify_exporter.embedded", *_files(tls)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if await child.wait() != 0:
        raise _unusable("it needs a key of type RSA (2048 bits or more), ECDSA (P-256, P-384) or Ed25519")


def _unusable(reason: str) -> ConfigError:
    return ConfigError([("tls_server_config", f"the server cannot use these files: {reason}")])


def _files(tls: Tls) -> TlsFiles:
    client_ca = str(tls.client_ca_file) if tls.client_ca_file and tls.client_auth else ""
    return TlsFiles(str(tls.cert_file), str(tls.key_file), client_ca, tls.min_version)


def _fingerprint(tls: Tls | None) -> tuple[Tls, tuple[bytes, ...]] | None:
    if tls is None:
        return None
    files = (tls.cert_file, tls.key_file, tls.client_ca_file)
    try:
        return tls, tuple(hashlib.sha256(file.read_bytes()).digest() for file in files if file)
    except OSError as error:
        raise _unusable((error.strerror or type(error).__name__).lower()) from None


async def _bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; raises ConfigError when it is in use or not ours."""
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
    except OSError:
        one.close()
        raise
    return one
