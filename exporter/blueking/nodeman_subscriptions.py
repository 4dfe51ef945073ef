"""What NodeMan 2.x says about a subscription: the answer of task_result.

Times carry no zone. Numbers may come as text, lists as `{}` or null. The times of the usual page are read, and so
checked, by msgspec; a page that differs takes the longer way.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Raw, Struct, field

from exporter.blueking.envelope import Empty, Int, ResponseDecoder, WrongShape, listed
from exporter.blueking.steps import OTHER, step_slug
from exporter.blueking.text import clean_text
from exporter.blueking.values import Number, Time, check_rows, host, integer, seconds, status_slug, word
from exporter.model import Host

When = TypeVar("When")
"""The type of times: see nodeman_jobs.py."""


class SubStep(Struct, frozen=True, gc=False):
    """A sub-step of an instance. `job_type`: the action of the step that it belongs to. Times in unix seconds, None
    until it begins or ends."""

    job_type: str
    step: str
    status: str
    start_time: int | None
    finish_time: int | None


class Instance(Struct, frozen=True, gc=False):
    """What a task did on one host or service instance. The row is read where it is needed and was checked before: no
    property raises. Times in unix seconds, None until it begins or ends. `steps`: its sub-steps, None where they were
    not asked for."""

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
        """The action of its first step, "" where there are no steps."""
        return next((step.job_type for step in listed(self.row.steps)), "")

    @property
    def start_time(self) -> int | None:
        return seconds(self.row.start_time, self.zone, "start_time")

    @property
    def finish_time(self) -> int | None:
        return seconds(self.row.finish_time, self.zone, "finish_time")

    @property
    def failure(self) -> tuple[str, str]:
        """Action and sub-step that failed first; without a failed one in `steps` the first action, `other`."""
        failed = (step for step in self.steps or () if step.status == "failed")
        return next(((step.job_type, step.step) for step in failed), (self.job_type, OTHER))


class TaskResult(Struct, frozen=True):
    """One page of instances. `total`: how many the filter lets through; `counter`: all of them by status, whatever the
    filter. Both are None in a bare list, which may contain all instances whatever page is asked for."""

    total: int | None
    counter: dict[str, int] | None
    instances: tuple[Instance, ...]


class _SubStep(Struct, Generic[When], gc=False):
    node_name: str | None = None
    step_code: str | None = None
    status: Number = None
    start_time: When | None = None
    finish_time: When | None = None


class _TargetHost(Struct, Generic[When], gc=False):
    sub_steps: list[_SubStep[When]] | Empty | None = None


TARGET_HOSTS = list[_TargetHost[Any]]
"""The wire type of `target_hosts` of a step, which is decoded by itself."""

_Hosts: TypeAlias = "msgspec.json.Decoder[list[_TargetHost[Any]] | Empty | None]"
_USUAL_HOSTS: _Hosts = msgspec.json.Decoder(list[_TargetHost[datetime.datetime]] | Empty | None)
_UNUSUAL_HOSTS: _Hosts = msgspec.json.Decoder(list[_TargetHost[Time]] | Empty | None, strict=False)
_NO_HOSTS = Raw(b"null")


class _Step(Struct, gc=False):
    """The vendor's documents call `action` `actions` in one place. `target_hosts` is for a decoder of `_Hosts`."""

    type: str | None = None
    action: str | None = None
    actions: str | None = None
    target_hosts: Raw = _NO_HOSTS

    @property
    def job_type(self) -> str:
        return word(self.action or self.actions)

    @property
    def plugin(self) -> bool:
        return self.type == "PLUGIN" or self.job_type.endswith("PLUGIN")


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

    def unusual(page: _Page[Time]) -> TaskResult:
        rows = listed(page.rows)
        check_rows(rows, zone, "start_time", "finish_time")
        return _task_result(page, zone, with_steps, _UNUSUAL_HOSTS)

    return (
        ResponseDecoder(_Page[datetime.datetime], usual),
        # Without pagesize and return_all the platform answers a bare list.
        ResponseDecoder(list[_Instance[Time]], lambda rows: unusual(_Page(rows)), strict=False),
        ResponseDecoder(_Page[Time], unusual, strict=False),
    )


def _task_result(
    page: _Page[Any],
    zone: datetime.timezone,
    with_steps: Callable[[Instance], bool],
    hosts: _Hosts,
) -> TaskResult:
    rows, instances = listed(page.rows), []
    check_rows(rows, zone)
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
    return TaskResult(page.total, counter, tuple(instances))


def _sub_steps(row: _Instance[Any], zone: datetime.timezone, hosts: _Hosts, path: str) -> Iterator[SubStep]:
    start, finish = f"{path}.start_time", f"{path}.finish_time"
    for index, step in enumerate(listed(row.steps)):
        try:
            targets = hosts.decode(step.target_hosts)
        except msgspec.ValidationError as error:
            what, _, place = str(error).partition(" - at `$")
            raise WrongShape(f"{what} - at `{path}[{index}].target_hosts{place or '`'}") from None
        job_type, plugin = step.job_type, step.plugin
        for target in listed(targets):
            for sub_step in listed(target.sub_steps):
                yield SubStep(
                    job_type,
                    step_slug(sub_step.step_code, sub_step.node_name, plugin=plugin),
                    status_slug(sub_step.status),
                    seconds(sub_step.start_time, zone, start),
                    seconds(sub_step.finish_time, zone, finish),
                )
