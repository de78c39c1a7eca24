import json
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from base64 import b64decode
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import requests
import responses
import trustme
import urllib3
from hypothesis import given, settings
from hypothesis import strategies as st

from creatify_exporter import __version__, api, session
from creatify_exporter.api import CAUSES, ApiError, Client
from creatify_exporter.tasks import Record
from tests.support.servers import Exchange, Script, Server, answer, bomb, chunked, gzipped, head, in_turn

PLANTED = "PLANTED-7f3a"
"""Stands in credentials, bodies and URLs; it must not be in an error."""
TIMEOUT = 0.7


def patience(cause: str) -> float:
    """Return a time-out that is short where it is what is waited for, and ends nothing else on a busy machine."""
    return TIMEOUT if cause == "timeout" else 20.0


TASKS = b'[{"id":"a"},{"id":"b"}]'
Requests = list[tuple[str, str]]


def client(url: str, **changed: Any) -> Client:
    options: dict[str, Any] = {
        "api_id": f"id-{PLANTED}",
        "api_key": f"key-{PLANTED}",
        "base_url": url,
        "timeout": 10.0,
        "max_response_size": 10**9,
        "authorities": "",
        "on_request": lambda endpoint, code: None,
    }
    return Client(**{**options, **changed})


def ids(client: Client) -> list[Any]:
    with closing(client.tasks()) as stream:
        return [record and record.id for batch in stream for record in batch]


def one_task(client: Client, task_id: str) -> Record | None:
    with closing(client.tasks()) as stream:
        return stream.task(task_id)


def failure(call: Callable[[], object], within: float = 3.0) -> ApiError:
    """Return the error of `call`, which must come in time and give nothing away."""
    started = time.monotonic()
    with pytest.raises(ApiError) as caught:
        call()
    assert time.monotonic() - started < within
    error = caught.value
    assert error.cause in CAUSES
    assert PLANTED not in f"{error} {error!r} {error.args}"
    assert error.__suppress_context__ or error.__context__ is None
    return error


# Real servers


def drip_headers(exchange: Exchange) -> None:
    exchange.drip(head(200, *[f"X-{number}: {PLANTED}" for number in range(90)]))


def drip_body(exchange: Exchange) -> None:
    exchange.send(head(200, "Content-Length: 100000"))
    exchange.drip(b"[" + b" " * 99_999)


def drip_gzip(exchange: Exchange) -> None:
    exchange.send(head(200, "Content-Encoding: gzip", "Content-Length: 100000"))
    exchange.drip(b"\x1f\x8b\x08\x08" + b"\0" * 6 + b"a" * 10_000)


def drip_chunk_size(exchange: Exchange) -> None:
    exchange.send(head(200, "Transfer-Encoding: chunked"))
    exchange.drip(b"1;" + b"a" * 10_000)


def hang(exchange: Exchange) -> None:
    exchange.hang()


def hang_in_body(exchange: Exchange) -> None:
    exchange.send(head(200, "Content-Length: 100") + TASKS)
    exchange.hang()


def cut_short(exchange: Exchange) -> None:
    exchange.send(head(200, "Content-Length: 100") + TASKS)
    exchange.close()


def reset(exchange: Exchange) -> None:
    exchange.reset()


def reset_in_body(exchange: Exchange) -> None:
    exchange.send(head(200, "Content-Length: 100") + TASKS[:5])
    exchange.reset()


def close_at_once(exchange: Exchange) -> None:
    exchange.close()


def without_http(exchange: Exchange) -> None:
    exchange.send(f"220 {PLANTED} ESMTP\r\n".encode())
    exchange.close()


def until_closed(exchange: Exchange) -> None:
    exchange.send(head() + TASKS)
    exchange.close()


def planted(status: int, *headers: str) -> Script:
    return answer(f'{{"detail":"{PLANTED}"}}'.encode(), status, *headers)


HOSTILE: dict[str, tuple[Script, str]] = {
    "401": (planted(401), "auth"),
    "403": (planted(403), "auth"),
    "429": (planted(429), "rate_limited"),
    "400": (planted(400), "http"),
    "404": (planted(404), "http"),
    "418": (planted(418), "http"),
    "500": (planted(500), "http"),
    "503": (planted(503), "http"),
    "599": (planted(599), "http"),
    "201": (planted(201), "http"),
    "204": (answer(b"", 204), "http"),
    "206": (planted(206), "http"),
    "304": (answer(b"", 304), "http"),
    "600": (planted(600), "http"),
    "302": (planted(302), "http"),
    "redirect to nowhere": (answer(b"", 302, f"Location: http://[{PLANTED}"), "http"),
    "redirect to a script": (answer(b"", 302, f"Location: javascript:{PLANTED}"), "http"),
    "redirect without a location": (answer(b"", 302), "http"),
    "HTML": (answer(f"<!DOCTYPE html><title>{PLANTED}</title>".encode()), "payload"),
    "text": (answer(PLANTED.encode()), "payload"),
    "empty": (answer(b""), "payload"),
    "an error object": (planted(200), "payload"),
    "JSON cut short": (answer(f'[{{"id":"{PLANTED}"'.encode()), "payload"),
    "body cut short": (cut_short, "payload"),
    "chunks without an end": (chunked([TASKS], end=False), "payload"),
    "a broken chunk": (lambda exchange: exchange.send(head(200, "Transfer-Encoding: chunked") + b"x\r\n"), "payload"),
    "no gzip": (answer(TASKS, 200, "Content-Encoding: gzip"), "payload"),
    "gzip cut short": (answer(b"\x1f\x8b\x08\0\0\0\0\0", 200, "Content-Encoding: gzip"), "payload"),
    "brotli": (answer(b"\x0b\x02\x80", 200, "Content-Encoding: br"), "payload"),
    "next page elsewhere": (answer(f'{{"next":"http://{PLANTED}/","results":[]}}'.encode()), "payload"),
    "next page the same": (answer(b'{"next":"?","results":[]}'), "payload"),
    "next page no URL": (answer(f'{{"next":"http://[{PLANTED}","results":[]}}'.encode()), "payload"),
    "next page with a user": (answer(f'{{"next":"//{PLANTED}@localhost/","results":[]}}'.encode()), "payload"),
    "next page by another scheme": (answer(b'{"next":"https://localhost/","results":[]}'), "payload"),
    "too large": (chunked([b"["] + [b" " * 50_000] * 30), "too_large"),
    "too large in gzip": (gzipped(b"[" + b" " * 1_500_000), "too_large"),
    "too large and no JSON": (gzipped(b"\0" * 1_500_000), "too_large"),
    "no JSON and no end": (chunked([b"<html>"], end=False), "payload"),
    "headers drip": (drip_headers, "timeout"),
    "body drips": (drip_body, "timeout"),
    "gzip drips": (drip_gzip, "timeout"),
    "chunk size drips": (drip_chunk_size, "timeout"),
    "hang": (hang, "timeout"),
    "hang in the body": (hang_in_body, "timeout"),
    "reset": (reset, "connection"),
    "reset in the body": (reset_in_body, "connection"),
    "closed": (close_at_once, "connection"),
    "no HTTP": (without_http, "connection"),
}


@pytest.mark.parametrize(("script", "cause"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_server_makes_the_listing_fail_with_its_cause(script: Script, cause: str) -> None:
    sent: Requests = []
    with Server(script) as server:
        subject = client(
            server.url,
            timeout=patience(cause),
            max_response_size=1_000_000,
            on_request=lambda *request: sent.append(request),
        )
        error = failure(lambda: ids(subject))
        assert error.cause == cause
        assert [endpoint for endpoint, _ in sent] == ["text_generator"] * len(server.requests)
        assert len(server.requests) == 1
        status = sent[0][1]
        assert error.status == (int(status) if status not in ("200", "error") else None)


BALANCE_ONLY: dict[str, tuple[Script, str]] = {
    "a list": (answer(TASKS), "payload"),
    "no balance": (answer(b"{}"), "payload"),
    "null": (answer(b'{"remaining_credits":null}'), "payload"),
    "true": (answer(b'{"remaining_credits":true}'), "payload"),
    "NaN": (answer(b'{"remaining_credits":NaN}'), "payload"),
    "infinity": (answer(b'{"remaining_credits":1e999}'), "payload"),
    "beyond float": (answer(b'{"remaining_credits":' + b"1" * 400 + b"}"), "payload"),
    "beyond int": (answer(b'{"remaining_credits":' + b"1" * 5000 + b"}"), "payload"),
    "text": (answer(f'{{"remaining_credits":"{PLANTED}"}}'.encode()), "payload"),
    "deep": (answer(b"[" * 60_000), "payload"),
    "no UTF-8": (answer(b'{"remaining_credits":1,"a":"\xff"}'), "payload"),
    "long": (answer(b'{"remaining_credits":1}' + b" " * 70_000), "too_large"),
    "endless": (chunked([b" " * 10_000] * 1000), "too_large"),
}


@pytest.mark.parametrize(("script", "cause"), [*BALANCE_ONLY.values()], ids=[*BALANCE_ONLY.keys()])
def test_a_bad_balance_is_an_error(script: Script, cause: str) -> None:
    with Server(script) as server:
        subject = client(server.url)
        assert failure(subject.remaining_credits).cause == cause


@pytest.mark.parametrize("name", ["401", "429", "500", "redirect without a location", "hang", "body drips", "reset"])
def test_the_balance_fails_like_the_listing(name: str) -> None:
    script, cause = HOSTILE[name]
    with Server(script) as server:
        subject = client(server.url, timeout=patience(cause))
        assert failure(subject.remaining_credits).cause == cause


@pytest.mark.parametrize(
    ("value", "credits"), [("379.0", 379), ("0", 0), ('"12.5"', 12.5), ('" -3 "', -3), ("1e2", 100)]
)
def test_the_balance_is_a_number_or_plain_decimal_text(value: str, credits: float) -> None:
    with Server(answer(f'{{"remaining_credits": {value}}}'.encode())) as server:
        subject = client(server.url)
        assert subject.remaining_credits() == credits
        assert server.requests[0].path == "/api/remaining_credits/"


@pytest.mark.parametrize(
    "script",
    [
        answer(TASKS),
        chunked([TASKS[:3], TASKS[3:]]),
        gzipped(TASKS),
        until_closed,
        answer(TASKS, 200, "Content-Type: text/html"),
    ],
    ids=["length", "chunks", "gzip", "until closed", "wrong type"],
)
def test_every_way_to_send_a_body_is_understood(script: Script) -> None:
    with Server(script) as server:
        subject = client(server.url)
        with closing(subject.tasks()) as stream:
            assert [record and record.id for batch in stream for record in batch] == ["a", "b"]
            assert stream.size == len(TASKS)


def test_a_listing_and_its_tasks_share_a_connection_and_the_next_listing_opens_another() -> None:
    one = answer(b'{"id":"a"}')
    script = in_turn(answer(TASKS), one, one, answer(TASKS), answer(b'{"remaining_credits":1}'))
    with Server(script) as server:
        subject = client(server.url)
        with closing(subject.tasks()) as stream:
            assert sum(map(len, stream)) == 2
            assert stream.task("a") == stream.task("a") == Record(id="a")
        assert server.connections == 1
        assert ids(subject) == ["a", "b"]
        assert server.connections == 2
        assert subject.remaining_credits() == 1
        assert server.connections == 3


def close_after(script: Script) -> Script:
    def close(exchange: Exchange) -> None:
        script(exchange)
        exchange.close()

    return close


def test_a_server_that_closes_after_each_answer_is_connected_to_again() -> None:
    first = close_after(answer(b'{"next":"?2","results":[{"id":"a"}]}', 200, "Connection: close"))
    with Server(in_turn(first, answer(b'{"results":[{"id":"b"}]}'))) as server:
        subject = client(server.url)
        assert ids(subject) == ["a", "b"]
        assert server.connections == 2


# One task by its id


def test_a_task_is_read_by_its_id() -> None:
    sent: Requests = []
    body = b'{"id":"a-1","status":"done","credits_used":0.5,"messages":[{"id":"x"}]}'
    with Server(answer(body)) as server:
        subject = client(server.url, on_request=lambda *one: sent.append(one))
        assert one_task(subject, "a-1") == Record(id="a-1", status="done", credits_used=0.5)
        assert server.requests[0].path == "/sse/text_generator/a-1/"
        assert server.requests[0].headers["x-api-key"] == f"key-{PLANTED}"
    assert sent == [("text_generator_task", "200")]


def test_a_task_that_the_api_does_not_know_is_none() -> None:
    sent: Requests = []
    with Server(planted(404)) as server:
        subject = client(server.url, on_request=lambda *one: sent.append(one))
        assert one_task(subject, "a") is None
    assert sent == [("text_generator_task", "404")]


NO_TASK: dict[str, tuple[Script, str]] = {
    "another id": (answer(f'{{"id":"{PLANTED}"}}'.encode()), "payload"),
    "no id": (answer(b"{}"), "payload"),
    "a list": (answer(b'[{"id":"a"}]'), "payload"),
    "two": (answer(b'{"id":"a"},{"id":"a"}'), "payload"),
    "null": (answer(b"null"), "payload"),
    "nothing": (answer(b""), "payload"),
    "HTML": (answer(f"<html>{PLANTED}".encode()), "payload"),
    "cut in the JSON": (answer(b'{"id":"a"'), "payload"),
    "too large": (gzipped(b'{"id":"a","x":"' + b"x" * 1_500_000 + b'"}'), "too_large"),
    **{
        name: HOSTILE[name]
        for name in ("401", "403", "429", "500", "302", "body cut short", "hang", "body drips", "reset")
    },
}


@pytest.mark.parametrize(("script", "cause"), NO_TASK.values(), ids=NO_TASK.keys())
def test_anything_but_the_task_is_an_error(script: Script, cause: str) -> None:
    with Server(script) as server:
        subject = client(server.url, timeout=patience(cause), max_response_size=1_000_000)
        assert failure(lambda: one_task(subject, "a")).cause == cause


def test_tasks_have_what_the_listing_left_of_the_time() -> None:
    sent: Requests = []

    def late(exchange: Exchange) -> None:
        exchange.stopped.wait(0.4)
        answer(TASKS)(exchange)

    with Server(in_turn(late, drip_headers)) as server:
        subject = client(server.url, timeout=TIMEOUT, on_request=lambda *one: sent.append(one))
        with closing(subject.tasks()) as stream:
            assert sum(map(len, stream)) == 2
            assert failure(lambda: stream.task("a"), within=0.45).cause == "timeout"
            assert failure(lambda: stream.task("b"), within=0.1).cause == "timeout"
        assert server.connections == 1
    assert len(sent) == len(server.requests) == 2


# Pages, dates, refusals


def test_pages_are_read_in_sequence_under_one_deadline_and_one_cap() -> None:
    def script(exchange: Exchange) -> None:
        page = int(exchange.path.partition("page=")[2] or 1)
        following = f"http://{exchange.headers['host']}/sse/text_generator/?page={page + 1}#x" if page < 3 else None
        answer(json.dumps({"count": 3, "next": following, "results": [{"id": page}]}).encode())(exchange)

    with Server(script) as server:
        subject = client(server.url)
        assert ids(subject) == [1, 2, 3]
        assert [exchange.path for exchange in server.requests] == [
            "/sse/text_generator/",
            "/sse/text_generator/?page=2",
            "/sse/text_generator/?page=3",
        ]
        assert {exchange.headers["x-api-key"] for exchange in server.requests} == {f"key-{PLANTED}"}
        subject = client(server.url, max_response_size=150)
        assert failure(lambda: ids(subject)).cause == "too_large"

    def endless(exchange: Exchange) -> None:
        exchange.stopped.wait(0.05)
        answer(f'{{"next":"?{len(exchange.path)}{exchange.path[-20:]}","results":[]}}'.encode())(exchange)

    with Server(endless) as server:
        subject = client(server.url, timeout=TIMEOUT)
        assert failure(lambda: ids(subject)).cause in ("timeout", "payload")


def test_a_later_page_that_fails_fails_the_listing() -> None:
    script = in_turn(answer(b'{"next":"?2","results":[{"id":1}]}'), planted(500))
    with Server(script) as server:
        subject = client(server.url)
        assert failure(lambda: ids(subject)).status == 500


def test_a_redirect_target_receives_no_request() -> None:
    with Server(answer(TASKS)) as elsewhere:
        redirect = answer(
            b"x" * 1000, 302, f"Location: http://127.0.0.1:{elsewhere.port}/{PLANTED}?{PLANTED}={PLANTED}"
        )
        with Server(redirect) as server:
            subject = client(server.url)
            error = failure(lambda: ids(subject))
        assert (error.cause, error.status) == ("http", 302)
        assert f"to http://127.0.0.1:{elsewhere.port}," in str(error)
        assert "api.base_url" in str(error)
        assert elsewhere.connections == 0


@pytest.mark.parametrize(
    ("header", "date"),
    [
        ("Date: Thu, 01 Jan 1970 00:01:40 GMT", 100),
        ("date: Thu, 01 Jan 1970 01:01:40 +0100", 100),
        ("Date: Thu, 01 Jan 1970 00:01:40 -0000", 100),
        ("Date: yesterday", None),
        ("Date:", None),
        ("Date: Thu, 99 Jan 2026 00:00:00 GMT", None),
        ("X: y", None),
    ],
)
def test_a_listing_tells_the_date_of_its_first_answer(header: str, date: float | None) -> None:
    first = answer(b'{"next":"?2","results":[]}', 200, header)
    last = answer(b'{"results":[]}', 200, "Date: Thu, 01 Jan 1970 00:00:07 GMT")
    with Server(in_turn(first, last)) as server:
        subject = client(server.url)
        with closing(subject.tasks()) as stream:
            assert stream.date is None
            assert list(stream) == []
            assert stream.date == date


@pytest.mark.parametrize(
    "interim", [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", head(100), head(102), head(199)]
)
def test_interim_answers_are_skipped(interim: bytes) -> None:
    def script(exchange: Exchange) -> None:
        exchange.send(interim * 2)
        answer(TASKS if "sse" in exchange.path else b'{"remaining_credits":2}')(exchange)

    with Server(script) as server:
        subject = client(server.url)
        assert ids(subject) == ["a", "b"]
        assert subject.remaining_credits() == 2


def test_interim_answers_without_end_are_under_the_deadline() -> None:
    def script(exchange: Exchange) -> None:
        while not exchange.stopped.wait(0.01):
            exchange.send(head(103))

    with Server(script) as server:
        subject = client(server.url, timeout=TIMEOUT)
        assert failure(lambda: ids(subject)).cause == "timeout"


def test_an_error_says_where_to_look() -> None:
    page = answer(f"<p>{PLANTED}".encode(), 200, "Content-Type: text/html; x=y")
    with Server(in_turn(planted(404), page)) as server:
        subject = client(server.url)
        assert "api.base_url" in str(failure(lambda: ids(subject)))
        text = str(failure(lambda: ids(subject)))
        assert f"HTTP 200, content type text/html, {len(PLANTED) + 3} bytes" in text
    with Server(answer(b"{}", 200, f"Content-Type: {PLANTED}: {PLANTED}")) as server:
        subject = client(server.url)
        assert "content type unknown, 2 bytes" in str(failure(subject.remaining_credits))


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        (" 0 ", 0, 0),
        (timedelta(hours=1), 3500, 3600),
        (timedelta(hours=-1), 0, 0),
        (None, None, None),
        ("", None, None),
        ("soon", None, None),
        ("-5", None, None),
        ("nan", None, None),
        ("Fri, 99 Foo 2026 99:99:99 GMT", None, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_told_in_seconds_from_now(
    status: int, header: str | timedelta | None, low: float | None, high: float | None
) -> None:
    if isinstance(header, timedelta):
        header = format_datetime(datetime.now(UTC) + header, usegmt=True)
    script = planted(status, *([f"Retry-After: {header}"] if header is not None else []))
    with Server(script) as server:
        subject = client(server.url)
        error = failure(lambda: ids(subject))
    if low is None or high is None:
        assert error.retry_after is None
    else:
        assert error.retry_after is not None
        assert low <= error.retry_after <= high


def test_retry_after_counts_only_with_429_and_503() -> None:
    with Server(planted(500, "Retry-After: 7")) as server:
        subject = client(server.url)
        assert failure(lambda: ids(subject)).retry_after is None


@settings(deadline=None)
@given(
    st.text(max_size=40) | st.from_regex(r"[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,6} \d\d:\d\d:\d\d [-+A-Z0-9]{0,8}")
)
def test_no_retry_after_upsets_the_client(text: str) -> None:
    seconds = api._retry_after(text)
    assert seconds is None or seconds >= 0


# The way to the server


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_a_refused_connection_is_tried_once() -> None:
    sent: Requests = []
    port = closed_port()
    subject = client(f"http://127.0.0.1:{port}", on_request=lambda *one: sent.append(one))
    error = failure(lambda: ids(subject))
    assert error.cause == "connection"
    assert f"127.0.0.1:{port} failed: Connection refused" in str(error)
    assert sent == [("text_generator", "error")]


def test_an_unknown_host_is_a_connection_error() -> None:
    error = failure(lambda: ids(client("http://api.invalid")), within=30)
    assert error.cause == "connection"
    assert "api.invalid:80" in str(error)


@pytest.fixture
def silent_name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let look-ups of names hang until the end of the test."""
    ended, look_up = threading.Event(), socket.getaddrinfo

    def hanging(host: str, *args: Any, **more: Any) -> Any:
        if not host.startswith("127.") and not more.get("flags"):
            ended.wait(30)
        return look_up("127.0.0.1" if ended.is_set() else host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    yield
    ended.set()
    for thread in look_ups():
        thread.join(10)


def look_ups() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("look-up")]


@pytest.mark.usefixtures("silent_name_server")
def test_a_name_server_that_does_not_answer_is_a_timeout_and_piles_up_no_threads() -> None:
    for _ in range(3):
        error = failure(lambda: ids(client("http://api.invalid", timeout=0.2)))
        assert error.cause == "timeout"
        assert "api.invalid:80" in str(error)
        assert len(look_ups()) == 1


@pytest.mark.usefixtures("silent_name_server")
def test_who_gives_up_breaks_off_a_look_up() -> None:
    subject, errors = client("http://api.invalid"), []
    thread = threading.Thread(target=lambda: errors.append(failure(lambda: ids(subject))))
    thread.start()
    deadline = time.monotonic() + 5
    while not look_ups() and time.monotonic() < deadline:
        time.sleep(0.01)
    subject.given_up.set()
    thread.join(5)
    assert [error.cause for error in errors] == ["connection"]


def test_calls_need_no_thread_beside_the_callers_own() -> None:
    with Server(hang) as server:
        subjects = [client(server.url) for _ in range(10)]
        callers = [threading.Thread(target=lambda one=one: failure(lambda: ids(one))) for one in subjects]
        before = threading.active_count()
        for caller in callers:
            caller.start()
        deadline = time.monotonic() + 10
        while len(server.requests) < len(callers) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(server.requests) == len(callers)
        # A caller and the server's thread for it.
        assert threading.active_count() == before + 2 * len(callers)
        for subject in subjects:
            subject.given_up.set()
        for caller in callers:
            caller.join(5)


def test_a_server_that_accepts_nobody_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        waiting = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            waiting.append(filler)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert failure(lambda: ids(client(url, timeout=TIMEOUT))).cause == "timeout"
        for filler in waiting:
            filler.close()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(authority: trustme.CA, name: str = "localhost") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture
def authorities(authority: trustme.CA) -> str:
    return authority.cert_pem.bytes().decode()


def test_tls_works_with_an_extra_authority(authority: trustme.CA, authorities: str) -> None:
    page = in_turn(answer(b'{"next":"?2","results":[{"id":"a"}]}'), answer(b'{"results":[{"id":"b"}]}'))
    with Server(page, server_tls(authority)) as server:
        subject = client(server.url, authorities=authorities)
        assert ids(subject) == ["a", "b"]
        assert server.connections == 1


def test_the_extra_authority_is_trusted_besides_the_usual_ones(authority: trustme.CA) -> None:
    usual = session.tls_context("").cert_store_stats()["x509_ca"]
    assert usual > 50
    extra = authority.cert_pem.bytes().decode()
    assert session.tls_context(extra).cert_store_stats()["x509_ca"] == usual + 1
    assert session.tls_context(extra) is session.tls_context(extra)


def test_a_certificate_of_nobody_is_a_connection_error(authority: trustme.CA) -> None:
    with Server(answer(TASKS), server_tls(authority)) as server:
        subject = client(server.url)
        error = failure(lambda: ids(subject))
        assert error.cause == "connection"
        assert "certificate" in str(error)
        assert not server.requests


def test_a_certificate_for_another_host_is_a_connection_error(authority: trustme.CA, authorities: str) -> None:
    tls = server_tls(authority, "elsewhere.example")
    with Server(answer(TASKS), tls) as server:
        subject = client(server.url, authorities=authorities)
        error = failure(lambda: ids(subject))
        assert error.cause == "connection"
        assert "certificate" in str(error)


def test_old_tls_is_refused(authority: trustme.CA, authorities: str) -> None:
    tls = server_tls(authority)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        tls.maximum_version = ssl.TLSVersion.TLSv1_1
    with Server(answer(TASKS), tls) as server:
        subject = client(server.url, authorities=authorities)
        assert failure(lambda: ids(subject)).cause == "connection"


@pytest.mark.parametrize(
    ("script", "cause"),
    [(drip_headers, "timeout"), (drip_body, "timeout"), (hang_in_body, "timeout"), (cut_short, "payload")],
)
def test_the_deadline_holds_over_tls(authority: trustme.CA, authorities: str, script: Script, cause: str) -> None:
    with Server(script, server_tls(authority)) as server:
        subject = client(server.url, authorities=authorities, timeout=TIMEOUT)
        assert failure(lambda: ids(subject)).cause == cause


@pytest.mark.parametrize("greeting", [b"", b"\x16\x03\x03\x40\x00"], ids=["silent", "dripping"])
def test_the_deadline_holds_during_the_tls_handshake(greeting: bytes) -> None:
    stopped = threading.Event()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(greeting)
            while greeting and not stopped.wait(0.05):
                try:
                    connection.sendall(b"\0")
                except OSError:
                    return
            stopped.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        subject = client(f"https://127.0.0.1:{listener.getsockname()[1]}", timeout=TIMEOUT)
        assert failure(lambda: ids(subject)).cause == "timeout"
        stopped.set()
        thread.join()


def test_who_gives_up_breaks_off_what_is_running() -> None:
    arrived = threading.Event()

    def script(exchange: Exchange) -> None:
        exchange.send(head(200, "Content-Length: 100") + TASKS)
        arrived.set()
        exchange.hang()

    errors = []
    with Server(script) as server:
        subject = client(server.url)
        threads = [
            threading.Thread(target=lambda: errors.append(failure(lambda: ids(subject)))),
            threading.Thread(target=lambda: errors.append(failure(subject.remaining_credits))),
        ]
        for thread in threads:
            thread.start()
        assert arrived.wait(5)
        deadline = time.monotonic() + 5
        while len(server.requests) < 2 and time.monotonic() < deadline:
            arrived.wait(0.01)
        subject.given_up.set()
        for thread in threads:
            thread.join(5)
    assert [error.cause for error in errors] == ["connection", "connection"]


def test_a_call_that_was_broken_off_sends_nothing_more() -> None:
    with Server(answer(TASKS)) as server:
        subject = client(server.url)
        subject.given_up.set()
        assert failure(lambda: ids(subject)).cause == "connection"
        assert server.connections == 0


def test_a_listing_given_up_half_way_closes_its_connection() -> None:
    closed = threading.Event()

    def script(exchange: Exchange) -> None:
        try:
            exchange.send(head(200, "Content-Length: 1000000") + TASKS[:-1] + b"," + b'{"id":"c"},' * 30_000)
            exchange.hang()
        finally:
            closed.set()

    with Server(script) as server:
        subject = client(server.url)
        batches = iter(subject.tasks())
        assert next(batches)
        assert isinstance(batches, Generator)
        batches.close()
        assert closed.wait(5)


def test_both_endpoints_work_at_once_from_two_threads() -> None:
    together = threading.Barrier(2, timeout=5)

    def script(exchange: Exchange) -> None:
        together.wait()
        answer(TASKS if "sse" in exchange.path else b'{"remaining_credits":2}')(exchange)

    found: list[object] = []
    with Server(script) as server:
        subject = client(server.url)
        for _ in range(5):
            other = threading.Thread(target=lambda: found.append(subject.remaining_credits()))
            other.start()
            assert ids(subject) == ["a", "b"]
            other.join()
    assert found == [2] * 5


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take the proxies out of the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_of_the_environment_is_used(environment: pytest.MonkeyPatch, name: str) -> None:
    with Server(answer(TASKS)) as proxy:
        environment.setenv(name, f"http://us%40er:{PLANTED}@127.0.0.1:{proxy.port}")
        subject = client("http://api.example/v1")
        assert ids(subject) == ["a", "b"]
        request = proxy.requests[0]
        assert request.path == "http://api.example/v1/sse/text_generator/"
        assert request.headers["host"] == "api.example"
        assert b64decode(request.headers["proxy-authorization"].split()[1]).decode() == f"us@er:{PLANTED}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8"])
def test_loopback_never_goes_through_a_proxy(environment: pytest.MonkeyPatch, host: str) -> None:
    with Server(answer(TASKS)) as proxy, Server(answer(TASKS)) as server:
        environment.setenv("HTTP_PROXY", proxy.url)
        environment.setenv("ALL_PROXY", proxy.url)
        # The server is at 127.0.0.1 alone.
        with suppress(ApiError):
            subject = client(f"http://{host}:{server.port}", timeout=1)
            ids(subject)
        assert proxy.connections == 0


@pytest.mark.parametrize("no_proxy", ["*", "example", "x, .example", "api.example", "192.0.2.0/24"])
def test_hosts_in_no_proxy_are_asked_directly(environment: pytest.MonkeyPatch, no_proxy: str) -> None:
    host = "192.0.2.7" if "/" in no_proxy else "api.example"
    with Server(answer(TASKS)) as proxy:
        environment.setenv("http_proxy", proxy.url)
        environment.setenv("no_proxy", no_proxy)
        failure(lambda: ids(client(f"http://{host}", timeout=0.2)), within=20)
        assert proxy.connections == 0


@pytest.mark.parametrize("url", ["socks5://127.0.0.1:1", "http://[", "http://", "http://a:x"])
def test_a_proxy_that_cannot_be_used_is_a_connection_error(environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("https_proxy", url)
    error = failure(lambda: ids(client("https://api.example")))
    assert (error.cause, "proxy" in str(error)) == ("connection", True)


def test_a_proxy_that_is_not_there_is_named(environment: pytest.MonkeyPatch) -> None:
    port = closed_port()
    environment.setenv("https_proxy", f"http://user:{PLANTED}@127.0.0.1:{port}")
    assert f"127.0.0.1:{port} failed" in str(failure(lambda: ids(client("https://api.example"))))


def tunnel(port: int) -> Script:
    """Connect the client with a port of this machine, whatever it asked for."""

    def script(exchange: Exchange) -> None:
        exchange.keep_alive = False
        with socket.create_connection(("127.0.0.1", port)) as target:
            exchange.send(head(200))
            exchange.connection.settimeout(0.02)
            target.settimeout(0.02)
            while not exchange.stopped.is_set():
                for source, sink in ((exchange.connection, target), (target, exchange.connection)):
                    with suppress(TimeoutError):
                        if not (data := source.recv(65536)):
                            return
                        sink.sendall(data)

    return script


@pytest.mark.parametrize("over_tls", [False, True])
def test_tls_goes_through_a_proxy(
    environment: pytest.MonkeyPatch, authority: trustme.CA, authorities: str, over_tls: bool
) -> None:
    tls = server_tls(authority)
    with Server(answer(TASKS), server_tls(authority, "api.example")) as server:
        with Server(tunnel(server.port), tls if over_tls else None) as proxy:
            environment.setenv("https_proxy", proxy.url.replace("//", f"//user:{PLANTED}@"))
            subject = client("https://api.example", authorities=authorities)
            assert ids(subject) == ["a", "b"]
            assert proxy.requests[0].path == "api.example:443"
            assert "x-api-key" not in proxy.requests[0].headers
        assert "proxy-authorization" not in server.requests[0].headers


@pytest.mark.parametrize("over_tls", [False, True])
@pytest.mark.parametrize(("script", "cause"), [(planted(407), "connection"), (drip_headers, "timeout")])
def test_a_proxy_that_refuses_or_drips_is_an_error(
    environment: pytest.MonkeyPatch, authority: trustme.CA, authorities: str, over_tls: bool, script: Script, cause: str
) -> None:
    with Server(script, server_tls(authority) if over_tls else None) as proxy:
        environment.setenv("https_proxy", proxy.url.replace("//", f"//user:{PLANTED}@"))
        subject = client("https://api.example", authorities=authorities, timeout=TIMEOUT)
        error = failure(lambda: ids(subject))
        assert error.cause == cause
        assert "proxy of the environment answered HTTP 407" in str(error) or cause == "timeout"
        assert proxy.requests[0].path == "api.example:443"


def drip_a_record(context: ssl.SSLContext, *, answering: bool) -> Script:
    """Open a tunnel to oneself, and send a record of the TLS within byte by byte: of its handshake or of the answer."""

    def script(exchange: Exchange) -> None:
        exchange.send(head(200))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        within = context.wrap_bio(incoming, outgoing, server_side=True)

        def exchanged(step: Callable[[], object]) -> None:
            while True:
                with suppress(ssl.SSLWantReadError):
                    step()
                    return
                if outgoing.pending:
                    exchange.send(outgoing.read())
                incoming.write(exchange.connection.recv(65536))

        if answering:
            exchanged(within.do_handshake)
            exchanged(lambda: within.read(65536))
            within.write(head(200) + b" " * 10_000)
        else:
            outgoing.write(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + b"\0" * 200)
        exchange.drip(outgoing.read())

    return script


@pytest.mark.parametrize("answering", [False, True])
def test_tls_within_tls_that_drips_ends_in_time(
    environment: pytest.MonkeyPatch, authority: trustme.CA, authorities: str, answering: bool
) -> None:
    within = server_tls(authority, "api.example")
    with Server(drip_a_record(within, answering=answering), server_tls(authority)) as proxy:
        environment.setenv("https_proxy", proxy.url)
        started = time.monotonic()
        error = failure(lambda: ids(client("https://api.example", authorities=authorities, timeout=TIMEOUT)))
        assert error.cause == "timeout"
        assert time.monotonic() - started < TIMEOUT + 2


def test_netrc_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login someone password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with Server(answer(TASKS)) as server:
        subject = client(server.url)
        assert ids(subject) == ["a", "b"]
        assert "authorization" not in server.requests[0].headers


def test_cookies_are_not_kept() -> None:
    script = answer(TASKS, 200, "Set-Cookie: a=b; Path=/")
    with Server(script) as server:
        subject = client(server.url)
        ids(subject)
        ids(subject)
        assert "cookie" not in server.requests[1].headers


def test_a_gzip_bomb_is_stopped_at_the_cap_in_bounded_memory() -> None:
    program = """
        import resource, sys
        from creatify_exporter.api import ApiError, Client
        subject = Client(api_id="i", api_key="k", base_url=sys.argv[1], timeout=60, max_response_size=100_000_000,
                         authorities="", on_request=lambda *_: None)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stream = subject.tasks()
        try:
            for batch in stream:
                pass
        except ApiError as error:
            print(error.cause, stream.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    tasks = b'{"id":"a","messages":"' + b"x" * 1000 + b'"},'
    with Server(chunked(bomb(10 << 30, filler=tasks), "Content-Encoding: gzip")) as server:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), server.url],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            cwd=Path(__file__).parent.parent,
        )
    cause, size, grown_kib = done.stdout.split()
    assert cause == "too_large"
    assert 100_000_000 < int(size) < 101_000_000
    assert int(grown_kib) < 25_000


def test_requests_carry_both_credentials_and_ask_for_gzip() -> None:
    script = in_turn(answer(TASKS), answer(b'{"remaining_credits":5}'))
    with Server(script) as server:
        subject = client(f"{server.url}/v1")
        assert ids(subject) == ["a", "b"]
        assert subject.remaining_credits() == 5
        assert [exchange.path for exchange in server.requests] == [
            "/v1/sse/text_generator/",
            "/v1/api/remaining_credits/",
        ]
        for exchange in server.requests:
            assert exchange.headers == {
                "host": f"localhost:{server.port}",
                "x-api-id": f"id-{PLANTED}",
                "x-api-key": f"key-{PLANTED}",
                "user-agent": f"creatify-exporter/{__version__}",
                "accept": "application/json",
                "accept-encoding": "gzip",
            }


@pytest.mark.parametrize("key", [f"{PLANTED}\u20ac", f"{PLANTED}\r\nX: y"], ids=["not latin", "two lines"])
def test_odd_credentials_are_an_error_that_does_not_show_them(key: str) -> None:
    assert failure(lambda: ids(client("http://127.0.0.1:9", api_key=key))).cause == "connection"


# Without a server: what becomes of an answer, by itself


@responses.activate
@pytest.mark.parametrize(
    ("status", "cause", "words"),
    [
        (401, "auth", "check api_id and api_key"),
        (404, "http", "check api.base_url"),
        (429, "rate_limited", "HTTP 429"),
        (502, "http", "HTTP 502"),
    ],
)
def test_a_refusal_is_explained_by_its_status_alone(status: int, cause: str, words: str) -> None:
    responses.get("https://api.example/api/remaining_credits/", status=status, json={"detail": PLANTED})
    error = failure(client("https://api.example").remaining_credits)
    assert (error.cause, error.status) == (cause, status)
    assert words in str(error)


@responses.activate
def test_a_task_is_asked_for_with_its_id_quoted_and_both_credentials() -> None:
    headers = {"X-API-ID": f"id-{PLANTED}", "X-API-KEY": f"key-{PLANTED}", "Accept-Encoding": "gzip"}
    responses.get(
        "https://api.example/sse/text_generator/a%2F..%3Fb/",
        json={"id": "a/..?b"},
        match=[responses.matchers.header_matcher(headers)],
    )
    assert one_task(client("https://api.example"), "a/..?b") == Record(id="a/..?b")


@responses.activate
def test_what_the_library_raises_is_told_by_its_kind_and_not_by_its_text() -> None:
    url = "https://api.example/api/remaining_credits/"
    for raised, cause in [
        (requests.ConnectionError(f"refused {PLANTED}"), "connection"),
        (requests.ConnectionError(TimeoutError(PLANTED)), "timeout"),
        (requests.exceptions.InvalidHeader(PLANTED), "connection"),
        (urllib3.exceptions.ProtocolError(PLANTED, ConnectionResetError(104, "Connection reset")), "connection"),
    ]:
        responses.upsert("GET", url, body=raised)
        assert failure(client("https://api.example").remaining_credits).cause == cause
