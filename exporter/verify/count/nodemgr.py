"""The plain count of NodeMan V3. Times are ms since the epoch, unless said otherwise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from exporter.blueking.nodemgr import DOMAINS, Domain, HostOperation, NodemgrApi, Workflow
from exporter.clock import Clock
from exporter.collectors.calls import gather_bounded
from exporter.config.schema import NodemgrConfig
from exporter.metrics.family import Labels
from exporter.model import UNKNOWN, Scope
from exporter.verify.count.base import CONCURRENCY, PAGE, Finished, Recount, Recounted
from exporter.verify.count.hosts import HostResults, count_failing

FINISHED = "blueking_nodemgr_workflows_finished_total"
UNFINISHED = "blueking_nodemgr_workflows_unfinished"
OLDEST_UNFINISHED = "blueking_nodemgr_oldest_unfinished_timestamp_seconds"
DURATION = "blueking_nodemgr_workflow_duration_seconds"
HOST_FAILURES = "blueking_nodeman_host_failures_total"

STATUSES = frozenset({"running", "success", "failed", "partial_failed"})
UNFINISHED_STATES = frozenset({"init", "launched", "running"})
STATES = UNFINISHED_STATES | {"success", "failed", "timeout", "terminated"}
AHEAD = 300_000
"""ms: a finish time further ahead of the platform's clock is no time."""
ROUNDS = 5
"""Readings of a second with more workflows than a page: each may come in another order."""

Key = tuple[Domain, str]
"""Domain and id of a workflow."""
Workflows = dict[Key, Workflow]
Operations = dict[tuple[str, str], HostOperation]
"""By operation and instance."""


class NodemgrRecount(Recount[NodemgrConfig, NodemgrApi]):
    """`Recount` of NodeMan V3: the lists back to the oldest workflow that the first poll read, and the operations of
    those that failed or may have cleared a host."""

    what = "workflow"

    def __init__(self, scope: Scope, config: NodemgrConfig, api: NodemgrApi, seconds: float, clock: Clock) -> None:
        super().__init__(scope, config, api, seconds, clock)
        self._born: int | None = None
        self._begin = 0
        self._known: Workflows = {}
        """What the first poll saw."""
        self._seen: dict[Key, list[Workflow]] = {}
        """What later polls saw of a workflow."""
        self._known_operations: set[tuple[str, str]] = set()
        self._operations: dict[Key, Operations] = {}
        """What the polls saw of the operations of a workflow."""
        self._refused: set[Key] = set()
        """Workflows whose operations the polls could not read."""

    def note(self, records: Any) -> None:
        rows = {_key(name): row for name, row in records.rows.items()}
        for name, operations in records.hosts.items():
            self._operations.setdefault(_key(name), {}).update(_by_instance(operations))
        self._refused |= {_key(name) for name in records.unexamined}
        if self._born is None:
            self._born, self._begin, self._known = records.now, records.begin, rows
            self._known_operations = {one for of in self._operations.values() for one in of}
            return
        for key, row in rows.items():
            self._seen.setdefault(key, []).append(row)

    async def read(self, finished: Finished) -> Recounted:
        now = round(self.clock.platform() * 1000)
        rows = await self._list(now)
        rows |= await self._look_up((self._known.keys() | self._seen.keys()) - rows.keys())
        recounted = Recounted()
        shown = {"/".join(key) for key in rows}
        recounted.gone = {id for id in finished if id not in shown}
        recounted.samples.expect(FINISHED, UNFINISHED, OLDEST_UNFINISHED, f"{DURATION}_count", f"{DURATION}_sum")
        operations = await self._read_operations(
            key
            for key, row in rows.items()
            if _has_ended(row) and row.status != "success" and self._is_recent(row, now)
        )
        waiting: set[Key] = set()
        for key, row in sorted(rows.items()):
            first = self._versions(key, row)[0]
            if key not in self._known and first.operate_time is None:
                continue  # the polls name it as an unknown value
            if key not in self._known and (first.operate_time or 0) < self._begin and _has_ended(first):
                continue  # it ended before the first poll
            ends = self._new_ends(key, row, now)
            running = any(map(_is_running, operations.get(key, {}).values()))
            if ends and _has_ended(row) and running and len(finished.get("/".join(key), ())) < len(ends):
                # It is counted when its operations have ended, or after some polls.
                waiting.add(key)
                ends.popitem()
            self._count(recounted, key, row, ends, now, has_ended=_has_ended(row) and key not in waiting)
        if waiting:
            recounted.notes.append(
                f"{len(waiting)} workflows have ended and some of their operations still run: hosts are not compared"
            )
        else:
            await self._count_hosts(recounted, rows, operations, now)
        return recounted

    async def _list(self, now: int) -> Workflows:
        """The workflows that began in the time that the first poll read, or later."""
        config = self.config
        longest = max(60.0, config.lookback, config.reopen_window, config.failing_host_ttl)
        begin, end = math.floor((self._born or now) / 1000 - longest), math.ceil(now / 1000)
        found = [await self._window(domain, begin, end) for domain in DOMAINS]
        return {(domain, row.id): row for domain, rows in zip(DOMAINS, found, strict=True) for row in rows}

    async def _window(self, domain: Domain, begin: int, end: int) -> list[Workflow]:
        """All workflows that began in [begin, end], unix seconds; in halves where they need more than a page."""
        page, total = await self._page(domain, begin, end)
        if total <= len(page):
            return page
        if end - begin > 1:
            middle = (begin + end) // 2
            return await self._window(domain, begin, middle) + await self._window(domain, middle, end)
        rows = {row.id: row for row in page}
        for _ in range(ROUNDS):
            for offset in range(0, total, PAGE):
                page, total = await self._page(domain, begin, end, offset)
                rows |= {row.id: row for row in page}
            if len(rows) >= total:
                break
        return list(rows.values())

    async def _page(self, domain: Domain, begin: int, end: int, offset: int = 0) -> tuple[list[Workflow], int]:
        page = await self.api.workflows(
            domain, self.biz, begin=begin, end=end, offset=offset, limit=PAGE,
            node_roles=self.config.node_roles, deadline=self.deadline(),
        )  # fmt: skip
        return list(page.rows), page.total

    async def _look_up(self, keys: Iterable[Key]) -> Workflows:
        rows: Workflows = {}
        for domain, of_domain in itertools.groupby(sorted(keys), key=lambda key: key[0]):
            ids = [id for _, id in of_domain]
            for start in range(0, len(ids), PAGE):
                page = await self.api.workflows(
                    domain, self.biz, ids=ids[start : start + PAGE],
                    node_roles=self.config.node_roles, deadline=self.deadline(),
                )  # fmt: skip
                rows |= {(domain, row.id): row for row in page.rows}
        return rows

    async def _read_operations(self, keys: Iterable[Key]) -> dict[Key, Operations]:
        """The operations of these workflows, in all states; without those that the polls could not read either."""

        async def read(key: Key) -> Operations:
            found: Operations = {}
            for offset in itertools.count(0, PAGE):
                page = await self.api.operations(*key, offset=offset, limit=PAGE, deadline=self.deadline())
                found |= _by_instance(page)
                if len(page) < PAGE:
                    break
            return found

        wanted = sorted(set(keys) - self._refused)
        return dict(zip(wanted, await gather_bounded(map(read, wanted), CONCURRENCY), strict=True))

    def _is_recent(self, row: Workflow, now: int) -> bool:
        return (row.finish_time or now) >= now - self.config.failing_host_ttl * 1000

    def _versions(self, key: Key, row: Workflow) -> list[Workflow]:
        """A workflow as the polls saw it and as it is now, oldest first."""
        return [*([self._known[key]] if key in self._known else []), *self._seen.get(key, []), row]

    def _new_ends(self, key: Key, row: Workflow, now: int) -> dict[int | None, str]:
        """The statuses with which a workflow has ended since the first poll, by finish time; the newest one last. One
        that was missing at first belongs to the same end."""
        ends: dict[int | None, str] = {}
        for version in self._versions(key, row):
            if _has_ended(version):
                finish = _finish(version, now)
                if finish is not None:
                    ends.pop(None, None)
                if finish is not None or not ends:
                    ends[finish] = version.status
        known = self._known.get(key)
        if known is not None and _has_ended(known):
            ends.pop(next(iter(ends)))
        return ends

    def _count(
        self,
        recounted: Recounted,
        key: Key,
        row: Workflow,
        ends: Mapping[int | None, str],
        now: int,
        *,
        has_ended: bool,
    ) -> None:
        samples, domain, labels = recounted.samples, key[0], (key[0], row.type)
        if row.status not in STATUSES:
            recounted.unknown.add(("nodemgr.status", row.status))
        for status in ends.values():
            samples.add(FINISHED, (*labels, status if status in STATUSES else UNKNOWN))
        if ends and has_ended:
            newest = [*ends.values()][-1]
            recounted.runs["/".join(key)] = newest if newest in STATUSES else UNKNOWN
        began = row.operate_time or 0
        if not has_ended and now - began <= self.config.max_unfinished_age * 1000:
            samples.add(UNFINISHED, labels)
            samples.earliest(OLDEST_UNFINISHED, (domain,), began / 1000)
        # A running one with a finish time runs again.
        first = self._versions(key, row)[0]
        had_ended = _has_ended(first) or first.finish_time is not None
        if not (had_ended and (key in self._known or began < self._begin)):
            again = (one.finish_time for one in self._versions(key, row) if not _has_ended(one))
            times = [time for time in (*again, *ends) if time is not None]
            samples.observe(DURATION, labels, row.operate_time, min(times, default=None))

    async def _count_hosts(
        self, recounted: Recounted, rows: Workflows, operations: dict[Key, Operations], now: int
    ) -> None:
        """The failed operations, each instance once, and the hosts that fail now, by the results of all operations."""
        recounted.samples.expect(HOST_FAILURES)
        results = HostResults()
        for key in (self._operations.keys() | operations.keys()) & rows.keys():
            row = rows[key]
            for name, one in (self._operations.get(key, {}) | operations.get(key, {})).items():
                end = one.end if one.end is not None and one.end <= now else None
                failed = self._add(results, key, row, one, now)
                if failed and name not in self._known_operations and self._is_new(key, row, end, now):
                    recounted.samples.add(HOST_FAILURES, failed)
                    if one.state not in STATES:
                        recounted.unknown.add(("nodemgr.operation.state", one.state))
        first = min((streak[0].end for streak in results.failing()), default=None)
        if first is not None:
            succeeded = await self._read_operations(
                key for key, row in rows.items() if row.status == "success" and (row.finish_time or now) / 1000 >= first
            )
            for key, of in succeeded.items():
                for one in of.values():
                    self._add(results, key, rows[key], one, now)
        failing = results.failing(now / 1000 - self.config.failing_host_ttl)
        count_failing(recounted, "blueking_nodeman", results, failing, self.config.max_failing_hosts)

    def _is_new(self, key: Key, row: Workflow, end: int | None, now: int) -> bool:
        """Whether a failure at `end` is one since the first poll; the platform may give whole seconds."""
        if key not in self._known and (row.operate_time or 0) >= self._begin:
            return True
        return bool(self._new_ends(key, row, now)) if end is None else end >= (self._born or 0) // 1000 * 1000

    def _add(self, results: HostResults, key: Key, row: Workflow, one: HostOperation, now: int) -> Labels | None:
        """Add the result of an operation of this business; the labels of a failure."""
        if _is_running(one) or one.bk_biz_id not in (None, self.biz):
            return None
        state = one.state if one.state in STATES else UNKNOWN
        labels = None if one.state == "success" else ("nodemgr", row.type, one.step, state)
        if one.host:
            ends = (one.end, _finish(row, now))
            end = next((end / 1000 for end in ends if end is not None and end <= now), None)
            results.add(one.host, "/".join(key), end, labels)
        return labels


def _key(name: str) -> Key:
    """The key of a workflow in the records of a poll: domain and id with a slash between them."""
    domain, _, id = name.partition("/")
    return ("plugin" if domain == "plugin" else "node"), id


def _by_instance(operations: Iterable[HostOperation]) -> Operations:
    return {(one.id, one.instance): one for one in operations}


def _finish(row: Workflow, now: int) -> int | None:
    return row.finish_time if row.finish_time is not None and row.finish_time <= now + AHEAD else None


def _has_ended(row: Workflow) -> bool:
    return row.finish_time is not None if row.status not in STATUSES else row.status != "running"


def _is_running(one: HostOperation) -> bool:
    return one.end is None if one.state not in STATES else one.state in UNFINISHED_STATES
