"""The Creatify API: streams the tasks of one workspace, reads one task or the balance.

Every failure is an ApiError with a cause:

    auth          401, 403                       connection    name, refused, reset, closed, TLS, proxy
    rate_limited  429                            payload       cut short, not JSON, not what was asked for
    http          any other status but 200       too_large     over max_response_size
    timeout       not all there in time          ledger        (of the ledger, not raised here)
"""

import http
import json
import math
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC
from email.utils import parsedate_to_datetime
from http.client import HTTPException, IncompleteRead, RemoteDisconnected
from itertools import chain
from pathlib import Path
from urllib.parse import quote, urldefrag, urljoin, urlsplit

import requests
import urllib3

from creatify_exporter import __version__
from creatify_exporter.session import Call, Watch
from creatify_exporter.stream import MalformedBodyError, Page
from creatify_exporter.tasks import Record

CAUSES = ("auth", "rate_limited", "http", "timeout", "connection", "payload", "too_large", "ledger")

_LIST_PATH = "/sse/text_generator/"
_BALANCE_PATH = "/api/remaining_credits/"
_BALANCE_TIMEOUT = 10.0
_MAX_BALANCE_SIZE = 64 * 1024
_MAX_TASK_SIZE = 64 * 1024 * 1024
_READ_SIZE = 256 * 1024
_DECIMAL = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{0,40})?", re.ASCII)
_PLAIN_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,100}", re.ASCII)
_LIBRARY_ERRORS = (urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError)
_PLAIN_TYPE = re.compile(r"[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,60}", re.ASCII)

_watch = Watch()


class ApiError(Exception):
    """Tell why the API could not be read.

    `cause` is one of CAUSES, `status` the HTTP status if there was one, `retry_after` seconds from now as the server
    asked for with 429 or 503. The text holds no credential, no URL but scheme, host and port, and nothing from a body.
    """

    def __init__(
        self, cause: str, message: str, *, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.status = status
        self.retry_after = retry_after


class Client:
    """Read one workspace: a listing and then some of its tasks in one thread, the balance in another.

    `timeout` is in seconds for a whole listing with its tasks, `max_response_size` in bytes after decompression;
    `on_request` is told the endpoint and the HTTP status (or "error") of each request sent. Raises OSError if
    `ca_file` cannot be read.
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
        self._authorities = Path(ca_file).read_text("ascii", "ignore") if ca_file else ""
        self._on_request = on_request
        self._headers = {
            "X-API-ID": api_id,
            "X-API-KEY": api_key,
            "User-Agent": f"creatify-exporter/{__version__}",
            "Accept": "application/json",
            "Accept-Encoding": "gzip",
        }
        self._lock = threading.Lock()
        self._calls: set[Call] = set()
        self._listing: Call | None = None

    def tasks(self) -> "TaskStream":
        """Return a fresh stream over the records of all pages; nothing is sent before it is iterated."""
        return TaskStream(self._pages, self._max_response_size)

    def task(self, task_id: str) -> Record | None:
        """Return one task by its id, None if the API does not know it; raise ApiError.

        Runs on the connection of the newest listing and within what is left of its time.
        """
        url = f"{self._base_url}{_LIST_PATH}{quote(task_id, safe='')}/"
        meter = _Meter("the task", min(self._max_response_size, _MAX_TASK_SIZE))
        with self._working(self._listing or self._call(self._timeout)) as call:
            try:
                answer = self._get(call, "text_generator_task", url, meter)
            except ApiError as error:
                if error.status == http.HTTPStatus.NOT_FOUND:
                    return None
                raise
            with answer.reading() as pieces:
                records = list(chain.from_iterable(Page(chain([b"["], pieces, [b"]"]))))
            if len(records) != 1 or records[0] is None or records[0].id != task_id:
                raise answer.payload("the answer is not the task that was asked for")
            return records[0]

    def remaining_credits(self) -> float:
        """Return the workspace's balance; raise ApiError."""
        url, meter = self._base_url + _BALANCE_PATH, _Meter("the balance", _MAX_BALANCE_SIZE)
        with self._working(self._call(min(self._timeout, _BALANCE_TIMEOUT))) as call:
            answer = self._get(call, "remaining_credits", url, meter)
            with answer.reading() as pieces:
                balance = _balance(b"".join(pieces))
            if balance is None:
                raise answer.payload("the balance is no JSON object with a number remaining_credits")
            return balance

    def abort(self) -> None:
        """Break off what is running; it fails with cause "connection". For any thread."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.break_off("abort")

    def close(self) -> None:
        """Close the connection that the newest listing left open; one that is running closes its own."""
        with self._lock:
            call, self._listing = self._listing, None
            running = call in self._calls
        if call and not running:
            call.close()

    def _call(self, seconds: float) -> Call:
        return Call(seconds, self._headers, self._authorities)

    @contextmanager
    def _working(self, call: Call) -> Iterator[Call]:
        """Let `abort` reach the call; close its connection if nobody will use it again."""
        with self._lock:
            self._calls.add(call)
        _watch.add(call)
        try:
            yield call
        except BaseException:
            call.close()
            raise
        finally:
            _watch.remove(call)
            with self._lock:
                self._calls.discard(call)
                kept = self._listing is call
            if not kept:
                call.close()

    def _pages(self, stream: "TaskStream") -> Iterator[list[Record | None]]:
        self.close()
        call = self._listing = self._call(self._timeout)
        url: str | None = self._base_url + _LIST_PATH
        seen: set[str] = set()
        with self._working(call):
            while url:
                answer = self._get(call, "text_generator", url, stream.meter)
                if not seen:
                    stream.date = _epoch(answer.date)
                seen.add(url)
                with answer.reading() as pieces:
                    page = Page(pieces)
                    yield from page
                url = page.next and _next_url(url, page.next)
                if url in seen:
                    raise ApiError("payload", "the list links to a page that was read already")

    def _get(self, call: Call, endpoint: str, url: str, meter: "_Meter") -> "_Answer":
        """Send one request; return the answer if it is a 200, else raise ApiError."""
        with _explained(call):
            call.left()
        code = "error"
        try:
            with _explained(call):
                response = call.get(url)
            code = str(response.status_code)
        finally:
            self._on_request(endpoint, code)
        if response.status_code != http.HTTPStatus.OK:
            response.close()
            raise _refusal(response)
        return _Answer(call, response, meter)


class _Meter:
    """How many decoded bytes of `what` there were so far, and may be."""

    def __init__(self, what: str, limit: int) -> None:
        self.what = what
        self.size = 0
        self._limit = limit

    def add(self, size: int) -> None:
        """Take note of so many more bytes; raise ApiError if that is too much."""
        self.size += size
        if self.size > self._limit:
            raise ApiError("too_large", f"{self.what} is larger than {self._limit} bytes")


class TaskStream:
    """Iterate once over a listing's batches of records, all pages in sequence; raise ApiError.

    `date` is the time of the first answer by the API's clock, in seconds since the epoch, or None.
    """

    def __init__(self, pages: "Callable[[TaskStream], Iterator[list[Record | None]]]", limit: int) -> None:
        self.date: float | None = None
        self.meter = _Meter("the list", limit)
        self._pages = pages

    @property
    def size(self) -> int:
        """Return the number of decoded bytes so far."""
        return self.meter.size

    def __iter__(self) -> Iterator[list[Record | None]]:
        return self._pages(self)


class _Answer:
    """A 200 and its body."""

    def __init__(self, call: Call, response: requests.Response, meter: _Meter) -> None:
        self.date = response.headers.get("Date")
        self._call = call
        self._response = response
        self._meter = meter
        self._before = meter.size

    @contextmanager
    def reading(self) -> Iterator[Iterator[bytes]]:
        """Give the decoded body, as it arrives; turn what is wrong with it into ApiError."""
        pieces = self._pieces()
        try:
            yield pieces
        except MalformedBodyError as error:
            self._read_on(pieces)
            raise self.payload(f"{self._meter.what} is malformed: {error}") from None
        finally:
            self._response.close()

    def _read_on(self, pieces: Iterator[bytes]) -> None:
        """Read the rest: a body that is too large is that in the first place, whatever it consists of."""
        try:
            for _ in pieces:
                pass
        except ApiError as error:
            if error.cause == "too_large":
                raise error from None

    def payload(self, text: str) -> ApiError:
        """Say that the body is not what was asked for."""
        kind = self._response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        size = self._meter.size - self._before
        return ApiError(
            "payload",
            f"{text} (HTTP 200, content type {kind if _PLAIN_TYPE.fullmatch(kind) else 'unknown'}, {size} bytes)",
        )

    def _pieces(self) -> Iterator[bytes]:
        if self._response.headers.get("Content-Encoding", "identity").strip().lower() not in ("identity", "gzip"):
            raise ApiError("payload", "the body of the answer has an encoding that was not asked for")
        while True:
            with _explained(self._call):
                # Of a gzip body too, no piece is longer than that.
                piece = self._response.raw.read(_READ_SIZE, decode_content=True)
                self._call.left()  # a socket that was shut looks like the end of the body
            if not piece:
                break
            self._meter.add(len(piece))
            yield piece


def _refusal(response: requests.Response) -> ApiError:
    """Say what an answer other than 200 means, by its status alone."""
    status, wait = response.status_code, None
    cause, text = "http", f"the API answered HTTP {status}"
    if status in (401, 403):
        cause, text = "auth", f"{text}: check api_id and api_key"
    elif status == http.HTTPStatus.NOT_FOUND:
        text = f"{text}: check api.base_url"
    elif 300 <= status < 400:
        place = _origin_text(response.url, response.headers.get("Location", ""))
        text = f"{text}, a redirect{place}, which is not followed: set api.base_url to where the API is"
    elif status in (429, 503):
        cause = "rate_limited" if status == 429 else "http"
        wait = _retry_after(response.headers.get("Retry-After"))
    return ApiError(cause, text, status=status, retry_after=wait)


def _origin_text(url: str, location: str) -> str:
    with suppress(ValueError):
        target = urlsplit(urljoin(url, location))
        host = f"{target.hostname}:{target.port}" if target.port else str(target.hostname)
        if location and target.scheme in ("http", "https") and _PLAIN_HOST.fullmatch(host):
            return f" to {target.scheme}://{host}"
    return ""


def _retry_after(value: str | None) -> float | None:
    """Return the seconds from now that a Retry-After header means, None if it means nothing."""
    text = (value or "").strip()
    if text[:1] != "-" and _DECIMAL.fullmatch(text):
        return float(text)
    moment = _epoch(text)
    return None if moment is None else max(moment - time.time(), 0.0)


def _epoch(date: str | None) -> float | None:
    """Return an HTTP date in seconds since the epoch, None if it is not valid."""
    with suppress(ValueError, OverflowError, TypeError, IndexError):
        moment = parsedate_to_datetime(date or "")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return None


def _next_url(url: str, link: str) -> str:
    """Resolve a link to the next page; raise ApiError if it leads to another origin."""
    with suppress(ValueError):
        target = urldefrag(urljoin(url, link)).url
        if _origin(target) == _origin(url):
            return target
    raise ApiError("payload", "the list links to a page on another origin")


def _origin(url: str) -> tuple[str, str | None, int | None, bool]:
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default, "@" in parts.netloc


def _balance(body: bytes) -> float | None:
    with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        value = json.loads(body)["remaining_credits"]
        if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


@contextmanager
def _explained(call: Call) -> Iterator[None]:
    """Turn what the libraries raise into ApiError, without their texts: these may quote URLs, headers and bodies."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        raise _failure(call, error) from None


def _failure(call: Call, error: Exception) -> ApiError:
    parts = list(_related(error))

    def has(*kinds: type[Exception]) -> bool:
        return any(isinstance(part, kinds) for part in parts)

    if call.over.done() and call.over.result() == "abort":
        return ApiError("connection", "the exporter broke off the request")
    if call.over.done() or has(TimeoutError, urllib3.exceptions.ReadTimeoutError):
        return ApiError("timeout", f"{call.peer} did not answer completely in time")
    if has(urllib3.exceptions.DecodeError):
        return ApiError("payload", "the body of the answer cannot be decompressed")
    if has(IncompleteRead):
        return ApiError("payload", "the body of the answer is cut short")
    if has(requests.exceptions.InvalidProxyURL):
        return ApiError("connection", "the proxy of the environment is no http:// or https:// URL")
    detail = next(filter(None, map(_detail, parts)), type(parts[-1]).__name__)
    if has(urllib3.exceptions.ProxyError) and isinstance(parts[-1], OSError) and parts[-1].errno is None:
        status = re.search(r"\b[1-5][0-9]{2}\b", str(parts[-1]))
        detail = f"the proxy of the environment answered HTTP {status[0] if status else 'nothing'}"
    return ApiError("connection", f"the connection to {call.peer} failed: {detail}")


def _related(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those it was made of; libraries hide them in arguments and reasons."""
    yield error
    for part in (*error.args, getattr(error, "reason", None), error.__cause__):
        if isinstance(part, BaseException):
            yield from _related(part)


def _detail(error: BaseException) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not trusted, {error.verify_message}"
    if isinstance(error, RemoteDisconnected):
        return "closed without an answer"
    return error.strerror if isinstance(error, OSError) else None
