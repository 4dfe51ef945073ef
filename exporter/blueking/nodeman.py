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
from exporter.blueking.envelope import Empty, Form, WrongShape
from exporter.blueking.nodeman_steps import OTHER, step_slug
from exporter.blueking.nodeman_values import Int, Number, Time, host, integer, seconds, status_slug, word
from exporter.blueking.text import clean_text
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


class Job(Struct, frozen=True):
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
    """A host of a job. `filtered`: the job never ran on it, the row is no result and comes back on every page.

    `host` is None where neither an id nor an address is known. `step`: the sub-step that is running or has failed, or
    after success the last one; `other` where none is named.
    """

    host: Host | None
    bk_biz_id: int | None
    instance_id: str
    status: str
    start_time: int | None
    end_time: int | None
    step: str
    filtered: bool


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
        self._job_list: Sequence[Form[Any, JobPage]] = (
            Form(_JobPage, lambda data: _job_page(data, zone), strict=False),
        )
        self._job_details: Sequence[Form[Any, JobDetails]] = (
            Form(_JobDetails, lambda data: _job_details(data, zone), strict=False),
        )
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
        return await self._ask("task_result", path, params, task_result_forms(self._zone, with_steps), deadline)

    async def _ask(
        self, api: str, path: str, params: dict[str, object], forms: Sequence[Form[Any, T]], deadline: Deadline
    ) -> T:
        url = self._url + path
        return await self._client.call(api, "POST", url, params, forms, identity=self._identity, deadline=deadline)


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


class _Job(Struct):
    """job_list calls the id `id`, job_details `job_id`."""

    id: Int | None = None
    job_id: Int | None = None
    job_type: str | None = None
    status: Number = None
    start_time: Time = None
    end_time: Time = None
    statistics: _Statistics | list[None] | None = None
    task_id_list: list[Int] | Empty | None = None
    subscription_id: Int | None = None
    bk_biz_scope: list[Int] | Empty | None = None


class _JobPage(Struct):
    rows: list[_Job] | Empty | None = field(name="list")
    total: Int | None = None


class _HostRow(Struct, gc=False):
    filter_host: bool | None = None
    instance_id: str | None = None
    bk_host_id: Number = None
    bk_cloud_id: Number = None
    bk_biz_id: Number = None
    ip: str | None = None
    inner_ip: str | None = None
    inner_ipv6: str | None = None
    status: Number = None
    start_time: Time = None
    end_time: Time = None
    node_id: Number = None
    step: str | None = None


class _JobDetails(_Job):
    rows: list[_HostRow] | Empty | None = field(name="list", default=None)
    total: Int | None = None


def _job(row: _Job, zone: datetime.timezone, path: str) -> Job:
    number = row.job_id if row.id is None else row.id
    if number is None:
        raise WrongShape(f"{path}.id is missing")
    return Job(
        id=number,
        job_type=word(row.job_type),
        status=status_slug(row.status, f"{path}.status"),
        start_time=seconds(row.start_time, zone, f"{path}.start_time"),
        end_time=seconds(row.end_time, zone, f"{path}.end_time"),
        statistics=_statistics(row.statistics),
        task_ids=tuple(row.task_id_list) if isinstance(row.task_id_list, list) else (),
        subscription_id=row.subscription_id,
        bk_biz_ids=tuple(row.bk_biz_scope) if isinstance(row.bk_biz_scope, list) else (),
    )


def _statistics(given: _Statistics | list[None] | None) -> Statistics | None:
    if not isinstance(given, _Statistics) or given == _Statistics():
        return None
    return Statistics(
        given.pending_count or 0,
        given.running_count or 0,
        given.success_count or 0,
        given.failed_count or 0,
        given.ignored_count or 0,
        given.total_count or 0,
    )


def _job_page(data: _JobPage, zone: datetime.timezone) -> JobPage:
    rows = data.rows if isinstance(data.rows, list) else []
    jobs = tuple(_job(row, zone, f"data.list[{index}]") for index, row in enumerate(rows))
    return JobPage(jobs, len(jobs) if data.total is None else data.total)


def _job_details(data: _JobDetails, zone: datetime.timezone) -> JobDetails:
    job = _job(data, zone, "data")
    plugin = job.job_type.endswith("PLUGIN")
    rows = data.rows if isinstance(data.rows, list) else []
    hosts = tuple(_host_row(row, zone, plugin, f"data.list[{index}]") for index, row in enumerate(rows))
    return JobDetails(job, sum(not row.filtered for row in hosts) if data.total is None else data.total, hosts)


def _host_row(row: _HostRow, zone: datetime.timezone, plugin: bool, path: str) -> HostRow:
    # Where no sub-step is running or has failed, `step` names the last one and node_id is -1.
    nowhere = integer(row.node_id) == -1
    return HostRow(
        host=host(row.bk_cloud_id, row.bk_host_id, row.inner_ip, row.inner_ipv6, row.ip),
        bk_biz_id=integer(row.bk_biz_id),
        instance_id=clean_text(row.instance_id or ""),
        status=status_slug(row.status, f"{path}.status"),
        start_time=seconds(row.start_time, zone, f"{path}.start_time"),
        end_time=seconds(row.end_time, zone, f"{path}.end_time"),
        step=OTHER if nowhere else step_slug(None, row.step, plugin=plugin),
        filtered=bool(row.filter_host),
    )


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
        if not isinstance(self.steps, list) or not self.steps:
            return ""
        return self.steps[0].action or self.steps[0].actions or ""

    @property
    def is_plugin(self) -> bool:
        if not isinstance(self.steps, list) or not self.steps:
            return False
        return self.steps[0].type == "PLUGIN" or self.action.endswith("PLUGIN")


class _Page(Struct, Generic[When]):
    rows: list[_Instance[When]] | Empty | None = field(name="list")
    total: Int | None = None
    status_counter: dict[str, Int | None] | None = None


def task_result_forms(
    zone: datetime.timezone, with_steps: Callable[[Instance], bool]
) -> Sequence[Form[Any, TaskResult]]:
    """The forms of an answer of task_result; see `NodemanApi.task_result`."""

    def usual(page: _Page[datetime.datetime]) -> TaskResult:
        return _task_result(page, zone, with_steps, _USUAL_HOSTS)

    def odd(page: _Page[Time]) -> TaskResult:
        for index, row in enumerate(page.rows if isinstance(page.rows, list) else ()):
            seconds(row.start_time, zone, f"data.list[{index}].start_time")
            seconds(row.finish_time, zone, f"data.list[{index}].finish_time")
        return _task_result(page, zone, with_steps, _ODD_HOSTS)

    return (
        Form(_Page[datetime.datetime], usual),
        # Without pagesize and return_all the platform answers a bare list.
        Form(list[_Instance[Time]], lambda rows: odd(_Page(rows)), strict=False),
        Form(_Page[Time], odd, strict=False),
    )


def _task_result(
    page: _Page[Any],
    zone: datetime.timezone,
    with_steps: Callable[[Instance], bool],
    hosts: _Hosts,
) -> TaskResult:
    instances = []
    for index, row in enumerate(page.rows if isinstance(page.rows, list) else ()):
        if row.status is None or row.status == "":
            raise WrongShape(f"data.list[{index}].status is missing")
        instance = Instance(row, zone)
        if with_steps(instance):
            instance = Instance(row, zone, tuple(_sub_steps(row, zone, hosts, f"data.list[{index}].steps")))
        for step in row.steps if isinstance(row.steps, list) else ():
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
    for index, step in enumerate(row.steps if isinstance(row.steps, list) else ()):
        try:
            targets = hosts.decode(step.target_hosts)
        except msgspec.ValidationError as error:
            what, _, place = str(error).partition(" - at `$")
            raise WrongShape(f"{what} - at `{path}[{index}].target_hosts{place or '`'}") from None
        for target in targets if isinstance(targets, list) else ():
            for sub_step in target.sub_steps if isinstance(target.sub_steps, list) else ():
                yield SubStep(
                    step_slug(sub_step.step_code, sub_step.node_name, plugin=plugin),
                    status_slug(sub_step.status),
                    seconds(sub_step.start_time, zone, start),
                    seconds(sub_step.finish_time, zone, finish),
                )
