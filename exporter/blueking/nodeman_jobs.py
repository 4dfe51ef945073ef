"""What NodeMan 2.x says about a job and its hosts: the answers of job_list and job_details.

Times carry a zone. Numbers may come as text, lists as `{}` or null. `cost_time` is never read: it loses whole days.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

from msgspec import Meta, Raw, Struct, field

from exporter.blueking.envelope import Empty, Int, ResponseDecoder, WrongShape, listed, text_in
from exporter.blueking.steps import OTHER, step_slug
from exporter.blueking.text import clean_text
from exporter.blueking.values import Number, Time, host, integer, lower, seconds, status_slug, times, word
from exporter.model import Host

When = TypeVar("When", bound=Time | datetime.datetime)
Word = TypeVar("Word", bound=Number)
Whole = TypeVar("Whole", bound=Number)
"""The types of times, words and integers: narrow in the usual form of an answer, since msgspec decodes that fastest;
wide for any other form."""
_UsualTime = Annotated[datetime.datetime, Meta(tz=True)]
_UsualWord = Annotated[str, Meta(min_length=1)]


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


class _Statistics(Struct, gc=False, rename=lambda name: f"{name}_count"):
    pending: Int | None = None
    running: Int | None = None
    success: Int | None = None
    failed: Int | None = None
    ignored: Int | None = None
    total: Int | None = None

    def known(self) -> Statistics | None:
        """None where no number was sent."""
        if self == _NO_STATISTICS:
            return None
        return Statistics(
            self.pending or 0,
            self.running or 0,
            self.success or 0,
            self.failed or 0,
            self.ignored or 0,
            self.total or 0,
        )


_NO_STATISTICS = _Statistics()


class JobOf(
    Struct,
    Generic[When],
    gc=False,
    rename={
        "sent_job_type": "job_type",
        "task_ids": "task_id_list",
        "sent_statistics": "statistics",
        "bk_biz_ids": "bk_biz_scope",
    },
):
    """A job. Times in unix seconds; `end_time` stays at the end of the first run.

    `status` is in lower case and may be an unknown word. Only job_list gives `task_ids`, `subscription_id` and
    `bk_biz_ids`. The members are in the order of the usual row of job_list, which is decoded into this.
    """

    id: Int
    sent_job_type: str | None
    subscription_id: Int | None
    task_ids: tuple[Int, ...]
    start_time: When | None
    end_time: When | None
    status: _UsualWord
    sent_statistics: _Statistics | None
    bk_biz_ids: tuple[Int, ...]

    @property
    def job_type(self) -> str:
        return word(self.sent_job_type)

    @property
    def statistics(self) -> Statistics | None:
        """None when nothing has been counted, as when creating the job failed."""
        sent: Any = self.sent_statistics
        if type(sent) is _Statistics:
            known: Any = sent.known()
            self.sent_statistics = sent = known  # it is read several times
        return sent  # type: ignore[no-any-return]


Job = JobOf[int]
"""A job as the calls return it."""


class JobPage(Struct, frozen=True):
    """One page of jobs, newest first; None stands for a row whose id needs more than 64 bits. `total` counts what the
    caller may see."""

    rows: tuple[Job | None, ...]
    total: int


class HostRowOf(
    Struct, Generic[When, Word, Whole], gc=False, kw_only=True, rename=lambda name: name.removeprefix("sent_")
):
    """A host of a job. The members that begin with `sent_` are as the platform sent them; the properties read them, and
    none raises. The members are in the order of the usual row."""

    sent_instance_id: str | None = None
    sent_ip: str | None = None
    sent_inner_ip: str | None = None
    sent_inner_ipv6: str | None = None
    sent_bk_host_id: Whole | None = None
    sent_bk_cloud_id: Whole | None = None
    sent_bk_biz_id: Whole | None = None
    sent_status: Word
    sent_end_time: When | None = None
    sent_node_id: Whole | None = None
    # Texts of failed hosts only are read: decoding all of them would take a tenth of the time.
    sent_status_display: Raw = Raw(b"null")
    sent_step: Raw = Raw(b"null")
    sent_filter_host: bool | None = None

    @property
    def filtered(self) -> bool:
        """Whether the job never ran on it: then the row is no result and comes back on every page."""
        return bool(self.sent_filter_host)

    @property
    def instance_id(self) -> str:
        return clean_text(self.sent_instance_id or "")

    @property
    def host(self) -> Host | None:
        """None where neither an id nor an address is known."""
        addresses = self.sent_inner_ip, self.sent_inner_ipv6, self.sent_ip
        return host(self.sent_bk_cloud_id, self.sent_bk_host_id, *addresses)

    @property
    def bk_biz_id(self) -> int | None:
        return integer(self.sent_bk_biz_id)

    @property
    def status(self) -> str:
        return status_slug(self.sent_status)

    @property
    def end_time(self) -> int | None:
        """Unix seconds, None until it ends."""
        return seconds(self.sent_end_time, datetime.UTC, "end_time")

    def step(self, job: Job) -> str:
        """The sub-step that is running or has failed, or after success the last one; `other` where none is named.
        `job`: the job of the host.

        The platform looks at the first step of a subscription only. When a later step fails, the row names the last
        sub-step of the first one, and its display text says that it has succeeded.
        """
        # Where no sub-step is running or has failed, the row names the last one and its node_id is -1.
        if integer(self.sent_node_id) == -1 or (self.status == "failed" and _says_success(self.sent_status_display)):
            return OTHER
        return step_slug(None, text_in(self.sent_step), plugin=job.job_type.endswith("PLUGIN"))


HostRow = HostRowOf[Any, Any, Any]
"""A host as the calls return it."""


class JobDetails(Struct, frozen=True):
    """A job and one page of its hosts. `total` counts the executed ones that the filter lets through."""

    job: Job
    total: int
    hosts: tuple[HostRow, ...]


class _UsualJobPage(Struct):
    rows: list[JobOf[str]] = field(name="list")
    total: Int


class _Job(Struct, gc=False):
    """A job in any form. job_list calls the id `id`, job_details `job_id`."""

    id: Number = None
    job_type: str | None = None
    subscription_id: Int | None = None
    task_id_list: list[Int] | Empty | None = None
    start_time: Time = None
    end_time: Time = None
    status: Number = None
    statistics: _Statistics | list[None] | None = None
    bk_biz_scope: list[Int] | Empty | None = None
    job_id: Number = None


class _JobPage(Struct):
    rows: list[_Job] | Empty | None = field(name="list")
    total: Int | None = None


class _UsualJobDetails(_Job):
    rows: list[HostRowOf[_UsualTime, _UsualWord, int]] = field(name="list", default_factory=list)
    total: Int | None = None


class _JobDetails(_Job):
    rows: list[HostRowOf[Time, Number, Number]] | Empty | None = field(name="list", default=None)
    total: Int | None = None


@functools.cache
def job_list_decoders(zone: datetime.timezone) -> Sequence[ResponseDecoder[Any, JobPage]]:
    """The decoders of an answer of job_list."""

    unix = times(zone)

    def usual(page: _UsualJobPage) -> JobPage:
        rows: list[JobOf[Any]] = page.rows
        for row in rows:
            row.status = lower(row.status)
            row.start_time = unix[row.start_time]
            row.end_time = unix[row.end_time]
        return JobPage(tuple(rows), page.total)

    def unusual(page: _JobPage) -> JobPage:
        jobs: list[Job | None] = []
        for row in listed(page.rows):
            try:
                jobs.append(_job(row, zone))
            except IdTooLarge:
                jobs.append(None)
            except WrongShape as error:
                raise WrongShape(f"data.list[{len(jobs)}].{error}") from None
        return JobPage(tuple(jobs), len(jobs) if page.total is None else page.total)

    return (ResponseDecoder(_UsualJobPage, usual), ResponseDecoder(_JobPage, unusual, strict=False))


@functools.cache
def job_details_decoders(zone: datetime.timezone) -> Sequence[ResponseDecoder[Any, JobDetails]]:
    """The decoders of an answer of job_details."""

    def details(data: _UsualJobDetails | _JobDetails, rows: Sequence[HostRow]) -> JobDetails:
        try:
            job = _job(data, zone)
        except WrongShape as error:
            raise WrongShape(f"data.{error}") from None
        return JobDetails(job, sum(not row.filtered for row in rows) if data.total is None else data.total, tuple(rows))

    def unusual(data: _JobDetails) -> JobDetails:
        rows: list[HostRow] = listed(data.rows)
        for index, row in enumerate(rows):
            path = f"data.list[{index}]"
            status_slug(row.sent_status, f"{path}.status")
            row.sent_end_time = seconds(row.sent_end_time, zone, f"{path}.end_time")
        return details(data, rows)

    return (
        ResponseDecoder(_UsualJobDetails, lambda data: details(data, data.rows)),
        ResponseDecoder(_JobDetails, unusual, strict=False),
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


def _job(row: _Job, zone: datetime.timezone) -> Job:
    return JobOf(
        _id(row.job_id if row.id is None else row.id),
        row.job_type,
        row.subscription_id,
        tuple(listed(row.task_id_list)),
        seconds(row.start_time, zone, "start_time"),
        seconds(row.end_time, zone, "end_time"),
        status_slug(row.status, "status"),
        row.statistics if isinstance(row.statistics, _Statistics) else None,
        tuple(listed(row.bk_biz_scope)),
    )


def _says_success(display: Raw) -> bool:
    """Whether a display text, in either language, says that something has succeeded."""
    text = text_in(display)
    return bool(_SUCCESS.search(text)) and not _FAILURE.search(text)


_SUCCESS = re.compile("成功|succe", re.IGNORECASE)
_FAILURE = re.compile("失败|fail", re.IGNORECASE)
