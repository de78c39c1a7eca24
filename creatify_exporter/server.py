"""The HTTP server: Granian in the event loop; its limits, its certificates and how they are renewed without a pause.

Run as a program, it tries TLS settings.
"""

import asyncio
import errno
import json
import os
import re
import socket
import ssl
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.net import SocketHolder
from granian.server.embed import AsyncWorker, Server, WorkerSignal
from starlette.responses import Response
from starlette.types import ASGIApp

from creatify_exporter.config import ConfigError, Tls, local_host

_LISTEN = re.compile(r"(\[(?P<address>[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]*)):(?P<port>[0-9]{1,5})")
_BACKLOG = 2048  # with Granian's default of 128, a few hundred idle clients make a connect hang
_BUFFER = 64 * 1024  # bytes per connection; also the limit of a request's head
_TRIAL_DEADLINE = 20.0  # seconds
_LAST_STEP = 0.1  # seconds


def parse_listen_address(text: str) -> tuple[str, int]:
    """Return host and port of `:PORT`, `HOST:PORT` or `[ADDRESS]:PORT`; the host is empty for all interfaces.

    Raises ValueError when `text` is none of them.
    """
    match = _LISTEN.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ValueError("must be :PORT, HOST:PORT or [IPV6]:PORT")
    return match["address"] or match["host"], int(match["port"])


@dataclass
class WebServer:
    """Serve `app` on `address` (host, port; see parse_listen_address) inside the running event loop.

    Clients that do not finish a request's head within `header_timeout` seconds are dropped, and so are those that take
    in nothing more of their answer for `write_timeout` seconds (the latter on Linux).
    """

    app: ASGIApp
    address: tuple[str, int]
    tls: Tls | None = None
    header_timeout: float = 20.0
    write_timeout: float = 30.0

    def __post_init__(self) -> None:
        self._replacing = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the server."""
        host, port = self.address
        return f"{'https' if self.tls else 'http'}://{local_host(host)}:{port}/"

    async def start(self) -> None:
        """Listen, and set `address` to the real one (port 0 means any free port).

        Raises ConfigError when the address is in use or not ours, or the certificates cannot be used.
        """
        host, port = self.address
        try:
            self._listener = await _listener(host, port)
        except OSError as error:
            # create_server adds the address to the reason.
            known = not isinstance(error, socket.gaierror) and error.errno
            reason = (os.strerror(known) if known else error.strerror or "unknown error").lower()
            raise ConfigError([("--web.listen-address", f"cannot listen on {host}:{port}: {reason}")]) from None
        self.address = self._listener.getsockname()[:2]
        # Accepted sockets inherit both options. Granian itself has no limit for a client that does not read.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.write_timeout * 1000))
        self._current = await self._launch(self.tls)

    async def replace(self, tls: Tls | None) -> None:
        """Serve with these certificates from now on, if the settings or the files changed.

        A second server accepts from the same socket, then the former one ends: no connection is refused, and answers
        under way are finished. Raises ConfigError when the files cannot be used; those in force stay.
        """
        async with self._replacing:
            if tls == self.tls:
                return
            former, self._current = self._current, await self._launch(tls)
            self.tls = tls
            leaving = asyncio.create_task(former.finish())
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def stop(self, grace: float) -> None:
        """Stop listening, and give the answers under way up to `grace` seconds."""
        self._listener.close()
        await self._current.finish(grace)
        for leaving in self._leaving:
            leaving.cancel()

    async def _launch(self, tls: Tls | None) -> "_Embedded":
        if tls:
            await _try(tls)
        server = _Embedded(self.app, self._listener, tls, self.header_timeout)
        await server.start()
        return server


async def _try(tls: Tls) -> None:
    """Raise ConfigError unless a server with these settings speaks TLS.

    Tried in a process of its own: the TLS library ends the one in which it meets files that it does not like.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, tls.model_dump_json()),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, ValueError) as error:  # no process can be started, or a path is not in UTF-8
        raise ConfigError([("tls_server_config", f"the files cannot be tried ({type(error).__name__})")]) from None
    if await child.wait() != 0:
        reason = "it needs a key of type RSA (2048 bits or more), ECDSA (P-256, P-384) or Ed25519"
        raise ConfigError([("tls_server_config", f"the server cannot use these files: {reason}")])


async def _listener(host: str, port: int) -> socket.socket:
    """Return a listening socket; raise OSError."""
    dual = socket.has_dualstack_ipv6()
    if host:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = min(found, key=lambda one: one[0])  # IPv4 first, as other exporters do for localhost
        dual = dual and family == socket.AF_INET6
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
    try:
        if dual:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
    return socket.create_server(("", port), backlog=_BACKLOG)


class _Embedded(Server):
    """Serve `app` to the clients of `listener`, which stays open and may have other servers.

    Clients that do not finish a request's head within `header_timeout` seconds are dropped.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, tls: Tls | None, header_timeout: float) -> None:
        secure: dict[str, Any] = {}
        if tls:
            version = SSLProtocols.tls13 if tls.min_version == "TLS13" else SSLProtocols.tls12
            secure = {"ssl_cert": tls.cert_file, "ssl_key": tls.key_file, "ssl_protocol_min": version}
            if tls.client_auth:
                secure |= {"ssl_ca": tls.client_ca_file, "ssl_client_verify": True}
        super().__init__(
            app,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=int(header_timeout * 1000), max_buffer_size=_BUFFER),
            websockets=False,
            backpressure=_BACKLOG,
            log_enabled=False,
            # Without this, Granian's logging set-up would close the handlers of the whole process.
            log_dictconfig={"incremental": True, "formatters": {}, "handlers": {}, "loggers": {}},
            **secure,
        )
        self._listener = listener
        self._started = asyncio.Event()

    async def start(self) -> None:
        """Accept connections from now on; raises what Granian raises when it cannot."""
        self._serving = asyncio.create_task(self.serve())
        started = asyncio.create_task(self._started.wait())
        await asyncio.wait({self._serving, started}, return_when=asyncio.FIRST_COMPLETED)
        if started.cancel():
            await self._serving

    def startup(self, spawn_target: Any, target_loader: Any) -> None:
        """Start the one worker, as Granian's own method does, but on our socket.

        Granian's would bind one of its own, to which the kernel gives connections that nobody accepts when its server
        ends, and on which no option can be set.
        """
        target = partial(
            spawn_target,
            runtime_threads=self.runtime_threads,
            runtime_blocking_threads=self.runtime_blocking_threads,
            blocking_threads=self.blocking_threads,
            blocking_threads_idle_timeout=self.blocking_threads_idle_timeout,
            backpressure=self.backpressure,
            task_impl=self.task_impl,
            http_mode=self.http,
            http1_settings=self.http1_settings,
            http2_settings=self.http2_settings,
            websockets=self.websockets,
            static_path=self.static_path,
            log_access_fmt=None,
            ssl_ctx=self.ssl_ctx,
            scope_opts={"url_path_prefix": self.url_path_prefix},
        )
        signal = WorkerSignal()
        backlog = (_BACKLOG,) if sys.platform == "linux" else ()
        new_holder: Any = SocketHolder  # whose stub does not name what it takes
        holder = new_holder(os.dup(self._listener.fileno()), False, *backlog)  # the worker closes it
        worker = AsyncWorker(self, 0, target, (1, signal, target_loader, (None, holder)), signal)
        worker.start()
        self.wrks.append(worker)
        self._started.set()

    async def finish(self, grace: float | None = None) -> None:
        """Accept nothing more, and give the answers under way `grace` seconds, or all the time they need."""
        Server.stop(self)
        await asyncio.wait({self._serving}, timeout=grace)
        # Granian tells that it ended from a thread that needs the interpreter once more. An interpreter that is taken
        # down just then ends the process with SIGABRT.
        await asyncio.sleep(_LAST_STEP)


async def _trial(tls: Tls) -> None:
    """End this process, without an error if a client gets a connection from a server with these settings."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await _Embedded(Response(), listener, tls, 1.0).start()
        address = listener.getsockname()
        try:
            await asyncio.wait_for(asyncio.open_connection(*address, ssl=context), _TRIAL_DEADLINE)
        except OSError:  # of which the errors of TLS and the timeout are kinds
            os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    asyncio.run(_trial(Tls.model_validate(json.loads(sys.argv[1]))))
