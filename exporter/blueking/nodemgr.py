"""NodeMan V3 (bk-nodemgr): lists of workflows, and of the operations of a workflow.

node_workflow_list       POST URL/api/v3/node/workflow/list
plugin_workflow_list     POST URL/api/v3/plugin/workflow/list
node_operation_list      POST URL/api/v3/node/workflow/operation/list
plugin_operation_list    POST URL/api/v3/plugin/workflow/operation/list

A workflow is a run, an operation is what it does on one host (with one plugin), an instance is one try of an operation.
Ids are text and opaque. Requests have seconds, answers milliseconds. An unknown id is answered with 500.
Built on the source and the documents of alpha versions, 3.0.1-alpha.17 to alpha.104; never run against a live V3.
Sources: bk-nodemgr apigw/apidocs/en/NodeWorkflow_*.md, internal/backend, pkg/rest.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from msgspec import Meta, Struct

from exporter.blueking.client import Deadline, Operation, ScopeClient
from exporter.blueking.envelope import Int, ResponseDecoder
from exporter.blueking.text import clean_text
from exporter.blueking.values import OTHER_WORD, host, status_slug, word
from exporter.config.schema import NodemgrPlatform
from exporter.errors import ApiError
from exporter.model import Host

T = TypeVar("T")

Domain = Literal["node", "plugin"]
"""What a workflow changes: agents and proxies, or plugins."""
DOMAINS: tuple[Domain, ...] = get_args(Domain)
PAGE_SIZE = 500
"""The largest page that the platform gives."""
_MILLISECONDS = 10**11
"""Times from here on are ms; as seconds they would lie beyond the year 5000."""
_LATEST = 10**15
"""ms: beyond every calendar, and small enough for a state."""
_STEP = re.compile(r"[a-z0-9_]{0,64}", re.ASCII)


class Workflow(Struct, frozen=True, gc=False):
    """A run. Times in ms since the epoch, None for none. `finish_time` of a running one may be that of an earlier try.

    `type` as the platform spells it, `status` in lower case; both may be words that are not known.
    """

    id: str
    type: str
    status: str
    bk_biz_ids: tuple[int, ...]
    operate_time: int | None
    finish_time: int | None


class WorkflowPage(Struct, frozen=True):
    """Workflows, newest first; those of one time in no order. `total`: all that match the filter."""

    rows: tuple[Workflow, ...]
    total: int


class HostOperation(Struct, frozen=True, gc=False):
    """What a workflow does on one host. Host and business are those of today.

    `instance`: its newest try, "" before the first; `state` and `end` (ms) are those of that try, `step` the newest
    action in it, "" for none.
    """

    id: str
    instance: str
    state: str
    step: str
    end: int | None
    bk_biz_id: int | None
    host: Host | None


class NodemgrApi:
    """The calls of one NodeMan V3, for one scope. All raise ApiError only."""

    def __init__(self, client: ScopeClient, platform: NodemgrPlatform) -> None:
        self._client = client
        self._url = f"{platform.url}/api/v3"
        self.web_url = platform.web_url or ""

    async def workflows(
        self,
        domain: Domain,
        bk_biz_id: int,
        *,
        deadline: Deadline,
        begin: int | None = None,
        end: int | None = None,
        statuses: Sequence[str] = (),
        ids: Sequence[str] = (),
        node_roles: Sequence[str] = (),
        offset: int = 0,
        limit: int = PAGE_SIZE,
    ) -> WorkflowPage:
        """Workflows that touch a business and that began in [begin, end], unix seconds. Empty filters let everything
        through; `node_roles` is for nodes only.

        The platform leaves out what the user may not see. Workflows that were not asked for are ApiError `decode`.
        """
        api = f"{domain}_workflow_list"
        conditions = {
            "bk_biz_id": [bk_biz_id],
            "status": list(statuses),
            "workflow_id": list(ids),
            "node_role": list(node_roles) if domain == "node" else [],
        }
        params: dict[str, object] = {
            "page": _page(offset, limit),
            "exact_include_conditions": {name: value for name, value in conditions.items() if value},
        }
        if begin is not None and end is not None:
            params["operate_time_range"] = {"start_timestamp_sec": max(0, begin), "end_timestamp_sec": max(0, end)}
        page = await self._ask(api, f"/{domain}/workflow/list", params, WORKFLOWS, deadline)
        wanted = frozenset(ids)
        for row in page.rows:
            if row.bk_biz_ids and bk_biz_id not in row.bk_biz_ids:
                raise ApiError("decode", f"{api} gives workflows of other businesses than {bk_biz_id}", api=api)
            if wanted and row.id not in wanted:
                raise ApiError("decode", f"{api} gives workflow {row.id}, which was not asked for", api=api)
        return page

    async def operations(
        self,
        domain: Domain,
        workflow_id: str,
        *,
        deadline: Deadline,
        states: Sequence[str] = (),
        offset: int = 0,
        limit: int = PAGE_SIZE,
    ) -> tuple[HostOperation, ...]:
        """The operations of a workflow in these states, on the hosts of all its businesses, in no order.

        None 30 days after the run. Refused (`permission`) unless the user may see all of its businesses.
        """
        params: dict[str, object] = {
            "workflow_id": workflow_id,
            "page": _page(offset, limit),
            "exact_include_conditions": {"state": list(states)} if states else {},
        }
        api = f"{domain}_operation_list"
        return await self._ask(api, f"/{domain}/workflow/operation/list", params, OPERATIONS, deadline)

    def _ask(
        self,
        api: str,
        path: str,
        params: dict[str, object],
        decoders: Sequence[ResponseDecoder[Any, T]],
        deadline: Deadline,
    ) -> Awaitable[T]:
        operation = Operation(api, "nodemgr", "app", "POST", self._url + path, params)
        return self._client.call(operation, decoders, deadline=deadline)


def _page(offset: int, limit: int) -> dict[str, int]:
    if not 0 < limit <= PAGE_SIZE or offset < 0:
        raise ValueError(f"a page of {limit} at {offset}, 1 to {PAGE_SIZE} are allowed")
    return {"offset": offset, "limit": limit}


Id = Annotated[str, Meta(min_length=1, max_length=256)]


class _Workflow(Struct, gc=False):
    workflow_id: Id
    status: str
    type: str | None = None
    bk_biz_id: list[Int] | None = None
    operate_time: Int | None = None
    finish_time: Int | None = None


class _Workflows(Struct):
    items: list[_Workflow] | None = None
    total: Int | None = None


class _Deployment(Struct, gc=False):
    bk_host_id: Int | None = None
    bk_biz_id: Int | None = None
    bk_networkarea_id: Int | None = None
    bk_host_innerip_list: list[str] | None = None
    bk_host_innerip_v6_list: list[str] | None = None


class _LifeCycle(Struct, gc=False):
    state: str | None = None
    end_time: Int | None = None


class _Action(Struct, gc=False):
    name: str | None = None


class _Instance(Struct, gc=False):
    life_cycle: _LifeCycle | None = None
    latest_action_inst_brief_data: _Action | None = None


class _Operation(Struct, gc=False):
    operation_id: Id
    instance_ids: list[str] | None = None
    node_deployment_info: _Deployment | None = None
    plugin_deployment_info: _Deployment | None = None
    latest_oper_inst_brief_data: _Instance | None = None


class _Operations(Struct):
    operations: list[_Operation] | None = None


def _workflows(data: _Workflows) -> WorkflowPage:
    rows = tuple(
        Workflow(
            id=row.workflow_id,
            type=word(row.type),
            status=status_slug(row.status),
            bk_biz_ids=tuple(row.bk_biz_id or ()),
            operate_time=_time(row.operate_time),
            finish_time=_time(row.finish_time),
        )
        for row in data.items or ()
    )
    return WorkflowPage(rows, max(data.total or 0, 0))


def _operations(data: _Operations) -> tuple[HostOperation, ...]:
    return tuple(_operation(row) for row in data.operations or ())


def _operation(row: _Operation) -> HostOperation:
    deployed = row.node_deployment_info or row.plugin_deployment_info or _Deployment()
    newest = row.latest_oper_inst_brief_data or _Instance()
    life_cycle = newest.life_cycle or _LifeCycle()
    action = newest.latest_action_inst_brief_data or _Action()
    addresses = (*(deployed.bk_host_innerip_list or ()), *(deployed.bk_host_innerip_v6_list or ()))
    return HostOperation(
        id=row.operation_id,
        instance=clean_text(row.instance_ids[-1], 256) if row.instance_ids else "",
        state=status_slug(life_cycle.state) if life_cycle.state else "init",
        step=_step(action.name or ""),
        end=_time(life_cycle.end_time),
        bk_biz_id=deployed.bk_biz_id if deployed.bk_biz_id and deployed.bk_biz_id > 0 else None,
        host=host(deployed.bk_networkarea_id, deployed.bk_host_id, *addresses),
    )


@functools.lru_cache(maxsize=1024)
def _step(name: str) -> str:
    return name if _STEP.fullmatch(name) else OTHER_WORD


def _time(value: int | None) -> int | None:
    """ms since the epoch. 0 and less are none: older versions sent the zero time of Go, in ms or in seconds."""
    if value is None or value <= 0:
        return None
    return min(value if value >= _MILLISECONDS else value * 1000, _LATEST)


WORKFLOWS: Sequence[ResponseDecoder[Any, WorkflowPage]] = (ResponseDecoder(_Workflows, _workflows, strict=False),)
OPERATIONS: Sequence[ResponseDecoder[Any, tuple[HostOperation, ...]]] = (
    ResponseDecoder(_Operations, _operations, strict=False),
)
