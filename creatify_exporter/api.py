"""The Creatify API: streams the tasks of one workspace; every failure is an ApiError with a cause."""

import functools
import http.client
import json
import logging
import math
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urldefrag, urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.connection import HTTPConnection, HTTPSConnection

from creatify_exporter import __version__
from creatify_exporter.stream import MalformedBodyError, Page
from creatify_exporter.tasks import Record

CAUSES = ("auth", "rate_limited", "http", "timeout", "connection", "payload", "too_large", "ledger")

_CONNECT_TIMEOUT = 10.0
_BALANCE_TIMEOUT = 10.0
_MAX_BALANCE_SIZE = 64 * 1024
_READ_SIZE = 256 * 1024
_DECIMAL = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{0,40})?", re.ASCII)
_PLAIN_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,100}", re.ASCII)
_LIBRARY_ERRORS = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)

# Its warnings quote what a server sent.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)


class ApiError(Exception):
    """Tell why the API could not be read.

    `cause` is one of CAUSES, `status` the HTTP status if there was one, `retry_after` seconds from now as the server
    asked for with 429 or 503. The text holds no credential, no URL but scheme and host, and nothing from a body.
    """

    def __init__(
        self, cause: str, message: str, *, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.status = status
        self.retry_after = retry_after


class Client:
    """Read the listing and the balance of one workspace, each at most once at a time, also in two threads at once.

    `timeout` is in seconds for a whole listing, `max_response_size` in bytes after decompression; `on_request` is told
    the endpoint and the HTTP status (or "error") of each request sent.
    """

    def __init__(
        self,
        *,
        api_id: str,
        api_key: str,
        base_url: str,
        timeout: float,
        max_response_size: int,
        ca_file: str | None,
        on_request: Callable[[str, str], None],
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout = timeout
        self._max_response_size = max_response_size
        self._on_request = on_request
        self._calls: set[_Call] = set()
        self._session = _session(api_id, api_key, ca_file)

    def tasks(self) -> "TaskStream":
        """Return a fresh stream over the records of all pages; nothing is sent before it is iterated."""
        return TaskStream(self._pages)

    def remaining_credits(self) -> float:
        """Return the workspace's balance; raise ApiError."""
        body = bytearray()
        url = self._base_url + "/api/remaining_credits/"
        with (
            self._call(min(self._timeout, _BALANCE_TIMEOUT)) as call,
            closing(self._body(call, "remaining_credits", url)) as chunks,
        ):
            for chunk in chunks:
                body += chunk
                if len(body) > _MAX_BALANCE_SIZE:
                    raise ApiError("payload", "the answer is too long for a balance")
        return _balance(body)

    def abort(self) -> None:
        """Break off what is running; it fails with cause "connection"."""
        for call in list(self._calls):
            call.break_off("connection")

    def close(self) -> None:
        """Close the idle connections."""
        self._session.close()

    def _pages(self, stream: "TaskStream") -> Iterator[list[Record | None]]:
        url: str | None = self._base_url + "/sse/text_generator/"
        seen = set()
        with self._call(self._timeout) as call:
            while url:
                seen.add(url)
                with closing(self._body(call, "text_generator", url)) as chunks:
                    counted = self._counted(chunks, stream)
                    page = Page(counted)
                    try:
                        yield from page
                    except MalformedBodyError as error:
                        _read_on(counted)
                        raise ApiError("payload", f"the list is malformed: {error}") from None
                url = page.next and _next_url(url, page.next)
                if url in seen:
                    raise ApiError("payload", "the list links to a page that was read already")

    def _counted(self, chunks: Iterator[bytes], stream: "TaskStream") -> Iterator[bytes]:
        for chunk in chunks:
            stream.size += len(chunk)
            if stream.size > self._max_response_size:
                raise ApiError("too_large", f"the list is larger than {self._max_response_size} bytes")
            yield chunk

    @contextmanager
    def _call(self, seconds: float) -> "Iterator[_Call]":
        call = _Call(seconds)
        self._calls.add(call)
        try:
            yield call
        finally:
            self._calls.discard(call)
            call.end()

    def _body(self, call: "_Call", endpoint: str, url: str) -> Generator[bytes, None, None]:
        """Yield the decoded body of a 200, as it arrives; raise ApiError."""
        response = self._get(call, endpoint, url)
        try:
            if response.status_code != 200:
                raise _refusal(response)
            # Of a gzip body too, no piece is longer than the given size.
            for chunk in response.raw.stream(_READ_SIZE, decode_content=True):
                call.check()
                yield chunk
            call.check()
        except _LIBRARY_ERRORS as error:
            raise call.failure() or _failure(error) from None
        finally:
            # A connection whose body was read to the end went back to the pool already; any other cannot be used again.
            response.close()
            call.watch(None)

    def _get(self, call: "_Call", endpoint: str, url: str) -> requests.Response:
        """Send one request, and once more if a kept-alive connection turns out to be closed."""
        may_repeat = True
        while True:
            call.check()
            call.reused = False
            code, left = "error", call.left()
            token = _current_call.set(call)
            try:
                response = self._session.get(url, stream=True, timeout=(min(left, _CONNECT_TIMEOUT), left))
                code = str(response.status_code)
            except _LIBRARY_ERRORS as error:
                closed = call.reused and any(isinstance(part, ConnectionError) for part in _related(error))
                if call.failure() or not (closed and may_repeat):
                    raise call.failure() or _failure(error) from None
                may_repeat = False
            else:
                return response
            finally:
                _current_call.reset(token)
                self._on_request(endpoint, code)


class TaskStream:
    """Iterate once over a listing's batches of records, all pages in sequence; raise ApiError.

    `size` is the number of decoded bytes so far.
    """

    def __init__(self, pages: "Callable[[TaskStream], Iterator[list[Record | None]]]") -> None:
        self.size = 0
        self._pages = pages

    def __iter__(self) -> Iterator[list[Record | None]]:
        return self._pages(self)


class _Call:
    """One listing or one look at the balance: its deadline, and its socket, to be broken off from outside.

    The timeouts of requests are per read; a server that drips bytes gets past them, and never past a shut socket.
    Only looking up a host name and trying a second address of it cannot be broken off.
    """

    def __init__(self, seconds: float) -> None:
        self.reused = False
        self._ends = time.monotonic() + seconds
        self._broken: str | None = None
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self.break_off, ["timeout"])
        self._timer.daemon = True
        self._timer.start()

    def left(self) -> float:
        """Return the seconds left, at least a little above 0."""
        return max(self._ends - time.monotonic(), 0.001)

    def watch(self, connection: socket.socket | None) -> None:
        """Make `connection` the one to shut; raise TimeoutError if it comes too late."""
        self._socket = connection
        if connection and self._broken:
            raise TimeoutError

    def break_off(self, cause: str) -> None:
        """Shut the socket, so that whatever waits for it fails."""
        self._broken = self._broken or cause
        if connection := self._socket:
            with suppress(OSError):
                # Not SSLSocket's own method: that would pull the TLS state from under a read in the other thread.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def failure(self) -> ApiError | None:
        """Return why the call is over before its answer is, None if it is not."""
        if self._broken == "timeout":
            return ApiError("timeout", "the API did not answer completely in time")
        return ApiError("connection", "the exporter broke off the request") if self._broken else None

    def check(self) -> None:
        """Raise ApiError if the call is over before its answer is."""
        if failure := self.failure():
            raise failure

    def end(self) -> None:
        """Stop the clock."""
        self._timer.cancel()


_current_call: ContextVar[_Call] = ContextVar("current_call")


class _HTTPConnection(HTTPConnection):
    """Show the current call each socket before it is used."""

    _sock: socket.socket | None = None
    _used = False

    @property
    def sock(self) -> socket.socket | None:
        return self._sock

    @sock.setter
    def sock(self, value: socket.socket | None) -> None:
        self._sock = value
        if isinstance(value, socket.socket):
            call = _current_call.get()
            self._used = False
            # The limit of a whole TLS handshake, during which nobody else can get at the socket.
            value.settimeout(min(call.left(), _CONNECT_TIMEOUT))
            call.watch(value)

    def request(self, *args: Any, **kwargs: Any) -> None:
        call = _current_call.get()
        call.reused = self._used
        if isinstance(self._sock, socket.socket):
            call.watch(self._sock)
        super().request(*args, **kwargs)
        self._used = True


class _HTTPSConnection(_HTTPConnection, HTTPSConnection):
    """The same with TLS."""


class _Adapter(HTTPAdapter):
    """Trust the usual authorities and those of `ca_file`, and make connections that can be broken off."""

    def __init__(self, ca_file: str | None) -> None:
        super().__init__()
        self._tls = _tls_context(ca_file, os.stat(ca_file).st_mtime_ns if ca_file else 0)

    def build_connection_pool_key_attributes(self, *args: Any, **kwargs: Any) -> Any:
        host, pool = super().build_connection_pool_key_attributes(*args, **kwargs)
        return host, {**pool, "ssl_context": self._tls}

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _HTTPSConnection if pool.scheme == "https" else _HTTPConnection
        return pool

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return super().proxy_manager_for(proxy, proxy_ssl_context=self._tls, **kwargs)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leave all to the context; requests would load the usual authorities again for each connection."""


@functools.lru_cache(maxsize=4)
def _tls_context(ca_file: str | None, changed: int) -> ssl.SSLContext:
    """Return one context for all workspaces, as authorities take time to load; `changed` is part of the key."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(DEFAULT_CA_BUNDLE_PATH)
    if ca_file:
        context.load_verify_locations(ca_file)
    return context


class _Session(requests.Session):
    """Follow no redirect: credentials must not travel, and requests would read the whole body of one first."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


def _session(api_id: str, api_key: str, ca_file: str | None) -> requests.Session:
    session = _Session()
    session.headers = requests.structures.CaseInsensitiveDict({"X-API-ID": api_id, "X-API-KEY": api_key})
    session.headers["User-Agent"] = f"creatify-exporter/{__version__}"
    session.headers["Accept"] = "application/json"
    session.headers["Accept-Encoding"] = "gzip"
    session.auth = lambda request: request  # or requests would look into ~/.netrc
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    adapter = _Adapter(ca_file)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _refusal(response: requests.Response) -> ApiError:
    """Say what an answer other than 200 means, by its status alone."""
    status, wait = response.status_code, None
    cause, text = "http", f"the API answered HTTP {status}"
    if status in (401, 403):
        cause, text = "auth", f"{text}: check api_id and api_key"
    elif 300 <= status < 400:
        text += f", a redirect{_origin_text(response)}, which is not followed: set api.base_url to where the API is"
    elif status in (429, 503):
        cause = "rate_limited" if status == 429 else "http"
        wait = _retry_after(response.headers.get("Retry-After"))
    return ApiError(cause, text, status=status, retry_after=wait)


def _origin_text(response: requests.Response) -> str:
    with suppress(ValueError, KeyError):
        target = urlsplit(urljoin(response.url, response.headers["Location"]))
        host = f"{target.hostname}:{target.port}" if target.port else str(target.hostname)
        if target.scheme in ("http", "https") and _PLAIN_HOST.fullmatch(host):
            return f" to {target.scheme}://{host}"
    return ""


def _retry_after(value: str | None) -> float | None:
    """Return the seconds from now that a Retry-After header means, None if it means nothing."""
    text = (value or "").strip()
    with suppress(ValueError, OverflowError, TypeError, IndexError):
        if text[:1] != "-" and _DECIMAL.fullmatch(text):
            return float(text)
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return None


def _read_on(chunks: Iterator[bytes]) -> None:
    """Read the rest of a malformed body: one that is too large is that in the first place, whatever it consists of."""
    try:
        for _ in chunks:
            pass
    except ApiError as error:
        if error.cause == "too_large":
            raise error from None


def _next_url(url: str, link: str) -> str:
    """Resolve a link to the next page; raise ApiError if it leads to another origin."""
    try:
        target = urldefrag(urljoin(url, link)).url
        if _origin(target) == _origin(url):
            return target
    except ValueError:
        pass
    raise ApiError("payload", "the list links to a page on another origin")


def _origin(url: str) -> tuple[str, str | None, int | None, bool]:
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default, "@" in parts.netloc


def _balance(body: bytearray) -> float:
    try:
        answer = json.loads(body)
        value = answer["remaining_credits"]
        if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        pass
    raise ApiError("payload", "the balance is no JSON object with a number remaining_credits")


_TIMEOUTS = (TimeoutError, requests.Timeout, urllib3.exceptions.ReadTimeoutError)
_FAILURES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, str], ...] = (
    (_TIMEOUTS, "timeout", "the API did not answer in time"),
    (urllib3.exceptions.DecodeError, "payload", "the body of the answer cannot be decompressed"),
    (http.client.IncompleteRead, "payload", "the body of the answer is cut short"),
    (urllib3.exceptions.ProxyError, "connection", "the proxy of the environment does not lead to the API"),
)


def _related(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all those it was made of; libraries hide them in arguments and reasons."""
    found, waiting = set(), [error]
    while waiting:
        error = waiting.pop()
        if id(error) not in found:
            found.add(id(error))
            yield error
            parts = (*error.args, getattr(error, "reason", None), error.__cause__)
            waiting.extend(part for part in parts if isinstance(part, BaseException))


def _failure(error: Exception) -> ApiError:
    """Say what an exception of the libraries means, without its text: that may quote URLs, headers and bodies."""
    parts = list(_related(error))
    for kinds, cause, message in _FAILURES:
        if any(isinstance(part, kinds) for part in parts):
            return ApiError(cause, message)
    if parts == [error] and isinstance(error, urllib3.exceptions.ProtocolError):
        return ApiError("payload", "the body of the answer ends before its last chunk")
    detail = type(parts[-1]).__name__
    for part in parts:
        if isinstance(part, ssl.SSLCertVerificationError):
            detail = f"certificate not trusted, {part.verify_message}"
        elif isinstance(part, OSError) and part.strerror:
            detail = part.strerror
    return ApiError("connection", f"the connection to the API failed: {detail}")
