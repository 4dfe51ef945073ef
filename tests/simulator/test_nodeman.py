"""The simulated NodeMan compared with the real one: shapes of real answers, traps, time, and its ledger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from exporter.model import Scope
from exporter.simulator import nodeman_api
from exporter.simulator.nodeman_ledger import NodemanLedger
from exporter.simulator.nodeman_world import (
    PLANS,
    REMOVED,
    Filtered,
    LegacyTask,
    NodemanWorld,
    Target,
    Traffic,
    make_hosts,
)
from exporter.simulator.platform import Answer, Call, Platform
from exporter.simulator.server import SimulatorServer
from exporter.simulator.traffic import Business
from tests.support.paths import FIXTURES

START = 1_795_000_020.0  # a multiple of 30 seconds
HOSTS = [Target(2, f"10.0.0.{i}", i) for i in range(1, 10)]


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = START

    def __call__(self) -> float:
        return self.at


class Asked:
    """A NodeMan to arrange and to ask over HTTP."""

    def __init__(self, clock: Time, world: NodemanWorld, url: str, session: aiohttp.ClientSession) -> None:
        self.clock = clock
        self.world = world
        self.ledger = NodemanLedger(world)
        self._url = url
        self._session = session

    async def post(self, path: str, **body: object) -> dict[str, Any]:
        answer = await self.raw("POST", f"/api/bk-nodeman/prod/system{path}", json=body)
        value = await answer.json()
        assert isinstance(value, dict)
        return value

    async def raw(self, method: str, path: str, **kwargs: Any) -> aiohttp.ClientResponse:
        credentials = {"bk_app_code": "blueking-exporter", "bk_app_secret": "simulated", "bk_username": "admin"}
        headers = {"X-Bkapi-Authorization": json.dumps(credentials), "X-Bk-Username": "admin"}
        answer = await self._session.request(method, self._url + path, headers=headers, allow_redirects=False, **kwargs)
        await answer.read()
        return answer

    async def job_list(self, **body: object) -> Any:
        return (await self.post("/api/job/job_list/", **body))["data"]

    async def details(self, job_id: int, **body: object) -> Any:
        return (await self.post(f"/api/job/{job_id}/details/", **body))["data"]

    async def result(self, subscription_id: int, **body: object) -> Any:
        return (await self.post("/backend/api/subscription/task_result/", subscription_id=subscription_id, **body))[
            "data"
        ]


@pytest.fixture
async def nodeman() -> AsyncIterator[Asked]:
    clock = Time()
    platform = Platform(now=clock, scopes=[Scope("biz", "2")])
    async with SimulatorServer(platform) as server, aiohttp.ClientSession() as session:
        yield Asked(clock, nodeman_api.world_of(platform), server.url, session)


def outline(value: object) -> object:
    """The shape of a JSON value: member names and types, the union over the items of a list; null fits anything."""
    if isinstance(value, dict):
        return {name: outline(member) for name, member in value.items()}
    if isinstance(value, list):
        return [merge([outline(item) for item in value])] if value else []
    return None if value is None else type(value).__name__


def merge(shapes: list[Any]) -> Any:
    known = [shape for shape in shapes if shape is not None]
    if not known:
        return None
    if all(isinstance(shape, dict) for shape in known):
        names = {name for shape in known for name in shape}
        return {name: merge([shape[name] for shape in known if name in shape]) for name in names}
    if all(isinstance(shape, list) for shape in known):
        items = [item for shape in known for item in shape]
        return [merge(items)] if items else []
    return known[0]


def missing(real: Any, made: Any, path: str = "") -> list[str]:
    """What of a real answer's shape a made one lacks or has in another type."""
    if isinstance(real, dict) and isinstance(made, dict):
        return [
            gap
            for name in real
            for gap in (missing(real[name], made[name], f"{path}.{name}") if name in made else [f"{path}.{name}"])
        ]
    if isinstance(real, list) and isinstance(made, list):
        return missing(real[0], made[0], f"{path}[]") if real and made else []
    return [] if real is None or made is None or real == made else [f"{path}: {real} != {made}"]


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


async def arrange_the_fixture(nodeman: Asked) -> tuple[int, int]:
    """The situation of the real-run samples: five hosts in five states, two filtered ones. Returns the ids."""
    job = nodeman.world.start_job(
        "INSTALL_AGENT",
        {HOSTS[0]: None, HOSTS[1]: "install", HOSTS[4]: REMOVED},
        duration=30,
        filtered=[Filtered(HOSTS[8], "该主机已安装", "IGNORED"), Filtered(Target(2, "10.0.0.10"), "无权限")],
    )
    slow = nodeman.world.run_task(job.subscription, {HOSTS[2]: None}, duration=9000)
    late = nodeman.world.run_task(job.subscription, {HOSTS[3]: None}, pending=9000)
    job.task_ids += [slow.id, late.id]
    nodeman.clock.at += 60
    return job.id, job.subscription.id


async def test_answers_have_the_shape_of_the_real_ones(nodeman: Asked) -> None:
    """Every member of the real-run samples exists, in the same type, in the made answers to the same questions."""
    job_id, subscription_id = await arrange_the_fixture(nodeman)
    tasks = nodeman.world.jobs[job_id].task_ids
    pairs: list[tuple[str, Callable[[], Any]]] = [
        ("nodeman_job_details__ok_pagesize2_filtered_hosts_repeat.json", lambda: nodeman.details(job_id, pagesize=-1)),
        ("nodeman_job_details__ok_pagesize0_statistics_only.json", lambda: nodeman.details(job_id, pagesize=0)),
        ("nodeman_job_list__ok.json", nodeman.job_list),
        ("nodeman_task_result__ok_return_all.json",
         lambda: nodeman.result(subscription_id, return_all=True, task_id_list=tasks)),
        ("nodeman_task_result__ok_default_is_bare_list.json",
         lambda: nodeman.result(subscription_id, task_id_list=tasks)),
        ("nodeman_task_result__ok_need_detail.json",
         lambda: nodeman.result(subscription_id, return_all=True, need_detail=True, task_id_list=tasks)),
    ]  # fmt: skip
    for name, ask in pairs:
        assert missing(outline(fixture(name)["data"]), outline(await ask())) == [], name


async def test_statistics_and_counter_of_the_real_situation(nodeman: Asked) -> None:
    """Trap 18, 22: filtered hosts count as ignored, REMOVED vanishes from statistics but not from status_counter."""
    job_id, subscription_id = await arrange_the_fixture(nodeman)
    details = await nodeman.details(job_id, pagesize=0)
    real = fixture("nodeman_job_details__ok_pagesize0_statistics_only.json")["data"]
    assert details["statistics"] == real["statistics"]
    assert (details["status"], details["total"]) == (real["status"], real["total"])
    result = await nodeman.result(subscription_id, pagesize=0, task_id_list=nodeman.world.jobs[job_id].task_ids)
    assert result["status_counter"] == fixture("nodeman_task_result__ok_return_all.json")["data"]["status_counter"]
    assert result["list"] == []


async def test_filtered_hosts_repeat_on_every_page(nodeman: Asked) -> None:
    """Trap 18: pages of executed hosts differ, the filtered ones are appended to each and stand outside total."""
    job_id, _ = await arrange_the_fixture(nodeman)
    pages = [await nodeman.details(job_id, page=page, pagesize=2) for page in (1, 2, 3, 4)]
    executed = [row["inner_ip"] for page in pages for row in page["list"] if "filter_host" not in row]
    assert executed == [f"10.0.0.{i}" for i in (2, 1, 3, 5, 4)]
    assert [sum("filter_host" in row for row in page["list"]) for page in pages] == [2, 2, 2, 2]
    assert {page["total"] for page in pages} == {5}


async def test_status_condition_as_text_matches_nothing(nodeman: Asked) -> None:
    """Trap 17: the status condition needs a list; the documents' own example finds nothing."""
    job_id, _ = await arrange_the_fixture(nodeman)
    as_list = await nodeman.details(job_id, conditions=[{"key": "status", "value": ["SUCCESS"]}])
    as_text = await nodeman.details(job_id, conditions=[{"key": "status", "value": "SUCCESS"}])
    assert [row["bk_host_id"] for row in as_list["list"]] == [1]
    assert (as_text["total"], as_text["list"]) == (0, [])


async def test_times_types_and_wrapping_cost_time(nodeman: Asked) -> None:
    """Trap 16: times carry the zone in job_details only, cost_time is text and forgets whole days."""
    job = nodeman.world.start_job("INSTALL_AGENT", {HOSTS[0]: None}, duration=26 * 3600 + 180)
    nodeman.clock.at += 27 * 3600
    details = await nodeman.details(job.id)
    assert details["cost_time"] == str(2 * 3600 + 180)
    assert details["start_time"].endswith("+0800")
    assert isinstance(details["list"][0]["cost_time"], float)
    row = (await nodeman.result(job.subscription.id))[0]
    assert "+" not in row["start_time"]


async def test_reading_details_ends_the_job(nodeman: Asked) -> None:
    """Trap 19: the row stays RUNNING after the last host until the details are read or 30 s have passed."""
    read = nodeman.world.start_job("RESTART_AGENT", {HOSTS[0]: None}, duration=40)
    unread = nodeman.world.start_job("RESTART_AGENT", {HOSTS[1]: None}, duration=40)
    nodeman.clock.at = START + 45
    assert [row["status"] for row in (await nodeman.job_list())["list"]] == ["RUNNING", "RUNNING"]
    assert (await nodeman.details(read.id))["status"] == "SUCCESS"
    rows = {row["id"]: row for row in (await nodeman.job_list())["list"]}
    assert rows[read.id]["end_time"] is not None
    assert rows[unread.id]["end_time"] is None
    nodeman.clock.at = START + 100
    rows = {row["id"]: row for row in (await nodeman.job_list())["list"]}
    assert (read.end_time, unread.end_time) == (START + 45, START + 60)
    assert rows[unread.id]["status"] == "SUCCESS"


async def test_a_task_that_is_not_ready(nodeman: Asked) -> None:
    """Trap 20: 3800015 in task_result, PENDING without instances in job_details."""
    job = nodeman.world.start_job("INSTALL_AGENT", {HOSTS[0]: None}, ready_after=50)
    nodeman.clock.at += 10
    refused = await nodeman.post("/backend/api/subscription/task_result/", subscription_id=job.subscription.id)
    assert (refused["result"], refused["code"]) == (False, 3800015)
    details = await nodeman.details(job.id)
    assert (details["status"], details["total"], details["statistics"]["total_count"]) == ("PENDING", 0, 0)


async def test_reading_too_early_ends_the_job(nodeman: Asked) -> None:
    """Over the ESB details read while the task is not ready count filtered hosts only: a job with one is a SUCCESS.

    The statistics task looks at unfinished jobs, so the row stays like that until the details are read again. The
    gateway leaves the job PENDING.
    """
    filtered = [Filtered(HOSTS[1], "该主机已安装", "IGNORED")]
    job = nodeman.world.start_job(
        "INSTALL_AGENT", {HOSTS[0]: "install"}, duration=60, ready_after=50, filtered=filtered
    )
    nodeman.clock.at += 10
    assert (await nodeman.job_list())["list"][0]["status"] == "PENDING"
    assert (await nodeman.details(job.id, pagesize=0))["status"] == "PENDING"
    credentials = {"bk_app_code": "blueking-exporter", "bk_app_secret": "simulated", "bk_username": "admin"}
    path = "/api/c/compapi/v2/nodeman/api/job/details/"
    answer = await nodeman.raw("POST", path, json={"job_id": job.id, "pagesize": 0, **credentials})
    assert (await answer.json())["data"]["status"] == "SUCCESS"
    nodeman.clock.at += 600
    assert (await nodeman.job_list())["list"][0]["status"] == "SUCCESS"
    assert (await nodeman.details(job.id, pagesize=0))["status"] == "FAILED"


async def test_shapes_of_task_result(nodeman: Asked) -> None:
    """Trap 21: a bare list by default, an object with return_all or a pagesize, an empty list past the end."""
    subscription = nodeman.world.start_subscription("INSTALL_AGENT", dict.fromkeys(HOSTS), duration=10)
    nodeman.clock.at += 100
    assert len(await nodeman.result(subscription.id)) == 9
    assert await nodeman.result(subscription.id, instance_id_list=[]) == []
    page = await nodeman.result(subscription.id, pagesize=4, page=3)
    assert (page["total"], len(page["list"])) == (9, 1)
    assert (await nodeman.result(subscription.id, pagesize=4, page=9))["list"] == []
    assert (await nodeman.result(subscription.id, return_all=True))["status_counter"] == {"SUCCESS": 9, "total": 9}
    failed = await nodeman.result(subscription.id, statuses=["FAILED"], pagesize=5)
    assert (failed["total"], failed["status_counter"]["total"]) == (0, 9)


async def test_pages_of_job_list(nodeman: Asked) -> None:
    """Trap 23: newest first; past the last page and pagesize -1 are errors, an empty first page is none."""
    assert await nodeman.job_list() == {"total": 0, "list": []}
    ids = [nodeman.world.start_job("RESTART_AGENT", {HOSTS[0]: None}).id for _ in range(5)]
    assert [row["id"] for row in (await nodeman.job_list(pagesize=2, page=2))["list"]] == ids[2:0:-1]
    for body in ({"page": 4, "pagesize": 2}, {"pagesize": -1}):
        refused = await nodeman.post("/api/job/job_list/", **body)
        assert (refused["code"], refused["errors"]) == (3800500, None)
    assert (await nodeman.post("/api/job/job_list/", page="x"))["code"] == 3800001


async def test_missing_permission(nodeman: Asked) -> None:
    """Trap 15, 23: an empty list without an error in job_list, the text code "9900403" in job_details."""
    job = nodeman.world.start_job("RESTART_AGENT", {HOSTS[0]: None}, created_by="somebody")
    nodeman.world.denied = {2}
    assert await nodeman.job_list(bk_biz_id=[2]) == {"total": 0, "list": []}
    assert (await nodeman.post(f"/api/job/{job.id}/details/"))["code"] == "9900403"
    assert "permission" in (await nodeman.post(f"/api/job/{job.id}/details/"))["data"]


async def test_a_forbidden_or_unknown_business_has_an_empty_list(nodeman: Asked) -> None:
    """As on a live 2.4.7: success and no job, whatever else the caller may see."""
    nodeman.world.start_job("RESTART_AGENT", {Target(3, "10.0.3.1", 31): None})
    nodeman.world.start_job("RESTART_AGENT", {HOSTS[0]: None}, created_by="somebody")
    nodeman.world.denied = {2}
    for biz in (2, 99):
        assert (await nodeman.job_list(bk_biz_id=[biz])) == {"total": 0, "list": []}


async def test_unknown_ids(nodeman: Asked) -> None:
    """Trap 24: unknown jobs and subscriptions are 3801012 and 3800003 under HTTP 200, the code repeated in the text."""
    refused = await nodeman.post("/api/job/999/details/")
    assert refused["code"] == 3801012
    assert "3801012" in refused["message"]
    refused = await nodeman.post("/backend/api/subscription/task_result/", subscription_id=999)
    assert refused["code"] == 3800003
    assert (await nodeman.post("/backend/api/subscription/task_result/"))["code"] == 3800001


async def test_retry_appends_a_task_and_keeps_end_time(nodeman: Asked) -> None:
    """A retry is seen in task_id_list and status; the job keeps the end of its first run."""
    job = nodeman.world.start_job("INSTALL_AGENT", {HOSTS[0]: "install", HOSTS[1]: None}, duration=20)
    nodeman.clock.at = START + 60
    before = (await nodeman.job_list())["list"][0]
    assert before["status"] == "PART_FAILED"
    nodeman.world.retry(job, {HOSTS[0]: "get_agent_status"}, duration=50)
    during = (await nodeman.job_list())["list"][0]
    assert (during["status"], during["task_id_list"][:-1]) == ("RUNNING", before["task_id_list"])
    assert (during["statistics"]["running_count"], during["statistics"]["failed_count"]) == (1, 0)
    nodeman.clock.at = START + 200
    after = (await nodeman.job_list())["list"][0]
    assert (after["status"], after["end_time"]) == ("PART_FAILED", before["end_time"])
    assert nodeman.ledger.jobs_finished(2) == {("INSTALL_AGENT", "part_failed"): 2}
    assert nodeman.ledger.host_failures(2, "nodeman_job") == {
        ("nodeman_job", "INSTALL_AGENT", "install", ""): 1,
        ("nodeman_job", "INSTALL_AGENT", "get_agent_status", ""): 1,
    }
    failing = nodeman.ledger.hosts_failing(2, "nodeman_job")
    assert (failing[HOSTS[0]].streak, failing[HOSTS[0]].since) == (2, START + 20)


async def test_retry_node_leaves_no_mark_on_the_row(nodeman: Asked) -> None:
    """A single host that runs again is seen in the details only, and reading them sets the job running again."""
    job = nodeman.world.start_job("INSTALL_AGENT", {HOSTS[0]: "install", HOSTS[1]: None}, duration=20)
    nodeman.clock.at = START + 60
    before = (await nodeman.job_list())["list"][0]
    nodeman.world.retry_node(job, HOSTS[0], duration=100)
    nodeman.clock.at = START + 100
    assert {**(await nodeman.job_list())["list"][0], "cost_time": ""} == {**before, "cost_time": ""}
    details = await nodeman.details(job.id)
    assert details["status"] == "RUNNING"
    assert {row["status"] for row in details["list"]} == {"RUNNING", "SUCCESS"}
    nodeman.clock.at = START + 200
    after = (await nodeman.job_list())["list"][0]
    assert (after["status"], after["end_time"]) == ("SUCCESS", before["end_time"])
    assert nodeman.ledger.hosts_failing(2, "nodeman_job") == {}


async def test_a_revoked_job_flaps(nodeman: Asked) -> None:
    """revoke says TERMINATED with an end at once; the statistics task then replaces it by what the hosts say."""
    job = nodeman.world.start_job("RESTART_AGENT", {HOSTS[0]: None, HOSTS[1]: None}, duration=300, pending=5)
    late = nodeman.world.run_task(job.subscription, {HOSTS[2]: None}, pending=200)
    job.task_ids.append(late.id)
    nodeman.clock.at = START + 40
    await nodeman.job_list()
    nodeman.world.revoke(job)
    row = (await nodeman.job_list())["list"][0]
    assert (row["status"], job.end_time) == ("TERMINATED", START + 40)
    nodeman.clock.at = START + 70
    row = (await nodeman.job_list())["list"][0]
    assert (row["status"], job.end_time) == ("FAILED", START + 40)

    async def steps(**body: object) -> dict[int, tuple[int, str]]:
        details = await nodeman.details(job.id, **body)
        return {row["bk_host_id"]: (row["node_id"], row["status"]) for row in details["list"]}

    # The records have failed at once, and are found by that; the sub-step that runs goes on until its end.
    found = await steps(conditions=[{"key": "status", "value": ["FAILED"]}])
    assert found == {1: (0, "RUNNING"), 2: (0, "RUNNING"), 3: (-1, "FAILED")}
    nodeman.clock.at = START + 110
    assert await steps() == {1: (-1, "FAILED"), 2: (-1, "FAILED"), 3: (-1, "FAILED")}
    assert nodeman.ledger.jobs_finished(2) == {("RESTART_AGENT", "terminated"): 1}
    assert nodeman.ledger.host_failures(2, "nodeman_job") == {
        ("nodeman_job", "RESTART_AGENT", "other", ""): 3,
    }


async def test_jobs_that_never_ran(nodeman: Asked) -> None:
    """FAILED with statistics {} if creating failed, PENDING without a task, one ignored host if nothing changes."""
    broken = nodeman.world.start_job("MAIN_INSTALL_PLUGIN", {HOSTS[0]: None}, err_msg="cmdb timeout")
    orphan = nodeman.world.start_job("MAIN_INSTALL_PLUGIN", {HOSTS[0]: None}, without_task=True)
    idle = nodeman.world.start_job("INSTALL_AGENT", {}, bk_biz_scope=[2])
    nodeman.clock.at += 3600
    rows = {row["id"]: row for row in (await nodeman.job_list())["list"]}
    assert (rows[broken.id]["status"], rows[broken.id]["statistics"]) == ("FAILED", {})
    assert rows[broken.id]["end_time"] is not None
    assert (rows[orphan.id]["status"], rows[orphan.id]["task_id_list"]) == ("PENDING", [])
    details = await nodeman.details(idle.id)
    assert (details["status"], details["statistics"]["ignored_count"], details["list"][0]["ip"]) == ("SUCCESS", 1, "")
    assert (await nodeman.post(f"/api/job/{broken.id}/details/"))["code"] == 3800014
    assert nodeman.ledger.host_failures(2, "nodeman_job") == {}


async def test_a_host_has_no_id_before_it_is_registered(nodeman: Asked) -> None:
    """bk_host_id is null until the first sub-step has ended; a host that fails in it never gets one."""
    job = nodeman.world.start_job("INSTALL_AGENT", {HOSTS[0]: None, HOSTS[1]: "add_or_update_hosts"}, duration=60)
    nodeman.clock.at = START + 5
    assert [row["bk_host_id"] for row in (await nodeman.details(job.id))["list"]] == [None, None]
    nodeman.clock.at = START + 70
    assert [row["bk_host_id"] for row in (await nodeman.details(job.id))["list"]] == [None, 1]


async def test_a_job_over_two_businesses(nodeman: Asked) -> None:
    """A job belongs to each business of its hosts, each host to its own; the ledger keeps them apart."""
    other = Target(3, "10.0.3.1", 31)
    job = nodeman.world.start_job("RESTART_AGENT", {HOSTS[0]: "restart", other: "get_agent_status"}, duration=10)
    nodeman.clock.at += 60
    for biz in (2, 3):
        rows = (await nodeman.job_list(bk_biz_id=[biz]))["list"]
        assert [(row["id"], row["bk_biz_scope"]) for row in rows] == [(job.id, [2, 3])]
        assert nodeman.ledger.jobs_finished(biz) == {("RESTART_AGENT", "failed"): 1}
    assert set(nodeman.ledger.hosts_failing(3, "nodeman_job")) == {other}


async def test_esb_paths(nodeman: Asked) -> None:
    """The ESB serves details, both spellings of task_result and 1.x; job_list is not published there (trap 23)."""
    job = nodeman.world.start_job("RESTART_AGENT", {HOSTS[0]: None})
    body = {"bk_app_code": "blueking-exporter", "bk_app_secret": "simulated", "bk_username": "admin"}
    esb = "/api/c/compapi/v2/nodeman"
    answer = await nodeman.raw("POST", f"{esb}/api/job/details/", json={**body, "job_id": job.id})
    assert (await answer.json())["data"]["job_id"] == job.id
    for path in ("subscription_task_result", "backend/api/subscription/task_result"):
        given = {**body, "subscription_id": job.subscription.id}
        answer = await nodeman.raw("POST", f"{esb}/{path}/", json=given)
        assert len((await answer.json())["data"]) == 1
    answer = await nodeman.raw("POST", f"{esb}/api/job/job_list/", json=body)
    assert answer.status == 404


async def legacy(nodeman: Asked, task: LegacyTask) -> dict[str, Any]:
    params = {
        "bk_app_code": "blueking-exporter", "bk_app_secret": "simulated", "bk_username": "admin",
        "bk_biz_id": str(task.bk_biz_id), "job_id": str(task.id),
    }  # fmt: skip
    answer = await nodeman.raw("GET", "/api/c/compapi/v2/nodeman/get_task_info/", params=params)
    value = await answer.json()
    assert isinstance(value, dict)
    return value


async def test_legacy_task(nodeman: Asked) -> None:
    """Trap 25: NodeMan 1.x has text codes and ids, counts queued hosts as running, and names no CMDB host."""
    task = nodeman.world.start_legacy_task(
        2, "INSTALL_PAGENT", {HOSTS[0]: None, HOSTS[1]: "SSH_LOGIN_TIMEOUT", HOSTS[2]: None}, duration=30, queue=20
    )
    nodeman.clock.at += 35
    answer = await legacy(nodeman, task)
    real = fixture("nodeman_v2_get_task_info__ok_running_and_queue.json")
    assert missing(outline(real["data"]), outline(answer["data"])) == []
    assert answer["code"] == "OK"
    assert [host["status"] for host in answer["data"]["hosts"]] == ["SUCCESS", "RUNNING", "QUEUE"]
    assert answer["data"]["status_count"] == {"running_count": 2, "failed_count": 0, "success_count": 1}
    nodeman.clock.at += 100
    answer = await legacy(nodeman, task)
    assert answer["data"]["hosts"][1]["err_code"] == "SSH_LOGIN_TIMEOUT"
    assert nodeman.ledger.host_failures(2, "nodeman_task") == {
        ("nodeman_task", "INSTALL_PAGENT", "other", "SSH_LOGIN_TIMEOUT"): 1
    }


async def test_removed_legacy_route(nodeman: Asked) -> None:
    """Trap 25: on NodeMan 2.x the route is an HTML 404, which the ESB turns into 1306201 under HTTP 200."""
    task = nodeman.world.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: None})
    nodeman.world.legacy = False
    assert (await legacy(nodeman, task))["code"] == 1306201


async def test_service_instances_and_old_engines(nodeman: Asked) -> None:
    """Service instances come without steps; an older engine sends create_time and no step_code in its sub-steps."""
    service = Target(2, "", 5, ipv6="fd00::5", service_id=55)
    subscription = nodeman.world.start_subscription(
        "MAIN_INSTALL_PLUGIN", {service: "install_package", HOSTS[0]: None}, old_engine=True, plugin_name="redis"
    )
    nodeman.clock.at += 100
    host, instance = await nodeman.result(subscription.id)
    real = fixture("nodeman_task_result__ok_service_instance_no_steps_ipv6.json")["data"]["list"][0]
    assert missing(outline(real), outline(instance)) == []
    assert (instance["status"], instance["steps"]) == ("FAILED", [])
    sub_step = host["steps"][0]["target_hosts"][0]["sub_steps"][0]
    assert "step_code" not in sub_step
    assert "create_time" in sub_step


async def test_language(nodeman: Asked) -> None:
    """Trap 29: display texts follow the language of the caller, step codes do not."""
    subscription = nodeman.world.start_subscription("INSTALL_AGENT", {HOSTS[0]: None})
    headers = {"X-Bkapi-Authorization": json.dumps({"bk_app_code": "blueking-exporter", "bk_app_secret": "simulated"})}
    async with aiohttp.ClientSession() as session:
        texts = []
        for language in ("zh-cn", "en"):
            url = f"{nodeman._url}/api/bk-nodeman/prod/system/backend/api/subscription/task_result/"
            given = {**headers, "Blueking-Language": language, "X-Bk-Username": "admin"}
            async with session.post(url, json={"subscription_id": subscription.id}, headers=given) as answer:
                step = (await answer.json())["data"][0]["steps"][0]["target_hosts"][0]["sub_steps"][2]
                texts.append((step["step_code"], step["node_name"]))
    assert texts == [("install", "安装"), ("install", "Install")]


async def test_ten_thousand_instances(nodeman: Asked) -> None:
    """A subscription of 10,000 instances is made and summarised at once, and read in pages of 500."""
    hosts = {host: "install_package" if i % 100 == 0 else None for i, host in enumerate(make_hosts(2, 10_000))}
    subscription = nodeman.world.start_subscription("MAIN_INSTALL_PLUGIN", hosts, duration=60, jitter=0.9)
    nodeman.clock.at += 600
    summary = await nodeman.result(subscription.id, pagesize=0)
    assert summary["status_counter"] == {"FAILED": 100, "SUCCESS": 9900, "total": 10_000}
    page = await nodeman.result(subscription.id, pagesize=500, page=20)
    assert len(page["list"]) == 500
    assert len({*(row["instance_id"] for row in page["list"])}) == 500


def test_traffic_is_the_same_for_the_same_seed_and_any_steps_of_the_clock() -> None:
    """What happens depends on the seed and not on how often somebody looks."""

    def truth(seed: int, looks: int) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str, str, str]]]:
        clock = Time()
        world = NodemanWorld(clock, seed)
        Traffic(world, {2: make_hosts(2, 40)}, START)
        for i in range(looks):
            clock.at = START + 86_400 * (i + 1) / looks
            world.advance()
        ledger = NodemanLedger(world)
        return ledger.jobs_finished(2), ledger.host_failures(2, "nodeman_job")

    finished, failures = truth(7, 1)
    assert truth(7, 500) == (finished, failures)
    assert truth(8, 1) != (finished, failures)
    assert {job_type for job_type, _ in finished} == set(PLANS)
    assert {status for _, status in finished} >= {"success", "failed", "part_failed", "terminated"}


def test_a_populated_platform_has_something_to_watch() -> None:
    """The traffic runs on the hosts of JOB, so that failures join by id, and names a policy and a task of 1.x."""
    clock = Time()
    platform = Platform(seed=3, now=clock, scopes=[Scope("biz", "2"), Scope("biz", "3"), Scope("biz_set", "9001")])
    traffic = nodeman_api.populate(platform)
    world = nodeman_api.world_of(platform)
    assert set(traffic.policies) == set(traffic.legacy) == {2, 3}
    assert traffic.policies[2].id in world.subscriptions
    assert traffic.legacy[3].id in world.legacy_tasks
    of_job = {host.bk_host_id for host in Business(platform.job, Scope("biz", "2")).hosts}
    assert {target.bk_host_id for target in NodemanLedger(world).hosts_failing(2, "nodeman_job")} <= of_job


@pytest.mark.parametrize("seed", range(3))
def test_who_looks_often_enough_sees_what_the_ledger_says(seed: int) -> None:
    """Counting by hand from the answers alone gives the ledger's ends, failures and failing hosts."""
    clock = Time()
    platform = Platform(seed=seed, now=clock, scopes=[Scope("biz", "2")])
    world = nodeman_api.world_of(platform)
    Traffic(world, {2: make_hosts(2, 40)}, START, every=120)
    api = nodeman_api.NodemanApi(world)

    def ask(handler: Callable[[Call], Answer], **params: object) -> Any:
        body = handler(Call("x", "gateway", True, "POST", "/", {}, params, "zh", clock.at, user="admin")).body
        assert isinstance(body, dict)
        return body["data"]

    status: dict[int, str] = {}
    ends: Counter[str] = Counter()
    failed: dict[tuple[int, str], tuple[str, str]] = {}
    failures = 0
    newest: dict[str, tuple[str, bool]] = {}
    unfinished = ("PENDING", "RUNNING")
    settling: set[int] = set()
    while clock.at < START + 2 * 3600:
        clock.at += 5
        for row in ask(api.job_list, pagesize=1000)["list"]:
            # Not while PENDING: reading then may end the job, see test_reading_too_early_ends_the_job.
            moving = status.get(row["id"], "PENDING") in unfinished or row["id"] in settling
            if row["status"] != "PENDING" and moving:
                details = ask(api.job_details, job_id=row["id"], pagesize=-1)
                settling.discard(row["id"])
                for host in details["list"]:
                    if host["status"] == "RUNNING" and details["status"] not in unfinished:
                        settling.add(row["id"])  # revoked, with a sub-step that has not ended
                    if host.get("filter_host") or host["end_time"] is None or host["status"] == REMOVED:
                        continue
                    key, run = (row["id"], host["instance_id"]), (host["end_time"], host["start_time"])
                    if failed.get(key) != run and host["status"] == "FAILED":
                        failures += 1
                    failed[key] = run
                    if host["end_time"] >= newest.get(host["ip"], ("", False))[0]:
                        newest[host["ip"]] = host["end_time"], host["status"] == "FAILED"
        for row in ask(api.job_list, pagesize=1000)["list"]:
            if status.get(row["id"], "PENDING") in unfinished and row["status"] not in unfinished:
                ends[row["job_type"]] += 1
            status[row["id"]] = row["status"]
    ledger = NodemanLedger(world)
    finished = ledger.jobs_finished(2)
    # By type only: TERMINATED is replaced within half a minute, so that even this observer can miss it.
    assert ends == {kind: sum(n for (job_type, _), n in finished.items() if job_type == kind) for kind in ends}
    assert ends.total() == finished.total()
    assert failures == sum(ledger.host_failures(2, "nodeman_job").values())
    truth = ledger.hosts_failing(2, "nodeman_job")
    assert {ip for ip, (_, fails) in newest.items() if fails} == {nodeman_api.long_address(t) for t in truth}
