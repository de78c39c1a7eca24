"""Bad answers, hostile bodies and secrets, through the real exporter (design section 7)."""

import base64
import itertools
import json
import secrets
import socket
import ssl
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from time import time
from typing import Any

import psycopg
import pytest
import trustme
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from creatify_exporter.demo import BALANCE_PATH, LIST_PATH
from tests.support.commands import run
from tests.support.exporter import OPENMETRICS, ROOT, Exporter, Scrape, parse
from tests.support.postgres import Postgres
from tests.support.processes import eventually, free_port
from tests.support.stage import PREFIX, counts
from tests.support.upstream import Exchange, Upstream, task, tasks

pytestmark = pytest.mark.process

Answer = Callable[[Exchange], None]


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a new ledger: each row of section 7 holds with either database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.create_database()


def refuse(status: int, **headers: Any) -> Answer:
    return lambda exchange: exchange.reply({"detail": "no"}, status, **headers)


def body(data: bytes, **headers: Any) -> Answer:
    return lambda exchange: exchange.reply(data, **headers)


def cut_short(exchange: Exchange) -> None:
    exchange.reply(json.dumps([task()]).encode(), Content_Length="9999")
    exchange.close_connection = True


def close(exchange: Exchange) -> None:
    exchange.close_connection = True


def reset(exchange: Exchange) -> None:
    exchange.reply(b"[", Content_Length="9999")
    exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.connection.close()
    exchange.close_connection = True


def drip(exchange: Exchange) -> None:
    def bytes_by_the_second() -> Iterator[bytes]:
        yield b"["
        while not exchange.upstream.ended.wait(0.3):
            yield b" "

    exchange.stream(bytes_by_the_second())


def bomb(content: bytes) -> Answer:
    """Answer with 10 GB of `content`, some of it, compressed to 10 MB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = packer.compress(b"[") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(content * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return lambda exchange: exchange.stream(
        itertools.chain([head], itertools.repeat(block, 10_000)), Content_Encoding="gzip"
    )


def pages(*links: object) -> Answer:
    """Answer with page after page; the number of the page is in the query."""

    def answer(exchange: Exchange) -> None:
        number = int(exchange.path.partition("page=")[2] or 0)
        exchange.reply({"count": 9, "next": links[number], "results": [task(number), task(number + 1)]})

    return answer


def second_page_fails(exchange: Exchange) -> None:
    if "page" in exchange.path:
        exchange.reply({}, 500)
    else:
        exchange.reply({"next": f"{exchange.upstream.url}{LIST_PATH}?page=1", "results": [task()]})


ODD_RECORDS = (
    task(1, status="cancelled"),
    task(2, credits_used=None),
    task(3, credits_used=-5),
    task(4, credits_used=1_000_001),
    task(5, credits_used="0.5"),
    task(6, credits_used="1e3"),
    task(7, credits_used=[1]),
    task(8, created_at="yesterday", updated_at=7),
    task(9, model_name="\ud800\x00name\n"),
    task(10, model_name="n" * 1000),
    task(11, model_name=None),
    task(12, status="failed", failed_reason={"code": 1}),
    task(1, status="done"),
    task(13, id="with space"),
    task(14, id="x" * 65),
    task(15, id=7),
    {"model_name": "m"},
    None,
    "text",
    [task(16)],
)
FAILING: dict[str, tuple[Answer, str]] = {
    "unauthorized": (refuse(401), "auth"),
    "forbidden": (refuse(403), "auth"),
    "limited": (refuse(429), "rate_limited"),
    "not-found": (refuse(404), "http"),
    "broken": (refuse(500), "http"),
    "unavailable": (refuse(503), "http"),
    "empty-success": (refuse(204), "http"),
    "hang": (lambda exchange: exchange.hang(), "timeout"),
    "drip": (drip, "timeout"),
    "reset": (reset, "connection"),
    "closed": (close, "connection"),
    "cut-short": (cut_short, "payload"),
    "truncated": (body(json.dumps([task()]).encode()[:-9]), "payload"),
    "text": (body(b"service is busy"), "payload"),
    "html": (body(b"<html><body>busy</body></html>", Content_Type="text/html"), "payload"),
    "nothing": (body(b""), "payload"),
    "object": (body(b'{"detail": "no list"}'), "payload"),
    "results-object": (body(b'{"results": {}}'), "payload"),
    "trailing": (body(b"[] []"), "payload"),
    "not-gzip": (body(b"[]", Content_Encoding="gzip"), "payload"),
    "large": (body(b"[" + b" " * (3 << 20) + b"]"), "too_large"),
    "bomb": (bomb(b" "), "too_large"),
    "bomb-of-zeros": (bomb(b"\0"), "too_large"),
    "loop": (pages("?page=1", "?page=1"), "payload"),
    "odd-link": (pages(5), "payload"),
    "long-link": (pages("?page=1&" + "x" * 9000), "payload"),
    "second-page": (second_page_fails, "http"),
}


COUNTERS = {
    "tasks_submitted_total": ["model"],
    "tasks_finished_total": ["model", "status"],
    "failures_total": ["model", "reason"],
    "credits_used_total": ["model"],
}


def new_and_odd() -> Iterator[dict[str, object]]:
    """Return records of tasks submitted a moment ago: what is older than `ledger.retention` is not counted."""
    now = datetime.now(UTC).isoformat()
    odd: list[dict[str, object]] = [
        {"status": "cancelled"},
        {"credits_used": "0.5"},
        {"credits_used": 1_000_001},
        {"credits_used": 2, "model_name": "\ud800\x00name\n"},
        {"credits_used": -5, "status": "failed", "failed_reason": {"code": 1}},
        {"credits_used": 4, "created_at": "yesterday"},
        {"credits_used": 100, "id": "task-20"},
        {"credits_used": 100, "id": "with space"},
    ]
    for number, fields in enumerate(odd, 20):
        yield task(number, **{"created_at": now, "updated_at": now} | fields)


def test_each_bad_answer_fails_its_own_workspace_and_nothing_else(tmp_path: Path, ledger: str) -> None:
    with Upstream() as elsewhere, Upstream() as api:
        elsewhere.answers[""] = tasks(task())
        failing = dict(FAILING)
        for name, status in {"moved": 301, "found": 302, "see-other": 303, "temporary": 307, "permanent": 308}.items():
            failing[name] = refuse(status, Location=f"{elsewhere.url}{LIST_PATH}"), "http"
            api.balances[name] = refuse(status, Location=f"{elsewhere.url}{BALANCE_PATH}")
        failing["redirected-here"] = refuse(302, Location=f"{api.url}{LIST_PATH}?again"), "http"
        failing["foreign-link"] = pages(f"{elsewhere.url}{LIST_PATH}"), "payload"
        failing["other-host"] = pages(api.url.replace("127.0.0.1", "localhost") + LIST_PATH), "payload"
        api.answers = {name: answer for name, (answer, _) in failing.items()}
        api.answers |= {
            "good": tasks(task(1), task(2, status="running")),
            "odd": tasks(*ODD_RECORDS),
            "paged": pages("?page=1", None),
        }
        config = api.config(api={"timeout": "4s", "max_response_size": "2MiB"}, ledger={"url": ledger})
        with Exporter(tmp_path, "--log.format=json", config=config) as exporter:
            before = exporter.memory()
            scrape = exporter.scrape(scrape_timeout=30)
            assert scrape.values("creatify_up", "workspace") == {(name,): name not in failing for name in api.answers}
            errors = scrape.values("creatify_exporter_listing_errors_total", "workspace", "cause")
            found = {name: {cause: n for (who, cause), n in errors.items() if who == name and n} for name in failing}
            assert found == {name: {cause: 1} for name, (_, cause) in failing.items()}
            assert exporter.memory() - before < 60_000_000

            listed = scrape.values(PREFIX + "tasks", "workspace", "model", "status")
            assert {workspace for workspace, _, _ in listed} == {"good", "odd", "paged"}
            assert listed["good", "m", "done"] == listed["good", "m", "running"] == 1
            assert listed["paged", "m", "done"] == 3
            assert listed["odd", "m", "done"] == 7
            assert listed["odd", "m", "unknown"] == listed["odd", "m", "failed"] == 1
            assert listed["odd", "unknown", "done"] == listed["odd", "n" * 128, "done"] == 1
            assert listed["odd", "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}name", "done"] == 1
            credits_listed = scrape.values(PREFIX + "listed_credits", "workspace", "model")
            assert credits_listed["odd", "m"] == 3.5
            assert scrape.value("creatify_exporter_malformed_tasks", workspace="odd") == 7
            assert scrape.value(PREFIX + "failed_tasks", workspace="odd") == 1

            balances = scrape.values("creatify_remaining_credits", "workspace")
            assert set(balances.values()) == {7}
            assert {name for (name,) in balances} == api.answers.keys() - api.balances.keys()
            assert exporter.get("/-/ready").ok
            assert exporter.get("/").ok
            exporter.scrape(openmetrics=True, scrape_timeout=30)
            api.answers["odd"] = tasks(*ODD_RECORDS, *new_and_odd())
            scrape = exporter.scrape(scrape_timeout=30)
            counters = {
                name: [
                    sample for sample in scrape.values(PREFIX + name, "workspace", *by).items() if sample[0][0] == "odd"
                ]
                for name, by in COUNTERS.items()
            }
            grown = {name: {labels[1:]: value for labels, value in each if value} for name, each in counters.items()}
            cleaned = "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}name"
            assert grown == {
                "tasks_submitted_total": {("m",): 5, (cleaned,): 1},
                "tasks_finished_total": {("m", "done"): 3, ("m", "failed"): 1, (cleaned, "done"): 1},
                "failures_total": {("m", "unspecified"): 1},
                "credits_used_total": {("m",): 5.5, (cleaned,): 2},
            }
            lines = [json.loads(line) for line in exporter.log().splitlines()]
            complaints = {line["workspace"]: line for line in lines if line["event"] == "listing failed"}
            assert {name: line["cause"] for name, line in complaints.items()} == {n: c for n, (_, c) in failing.items()}
            assert complaints["forbidden"]["status"] == 403
            assert "api.base_url" in complaints["moved"]["error"]
        assert not elsewhere.requests
        assert "Traceback" not in exporter.log()


def test_an_api_that_cannot_be_reached_is_a_connection_failure(tmp_path: Path, ledger: str) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with Upstream(good=tasks(task())) as api, Upstream(good=tasks(task())) as tls:
        tls.serve_tls(context)
        bundle = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(bundle))
        kept = {"url": ledger}
        with Exporter(tmp_path, "--web.enable-lifecycle", config=api.config(ledger=kept)) as exporter:
            assert exporter.scrape().value("creatify_up") == 1
            wrong = {
                "refused": f"http://127.0.0.1:{free_port()}",
                "no TLS there": api.url.replace("http", "https"),
                "unknown authority": tls.url,
                "no such host": "http://no-such-host.invalid",
            }
            for number, url in enumerate(wrong.values(), 1):
                exporter.configure(api.config(api={"base_url": url, "allow_http": True}, ledger=kept))
                assert exporter.session.post(exporter.url + "/-/reload").ok
                scrape = exporter.scrape()
                assert scrape.value("creatify_up") == 0, url
                errors = scrape.values("creatify_exporter_listing_errors_total", "cause")
                assert {cause: n for cause, n in errors.items() if n} == {("connection",): number}
                assert counts(scrape, "good") == {}
                assert scrape.values(PREFIX + "tasks_submitted_total", "model") == {("m",): 0}
            exporter.configure(api.config(api={"base_url": tls.url, "ca_file": str(bundle)}, ledger=kept))
            assert exporter.session.post(exporter.url + "/-/reload").ok
            assert exporter.scrape().value("creatify_up") == 1


def refuse_until_8_seconds_from_now(exchange: Exchange) -> None:
    exchange.reply({}, 429, Retry_After=formatdate(time() + 8, usegmt=True))


def test_a_refusal_with_a_time_is_heeded_for_listings_and_balance_apart(tmp_path: Path) -> None:
    good = tasks(task())
    with Upstream() as api:
        api.answers = {
            "seconds": refuse(429, Retry_After="6"),
            "date": refuse_until_8_seconds_from_now,
            "unavailable": refuse(503, Retry_After="6"),
            "unsaid": refuse(429),
            "broken": refuse(503),
            "balance": good,
            "balance-unsaid": good,
        }
        api.balances = {"balance": refuse(429, Retry_After="6"), "balance-unsaid": refuse(429)}
        with Exporter(tmp_path, config=api.config()) as exporter:
            exporter.scrape()
            for _ in range(3):
                scrape = exporter.scrape()
            held = {"seconds", "date", "unavailable", "unsaid"}
            assert {name for name in api.answers if api.listings(name) == 1} == held
            assert {api.listings(name) for name in api.answers.keys() - held} == {4}
            assert {name for name in api.answers if api.looks_at_balance(name) == 1} == held | set(api.balances)
            assert api.looks_at_balance("broken") == 4
            errors = scrape.values("creatify_exporter_listing_errors_total", "workspace", "cause")
            assert {key: n for key, n in errors.items() if n} == {
                ("seconds", "rate_limited"): 1,
                ("date", "rate_limited"): 1,
                ("unavailable", "http"): 1,
                ("unsaid", "rate_limited"): 1,
                ("broken", "http"): 4,
            }
            ups = scrape.values("creatify_up", "workspace")
            assert {name for (name,), up in ups.items() if up} == set(api.balances)
            requests = scrape.values("creatify_exporter_api_requests_total", "workspace", "endpoint", "code")
            assert requests["seconds", "text_generator", "429"] == 1
            assert requests["balance", "remaining_credits", "429"] == 1
            assert requests["balance", "text_generator", "200"] == 4
            balances = scrape.values("creatify_remaining_credits", "workspace")
            assert set(balances) == {("broken",)}

            for name in ("seconds", "date", "unavailable"):
                api.answers[name] = good
            del api.balances["balance"]

            def recovered() -> bool:
                scrape = exporter.scrape()
                ups = scrape.values("creatify_up", "workspace")
                back = scrape.value("creatify_remaining_credits", workspace="balance") == 7
                return back and all(ups[name,] for name in ("seconds", "date", "unavailable"))

            eventually(recovered, 20, "all are asked again", every=0.5)
            assert api.listings("unsaid") == api.looks_at_balance("unsaid") == 1
            assert api.looks_at_balance("balance-unsaid") == 1
            said = [line for line in exporter.log().splitlines() if "workspace=seconds" in line]
            assert [line.partition("event=")[2].partition("workspace")[0].strip(' "') for line in said] == [
                "listing failed",
                "backing off",
                "listing works again",
            ]


def test_a_workspace_that_hangs_delays_nobody_beyond_the_deadline(tmp_path: Path) -> None:
    answers: dict[str, Answer] = {"good": tasks(task()), "hang": lambda exchange: exchange.hang()}
    with Upstream(**answers) as api, Exporter(tmp_path, config=api.config(api={"timeout": "60s"})) as exporter:
        for _ in range(2):
            started = time()
            scrape = exporter.scrape(scrape_timeout=1.5)
            assert 0.9 < time() - started < 1.5 + 1  # a second for a busy machine
            assert scrape.values("creatify_up", "workspace") == {("good",): 1, ("hang",): 0}
            assert scrape.value("creatify_remaining_credits", workspace="good") == 7
        started = time()
        assert exporter.scrape("/metrics?workspace=good").value("creatify_up") == 1
        assert time() - started < 2
        assert (api.listings("good"), api.listings("hang")) == (3, 1)
        api.balances["good"] = lambda exchange: exchange.hang()
        started = time()
        scrape = exporter.scrape("/metrics?workspace=good")
        assert time() - started < 2
        assert scrape.value("creatify_up") == 1
        assert "creatify_remaining_credits" not in scrape.families
        assert exporter.stop() == 0


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec=None), max_size=30),  # lone surrogates and NUL as well
    st.sampled_from([10**400, -(10**30), 1e308, "\ud800", "\x00", "0.5", "1e999", "2026-01-01T00:00:00Z", "failed"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
records = st.fixed_dictionaries(
    {
        "id": st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True) | values,
        "model_name": st.sampled_from(["m", "n"]) | values,
        "status": st.sampled_from(["pending", "running", "done", "failed"]) | values,
    },
    optional={
        "failed_reason": st.sampled_from(["429 RESOURCE_EXHAUSTED", "timed out"]) | values,
        "credits_used": st.floats(0, 100) | values,
        "created_at": st.datetimes().map(str) | values,
        "updated_at": st.datetimes().map(str) | values,
        "messages": values,
    },
)


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return a list with some bytes cut out, changed or put in."""
    data = bytearray(dump(draw(st.lists(records, min_size=1, max_size=4))))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 5))] = draw(st.binary(max_size=3))
    return bytes(data)


bodies = st.one_of(
    st.lists(records, max_size=6).map(dump),
    st.lists(records | values, max_size=6).map(lambda results: dump({"next": None, "results": results})),
    damaged(),
    values.map(dump),
    st.binary(max_size=200),
)
FIELDS = ("id", "model_name", "status", "failed_reason", "credits_used", "created_at", "updated_at", "messages")


def with_field(name: str, value: bytes) -> bytes:
    """Return a list whose one record has the field last, over what it had before: a duplicate key."""
    return dump([task()])[:-2] + b',"%b":%b}]' % (name.encode(), value)


EXTREMES: Sequence[bytes] = [
    *(with_field(name, b"[" * 10_000 + b"]" * 10_000) for name in ("messages", "id", "credits_used")),
    with_field("messages", b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    with_field("messages", b"[" * 10_000),
    b"[" * 10_000,
    b"[" * 10_000 + b"]" * 10_000,
    b'{"results":' * 10_000,
    *(with_field(name, rb'"\ud800"') for name in FIELDS),
    *(with_field(name, rb'"a\u0000b"') for name in FIELDS),
    *(with_field(name, b"9" * 5000) for name in ("credits_used", "messages", "id")),
    *(with_field(name, b'"' + b"x" * (1 << 20) + b'"') for name in FIELDS),
    with_field("n" * (1 << 20), b"1"),
    with_field("credits_used", b"1e999"),
    with_field("credits_used", b"NaN"),
    with_field("credits_used", b"-Infinity"),
    with_field("messages", b"\xff\xfe\x00"),
    dump([task()]).decode().encode("utf-16"),
    b"\xef\xbb\xbf" + dump([task()]),
]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_body_ever_breaks_an_answer(tmp_path: Path, ledger: str, soak: bool) -> None:
    good = tasks(task(1), task(2, status="failed", failed_reason="timed out"))
    with (
        Upstream(fuzz=tasks(), good=good) as api,
        Exporter(tmp_path, config=api.config(labels={"max_models": 3}, ledger={"url": ledger})) as exporter,
    ):
        exporter.scrape()
        pid = exporter.pid

        def check(data: bytes) -> Scrape:
            api.answers["fuzz"] = body(data)
            text = exporter.get("/metrics?workspace=fuzz&workspace=good")
            openmetrics = exporter.get("/metrics?workspace=fuzz", headers={"Accept": OPENMETRICS})
            assert (text.status_code, openmetrics.status_code) == (200, 200)
            parse(openmetrics.content.decode(), openmetrics=True)
            scrape = parse(text.content.decode())
            assert scrape.values("creatify_up", "workspace")["good",] == 1
            assert scrape.values(PREFIX + "tasks", "workspace", "model", "status")["good", "m", "failed"] == 1
            return scrape

        for extreme in EXTREMES:
            check(extreme)
        assert check(EXTREMES[0]).value("creatify_up", workspace="fuzz") == 1

        @given(bodies)
        @example(b"")
        @settings(
            max_examples=3000 if soak else 40,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        def fuzz(data: bytes) -> None:
            check(data)

        fuzz()
        assert exporter.pid == pid
        assert exporter.running()
        scrape = exporter.scrape()
        errors = scrape.values("creatify_exporter_listing_errors_total", "workspace", "cause")
        assert {cause for (_, cause), count in errors.items() if count} == {"payload"}
        assert scrape.value("creatify_exporter_ledger_up") == 1
        assert exporter.memory() < 150_000_000
        assert "Traceback" not in exporter.log()


class Secrets:
    """Make secrets, and look for them in whatever comes out."""

    def __init__(self) -> None:
        self._made: dict[str, str] = {}

    def __call__(self, place: str) -> str:
        """Return a secret to plant; `place` names it in a failure."""
        return self._made.setdefault(place, "s" + secrets.token_hex(15) + "t")

    def assert_absent(self, output: str | bytes, where: str) -> None:
        data = output.encode() if isinstance(output, str) else output
        found = [
            place
            for place, secret in self._made.items()
            if secret.encode() in data or base64.b64encode(secret.encode())[:-4] in data or secret[:12].encode() in data
        ]
        assert not found, f"{found} in {where}"


def test_no_secret_and_no_words_of_the_api_come_out_anywhere(tmp_path: Path, postgres: Postgres) -> None:
    plant = Secrets()

    def words(place: str) -> dict[str, object]:
        """Return a failed task with secrets in all its texts."""
        return task(
            status="failed",
            failed_reason=f"403 PERMISSION_DENIED: key {plant(f'{place}: failed_reason')} of {plant(f'{place}: who')}",
            messages=[{"role": "user", "content": plant(f"{place}: messages")}],
            response_text=plant(f"{place}: response_text"),
            config={"note": plant(f"{place}: config")},
        )

    def refuse_in_words(exchange: Exchange) -> None:
        exchange.send_response(500, plant("reason phrase"))
        exchange.send_header("Content-Length", "0")
        exchange.send_header("X-Secret", plant("header"))
        exchange.end_headers()

    def without_length(exchange: Exchange) -> None:
        exchange.reply(b"[", Content_Length=plant("length"))
        exchange.close_connection = True

    def text(place: str) -> bytes:
        return f"<html>{plant(place)}</html>".encode()

    listed = json.dumps([words("truncated")]).encode()
    with Upstream() as api:
        api.answers = {
            "failed": tasks(words("listed"), task(2, id=plant("id") + " "), task(3, status=plant("status"))),
            "unknown-words": tasks(*(task(n, status="failed", failed_reason=plant(f"words {n}")) for n in range(15))),
            "refused": lambda exchange: exchange.reply({"detail": plant("error body")}, 401),
            "broken": refuse_in_words,
            "html": body(text("html")),
            "truncated": body(listed[:-2]),
            "gzip": body(text("no gzip"), Content_Encoding="gzip"),
            "moved": refuse(302, Location=f"http://elsewhere.invalid/{plant('location')}?key={plant('query')}"),
            "odd-move": refuse(302, Location=plant("odd location")),
            "link": pages(f"http://{plant('user')}:{plant('password')}@elsewhere.invalid/"),
            "later": refuse(429, Retry_After=plant("retry after")),
            "length": without_length,
        }
        api.balances = {
            "failed": body(json.dumps({"remaining_credits": plant("balance")}).encode()),
            "html": body(text("balance page")),
        }
        config = api.config(api={"timeout": "5s"})
        for workspace in config["workspaces"]:
            workspace["api_id"] += "." + plant(f"API id of {workspace['name']}")
            workspace["api_key"] = plant(f"API key of {workspace['name']}")
        valid = Exporter(tmp_path, config=config).config_file
        wrong = {
            "values": config
            | {
                "workspaces": [{"name": "a", "api_id": [plant("listed id")], "api_key": {plant("key as key"): 1}}],
                "api": {"base_url": f"http://user:{plant('URL password')}@host", "timeout": plant("timeout")},
                "ledger": {"url": f"mysql://user:{plant('ledger password')}@host/db", "password": plant("unknown key")},
            },
            "syntax": f'workspaces: [{{name: a, api_key: "{plant("unclosed")}\n',
            "type": plant("a text only"),
        }
        files = [tmp_path / f"{name}.yaml" for name in wrong]
        for file, content in zip(files, wrong.values(), strict=True):
            file.write_text(content if isinstance(content, str) else json.dumps(content))

        def check(where: str, *arguments: str, code: int) -> str:
            command = [sys.executable, str(ROOT / "exporter.py"), "--log.level=debug", *arguments]
            result = run(*command, cwd=tmp_path / "once")
            assert result.returncode == code, (where, result.stderr)
            plant.assert_absent(result.stdout + result.stderr, where)
            return result.stdout + result.stderr

        (tmp_path / "once").mkdir()
        for file in files[:2]:
            assert check(f"--config.check {file.name}", f"--config.file={file}", "--config.check", code=1)
        once = check("--once", f"--config.file={valid}", "--once", code=1)
        assert 'creatify_text_generator_failed_tasks{model="m",reason="permission_denied",workspace="failed"} 1' in once
        reasons = check("--reasons", f"--config.file={valid}", "--reasons", code=1)
        assert "permission_denied" in reasons
        assert reasons.count("\n") > 10

        for log_format in ("logfmt", "json"):
            flags = "--web.enable-lifecycle", "--log.level=debug", f"--log.format={log_format}"
            with Exporter(tmp_path / log_format, *flags, config=config) as exporter:
                for path in ("/metrics", "/", "/sd", "/-/ready", "/metrics?workspace=failed", "/nothing"):
                    for accept in ("text/plain", OPENMETRICS):
                        answer = exporter.get(path, headers={"Accept": accept})
                        plant.assert_absent(answer.text + str(answer.headers), path)
                for file in files:
                    exporter.configure(file.read_text())
                    answer = exporter.session.post(exporter.url + "/-/reload")
                    assert answer.status_code == 500
                    plant.assert_absent(answer.text, f"reload of {file.name}")
                exporter.configure(config)
                assert exporter.session.post(exporter.url + "/-/reload").ok
                exporter.scrape()
                exporter.kill()  # so that the write-ahead log stays
            assert exporter.log().count("listing failed") >= len(api.answers) - 2
            plant.assert_absent(exporter.log(), f"log in {log_format}")
            assert len([file.name for file in (tmp_path / log_format).glob("*.db*")]) >= 2
            for file in (tmp_path / log_format).glob("*.db*"):
                plant.assert_absent(file.read_bytes(), file.name)

        database = config | {"ledger": {"url": postgres.create_database()}}
        with Exporter(tmp_path / "replica", config=database) as exporter:
            assert exporter.scrape().value("creatify_exporter_ledger_up") == 1
        with psycopg.connect(database["ledger"]["url"]) as connection:
            ((tables,),) = connection.execute("SELECT database_to_xml(true, false, '')").fetchall()
        assert "permission_denied" in tables
        plant.assert_absent(tables, "PostgreSQL")

        url = f"postgresql://exporter:{plant('PostgreSQL password')}@127.0.0.1:{free_port()}/db"
        config |= {"ledger": {"url": url}}
        with Exporter(tmp_path / "postgresql", "--log.level=debug", config=config) as exporter:
            assert exporter.scrape().value("creatify_exporter_ledger_up") == 0
        assert "postgresql://exporter:***@127.0.0.1" in exporter.log()
        plant.assert_absent(exporter.log(), "log without a database")
