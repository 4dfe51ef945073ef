"""The API of the simulated NodeMan V3: lists of workflows and of operations.

It behaves as the source code of V3: `page` is required, unknown members are ignored. Rows with the same time have
another order in each answer. The lists contain only what the user may see, without an error. An unknown id is a 500. A
retry keeps the finish time of the try before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from exporter.simulator.answer import Answer
from exporter.simulator.nodemgr_world import RETENTION, Domain, NodemgrWorld, Part, Workflow, business
from exporter.simulator.platform import Call, Endpoint, Platform

BASE = "/api/bk-nodemgr/prod/api/v3"
PAGE = 500
NODE_ROLES = frozenset({"agent", "proxy", "blank"})
UNFINISHED = frozenset({"init", "launched", "running"})


class _Refused(Exception):
    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def world_of(platform: Platform) -> NodemgrWorld:
    """The NodeMan V3 of a platform. The first call creates an empty one."""
    if platform.nodemgr is None:
        platform.nodemgr = NodemgrWorld(platform.seed, platform.now)
    assert isinstance(platform.nodemgr, NodemgrWorld)
    return platform.nodemgr


def populate(platform: Platform, *, history: float) -> None:
    """Start traffic in every business, `history` seconds of it in the past."""
    world = world_of(platform)
    begin = int((platform.now() - history) * 1000)
    for scope in platform.scopes:
        if scope.bk_scope_type == "biz":
            world.traffic.append(business(world, int(scope.bk_scope_id), begin, speed=platform.speed))


def routes(platform: Platform) -> list[Endpoint]:
    """The routes behind the gateway."""

    def answered(
        handler: Callable[[NodemgrWorld, Domain, Call], dict[str, object]], domain: Domain
    ) -> Callable[[Call], Answer]:
        def answer(call: Call) -> Answer:
            world = world_of(platform)
            world.live()
            request_id = f"rid:{platform.random.getrandbits(128):032x}"
            try:
                if not call.user:
                    raise _Refused(401, 3800007, "username is required")
                data = handler(world, domain, call)
            except _Refused as refused:
                body: dict[str, object] = {"code": refused.code, "request_id": request_id}
                if refused.code == 3830403:
                    actions = [{"id": f"{refused.message}_history_view", "name": "history"}]
                    body["permission"] = {"system": "bk_nodemgr", "system_name": "NodeMgr", "actions": actions}
                else:
                    details = [{"code": "", "message": refused.message}]
                    body["error"] = {"system": "bk_nodemgr", "message": refused.message, "details": details}
                return Answer(body, refused.status)
            return Answer({"code": 0, "message": "OK", "request_id": request_id, "data": data})

        return answer

    domains: tuple[Domain, ...] = ("node", "plugin")
    return [
        Endpoint(("POST",), f"{BASE}/{domain}/{path}", f"{domain}_{api}", "gateway", True, answered(handler, domain))
        for domain in domains
        for path, api, handler in (
            ("workflow/list", "workflow_list", _workflow_list),
            ("workflow/operation/list", "operation_list", _operation_list),
        )
    ]


def _workflow_list(world: NodemgrWorld, domain: Domain, call: Call) -> dict[str, object]:
    offset, limit = _page(call)
    wanted = _conditions(call)
    now = world.time
    shown = []
    given = call.params.get("operate_time_range")
    begin, end = 0, 2**62
    if isinstance(given, dict):
        begin, end = (int(given[f"{side}_timestamp_sec"]) * 1000 for side in ("start", "end"))
        if not 0 <= begin <= end:
            raise _Refused(400, 3800001, "invalid operate_time_range")
    for (of, _), one in world.workflows.items():
        if of != domain or not begin <= one.operate_time <= min(end, now) or not _visible(world, one, wanted):
            continue
        row = _workflow(world, one, now)
        values: dict[str, set[object]] = {
            "workflow_id": {one.id}, "type": {one.type}, "status": {row["status"]}, "operator": {one.operator},
            "bk_biz_id": set(one.biz_ids), "node_role": set(one.roles),
        }  # fmt: skip
        if all(values[name] & asked for name, asked in wanted.items() if name in values):
            shown.append((-one.operate_time, world.random.random(), row))
    shown.sort(key=lambda item: item[:2])
    rows = [row for _, _, row in shown]
    only_count = call.params.get("only_count") is True
    return {"total": len(rows), "items": [] if only_count else rows[offset : offset + limit]}


def _workflow(world: NodemgrWorld, one: Workflow, now: int) -> dict[str, object]:
    at = one.seen(now)
    ended = one.ended(at, now)
    earlier = one.tries[at - 1].finish if at else world.zero
    hosts = [part.target for part in one.tries[0].parts.values()]
    row: dict[str, object] = {
        "tenant_id": None,
        "workflow_id": one.id,
        "trigger_id": one.id.replace("wf", "trig"),
        "type": one.type,
        "bk_biz_id": list(one.biz_ids),
        "operator": one.operator,
        "operate_time": one.operate_time,
        "finish_time": one.tries[at].finish if ended else earlier,
        "status": one.status(at) if ended else "running",
    }
    if one.domain == "plugin":
        row["bk_host_id"] = None if world.nulls else [host.bk_host_id for host in hosts]
    else:
        row["bk_networkarea_id"] = None if world.nulls else sorted({host.area for host in hosts})
        row["bk_networkunit_id"] = None if world.nulls else [11]
        row["node_role"] = None if world.nulls else list(one.roles)
    return row


def _operation_list(world: NodemgrWorld, domain: Domain, call: Call) -> dict[str, object]:
    offset, limit = _page(call)
    one = world.workflows.get((domain, str(call.params.get("workflow_id"))))
    now = world.time
    if one is None or one.operate_time > now:
        raise _Refused(500, 3800009, "workflow not found")
    if world.denied.intersection(one.biz_ids) or not _visible(world, one, {"node_role": set(NODE_ROLES)}):
        raise _Refused(403, 3830403, "plugin" if domain == "plugin" else "agent")
    at = one.seen(now)
    if one.ended(at, now) and one.tries[at].finish < now - RETENTION:
        return {"total": 0, "operations": []}
    states = _conditions(call).get("state")
    rows = []
    for number, (newest, part) in one.newest(at).items():
        state, row = _operation(world, one, number, newest, at, part, now)
        if states is None or state in states:
            rows.append(row)
    only_count = call.params.get("only_count") is True
    return {"total": len(rows), "operations": [] if only_count else rows[offset : offset + limit]}


def _operation(
    world: NodemgrWorld, one: Workflow, number: int, newest: int, at: int, part: Part, now: int
) -> tuple[str, dict[str, object]]:
    begin = one.tries[newest].begin
    end = begin + part.takes
    state = "running" if one.stuck or end + one.row_lag > now else part.state
    target = part.target
    deployed: dict[str, object] = {
        "bk_host_id": target.bk_host_id,
        "bk_biz_id": target.biz,
        "bk_host_innerip_list": [target.ip] if target.ip else None,
        "bk_host_innerip_v6_list": [target.ipv6] if target.ipv6 else None,
        "bk_networkarea_id": target.area,
        "bk_networkunit_id": 11,
    }
    if one.domain == "plugin":
        deployed |= {"plugin_name": part.plugin, "plugin_version": "v3.80.0"}
    else:
        deployed["node_version"] = ""
    tries = [at for at, run in enumerate(one.tries[: at + 1]) if number in run.parts]
    return state, {
        "operation_id": world.id("oper", one.id, number),
        "instance_ids": [world.id("oper-inst", one.id, number, at) for at in tries],
        "operator": one.operator,
        "create_time": one.operate_time,
        f"{one.domain}_deployment_info": deployed,
        "latest_oper_inst_brief_data": {
            "life_cycle": {
                "state": state,
                "create_time": begin,
                "start_time": begin + 100,
                "end_time": world.zero if state in UNFINISHED else end,
                "stop_time": 0,
            },
            "latest_action_inst_brief_data": {"name": part.step, "tags": None},
        },
    }


def _page(call: Call) -> tuple[int, int]:
    page = call.params.get("page")
    offset, limit = (page.get("offset", 0), page.get("limit", 0)) if isinstance(page, dict) else (0, 0)
    if not isinstance(offset, int) or not isinstance(limit, int) or offset < 0 or not 0 < limit <= PAGE:
        raise _Refused(400, 3800001, "invalid page")
    return offset, limit


def _conditions(call: Call) -> dict[str, set[object]]:
    given = call.params.get("exact_include_conditions")
    return {name: set(values) for name, values in given.items() if values} if isinstance(given, dict) else {}


def _visible(world: NodemgrWorld, one: Workflow, wanted: Mapping[str, Iterable[object]]) -> bool:
    """Whether the list shows a workflow to the user. Without a filter for roles, the user must have the permissions
    for all of them."""
    if world.denied.issuperset(one.biz_ids):
        return False
    if world.roles is None or one.domain == "plugin":
        return True
    asked = set(wanted.get("node_role", NODE_ROLES))
    return set(one.roles) <= world.roles and ("node_role" in wanted or asked <= world.roles)
