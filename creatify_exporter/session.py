"""Calls by requests that end in time, or when another thread breaks them off.

The timeouts of requests are per read, so a server that sends a byte now and then gets past them. Here a call has one
deadline, and what waits at its end finds its socket shut. A look-up of a name cannot be broken off: it runs in a thread
of its own, and what ends is the waiting for it.
"""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache
from http.client import HTTPResponse
from http.cookiejar import DefaultCookiePolicy
from typing import Any, cast
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies, select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError
from urllib3.util import parse_url

from creatify_exporter.config import LOOPBACK

_CONNECT_TIMEOUT = 10.0
_AGAIN = 0.05

# Its warnings quote what a server sent.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)


class Call:
    """The time and the session of one piece of work, for one thread, but for `break_off`.

    `peer` names the host and port that it deals with at the moment. `over` is done once the call was broken off, and
    says why: "timeout" or "abort".
    """

    def __init__(self, seconds: float, headers: Mapping[str, str], authorities: str) -> None:
        self.peer = self.target = "the API"
        self.ends = time.monotonic() + seconds
        self.over: Future[str] = Future()
        self.connection: HTTPConnection | None = None
        self.socket: Any = None
        self._session = _Session(headers, authorities)

    def left(self) -> float:
        """Return the seconds left, above 0; raise TimeoutError if the call is over, for whatever reason."""
        left = self.ends - time.monotonic()
        if left <= 0:
            self.break_off("timeout")
        if self.over.done():
            raise TimeoutError
        return left

    def get(self, url: str) -> requests.Response:
        """Send a GET request and return the answer, its body unread; raise what the libraries raise."""
        left, token = self.left(), _current.set(self)
        parts = urlsplit(url)
        self.peer = self.target = f"{parts.hostname}:{parts.port or {'http': 80}.get(parts.scheme, 443)}"
        try:
            response = self._session.get(
                url, stream=True, timeout=(min(left, _CONNECT_TIMEOUT), left), proxies=_proxies(url)
            )
        finally:
            _current.reset(token)
        try:
            self.left()  # a socket that was shut looks like the end of the headers
        except TimeoutError:
            response.close()
            raise
        return response

    def watch(self, connection: Any) -> None:
        """Make `connection` the socket that is shut when the call is broken off."""
        self.socket = connection
        connection.settimeout(min(self.left(), _CONNECT_TIMEOUT))

    def break_off(self, why: str) -> None:
        """Make the waiting thread fail, and every later attempt; for any thread."""
        with suppress(InvalidStateError):
            self.over.set_result(why)
        self.ends = 0.0
        connection = self.socket or (self.connection and self.connection.sock)
        if connection:
            with suppress(OSError):
                # Not SSLSocket's own method: that would change the TLS state under a read in the other thread.
                # TLS within a proxy's TLS is no socket itself.
                socket.socket.shutdown(getattr(connection, "socket", connection), socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        self._session.close()


_current: ContextVar[Call] = ContextVar("current_call")


class Watch:
    """Breaks off the calls whose time is over, from one thread for all, which lives as long as there are calls."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: set[Call] = set()
        self._runs = False

    def add(self, call: Call) -> None:
        """Break off `call` when its time is over."""
        with self._changed:
            self._calls.add(call)
            self._changed.notify()
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="deadlines", daemon=True).start()

    def remove(self, call: Call) -> None:
        """Take note that `call` ended by itself."""
        with self._changed:
            self._calls.discard(call)
            if not self._calls:
                self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self._calls:
                first = min(call.ends for call in self._calls)
                self._changed.wait(max(first - time.monotonic(), _AGAIN))
                for call in self._calls:
                    if call.ends <= time.monotonic():
                        # Until it ends: its socket may only be there now.
                        call.break_off("timeout")
            self._runs = False


_looking_up = threading.Lock()
_look_ups: dict[str, Future[list[str]]] = {}


def _look_up(host: str) -> Future[list[str]]:
    """Look up a name in a thread that all who ask for it meanwhile share."""
    with _looking_up:
        look_up = _look_ups.get(host)
        if look_up is None:
            look_up = _look_ups[host] = Future()
            threading.Thread(target=_resolve, args=(host, look_up), name=f"look-up of {host}", daemon=True).start()
        return look_up


def _resolve(host: str, look_up: Future[list[str]]) -> None:
    try:
        look_up.set_result(_addresses(host))
    except (OSError, UnicodeError) as error:
        look_up.set_exception(error)
    finally:
        with _looking_up:
            del _look_ups[host]


def _addresses(host: str, flags: int = 0) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _Response(HTTPResponse):
    """An answer whose interim ones (103 Early Hints and others) were skipped; http.client skips only 100."""

    def begin(self) -> None:
        super().begin()
        while self.status in range(102, 200):
            self.headers = cast(Any, None)  # or it would not read another head
            super().begin()


class _HTTPConnection(HTTPConnection):
    """A connection of the current call."""

    response_class = _Response

    def connect(self) -> None:
        call, name = _current.get(), self.host
        call.connection, call.socket, call.peer = self, None, f"{name}:{self.port}"
        try:
            self._connect(call, self._places(call, name))
        finally:
            self.host = name
            if self.has_connected_to_proxy:
                call.peer = call.target
        call.watch(self.sock)

    def _connect(self, call: Call, places: list[str]) -> None:
        """Try one place after the other; urllib3 would give each the whole time."""
        error = ConnectTimeoutError()
        for place in places:
            self.host, self.timeout = place, min(call.left(), _CONNECT_TIMEOUT)
            try:
                return super().connect()
            except ConnectTimeoutError as failure:  # or refused, or not reachable
                error = failure
        raise error

    def _places(self, call: Call, name: str) -> list[str]:
        """Return the addresses of `name`."""
        with suppress(socket.gaierror):
            return _addresses(name, socket.AI_NUMERICHOST)
        look_up = _look_up(name)
        wait(cast(list[Future[Any]], [look_up, call.over]), call.left(), FIRST_COMPLETED)
        call.left()
        places = look_up.result(0)
        # The certificate of a proxy is checked by the name that is connected to.
        return [name] if self.proxy and self.proxy.scheme == "https" else places


class _HTTPSConnection(_HTTPConnection, HTTPSConnection):
    """The same with TLS."""

    def connect(self) -> None:
        if not self.proxy:
            self.server_hostname = self.host
        super().connect()


class _TlsSocket(ssl.SSLSocket):
    """Can be shut during its handshake, too."""

    def do_handshake(self, block: bool = False) -> None:
        _current.get().watch(self)
        super().do_handshake(block)


def tls_context(authorities: str) -> ssl.SSLContext:
    """Return the context that trusts the usual authorities and these, in PEM; shared, as loading takes time."""
    with _loading:
        return _load_context(authorities)


_loading = threading.Lock()


@lru_cache(maxsize=4)
def _load_context(authorities: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _TlsSocket
    context.load_verify_locations(DEFAULT_CA_BUNDLE_PATH)
    if authorities:
        context.load_verify_locations(cadata=authorities)
    return context


class _Adapter(HTTPAdapter):
    """Makes connections of ours, with our TLS context."""

    def __init__(self, authorities: str) -> None:
        super().__init__()
        self._authorities = authorities

    def build_connection_pool_key_attributes(self, *args: Any, **kwargs: Any) -> Any:
        host, _ = super().build_connection_pool_key_attributes(*args, **kwargs)
        return host, {"ssl_context": tls_context(self._authorities)} if host["scheme"] == "https" else {}

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _HTTPSConnection if pool.scheme == "https" else _HTTPConnection
        return pool

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        tls = {"proxy_ssl_context": tls_context(self._authorities)} if proxy.lower().startswith("https:") else {}
        return super().proxy_manager_for(proxy, **tls, **kwargs)

    def cert_verify(self, *args: Any, **kwargs: Any) -> None:
        """Leave all to the context; requests would load the usual authorities again for each connection."""


class _Session(requests.Session):
    """Reads no ~/.netrc, keeps no cookies, and follows no redirect: credentials must not travel."""

    def __init__(self, headers: Mapping[str, str], authorities: str) -> None:
        super().__init__()
        self.trust_env = False
        self.headers = requests.structures.CaseInsensitiveDict(headers)
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(authorities))

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Find none; even if it may not follow one, requests would read its whole body."""


def _proxies(url: str) -> dict[str, str]:
    """Return the proxies of the environment for `url`; raise InvalidProxyURL if we cannot use the one."""
    parts = urlsplit(url)
    if parts.scheme == "http" and LOOPBACK.fullmatch(parts.hostname or ""):
        return {}
    proxies = get_environ_proxies(url)
    if proxy := select_proxy(url, proxies):
        with suppress(ValueError):
            place = parse_url(proxy if "://" in proxy else f"http://{proxy}")
            if place.scheme in ("http", "https") and place.host and place.port != 0:
                return proxies
        raise requests.exceptions.InvalidProxyURL
    return proxies
