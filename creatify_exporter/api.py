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
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from http.client import HTTPException, IncompleteRead, RemoteDisconnected
from itertools import chain
from urllib.parse import quote, urldefrag, urljoin, urlsplit

import requests
import urllib3

from creatify_exporter import __version__
from creatify_exporter.session import Call
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
_REFUSALS = {  # by status: cause and what to do
    401: ("auth", ": check api_id and api_key"),
    403: ("auth", ": check api_id and api_key"),
    404: ("http", ": check api.base_url"),
    429: ("rate_limited", ""),
}


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


def as_api_error(failure: Exception, what: str) -> ApiError:
    """Return `failure` itself if it is the API's; of a mistake of ours while reading `what`, only the kind is told."""
    if isinstance(failure, ApiError):
        return failure
    return ApiError("payload", f"{what} could not be read ({type(failure).__name__})")


@dataclass(repr=False)
class Client:
    """Read one workspace; clients that read the same under the same conditions are equal.

    `timeout` is in seconds for a whole listing with its tasks, `max_response_size` in bytes after decompression;
    `authorities` are trusted besides the usual ones, in PEM. `on_request` is told the endpoint and the HTTP status
    (or "error") of each request sent. Once `given_up` is set, all that runs or begins fails with cause "connection".
    """

    api_id: str
    api_key: str
    base_url: str
    timeout: float
    max_response_size: int
    authorities: str
    on_request: Callable[[str, str], None] = field(compare=False)
    given_up: threading.Event = field(default_factory=threading.Event, init=False, compare=False)

    def tasks(self) -> "TaskStream":
        """Return a fresh stream over the records of all pages; nothing is sent before it is iterated."""
        return TaskStream(self, self.timeout)

    def remaining_credits(self) -> float:
        """Return the workspace's balance; raise ApiError."""
        with closing(_Work(self, min(self.timeout, _BALANCE_TIMEOUT))) as work:
            meter = _Meter("the balance", _MAX_BALANCE_SIZE)
            with work.body("remaining_credits", self.base_url + _BALANCE_PATH, meter) as (_, pieces):
                return _balance(b"".join(pieces))


@dataclass
class _Meter:
    """How many decoded bytes of `what` there were so far, and may be."""

    what: str
    limit: int
    size: int = 0


class _Work(Call):
    """What a client asks for under one deadline."""

    def __init__(self, client: Client, seconds: float) -> None:
        headers = {
            "X-API-ID": client.api_id,
            "X-API-KEY": client.api_key,
            "User-Agent": f"creatify-exporter/{__version__}",
            "Accept": "application/json",
            "Accept-Encoding": "gzip",
        }
        super().__init__(seconds, headers, client.authorities, client.given_up)
        self._client = client

    @contextmanager
    def body(self, endpoint: str, url: str, meter: _Meter) -> Iterator[tuple[str | None, Iterator[bytes]]]:
        """Send one request; give the `Date` and the decoded body, as it arrives; turn what is wrong into ApiError.

        What is wrong with the body in the eyes of the caller, it raises as MalformedBodyError.
        """
        response, before = self._answer(endpoint, url), meter.size
        pieces = self._pieces(response, meter)
        try:
            yield response.headers.get("Date"), pieces
        except MalformedBodyError as error:
            _read_on(pieces)
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            about = f"HTTP 200, content type {kind if _PLAIN_TYPE.fullmatch(kind) else 'unknown'}"
            text = f"{meter.what} is malformed: {error} ({about}, {meter.size - before} bytes)"
            raise ApiError("payload", text) from None
        finally:
            response.close()

    def _answer(self, endpoint: str, url: str) -> requests.Response:
        """Send one request; return the answer if it is a 200, else raise ApiError."""
        code = None
        try:
            with self._explained():
                self.left()
                code = "error"
                response = self.get(url)
                code = str(response.status_code)
        finally:
            if code:
                self._client.on_request(endpoint, code)
        if response.status_code != http.HTTPStatus.OK:
            response.close()
            raise _refusal(response)
        return response

    def _pieces(self, response: requests.Response, meter: _Meter) -> Iterator[bytes]:
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("identity", "gzip"):
            raise ApiError("payload", "the body of the answer has an encoding that was not asked for")
        while True:
            with self._explained():
                # Of a gzip body too, no piece is longer than that.
                piece = response.raw.read(_READ_SIZE, decode_content=True)
            if not piece:
                return
            meter.size += len(piece)
            if meter.size > meter.limit:
                raise ApiError("too_large", f"{meter.what} is larger than {meter.limit} bytes")
            yield piece

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the libraries raise into ApiError, without their texts: these may quote URLs, headers, bodies."""
        try:
            yield
        except _LIBRARY_ERRORS as error:
            if self.given_up.is_set():
                raise ApiError("connection", "the exporter broke off the request") from None
            raise _failure(self.peer, error) from None


class TaskStream(_Work):
    """Iterate once over a listing's batches of records, all pages in sequence; raise ApiError.

    `date` is the time of the first answer by the API's clock, in seconds since the epoch, or None; `size` the number of
    decoded bytes so far.
    """

    def __init__(self, client: Client, seconds: float) -> None:
        super().__init__(client, seconds)
        self.date: float | None = None
        self._meter = _Meter("the list", client.max_response_size)

    @property
    def size(self) -> int:
        """Return the number of decoded bytes so far."""
        return self._meter.size

    def __iter__(self) -> Iterator[list[Record | None]]:
        url: str | None = self._client.base_url + _LIST_PATH
        seen: set[str] = set()
        while url:
            with self.body("text_generator", url, self._meter) as (date, pieces):
                if not seen:
                    self.date = _epoch(date)
                seen.add(url)
                page = Page(pieces)
                yield from page
            url = page.next and _next_url(url, page.next)
            if url in seen:
                raise ApiError("payload", "the list links to a page that was read already")

    def task(self, task_id: str) -> Record | None:
        """Return one task by its id, None if the API does not know it; raise ApiError.

        Runs on the connection of the list and within what is left of its time.
        """
        url = f"{self._client.base_url}{_LIST_PATH}{quote(task_id, safe='')}/"
        meter = _Meter("the task", min(self._client.max_response_size, _MAX_TASK_SIZE))
        try:
            with self.body("text_generator_task", url, meter) as (_, pieces):
                records = list(chain.from_iterable(Page(chain([b"["], pieces, [b"]"]))))
                if len(records) != 1 or records[0] is None or records[0].id != task_id:
                    raise MalformedBodyError("it is not the one that was asked for")
                return records[0]
        except ApiError as error:
            if error.status == http.HTTPStatus.NOT_FOUND:
                return None
            raise


def _read_on(pieces: Iterator[bytes]) -> None:
    """Read the rest: a body that is too large is that in the first place, whatever it consists of."""
    try:
        for _ in pieces:
            pass
    except ApiError as error:
        if error.cause == "too_large":
            raise error from None


def _refusal(response: requests.Response) -> ApiError:
    """Say what an answer other than 200 means, by its status alone."""
    status = response.status_code
    cause, advice = _REFUSALS.get(status, ("http", ""))
    if 300 <= status < 400:
        place = _origin_text(response.url, response.headers.get("Location", ""))
        advice = f", a redirect{place}, which is not followed: set api.base_url to where the API is"
    wait = _retry_after(response.headers.get("Retry-After")) if status in (429, 503) else None
    return ApiError(cause, f"the API answered HTTP {status}{advice}", status=status, retry_after=wait)


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


def _balance(body: bytes) -> float:
    with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        value = json.loads(body)["remaining_credits"]
        if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise MalformedBodyError("it is no JSON object with a number remaining_credits")


def _failure(peer: str, error: Exception) -> ApiError:
    parts = list(_related(error))

    def has(*kinds: type[Exception]) -> bool:
        return any(isinstance(part, kinds) for part in parts)

    if has(TimeoutError, urllib3.exceptions.ReadTimeoutError):
        return ApiError("timeout", f"{peer} did not answer completely in time")
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
    return ApiError("connection", f"the connection to {peer} failed: {detail}")


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
