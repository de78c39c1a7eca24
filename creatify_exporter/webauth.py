"""Basic authentication with bcrypt, as the exporter toolkit of Prometheus does it, in front of every endpoint."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_REMEMBERED_FAILURES = 1024
_PASSWORD_BYTES = 72  # what bcrypt looks at; the library refuses longer ones instead of cutting them off


class Authentication:
    """Let requests pass that carry the name and password of a user; with no users, all of them.

    An unknown user and a wrong password cost the same work, that of a check against the dearest hash. Results are
    remembered under a keyed digest, so neither a scrape every few seconds nor a client that retries pays bcrypt again.
    One check runs at a time: guessing takes one core at most, and requests with a known result never wait behind it.
    """

    def __init__(self, users: Mapping[str, str]) -> None:
        self._key = secrets.token_bytes(32)
        self._passed: dict[bytes, tuple[bytes, bytes]] = {}
        self._failed: OrderedDict[bytes, None] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[bool]] = {}
        self._gate = asyncio.Semaphore(1)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="bcrypt")
        self.replace(users)

    def replace(self, users: Mapping[str, str]) -> None:
        """Take `users` (name to bcrypt hash) in place of the former ones, from the next request on.

        Whose hash stays the same need not be checked again.
        """
        self._users = {name.encode(): stored.encode() for name, stored in users.items()}
        self._cost = max(map(_cost, self._users.values()), default=10)
        self._passed = {key: user for key, user in self._passed.items() if user in self._users.items()}

    async def allows(self, authorization: str) -> bool:
        """Tell whether the value of an `Authorization` header names a user and its password."""
        if not self._users:
            return True
        scheme, _, encoded = authorization.partition(" ")
        try:
            user, separator, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        if scheme.lower() != "basic" or not separator:
            return False
        password = password[:_PASSWORD_BYTES]
        stored = self._users.get(user, _dummy(self._cost))
        key = self._digest(user, stored, password)
        if key in self._passed:
            return True
        if key in self._failed:
            self._failed.move_to_end(key)
            return False
        if (task := self._running.get(key)) is None:
            task = self._running[key] = asyncio.create_task(self._check(key, user, stored, password))
        return await asyncio.shield(task)

    def _digest(self, *parts: bytes) -> bytes:
        digest = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.digest()

    async def _check(self, key: bytes, user: bytes, stored: bytes, password: bytes) -> bool:
        try:
            async with self._gate:
                loop = asyncio.get_running_loop()
                matches = await loop.run_in_executor(self._executor, _matches, password, stored, self._cost)
        finally:
            del self._running[key]
        if passed := matches and self._users.get(user) == stored:
            self._passed[key] = user, stored
        else:
            self._failed[key] = None
            if len(self._failed) > _REMEMBERED_FAILURES:
                self._failed.popitem(last=False)
        return passed


def _cost(stored: bytes) -> int:
    return int(stored.split(b"$")[2])


def _dummy(cost: int) -> bytes:
    """Return the hash of nobody's password."""
    return b"$2b$%02d$" % cost + b"." * 53


def _matches(password: bytes, stored: bytes, dearest: int) -> bool:
    """Check a password; a wrong one costs 2**dearest rounds of work whatever the cost of `stored`, never above it."""
    if _is_of(password, stored):
        return True
    # A check of cost n takes 2**n rounds, and 2**n + 2**n + 2**(n+1) + ... + 2**(dearest-1) is 2**dearest.
    for cost in range(_cost(stored), dearest):
        _is_of(password, _dummy(cost))
    return False


def _is_of(password: bytes, stored: bytes) -> bool:
    import bcrypt  # only where there are users

    try:
        return bcrypt.checkpw(password, stored)
    except ValueError:
        return False


class RequireUser:
    """Answer 401 to requests that `authentication` does not let pass, before anything else looks at them."""

    def __init__(self, app: ASGIApp, authentication: Authentication) -> None:
        self._app = app
        self._authentication = authentication

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if await self._authentication.allows(Headers(scope=scope).get("authorization", "")):
            return await self._app(scope, receive, send)
        challenge = {"WWW-Authenticate": 'Basic realm="creatify-exporter", charset="UTF-8"'}
        return await PlainTextResponse("Unauthorized\n", 401, challenge)(scope, receive, send)
