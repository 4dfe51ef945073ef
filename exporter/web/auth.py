"""Basic authentication against bcrypt hashes."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Mapping

LONGEST_PASSWORD = 72
"""bcrypt looks no further, and its library refuses more."""
WAITING = 16
"""Hashes waited for at most; one takes 0.1 s of a core, so a flood of guesses is put off, not queued."""
_REFUSED = 256
# A well-formed hash that no password is known for; the cost is put in its place.
_DUMMY = "$2b${cost:02d}$iF/givzoYo2U/5KlER3aVuxKygz8sZN3cmlrKauEoxqOeg22ZQjjK"


class Busy(Exception):
    """So many passwords wait to be checked that one more would wait for too long."""


class Users:
    """Remembers which passwords were right and which were wrong; every other is hashed, one at a time, in a thread.

    The right ones are kept apart, one for each user, so that a flood of guesses does not push them out.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._right: dict[str, bytes] = {}
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._one = asyncio.Lock()
        self._waiting = 0

    async def admits(self, authorization: str | None, users: Mapping[str, str]) -> bool:
        """Whether this Authorization header names one of `users` (name → bcrypt hash); always when there are none.

        Raises `Busy` rather than call a password wrong that nobody has looked at.
        """
        if not users:
            return True
        user, password = credentials(authorization or "")
        if user is None:
            return False
        known = users.get(user)
        # An unknown user, or a password that cannot be right, costs the time of a hash like any other.
        possible = known is not None and len(password) <= LONGEST_PASSWORD and b"\0" not in password
        hashed = known or _DUMMY.format(cost=max(int(one[4:6]) for one in users.values()))
        mark = hmac.digest(self._key, b"\0".join((user.encode(), hashed.encode(), password)), hashlib.sha256)
        if (remembered := self._remembered(user, mark)) is not None:
            return remembered
        if self._waiting >= WAITING:
            raise Busy
        self._waiting += 1
        try:
            async with self._one:
                if (remembered := self._remembered(user, mark)) is not None:
                    return remembered
                right = await asyncio.to_thread(_check, password if possible else b"-", hashed) and possible
        finally:
            self._waiting -= 1
        self._remember(user, mark, right)
        return right

    def _remembered(self, user: str, mark: bytes) -> bool | None:
        if hmac.compare_digest(self._right.get(user, b""), mark):
            return True
        return False if mark in self._wrong else None

    def _remember(self, user: str, mark: bytes, right: bool) -> None:
        if right:
            self._right[user] = mark
            return
        self._wrong[mark] = None
        while len(self._wrong) > _REFUSED:
            self._wrong.popitem(last=False)


def credentials(authorization: str) -> tuple[str | None, bytes]:
    """User and password of a Basic authorization; (None, b"") when it is none."""
    scheme, _, encoded = authorization.strip().partition(" ")
    if scheme.lower() != "basic":
        return None, b""
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        return (user.decode(), password) if colon else (None, b"")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None, b""


def _check(password: bytes, hashed: str) -> bool:
    import bcrypt  # the extra web-auth; the configuration has made sure of it

    return bcrypt.checkpw(password, hashed.encode())
