"""The calls of NodeMan V3: every sample answer, what goes over the wire, odd values, errors in its own envelope."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from exporter.blueking.client import Client, Deadline
from exporter.blueking.nodemgr import NodemgrApi, Workflow
from exporter.clock import Clock
from exporter.config.schema import Auth, BlueKing, NodemgrPlatform
from exporter.config.secret import Secret
from exporter.errors import API_REASONS, ApiError
from exporter.log import get
from exporter.model import Host, Scope
from exporter.verify.answers import api_of
from exporter.verify.members import is_documented, read_members
from tests.blueking.test_nodeman_api import Silent
from tests.support.paths import FIXTURES

NODE_ROW = {"workflow_id": "wf:1", "type": "install_agent", "bk_biz_id": [2], "status": "running"}


def sample(name: str) -> bytes:
    return (FIXTURES / f"nodemgr__{name}.json").read_bytes()


class Served:
    """The API over a real client, before a server that gives one answer. `asked`: path, headers and body."""

    def __init__(self, api: NodemgrApi, clock: Clock) -> None:
        self.api = api
        self.clock = clock
        self.asked: list[tuple[str, dict[str, str], Any]] = []

    @property
    def deadline(self) -> Deadline:
        return Deadline(5.0, self.clock)

    async def workflows(self, **given: Any) -> tuple[Workflow, ...]:
        return (await self.api.workflows(given.pop("domain", "node"), 2, deadline=self.deadline, **given)).rows

    async def operations(self, domain: Any = "node", **given: Any) -> Any:
        return await self.api.operations(domain, "wf:14", deadline=self.deadline, **given)


@asynccontextmanager
async def served(body: bytes, status: int = 200) -> AsyncIterator[Served]:
    async def answer(request: web.Request) -> web.Response:
        one.asked.append((request.path, dict(request.headers), json.loads(await request.read())))
        return web.Response(body=body, status=status, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/api/bk-nodemgr/prod"
    platform = NodemgrPlatform(url=url)
    auth = Auth(app_code="exporter", app_secret=Secret("shh"), username="watcher")
    config = BlueKing(nodemgr=platform, auth=auth, retry_budget=0.0)
    clock = Clock()
    try:
        async with Client(config, clock, Silent(), get()) as client:
            one = Served(NodemgrApi(client.for_scope(Scope("biz", "2")), platform), clock)
            yield one
    finally:
        await runner.cleanup()


async def test_rows_of_nodes() -> None:
    """Milliseconds, text ids, null where there is no time."""
    async with served(sample("node_workflow_list__ok_mixed")) as one:
        running, partial, good = await one.workflows()
    assert running == Workflow("wf:" + "1e".rjust(32, "0"), "upgrade_agent", "running", (2,), 1790000030000, None)
    assert (partial.status, partial.bk_biz_ids, partial.finish_time) == ("partial_failed", (2, 3), 1790000095000)
    assert good.status == "success"


async def test_nulls_and_old_zero_times_are_none() -> None:
    async with served(sample("node_workflow_list__ok_nulls_and_old_zero_time")) as one:
        (row,) = await one.workflows()
    assert (row.status, row.finish_time) == ("running", None)


async def test_unknown_words_pass() -> None:
    async with served(sample("node_workflow_list__ok_unknown_type_and_status")) as one:
        rows = await one.workflows()
    assert [(row.type, row.status) for row in rows] == [
        ("relocate_agent", "paused"),
        ("assign_proxy_unit", "success"),
    ]


async def test_rows_of_plugins_may_name_no_business() -> None:
    async with served(sample("plugin_workflow_list__ok")) as one:
        rows = await one.workflows(domain="plugin", node_roles=["agent"])
        (_, _, body) = one.asked[0]
    assert [row.bk_biz_ids for row in rows] == [(2,), ()]
    assert "node_role" not in body["exact_include_conditions"]


async def test_what_goes_over_the_wire() -> None:
    """Seconds in; app and user in one header; a page always."""
    async with served(sample("node_workflow_list__ok_only_count")) as one:
        page = await one.api.workflows(
            "node", 2, begin=1790000000, end=1790000600, statuses=["running"], node_roles=["agent", "blank"],
            offset=500, limit=500, deadline=one.deadline,
        )  # fmt: skip
        (path, headers, body) = one.asked[0]
    assert (page.total, page.rows) == (7, ())
    assert path == "/api/bk-nodemgr/prod/api/v3/node/workflow/list"
    assert json.loads(headers["X-Bkapi-Authorization"]) == {
        "bk_app_code": "exporter", "bk_app_secret": "shh", "bk_username": "watcher",
    }  # fmt: skip
    assert body == {
        "page": {"offset": 500, "limit": 500},
        "exact_include_conditions": {"bk_biz_id": [2], "status": ["running"], "node_role": ["agent", "blank"]},
        "operate_time_range": {"start_timestamp_sec": 1790000000, "end_timestamp_sec": 1790000600},
    }


async def test_hosts_of_a_run() -> None:
    """The newest try, its step and end; hosts without an id are known by area and address."""
    async with served(sample("node_operation_list__ok_failed_hosts")) as one:
        first, second, third = await one.operations(states=["failed", "timeout", "terminated"])
        (path, _, body) = one.asked[0]
    assert path.endswith("/api/v3/node/workflow/operation/list")
    assert body["workflow_id"] == "wf:14"
    assert body["exact_include_conditions"] == {"state": ["failed", "timeout", "terminated"]}
    assert first.instance == "oper-inst:" + "c".rjust(32, "0")
    assert (first.state, first.step, first.end) == ("failed", "install_proxy_by_ssh", 1790000090000)
    assert (first.host, first.bk_biz_id) == (Host("0", "101", "10.0.0.1"), 2)
    assert (second.host, second.bk_biz_id, second.state) == (Host("0", "", "10.0.0.2"), 3, "timeout")
    assert (third.host, third.state) == (Host("0", "", "10.0.0.3"), "terminated")


async def test_hosts_that_have_not_begun() -> None:
    async with served(sample("node_operation_list__ok_not_started")) as one:
        before, running = await one.operations()
    assert (before.instance, before.state, before.step, before.end) == ("", "init", "", None)
    assert (running.host, running.state, running.step) == (Host("0", "105", "fd00::5"), "running", "")


async def test_hosts_of_plugins_and_after_the_retention() -> None:
    async with served(sample("plugin_operation_list__ok_failed")) as one:
        rows = await one.operations("plugin")
    assert [row.step for row in rows] == ["transfer_plugin_pkg_to_node", "start_process"]
    async with served(sample("node_operation_list__ok_empty_after_retention")) as one:
        assert await one.operations() == ()


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("error_400_bad_page", 400, "api_error"),
        ("error_401_no_user", 401, "auth"),
        ("error_403_no_permission", 403, "permission"),
        ("error_500_unknown_workflow", 500, "http_5xx"),
    ],
)
async def test_errors_have_an_envelope_of_their_own(name: str, status: int, reason: str) -> None:
    async with served(sample(name), status) as one:
        with pytest.raises(ApiError) as caught:
            await one.operations()
    assert caught.value.reason == reason
    assert caught.value.request_id == "rid:" + "7".rjust(32, "0")
    if reason == "permission":
        assert caught.value.actions == ("agent_history_view",)


@pytest.mark.parametrize(
    "row",
    [
        {**NODE_ROW, "bk_biz_id": [3]},
        {**NODE_ROW, "workflow_id": "wf:2"},
        {**NODE_ROW, "workflow_id": 7},
        {**NODE_ROW, "workflow_id": ""},
        {**NODE_ROW, "status": None},
        {**NODE_ROW, "operate_time": "yesterday"},
        {**NODE_ROW, "bk_biz_id": ["two"]},
        "wf:1",
    ],
)
async def test_wrong_rows_are_refused(row: object) -> None:
    """4.1.14: rows of another business, and workflows that were not asked for, are errors, as are wrong types."""
    body = json.dumps({"code": 0, "message": "OK", "data": {"total": 1, "items": [row]}}).encode()
    async with served(body) as one:
        with pytest.raises(ApiError) as caught:
            await one.workflows(ids=["wf:1"])
    assert caught.value.reason == "decode"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["workflow_id", "status", "life_cycle", "state", "name", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(st.sampled_from(["items", "operations"]), st.lists(JSON, max_size=3))
def test_any_rows_give_rows_or_an_error(member: str, rows: list[Any]) -> None:
    from exporter.blueking.envelope import NODEMGR_CODES, Reply, read
    from exporter.blueking.nodemgr import OPERATIONS, WORKFLOWS

    body = msgspec.json.encode({"code": 0, "data": {member: rows}})
    decoders: Any = WORKFLOWS if member == "items" else OPERATIONS
    reason = ""
    try:
        read(Reply(200, body, {}), decoders, NODEMGR_CODES)
    except ApiError as error:
        reason = error.reason
    assert reason in ("", *API_REASONS)


@pytest.mark.parametrize(
    "name",
    [
        "node_workflow_list__ok_mixed",
        "plugin_workflow_list__ok",
        "node_operation_list__ok_failed_hosts",
        "plugin_operation_list__ok_failed",
    ],
)
def test_every_member_of_the_samples_is_read_or_documented(name: str) -> None:
    """What the command verify would report of these answers; a new member it would report as unknown."""
    domain, kind = name.split("_")[:2]
    path = f"{domain}/workflow/list" if kind == "workflow" else f"{domain}/workflow/operation/list"
    api = api_of(f"https://bkapi.example.com/api/bk-nodemgr/prod/api/v3/{path}")
    assert api == name.partition("__")[0]
    members = read_members(api)
    assert members is not None
    unread = set(members.unread(json.loads(sample(name))))
    assert unread
    assert [path for path in unread if not is_documented(api, path)] == []
    assert not is_documented(api, "data.items[].colour")
