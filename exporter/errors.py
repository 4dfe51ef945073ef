"""Every error that this package raises on purpose.

ExporterError
├── ConfigError      the configuration is wrong; carries every problem found, not the first
├── StateError       the state cannot be read or written (reason `state`)
│   ├── StateLocked      another process holds it
│   ├── StateTaken       another replica has the key
│   ├── StateUnreachable the server that keeps it does not answer; it may come back
│   └── StateNewer       a newer version of the exporter wrote it
└── ApiError         BlueKing did not answer what was asked; carries its `reason`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, get_args

import msgspec

ApiReason = Literal[
    "timeout",
    "connect",
    "tls",
    "auth",
    "permission",
    "rate_limited",
    "not_found",
    "redirect",
    "http_4xx",
    "http_5xx",
    "api_error",
    "decode",
    "too_large",
    "not_ready",
]
"""Why one call to BlueKing failed: a closed set, safe as a label."""

Reason = ApiReason | Literal["state", "internal"]
"""Why one poll failed: value of the label `reason` of `collector_errors_total`."""

API_REASONS: tuple[ApiReason, ...] = get_args(ApiReason)

TRANSIENT: frozenset[str] = frozenset({"timeout", "connect", "tls", "auth", "rate_limited", "http_5xx"})
"""Reasons that may pass by themselves. The others are a final answer about the thing that was asked for."""


class ExporterError(Exception):
    """Base of all errors of this package."""


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong in a configuration file. Lines and columns count from 1; 0 means the file as a whole."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"


class ConfigError(ExporterError):
    """The configuration is wrong. `str()` is one line per problem, in the order of the files."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class StateError(ExporterError):
    """The state cannot be read or written; what was committed before stays valid."""


class StateLocked(StateError):
    """Another process holds the state. The message names it."""


class StateTaken(StateError):
    """Another replica polls and commits this key now."""


class StateUnreachable(StateError):
    """The server that keeps the state does not answer, or answers wrongly; the error may pass by itself."""


class StateNewer(StateError):
    """The state was written by a newer version; reading it could lose counts."""


class ApiError(ExporterError):
    """A call to BlueKing failed.

    `reason`: the closed classification; `status`: HTTP status or None when no answer came; `code`: the code in the body
    as text, or "". `retry_after`: seconds the platform asked us to wait. `actions`: the IAM actions that are missing,
    as the platform names them. `request_id`: under which the platform logged the request, or "". The message carries no
    secret and at most 256 characters of the platform's text.
    """

    def __init__(
        self,
        reason: ApiReason,
        message: str,
        *,
        api: str = "",
        status: int | None = None,
        code: str = "",
        retry_after: float | None = None,
        actions: tuple[str, ...] = (),
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.reason: ApiReason = reason
        self.api = api
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.actions = actions
        self.request_id = request_id

    def named(self, what: str) -> Self:
        """This error, with `what` was asked for at the beginning of its message."""
        self.args = (f"{what}: {self}",)
        return self

    @property
    def transient(self) -> bool:
        """Whether a later call may succeed although nobody has changed anything."""
        return self.reason in TRANSIENT
