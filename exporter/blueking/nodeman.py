"""NodeMan 2.x: the calls, behind the API gateway or the ESB.

| | gateway (app type: /system before the path) | ESB: URL/api/c/compapi/v2/nodeman… |
|---|---|---|
| job_list | POST /api/job/job_list/ | not published |
| job_details | POST /api/job/{job_id}/details/ | POST /api/job/details/, job_id in the body |
| task_result | POST /backend/api/subscription/task_result/ | the same path |

What the answers contain stands in nodeman_jobs.py and nodeman_subscriptions.py.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from exporter.blueking.client import Deadline, Identity, Operation, ScopeClient
from exporter.blueking.envelope import ResponseDecoder
from exporter.blueking.nodeman_jobs import JobDetails, JobPage, job_details_decoders, job_list_decoders
from exporter.blueking.nodeman_subscriptions import Instance, TaskResult, task_result_decoders
from exporter.config.schema import NodemanPlatform
from exporter.errors import ApiError

T = TypeVar("T")

PAGE_SIZE = 500
"""The most rows that one call asks for: a page of instances is then about 1.3 MB."""


class NodemanApi:
    """The calls of one NodeMan. All raise ApiError only. `zone` is that of times without one."""

    def __init__(self, client: ScopeClient, platform: NodemanPlatform, zone: datetime.timezone) -> None:
        self._client = client
        self.web_url = platform.web_url or ""
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

        The platform never refuses: it leaves out the jobs that the caller may not see; for a forbidden or unknown
        business that is all of them. A page past the end is ApiError 3800500. A job that was not asked for is ApiError
        `decode`.
        """
        params: dict[str, object] = {
            "bk_biz_id": None if bk_biz_id is None else [bk_biz_id],
            "job_id": list(job_ids) or None,
            "status": _upper(statuses),
            "page": page,
            "pagesize": _page_size(pagesize),
        }
        answer = await self._ask("job_list", "/api/job/job_list/", params, self._job_list, deadline)
        asked = set(job_ids)
        for job in filter(None, answer.rows):
            if bk_biz_id is not None and job.bk_biz_ids and bk_biz_id not in job.bk_biz_ids:
                text = f"job_list gives jobs of other businesses: may the user see the tasks of business {bk_biz_id}?"
                raise ApiError("decode", text, api="job_list")
            if asked and job.id not in asked:
                raise ApiError("decode", f"job_list gives job {job.id}, which was not asked for", api="job_list")
        return answer

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
        details = await self._ask("job_details", path, params, self._job_details, deadline)
        if details.job.id != job_id:
            raise ApiError("decode", f"job_details of job {job_id} gives job {details.job.id}", api="job_details")
        return details

    async def task_result(
        self,
        subscription_id: int,
        *,
        deadline: Deadline,
        task_ids: Sequence[int] = (),
        statuses: Sequence[str] = (),
        instance_ids: Sequence[str] = (),
        but: Sequence[str] = (),
        all_tasks: bool = False,
        page: int = 1,
        pagesize: int = 0,
        with_steps: Callable[[Instance], bool] = lambda instance: False,
    ) -> TaskResult:
        """Results of the newest task of a subscription, or of `task_ids`; `pagesize` 0 asks for the counter alone.

        `all_tasks`: the newest result of each instance, from any task. `instance_ids`: only these instances; `but`: all
        except these.
        `with_steps`: the instances whose sub-steps are read. Sub-steps are nine tenths of an answer.

        ApiError `not_ready` (3800015) while the task is being made, `decode` for rows that were not asked for. A page
        past the end has no rows.
        """
        params: dict[str, object] = {
            "subscription_id": subscription_id,
            "task_id_list": list(task_ids) or None,
            "statuses": _upper(statuses),
            "instance_id_list": list(instance_ids) or None,
            "exclude_instance_ids": list(but) or None,
            "need_aggregate_all_tasks": all_tasks or None,
            "page": page,
            "pagesize": _page_size(pagesize),
        }
        path = "/backend/api/subscription/task_result/"
        answer = await self._ask("task_result", path, params, task_result_decoders(self._zone, with_steps), deadline)
        asked_tasks, asked_instances = {None, *task_ids}, set(instance_ids)
        for row in answer.instances if task_ids or instance_ids else ():
            if task_ids and row.task_id not in asked_tasks:
                raise ApiError("decode", f"task_result gives task {row.task_id}, not asked for", api="task_result")
            if instance_ids and row.instance_id not in asked_instances:
                raise ApiError("decode", "task_result gives instances that were not asked for", api="task_result")
        return answer

    def _ask(
        self,
        api: str,
        path: str,
        params: dict[str, object],
        decoders: Sequence[ResponseDecoder[Any, T]],
        deadline: Deadline,
    ) -> Awaitable[T]:
        operation = Operation(api, "nodeman", self._identity, "POST", self._url + path, params)
        return self._client.call(operation, decoders, deadline=deadline)


def _upper(statuses: Sequence[str]) -> list[str] | None:
    return [status.upper() for status in statuses] or None


def _page_size(pagesize: int) -> int:
    if not 0 <= pagesize <= PAGE_SIZE:
        raise ValueError(f"a page of {pagesize}, {PAGE_SIZE} are allowed")
    return pagesize
