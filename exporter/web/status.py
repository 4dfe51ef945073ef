"""What the landing page and /api/v1 show: plain values, made by the composition root from what the pollers know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

State = Literal["failing", "stale", "starting", "ok"]
"""`starting`: no attempt has finished. `stale`: so long without success that gauges are withheld."""


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """One collector of one scope. Points in time are unix seconds, durations seconds, None means not yet or not known.

    `reason` and `message` are those of the newest attempt when it failed, else empty; the message carries no secret.
    `age` counts from the last success, `next_poll` from now (0.0: due or running). `failing_hosts` is the exact number.
    """

    collector: str
    bk_scope_type: str
    bk_scope_id: str
    name: str
    state: State
    last_success: float | None = None
    age: float | None = None
    reason: str = ""
    message: str = ""
    next_poll: float | None = None
    interval: float = 0.0
    failing_hosts: int | None = None
    series: int = 0


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The whole process. `started` in unix seconds, `uptime` in seconds, `series` of the whole page."""

    version: str
    started: float
    uptime: float
    ready: bool
    series: int = 0
    watches: tuple[Watch, ...] = ()


class FailingExecution(msgspec.Struct, frozen=True, kw_only=True):
    """A recent execution (JOB) or job (NodeMan) that failed. `end_time` in unix seconds."""

    collector: str
    bk_scope_type: str
    bk_scope_id: str
    status: str
    name: str = ""
    job_instance_id: int | None = None
    job_id: int | None = None
    end_time: float | None = None


class FailingHost(msgspec.Struct, frozen=True, kw_only=True):
    """A host that is failing now. `since` in unix seconds; the ids lead to its newest failure on the platform."""

    collector: str
    bk_scope_type: str
    bk_scope_id: str
    bk_cloud_id: str
    bk_host_id: str
    ip: str
    code: str
    reason: str
    since: float
    consecutive: int
    job_instance_id: int | None = None
    job_id: int | None = None


class Failures(msgspec.Struct, frozen=True):
    """For drill-down from a dashboard to the platform: newest executions first, oldest streaks first. Iterated once,
    since tens of thousands of hosts may fail."""

    executions: Iterable[FailingExecution] = ()
    hosts: Iterable[FailingHost] = ()
