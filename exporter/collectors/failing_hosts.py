"""Which hosts fail now, since when and why: the streak fold that all collectors share.

A host fails while its newest known result is a failure. The unit of a streak is the run of a job on the host (in JOB
the execution): its retries extend nothing, they only bring newer results. Results may arrive in any order.

A host is its `bk_host_id`. A result without one belongs to the host that was last seen with an id at the same address
(cloud and IP); where there is none, the address is the host's identity until a result with an id comes from there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from exporter.metrics.family import HOST_LABELS, Family, Labels
from exporter.model import Host

RUNS_KEPT = 16
"""A retry is told from a new run by these newest runs of a streak; an older run is retried too rarely to remember
it."""


class HostResult(msgspec.Struct, frozen=True, gc=False):
    """The newest result of one host in one run. `end` in unix seconds; `labels` of a failure, None for a success."""

    host: Host
    run: int
    group: str
    end: float
    labels: Labels | None


class Streak(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An unbroken row of failures of one host. `host`: as its newest failure shows it, rather with an id than without;
    `since` and `last`: the ends of its first and newest failure; `runs`: its newest runs with the end of each, oldest
    first."""

    host: Host
    since: float
    last: float
    count: int
    labels: Labels
    group: str
    runs: tuple[tuple[int, float], ...]

    @property
    def run(self) -> int:
        """The run of the newest failure."""
        return self.runs[-1][0]


class FailingHosts(msgspec.Struct, frozen=True, gc=False):
    """Streaks by host identity; `cleared` remembers recent successes, so that an older failure that comes late is no
    news; `ids` the `bk_host_id` of these hosts by their address."""

    streaks: dict[str, Streak] = {}
    cleared: dict[str, float] = {}
    ids: dict[str, str] = {}

    def fold(self, results: Iterable[HostResult], *, now: float, ttl: float, settled: float) -> FailingHosts:
        """Apply results, drop streaks whose newest failure is older than `ttl`, and successes from before `settled`,
        the time up to which no older result can turn up any more."""
        streaks, cleared, ids = dict(self.streaks), dict(self.cleared), dict(self.ids)
        if not ids:
            # A state from before there were `ids`.
            ids = {streak.host.address: id for id, streak in streaks.items() if streak.host.bk_host_id == id}
        for result in sorted(results, key=lambda result: (result.end, result.run)):
            _apply(streaks, cleared, result, _identity(result.host, streaks, cleared, ids))
        streaks = {identity: streak for identity, streak in streaks.items() if streak.last >= now - ttl}
        cleared = {identity: end for identity, end in cleared.items() if end >= settled}
        ids = {address: id for address, id in ids.items() if address and (id in streaks or id in cleared)}
        if (streaks, cleared, ids) == (self.streaks, self.cleared, self.ids):
            return self
        return FailingHosts(streaks, cleared, ids)

    def groups(self) -> dict[str, float]:
        """The groups (plans, names) of the newest failures, whose successes are worth asking for, each with the
        earliest beginning of a streak in it."""
        groups: dict[str, float] = {}
        for streak in self.streaks.values():
            groups[streak.group] = min(streak.since, groups.get(streak.group, streak.since))
        return groups

    def by_labels(self) -> dict[Labels, float]:
        """How many hosts fail, by the labels of their newest failure."""
        counted: dict[Labels, float] = {}
        for streak in self.streaks.values():
            counted[streak.labels] = counted.get(streak.labels, 0.0) + 1.0
        return counted

    def oldest(self, limit: int) -> list[Streak]:
        """The streaks that began first, oldest first, at most `limit`."""
        return heapq.nsmallest(limit, self.streaks.values(), key=lambda streak: (streak.since, streak.host))


def _identity(host: Host, streaks: dict[str, Streak], cleared: dict[str, float], ids: dict[str, str]) -> str:
    """What the host is kept under. What was kept under its address, without an id, becomes its own."""
    address = host.address
    if not host.bk_host_id:
        return ids.get(address, address)
    if address:
        ids[address] = host.bk_host_id
        if address in streaks or address in cleared:
            _adopt(host, streaks, cleared)
    return host.bk_host_id


def _adopt(host: Host, streaks: dict[str, Streak], cleared: dict[str, float]) -> None:
    """Make what is kept under the address of a host its own, now that its id is known."""
    identity = host.bk_host_id
    parts = [streak for key in (host.address, identity) if (streak := streaks.pop(key, None))]
    ends = [end for key in (host.address, identity) if (end := cleared.pop(key, None)) is not None]
    if parts:
        streaks[identity] = _merged(parts, host)
    for end in ends:
        _clear(streaks, cleared, identity, end)


def _merged(parts: Sequence[Streak], host: Host) -> Streak:
    """One streak of failures that were taken for those of several hosts."""
    newest = max(parts, key=lambda streak: (streak.last, streak.run))
    ends: dict[int, float] = {}
    for run, end in itertools.chain.from_iterable(streak.runs for streak in parts):
        ends[run] = max(end, ends.get(run, end))
    twice = sum(len(streak.runs) for streak in parts) - len(ends)
    return msgspec.structs.replace(
        newest,
        host=newest.host if newest.host.bk_host_id else host,
        since=min(streak.since for streak in parts),
        count=sum(streak.count for streak in parts) - twice,
        runs=_newest_runs(ends),
    )


def _apply(streaks: dict[str, Streak], cleared: dict[str, float], result: HostResult, identity: str) -> None:
    if result.labels is None:
        _clear(streaks, cleared, identity, result.end)
    elif result.end > cleared.get(identity, float("-inf")):
        streaks[identity] = _extend(streaks.get(identity), result, result.labels)


def _clear(streaks: dict[str, Streak], cleared: dict[str, float], identity: str, end: float) -> None:
    """The host succeeded at `end`."""
    cleared[identity] = max(end, cleared.get(identity, end))
    streak = streaks.get(identity)
    if streak and end >= streak.last:
        del streaks[identity]
    elif streak and end >= streak.since:
        streaks[identity] = _begin_after(streak, end)


def _extend(streak: Streak | None, result: HostResult, labels: Labels) -> Streak:
    if streak is None:
        return Streak(result.host, result.end, result.end, 1, labels, result.group, ((result.run, result.end),))
    ends = dict(streak.runs)
    known = result.run in ends
    ends[result.run] = max(result.end, ends.get(result.run, result.end))
    newest = (result.end, result.run) >= (streak.last, streak.run)
    named = bool(result.host.bk_host_id) or not streak.host.bk_host_id
    return Streak(
        result.host if newest and named else streak.host,
        min(streak.since, result.end),
        max(streak.last, result.end),
        streak.count + (not known),
        labels if newest else streak.labels,
        result.group if newest else streak.group,
        _newest_runs(ends),
    )


def _newest_runs(ends: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(ends.items(), key=lambda run: (run[1], run[0])))[-RUNS_KEPT:]


def _begin_after(streak: Streak, success: float) -> Streak:
    """What is left of a streak when a success inside it becomes known late."""
    runs = tuple(run for run in streak.runs if run[1] > success)
    return msgspec.structs.replace(streak, since=min(end for _, end in runs), count=len(runs), runs=runs)


def families(prefix: str, labels: tuple[str, ...], of: str, of_zh: str) -> tuple[Family, Family]:
    """The two gauges of failing hosts that every collector has; samples come from `count` and `detail` below."""
    return (
        Family(
            f"{prefix}_hosts_failing",
            "gauge",
            labels,
            f"Hosts whose newest result in {of} is a failure, exact also where the detail is capped.",
            f"最近一次{of_zh}结果为失败的主机数，明细被截断时仍然准确。",
            sticky=True,
        ),
        Family(
            f"{prefix}_host_failing_since_timestamp_seconds",
            "gauge",
            (*HOST_LABELS, *labels),
            "End of the first failure of the present streak of a failing host; absent when it does not fail.",
            "失败主机当前连续失败的起始时间；主机恢复后该序列消失。",
            detail=True,
        ),
    )


def since(hosts: FailingHosts, limit: int) -> Mapping[Labels, float]:
    """Samples of `…_host_failing_since_timestamp_seconds`, oldest streak first."""
    return {
        (streak.host.bk_cloud_id, streak.host.bk_host_id, streak.host.ip, *streak.labels): streak.since
        for streak in hosts.oldest(limit)
    }


def consecutive(hosts: FailingHosts, limit: int) -> Mapping[Labels, float]:
    """Samples of `…_host_consecutive_failures`, oldest streak first."""
    return {
        (streak.host.bk_cloud_id, streak.host.bk_host_id, streak.host.ip): float(streak.count)
        for streak in hosts.oldest(limit)
    }
