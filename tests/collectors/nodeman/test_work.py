"""What polls of NodeMan jobs cost, counted in rows and calls, so that no slow machine fails."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.blueking.envelope import Reply, read
from exporter.blueking.nodeman_jobs import JobDetails, JobPage, job_details_decoders, job_list_decoders
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import Observed
from exporter.collectors.nodeman import HOST_FAILURES
from exporter.collectors.nodeman_job.collector import NodemanJobCollector
from exporter.collectors.nodeman_job.fold import FINISHED, Fold
from exporter.collectors.nodeman_job.metrics import FAMILIES
from exporter.collectors.nodeman_job.state import NodemanJobRecords, NodemanJobState, is_news
from exporter.config.schema import NodemanJobConfig
from exporter.metrics.counts import Tally
from exporter.metrics.family import Counts
from exporter.model import Scope
from tests.support.calls import Calls

NOW = 1_795_395_600
BIZ = 2
UTC = datetime.UTC
Row = dict[str, Any]


def time(seconds: int | None) -> str | None:
    """As NodeMan writes it."""
    return None if seconds is None else datetime.datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S%z")


def job(
    id: int, *, status: str = "SUCCESS", age: int = 60, length: int | None = 50, success: int = 3, failed: int = 0,
    **more: object,
) -> Row:  # fmt: skip
    """A row of job_list; it began `age` seconds ago, and ended after `length` seconds."""
    statistics = dict.fromkeys(("pending_count", "running_count", "ignored_count"), 0)
    statistics |= {"success_count": success, "failed_count": failed, "total_count": success + failed}
    begin = NOW - age
    return {
        "id": id, "job_type": "INSTALL_AGENT", "subscription_id": id, "task_id_list": [id], "start_time": time(begin),
        "end_time": time(None if length is None else begin + length), "status": status, "statistics": statistics,
        "bk_biz_scope": [BIZ], **more,
    }  # fmt: skip


def host(number: int, status: str = "FAILED") -> Row:
    """A row of job_details."""
    return {
        "instance_id": f"host|instance|host|{number}", "inner_ip": f"10.0.{number >> 8}.{number & 255}",
        "bk_host_id": number, "bk_cloud_id": 0, "bk_biz_id": BIZ, "status": status, "end_time": time(NOW - 11),
        "node_id": 2, "status_display": "安装 失败", "step": "安装",
    }  # fmt: skip


def decoded(data: Mapping[str, object], decoders: Any) -> Any:
    return read(Reply(200, json.dumps({"result": True, "code": 0, "data": data}).encode(), {}), decoders)


class Platform:
    """The calls of NodeMan, answered from `jobs`, newest first, and `hosts`. `details`: the jobs asked for."""

    lists_jobs, web_url = True, ""

    def __init__(self) -> None:
        self.jobs: list[Row] = []
        self.hosts: list[Row] = []
        self.details: list[int] = []

    async def job_list(
        self, *, statuses: Sequence[str] = (), job_ids: Sequence[int] = (), page: int = 1, pagesize: int = 500,
        **_: object,
    ) -> JobPage:  # fmt: skip
        rows = [] if statuses or job_ids else self.jobs[(page - 1) * pagesize : page * pagesize]
        listed: JobPage = decoded({"total": len(self.jobs), "list": rows}, job_list_decoders(UTC))
        return listed

    async def job_details(self, id: int, *, page: int = 1, pagesize: int = 0, **_: object) -> JobDetails:
        self.details.append(id)
        about = next(row for row in self.jobs if row["id"] == id)
        rows = self.hosts[(page - 1) * pagesize : page * pagesize]
        data = {**about, "job_id": id, "total": len(self.hosts), "list": rows}
        details: JobDetails = decoded(data, job_details_decoders(UTC))
        return details


def collector(platform: Platform) -> NodemanJobCollector:
    built: Any = NodemanJobCollector
    watching: NodemanJobCollector = built(Scope("biz", str(BIZ)), NodemanJobConfig(), platform, clock())
    return watching


def clock() -> Clock:
    return Clock(wall=lambda: float(NOW), monotonic=lambda: float(NOW))


async def poll(
    watching: NodemanJobCollector, state: NodemanJobState | None
) -> tuple[NodemanJobRecords, Observed[NodemanJobState]]:
    records = await watching.fetch(state, Deadline(60.0, clock()))
    counts = state.counts if state else Counts()
    return records, watching.observe(state, records, Tally(counts, float(NOW), 0.0, watching.families))


async def after_baseline() -> tuple[Platform, NodemanJobCollector, NodemanJobState]:
    """A platform that had one job, and what the first poll made of it."""
    platform = Platform()
    watching = collector(platform)
    platform.jobs = [job(1)]
    _, observed = await poll(watching, None)
    return platform, watching, observed.state


async def test_a_known_job_that_has_not_changed_is_not_folded() -> None:
    """A poll that finds nothing new passes no row on, and costs a few calls for each row that it reads."""

    async def quiet(count: int) -> Calls:
        platform, watching, state = await after_baseline()
        platform.jobs = [job(id) for id in range(count, 0, -1)]
        _, observed = await poll(watching, state)
        assert sum(one.value for one in observed.state.counts.counters[FINISHED].values()) == count - 1
        with Calls() as calls:
            records, again = await poll(watching, observed.state)
        assert records.rows == {}
        assert again.state.equals_except_times(observed.state)
        return calls

    await quiet(20)  # what is made once per process
    few, many = await quiet(200), await quiet(400)
    assert (many.python - few.python) / 200 <= 10


async def test_each_failed_host_is_read_once() -> None:
    """Reading and counting the hosts of a job costs a bounded number of calls each, whatever their number."""

    async def failed(count: int) -> Calls:
        platform, watching, state = await after_baseline()
        platform.jobs = [job(2, status="FAILED", success=0, failed=count), job(1)]
        platform.hosts = [host(number) for number in range(1, count + 1)]
        with Calls() as calls:
            _, observed = await poll(watching, state)
        assert platform.details == [2]
        assert {labels[2]: one.value for labels, one in observed.state.counts.counters[HOST_FAILURES].items()} == {
            "install": count
        }
        assert len(observed.state.hosts.streaks) == count
        return calls

    await failed(20)  # what is made once per process
    few, many = await failed(100), await failed(300)
    assert (many.python - few.python) / 200 <= 46


JOBS = st.builds(
    job,
    st.just(1),
    status=st.sampled_from(["PENDING", "RUNNING", "SUCCESS", "FAILED", "PART_FAILED", "TERMINATED", "NEW"]),
    age=st.sampled_from([60, 70]),
    length=st.sampled_from([None, 10, 50]),
    success=st.integers(0, 1),
    failed=st.integers(-1, 1),
    task_id_list=st.sampled_from([[], [1], [1, 2]]),
    job_type=st.sampled_from(["INSTALL_AGENT", "no word"]),
) | st.just(job(1, success=0, failed=0) | {"statistics": {"ignored_count": 1, "total_count": 1}, "task_id_list": []})
"""The last one says that it has succeeded before its task exists."""
HOSTS = st.none() | st.lists(st.builds(host, st.just(1), st.sampled_from(["FAILED", "SUCCESS", "RUNNING"])), max_size=1)


def fold(
    state: NodemanJobState | None, row: Row | None, hosts: list[Row] | None, place: str, now: int
) -> Observed[NodemanJobState]:
    """Fold one row, with what was read of its hosts. `place`: the set of records that names the job too."""
    records = NodemanJobRecords(now=float(now), watermark=float(now), floor=state.floor if state else 0, rows={})
    if row:
        records.rows = dict.fromkeys([1], *decoded({"total": 1, "list": [row]}, job_list_decoders(UTC)).rows)
    if hosts is not None:
        details: JobDetails = decoded({**job(1), "job_id": 1, "list": hosts}, job_details_decoders(UTC))
        records.hosts = {1: details.hosts}
    if place:
        setattr(records, place, {1})
    tally = Tally(state.counts if state else Counts(), float(now), 0.0, FAMILIES)
    return Fold(NodemanJobConfig(), BIZ, state, records, tally).result()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(JOBS, HOSTS, st.sampled_from(["", "deferred", "unexamined", "from_details"])), min_size=1, max_size=4
    ),
    JOBS,
    st.integers(0, 200),
)
def test_a_row_that_is_no_news_changes_nothing(polls: Any, other: Row, waited: int) -> None:
    """Whatever was seen of a job before, and whichever member of the newest row has changed: if `is_news` holds the row
    back, the state is the same without it."""
    state = fold(None, None, None, "", NOW).state
    for number, (row, hosts, place) in enumerate(polls):
        state = fold(state, row, hosts, place, NOW + number).state
    now = NOW + len(polls) + waited
    without = fold(state, None, None, "", now)
    for changed in row:
        last = {**row, changed: other[changed]}
        (listed,) = decoded({"total": 1, "list": [last]}, job_list_decoders(UTC)).rows
        if not is_news(state.jobs.get(1), listed):
            assert fold(state, last, None, "", now) == without
