"""NodeMan 2.x: jobs, the hosts of one, and what a subscription did, behind the API gateway or the ESB.

| | gateway (app type: /system before the path) | ESB: URL/api/c/compapi/v2/nodeman… |
|---|---|---|
| job_list | POST /api/job/job_list/ | not published |
| job_details | POST /api/job/{job_id}/details/ | POST /api/job/details/, job_id in the body |
| task_result | POST /backend/api/subscription/task_result/ | the same path |

Jobs carry times with a zone, subscriptions without. Numbers may come as text, lists as `{}` or null. `cost_time` is
never read: it loses whole days. Reading the details of a job makes the platform store its status and end.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Raw, Struct, field

from exporter.blueking.client import Client, Deadline, Identity
from exporter.blueking.envelope import Empty, Int, ResponseDecoder, WrongShape, listed
from exporter.blueking.steps import OTHER, step_slug
from exporter.blueking.text import clean_text
from exporter.blueking.values import Number, Time, host, integer, seconds, status_slug, word
from exporter.config.schema import NodemanPlatform
from exporter.model import Host

T = TypeVar("T")
When = TypeVar("When")
"""What a time is read as: `datetime` where all are text in the usual form, `Time` otherwise."""

PAGE_SIZE = 500
"""The most rows that one call asks for: a page of instances is then about 1.3 MB."""


class Statistics(Struct, frozen=True, gc=False):
    """Instances by status as stored with the job; other statuses, like removed, are in none of them."""

    pending: int
    running: int
    success: int
    failed: int
    ignored: int
    total: int


class Job(Struct, frozen=True, gc=False):
    """A job. Times in unix seconds; `end_time` stays at the end of the first run.

    `status` is in lower case and may be no known word. `statistics` None: nothing has been counted, as when creating
    the job failed. `task_ids`, `subscription_id` and `bk_biz_ids` are told by job_list only.
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
    """One page of jobs, newest first. `total` counts what the caller may see."""

    rows: tuple[Job, ...]
    total: int


class HostRow(Struct, frozen=True, gc=False):
    """A host of a job, as it came. That it can be read has been checked; no property raises. Times in unix seconds,
    None until it begins or ends."""

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
        """The sub-step that is running or has failed, or after success the last one; `other` where none is named."""
        # Where none is running or has failed, the row names the last one and its node_id is -1.
        return OTHER if integer(self.row.node_id) == -1 else step_slug(None, self.row.step, plugin=self.plugin)


class JobDetails(Struct, frozen=True):
    """A job and one page of its hosts. `total` counts the executed ones that the filter lets through."""

    job: Job
    total: int
    hosts: tuple[HostRow, ...]


class SubStep(Struct, frozen=True, gc=False):
    """A sub-step of an instance; times in unix seconds, None until it begins or ends."""

    step: str
    status: str
    start_time: int | None
    finish_time: int | None


class Instance(Struct, frozen=True, gc=False):
    """What a task did on one host or service instance, as it came: hundreds stand in one answer, and most of it is read
    of new ones only. That it can be read has been checked; no property raises. Times in unix seconds, None until it
    begins or ends. `steps`: its sub-steps, None where they were not asked for."""

    row: _Instance[Any]
    zone: datetime.timezone
    steps: tuple[SubStep, ...] | None = None

    @property
    def task_id(self) -> int | None:
        return integer(self.row.task_id)

    @property
    def record_id(self) -> int | None:
        return integer(self.row.record_id)

    @property
    def instance_id(self) -> str:
        return clean_text(self.row.instance_id or "")

    @property
    def host(self) -> Host | None:
        info = self.row.instance_info or _Info()
        about, service = info.host or _Host(), info.service or _Service()
        bk_host_id = service.bk_host_id if about.bk_host_id is None else about.bk_host_id
        return host(about.bk_cloud_id, bk_host_id, about.bk_host_innerip, about.bk_host_innerip_v6)

    @property
    def bk_biz_id(self) -> int | None:
        info = self.row.instance_info
        return integer(info.host.bk_biz_id) if info and info.host else None

    @property
    def status(self) -> str:
        return status_slug(self.row.status)

    @property
    def job_type(self) -> str:
        """Its action, "" where there are no steps."""
        return word(self.row.action)

    @property
    def start_time(self) -> int | None:
        return seconds(self.row.start_time, self.zone, "start_time")

    @property
    def finish_time(self) -> int | None:
        return seconds(self.row.finish_time, self.zone, "finish_time")

    @property
    def failed_step(self) -> str:
        """The first of `steps` that failed, `other` if none says so."""
        return next((step.step for step in self.steps or () if step.status == "failed"), OTHER)


class TaskResult(Struct, frozen=True):
    """One page of instances. `counter`: all of them by status, whatever the filter; None if not told."""

    total: int
    counter: dict[str, int] | None
    instances: tuple[Instance, ...]


class NodemanApi:
    """The calls of one NodeMan. All raise ApiError only. `zone` is that of times without one."""

    def __init__(self, client: Client, platform: NodemanPlatform, zone: datetime.timezone) -> None:
        self._client = client
        self._identity: Identity = "esb" if platform.api == "esb" else "app" if platform.app_type else "user"
        self.lists_jobs = platform.api != "esb"
        """Whether `job_list` can be asked."""
        prefix = {"esb": "/api/c/compapi/v2/nodeman", "app": "/system", "user": ""}[self._identity]
        self._url = platform.url + prefix
        self._job_list = job_list_decoders(zone)
        self._job_details = job_details_decoders(zone)
        self._zone = zone

    async def job_list(
        self,
        *,
        deadline: Deadline,
        bk_biz_id: int | None = None,
        job_ids: Sequence[int] = (),
        statuses: Sequence[str] = (),
        page: int = 1,
        pagesize: int = PAGE_SIZE,
    ) -> JobPage:
        """Jobs that touch a business, newest first; not on the ESB. Empty filters let everything through.

        The platform refuses nobody: jobs that the caller may not see are left out, and where the business itself is
        forbidden those of all other businesses come; so look at `bk_biz_ids`. A page past the end is ApiError 3800500.
        """
        params: dict[str, object] = {
            "bk_biz_id": None if bk_biz_id is None else [bk_biz_id],
            "job_id": list(job_ids) or None,
            "status": _upper(statuses),
            "page": page,
            "pagesize": _page_size(pagesize),
        }
        return await self._ask("job_list", "/api/job/job_list/", params, self._job_list, deadline)

    async def job_details(
        self, job_id: int, *, deadline: Deadline, statuses: Sequence[str] = (), page: int = 1, pagesize: int = 0
    ) -> JobDetails:
        """A job with one page of its hosts; `pagesize` 0 asks for the job alone (filtered hosts come anyway).

        While the newest task is not ready a job looks pending and without hosts, and with ignored hosts only it looks
        successful. The platform stores what it answers and does not look again at a job that it has stored as ended:
        so leave pending jobs alone until job_list shows them running.
        """
        params: dict[str, object] = {
            # A text instead of the list is what the vendor's documents show; it matches nothing.
            "conditions": [{"key": "status", "value": _upper(statuses)}] if statuses else None,
            "page": page,
            "pagesize": _page_size(pagesize),
        }
        path = f"/api/job/{job_id}/details/"
        if self._identity == "esb":
            path, params["job_id"] = "/api/job/details/", job_id
        return await self._ask("job_details", path, params, self._job_details, deadline)

    async def task_result(
        self,
        subscription_id: int,
        *,
        deadline: Deadline,
        task_ids: Sequence[int] = (),
        statuses: Sequence[str] = (),
        instance_ids: Sequence[str] = (),
        but: Sequence[str] = (),
        page: int = 1,
        pagesize: int = 0,
        with_steps: Callable[[Instance], bool] = lambda instance: False,
    ) -> TaskResult:
        """What the newest task of a subscription did, or `task_ids`; `pagesize` 0 asks for the counter alone.

        With `instance_ids`, the newest result of these instances, whichever task it is of; without those in `but`.
        `with_steps`: of which instances the sub-steps are read. They are nine tenths of an answer.

        ApiError `not_ready` (3800015) while the task is being made. A page past the end has no rows.
        """
        params: dict[str, object] = {
            "subscription_id": subscription_id,
            "task_id_list": list(task_ids) or None,
            "statuses": _upper(statuses),
            "instance_id_list": list(instance_ids) or None,
            "exclude_instance_ids": list(but) or None,
            "need_aggregate_all_tasks": True if instance_ids else None,
            "page": page,
            "pagesize": _page_size(pagesize),
        }
        path = "/backend/api/subscription/task_result/"
        return await self._ask("task_result", path, params, task_result_decoders(self._zone, with_steps), deadline)

    async def _ask(
        self,
        api: str,
        path: str,
        params: dict[str, object],
        decoders: Sequence[ResponseDecoder[Any, T]],
        deadline: Deadline,
    ) -> T:
        url = self._url + path
        return await self._client.call(api, "POST", url, params, decoders, identity=self._identity, deadline=deadline)


def _upper(statuses: Sequence[str]) -> list[str] | None:
    return [status.upper() for status in statuses] or None


def _page_size(pagesize: int) -> int:
    if not 0 <= pagesize <= PAGE_SIZE:
        raise ValueError(f"a page of {pagesize}, {PAGE_SIZE} are allowed")
    return pagesize


# Jobs.


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

    id: Int | None = None
    job_type: str | None = None
    subscription_id: Int | None = None
    task_id_list: list[Int] | Empty | None = None
    start_time: When | None = None
    end_time: When | None = None
    status: Number = None
    statistics: _Statistics | list[None] | None = None
    bk_biz_scope: list[Int] | Empty | None = None
    job_id: Int | None = None


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


class _JobDetails(_Job[When], Generic[When]):
    rows: list[_HostRow[When]] | Empty | None = field(name="list", default=None)
    total: Int | None = None


def job_list_decoders(zone: datetime.timezone) -> Sequence[ResponseDecoder[Any, JobPage]]:
    """The decoders of an answer of job_list."""

    def read(page: _JobPage) -> JobPage:
        jobs: list[Job] = []
        try:
            for row in listed(page.rows):
                jobs.append(_job(row, zone))
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
        _check(rows)
        hosts = tuple([HostRow(row, zone, plugin) for row in rows])
        return JobDetails(job, sum(not row.filtered for row in hosts) if data.total is None else data.total, hosts)

    def odd(data: _JobDetails[Time]) -> JobDetails:
        rows = listed(data.rows)
        _check_times(rows, zone, "start_time", "end_time")
        return usual(data)

    return (
        ResponseDecoder(_JobDetails[datetime.datetime], usual),
        ResponseDecoder(_JobDetails[Time], odd, strict=False),
    )


def _job(row: _Job[Any], zone: datetime.timezone) -> Job:
    number = row.job_id if row.id is None else row.id
    if number is None:
        raise WrongShape("id is missing")
    return Job(
        number,
        word(row.job_type),
        status_slug(row.status, "status"),
        seconds(row.start_time, zone, "start_time"),
        seconds(row.end_time, zone, "end_time"),
        _statistics(row.statistics),
        tuple(listed(row.task_id_list)),
        row.subscription_id,
        tuple(listed(row.bk_biz_scope)),
    )


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


def _check(rows: Sequence[_HostRow[Any] | _Instance[Any]]) -> None:
    for index, row in enumerate(rows):
        if row.status is None or row.status == "":
            raise WrongShape(f"data.list[{index}].status is missing")


def _check_times(rows: Sequence[Any], zone: datetime.timezone, *members: str) -> None:
    for index, row in enumerate(rows):
        for member in members:
            seconds(getattr(row, member), zone, f"data.list[{index}].{member}")


# Subscriptions. The times of the usual page are read, and so checked, by msgspec; what differs takes the longer way.


class _SubStep(Struct, Generic[When], gc=False):
    node_name: str | None = None
    step_code: str | None = None
    status: Number = None
    start_time: When | None = None
    finish_time: When | None = None


class _TargetHost(Struct, Generic[When], gc=False):
    sub_steps: list[_SubStep[When]] | Empty | None = None


_Hosts: TypeAlias = "msgspec.json.Decoder[list[_TargetHost[Any]] | Empty | None]"
_USUAL_HOSTS: _Hosts = msgspec.json.Decoder(list[_TargetHost[datetime.datetime]] | Empty | None)
_ODD_HOSTS: _Hosts = msgspec.json.Decoder(list[_TargetHost[Time]] | Empty | None, strict=False)
_NO_HOSTS = Raw(b"null")


class _Step(Struct, gc=False):
    """The vendor's documents call `action` `actions` in one place. `target_hosts` is for a decoder of `_Hosts`."""

    type: str | None = None
    action: str | None = None
    actions: str | None = None
    target_hosts: Raw = _NO_HOSTS


class _Host(Struct, gc=False):
    bk_biz_id: Number = None
    bk_host_id: Number = None
    bk_cloud_id: Number = None
    bk_host_innerip: str | None = None
    bk_host_innerip_v6: str | None = None


class _Service(Struct, gc=False):
    bk_host_id: Number = None


class _Info(Struct, gc=False):
    host: _Host | None = None
    service: _Service | None = None


class _Instance(Struct, Generic[When], gc=False):
    task_id: Number = None
    record_id: Number = None
    instance_id: str | None = None
    instance_info: _Info | None = None
    start_time: When | None = None
    finish_time: When | None = None
    steps: list[_Step] | Empty | None = None
    status: Number = None

    @property
    def action(self) -> str:
        return next((step.action or step.actions or "" for step in listed(self.steps)), "")

    @property
    def is_plugin(self) -> bool:
        return any(step.type == "PLUGIN" for step in listed(self.steps)[:1]) or self.action.endswith("PLUGIN")


class _Page(Struct, Generic[When]):
    rows: list[_Instance[When]] | Empty | None = field(name="list")
    total: Int | None = None
    status_counter: dict[str, Int | None] | None = None


def task_result_decoders(
    zone: datetime.timezone, with_steps: Callable[[Instance], bool]
) -> Sequence[ResponseDecoder[Any, TaskResult]]:
    """The decoders of an answer of task_result; see `NodemanApi.task_result`."""

    def usual(page: _Page[datetime.datetime]) -> TaskResult:
        return _task_result(page, zone, with_steps, _USUAL_HOSTS)

    def odd(page: _Page[Time]) -> TaskResult:
        rows = listed(page.rows)
        _check_times(rows, zone, "start_time", "finish_time")
        return _task_result(page, zone, with_steps, _ODD_HOSTS)

    return (
        ResponseDecoder(_Page[datetime.datetime], usual),
        # Without pagesize and return_all the platform answers a bare list.
        ResponseDecoder(list[_Instance[Time]], lambda rows: odd(_Page(rows)), strict=False),
        ResponseDecoder(_Page[Time], odd, strict=False),
    )


def _task_result(
    page: _Page[Any],
    zone: datetime.timezone,
    with_steps: Callable[[Instance], bool],
    hosts: _Hosts,
) -> TaskResult:
    rows, instances = listed(page.rows), []
    _check(rows)
    for index, row in enumerate(rows):
        instance = Instance(row, zone)
        if with_steps(instance):
            instance = Instance(row, zone, tuple(_sub_steps(row, zone, hosts, f"data.list[{index}].steps")))
        for step in listed(row.steps):
            step.target_hosts = _NO_HOSTS  # which would keep the whole body as long as the row
        instances.append(instance)
    counter = None
    if page.status_counter is not None:
        counter = {
            clean_text(status, 64).lower(): count or 0
            for status, count in page.status_counter.items()
            if status != "total"
        }
    return TaskResult(len(instances) if page.total is None else page.total, counter, tuple(instances))


def _sub_steps(row: _Instance[Any], zone: datetime.timezone, hosts: _Hosts, path: str) -> Iterator[SubStep]:
    plugin, start, finish = row.is_plugin, f"{path}.start_time", f"{path}.finish_time"
    for index, step in enumerate(listed(row.steps)):
        try:
            targets = hosts.decode(step.target_hosts)
        except msgspec.ValidationError as error:
            what, _, place = str(error).partition(" - at `$")
            raise WrongShape(f"{what} - at `{path}[{index}].target_hosts{place or '`'}") from None
        for target in listed(targets):
            for sub_step in listed(target.sub_steps):
                yield SubStep(
                    step_slug(sub_step.step_code, sub_step.node_name, plugin=plugin),
                    status_slug(sub_step.status),
                    seconds(sub_step.start_time, zone, start),
                    seconds(sub_step.finish_time, zone, finish),
                )
