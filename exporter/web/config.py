"""The web configuration file in force (a first form: none)."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

import msgspec

from exporter.web.auth import Users
from exporter.web.limiter import TokenBucket


class Current(msgspec.Struct, frozen=True):
    """What one version of the file says, ready to be used."""

    tls: ssl.SSLContext | None
    allowed_sans: frozenset[str]
    headers: Mapping[str, str]
    users: Mapping[str, str]
    limiter: TokenBucket


class WebConfig:
    def __init__(self) -> None:
        self.users = Users()
        self.current = Current(None, frozenset(), {}, {}, TokenBucket(0.0, 0))

    @classmethod
    def none(cls) -> WebConfig:
        return cls()

    async def refresh(self) -> None:
        pass
