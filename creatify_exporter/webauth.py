"""Basic authentication with bcrypt, as the exporter toolkit of Prometheus does it."""

import asyncio
import base64
import hmac
import secrets
from collections.abc import Mapping

_REMEMBERED_FAILURES = 1024
_PASSWORD_BYTES = 72  # what bcrypt looks at; the library refuses longer ones instead of cutting them off


class Authentication:
    """Let requests pass that carry the name and password of a user; with no users, all of them.

    An unknown user and a wrong password cost the same work, that of a check against the dearest hash. Checks are
    remembered under a keyed digest, so neither a scrape every few seconds nor a client that retries pays bcrypt again.
    One runs at a time: guessing takes one core at most, and requests with a known result never wait behind it.
    """

    def __init__(self, users: Mapping[str, str]) -> None:
        self._key = secrets.token_bytes(32)
        self._checks: dict[bytes, asyncio.Task[bool]] = {}  # those asked for last are last
        self._gate = asyncio.Lock()
        self.replace(users)

    def replace(self, users: Mapping[str, str]) -> None:
        """Take `users` (name to bcrypt hash) in place of the former ones, from the next request on.

        Whose hash stays the same need not be checked again.
        """
        self._users = {name.encode(): stored.encode() for name, stored in users.items()}
        self._cost = max(map(_cost, self._users.values()), default=10)

    async def allows(self, authorization: str) -> bool:
        """Tell whether the value of an `Authorization` header names a user and its password."""
        if not self._users:
            return True
        scheme, _, encoded = authorization.partition(" ")
        try:
            user, separator, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        except ValueError:
            return False
        if scheme.lower() != "basic" or not separator:
            return False
        password = password[:_PASSWORD_BYTES]
        stored = self._users.get(user, _dummy(self._cost))
        # Neither a hash nor a name has a colon.
        key = hmac.digest(self._key, b":".join((stored, user, password)), "sha256")
        check = self._checks.pop(key, None)
        if check is None:
            failed = [key for key, check in self._checks.items() if check.done() and not check.result()]
            for forgotten in failed[: 1 - _REMEMBERED_FAILURES]:
                del self._checks[forgotten]
            check = asyncio.create_task(self._check(key, password, stored))
        self._checks[key] = check
        return await asyncio.shield(check) and self._users.get(user) == stored

    async def _check(self, key: bytes, password: bytes, stored: bytes) -> bool:
        try:
            async with self._gate:
                return await asyncio.to_thread(_matches, password, stored, self._cost)
        except BaseException:
            del self._checks[key]  # one that could not be made says nothing of the password
            raise


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
