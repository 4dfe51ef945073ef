"""The simulated JOB compared with the real one: shapes of answers, limits, time, faults, and the ledger."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from exporter.model import Host, Scope
from exporter.simulator.faults import FAULTS, Fault, parse_faults
from exporter.simulator.ledger import Exporter, Failing
from exporter.simulator.nodeman_api import world_of
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer, create_platform, sample_config
from exporter.simulator.world import Deviation, JobWorld, Outcome, StepScript, Target, target
from tests.support.paths import FIXTURES

START = 1_795_000_000.0
BIZ = Scope("biz", "2")
LIST, STATUS = "get_job_instance_list", "get_job_instance_status"
H1, H2, H3 = target(1), target(2), target(3, 5)
CREDENTIALS = {"bk_app_code": "blueking-exporter", "bk_app_secret": "simulated"}


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = START

    def __call__(self) -> float:
        return self.at

    @property
    def ms(self) -> int:
        return int(self.at * 1000)


class Client:
    """Talks to a simulator as an app-type caller, unless told otherwise."""

    def __init__(self, server: SimulatorServer, session: aiohttp.ClientSession, now: Time) -> None:
        self.server, self.session, self.now = server, session, now
        self.platform = server.platform
        self.world = server.platform.job

    async def ask(
        self,
        dialect: str,
        api: str,
        *,
        method: str = "GET",
        app_type: bool = True,
        headers: dict[str, str] | None = None,
        credentials: dict[str, str] | None = None,
        **params: Any,
    ) -> tuple[int, Any]:
        """(HTTP status, JSON or None) of one call for business 2."""
        given = {"bk_scope_type": "biz", "bk_scope_id": "2"} | params
        given = {name: value for name, value in given.items() if value is not None}
        auth = CREDENTIALS if credentials is None else credentials
        if dialect == "esb":
            url = f"{self.server.url}/api/c/compapi/v2/jobv3/{api}/"
            arguments: dict[str, Any] = {"json": {**given, **auth, "bk_username": "ops01"}}
            method, sent = "POST", {}
        else:
            url = f"{self.server.url}/api/bk-job/prod/api/{dialect}{'/system' if app_type else ''}/{api}"
            sent = {"X-Bkapi-Authorization": json.dumps(auth), "X-Bk-Username": "ops01", "Blueking-Language": "en"}
            texts = {name: str(value) for name, value in given.items()}
            arguments = {"params": texts} if method == "GET" else {"json": given}
        sent |= headers or {}
        async with self.session.request(method, url, headers=sent, allow_redirects=False, **arguments) as response:
            body = await response.read()
            return response.status, json.loads(body) if body else None

    async def rows(self, dialect: str = "v4", **params: Any) -> list[dict[str, Any]]:
        """The rows of one list call over all time that a v3 window allows."""
        window: dict[str, Any] = {"create_time_start": self.now.ms - 86_400_000, "create_time_end": self.now.ms + 1000}
        status, body = await self.ask(dialect, LIST, **(window | params))
        assert status == 200, body
        data = body["data"]
        rows: list[dict[str, Any]] = data["job_instance_list"] if dialect == "v4" else data["data"] or []
        return rows


@pytest.fixture
def now() -> Time:
    return Time()


@pytest.fixture
def world(now: Time) -> JobWorld:
    return JobWorld(1, now)


@pytest.fixture
async def job(now: Time) -> AsyncIterator[Client]:
    platform = Platform(now=now, scopes=[BIZ, Scope("biz_set", "9001")])
    async with SimulatorServer(platform) as server, aiohttp.ClientSession() as session:
        yield Client(server, session, now)


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def paths(value: object, prefix: str = "") -> Iterator[str]:
    """Every member path of a JSON value with its kind, list positions forgotten."""
    if isinstance(value, dict):
        for name, member in value.items():
            yield from paths(member, f"{prefix}.{name}")
    elif isinstance(value, list):
        yield f"{prefix}[]"
        for item in value:
            yield from paths(item, f"{prefix}[]")
    else:
        kind = type(value).__name__
        yield f"{prefix}: {kind}"


def same_shape(answer: object, name: str) -> None:
    """The answer has exactly the members of a fixture, with values of the same types."""
    assert set(paths(answer)) == set(paths(fixture(name)))


# Shapes


async def test_v4_list_shows_every_status_and_drops_nulls(job: Client) -> None:
    """Rows of unfinished, finished and abandoned executions have the members of the sample, and no null."""
    ad_hoc = StepScript(results={H1: 9}, duration=3)
    job.world.start(BIZ, name="nightly-backup", task_type=0, launch_mode=3, steps=[ad_hoc])
    job.world.start(BIZ, pending_for=math.inf, task_type=2, launch_mode=1)
    job.world.start(BIZ, task_type=0, launch_mode=1, steps=[StepScript(3, math.inf)])
    job.world.start(BIZ, outcome=14)
    job.now.at += 1
    job.world.start(BIZ, steps=[StepScript(duration=math.inf, results={H1: 9})])
    job.now.at += 10
    status, body = await job.ask("v4", LIST, create_time_start=job.now.ms - 60_000, create_time_end=job.now.ms)
    assert status == 200
    same_shape(body, "job_v4_list__ok_mixed_statuses_nulls_omitted")
    assert sorted(row["status"] for row in body["data"]["job_instance_list"]) == [1, 2, 3, 7, 14]
    running = next(row for row in body["data"]["job_instance_list"] if row["status"] == 2)
    assert running["total_time"] == 10_000, "the list fills the elapsed time of a running execution"


async def test_v4_empty_list(job: Client) -> None:
    """No rows are an empty array in v4."""
    status, body = await job.ask("v4", LIST, create_time_start=1, create_time_end=2)
    assert (status, body["data"]) == (200, fixture("job_v4_list__ok_empty")["data"])


async def test_v3_list(job: Client) -> None:
    """v3 keeps nulls, counts the total, and has null for an empty page."""
    for _ in range(3):
        job.world.start(BIZ, task_type=0, steps=[StepScript(duration=1)])
    job.now.at += 5
    window: dict[str, Any] = {"create_time_start": job.now.ms - 60_000, "create_time_end": job.now.ms}
    _, body = await job.ask("v3", LIST, length=2, **window)
    same_shape(body, "job_v3_list__ok_total_larger_than_page")
    assert (body["data"]["total"], len(body["data"]["data"])) == (3, 2)
    _, empty = await job.ask("v3", LIST, create_time_start=1, create_time_end=2)
    same_shape(empty, "job_v3_list__ok_empty_inner_data_is_null")
    job.platform.fills_bk_biz_id = False
    _, body = await job.ask("v3", LIST, **window)
    same_shape(body, "job_v3_list__ok_bk_biz_id_null_when_compat_toggle_off")


async def test_esb_wraps_the_v3_answer(job: Client) -> None:
    """The ESB adds request_id and message to good answers, request_id and data to refusals."""
    number = job.world.start(BIZ, steps=[StepScript(duration=1)])
    job.now.at += 5
    window: dict[str, Any] = {"create_time_start": job.now.ms - 60_000, "create_time_end": job.now.ms}
    _, body = await job.ask("esb", LIST, **window)
    same_shape(body, "esb__job_v3_list_ok_wrapped")
    status, body = await job.ask("esb", STATUS, job_instance_id=number + 1)
    assert (status, body["code"]) == (200, 1244006)
    same_shape(body, "esb__job_v3_status_error_wrapped")


async def test_v3_status(job: Client) -> None:
    """Per-host results with nulls kept; null instead of the list when they were not asked for."""
    number = job.world.start(
        BIZ,
        steps=[
            StepScript(results={H1: 9, H2: 9}, name="stop", duration=1),
            StepScript(results={H1: 9, H2: (104, 127), H3: 1}, name="start", duration=2),
        ],
    )
    job.now.at += 10
    _, body = await job.ask("v3", STATUS, job_instance_id=number, return_ip_result="true")
    same_shape(body, "job_v3_status__ok_failed_with_ip_results")
    results = body["data"]["step_instance_list"][1]["step_ip_result_list"]
    assert [(row["status"], row["exit_code"], row["error_code"]) for row in results] == [
        (9, 0, 0), (104, 127, 0), (1, None, 117),
    ]  # fmt: skip
    _, body = await job.ask("v3", STATUS, job_instance_id=number)
    same_shape(body, "job_v3_status__ok_return_ip_result_false")


async def test_v3_status_of_unfinished_executions(job: Client) -> None:
    """Pending, half-way in a rolling step, and waiting for an approval look as in the samples."""
    pending = job.world.start(BIZ, task_type=2, steps=[StepScript(2, results={H1: 9})], pending_for=math.inf)
    rolling = job.world.start(BIZ, steps=[StepScript(results={H1: 9, H2: 9}, duration=2, rolling_wait=100)])
    gated = job.world.start(BIZ, task_type=0, steps=[StepScript(3, math.inf), StepScript(results={H1: 9})])
    job.now.at += 10
    for number, name in (
        (pending, "job_v3_status__ok_pending_all_times_null"),
        (rolling, "job_v3_status__ok_rolling_waiting"),
        (gated, "job_v3_status__ok_waiting_user_manual_confirm_step"),
    ):
        _, body = await job.ask("v3", STATUS, job_instance_id=number, return_ip_result="true")
        same_shape(body, name)
        assert body["data"]["job_instance"]["status"] == fixture(name)["data"]["job_instance"]["status"]


async def test_v4_status(job: Client) -> None:
    """Targets are execute objects; hosts without IPv4, without any address, and exit codes of every size are shown."""
    failed = [
        StepScript(results={H1: 9}, name="stop", duration=1),
        StepScript(results={H2: (104, 127), H3: 1}, name="start", duration=2),
    ]
    number = job.world.start(BIZ, steps=failed)
    six = job.world.start(BIZ, steps=[StepScript(results={Target(301, None, 7, "fd00:0:0:0:0:0:0:3"): 9})])
    none = job.world.start(BIZ, steps=[StepScript(results={Target(302, None, 7): 2})])
    exits = [StepScript(results={H1: (104, 2147483647), H2: (104, -1073741510)})]
    odd = job.world.start(BIZ, steps=exits)
    job.now.at += 10
    answers = {}
    for each in (number, six, none, odd):
        _, answers[each] = await job.ask("v4", STATUS, job_instance_id=each, return_execute_object_result="true")
    agent = "bk_agent_id"

    def without_agent(value: object) -> set[str]:
        # The samples give an agent id to one host only.
        return {path for path in paths(value) if agent not in path}

    for each, name in (
        (number, "job_v4_status__ok_failed_with_execute_objects"),
        (six, "job_v4_status__ok_ipv6_only_host"),
        (none, "job_v4_status__ok_host_without_any_ip"),
        (odd, "job_v4_status__ok_large_and_negative_exit_codes"),
    ):
        assert without_agent(answers[each]) == without_agent(fixture(name)), name
    codes = [
        row["exit_code"] for row in answers[odd]["data"]["step_instance_list"][0]["step_execute_object_result_list"]
    ]
    assert codes == [2147483647, -1073741510]


async def test_container_targets(job: Client) -> None:
    """v4 shows a container; v3 fails as a whole when asked for targets, and only then."""
    number = job.world.start(BIZ, steps=[StepScript(results={Target(101, container=7): 9, H1: 9})])
    job.now.at += 10
    _, body = await job.ask("v4", STATUS, job_instance_id=number, return_execute_object_result="true")
    objects = body["data"]["step_instance_list"][0]["step_execute_object_result_list"]
    assert objects[0]["execute_object"]["type"] == 2
    assert objects[0]["execute_object"]["container"]["node_host_id"] == 101
    status, body = await job.ask("v3", STATUS, job_instance_id=number, return_ip_result="true")
    assert (status, body["code"], body["result"]) == (200, 1240002, False)
    status, body = await job.ask("v3", STATUS, job_instance_id=number)
    assert (status, body["code"]) == (200, 0)


async def test_v4_ignores_the_flag_of_v3(job: Client) -> None:
    """return_ip_result, which the published example uses, has no effect in v4."""
    number = job.world.start(BIZ, steps=[StepScript(results={H1: 9})])
    _, body = await job.ask("v4", STATUS, job_instance_id=number, return_ip_result="true")
    assert "step_execute_object_result_list" not in body["data"]["step_instance_list"][0]


# Limits and refusals

GOOD: dict[str, Any] = {"create_time_start": 1, "create_time_end": 1000}


@pytest.mark.parametrize(
    ("params", "status", "name"),
    [
        ({"create_time_start": 1}, 400, "job_v4_list__error_400_missing_time"),
        (GOOD | {"offset": 10_001}, 400, "job_v4_list__error_400_offset_out_of_range"),
        (GOOD | {"offset": 10_000, "length": 200}, 200, "job_v4_list__ok_empty"),
    ],
)
async def test_v4_list_limits(job: Client, params: dict[str, Any], status: int, name: str) -> None:
    """v4 answers with real HTTP codes and the shape of the samples."""
    answered, body = await job.ask("v4", LIST, **params)
    assert answered == status
    same_shape(body, name)
    if status != 200:
        expected = fixture(name)["error"]
        assert (body["error"]["code"], body["error"]["message"]) == (expected["code"], expected["message"])


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({"length": 0}, 400), ({"length": 201}, 400), ({"offset": -1}, 400), ({"length": "x"}, 400),
        ({"bk_scope_type": None}, 400), ({"create_time_start": 5000}, 200), ({"status": 12}, 500),
        ({"launch_mode": 9}, 500), ({"type": 9}, 200), ({"bk_scope_id": "404"}, 404),
    ],
)  # fmt: skip
async def test_v4_list_parameters(job: Client, params: dict[str, Any], status: int) -> None:
    """The odd rules of v4: no order of times, 500 for unknown statuses, unknown types ignored."""
    answered, body = await job.ask("v4", LIST, **(GOOD | params))
    assert answered == status
    assert ("error" in body) == (status != 200)


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("GET", {"create_time_end": None}, 1240003), ("POST", {"create_time_start": None}, 1241007),
        ("GET", {"create_time_start": 0}, 1241007), ("GET", {"create_time_start": 1000}, 1241007),
        ("GET", {"create_time_end": 2_592_000_001}, 0), ("GET", {"create_time_end": 2_592_000_002}, 1241002),
        ("GET", {"length": 1000}, 0), ("GET", {"length": 1001}, 1240003), ("GET", {"length": 0}, 1240003),
        ("GET", {"start": 1000}, 0), ("GET", {"start": 1001}, 1241010), ("POST", {"length": 1000}, 0),
        ("GET", {"status": 12}, 1240002), ("GET", {"launch_mode": 9}, 1240002), ("GET", {"type": 9}, 1241002),
        ("GET", {"bk_scope_id": "404"}, 1243049),
        ("GET", {"bk_scope_type": None, "bk_scope_id": None, "bk_biz_id": 2}, 0),
    ],
)  # fmt: skip
async def test_v3_list_parameters(job: Client, method: str, params: dict[str, Any], code: int) -> None:
    """v3 refuses with HTTP 200 and a code; exactly 30 days pass."""
    job.platform.v3_start_limit = 1000
    status, body = await job.ask("v3", LIST, method=method, **(GOOD | params))
    assert (status, body["code"], body["result"]) == (200, code, code == 0)


@pytest.mark.parametrize(
    ("dialect", "params", "name"),
    [
        ("v4", {"job_instance_id": 0}, "job_v4_status__error_400_bad_id"),
        ("v4", {"job_instance_id": "x"}, "job_v4_status__error_400_type_mismatch"),
        ("v4", {"job_instance_id": 5}, "job_v4_status__error_404_not_exist"),
        ("v3", {"job_instance_id": 5}, "job_v3_status__error_http200_not_exist"),
        ("v3", {"job_instance_id": 0}, "job_v3_status__error_http200_bad_id"),
        ("v3", GOOD | {"bk_scope_id": "404"}, "job_v3_list__error_http200_scope_not_exist"),
        ("v3", {"create_time_start": 1}, "job_v3_list__error_http200_missing_query_param_get"),
    ],
)
async def test_refusals_word_for_word(job: Client, dialect: str, params: dict[str, Any], name: str) -> None:
    """Refusals equal the samples but for the id of the request."""
    _, body = await job.ask(dialect, LIST if "create_time_start" in params else STATUS, **params)
    assert {**body, "job_request_id": ""} == {**fixture(name), "job_request_id": ""}


async def test_permissions(job: Client) -> None:
    """A scope without access_business, and a history without view_history, name the action in each dialect's way."""
    number = job.world.start(BIZ)
    job.platform.denied.add(BIZ)
    status, body = await job.ask("v4", LIST, **GOOD)
    assert status == 403
    same_shape(body, "job_v4_list__error_403_no_permission")
    _, body = await job.ask("v3", LIST, **GOOD)
    same_shape(body, "job_v3_list__error_http200_no_permission")
    assert body["permission"]["actions"][0]["id"] == "access_business"
    job.platform.denied.clear()
    job.platform.denied_history.add(BIZ)
    status, body = await job.ask("v4", STATUS, job_instance_id=number)
    assert status == 403
    same_shape(body, "job_v4_status__error_403_no_permission_view_history")


async def test_credentials(job: Client) -> None:
    """The gateway's 400s, JOB's own 401, and the ESB's 200 with 1306000."""
    for credentials, name in (
        ({}, "gateway__error_400_app_code_empty"),
        ({**CREDENTIALS, "bk_app_secret": "no"}, "gateway__error_400_bad_secret"),
        ({"access_token": "no"}, "gateway__error_400_access_token_invalid"),
    ):
        status, body = await job.ask("v4", LIST, credentials=credentials, **GOOD)
        assert (status, body) == (400, fixture(name))
    unverified = {**CREDENTIALS, "bk_username": "ops01"}
    status, body = await job.ask("v4", LIST, app_type=False, credentials=unverified, **GOOD)
    assert (status, body) == (400, fixture("gateway__error_400_user_not_verified"))
    status, body = await job.ask("v4", LIST, headers={"X-Bkapi-Authorization": "{"}, **GOOD)
    assert (status, body) == (400, fixture("gateway__error_400_header_not_json"))
    status, body = await job.ask("v4", LIST, headers={"X-Bk-Username": ""}, **GOOD)
    assert (status, body["code"]) == (401, 1247002)
    same_shape(body, "job_gateway__error_401_missing_user_info")
    status, body = await job.ask("esb", LIST, credentials={"bk_app_code": "x"}, **GOOD)
    assert (status, body["code"]) == (200, 1306000)
    same_shape(body, "esb__error_http200_user_auth_failed")
    for token in ({"access_token": "simulated-access-token"}, {**CREDENTIALS, "bk_token": "simulated-bk-token"}):
        status, _ = await job.ask("v4", LIST, app_type=False, credentials=token, **GOOD)
        assert status == 200


async def test_tenant_and_unknown_paths(job: Client) -> None:
    """A multi-tenant platform wants its header; what is not published is a 404 in the dialect of who was asked."""
    job.platform.tenant_id = "demo"
    status, body = await job.ask("v4", LIST, **GOOD)
    assert status == 403
    same_shape(body, "gateway__error_403_cross_tenant")
    status, _ = await job.ask("v4", LIST, headers={"X-Bk-Tenant-Id": "demo"}, **GOOD)
    assert status == 200
    status, body = await job.ask("v4", "get_job_everything", **GOOD)
    assert (status, body["code"]) == (404, 1640401)
    status, body = await job.ask("esb", "get_job_everything", **GOOD)
    assert (status, body) == (404, fixture("esb__error_404_unknown_path"))


async def test_rate_limit(job: Client) -> None:
    """A fixed window per second; quota headers on good answers too, never Retry-After."""
    job.platform.rate_limit = 2
    url = f"{job.server.url}/api/bk-job/prod/api/v4/system/{LIST}"
    headers = {"X-Bkapi-Authorization": json.dumps(CREDENTIALS), "X-Bk-Username": "ops01"}
    seen = []
    for _ in range(3):
        async with job.session.get(url, headers=headers, params={"bk_scope_type": "biz"}) as response:
            seen.append((response.status, response.headers["X-Bkapi-RateLimit-Remaining"]))
            assert "Retry-After" not in response.headers
            body = await response.json()
    assert [remaining for _, remaining in seen] == ["1", "0", "0"]
    assert seen[2][0] == 429
    same_shape(body, "gateway__error_429_rate_limit_reset_header_absent")
    status, body = await job.ask("esb", LIST, **GOOD)
    assert (status, body["code"]) == (200, 1306429)
    job.now.at += 1
    status, _ = await job.ask("v4", LIST, **GOOD)
    assert status == 200


async def test_messages_follow_the_language(job: Client) -> None:
    """Chinese unless English was asked for."""
    _, english = await job.ask("v3", STATUS, job_instance_id=5)
    _, chinese = await job.ask("v3", STATUS, job_instance_id=5, headers={"Blueking-Language": ""})
    assert (english["message"], chinese["message"]) == ("Task instance does not exist", "任务实例不存在")


# Listing


async def test_filters(job: Client) -> None:
    """Filters select; a job_instance_id beats all of them except the scope."""
    one = job.world.start(BIZ, name="nightly-backup", task_type=0, launch_mode=3, operator="ops01")
    two = job.world.start(BIZ, name="restart", steps=[StepScript(duration=math.inf)])
    job.now.at += 10
    for params, expected in (
        ({}, {one, two}),
        ({"status": 3}, {one}),
        ({"status": 2}, {two}),
        ({"type": 0}, {one}),
        ({"launch_mode": 2}, {two}),
        ({"name": "night"}, {one}),
        ({"operator": "admin"}, {two}),
        ({"job_instance_id": one, "status": 2, "create_time_start": 5}, {one}),
        ({"job_instance_id": one, "bk_scope_type": "biz_set", "bk_scope_id": 9001}, set()),
    ):
        for dialect in ("v4", "v3"):
            window = {} if "create_time_start" not in params else {"create_time_end": 6}
            assert {row["job_instance_id"] for row in await job.rows(dialect, **(params | window))} == expected


async def test_order_and_bounds(job: Client) -> None:
    """Newest first, both bounds inclusive, and no fixed order within a millisecond."""
    at = job.now.ms
    tied = [job.world.start(BIZ, create_time=at) for _ in range(6)]
    later = job.world.start(BIZ, create_time=at + 5, visible_from=at)
    job.now.at += 1
    orders = set()
    for _ in range(20):
        rows = await job.rows(create_time_start=at, create_time_end=at + 5, length=200)
        ids = [row["job_instance_id"] for row in rows]
        assert ids[0] == later
        assert sorted(ids[1:]) == tied
        orders.add(tuple(ids))
    assert len(orders) > 1
    assert await job.rows(create_time_start=at + 1, create_time_end=at + 4) == []


async def test_paging_reaches_every_row(job: Client) -> None:
    """Pages of distinct milliseconds join to the whole."""
    begin = job.now.ms - 5000
    ids = [job.world.start(BIZ, create_time=begin + index) for index in range(25)]
    window: dict[str, Any] = {"create_time_start": begin, "create_time_end": begin + 100}
    pages = [await job.rows(offset=offset, **window) for offset in (0, 10, 20)]
    assert [row["job_instance_id"] for page in pages for row in page] == ids[::-1]
    assert [len(page) for page in pages] == [10, 10, 5]


def test_late_rows(world: JobWorld, now: Time) -> None:
    """A row may appear in the list after others that were created later."""
    late = world.start(BIZ, create_time=now.ms - 1000, visible_from=now.ms + 5000)
    assert world.find(BIZ, late) is None
    assert world.between(BIZ, 0, now.ms) == []
    now.at += 5
    assert [row.id for row in world.between(BIZ, 0, now.ms)] == [late]


async def test_vanished_executions(job: Client) -> None:
    """What was archived is neither listed nor known."""
    number = job.world.start(BIZ)
    job.world.vanish(number)
    assert await job.rows() == []
    _, body = await job.ask("v3", STATUS, job_instance_id=number)
    assert body["code"] == 1244006


# The life of an execution


async def test_an_execution_proceeds_by_itself(job: Client) -> None:
    """Pending, running, waiting for a user, running again, done: at the times of the script."""
    started = job.now.ms
    number = job.world.start(
        BIZ, task_type=0, pending_for=1,
        steps=[StepScript(duration=2, results={H1: 9}), StepScript(3, 5), StepScript(duration=2, results={H1: 9})],
    )  # fmt: skip
    seen = []
    for second in range(12):
        job.now.at = started / 1000 + second
        [row] = await job.rows()
        seen.append(row["status"])
    assert seen == [1, 2, 2, 7, 7, 7, 7, 7, 2, 2, 3, 3]
    assert (row["start_time"], row["end_time"], row["total_time"]) == (started + 1000, started + 10_000, 9000)
    assert row["job_instance_id"] == number


@pytest.mark.parametrize(
    ("outcome", "statuses"), [(11, [2, 10, 11]), (8, [2, 8]), (9, [2, 9]), (13, [2, 13]), (14, [14]), (5, [2, 5])]
)
def test_other_ends(world: JobWorld, now: Time, outcome: int, statuses: list[int]) -> None:
    """An execution can be stopped, ended by hand, abandoned, …; an abandoned one never starts."""
    number = world.start(BIZ, outcome=outcome, steps=[StepScript(duration=2)])
    seen: list[int] = []
    for _ in range(8):
        row = world.find(BIZ, number)
        assert row is not None
        if not seen or seen[-1] != row.status:
            seen.append(row.status)
        now.at += 1
    assert seen == statuses
    assert row is not None
    assert row.end_time is not None
    assert (row.start_time is None) == (outcome == 14)


def test_a_failed_step_ends_the_execution(world: JobWorld, now: Time) -> None:
    """The steps behind it never start, unless its error is ignored, by its script or by a user."""
    steps = [StepScript(results={H1: (104, 2)}, duration=1), StepScript(results={H1: 9}, duration=1)]
    number = world.start(BIZ, task_type=0, steps=steps)
    ignored = [StepScript(results={H1: (104, 2)}, duration=1, ignore_error=True), steps[1]]
    tolerant = world.start(BIZ, task_type=0, steps=ignored)
    now.at += 10
    row, other = world.find(BIZ, number), world.find(BIZ, tolerant)
    assert row is not None
    assert other is not None
    assert (row.status, [step.status for step in row.steps]) == (4, [4, 1])
    assert (other.status, [step.status for step in other.steps]) == (3, [6, 3])
    world.ignore_error(number)
    now.at += 10
    world.advance()
    assert (row.status, [step.status for step in row.steps]) == (3, [6, 3])


def test_retry(world: JobWorld, now: Time) -> None:
    """Running again without an end, the old start kept; only the failed step counts up; what had succeeded shows 3."""
    steps = [StepScript(results={H1: 9}, duration=1), StepScript(results={H1: 9, H2: (104, 2)}, duration=1)]
    number = world.start(BIZ, steps=steps)
    now.at += 60
    row = world.find(BIZ, number)
    assert row is not None
    start, end = row.start_time, row.end_time
    world.retry(number, duration=2)
    assert (row.status, row.start_time, row.end_time) == (2, start, None)
    assert [(step.execute_count, step.status) for step in row.steps] == [(0, 3), (1, 2)]
    assert [result.status for result in row.steps[1].results] == [3, 7]
    now.at += 2
    world.advance()
    assert (row.status, row.start_time, row.end_time) == (3, start, now.ms)
    assert row.end_time != end
    assert [result.status for result in row.steps[1].results] == [3, 9]


def test_a_retry_can_end_before_anybody_looks(world: JobWorld, now: Time) -> None:
    """Then only the changed end time tells, even within the millisecond of the first end."""
    number = world.start(BIZ, steps=[StepScript(results={H1: (104, 1)}, duration=0)])
    row = world.find(BIZ, number)
    assert row is not None
    end = row.end_time
    world.retry(number, duration=0, results={H1: (104, 1)})
    now.at += 0.001
    world.advance()
    assert row.status == 4
    assert row.end_time != end


def test_end_time_written_late(world: JobWorld, now: Time) -> None:
    """The status may be final before the end time is there; when it comes it is the true one."""
    number = world.start(BIZ, steps=[StepScript(duration=1)], deviation=Deviation(end_time_late=5))
    now.at += 2
    row = world.find(BIZ, number)
    assert row is not None
    assert (row.status, row.end_time) == (3, None)
    now.at += 5
    world.advance()
    assert row.end_time == int(START * 1000) + 1000


# The ledger


def test_truth_of_a_plain_history(world: JobWorld, now: Time) -> None:
    """By hand: two successes, a failure with three hosts, one still running."""
    since = now.ms
    now.at += 1
    for _ in range(2):
        world.start(BIZ, task_type=0, launch_mode=3, steps=[StepScript(duration=4)])
    results: dict[Target, Outcome] = {H1: 9, H2: (104, 127), H3: 1, Target(9, container=5): (104, 127)}
    world.start(BIZ, steps=[StepScript(results=results, duration=2)])
    world.start(BIZ, task_type=2, steps=[StepScript(2, math.inf)])
    now.at += 10
    truth = world.truth(BIZ, since)
    assert truth.created == {("plan", "cron"): 2, ("script", "api"): 1, ("file", "api"): 1}
    assert truth.finished == {("plan", "cron", "success"): 2, ("script", "api", "failed"): 1}
    assert truth.durations == {"plan": (2, 8.0), "script": (1, 2.0)}
    assert (truth.reopened, truth.lost, truth.host_results) == (0, 0, 4)
    assert truth.host_failures == {("104", "script_nonzero_exit"): 2, ("1", "agent_abnormal"): 1}
    assert truth.exit_codes == {"127": 2}
    assert truth.step_failures == {"script": 1}
    assert truth.unfinished == {("file", "running"): 1}
    assert truth.oldest_unfinished == {"running": START + 1}
    assert truth.failing == {
        Host("0", "102", "10.0.0.2"): Failing(104, "script_nonzero_exit", START + 2.0, 1),
        Host("5", "103", "10.0.0.3"): Failing(1, "agent_abnormal", START + 3.0, 1),
    }
    assert truth.hosts_failing == {("104", "script_nonzero_exit"): 1, ("1", "agent_abnormal"): 1}
    assert world.truth(Scope("biz", "3"), since).created == {}


def test_truth_of_a_baseline(world: JobWorld, now: Time) -> None:
    """What had ended counts nothing; what was unfinished counts when it ends, without having been created."""
    old = world.start(BIZ, steps=[StepScript(results={H1: (104, 1)}, duration=1)])
    world.start(BIZ, steps=[StepScript(results={H2: (104, 1)}, duration=60)])
    now.at += 10
    since = now.ms
    now.at += 60
    truth = world.truth(BIZ, since)
    assert (truth.created, truth.finished) == ({}, {("script", "api", "failed"): 1})
    assert truth.durations == {"script": (1, 60.0)}
    assert [host.bk_host_id for host in truth.failing] == ["102"]
    world.retry(old, duration=1, results={H1: (104, 3)})
    now.at += 5
    truth = world.truth(BIZ, since)
    assert (truth.reopened, truth.finished["script", "api", "failed"]) == (1, 2)
    assert truth.durations == {"script": (1, 60.0)}, "only a first end is a duration"
    assert truth.exit_codes == {"1": 1, "3": 1}


def test_truth_of_retries(world: JobWorld, now: Time) -> None:
    """Per (step, execute_count) once; the streak is one execution long and keeps its beginning."""
    steps = [StepScript(results={H1: 9}, duration=1), StepScript(results={H1: 9, H2: (104, 2)}, duration=1)]
    number = world.start(BIZ, task_type=0, steps=steps)
    now.at += 10
    world.retry(number, duration=2, results={H2: (104, 3)})
    now.at += 10
    truth = world.truth(BIZ)
    assert truth.finished == {("plan", "api", "failed"): 2}
    assert (truth.reopened, truth.host_results, truth.step_failures) == (1, 3 + 2, {"script": 2})
    assert truth.exit_codes == {"2": 1, "3": 1}
    [failing] = truth.failing.values()
    assert (failing.consecutive, failing.since) == (1, START + 2.0)
    world.retry(number, duration=1)
    now.at += 10
    truth = world.truth(BIZ)
    assert truth.finished == {("plan", "api", "failed"): 2, ("plan", "api", "success"): 1}
    assert truth.failing == {}
    assert truth.host_results == 5, "a success is examined to clear hosts, but counts nowhere"


def test_truth_of_streaks(world: JobWorld, now: Time) -> None:
    """A success of another plan is not looked at, one of the same plan clears, `all` sees everything."""

    def run(plan: int, code: int | tuple[int, int]) -> None:
        world.start(BIZ, task_type=0, plan_id=plan, steps=[StepScript(results={H1: code}, duration=1)])
        now.at += 10

    run(1, (104, 1))
    run(1, (104, 2))
    run(2, 9)
    [failing] = world.truth(BIZ).failing.values()
    assert (failing.consecutive, failing.since) == (2, START + 1)
    assert world.truth(BIZ, exporter=Exporter(host_results="all")).failing == {}
    assert world.truth(BIZ, exporter=Exporter(host_results="none")).failing == {}
    run(1, 9)
    assert world.truth(BIZ).failing == {}
    run(1, 310)
    [failing] = world.truth(BIZ).failing.values()
    assert (failing.consecutive, failing.code) == (1, 310)
    now.at += 49 * 3600
    assert world.truth(BIZ).failing == {}, "given up after the time to live"


def test_truth_as_v3_tells_it(world: JobWorld, now: Time) -> None:
    """No IPv6 address, and nothing about the hosts of an execution that a container takes part in."""
    six = Target(301, None, 7, "fd00:0:0:0:0:0:0:3")
    world.start(BIZ, steps=[StepScript(results={six: (104, 1)}, duration=1)])
    world.start(BIZ, steps=[StepScript(results={H1: (104, 2), Target(9, container=5): 9}, duration=1)])
    now.at += 5
    assert set(world.truth(BIZ).failing) == {Host("7", "301", "fd00:0:0:0:0:0:0:3"), Host("0", "101", "10.0.0.1")}
    truth = world.truth(BIZ, exporter=Exporter(dialect="v3"))
    assert set(truth.failing) == {Host("7", "301", "")}
    assert (truth.host_results, truth.exit_codes, truth.step_failures) == (1, {"1": 1}, {"script": 2})


def test_F13_F18_truth_of_unusual_things(world: JobWorld, now: Time) -> None:
    """Unknown statuses end with an end time; a null end filled in is the same run; vanished unfinished are lost."""
    odd = world.start(BIZ, steps=[StepScript(duration=math.inf)])
    world.set_status(odd, 12)
    assert world.truth(BIZ).unfinished == {("script", "unknown"): 1}
    world.set_status(odd, 12, end_time=now.ms)
    assert world.truth(BIZ).finished == {("script", "api", "unknown"): 1}
    world.start(BIZ, launch_mode=9, steps=[StepScript(duration=1)], deviation=Deviation(end_time_late=5))
    lost = world.start(BIZ, steps=[StepScript(duration=math.inf)])
    now.at += 20
    world.vanish(lost)
    world.vanish(odd)
    truth = world.truth(BIZ)
    assert truth.finished == {("script", "api", "unknown"): 1, ("script", "unknown", "success"): 1}
    assert (truth.lost, truth.reopened, truth.unfinished) == (1, 0, {})
    world.set_status(world.start(BIZ, steps=[StepScript(duration=0)]), 3, end_time=now.ms + 5)
    assert world.truth(BIZ).reopened == 1, "a changed end is another run"


# Traffic, faults, control


def test_the_same_seed_gives_the_same_history() -> None:
    """A populated world depends on its seed and the clock only, and shows some of everything."""

    def history(seed: int) -> dict[str, Any]:
        now = Time()
        world = JobWorld(seed, now, scopes=[BIZ], speed=20)
        world.populate(history=900)
        now.at += 300
        return world.truth(BIZ, int(START * 1000)).as_json()

    one = history(7)
    assert one == history(7)
    assert one != history(8)
    assert one["reopened"]
    assert one["host_failures"]
    assert one["failing"]


def test_calm() -> None:
    """The traffic ends, what runs comes to its end, and the truth does not change."""
    now = Time()
    world = JobWorld(1, now, scopes=[BIZ], speed=10)
    world.populate(history=300)
    world.calm()
    now.at += 600
    settled = world.truth(BIZ).as_json()
    now.at += 600
    assert world.truth(BIZ).as_json() == settled
    assert settled["created"]
    assert settled["unfinished"] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("http_503", [Fault("http_503")]),
        ("http_503:0.1, latency@job_list", [Fault("http_503", 0.1), Fault("latency", api="job_list")]),
        ("latency=3:0.5@x", [Fault("latency", 0.5, "x", value="3")]),
    ],
)
def test_fault_lists(text: str, expected: list[Fault]) -> None:
    """The format of --faults."""
    assert parse_faults(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http_5003", 'did you mean "http_503"?'),
        ("latency:many", "not a probability"),
        ("latency:7", "between 0 and 1"),
    ],
)
def test_bad_fault_lists(text: str, message: str) -> None:
    """A mistake is reported, with the name that was probably meant."""
    with pytest.raises(ValueError) as raised:
        parse_faults(text)
    assert message in str(raised.value)


async def test_faults_strike_where_they_should(job: Client) -> None:
    """By API, scope, every n-th call and number of times; the log of calls names them."""
    job.platform.faults.add(Fault("http_503", api=LIST, scope=BIZ, every=2, times=1))
    assert [(await job.session.get(f"{job.server.url}/")).status] == [404]
    statuses = []
    for _ in range(4):
        try:
            statuses.append((await job.ask("v4", LIST, **GOOD))[0])
        except ValueError:
            statuses.append(503)
    assert statuses == [200, 503, 200, 200]
    assert [call.faults for call in job.platform.calls] == [(), ("http_503",), (), ()]
    assert [call.status for call in job.platform.calls] == statuses


BREAKING = {
    "reset_before", "reset_headers", "reset_body", "truncated", "wrong_length", "broken_chunk",
}  # fmt: skip
NOT_JSON = {
    "garbage", "html_200", "redirect", "redirect_loop", "login_redirect", "http_500", "http_502", "http_503",
    "http_504", "gzip_bomb", "gzip_nested", "deflate_raw", "unauthorized_empty", "invalid_utf8",
}  # fmt: skip
SLOW = {"drip", "blackhole", "endless"}


@pytest.mark.parametrize("name", sorted(set(FAULTS) - SLOW))
async def test_every_fault_shows(job: Client, name: str) -> None:
    """Each fault changes what a client of the list sees."""
    job.world.start(BIZ, create_time=job.now.ms - 2000)
    job.world.start(BIZ, create_time=job.now.ms - 1000)
    window: dict[str, Any] = {"create_time_start": job.now.ms - 1500, "create_time_end": job.now.ms}
    second = {**window, "create_time_start": job.now.ms - 5000, "start": 1, "length": 1}
    params = {"bk_scope_type": "biz", "bk_scope_id": "2"} | (second if name == "repeated_page" else window)
    headers = {"X-Bkapi-Authorization": json.dumps(CREDENTIALS), "X-Bk-Username": "ops01"}
    url = f"{job.server.url}/api/bk-job/prod/api/v3/system/{LIST}"

    async def ask() -> tuple[int, str | None, bytes]:
        async with job.session.get(
            url, params=params, headers=headers, allow_redirects=False, timeout=aiohttp.ClientTimeout(5)
        ) as response:
            return response.status, response.headers["Date"], await response.read()

    job.session._auto_decompress = False
    plain = await ask()
    value = 0.05 if name == "latency" else 4 if name == "gzip_bomb" else None
    job.platform.faults.add(Fault(name, value=value))
    if name in BREAKING:
        with pytest.raises(aiohttp.ClientError):
            await ask()
        assert job.platform.calls[-1].status is None
        return
    before = asyncio.get_running_loop().time()
    status, date, body = await ask()
    if name == "latency":
        assert asyncio.get_running_loop().time() - before >= 0.05
    elif name == "clock_skew":
        assert date != plain[1]
    elif name in NOT_JSON:
        with pytest.raises(ValueError):
            json.loads(body)
    else:
        assert (status, body) != (plain[0], plain[2])
    if name == "gzip_bomb":
        assert len(gzip.decompress(body)) > 4 * 2**20 > 100 * len(body)


@pytest.mark.parametrize("name", sorted(SLOW))
async def test_slow_faults(job: Client, name: str) -> None:
    """They hold the client until it gives up, and the server survives that."""
    job.platform.faults.add(Fault(name, value=0.05))
    headers = {"X-Bkapi-Authorization": json.dumps(CREDENTIALS), "X-Bk-Username": "ops01"}
    params = {"bk_scope_type": "biz", "bk_scope_id": "2"} | {key: str(value) for key, value in GOOD.items()}
    url = f"{job.server.url}/api/bk-job/prod/api/v4/system/{LIST}"

    async def read() -> None:
        async with job.session.get(url, params=params, headers=headers, timeout=aiohttp.ClientTimeout(0.3)) as response:
            async for chunk in response.content.iter_any():
                assert chunk

    with pytest.raises(TimeoutError):
        await read()
    job.platform.faults.clear()
    assert (await job.ask("v4", LIST, **GOOD))[0] == 200


async def test_control_over_http(job: Client) -> None:
    """Another process can let things happen, read the truth and the calls."""
    url = job.server.url

    async def post(action: str, **given: Any) -> dict[str, Any]:
        async with job.session.post(f"{url}/-/world/{action}", json=given) as response:
            answer: dict[str, Any] = await response.json()
            return answer

    host = {"bk_host_id": 7, "ip": "10.0.0.7", "status": 104, "exit_code": 3}
    started = await post(
        "start", bk_scope_type="biz", bk_scope_id="2", name="x", steps=[{"duration": 1, "results": [host]}]
    )
    job.now.at += 5
    async with job.session.get(f"{url}/-/ledger", params={"bk_scope_id": "2"}) as response:
        truth = await response.json()
    assert truth["finished"] == [{"task_type": "script", "launch_mode": "api", "status": "failed", "value": 1}]
    assert truth["failing"][0]["bk_host_id"] == "7"
    await post("retry", job_instance_id=started["job_instance_id"], duration=1)
    job.now.at += 5
    async with job.session.get(f"{url}/-/ledger", params={"bk_scope_id": "2", "since_ms": "0"}) as response:
        truth = await response.json()
    assert (truth["reopened"], truth["failing"]) == (1, [])
    await post("vanish", job_instance_id=started["job_instance_id"])
    await post("fault", name="http_500", api=STATUS)
    assert await job.rows() == []
    assert "did you mean" in (await post("fault", name="http_501"))["error"]
    await post("fault", clear=None)
    async with job.session.get(f"{url}/-/requests") as response:
        calls = (await response.json())["calls"]
    assert [(call["api"], call["dialect"], call["scope"]) for call in calls] == [(LIST, "v4", "biz/2")]
    assert "simulated" not in json.dumps(calls), "the log of calls holds no secret"


def test_a_simulator_that_runs_for_days_is_bounded() -> None:
    """After hours it holds no more than after half an hour, and what the sample configuration names is still there."""
    clock = Time()
    platform = create_platform(seed=1, scopes=2, speed=5, now=clock)
    nodeman = world_of(platform)
    named = set(nodeman.jobs)

    def held() -> Counter[str]:
        nodeman.advance()
        listed = sum(len(platform.job.between(scope, 0, clock.ms)) for scope in platform.scopes)
        tasks = sum(len(subscription.tasks) for subscription in nodeman.subscriptions.values())
        return Counter(
            executions=listed, records=len(platform.job.ledger.records), jobs=len(nodeman.jobs),
            subscriptions=len(nodeman.subscriptions), tasks=tasks,
        )  # fmt: skip

    sizes = []
    for _ in range(8):
        for _ in range(30):
            clock.at += 60
            size = held()
        sizes.append(size)
    for name, first in sizes[0].items():
        assert first > 50, "the traffic goes on"
        assert all(later[name] < 2 * first for later in sizes[1:]), name
    assert named <= set(nodeman.jobs)
    with pytest.raises(ValueError, match="the ledger begins at"):
        platform.job.truth(BIZ)
    assert platform.job.truth(BIZ, since_ms=platform.job.ledger.begins_ms).finished
    assert platform.calls.maxlen


def test_sample_config_and_platform() -> None:
    """The commands' platform has businesses, a set, traffic; the sample configuration names them all."""
    platform = create_platform(seed=1, scopes=2, speed=20)
    text = sample_config("http://127.0.0.1:1", platform)
    assert [str(scope) for scope in platform.scopes] == ["biz/2", "biz/3", "biz_set/9001"]
    assert text.count("bk_scope_id") == 3
    assert platform.job.truth(BIZ).created
