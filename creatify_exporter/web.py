"""The endpoints: metrics, status page, health, reload, service discovery."""

import asyncio
import base64
import gzip
import hashlib
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qs

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from creatify_exporter.config import ConfigError, local_host
from creatify_exporter.metrics import ExporterView, WorkspaceView
from creatify_exporter.status import RENEWED_EVERY, STYLE, render_page
from creatify_exporter.webauth import Authentication

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
TEXT = "text/plain; version=0.0.4; charset=utf-8"

_SCRAPE_TIMEOUT = 10.0
_LONGEST_SCRAPE_TIMEOUT = 3600.0
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?")
_TELEMETRY_PATH = re.compile(r"/([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?")
_OTHER_PATHS = _HEALTHY, _READY, _RELOAD, _DISCOVERY = "/-/healthy", "/-/ready", "/-/reload", "/sd"
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
_SECURITY_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Server": "creatify-exporter",
}
_CHALLENGE = 'Basic realm="creatify-exporter", charset="UTF-8"'
_log = structlog.get_logger(__name__)


class Site(Protocol):
    """What the endpoints serve."""

    def views(self) -> Sequence[WorkspaceView]:
        """Return what is known of each workspace, in the order of the configuration; starts no listing."""

    def exporter_view(self) -> ExporterView:
        """Return what is known of the exporter itself."""

    async def scrape(
        self, names: frozenset[str] | None, timeout: float, openmetrics: bool, *, seen: bool = True
    ) -> bytes:
        """Return the exposition of the workspaces `names` (None: all of them), at most `timeout` seconds from now.

        `seen` tells whether anybody will see it.
        """

    def ready(self) -> bool:
        """Tell whether the ledger answered last time."""


def parse_telemetry_path(text: str) -> str:
    """Return the path at which metrics are served; raise ValueError when it is no plain path or another endpoint's."""
    if not _TELEMETRY_PATH.fullmatch(text) or text in _OTHER_PATHS:
        raise ValueError("must be a path like /metrics, of letters, digits and ._~-, that no other endpoint has")
    return text


def application(
    site: Site,
    authentication: Authentication,
    *,
    telemetry_path: str = "/metrics",
    reload: Callable[[], Awaitable[None]] | None = None,
    timeout_offset: float = 0.5,
    now: Callable[[], float] = time.time,
) -> ASGIApp:
    """Return the endpoints of `site` as an ASGI application that answers every request and never raises.

    `reload`, if that is allowed, reads the configuration anew, or raises ConfigError and keeps the former one.
    `timeout_offset` is what an answer has to leave before Prometheus' own scrape timeout, in seconds; `now` tells the
    time in epoch seconds.
    """
    endpoints = _Endpoints(site, telemetry_path, reload, timeout_offset, now)
    routes = [
        Route(telemetry_path, endpoints.metrics),
        Route("/", endpoints.status),
        Route(_HEALTHY, endpoints.healthy),
        Route(_READY, endpoints.ready),
        Route(_RELOAD, endpoints.reload, methods=["POST"]),
        Route(_DISCOVERY, endpoints.discovery),
    ]
    return _Shell(Router(routes, redirect_slashes=False), authentication)


class _Shell:
    """Let users pass, add the security headers to every answer, and turn an exception into a 500 that tells nothing."""

    def __init__(self, app: ASGIApp, authentication: Authentication) -> None:
        self._app = app
        self._authentication = authentication

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_shelled(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            app = self._app
            if not await self._authentication.allows(Headers(scope=scope).get("authorization", "")):
                app = PlainTextResponse("Unauthorized\n", 401, {"WWW-Authenticate": _CHALLENGE})
            await app(scope, receive, send_shelled)
        except Exception as error:  # noqa: BLE001 - the last resort: whatever failed, its text may hold anything
            _log.error("request failed", error=type(error).__name__)
            if not started:
                await PlainTextResponse("internal error\n", 500)(scope, receive, send_shelled)


@dataclass
class _Endpoints:
    site: Site
    telemetry_path: str
    do_reload: Callable[[], Awaitable[None]] | None
    timeout_offset: float
    now: Callable[[], float]

    async def metrics(self, request: Request) -> Response:
        query = parse_qs(request.scope["query_string"].decode("utf-8", "replace"), keep_blank_values=True)
        names = frozenset(query["workspace"]) if "workspace" in query else None
        if names and not names <= {workspace.name for workspace in self.site.views()}:
            return PlainTextResponse("unknown workspace\n", 404)
        openmetrics = prefers_openmetrics(",".join(request.headers.getlist("accept")))
        timeout = scrape_timeout(request.headers.get("x-prometheus-scrape-timeout-seconds"), self.timeout_offset)
        body = await self.site.scrape(names, timeout, openmetrics, seen=request.method != "HEAD")
        headers = {"Content-Type": OPENMETRICS if openmetrics else TEXT, "Vary": "Accept, Accept-Encoding"}
        if allows_gzip(",".join(request.headers.getlist("accept-encoding"))):
            headers["Content-Encoding"] = "gzip"
            body = await asyncio.to_thread(gzip.compress, body, 6, mtime=0)
        return Response(body, headers=headers)

    async def healthy(self, _request: Request) -> Response:
        return PlainTextResponse("healthy\n")

    async def ready(self, _request: Request) -> Response:
        return PlainTextResponse("ready\n") if self.site.ready() else PlainTextResponse("not ready\n", 503)

    async def reload(self, _request: Request) -> Response:
        if not self.do_reload:
            return PlainTextResponse("reloading over HTTP needs --web.enable-lifecycle\n", 403)
        try:
            await self.do_reload()
        except ConfigError as error:
            return PlainTextResponse(f"{error}\n", 500)
        return PlainTextResponse("reloaded\n")

    async def discovery(self, request: Request) -> Response:
        host = target_host(request.headers, request.scope.get("server"))
        labels = {} if self.telemetry_path == "/metrics" else {"__metrics_path__": self.telemetry_path}
        if request.scope["scheme"] == "https":
            labels["__scheme__"] = "https"
        return JSONResponse(
            [
                {
                    "targets": [host],
                    "labels": {"__param_workspace": one.name, "instance": f"{host}/{one.name}"} | labels,
                }
                for one in self.site.views()
            ]
        )

    async def status(self, request: Request) -> Response:
        paused = request.scope["query_string"] == b"pause"
        views, exporter, metrics = self.site.views(), self.site.exporter_view(), self.telemetry_path.lstrip("/")
        page = await asyncio.to_thread(render_page, views, exporter, metrics=metrics, now=self.now(), paused=paused)
        return HTMLResponse(page, headers={} if paused else {"Refresh": str(RENEWED_EVERY)})


def scrape_timeout(header: str | None, offset: float) -> float:
    """Return how many seconds an answer may take, from the header in which Prometheus tells its own timeout.

    A missing header, or one that is no positive finite number, means 10 s. `offset` seconds are taken off, but never
    more than half (design section 3).
    """
    try:
        value = float(header or "")
    except ValueError:
        value = math.nan
    seconds = min(max(value, 0.001), _LONGEST_SCRAPE_TIMEOUT) if 0 < value < math.inf else _SCRAPE_TIMEOUT
    return max(seconds - offset, seconds / 2)


def prefers_openmetrics(accept: str) -> bool:
    """Tell whether an `Accept` header names OpenMetrics and does not like it less than the classic text format."""
    weights = _weights(accept)
    text = next((weights[name] for name in ("text/plain", "text/*", "*/*") if name in weights), 0.0)
    return weights.get("application/openmetrics-text", 0.0) >= max(text, 0.001)


def allows_gzip(accept_encoding: str) -> bool:
    """Tell whether an `Accept-Encoding` header allows gzip."""
    weights = _weights(accept_encoding)
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0


def _weights(header: str) -> dict[str, float]:
    """Return the highest weight of each thing named in an `Accept` or `Accept-Encoding` header, 0 for a broken one."""
    weights: dict[str, float] = {}
    for item in header.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        weights[name] = max(weights.get(name, 0.0), _weight(parameters))
    return weights


def _weight(parameters: Iterable[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            return float(value) if re.fullmatch(r"\s*(0(\.[0-9]*)?|1(\.0*)?)", value) else 0.0
    return 1.0


def target_host(headers: Headers, server: tuple[str, str | int] | None) -> str:
    """Return under which `HOST:PORT` a client reached us: its `Host` header if that is one, else where we listen."""
    host = headers.get("host", "")
    if _HOST.fullmatch(host):
        return host
    address, port = server or ("localhost", 9877)
    return f"{local_host(address)}:{port}"
