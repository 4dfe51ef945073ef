"""Which hosts fail, since when, and how often in a row: by all results of each host, in the order of time."""

from __future__ import annotations

from typing import NamedTuple

from exporter.metrics.family import Labels
from exporter.model import Host
from exporter.verify.count.base import Id, Recounted


class Failure(NamedTuple):
    """A failed result of a host. Sorted by time. `group`: the plan or name of its run, "" without groups."""

    end: float
    run: Id
    host: Host
    labels: Labels
    group: str


class HostResults:
    """Results of hosts, in any order. Of a failure and a success at the same time, the success is the newer one."""

    def __init__(self) -> None:
        self._failures: dict[str, list[Failure]] = {}
        self._successes: dict[str, float] = {}
        """The newest success of each host."""
        self.without_end = 0
        """Failures of which no end is known."""
        self._ids: dict[str, str] = {}
        """The `bk_host_id` of the host with this address."""

    def add(self, host: Host, run: Id, end: float | None, labels: Labels | None, group: str = "") -> None:
        """Add one result. `end` in unix seconds, None if unknown; `labels`: of a failure, None for a success."""
        self.without_end += labels is not None and end is None
        name, end = self._name(host), end or 0.0
        if labels is None:
            self._successes[name] = max(end, self._successes.get(name, end))
        else:
            self._failures.setdefault(name, []).append(Failure(end, run, host, labels, group))

    def failing(self, since: float = 0.0) -> list[list[Failure]]:
        """The failures since the newest success, oldest first, of each host that has failed after `since`."""
        found = []
        for name, failures in self._failures.items():
            success = self._successes.get(name)
            streak = sorted(one for one in failures if success is None or one.end > success)
            if streak and streak[-1].end >= since:
                found.append(streak)
        return found

    def groups(self) -> dict[str, float]:
        """The group of the newest failure of each failing host, with the first failure of these hosts."""
        groups: dict[str, float] = {}
        for streak in self.failing():
            group, first = streak[-1].group, streak[0].end
            groups[group] = min(first, groups.get(group, first))
        return groups

    def _name(self, host: Host) -> str:
        """The id of a host, or its address as long as no result with an id has come from there."""
        address = host.address
        if not host.bk_host_id:
            return self._ids.get(address, address)
        if address:
            self._ids[address] = host.bk_host_id
            if failures := self._failures.pop(address, None):
                self._failures.setdefault(host.bk_host_id, []).extend(failures)
            if (success := self._successes.pop(address, None)) is not None:
                self._successes[host.bk_host_id] = max(success, self._successes.get(host.bk_host_id, success))
        return host.bk_host_id


def count_failing(
    recounted: Recounted, prefix: str, results: HostResults, failing: list[list[Failure]], limit: int
) -> None:
    """Count `prefix`_hosts_failing, and the series of each host unless there are more than `limit` hosts."""
    number, since = f"{prefix}_hosts_failing", f"{prefix}_host_failing_since_timestamp_seconds"
    recounted.samples.expect(number)
    for streak in failing:
        recounted.samples.add(number, streak[-1].labels)
    if len(failing) > limit:
        recounted.notes.append(f"{len(failing)} hosts fail, only {limit} have series: since when is not compared")
    elif results.without_end:
        recounted.notes.append(f"{results.without_end} failures have no end: since when hosts fail is not compared")
    else:
        recounted.samples.expect(since)
        for streak in failing:
            recounted.samples[since][*labels_of(streak), *streak[-1].labels] = streak[0].end


def labels_of(streak: list[Failure]) -> Labels:
    """Cloud, id and address of a failing host, as in its newest failure, with its id if one is known."""
    with_id = [one.host for one in streak if one.host.bk_host_id]
    host = (with_id or [one.host for one in streak])[-1]
    return host.bk_cloud_id, host.bk_host_id, host.ip
