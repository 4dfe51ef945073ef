"""What NodeMan 2.x says about a job and its hosts: the answers of job_list and job_details.

Times carry a zone. Numbers may come as text, lists as `{}` or null. `cost_time` is never read: it loses whole days.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from msgspec import Struct, field

from exporter.blueking.envelope import Empty, Int, ResponseDecoder, WrongShape, listed
from exporter.blueking.steps import OTHER, step_slug
from exporter.blueking.text import clean_text
from exporter.blueking.values import Number, Time, check_rows, host, integer, seconds, status_slug, word
from exporter.model import Host

When = TypeVar("When")
"""The type of times: `datetime` where all are text in the usual form, which msgspec reads fastest; `Time` otherwise."""


class Statistics(Struct, frozen=True, gc=False):
    """Instances by status as stored with the job; other statuses, like removed, are in none of them.

    A number can be negative: the platform subtracts the hosts of a retry, also those that had not failed.
    """

    pending: int
    running: int
    success: int
    failed: int
    ignored: int
    total: int


class Job(Struct, frozen=True, gc=False):
    """A job. Times in unix seconds; `end_time` stays at the end of the first run.

    `status` is in lower case and may be an unknown word. `statistics` is None when nothing has been counted, as when
    creating the job failed. Only job_list gives `task_ids`, `subscription_id` and `bk_biz_ids`.
    """

    id: int
    job_type: str
    status: str
    start_time: int | None
    end_time: int | None
    statistics: Statistics | None
    task_ids: tuple[int, ...] = ()
    subscription_id: int | None = None
    bk_biz_ids: tuple[int, ...] = ()


class JobPage(Struct, frozen=True):
    """One page of jobs, newest first; None stands for a row whose id needs more than 64 bits. `total` counts what the
    caller may see."""

    rows: tuple[Job | None, ...]
    total: int


class HostRow(Struct, frozen=True, gc=False):
    """A host of a job. The row is read where it is needed and was checked before: no property raises. Times in unix
    seconds, None until it begins or ends."""

    row: _HostRow[Any]
    zone: datetime.timezone
    plugin: bool

    @property
    def filtered(self) -> bool:
        """Whether the job never ran on it: then the row is no result and comes back on every page."""
        return bool(self.row.filter_host)

    @property
    def instance_id(self) -> str:
        return clean_text(self.row.instance_id or "")

    @property
    def host(self) -> Host | None:
        """None where neither an id nor an address is known."""
        row = self.row
        return host(row.bk_cloud_id, row.bk_host_id, row.inner_ip, row.inner_ipv6, row.ip)

    @property
    def bk_biz_id(self) -> int | None:
        return integer(self.row.bk_biz_id)

    @property
    def status(self) -> str:
        return status_slug(self.row.status)

    @property
    def start_time(self) -> int | None:
        return seconds(self.row.start_time, self.zone, "start_time")

    @property
    def end_time(self) -> int | None:
        return seconds(self.row.end_time, self.zone, "end_time")

    @property
    def step(self) -> str:
        """The sub-step that is running or has failed, or after success the last one; `other` where none is named.

        The platform looks at the first step of a subscription only. When a later step fails, the row names the last
        sub-step of the first one, and its display text says that it has succeeded.
        """
        # Where no sub-step is running or has failed, the row names the last one and its node_id is -1.
        if integer(self.row.node_id) == -1 or (self.status == "failed" and _says_success(self.row.status_display)):
            return OTHER
        return step_slug(None, self.row.step, plugin=self.plugin)


class JobDetails(Struct, frozen=True):
    """A job and one page of its hosts. `total` counts the executed ones that the filter lets through."""

    job: Job
    total: int
    hosts: tuple[HostRow, ...]


class _Statistics(Struct, gc=False):
    pending_count: Int | None = None
    running_count: Int | None = None
    success_count: Int | None = None
    failed_count: Int | None = None
    ignored_count: Int | None = None
    total_count: Int | None = None


_NO_STATISTICS = _Statistics()


class _Job(Struct, Generic[When], gc=False):
    """job_list calls the id `id`, job_details `job_id`."""

    id: Number = None
    job_type: str | None = None
    subscription_id: Int | None = None
    task_id_list: list[Int] | Empty | None = None
    start_time: When | None = None
    end_time: When | None = None
    status: Number = None
    statistics: _Statistics | list[None] | None = None
    bk_biz_scope: list[Int] | Empty | None = None
    job_id: Number = None


class _JobPage(Struct):
    rows: list[_Job[Time]] | Empty | None = field(name="list")
    total: Int | None = None


class _HostRow(Struct, Generic[When], gc=False):
    instance_id: str | None = None
    ip: str | None = None
    inner_ip: str | None = None
    inner_ipv6: str | None = None
    bk_host_id: Number = None
    bk_cloud_id: Number = None
    bk_biz_id: Number = None
    status: Number = None
    start_time: When | None = None
    end_time: When | None = None
    node_id: Number = None
    step: str | None = None
    filter_host: bool | None = None
    status_display: Any = None


class _JobDetails(_Job[When], Generic[When]):
    rows: list[_HostRow[When]] | Empty | None = field(name="list", default=None)
    total: Int | None = None


def job_list_decoders(zone: datetime.timezone) -> Sequence[ResponseDecoder[Any, JobPage]]:
    """The decoders of an answer of job_list."""

    def read(page: _JobPage) -> JobPage:
        jobs: list[Job | None] = []
        for row in listed(page.rows):
            try:
                jobs.append(_job(row, zone))
            except IdTooLarge:
                jobs.append(None)
            except WrongShape as error:
                raise WrongShape(f"data.list[{len(jobs)}].{error}") from None
        return JobPage(tuple(jobs), len(jobs) if page.total is None else page.total)

    return (ResponseDecoder(_JobPage, read, strict=False),)


def job_details_decoders(zone: datetime.timezone) -> Sequence[ResponseDecoder[Any, JobDetails]]:
    """The decoders of an answer of job_details."""

    def usual(data: _JobDetails[Any]) -> JobDetails:
        try:
            job = _job(data, zone)
        except WrongShape as error:
            raise WrongShape(f"data.{error}") from None
        rows, plugin = listed(data.rows), job.job_type.endswith("PLUGIN")
        check_rows(rows, zone)
        hosts = tuple([HostRow(row, zone, plugin) for row in rows])
        return JobDetails(job, sum(not row.filtered for row in hosts) if data.total is None else data.total, hosts)

    def odd(data: _JobDetails[Time]) -> JobDetails:
        rows = listed(data.rows)
        check_rows(rows, zone, "start_time", "end_time")
        return usual(data)

    return (
        ResponseDecoder(_JobDetails[datetime.datetime], usual),
        ResponseDecoder(_JobDetails[Time], odd, strict=False),
    )


class IdTooLarge(WrongShape):
    """An id needs more than 64 bits."""


def _id(value: Number) -> int:
    number = integer(value)
    if number is not None:
        return number
    if value is None:
        raise WrongShape("id is missing")
    is_integer = value.isdecimal() if isinstance(value, str) else isinstance(value, int) or value.is_integer()
    raise IdTooLarge("id needs more than 64 bits") if is_integer else WrongShape("id is no integer")


def _job(row: _Job[Any], zone: datetime.timezone) -> Job:
    return Job(
        _id(row.job_id if row.id is None else row.id),
        word(row.job_type),
        status_slug(row.status, "status"),
        seconds(row.start_time, zone, "start_time"),
        seconds(row.end_time, zone, "end_time"),
        _statistics(row.statistics),
        tuple(listed(row.task_id_list)),
        row.subscription_id,
        tuple(listed(row.bk_biz_scope)),
    )


def _says_success(display: object) -> bool:
    """Whether a display text, in either language, says that something has succeeded."""
    return isinstance(display, str) and bool(_SUCCESS.search(display)) and not _FAILURE.search(display)


_SUCCESS = re.compile("成功|succe", re.IGNORECASE)
_FAILURE = re.compile("失败|fail", re.IGNORECASE)


def _statistics(given: _Statistics | list[None] | None) -> Statistics | None:
    if not isinstance(given, _Statistics) or given == _NO_STATISTICS:
        return None
    return Statistics(
        given.pending_count or 0,
        given.running_count or 0,
        given.success_count or 0,
        given.failed_count or 0,
        given.ignored_count or 0,
        given.total_count or 0,
    )
