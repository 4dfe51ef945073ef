"""The paths of the simulator itself, for tests and demonstrations in other processes.

    GET  /-/ledger?bk_scope_type=biz&bk_scope_id=2[&since_ms=][&until_ms=][&host_results=failed|all|none]
                              [&dialect=v4|v3]
                              the truth, as ledger.Truth.as_json
    GET  /-/nodeman/ledger?bk_biz_id=2[&subscription_ids=11,12][&since=][&until=]
                              the truth about NodeMan, as nodeman_ledger.NodemanLedger.as_json; unix seconds
    GET  /-/nodemgr/ledger?bk_biz_id=2[&since=][&until=]
                              the truth about NodeMan V3, as nodemgr_world.Truth.as_json; unix seconds
    GET  /-/requests[?since=] {"now": unix seconds, "calls": [platform.LoggedCall …]}
    POST /-/world/start       {"bk_scope_type", "bk_scope_id", and the arguments of JobWorld.start; "steps": a list of
                              {"step_type", "duration", "name", "status", "ignore_error", "rolling_wait", "results"};
                              "results": a list of {"bk_host_id", "ip", "bk_cloud_id", "ipv6", "container", "status",
                              "exit_code"}} answers {"job_instance_id"}
    POST /-/world/retry       {"job_instance_id", "duration", "results", "all_hosts"}
    POST /-/world/stop        {"job_instance_id", "after"}
    POST /-/world/calm        {}: the traffic of `simulate` ends, so that counts can be compared
    POST /-/world/vanish      {"job_instance_id"}
    POST /-/world/status      {"job_instance_id", "status", "end_time"}
    POST /-/world/fault       {"name" and the other fields of faults.Fault, maybe a scope}, or {"clear": name or null}

An invalid request gets a 400 with {"error"}.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from exporter.model import Scope
from exporter.simulator import nodeman_api, nodemgr_api
from exporter.simulator.faults import Fault
from exporter.simulator.ledger import Exporter
from exporter.simulator.nodeman_ledger import NodemanLedger
from exporter.simulator.platform import Platform
from exporter.simulator.world import Outcome, StepScript, Target


def add_routes(app: web.Application, platform: Platform) -> None:
    """Add these paths to an application."""

    async def ledger(request: web.Request) -> web.Response:
        query: dict[str, Any] = dict(request.query)
        try:
            truth = platform.job.truth(
                _scope(query),
                int(query.get("since_ms", 0)),
                int(query["until_ms"]) if "until_ms" in query else None,
                Exporter(host_results=query.get("host_results", "failed"), dialect=query.get("dialect", "v4")),
            )
        except (KeyError, ValueError) as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return web.json_response(truth.as_json())

    async def nodeman_ledger(request: web.Request) -> web.Response:
        query, truth = request.query, NodemanLedger(nodeman_api.world_of(platform))
        try:
            until = float(query["until"]) if "until" in query else None
            ids = [int(number) for number in query.get("subscription_ids", "").split(",") if number]
            since = float(query.get("since", 0))
            return web.json_response(truth.as_json(int(query["bk_biz_id"]), ids, since, until))
        except (KeyError, ValueError) as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)

    async def nodemgr_ledger(request: web.Request) -> web.Response:
        query, world = request.query, nodemgr_api.world_of(platform)
        try:
            since = round(float(query.get("since", 0)) * 1000)
            until = round(float(query["until"]) * 1000) if "until" in query else world.time
            truth = world.truth(int(query["bk_biz_id"]), since, until)
        except (KeyError, ValueError, OverflowError) as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return web.json_response(truth.as_json())

    async def requests(request: web.Request) -> web.Response:
        since = float(request.query.get("since", 0))
        calls = [dataclasses.asdict(call) for call in list(platform.calls) if call.at >= since]
        return web.json_response({"now": platform.now(), "calls": calls})

    async def world(request: web.Request) -> web.Response:
        try:
            return web.json_response(_act(platform, request.match_info["action"], json.loads(await request.read())))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)

    app.router.add_get("/-/ledger", ledger)
    app.router.add_get("/-/nodeman/ledger", nodeman_ledger)
    app.router.add_get("/-/nodemgr/ledger", nodemgr_ledger)
    app.router.add_get("/-/requests", requests)
    app.router.add_post("/-/world/{action}", world)


def _act(platform: Platform, action: str, given: dict[str, Any]) -> dict[str, object]:
    world, number = platform.job, given.pop("job_instance_id", 0)
    match action:
        case "start":
            scope = _scope(given)
            given = {name: value for name, value in given.items() if not name.startswith("bk_scope_")}
            if "steps" in given:
                given["steps"] = [_step(step) for step in given["steps"]]
            return {"job_instance_id": world.start(scope, **given)}
        case "retry":
            if "results" in given:
                given["results"] = _results(given["results"])
            world.retry(number, **given)
        case "stop":
            world.stop(number, **given)
        case "calm":
            world.calm()
        case "vanish":
            world.vanish(number)
        case "status":
            world.set_status(number, **given)
        case "fault" if "clear" in given:
            platform.faults.clear(given["clear"])
        case "fault":
            where = _scope(given) if "bk_scope_id" in given else None
            picked = {name: value for name, value in given.items() if not name.startswith("bk_scope_")}
            platform.faults.add(Fault(**picked, scope=where))
        case _:
            raise ValueError(f'there is no action "{action}"')
    return {}


def _step(given: dict[str, Any]) -> StepScript:
    return StepScript(**{**given, "results": _results(given.get("results", []))})


def _results(rows: list[dict[str, Any]]) -> Mapping[Target, Outcome]:
    results: dict[Target, Outcome] = {}
    for row in rows:
        where = {name: value for name, value in row.items() if name not in ("status", "exit_code")}
        results[Target(**where)] = (row["status"], row["exit_code"]) if "exit_code" in row else row["status"]
    return results


def _scope(given: Mapping[str, Any]) -> Scope:
    kind = given.get("bk_scope_type", "biz")
    if kind not in ("biz", "biz_set", "tenant_set"):
        raise ValueError(f'"{kind}" is no scope type')
    return Scope(kind, str(given["bk_scope_id"]))
