"""How the records of a poll become counts: the fold of the NodeMan V3 collector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

import msgspec

from exporter.blueking.nodemgr import HostOperation, Workflow
from exporter.collectors.base import GAP, TRUNCATED, FinishedRun, Observed
from exporter.collectors.failing_hosts import HostResult
from exporter.collectors.nodeman import DURATION_BUCKETS, NodemanFold, is_ours
from exporter.collectors.nodemgr.state import (
    NAME,
    STATUSES,
    NodemgrRecords,
    NodemgrState,
    Tracked,
    fingerprint,
    has_ended,
    is_new_end,
    is_running,
    parts_of,
    state_label,
    status_label,
)
from exporter.config.schema import NodemgrConfig
from exporter.metrics.counts import Tally
from exporter.metrics.family import Labels
from exporter.model import UNKNOWN

FINISHED = "blueking_nodemgr_workflows_finished_total"
REOPENED = "blueking_nodemgr_workflows_reopened_total"
LOST = "blueking_nodemgr_workflows_lost_total"
DURATION = "blueking_nodemgr_workflow_duration_seconds"

MOST_WAITS = 5
"""Polls that wait for operations that run although their workflow has ended."""


class Fold(NodemanFold[NodemgrState, NodemgrConfig, NodemgrRecords]):
    """See `NodemanFold`."""

    def __init__(
        self, config: NodemgrConfig, biz: int, state: NodemgrState | None, records: NodemgrRecords, tally: Tally
    ) -> None:
        super().__init__(config, biz, state, records, tally)
        self.workflows = dict(state.workflows) if state else {}
        self.born = state.born if state else records.now

    def result(self) -> Observed[NodemgrState]:
        records = self.records
        for key, row in sorted(records.rows.items(), key=lambda item: (item[1].finish_time or records.now, item[0])):
            self._count(key, row)
        for key in records.gone:
            self._give_up(key)
        settled = max(self.config.reopen_window, self.config.failing_host_ttl)
        hosts = self.fold_hosts(records.now / 1000, settled=settled)
        self._forget({str(run) for run in hosts.runs()})
        if self.truncated:
            self.tally.inc(TRUNCATED, by=self.truncated)
        if records.gap:
            self.tally.inc(GAP, by=records.gap)
        return Observed(
            NodemgrState(
                counts=self.tally.freeze(),
                last_success=self.tally.now,
                watermark=records.watermark,
                begin=records.begin,
                born=self.born,
                workflows=self.workflows,
                hosts=hosts,
            ),
            unknown=tuple(self.unknown),
            errors=tuple(records.errors),
            more=records.more,
            finished=tuple(self.finished),
        )

    # Workflows

    def _count(self, key: str, row: Workflow) -> None:
        known = self.workflows.get(key)
        if known is not None and row.operate_time is not None and known.operate_time != row.operate_time:
            # The id is that of another workflow now.
            self._give_up(key)
            known = None
        if known is None and row.operate_time is None:
            self.unknown.append(("nodemgr.operate_time", key))
            return
        if known is not None and known.lost:
            return
        began_at = row.operate_time or 0
        old = self.state is not None and began_at < self.state.begin
        if known is None and old and has_ended(row):
            return  # counted and forgotten
        if (known is None or known.status != row.status) and row.status not in STATUSES:
            self.unknown.append(("nodemgr.status", row.status))
        if not has_ended(row):
            self.workflows[key] = self._running(key, known, row, old)
        elif is_new_end(known, row):
            self._end(key, known, row)
        elif known is not None:
            self._update_ended(key, known, row)

    def _running(self, key: str, known: Tracked | None, row: Workflow, old: bool) -> Tracked:
        """It runs, for the first time or again. A running one with a finish time has ended before, then."""
        finish, again = row.finish_time, row.finish_time is not None
        if known is None:
            if self.state is not None and again:
                self._count_reopened(key)
                if not old:  # else it had been counted and forgotten
                    self._count_missed(key, None, row)
            new = self.state is not None and not old
            return Tracked(row.type, row.status, row.operate_time or 0, finish, False, again, timed=again, new=new)
        timed = known.timed or known.counted or again
        if known.counted:
            if not known.reopened:
                self._count_reopened(key)
            missed = finish not in (None, known.finish_time) and known.finish_time is not None
        else:
            missed = finish not in (None, known.finish_time)
        if missed:
            self._count_reopened(key)
            self._count_missed(key, known, row)
        again = known.counted or known.reopened or missed
        finish = known.finish_time if finish is None else finish
        return msgspec.structs.replace(
            known,
            status=row.status,
            finish_time=finish if again else None,
            counted=False,
            reopened=again,
            timed=timed,
            waits=0,
            unread=False,
        )

    def _count_missed(self, key: str, known: Tracked | None, row: Workflow) -> None:
        """Count an end after which the workflow was retried before its hosts were read, or before it was seen at all:
        then its status is not known any more."""
        if known is not None and not known.counted and known.status in STATUSES and known.status != "running":
            self._count_finished(key, msgspec.structs.replace(row, status=known.status), ())
        if known is None or not known.timed:
            self._observe_duration(key, row)
        self.truncated += 1

    def _end(self, key: str, known: Tracked | None, row: Workflow) -> None:
        """An end that has not been counted."""
        baseline = self.state is None
        known = known or Tracked(row.type, row.status, row.operate_time or 0, None, False, new=not baseline)
        operations = self._own(key)
        asked = key in self.records.hosts
        if known.counted and not known.reopened:
            self._count_reopened(key)
            known = msgspec.structs.replace(known, counted=False, reopened=True, timed=True, waits=0)
        unread = key in self.records.deferred
        still_running = asked and any(map(is_running, operations))
        waits = known.waits + 1 if still_running else 0
        if not baseline and (unread or (still_running and waits <= MOST_WAITS)):
            self.workflows[key] = msgspec.structs.replace(known, status=row.status, waits=waits)
            return
        if still_running or key in self.records.unexamined:
            self.truncated += 1
        if not baseline:
            self._count_finished(key, row, operations)
        timed = known.timed
        if not timed and not baseline:
            self._observe_duration(key, row)
            timed = row.finish_time is not None
        self.workflows[key] = Tracked(
            row.type,
            row.status,
            known.operate_time,
            row.finish_time,
            counted=True,
            timed=timed or baseline,
            unread=unread,
            taken=known.taken | self._take(key, row, known, operations),
            new=known.new,
        )

    def _update_ended(self, key: str, known: Tracked, row: Workflow) -> None:
        """The end that is known: its time may have been missing, its hosts may have been read only now."""
        if known.finish_time is None and not known.timed:
            self._observe_duration(key, row)
        finish = known.finish_time if known.finish_time is not None else row.finish_time
        unread = known.unread
        taken = known.taken
        if key in self.records.hosts or key in self.records.unexamined:
            unread = False
            self.truncated += key in self.records.unexamined
            taken |= self._take(key, row, known, self._own(key))
        self.workflows[key] = msgspec.structs.replace(
            known,
            status=row.status,
            finish_time=finish,
            counted=True,
            timed=known.timed or finish is not None,
            unread=unread,
            taken=taken,
        )

    def _count_finished(self, key: str, row: Workflow, operations: Sequence[HostOperation]) -> None:
        domain, _ = parts_of(key)
        status = status_label(row.status)
        self.tally.inc(FINISHED, (domain, row.type, status))
        codes = {(one.host or one.id, state_label(one.state)) for one in operations if is_failure(one)}
        failed_hosts = Counter(code for _, code in codes)
        began, finish = (None if time is None else time / 1000 for time in (row.operate_time, row.finish_time))
        self.finished.append(FinishedRun(key, row.type, status, status != "success", began, finish, failed_hosts))

    def _count_reopened(self, key: str) -> None:
        self.tally.inc(REOPENED, (parts_of(key)[0],))

    def _observe_duration(self, key: str, row: Workflow) -> None:
        """From start to the first end: a retry renews the end only."""
        if row.finish_time is None or row.operate_time is None:
            return
        if row.finish_time < row.operate_time:
            self.unknown.append(("nodemgr.finish_time", str(row.finish_time)))
        else:
            seconds = (row.finish_time - row.operate_time) / 1000
            self.tally.observe(DURATION, (parts_of(key)[0], row.type), seconds, DURATION_BUCKETS)

    def _give_up(self, key: str) -> None:
        known = self.workflows.pop(key)
        if not known.counted:
            self.tally.inc(LOST, (parts_of(key)[0],))

    # Hosts

    def _own(self, key: str) -> list[HostOperation]:
        """The operations of this business, as far as they name one."""
        return [one for one in self.records.hosts.get(key, ()) if is_ours(one, self.biz)]

    def _take(self, key: str, row: Workflow, known: Tracked, operations: Sequence[HostOperation]) -> Set[int]:
        """Count the failed operations that have not been counted, keep the results of hosts; the failed ones."""
        now, taken = self.records.now, set[int]()
        for one in operations:
            if is_running(one):
                continue
            end = one.end if one.end is not None and one.end <= now else None
            labels: Labels | None = None
            if is_failure(one):
                state = state_label(one.state)
                labels = (NAME, row.type, one.step, state)
                name = fingerprint(one)
                late = self.born if end is None and not known.unread else end or 0
                # In a workflow that the baseline saw, what had failed before is known, and not counted.
                news = known.new or (self.state is not None and late >= self.born // 1000 * 1000)
                if news and name not in known.taken and name not in taken:
                    self.count_failure(labels)
                    if state == UNKNOWN:
                        self.unknown.append(("nodemgr.operation.state", one.state))
                taken.add(name)
            if one.host:
                moment = next(time for time in (end, row.finish_time, now) if time is not None)
                self.results.append(HostResult(one.host, key, "", min(moment, now) / 1000, labels))
        return taken

    # What is kept

    def _forget(self, of_failing_hosts: Set[str]) -> None:
        """Keep what can still be listed, what has not ended, and what may be retried."""
        now = self.records.now
        for key, known in list(self.workflows.items()):
            if not known.counted:
                # A catch-up does not read unfinished workflows again.
                if now - known.operate_time > self.config.max_unfinished_age * 1000 and not self.records.more:
                    self._give_up(key)
                    if known.operate_time >= self.records.begin:
                        self.workflows[key] = msgspec.structs.replace(known, counted=True, unread=False, lost=True)
                continue
            ended = known.finish_time or known.operate_time
            retried = known.failed and (now - ended < self.config.reopen_window * 1000 or key in of_failing_hosts)
            if not (known.operate_time >= self.records.begin or retried or known.unread):
                del self.workflows[key]


def is_failure(operation: HostOperation) -> bool:
    """Whether an operation has ended as a failure, unknown states included."""
    return not is_running(operation) and operation.state != "success"
