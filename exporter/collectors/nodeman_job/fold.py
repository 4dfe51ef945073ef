"""How the records of a poll become counts: the fold of the NodeMan job collector. Times are unix seconds."""

from __future__ import annotations

import msgspec

from exporter.blueking.nodeman_jobs import Job
from exporter.collectors.base import TRUNCATED, Observed
from exporter.collectors.failing_hosts import HostResult
from exporter.collectors.nodeman import (
    FUTURE,
    born_at_zero,
    count_failure,
    ended,
    fold_hosts,
    is_news,
    known_end,
    name_of,
    status_label,
)
from exporter.collectors.nodeman_job.state import (
    NAME,
    NodemanJobRecords,
    NodemanJobState,
    TrackedJob,
    failures,
    is_new_run,
    is_past,
)
from exporter.config.schema import NodemanJobConfig
from exporter.metrics.counts import Tally
from exporter.model import NODEMAN_STATUSES

FINISHED = "blueking_nodeman_jobs_finished_total"
DURATION = "blueking_nodeman_job_duration_seconds"

DURATION_BUCKETS = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)


class Fold:
    """One application of records to a state: the mutable side of `observe`, thrown away after `result`."""

    def __init__(
        self,
        config: NodemanJobConfig,
        biz: int,
        state: NodemanJobState | None,
        records: NodemanJobRecords,
        tally: Tally,
    ) -> None:
        self.config = config
        self.biz = biz
        self.state = state
        self.records = records
        self.tally = tally
        self.jobs = dict(state.jobs) if state else {}
        self.born = state.born if state else records.now
        self.results: list[HostResult] = []
        self.unknown: list[tuple[str, str]] = []

    def result(self) -> Observed[NodemanJobState]:
        born_at_zero(self.tally)
        records, state = self.records, self.state
        for id in sorted(records.rows):
            self._count(id, records.rows[id])
        if records.unexamined:
            self.tally.inc(TRUNCATED, by=len(records.unexamined))
        floor = self._forget()
        hosts = fold_hosts(state, self.results, self.config, records.now, settled=self.config.max_finished_age)
        return Observed(
            NodemanJobState(
                counts=self.tally.freeze(),
                last_success=self.tally.now,
                watermark=records.watermark,
                floor=floor,
                born=self.born,
                jobs=self.jobs,
                hosts=hosts,
            ),
            unknown=tuple(self.unknown),
            errors=records.errors,
        )

    def _is_history(self, id: int) -> bool:
        """Whether a job that is seen for the first time began before jobs were watched."""
        return self.state is None or self.state.floor is None or id <= self.state.floor

    def _count(self, id: int, row: Job) -> None:
        known = self.jobs.get(id)
        if (known is None or known.status != row.status) and row.status not in NODEMAN_STATUSES:
            self.unknown.append(("nodeman_job.status", row.status))
        over = ended(row.status, row.end_time)
        history = known is None and self._is_history(id)
        if known is None:
            # An unfinished job with an end has been retried.
            timed = history if over else row.end_time is not None
            known = TrackedJob(row.job_type, "", row.task_ids, None, None, None, False, timed)
        elif is_new_run(known, row):
            if not known.counted and known.end_time is None and row.end_time is not None:
                # Between two looks it ended, with hosts that failed, and these were retried.
                succeeded = row.statistics is not None and row.statistics.success > 0
                self.tally.inc(FINISHED, (row.job_type, "part_failed" if succeeded else "failed"))
                if not known.timed:
                    self._observe_duration(row)
            failed = {name: end for name, end in known.failed.items() if end}
            known = msgspec.structs.replace(known, counted=False, timed=True, finished=None, failed=failed, failures=0)
        if over and not known.counted:
            if not history:
                self.tally.inc(FINISHED, (row.job_type, status_label(row.status)))
            # The platform keeps the end of the first run.
            end = known_end(row.end_time, self.records.now) if row.end_time != known.end_time else None
            known = msgspec.structs.replace(known, counted=True, finished=end or self.records.now)
        timed = known.timed
        if over and not timed and row.end_time is not None:
            self._observe_duration(row)
            timed = True
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
            known.failed | self._take_hosts(id, row, known, counts=not history),
            failures(row) if asked else known.failures,
            self.records.now if id in self.records.looked else known.looked,
        )

    def _take_hosts(self, id: int, row: Job, known: TrackedJob, *, counts: bool) -> dict[str, float]:
        """Count the failures of hosts that are not known yet, and learn who fails and who does no longer."""
        failed: dict[str, float] = {}
        for result in self.records.hosts.get(id, ()):
            if result.bk_biz_id not in (None, self.biz):
                continue
            status, host, own = result.status, result.host, known_end(result.end_time, self.records.now)
            name = name_of(host) if host else result.instance_id
            labels = (NAME, row.job_type, result.step, "")
            if status == "failed":
                if name in failed or (name in known.failed and (own or 0.0) <= known.failed[name]):
                    continue
                failed[name] = own or 0.0
                if counts and is_news(own, self.born):
                    count_failure(self.tally, labels)
            if host and status in ("failed", "success"):
                end = own or known_end(row.end_time, self.records.now) or self.records.now
                self.results.append(HostResult(host, id, "", end, labels if status == "failed" else None))
        return failed

    def _observe_duration(self, row: Job) -> None:
        if row.start_time is None or row.end_time is None:
            return
        duration = row.end_time - row.start_time
        if duration < 0 or row.end_time > self.records.now + FUTURE:
            self.unknown.append(("nodeman_job.end_time", str(row.end_time)))
        else:
            self.tally.observe(DURATION, (row.job_type,), duration, DURATION_BUCKETS)

    def _forget(self) -> int | None:
        """Drop jobs that ended too long ago to be retried; the new floor."""
        floor = self.records.floor
        for id, job in list(self.jobs.items()):
            over = is_past(job, self.records.now, self.config)
            if id in self.records.gone or (over and id not in self.config.job_ids):
                del self.jobs[id]
                floor = None if floor is None else max(floor, id)
        return floor
