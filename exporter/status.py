"""What the landing page, /failures and /api/v1 show, built from what the pollers know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from exporter import __version__, log
from exporter.collectors.base import Collector, CollectorState
from exporter.collectors.failing_hosts import Streak
from exporter.fleet import Fleet
from exporter.poller import Poller

State = Literal["failing", "stale", "starting", "ok"]
"""As in `Poller.status`."""


class PollerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One collector of one scope. Points in time are unix seconds, durations seconds, None means not yet or not known.

    `reason`, `message` and `request_id` (for BlueKing's own logs) are those of the newest attempt when it failed, else
    empty; the message carries no secret.
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
    request_id: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The whole process. `started` in unix seconds, `uptime` in seconds, `series` of the whole page."""

    version: str
    started: float
    uptime: float
    ready: bool
    series: int = 0
    pollers: tuple[PollerStatus, ...] = msgspec.field(default=(), name="watches")


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
    url: str | None = None


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
    url: str | None = None


class Failures(msgspec.Struct, frozen=True):
    """For drill-down from a dashboard to the platform: newest executions first, oldest streaks first. Iterated once,
    since tens of thousands of hosts may fail."""

    executions: Iterable[FailingExecution] = ()
    hosts: Iterable[FailingHost] = ()


def process_status(fleet: Fleet, *, started: float, uptime: float, ready: bool, series: int) -> Status:
    """What the landing page and /api/v1/status show now."""
    names = {one.scope: one.name for one in fleet.scopes}
    return Status(
        version=__version__,
        started=started,
        uptime=uptime,
        ready=ready,
        series=series,
        pollers=tuple(_poller_status(one, names.get(one.key.scope, "")) for one in fleet.pollers.values()),
    )


def _poller_status(poller: Poller, name: str) -> PollerStatus:
    state = poller.state
    fresh = poller.exposed.fresh
    return PollerStatus(
        collector=poller.key.collector,
        bk_scope_type=poller.key.scope.bk_scope_type,
        bk_scope_id=poller.key.scope.bk_scope_id,
        name=name,
        state=poller.status,
        last_success=state.last_success if state else None,
        age=poller.age,
        reason=poller.reason or "",
        message=log.redact(poller.message),
        request_id=poller.request_id,
        next_poll=poller.wait,
        interval=poller.collector.interval,
        failing_hosts=len(poller.collector.failing_hosts(state).streaks) if state and fresh else None,
        series=poller.exposed.series,
    )


def failures(fleet: Fleet, scope_type: str | None, scope_id: str | None) -> Failures:
    """What fails now in the matching scopes, with the ids that lead to it on the platform. None matches every scope."""
    executions: list[FailingExecution] = []
    hosts: list[tuple[Collector, Streak]] = []
    for poller in fleet.pollers.values():
        collector, scope, state = poller.collector, poller.key.scope, poller.state
        if state is None or scope_type not in (None, scope.bk_scope_type) or scope_id not in (None, scope.bk_scope_id):
            continue
        executions += _failing_executions(collector, state)
        hosts += [(collector, streak) for streak in collector.failing_hosts(state).streaks.values()]
    executions.sort(key=lambda execution: execution.end_time or 0.0, reverse=True)
    hosts.sort(key=lambda host: host[1].since)
    return Failures(executions, (_failing_host(collector, streak) for collector, streak in hosts))


def _failing_executions(collector: Collector, state: CollectorState) -> list[FailingExecution]:
    return [
        FailingExecution(
            collector=collector.name,
            bk_scope_type=collector.scope.bk_scope_type,
            bk_scope_id=collector.scope.bk_scope_id,
            status=failed.status,
            name=failed.name,
            end_time=failed.end,
            url=collector.url(failed.id) or None,
            **_run_id(collector, failed.id),
        )
        for failed in collector.failed_executions(state)
    ]


def _failing_host(collector: Collector, streak: Streak) -> FailingHost:
    labels = dict(zip(collector.failure_labels, streak.labels, strict=True))
    return FailingHost(
        collector=collector.name,
        bk_scope_type=collector.scope.bk_scope_type,
        bk_scope_id=collector.scope.bk_scope_id,
        bk_cloud_id=streak.host.bk_cloud_id,
        bk_host_id=streak.host.bk_host_id,
        ip=streak.host.ip,
        code=labels["code"],
        reason=labels.get("reason") or labels.get("step", ""),
        since=streak.since,
        consecutive=streak.count,
        url=collector.url(streak.run) or None,
        **_run_id(collector, streak.run),
    )


def _run_id(collector: Collector, run: int) -> dict[str, int]:
    return {collector.run_id: run} if collector.run_id else {}
