"""One connection to one server, of which every wait ends at a deadline or when another thread breaks it off.

The timeouts of a socket are per read, so a server that sends a byte now and then gets past them. Here each wait gets
only what is left of the time of the whole call: name look-up, connecting, TLS handshake, proxy and answer.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from base64 import b64encode
from contextlib import suppress
from functools import lru_cache
from typing import Any, cast
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi

_CONNECT_TIMEOUT = 10.0
_URL_CHARACTERS = "/?%:@!$&'()*+,;=~[]"
_PORTS = {"http": 80, "https": 443}


class AbortedError(Exception):
    """Say that another thread broke off the call."""


class ProxyError(Exception):
    """Say that the proxy of the environment cannot be used, or did not connect."""


class Call:
    """The time and the connection of one piece of work with one server.

    For one thread, but for `abort`. `peer` names the host and port that it deals with at the moment, `aborted` tells
    whether it was broken off.
    """

    def __init__(self, seconds: float) -> None:
        self.peer = ""
        self._ends = time.monotonic() + seconds
        self.aborted = False
        self._socket: socket.socket | None = None
        self._connection: http.client.HTTPConnection | None = None

    def left(self) -> float:
        """Return the seconds left, above 0; raise TimeoutError or AbortedError."""
        if self.aborted:
            raise AbortedError
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def abort(self) -> None:
        """Make the waiting thread fail, and every later attempt; for any thread."""
        self.aborted = True
        with _looked_up:
            _looked_up.notify_all()
        if connection := self._socket:
            with suppress(OSError):
                # Not SSLSocket's own method: that would change the TLS state under a read in the other thread.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._connection:
            self._connection.close()
        if self._socket:
            self._socket.close()
        self._connection = self._socket = None

    def get(self, url: str, headers: dict[str, str], authorities: str) -> http.client.HTTPResponse:
        """Send a GET request and return the answer's head; its body is read from the answer.

        `authorities` are PEM certificates that are trusted besides the usual ones. Raises AbortedError, ProxyError
        and what the standard library raises: OSError, http.client.HTTPException, ValueError.
        """
        self.left()
        parts = urlsplit(url)
        proxy = _proxy(parts)
        target = quote(f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}", safe=_URL_CHARACTERS)
        if proxy and parts.scheme == "http":
            target, headers = f"http://{parts.netloc}{target}", headers | _authorization(proxy)
        if self._connection is None or self._connection.sock is None:
            self.close()
            self._connection = http.client.HTTPConnection(parts.hostname or "")
            self._connection.auto_open = 0
            self._connection.response_class = _Response
            self._connection.sock = self._open(parts, proxy, authorities)
        self._connection.request("GET", target, headers=headers | {"Host": parts.netloc})
        return self._connection.getresponse()

    def _open(self, url: SplitResult, proxy: SplitResult | None, authorities: str) -> Any:
        host, port = _place(url)
        connection: Any = self._connect(*_place(proxy or url))
        if proxy and proxy.scheme == "https":
            connection = self._secure(connection, proxy.hostname or "", authorities)
        if url.scheme == "http":
            return connection
        if proxy:
            _ask_for_tunnel(connection, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", proxy)
        self.peer = f"{host}:{port}"
        return self._secure(connection, host, authorities)

    def _connect(self, host: str, port: int) -> "_Socket":
        self.peer = f"{host}:{port}"
        error = OSError()
        for family, kind, protocol, _, address in self._addresses(host, port):
            seconds = min(self.left(), _CONNECT_TIMEOUT)
            connection = _Socket(family, kind, protocol)
            self._watch(connection, seconds)
            try:
                connection.connect(address)
            except OSError as failure:
                connection.close()
                error = failure
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
        raise error

    def _secure(self, connection: "_Socket", host: str, authorities: str) -> Any:
        """Return `connection` with TLS on it."""
        context = tls_context(authorities)
        if isinstance(connection, ssl.SSLSocket):
            # Only for a proxy that is itself reached by TLS, and only urllib3 can do it.
            from urllib3.util.ssltransport import SSLTransport

            return SSLTransport(connection, context, server_hostname=host)
        secured = context.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
        self._watch(secured, min(self.left(), _CONNECT_TIMEOUT))
        secured.do_handshake()
        return secured

    def _watch(self, connection: Any, timeout: float) -> None:
        connection.call = self
        connection.settimeout(timeout)
        self._socket = connection
        self.left()  # an abort may have come too early for this socket

    def _addresses(self, host: str, port: int) -> list[Any]:
        """Look up a name, which nothing can interrupt, in a thread that all who ask for this name share."""
        with suppress(socket.gaierror):
            return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
        with _looked_up:
            lookup = _lookups.get((host, port)) or _Lookup(host, port)
            done = _looked_up.wait_for(lambda: self.aborted or lookup.done, self.left())
        self.left()
        if not done:
            raise TimeoutError
        if lookup.error:
            raise type(lookup.error)(*lookup.error.args)
        return lookup.addresses


class _Lookup:
    """A look-up under way; what waits for it waits for `_looked_up`."""

    def __init__(self, host: str, port: int) -> None:
        self.done = False
        self.addresses: list[Any] = []
        self.error: OSError | UnicodeError | None = None
        self._key = (host, port)
        _lookups[self._key] = self
        threading.Thread(target=self._run, name=f"look-up of {host}", daemon=True).start()

    def _run(self) -> None:
        host, port = self._key
        try:
            self.addresses = list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            self.error = error
        with _looked_up:
            self.done = True
            del _lookups[self._key]
            _looked_up.notify_all()


_lookups: dict[tuple[str, int], _Lookup] = {}
_looked_up = threading.Condition()


class _Socket(socket.socket):
    """A socket whose reads together take no longer than its call has left."""

    call: Call

    def recv(self, *args: Any) -> bytes:
        self.settimeout(self.call.left())
        return super().recv(*args)

    def recv_into(self, *args: Any) -> int:
        self.settimeout(self.call.left())
        return super().recv_into(*args)


class _TlsSocket(_Socket, ssl.SSLSocket):
    """The same with TLS."""


class _Response(http.client.HTTPResponse):
    """An answer whose interim ones (103 Early Hints and others) were skipped; http.client skips only 100."""

    def begin(self) -> None:
        super().begin()
        while self.status in range(102, 200):
            self.headers = cast(Any, None)  # or it would not read another head
            super().begin()


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
    context.load_verify_locations(certifi.where())
    if authorities:
        context.load_verify_locations(cadata=authorities)
    return context


def _place(url: SplitResult) -> tuple[str, int]:
    return url.hostname or "", url.port or _PORTS[url.scheme]


def _proxy(url: SplitResult) -> SplitResult | None:
    """Return the proxy of the environment for `url`; raise ProxyError if it is not one that we can use."""
    host, port = _place(url)
    if url.scheme == "http" and _in_network(host, ["127.0.0.0/8", "::1"], name="localhost"):
        return None
    proxies = getproxies()
    text = proxies.get(url.scheme) or proxies.get("all")
    if not text or proxy_bypass(f"{host}:{port}") or _in_network(host, proxies.get("no", "").split(",")):
        return None
    try:
        proxy = urlsplit(text if "://" in text else f"http://{text}")
        if proxy.scheme in _PORTS and proxy.hostname and proxy.port != 0:
            return proxy
    except ValueError:
        pass
    raise ProxyError("is no http:// or https:// URL")


def _in_network(host: str, networks: list[str], name: str | None = None) -> bool:
    for network in networks:
        with suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(network.strip(), strict=False):
                return True
    return host == name


def _authorization(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + b64encode(user.encode()).decode()}


def _ask_for_tunnel(connection: _Socket, place: str, proxy: SplitResult) -> None:
    headers = {"Host": place} | _authorization(proxy)
    lines = [f"CONNECT {place} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    answer = _Response(connection, method="HEAD")  # no body follows
    try:
        answer.begin()
        if answer.status != 200:
            raise ProxyError(f"answered HTTP {answer.status}")
    finally:
        answer.close()
