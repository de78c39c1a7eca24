"""Who may read: Basic authentication with bcrypt."""

import asyncio
import base64
import errno
import threading

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from creatify_exporter import webauth
from creatify_exporter.webauth import Authentication
from tests.support.asgi import ask, ask_once
from tests.support.webhost import FakeSite, app_of

HASHES = {name: bcrypt.hashpw(password, bcrypt.gensalt(4)).decode() for name, password in [("ann", b"pw"), ("bo", b"")]}


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The hashes that passwords were checked against, one per bcrypt computation."""
    seen: list[bytes] = []
    checkpw = bcrypt.checkpw

    def counting(password: bytes, stored: bytes) -> bool:
        assert threading.current_thread() is not threading.main_thread(), "the event loop was blocked"
        seen.append(stored)
        return checkpw(password, stored)

    monkeypatch.setattr(bcrypt, "checkpw", counting)
    return seen


@pytest.mark.parametrize("path", ["/", "/metrics", "/-/healthy", "/-/ready", "/-/reload", "/sd", "/nowhere"])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_every_endpoint_asks_for_a_user(path: str, method: str) -> None:
    site = FakeSite(lifecycle=True)
    answer = ask_once(app_of(site, Authentication(HASHES)), path, method=method)
    assert (answer.status, answer.headers["www-authenticate"].split()[0]) == (401, "Basic")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (site.scrapes, site.reloads) == ([], 0)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (basic("ann", "pw"), 200),
        (basic("bo", ""), 200),
        (basic("ann", "pw").replace("Basic", "bASIC"), 200),
        (basic("ann", "PW"), 401),
        (basic("ann", ""), 401),
        (basic("ann", "pw\0"), 401),
        (basic("Ann", "pw"), 401),
        (basic("nobody", "pw"), 401),
        (basic("", ""), 401),
        (basic("ann", "x" * 10_000), 401),
        ("Basic", 401),
        ("Basic !", 401),
        ("Basic \xe9\xe9", 401),
        ("Basic " + base64.b64encode(b"ann").decode(), 401),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), 401),
        (basic("ann", "pw").replace("Basic", "Bearer"), 401),
        ("", 401),
    ],
)
def test_only_a_user_with_the_right_password_passes(authorization: str, status: int) -> None:
    app = app_of(FakeSite(), Authentication(HASHES))
    assert ask_once(app, "/metrics", ("Authorization", authorization)).status == status


@given(st.text(st.characters(max_codepoint=255)))
def test_no_authorization_header_is_too_odd(value: str) -> None:
    assert not asyncio.run(Authentication(HASHES).allows(value))


def test_without_users_everybody_passes() -> None:
    assert ask_once(app_of(FakeSite()), "/metrics", ("Authorization", "odd")).status == 200


def test_an_unknown_user_costs_the_same_check_as_a_wrong_password(checks: list[bytes]) -> None:
    authentication = Authentication(HASHES)
    for authorization in (basic("ann", "wrong"), basic("nobody", "wrong")):
        checks.clear()
        assert not asyncio.run(authentication.allows(authorization))
        assert [one.split(b"$")[1:3] for one in checks] == [[b"2b", b"04"]]


def test_an_unknown_user_costs_the_dearest_of_the_hashes(checks: list[bytes]) -> None:
    dear = bcrypt.hashpw(b"pw", bcrypt.gensalt(6)).decode()
    assert not asyncio.run(Authentication(HASHES | {"cy": dear}).allows(basic("nobody", "pw")))
    assert checks[0].startswith(b"$2b$06$")


@pytest.mark.parametrize(("password", "passes"), [("pw", True), ("wrong", False)])
def test_a_result_is_remembered(checks: list[bytes], password: str, passes: bool) -> None:
    authentication = Authentication(HASHES)
    for _ in range(3):
        assert asyncio.run(authentication.allows(basic("ann", password))) is passes
    assert len(checks) == 1


def test_requests_at_the_same_time_share_one_check(checks: list[bytes]) -> None:
    authentication = Authentication(HASHES)

    async def many() -> list[bool]:
        return await asyncio.gather(*(authentication.allows(basic("ann", "pw")) for _ in range(100)))

    assert all(asyncio.run(many()))
    assert len(checks) == 1


def test_failures_are_remembered_within_bounds_and_do_not_displace_successes(
    checks: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webauth, "_REMEMBERED_FAILURES", 3)
    authentication = Authentication(HASHES)

    async def run() -> None:
        assert await authentication.allows(basic("ann", "pw"))
        for number in range(5):
            assert not await authentication.allows(basic("ann", f"wrong {number}"))
        assert len(checks) == 6
        assert not await authentication.allows(basic("ann", "wrong 4"))
        assert await authentication.allows(basic("ann", "pw"))
        assert len(checks) == 6
        assert not await authentication.allows(basic("ann", "wrong 0"))
        assert len(checks) == 7

    asyncio.run(run())


def test_a_flood_of_wrong_passwords_does_not_hold_up_a_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started, release = threading.Event(), threading.Event()
    running: list[bytes] = []
    app = app_of(FakeSite(), Authentication(HASHES))

    def blocked(password: bytes, _stored: bytes) -> bool:
        running.append(password)
        started.set()
        return release.wait(30) and False

    async def run() -> None:
        known = ("Authorization", basic("ann", "pw"))
        assert (await ask(app, "/metrics", known)).status == 200
        monkeypatch.setattr(bcrypt, "checkpw", blocked)
        flood = [asyncio.create_task(ask(app, "/metrics", ("Authorization", basic("ann", str(n))))) for n in range(100)]
        assert await asyncio.to_thread(started.wait, 30)
        for _ in range(50):
            assert (await asyncio.wait_for(ask(app, "/metrics", known), 5)).status == 200
        assert len(running) == 1
        assert not any(task.done() for task in flood)
        release.set()
        assert {(await task).status for task in flood} == {401}

    asyncio.run(run())


def test_a_check_that_cannot_be_made_locks_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    authentication = Authentication(HASHES)

    def exhausted(_password: bytes, _stored: bytes) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(bcrypt, "checkpw", exhausted)
            for user in ("ann", "nobody"):
                with pytest.raises(OSError, match="Too many open files"):
                    await authentication.allows(basic(user, "pw"))
        assert not await authentication.allows(basic("ann", "wrong"))
        assert await authentication.allows(basic("ann", "pw"))

    asyncio.run(run())


def test_an_unknown_user_and_a_wrong_password_cost_the_same_work_whatever_the_hashes(checks: list[bytes]) -> None:
    users = {name: bcrypt.hashpw(b"pw", bcrypt.gensalt(cost)).decode() for name, cost in [("cheap", 4), ("dear", 9)]}
    authentication = Authentication(users)
    work = {}
    for name in ("cheap", "dear", "nobody"):
        checks.clear()
        assert not asyncio.run(authentication.allows(basic(name, "wrong")))
        work[name] = sum(2 ** int(stored.split(b"$")[2]) for stored in checks)
    assert work == dict.fromkeys(work, 2**9)


def test_a_reload_that_leaves_a_user_alone_keeps_who_has_passed(checks: list[bytes]) -> None:
    authentication = Authentication(HASHES)

    async def run() -> list[int]:
        counts = []
        for users in (HASHES, HASHES, {"ann": HASHES["ann"]}, {"bo": HASHES["bo"]}, HASHES):
            authentication.replace(users)
            await authentication.allows(basic("ann", "pw"))
            counts.append(len(checks))
        return counts

    # Who comes back with the same hash has passed already.
    assert asyncio.run(run()) == [1, 1, 1, 2, 2]


def test_users_are_replaced_at_once() -> None:
    authentication = Authentication(HASHES)
    changed = bcrypt.hashpw(b"new", bcrypt.gensalt(4)).decode()

    async def run() -> list[bool]:
        before = [await authentication.allows(basic("ann", password)) for password in ("pw", "new")]
        authentication.replace({"ann": changed})
        after = [await authentication.allows(basic("ann", password)) for password in ("pw", "new")]
        return [*before, *after, await authentication.allows(basic("bo", ""))]

    assert asyncio.run(run()) == [True, False, False, True, False]


def test_a_check_that_was_running_when_its_user_went_lets_nobody_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    started, release = threading.Event(), threading.Event()
    authentication = Authentication(HASHES)

    def slow(_password: bytes, _stored: bytes) -> bool:
        started.set()
        return release.wait(30)

    async def run() -> bool:
        monkeypatch.setattr(bcrypt, "checkpw", slow)
        task = asyncio.create_task(authentication.allows(basic("ann", "pw")))
        await asyncio.to_thread(started.wait, 30)
        authentication.replace({"bo": HASHES["bo"]})
        release.set()
        return await task

    assert asyncio.run(run()) is False


def test_long_passwords_count_to_where_bcrypt_looks() -> None:
    stored = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()
    authentication = Authentication({"ann": stored})
    assert asyncio.run(authentication.allows(basic("ann", "x" * 100)))
    assert not asyncio.run(authentication.allows(basic("ann", "x" * 71)))


def test_a_hash_that_bcrypt_does_not_take_lets_nobody_pass() -> None:
    assert not asyncio.run(Authentication({"ann": "$2b$04$short"}).allows(basic("ann", "pw")))
