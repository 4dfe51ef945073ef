"""How the records of a poll become counts: the fold of the NodeMan job collector. Times are unix seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from exporter.blueking.nodeman_jobs import HostRow, Job
from exporter.blueking.nodeman_subscriptions import Instance
from exporter.collectors.base import TRUNCATED, FinishedRun, Observed
from exporter.collectors.failing_hosts import HostResult
from exporter.collectors.nodeman import (
    DURATION_BUCKETS,
    FUTURE,
    NodemanFold,
    ended,
    is_after_baseline,
    is_ours,
    known_end,
    name_of,
    status_label,
)
from exporter.collectors.nodeman_job.state import (
    FAILED,
    NAME,
    MissedRun,
    NodemanJobRecords,
    NodemanJobState,
    TrackedJob,
    failures,
    has_ended,
    is_abandoned,
    is_new_run,
    is_past,
    is_same_job,
    provisional_since,
    was_retried_unseen,
)
from exporter.config.schema import NodemanJobConfig
from exporter.metrics.counts import Tally
from exporter.metrics.family import Labels
from exporter.model import NODEMAN_STATUSES, NODEMAN_UNFINISHED, UNKNOWN

FINISHED = "blueking_nodeman_jobs_finished_total"
DURATION = "blueking_nodeman_job_duration_seconds"

UNREADABLE_KEPT = 256
"""Places in the list with rows that cannot be read, so that each is counted once."""


class Fold(NodemanFold[NodemanJobState, NodemanJobConfig, NodemanJobRecords]):
    """See `NodemanFold`."""

    def __init__(
        self,
        config: NodemanJobConfig,
        biz: int,
        state: NodemanJobState | None,
        records: NodemanJobRecords,
        tally: Tally,
    ) -> None:
        super().__init__(config, biz, state, records, tally)
        self.jobs = dict(state.jobs) if state else {}
        self.born = state.born if state else records.now
        self.truncated = len(records.unexamined)

    def result(self) -> Observed[NodemanJobState]:
        records = self.records
        for id in sorted(records.rows):
            self._count(id, records.rows[id])
        floor = self._forget()
        unreadable = self._count_unreadable()
        if self.truncated:
            self.tally.inc(TRUNCATED, by=self.truncated)
        # Hosts that are still to be read may have failed as long ago as a failing host is kept.
        settled = max(self.config.max_finished_age, self.config.failing_host_ttl)
        hosts = self.fold_hosts(records.now, settled=settled)
        return Observed(
            NodemanJobState(
                counts=self.tally.freeze(),
                last_success=self.tally.now,
                watermark=records.watermark,
                floor=floor,
                born=self.born,
                jobs=self.jobs,
                unreadable=unreadable,
                hosts=hosts,
            ),
            unknown=tuple(self.unknown),
            errors=tuple(records.errors),
            more=bool(records.deferred),
            finished=tuple(self.finished),
        )

    def _is_history(self, id: int) -> bool:
        """Whether a job that is seen for the first time began before jobs were watched."""
        return self.state is None or self.state.floor is None or id <= self.state.floor

    def _count(self, id: int, row: Job) -> None:
        now, known = self.records.now, self.jobs.get(id)
        self._note_unknown(known, row)
        new = known.new if known is not None else not self._is_history(id)
        history = known is None and not new
        if not is_same_job(known, row):
            known = None
        over = has_ended(known, row, now)
        missed = self.records.missed.get(id, [])
        if known is None:
            known = TrackedJob(
                row.job_type, "", (), None, None, None, False, history and over, history=history and over, new=new
            )
        elif was_retried_unseen(known, row):
            missed = [MissedRun()]
        results, host_running = self._results(id, row)
        for run in missed:
            known = self._count_missed(id, row, known, run)
        if is_new_run(known, row):
            self.truncated += known.unread and not known.history
            known = self._next_run(known, row)
        if row.end_time is not None and not ended(row.status, row.end_time):
            # Its end is that of an earlier run, or of a success before its task began.
            known = msgspec.structs.replace(known, timed=True)
        if over and not known.counted:
            since = provisional_since(known, row, now)
            if history or (since is not None and since < self.born and not known.new):
                known = msgspec.structs.replace(known, timed=True)
            else:
                steps = [step for _, step in results if step is not None]
                self._count_finished(id, row, status_label(row.status), row.end_time, steps)
            # The platform keeps the end of the first run.
            end = known_end(row.end_time, now) if row.end_time != known.end_time else None
            known = msgspec.structs.replace(known, counted=True, finished=end or now)
        timed = known.timed
        if over and not timed and row.end_time is not None:
            self._observe_duration(row)
            timed = True
        failed: dict[str, float] = {}
        for each, step in results:
            self._take(id, row, known, failed, each, each.end_time, step)
        asked = id in self.records.hosts or id in self.records.unexamined
        self.jobs[id] = TrackedJob(
            row.job_type,
            row.status,
            tuple(sorted({*known.task_ids, *row.task_ids})),
            row.start_time,
            row.end_time,
            row.statistics,
            known.counted,
            timed,
            known.finished,
            known.failed | failed,
            failures(row) if asked else known.failures,
            now if id in self.records.from_details else known.last_checked,
            host_running if asked else known.host_running,
            provisional_since(known, row, now),
            id in self.records.deferred,
            known.history,
            known.new,
        )

    def _results(self, id: int, row: Job) -> tuple[list[tuple[HostRow, str | None]], bool]:
        """The results of hosts of this business, each with the step that failed, None after a success; and whether a
        host says that it has not ended."""
        results: list[tuple[HostRow, str | None]] = []
        running = False
        for host in self.records.hosts.get(id, ()):
            if not is_ours(host, self.biz):
                continue
            status = host.status
            if status in ("failed", "success"):
                results.append((host, host.step(row) if status == "failed" else None))
            else:
                running |= not ended(status, host.end_time)
        return results, running

    def _note_unknown(self, known: TrackedJob | None, row: Job) -> None:
        if (known is None or known.status != row.status) and row.status not in NODEMAN_STATUSES:
            self.unknown.append(("nodeman_job.status", row.status))
        statistics = row.statistics
        if statistics is not None and (known is None or statistics != known.statistics):
            for number in msgspec.structs.astuple(statistics):
                if number < 0:
                    self.unknown.append(("nodeman_job.statistics", str(number)))

    def _next_run(self, known: TrackedJob, row: Job) -> TrackedJob:
        """What stays known of a job when it runs again. Only its first end gives a duration."""
        return msgspec.structs.replace(
            known,
            counted=False,
            timed=known.timed or known.counted,
            finished=None,
            failed={name: end for name, end in known.failed.items() if end},
            failures=0,
            host_running=False,
            history=False,
        )

    def _count_missed(self, id: int, row: Job, known: TrackedJob, run: MissedRun) -> TrackedJob:
        """Count a run that ended and was retried since the last poll, and the hosts that failed in it."""
        counter = run.counter
        if counter is None:
            self.truncated += 1
            # The row of a job shows its first end only.
            has_ended = known.end_time is None
            succeeded = row.statistics is not None and row.statistics.success > 0
            failed = True
        else:
            has_ended = not any(counter.get(status) for status in NODEMAN_UNFINISHED)
            succeeded, failed = bool(counter.get("success")), bool(counter.get("failed"))
        if has_ended:
            status = "success" if not failed else "part_failed" if succeeded else "failed"
            steps = [instance.failure[1] for instance in run.failed]
            self._count_finished(id, row, status, None, steps)
            if not known.timed:
                self._observe_duration(row)
        found: dict[str, float] = {}
        for instance in run.failed:
            if is_ours(instance, self.biz) and instance.status == "failed":
                _, step = instance.failure
                self._take(id, row, known, found, instance, instance.finish_time, step)
        return msgspec.structs.replace(
            known, status=known.status or row.status, end_time=row.end_time, timed=True, failed=known.failed | found
        )

    def _count_finished(self, id: int, row: Job, status: str, end: float | None, steps: Sequence[str]) -> None:
        """Count a run. `steps`: those in which its hosts failed, as far as they are known."""
        self.tally.inc(FINISHED, (row.job_type, status))
        failed = status in (*FAILED, UNKNOWN)
        self.finished.append(FinishedRun(id, row.job_type, status, failed, row.start_time, end, Counter(steps)))

    def _take(
        self,
        id: int,
        row: Job,
        known: TrackedJob,
        found: dict[str, float],
        result: HostRow | Instance,
        end_time: int | None,
        step: str | None,
    ) -> None:
        """Keep one host result, and count a failure that is not known yet. `step`: the one that failed, None after a
        success. Adds failed hosts to `found`, by name."""
        now, host = self.records.now, result.host
        name = name_of(host) if host else result.instance_id
        end = known_end(end_time, now)
        labels: Labels | None = None
        if step is not None:
            labels = (NAME, row.job_type, step, "")
            if name in found or (name in known.failed and (end or 0.0) <= known.failed[name]):
                return
            found[name] = end or 0.0
            after = end is not None and end >= int(self.born)
            if after or known.new or (not known.history and is_after_baseline(end, self.born)):
                self.count_failure(labels)
        if host:
            end = end or known_end(row.end_time, now) or now
            self.results.append(HostResult(host, id, "", end, labels))

    def _observe_duration(self, row: Job) -> None:
        if row.start_time is None or row.end_time is None:
            return
        duration = row.end_time - row.start_time
        if duration < 0 or row.end_time > self.records.now + FUTURE:
            self.unknown.append(("nodeman_job.end_time", str(row.end_time)))
        else:
            self.tally.observe(DURATION, (row.job_type,), duration, DURATION_BUCKETS)

    def _forget(self) -> int | None:
        """Drop jobs that ended too long ago to be retried, and unfinished ones that are too old; the new floor."""
        floor, now = self.records.floor, self.records.now
        for id, job in list(self.jobs.items()):
            old = is_past(job, now, self.config) or (not job.counted and is_abandoned(job, now))
            if id in self.records.gone or (old and id not in self.config.job_ids):
                self.truncated += job.host_running
                del self.jobs[id]
                floor = None if floor is None else max(floor, id)
        return floor

    def _count_unreadable(self) -> dict[int, int]:
        """Count the rows of the list that cannot be read, once each; those that are known now."""
        known = self.state.unreadable if self.state else {}
        found = self.records.unreadable
        new = sum(max(0, count - known.get(older, 0)) for older, count in found.items())
        self.truncated += new
        self.unknown += [("nodeman_job.id", "beyond 64 bits")] * min(new, self.records.without_id)
        return dict(sorted((known | found).items())[-UNREADABLE_KEPT:])
