"""Calls by `requests` that end in time, or soon after somebody gave them up.

The timeouts of requests are per read, so a server that sends a byte now and then gets past them. Here each wait gets
what is left of the time of the whole call. A look-up of a name cannot be broken off: it runs in a thread of its own,
and what ends is the waiting for it.
"""

import io
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import lru_cache, partial
from http.client import HTTPResponse
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidProxyURL, InvalidURL
from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError

from creatify_exporter.config import LOOPBACK

T = TypeVar("T")

_CONNECT_TIMEOUT = 10.0
_BUFFER = 64 * 1024  # bytes for each read from a socket
_GLANCE = 1.0  # seconds until a wait notices that its call was given up

# Its warnings quote what a server sent.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)


class Call:
    """The time and the connections of one piece of work, in one thread; any other may set `given_up`.

    Reads no ~/.netrc, keeps no cookies, and follows no redirect, as a session of requests would: credentials must not
    travel. `peer` names the host and port that it deals with at the moment.
    """

    def __init__(self, seconds: float, headers: Mapping[str, str], authorities: str, given_up: threading.Event) -> None:
        self.peer = self.target = "the API"
        self.given_up = given_up
        self._ends = time.monotonic() + seconds
        self._headers = headers
        self._adapter = _Adapter(self, authorities)

    def left(self) -> float:
        """Return the seconds left, above 0; raise TimeoutError if there are none or the call was given up."""
        left = self._ends - time.monotonic()
        if left <= 0 or self.given_up.is_set():
            raise TimeoutError
        return left

    def read(self, connection: Any, step: Callable[[], T]) -> T:
        """Return what `step` reads from a socket, waiting while the call lasts; raise TimeoutError at its end."""
        while True:
            left = self.left()
            connection.settimeout(min(left, _GLANCE))
            try:
                return step()
            except TimeoutError:
                continue
            finally:
                connection.settimeout(left)  # for the TLS handshake after a proxy's answer

    def get(self, url: str) -> requests.Response:
        """Send a GET request and return the answer, its body unread; raise what the libraries raise."""
        left, parts = self.left(), urlsplit(url)
        self.peer = self.target = f"{parts.hostname}:{parts.port or {'http': 80}.get(parts.scheme, 443)}"
        request = requests.Request("GET", url, headers=self._headers).prepare()
        local = parts.scheme == "http" and LOOPBACK.fullmatch(parts.hostname or "")
        try:
            return self._adapter.send(
                request, stream=True, timeout=left, proxies={} if local else get_environ_proxies(url)
            )
        except InvalidURL:
            raise InvalidProxyURL from None

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        self._adapter.close()


_looking_up = threading.Lock()
_look_ups: dict[str, Future[list[str]]] = {}


def _look_up(host: str) -> Future[list[str]]:
    """Look up a name in a thread that all who ask for it meanwhile share."""
    with _looking_up:
        look_up = _look_ups.get(host)
        if look_up is None:
            look_up = Future()
            threading.Thread(target=_resolve, args=(host, look_up), name=f"look-up of {host}", daemon=True).start()
            _look_ups[host] = look_up  # not before: without a thread it would never end
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


class _Reader(io.RawIOBase):
    """Reads from a socket while its call lasts."""

    def __init__(self, call: Call, connection: Any, file: io.RawIOBase) -> None:
        self._call = call
        self._socket = connection
        self._file = file  # keeps the socket open

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._call.read(self._socket, partial(self._socket.recv_into, buffer)))

    def close(self) -> None:
        self._file.close()
        super().close()


class _Response(HTTPResponse):
    """An answer whose interim ones (103 Early Hints and others) were skipped; http.client skips only 100."""

    def __init__(self, call: Call, connection: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(connection, *args, **kwargs)
        self.fp = io.BufferedReader(_Reader(call, connection, self.fp.detach()), _BUFFER)

    def begin(self) -> None:
        super().begin()
        while self.status in range(102, 200):
            self.headers = cast(Any, None)  # or it would not read another head
            super().begin()


class _HTTPConnection(HTTPConnection):
    """A connection of one call."""

    server_hostname: str | None

    def __init__(self, call: Call, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.call = call
        self.response_class = cast(Any, partial(_Response, call))

    def connect(self) -> None:
        """Try one address after the other; urllib3 would give each the whole time."""
        call, name = self.call, self.host
        call.peer = f"{name}:{self.port}"
        if not self.proxy:
            self.server_hostname = name
        error = ConnectTimeoutError()
        for address in self._addresses_to_try(name):
            # Half of it is for the TLS handshake.
            self.host, self.timeout = address, min(call.left() / 2, _CONNECT_TIMEOUT)
            try:
                return super().connect()
            except ConnectTimeoutError as failure:  # or refused, or not reachable
                error = failure
            finally:
                self.host = name
                if self.has_connected_to_proxy:
                    call.peer = call.target
        raise error

    def _addresses_to_try(self, name: str) -> list[str]:
        """Return the addresses of `name`, or `name` itself for a proxy with TLS."""
        with suppress(socket.gaierror):
            return _addresses(name, socket.AI_NUMERICHOST)
        look_up = _look_up(name)
        while not look_up.done():
            wait([look_up], min(self.call.left(), _GLANCE))
        addresses = look_up.result()
        # The certificate of a proxy is checked by the name that is connected to.
        return [name] if self.proxy and self.proxy.scheme == "https" else addresses


class _HTTPSConnection(_HTTPConnection, HTTPSConnection):
    """The same with TLS."""

    def _connect_tls_proxy(self, *args: Any) -> ssl.SSLSocket:
        connection = super()._connect_tls_proxy(*args)
        cast(_TlsSocket, connection).call = self.call
        return connection


class _TlsSocket(ssl.SSLSocket):
    """A connection to a proxy reads while its call lasts: for TLS within TLS urllib3 reads until a record is whole."""

    call: Call | None = None

    def recv(self, *args: Any) -> bytes:
        step = partial(super().recv, *args)
        return self.call.read(self, step) if self.call else step()


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

    def __init__(self, call: Call, authorities: str) -> None:
        super().__init__()
        self._call = call
        self._authorities = authorities

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        secure = pool.scheme == "https"
        pool.ConnectionCls = partial(_HTTPSConnection if secure else _HTTPConnection, self._call)
        if secure:
            pool.conn_kw["ssl_context"] = tls_context(self._authorities)
        return pool

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        scheme = proxy.lower().partition(":")[0]
        if scheme not in ("http", "https"):
            raise InvalidProxyURL
        tls = tls_context(self._authorities) if scheme == "https" else None
        return super().proxy_manager_for(proxy, proxy_ssl_context=tls, **kwargs)

    def cert_verify(self, *args: Any, **kwargs: Any) -> None:
        """Leave all to the context; requests would load the usual authorities again for each connection."""
