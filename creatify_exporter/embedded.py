"""Granian inside an event loop, on a listening socket of ours; run as a program, it tries TLS files.

It imports nothing else of the package: the trial is a process that has to start quickly.
"""

import asyncio
import os
import socket
import ssl
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.net import SocketHolder
from granian.server.embed import AsyncWorker, Server, WorkerSignal
from starlette.types import ASGIApp, Receive, Scope, Send

BACKLOG = 2048  # with Granian's default of 128, a few hundred idle clients make a connect hang
_BUFFER = 64 * 1024  # bytes per connection; also the limit of a request's head
_TRIAL_DEADLINE = 20.0  # seconds
_LAST_STEP = 0.1  # seconds


class TlsFiles(NamedTuple):
    """Certificate and key of the server, the authorities of its clients if they must show one, TLS12 or TLS13."""

    cert: str
    key: str
    client_ca: str
    min_version: str


class Embedded(Server):
    """Serve `app` to the clients of `listener`, which stays open and may have other servers.

    Clients that do not finish a request's head within `header_timeout` seconds are dropped.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, tls: TlsFiles | None, header_timeout: float) -> None:
        super().__init__(
            app,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=int(header_timeout * 1000), max_buffer_size=_BUFFER),
            websockets=False,
            backpressure=BACKLOG,
            log_enabled=False,
            # Without this, Granian's logging set-up would close the handlers of the whole process.
            log_dictconfig={"incremental": True, "formatters": {}, "handlers": {}, "loggers": {}},
            ssl_cert=Path(tls.cert) if tls else None,
            ssl_key=Path(tls.key) if tls else None,
            ssl_ca=Path(tls.client_ca) if tls and tls.client_ca else None,
            ssl_client_verify=bool(tls and tls.client_ca),
            ssl_protocol_min=SSLProtocols.tls13 if tls and tls.min_version == "TLS13" else SSLProtocols.tls12,
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
        backlog = (BACKLOG,) if sys.platform == "linux" else ()
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


async def _nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    return


async def _trial(tls: TlsFiles) -> None:
    """End this process, without an error if a client gets a connection from a server with these files."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await Embedded(_nothing, listener, tls, 1.0).start()
        address = listener.getsockname()
        try:
            await asyncio.wait_for(asyncio.open_connection(*address, ssl=context), _TRIAL_DEADLINE)
        except OSError:  # of which the errors of TLS and the timeout are kinds
            os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    asyncio.run(_trial(TlsFiles(*sys.argv[1:])))
