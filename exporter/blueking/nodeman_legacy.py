"""NodeMan 1.x: the state of one task, GET URL/api/c/compapi/v2/nodeman/get_task_info/ of the ESB.

Codes and ids are text ("OK", "2"), times carry no zone, hosts no id of the CMDB: `hosts[].host.id` is NodeMan's own.
NodeMan 2.x no longer has the route behind it; the ESB then answers 1306201, like for any other trouble of its backends.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from exporter.blueking.client import Deadline, Operation, ScopeClient
from exporter.blueking.envelope import Empty, Int, ResponseDecoder, WrongShape, listed
from exporter.blueking.steps import step_slug
from exporter.blueking.text import clean_text
from exporter.blueking.values import Number, Time, host, integer, seconds, status_slug, word
from exporter.config.schema import LegacyPlatform
from exporter.errors import ApiError
from exporter.model import Host


class LegacyHost(Struct, frozen=True, gc=False):
    """A host of a task. `status` in lower case: queue, running, success, failed, or a word not known.

    `err_code` is "" unless it failed. `host.bk_host_id` is always empty.
    """

    host: Host | None
    status: str
    err_code: str
    step: str


class LegacyTask(Struct, frozen=True):
    """A task. Times in unix seconds. `status_count` by success, failed and running, where running holds the queue too;
    `os_count` by the platform's words."""

    id: int
    bk_biz_id: int | None
    job_type: str
    start_time: int | None
    end_time: int | None
    status_count: dict[str, int]
    os_count: dict[str, int]
    hosts: tuple[LegacyHost, ...]


class NodemanLegacyApi:
    """The call of one NodeMan 1.x. Raises ApiError only. `zone` is that of times without one."""

    def __init__(self, client: ScopeClient, platform: LegacyPlatform, zone: datetime.timezone) -> None:
        self._client = client
        self._url = f"{platform.url}/api/c/compapi/v2/nodeman/get_task_info/"
        self._decoders = get_task_info_decoders(zone)

    async def get_task_info(self, bk_biz_id: int, job_id: int, *, deadline: Deadline) -> LegacyTask:
        """A task of a business with all its hosts; the platform has no paging here."""
        params = {"bk_biz_id": bk_biz_id, "job_id": job_id}
        operation = Operation("get_task_info", "nodeman_legacy", "esb", "GET", self._url, params)
        task = await self._client.call(operation, self._decoders, deadline=deadline)
        if task.id != job_id or task.bk_biz_id not in (None, bk_biz_id):
            text = f"get_task_info of task {job_id} gives task {task.id} of business {task.bk_biz_id}"
            raise ApiError("decode", text, api="get_task_info")
        return task


class _Host(Struct, gc=False):
    bk_cloud_id: Number = None
    inner_ip: str | None = None


class _Row(Struct, gc=False):
    status: Number = None
    err_code: str | None = None
    step: str | None = None
    host: _Host | None = None


class _Task(Struct):
    id: Int | None = None
    bk_biz_id: Number = None
    job_type: str | None = None
    start_time: Time = None
    end_time: Time = None
    status_count: dict[str, Int | None] | None = None
    os_count: dict[str, Int | None] | None = None
    hosts: list[_Row] | Empty | None = None


def get_task_info_decoders(zone: datetime.timezone) -> Sequence[ResponseDecoder[Any, LegacyTask]]:
    """The decoders of an answer of get_task_info."""
    return (ResponseDecoder(_Task, lambda data: _task(data, zone), strict=False),)


def _task(data: _Task, zone: datetime.timezone) -> LegacyTask:
    if data.id is None:
        raise WrongShape("data.id is missing")
    job_type = word(data.job_type)
    rows = listed(data.hosts)
    plugin = job_type.endswith("PLUGIN")
    return LegacyTask(
        id=data.id,
        bk_biz_id=integer(data.bk_biz_id),
        job_type=job_type,
        start_time=seconds(data.start_time, zone, "data.start_time"),
        end_time=seconds(data.end_time, zone, "data.end_time"),
        status_count={name.removesuffix("_count"): count for name, count in _counts(data.status_count).items()},
        os_count=_counts(data.os_count),
        hosts=tuple(_row(row, plugin, f"data.hosts[{index}]") for index, row in enumerate(rows)),
    )


def _counts(given: Mapping[str, Int | None] | None) -> dict[str, int]:
    return {clean_text(name, 64): count or 0 for name, count in (given or {}).items()}


def _row(row: _Row, plugin: bool, path: str) -> LegacyHost:
    status = status_slug(row.status, f"{path}.status")
    about = row.host or _Host()
    return LegacyHost(
        host=host(about.bk_cloud_id, None, about.inner_ip),
        status=status,
        err_code=word(row.err_code) if status == "failed" else "",
        step=step_slug(None, row.step, plugin=plugin),
    )
