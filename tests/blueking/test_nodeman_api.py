"""The NodeMan calls: every sample answer, what goes over the wire, every odd form of values, broken answers."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from exporter.blueking.client import Client, Deadline
from exporter.blueking.envelope import Reply, WrongShape, read
from exporter.blueking.nodeman import PAGE_SIZE, NodemanApi
from exporter.blueking.nodeman_jobs import JobDetails, JobPage, Statistics, job_details_decoders, job_list_decoders
from exporter.blueking.nodeman_legacy import LegacyTask, NodemanLegacyApi
from exporter.blueking.nodeman_subscriptions import SubStep, TaskResult, task_result_decoders
from exporter.blueking.steps import step_slug
from exporter.blueking.values import host, seconds, status_slug
from exporter.clock import Clock
from exporter.config.schema import Auth, BlueKing, LegacyPlatform, NodemanPlatform
from exporter.config.secret import Secret
from exporter.errors import API_REASONS, ApiError
from exporter.log import get
from exporter.model import Host, Scope
from exporter.simulator import nodeman_api as simulated
from exporter.simulator.nodeman_world import PLANS, REMOVED, Filtered, NodemanWorld, Target
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from tests.support.paths import FIXTURES

SAMPLES: dict[str, dict[str, Any]] = {
    sample["file"]: sample
    for sample in json.loads((FIXTURES / "nodeman_manifest.json").read_text(encoding="utf-8"))["samples"]
}
CHINA = datetime.timezone(datetime.timedelta(hours=8))
NINE = 1795395600  # 2026-11-23 09:00:00+08:00


class Silent:
    """An observer that does not listen."""

    def api_request(self, api: str, code: str, seconds: float) -> None: ...

    def api_retry(self, api: str) -> None: ...

    def throttled(self, seconds: float) -> None: ...

    def inflight(self, delta: int) -> None: ...

    def quota(self, api: str, remaining: float) -> None: ...

    def skew(self, seconds: float) -> None: ...


class Asker:
    """The APIs over a real client, with a deadline for each call."""

    def __init__(self, client: Client, clock: Clock, url: str, api: str = "gateway", app_type: bool = True) -> None:
        self._clock = clock
        scope_client = client.for_scope(Scope("biz", "2"))
        self.nodeman = NodemanApi(
            scope_client, NodemanPlatform(url=url, api="esb" if api == "esb" else "gateway", app_type=app_type), CHINA
        )
        self.legacy = NodemanLegacyApi(scope_client, LegacyPlatform(url=url), CHINA)

    @property
    def deadline(self) -> Deadline:
        return Deadline(5.0, self._clock)

    async def list(self, **given: Any) -> JobPage:
        return await self.nodeman.job_list(deadline=self.deadline, **given)

    async def details(self, job_id: int = 187, **given: Any) -> JobDetails:
        return await self.nodeman.job_details(job_id, deadline=self.deadline, **given)

    async def result(self, subscription_id: int = 11, **given: Any) -> TaskResult:
        given = {"with_steps": lambda instance: True, **given}
        return await self.nodeman.task_result(subscription_id, deadline=self.deadline, **given)

    async def task(self, bk_biz_id: int = 2, job_id: int = 187) -> LegacyTask:
        return await self.legacy.get_task_info(bk_biz_id, job_id, deadline=self.deadline)


@asynccontextmanager
async def asking(url: str, **given: Any) -> AsyncIterator[Asker]:
    auth = Auth(
        app_code="blueking-exporter",
        app_secret=Secret("simulated"),
        username="admin",
        access_token=Secret("simulated-access-token") if given.get("app_type") is False else None,
    )
    clock = Clock()
    config = BlueKing(auth=auth, requests_per_second=10_000.0)
    async with Client(config, clock, Silent(), get()) as client:
        yield Asker(client, clock, url, **given)


class Canned:
    """A server that gives one answer to everything and remembers what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.headers: Mapping[str, str] = {}
        self.body = b""
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.asked.append((request.method, request.path, json.loads(body) if body else dict(request.query)))
        return web.Response(status=self.status, headers=dict(self.headers), body=self.body)

    def says(self, data: object) -> None:
        self.body = json.dumps({"result": True, "code": 0, "message": "", "data": data}).encode()


@pytest.fixture
async def canned() -> AsyncIterator[Canned]:
    answers = Canned()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answers.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    answers.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield answers
    await runner.cleanup()


async def ask(asker: Asker, file: str) -> object:
    """The call that the sample answers."""
    if "job_list" in file:
        return await asker.list()
    if "task_result" in file:
        return await asker.result()
    if "get_task_info" in file:
        return await asker.task()
    body = json.loads((FIXTURES / file).read_bytes() or b"{}")
    return await asker.details((body.get("data") or {}).get("job_id", 187))


REFUSALS = {
    "nodeman__error_302_login_redirect_empty_body.txt": ("auth", ""),
    "nodeman__error_http200_not_authenticated.json": ("auth", "3800401"),
    "nodeman_job_details__error_http200_bad_param.json": ("api_error", "3800001"),
    "nodeman_job_details__error_http200_no_permission_string_code.json": ("permission", "9900403"),
    "nodeman_job_details__error_http200_not_exist.json": ("not_found", "3801012"),
    "nodeman_job_details__error_http200_unexpected.json": ("api_error", "3800500"),
    "nodeman_task_result__error_http200_missing_param.json": ("api_error", "3800001"),
    "nodeman_task_result__error_http200_no_task.json": ("not_found", "3800003"),
    "nodeman_v2_get_task_info__error_object_not_exist.json": ("api_error", "OBJECT_NOT_EXIST"),
    "nodeman_v2_get_task_info__route_removed_in_nodeman2_html_404.html": ("not_found", ""),
}
NOT_ASKED = {name for name in SAMPLES if "check_task_ready" in name or "subscription_statistic" in name}
ANSWERS = sorted(set(SAMPLES) - set(REFUSALS) - NOT_ASKED)


def test_every_sample_is_in_one_of_the_tables() -> None:
    """A sample that is added must be read by a test here."""
    files = {path.name for path in FIXTURES.glob("nodeman_*") if path.name != "nodeman_manifest.json"}
    assert files == set(SAMPLES)
    assert set(REFUSALS) <= set(SAMPLES)
    assert len(ANSWERS) == 21


@pytest.mark.parametrize("file", sorted(REFUSALS))
async def test_F11_samples_of_refusals(canned: Canned, file: str) -> None:
    """Each sample of a failure has the reason that the contract gives it, also under HTTP 200 and with a text code."""
    sample = SAMPLES[file]
    canned.status, canned.headers = sample["http_status"], sample["headers"]
    canned.body = (FIXTURES / file).read_bytes()
    async with asking(canned.url) as asker:
        with pytest.raises(ApiError) as caught:
            await ask(asker, file)
    assert (caught.value.reason, caught.value.code) == REFUSALS[file]


@pytest.mark.parametrize("file", ANSWERS)
async def test_samples_of_answers(canned: Canned, file: str) -> None:
    """Each sample of an answer decodes, and what it counts and identifies is what stands in it."""
    canned.body = (FIXTURES / file).read_bytes()
    data = json.loads(canned.body)["data"]
    async with asking(canned.url) as asker:
        value = await ask(asker, file)
    if isinstance(value, JobPage):
        assert (value.total, len(value.rows)) == (data["total"], len(data["list"]))
        for job, row in zip(value.rows, data["list"], strict=True):
            assert job is not None
            assert job.id == row["id"]
            assert (job.status, list(job.task_ids)) == (row["status"].lower(), row["task_id_list"])
            assert (job.statistics is None) == (row["statistics"] == {})
            assert list(job.bk_biz_ids) == row["bk_biz_scope"]
    elif isinstance(value, JobDetails):
        assert (value.job.id, value.total) == (data["job_id"], data["total"])
        assert value.job.statistics == Statistics(
            **{name.removesuffix("_count"): count for name, count in data["statistics"].items()}
        )
        ids = [row.host.bk_host_id if row.host else "" for row in value.hosts]
        assert ids == [str(row["bk_host_id"] or "") for row in data["list"]]
        assert [row.filtered for row in value.hosts] == ["filter_host" in row for row in data["list"]]
    elif isinstance(value, TaskResult):
        rows = data if isinstance(data, list) else data["list"]
        assert [instance.instance_id for instance in value.instances] == [row["instance_id"] for row in rows]
        assert [instance.status for instance in value.instances] == [row["status"].lower() for row in rows]
        if isinstance(data, list):
            assert value.counter is None
        else:
            assert value.counter is not None
            assert sum(value.counter.values()) == data["status_counter"]["total"]
            assert value.total == data["total"]
    else:
        assert isinstance(value, LegacyTask)
        assert (value.id, value.bk_biz_id, len(value.hosts)) == (data["id"], int(data["bk_biz_id"]), data["host_count"])
        assert value.status_count["running"] == data["status_count"]["running_count"]
        assert value.os_count == data["os_count"]


async def test_trap16_times_with_and_without_zone_are_the_same_moment(canned: Canned) -> None:
    """Trap 16: job_details writes +0800, task_result the local time; the wrapping cost_time is not read."""
    async with asking(canned.url) as asker:
        canned.body = (
            FIXTURES / "nodeman_job_details__ok_finished_part_failed_cost_time_wraps_at_one_day.json"
        ).read_bytes()
        details = await asker.details()
        canned.body = (FIXTURES / "nodeman_task_result__ok_need_detail.json").read_bytes()
        result = await asker.result()
    row = next(row for row in details.hosts if row.host and row.host.bk_host_id == "2")
    assert row.end_time == NINE + 30
    assert (result.instances[0].start_time, result.instances[0].finish_time) == (NINE, NINE + 30)
    assert details.job.start_time is not None
    assert details.job.end_time is not None
    assert details.job.end_time - details.job.start_time == 26 * 3600 + 3 * 60 + 11


async def test_a_failed_instance_names_its_step(canned: Canned) -> None:
    """The failed sub-step is named by its code in task_result and found by its text in job_details; -1 names none."""
    async with asking(canned.url) as asker:
        canned.body = (FIXTURES / "nodeman_task_result__ok_need_detail.json").read_bytes()
        (instance,) = (await asker.result()).instances
        canned.body = (FIXTURES / "nodeman_job_details__ok_host_not_registered_yet.json").read_bytes()
        details = await asker.details()
    assert (instance.failure, instance.job_type) == (("INSTALL_AGENT", "install"), "INSTALL_AGENT")
    assert [step.status for step in instance.steps or ()] == ["success", "success", "failed", "pending", "pending"]
    steps = {
        (row.host.bk_host_id or row.host.ip): row.step(details.job)
        for row in details.hosts
        if row.host and not row.filtered
    }
    assert steps == {
        "10.0.0.5": "other",
        "4": "other",
        "3": "install",
        "2": "install",
        "1": "other",
    }


async def test_a_service_instance_takes_the_host_of_its_service(canned: Canned) -> None:
    """A row without steps and without bk_host_id in its host has the id that stands with the service, and IPv6."""
    canned.body = (FIXTURES / "nodeman_task_result__ok_service_instance_no_steps_ipv6.json").read_bytes()
    async with asking(canned.url) as asker:
        (instance,) = (await asker.result()).instances
    assert instance.host == Host("0", "5", "fd00::5")
    assert (instance.failure, instance.job_type, instance.bk_biz_id) == (("", "other"), "", 2)


WIRE = [
    ("gateway", True, "/system", {}),
    ("gateway", False, "", {}),
    ("esb", True, "/api/c/compapi/v2/nodeman", {"bk_app_code": "blueking-exporter", "bk_username": "admin"}),
]


@pytest.mark.parametrize(("api", "app_type", "prefix", "credentials"), WIRE)
async def test_paths_and_parameters(
    canned: Canned, api: str, app_type: bool, prefix: str, credentials: dict[str, str]
) -> None:
    """Trap 17: each call goes to the path of its dialect, filters are lists in capitals, absent ones are left out."""
    async with asking(canned.url, api=api, app_type=app_type) as asker:
        canned.says({"total": 0, "list": []})
        await asker.list(bk_biz_id=2, statuses=["running"], pagesize=100)
        await asker.result(11, task_ids=[101], statuses=["failed"], page=3, pagesize=500)
        canned.says({"job_id": 187, "status": "RUNNING", "list": []})
        await asker.details(187, statuses=["failed"], page=2, pagesize=50)
        await asker.details(187)
    asked = [
        (method, path, {name: value for name, value in body.items() if name != "bk_app_secret"})
        for method, path, body in canned.asked
    ]
    conditions = [{"key": "status", "value": ["FAILED"]}]
    details, job = f"{prefix}/api/job/187/details/", {}
    if api == "esb":
        details, job = f"{prefix}/api/job/details/", {"job_id": 187}
    assert asked == [
        ("POST", f"{prefix}/api/job/job_list/",
         {"bk_biz_id": [2], "status": ["RUNNING"], "page": 1, "pagesize": 100, **credentials}),
        ("POST", f"{prefix}/backend/api/subscription/task_result/",
         {"subscription_id": 11, "task_id_list": [101], "statuses": ["FAILED"], "page": 3, "pagesize": 500,
          **credentials}),
        ("POST", details, {"conditions": conditions, "page": 2, "pagesize": 50, **job, **credentials}),
        ("POST", details, {"page": 1, "pagesize": 0, **job, **credentials}),
    ]  # fmt: skip


async def test_legacy_path(canned: Canned) -> None:
    """get_task_info is a GET of the ESB with the ids in the query."""
    canned.body = (FIXTURES / "nodeman_v2_get_task_info__ok_running_and_queue.json").read_bytes()
    async with asking(canned.url) as asker:
        task = await asker.task(2, 187)
    method, path, query = canned.asked[0]
    assert (method, path) == ("GET", "/api/c/compapi/v2/nodeman/get_task_info/")
    assert (query["bk_biz_id"], query["job_id"], query["bk_username"]) == ("2", "187", "admin")
    assert [(row.host, row.status, row.err_code) for row in task.hosts][:2] == [
        (Host("218", "", "10.1.0.43"), "queue", ""),
        (Host("218", "", "10.1.0.44"), "running", ""),
    ]
    assert task.status_count == {"running": 2, "failed": 0, "success": 1}
    assert task.start_time == seconds("2018-12-05 21:20:20+08:00", datetime.UTC, "")


async def test_a_page_larger_than_500_is_refused(canned: Canned) -> None:
    """Nobody can ask for everything at once by mistake: -1 and more than 500 rows never reach the platform."""
    async with asking(canned.url) as asker:
        for pagesize in (-1, PAGE_SIZE + 1):
            with pytest.raises(ValueError, match="500 are allowed"):
                await asker.result(11, pagesize=pagesize)
    assert canned.asked == []


JOB_ROW = {"id": 187, "job_type": "INSTALL_AGENT", "status": "RUNNING"}


@pytest.mark.parametrize(
    ("member", "value", "field", "expected"),
    [
        ("id", "17", "id", 17),
        ("task_id_list", ["1", 2], "task_ids", (1, 2)),
        ("task_id_list", {}, "task_ids", ()),
        ("task_id_list", None, "task_ids", ()),
        ("bk_biz_scope", ["2"], "bk_biz_ids", (2,)),
        ("statistics", {}, "statistics", None),
        ("statistics", [], "statistics", None),
        ("statistics", None, "statistics", None),
        ("statistics", {"failed_count": "3", "total_count": 3.0}, "statistics", Statistics(0, 0, 0, 3, 0, 3)),
        ("start_time", "2026-11-23 09:00:00", "start_time", NINE),
        ("start_time", "2026-11-23T01:00:00Z", "start_time", NINE),
        ("start_time", NINE * 1000, "start_time", NINE),
        ("start_time", str(NINE), "start_time", NINE),
        ("start_time", "", "start_time", None),
        ("start_time", None, "start_time", None),
        ("status", "NEW_WORD", "status", "new_word"),
        ("status", 12, "status", "12"),
        ("cost_time", {"odd": []}, "id", 187),
    ],
)
async def test_F12_F13_F14_forms_of_values(
    canned: Canned, member: str, value: object, field: str, expected: object
) -> None:
    """Numbers as text, empty objects for lists, null, unknown words and every form of time are read."""
    canned.says({"total": "1", "list": [{**JOB_ROW, member: value}]})
    async with asking(canned.url) as asker:
        page = await asker.list()
    assert getattr(page.rows[0], field) == expected
    assert page.total == 1


@pytest.mark.parametrize("rows", [{}, [], None])
async def test_F12_empty_lists(canned: Canned, rows: object) -> None:
    """`{}`, `[]` and null are an empty list in each of the four answers."""
    canned.says({**JOB_ROW, "total": 0, "list": rows, "hosts": rows, "status_counter": {"total": 0}})
    async with asking(canned.url) as asker:
        assert (await asker.list()).rows == ()
        assert (await asker.details()).hosts == ()
        assert (await asker.result()).instances == ()
        assert (await asker.task()).hosts == ()


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"list": [{"status": "RUNNING"}]}, "data.list[0].id"),
        ({"list": [JOB_ROW, {"id": 1}]}, "data.list[1].status"),
        ({"list": [{**JOB_ROW, "start_time": "yesterday"}]}, "data.list[0].start_time"),
        ({"list": [{**JOB_ROW, "task_id_list": ["x"]}]}, "task_id_list"),
        ({"list": [{**JOB_ROW, "id": "seven"}]}, "data.list[0].id"),
        ({"list": [{**JOB_ROW, "id": 1.5}]}, "data.list[0].id"),
        ({"list": "none"}, "list"),
        ({"total": 3}, "list"),
        (None, "data"),
        ([], "data"),
    ],
)
async def test_F12_anything_else_is_decode(canned: Canned, data: object, path: str) -> None:
    """What cannot be read is a decode error that names the path, never an empty list."""
    canned.says(data)
    async with asking(canned.url) as asker:
        with pytest.raises(ApiError, match="HTTP 200") as caught:
            await asker.list()
    assert caught.value.reason == "decode"
    assert path in str(caught.value)


STEPS = [{"type": "AGENT", "action": "INSTALL_AGENT", "target_hosts": [{"sub_steps": [{"step_code": "install"}]}]}]
INSTANCE = {"record_id": 7, "instance_id": "host|instance|host|2", "status": "FAILED", "steps": STEPS}


def instance_with(place: str, member: str, value: object) -> dict[str, Any]:
    """An instance with one member changed, in itself or in its sub-step."""
    row: dict[str, Any] = json.loads(json.dumps(INSTANCE))
    (row["steps"][0]["target_hosts"][0]["sub_steps"][0] if place == "step" else row)[member] = value
    return row


TIMES = [
    ("2026-11-23 09:00:00", NINE),
    ("2026-11-23 09:00:00.999999", NINE),
    ("2026-11-23 01:00:00+0000", NINE),
    ("2026-11-23T01:00:00Z", NINE),
    ("20260101T090000", NINE - 326 * 86400),
    (NINE, NINE),
    (NINE * 1000, NINE),
    (str(NINE), NINE),
    ("", None),
    (None, None),
]


@pytest.mark.parametrize("place", ["instance", "step"])
@pytest.mark.parametrize(("time", "expected"), TIMES)
async def test_F14_forms_of_times_in_instances(canned: Canned, place: str, time: object, expected: int | None) -> None:
    """A time of an instance and of its sub-steps may have every form; one odd row does not change the others."""
    usual = {**INSTANCE, "start_time": "2026-11-23 09:00:00"}
    canned.says({"total": 2, "list": [instance_with(place, "start_time", time), usual]})
    async with asking(canned.url) as asker:
        odd, other = (await asker.result()).instances
    (step,) = odd.steps or ()
    assert (step.start_time if place == "step" else odd.start_time) == expected
    assert (odd.record_id, odd.status, odd.job_type, step.step) == (7, "failed", "INSTALL_AGENT", "install")
    assert (other.start_time, other.status) == (NINE, "failed")


HOST_ROW = {
    "instance_id": "host|instance|host|2",
    "bk_host_id": 2,
    "bk_cloud_id": 0,
    "status": "FAILED",
    "step": "安装",
}


@pytest.mark.parametrize(("time", "expected"), TIMES)
async def test_F14_forms_of_times_in_details(canned: Canned, time: object, expected: int | None) -> None:
    """A time of a job and of its hosts may have every form; one odd row does not change the others."""
    usual = {**HOST_ROW, "end_time": "2026-11-23 09:00:00+0800"}
    canned.says({**JOB_ROW, "start_time": time, "list": [{**HOST_ROW, "end_time": time}, usual]})
    async with asking(canned.url) as asker:
        details = await asker.details()
    odd, other = details.hosts
    assert (details.job.start_time, odd.end_time) == (expected, expected)
    assert (odd.status, odd.step(details.job), odd.host) == ("failed", "install", Host("0", "2", ""))
    assert (other.end_time, details.total) == (NINE, 2)


@pytest.mark.parametrize(
    ("member", "value", "field", "expected"),
    [
        ("bk_host_id", "5", "host", Host("0", "5", "")),
        ("bk_host_id", 5.0, "host", Host("0", "5", "")),
        ("bk_host_id", None, "host", None),
        ("inner_ipv6", "fd00::5", "host", Host("0", "2", "fd00::5")),
        ("bk_cloud_id", "218", "host", Host("218", "2", "")),
        ("bk_biz_id", "2", "bk_biz_id", 2),
        ("bk_biz_id", "two", "bk_biz_id", None),
        ("status", "NEW_WORD", "status", "new_word"),
        ("status", 12, "status", "12"),
        ("node_id", -1, "step", "other"),
        ("node_id", "-1", "step", "other"),
        ("node_id", None, "step", "install"),
        ("step", None, "step", "other"),
        ("instance_id", None, "instance_id", ""),
        ("filter_host", True, "filtered", True),
        ("filter_host", None, "filtered", False),
        ("cost_time", {"odd": []}, "filtered", False),
    ],
)
async def test_F12_F13_forms_of_values_in_host_rows(
    canned: Canned, member: str, value: object, field: str, expected: object
) -> None:
    """Numbers as text and whole floats, null and unknown words are read."""
    canned.says({**JOB_ROW, "total": "1", "list": [{**HOST_ROW, member: value}]})
    async with asking(canned.url) as asker:
        details = await asker.details()
    row = details.hosts[0]
    assert (row.step(details.job) if field == "step" else getattr(row, field)) == expected
    assert details.total == 1


@pytest.mark.parametrize(
    ("display", "step"),
    [
        ("安装 失败", "install"),
        ("Install failed", "install"),
        ("执行成功", "other"),
        ("Succeed", "other"),
        ("安装 成功", "other"),
        ("", "install"),
        (None, "install"),
        ({"odd": []}, "install"),
    ],
)
async def test_a_step_that_succeeded_is_not_the_one_that_failed(canned: Canned, display: object, step: str) -> None:
    """4.3: with two steps in a subscription the platform names the last sub-step of the first and says it succeeded."""
    succeeded = {**HOST_ROW, "status": "SUCCESS", "status_display": "执行成功"}
    canned.says({**JOB_ROW, "list": [{**HOST_ROW, "status_display": display}, succeeded]})
    async with asking(canned.url) as asker:
        details = await asker.details()
    assert [row.step(details.job) for row in details.hosts] == [step, "install"]


async def test_the_second_step_of_an_instance_names_its_own_action(canned: Canned) -> None:
    """4.3: the action and the sub-step that failed belong together, whichever step of the subscription they are in."""
    row = json.loads(json.dumps(INSTANCE))
    row["steps"][0]["target_hosts"][0]["sub_steps"][0]["status"] = "SUCCESS"
    row["steps"].append({
        "type": "PLUGIN", "action": "MAIN_INSTALL_PLUGIN",
        "target_hosts": [{"sub_steps": [{"node_name": "下发安装包", "status": "FAILED"}]}],
    })  # fmt: skip
    canned.says({"total": 1, "list": [row]})
    async with asking(canned.url) as asker:
        (instance,) = (await asker.result()).instances
    assert instance.job_type == "INSTALL_AGENT"
    assert instance.failure == ("MAIN_INSTALL_PLUGIN", "transfer_package")


@pytest.mark.parametrize(
    ("time", "expected"),
    [(1e30, 10**12), ("9" * 30, 10**12), (10**30, 10**12), (-1e30, None), (0, None), (-5, None), ("-7", "decode"),
     ("1970-01-01 08:00:00+0800", None), ("9999-12-31 23:59:59+0800", 253402271999)],
)  # fmt: skip
async def test_F66_times_beyond_every_calendar(canned: Canned, time: object, expected: object) -> None:
    """0 and less are no time (4.1.11); what is too late for a calendar still fits into a state."""
    canned.says({"total": 1, "list": [{**JOB_ROW, "end_time": time}]})
    async with asking(canned.url) as asker:
        if expected == "decode":
            with pytest.raises(ApiError, match="end_time is no time"):
                await asker.list()
        else:
            (job,) = (await asker.list()).rows
            assert job is not None
            assert job.end_time == expected


@pytest.mark.parametrize("number", [2**63, 10**30, str(2**63), "9" * 30, 1e30])
async def test_F66_ids_of_more_than_64_bits(canned: Canned, number: float | str) -> None:
    """The row is left out of the page and named, the others are read; other ids of a row become none."""
    canned.says({"total": 2, "list": [{**JOB_ROW, "id": number}, JOB_ROW]})
    async with asking(canned.url) as asker:
        page = await asker.list()
        assert ([job and job.id for job in page.rows], page.total) == ([None, 187], 2)
        canned.says({"total": 1, "list": [{**INSTANCE, "record_id": number, "task_id": number}]})
        (instance,) = (await asker.result()).instances
        assert (instance.record_id, instance.task_id) == (None, None)
        canned.says({**JOB_ROW, "list": [{**HOST_ROW, "bk_host_id": number, "inner_ip": "10.0.0.1"}]})
        assert (await asker.details()).hosts[0].host == Host("0", "", "10.0.0.1")


async def test_4_1_14_what_was_not_asked_for_is_decode(canned: Canned) -> None:
    """Jobs of another business, a job or a task with another id: the call fails."""
    async with asking(canned.url) as asker:
        canned.says({"total": 2, "list": [JOB_ROW, {**JOB_ROW, "id": 188, "bk_biz_scope": [3]}]})
        assert len((await asker.list()).rows) == 2
        for asked, text in (({"bk_biz_id": 2}, "other businesses"), ({"job_ids": [187]}, "job 188")):
            with pytest.raises(ApiError, match=text) as caught:
                await asker.list(**asked)
            assert caught.value.reason == "decode"
        canned.says({**JOB_ROW, "list": []})
        with pytest.raises(ApiError, match="job_details of job 188 gives job 187") as caught:
            await asker.details(188)
        assert caught.value.reason == "decode"
        canned.says({"total": 1, "list": [{**INSTANCE, "task_id": 5}], "status_counter": {"FAILED": 1}})
        assert (await asker.result(task_ids=[4, 5])).total == 1
        for wanted, text in (({"task_ids": [4]}, "task 5"), ({"instance_ids": ["host|instance|host|3"]}, "instances")):
            with pytest.raises(ApiError, match=text) as caught:
                await asker.result(**wanted)
            assert caught.value.reason == "decode"
        canned.body = (FIXTURES / "nodeman_v2_get_task_info__ok_running_and_queue.json").read_bytes()
        task = await asker.task()
        for biz, number in ((3, task.id), (2, task.id + 1)):
            with pytest.raises(ApiError, match="get_task_info of task") as caught:
                await asker.task(biz, number)
            assert caught.value.reason == "decode"


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"list": [HOST_ROW, {**HOST_ROW, "status": None}]}, "data.list[1].status"),
        ({"list": [HOST_ROW, {**HOST_ROW, "status": ""}]}, "data.list[1].status"),
        ({"list": [HOST_ROW, {**HOST_ROW, "end_time": "yesterday"}]}, "data.list[1].end_time"),
        ({"list": [HOST_ROW, {**HOST_ROW, "end_time": "2026-02-30 09:00:00+0800"}]}, "data.list[1].end_time"),
        ({"list": [HOST_ROW, {**HOST_ROW, "inner_ip": 5}]}, "data.list[1].inner_ip"),
        ({"id": None}, "data.id"),
        ({"status": None}, "data.status"),
        ({"end_time": "yesterday"}, "data.end_time"),
    ],
)
async def test_F12_unusual_details_are_decode(canned: Canned, data: dict[str, object], path: str) -> None:
    """A host row that cannot be read is reported while its page is decoded, with its path, though read later."""
    canned.says({**JOB_ROW, "list": [], **data})
    async with asking(canned.url) as asker:
        with pytest.raises(ApiError) as caught:
            await asker.details()
    assert caught.value.reason == "decode"
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("row", "path"),
    [
        (instance_with("instance", "status", None), "data.list[1].status"),
        (instance_with("instance", "status", ""), "data.list[1].status"),
        (instance_with("instance", "status", []), "data.list[1].status"),
        (instance_with("instance", "finish_time", "yesterday"), "data.list[1].finish_time"),
        (instance_with("step", "finish_time", "yesterday"), "data.list[1].steps.finish_time"),
        (instance_with("step", "start_time", "2026-02-30 09:00:00"), "data.list[1].steps.start_time"),
        (instance_with("step", "node_name", 5), "data.list[1].steps[0].target_hosts[0].sub_steps[0].node_name"),
    ],
)
async def test_F12_an_unusual_instance_is_decode(canned: Canned, row: dict[str, Any], path: str) -> None:
    """An instance that cannot be read is reported while its page is decoded, with its path, though read later."""
    canned.says({"total": 2, "list": [INSTANCE, row]})
    async with asking(canned.url) as asker:
        with pytest.raises(ApiError) as caught:
            await asker.result()
    assert caught.value.reason == "decode"
    assert path in str(caught.value)


async def test_steps_are_read_of_the_instances_that_are_asked_for(canned: Canned) -> None:
    """What is odd in the sub-steps of another one harms nobody."""
    odd = {**instance_with("step", "finish_time", "yesterday"), "record_id": 8}
    canned.says({"total": 2, "list": [INSTANCE, odd]})
    async with asking(canned.url) as asker:
        first, second = (await asker.result(with_steps=lambda instance: instance.record_id == 7)).instances
        assert (first.steps, second.steps) == ((SubStep("INSTALL_AGENT", "install", "unknown", None, None),), None)
        assert (first.failure[1], second.job_type) == ("other", "INSTALL_AGENT")
        assert [row.steps for row in (await asker.nodeman.task_result(11, deadline=asker.deadline)).instances] == [
            None, None,
        ]  # fmt: skip


@pytest.mark.parametrize("asked", [True, False])
def test_instances_do_not_keep_the_answer(asked: bool) -> None:
    """Megabytes of sub-steps that nobody asked for are not kept by the rows that they came with."""
    body = bytearray(json.dumps({"data": {"total": 1, "list": [INSTANCE]}}).encode())
    kept = read(Reply(200, body, {}), task_result_decoders(CHINA, lambda instance: asked))
    body.clear()  # which is a BufferError while anything refers to it
    assert kept.instances[0].job_type == "INSTALL_AGENT"


@pytest.mark.parametrize("nothing", [[], {}, None])
@pytest.mark.parametrize("place", ["steps", "target_hosts", "sub_steps"])
async def test_F12_no_sub_steps(canned: Canned, place: str, nothing: object) -> None:
    """`{}`, `[]`, null and nothing at all are no sub-steps, wherever they stand."""
    rows: list[dict[str, Any]] = json.loads(json.dumps([INSTANCE, INSTANCE]))
    owners = rows
    if place != "steps":
        owners = [row["steps"][0] for row in rows]
    if place == "sub_steps":
        owners = [step["target_hosts"][0] for step in owners]
    owners[0][place] = nothing
    del owners[1][place]
    canned.says({"total": 2, "list": rows})
    async with asking(canned.url) as asker:
        assert [instance.steps for instance in (await asker.result()).instances] == [(), ()]


@pytest.mark.parametrize("odd", [5, "none", True, {"sub_steps": []}, [[]]])
async def test_F12_unusual_hosts_of_a_step_are_decode(canned: Canned, odd: object) -> None:
    """What should be the hosts of a step and is none is reported with its path."""
    canned.says({"total": 1, "list": [{**INSTANCE, "steps": [{}, {"target_hosts": odd}]}]})
    async with asking(canned.url) as asker:
        with pytest.raises(ApiError, match=r"data\.list\[0\]\.steps\[1\]\.target_hosts") as caught:
            await asker.result()
    assert caught.value.reason == "decode"


ODD_TEXT = st.one_of(
    st.text().map(lambda text: json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")[1:-1]),
    st.text(st.sampled_from("ab\ud800\udbff\udc00\udfff\\")).map(lambda text: json.dumps(text)[1:-1].encode()),
    st.binary().map(lambda text: bytes(byte for byte in text if byte > 0x1F and byte not in b'"\\')),
)


@given(st.lists(ODD_TEXT).map(b"".join))
def test_F05_unusual_text_in_a_sub_step_is_repaired(text: bytes) -> None:
    """Invalid UTF-8 and lone surrogates, which show only when the sub-steps are read, cost a character each."""
    row = json.dumps(instance_with("step", "status", "TEXT")).encode().replace(b"TEXT", text)
    body = b'{"result": true, "data": {"total": 1, "list": [' + row + b"]}}"
    (instance,) = read(Reply(200, body, {}), task_result_decoders(CHINA, lambda instance: True)).instances
    (step,) = instance.steps or ()
    assert step.step == "install"
    assert step.status == status_slug(json.loads(b'"' + text.decode("utf-8", "replace").encode() + b'"'))


@pytest.mark.parametrize(
    "body",
    [
        b"\x00\xff random",
        b"<html><body>login</body></html>",
        b'{"result": true, "code": 0, "data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"result": true, "code": 0, "data": {"total": ' + b"9" * 5000 + b', "list": []}}',
        b'{"result": true, "code": 0, "data": {"total": NaN, "list": []}}',
        b'{"result": true, "code": 0, "data": {"total": 1e400, "list": []}}',
    ],
)
async def test_F04_F08_broken_answers(canned: Canned, body: bytes) -> None:
    """Random bytes, a login page under 200, deep nesting and monstrous numbers are decode errors of every call."""
    canned.body = body
    async with asking(canned.url) as asker:
        for call in (asker.list(), asker.details(), asker.result(), asker.task()):
            with pytest.raises(ApiError) as caught:
                await call
            assert caught.value.reason == "decode"


@pytest.mark.parametrize("code", [3800015, "3800015"])
async def test_trap20_not_ready(canned: Canned, code: object) -> None:
    """Trap 20: 3800015 is `not_ready`, as number and as text."""
    canned.body = json.dumps({"result": False, "code": code, "data": None, "message": "x", "errors": None}).encode()
    async with asking(canned.url) as asker:
        with pytest.raises(ApiError) as caught:
            await asker.result()
    assert caught.value.reason == "not_ready"


@given(st.one_of(st.none(), st.integers(), st.floats(), st.text()))
def test_F14_any_time_is_read_or_refused(value: float | str | None) -> None:
    """A time is whole seconds, nothing, or a wrong shape; no other error gets out."""
    try:
        result = seconds(value, CHINA, "x")
    except WrongShape:
        return
    assert result is None or isinstance(result, int)


@pytest.mark.parametrize("text", ["1970-01-01 00:00:01+0000", "9999-12-31 23:59:59+0800", "2016-02-29 12:00:00"])
def test_F14_unusual_years(text: str) -> None:
    """The first and the last year and a leap day are times like others."""
    assert isinstance(seconds(text, CHINA, "x"), int)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 5, "10.0.0.5"), Host("0", "5", "10.0.0.5")),
        (("218", None, "10.1.0.43"), Host("218", "", "10.1.0.43")),
        ((0, "5", "", None, "fd00::5"), Host("0", "5", "fd00::5")),
        ((0, 5, "10.0.0.5,10.9.9.9"), Host("0", "5", "10.0.0.5")),
        ((0, 0, "10.0.0.5"), Host("0", "", "10.0.0.5")),
        ((None, -1, None), None),
    ],
)
def test_hosts(arguments: tuple[Any, ...], expected: Host | None) -> None:
    """The first address that is not empty counts, an id that is no positive number does not; without both nobody."""
    assert host(*arguments) == expected


def reason_of(body: bytes, form: str) -> str:
    """Why the answer cannot be read, "" if it can."""
    try:
        decoders = task_result_decoders(CHINA, lambda instance: True) if form == "task_result" else getattr(API, form)
        answer = read(Reply(200, body, {}), decoders)
    except ApiError as error:
        return error.reason
    if isinstance(answer, JobDetails):
        for row in answer.hosts:
            assert row.status
            assert row.host is None or row.host.identity
            assert all(value is None or isinstance(value, int) for value in (row.bk_biz_id, row.end_time))
            assert len(row.instance_id) <= 256
            assert len(row.step(answer.job)) <= 64
            assert isinstance(row.filtered, bool)
    if isinstance(answer, TaskResult):
        for instance in answer.instances:  # which are read only now
            assert instance.status
            assert instance.steps is not None
            assert instance.failure[1] in {"other", *(step.step for step in instance.steps)}
            assert instance.host is None or instance.host.identity
            read_too = (instance.task_id, instance.record_id, instance.bk_biz_id, instance.start_time)
            assert all(value is None or isinstance(value, int) for value in (*read_too, instance.finish_time))
            assert len(instance.instance_id) <= 256
            assert len(instance.job_type) <= 64
    return ""


@given(st.binary(max_size=200), st.sampled_from(["_job_list", "_job_details", "task_result"]))
def test_F50_any_bytes_raise_only_api_errors(body: bytes, form: str) -> None:
    """Any bytes as an answer give an ApiError with a reason of the closed set."""
    for text in (body, b'{"result":true,"code":0,"data":' + body + b"}"):
        assert reason_of(text, form) in {"", *API_REASONS}


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from([
                "list", "total", "status_counter", "id", "job_id", "status", "statistics", "task_id_list", "steps",
                "instance_info", "host", "bk_host_id", "start_time", "sub_steps", "target_hosts", "filter_host",
            ]),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=30,
)  # fmt: skip


@given(JSON, st.sampled_from(["_job_list", "_job_details", "task_result"]))
def test_F50_any_json_raises_only_api_errors(data: object, form: str) -> None:
    """Any JSON under the right member names is read, or is an ApiError."""
    body = json.dumps({"result": True, "code": 0, "data": data}).encode()
    assert reason_of(body, form) in {"", "decode"}


def _unconnected() -> NodemanApi:
    client = Client(BlueKing(auth=Auth(app_code="x")), Clock(), Silent(), get())
    return NodemanApi(client.for_scope(None), NodemanPlatform(url="http://nowhere.invalid"), CHINA)


API = _unconnected()


@asynccontextmanager
async def simulator() -> AsyncIterator[tuple[NodemanWorld, str, list[float]]]:
    now = [1_795_000_020.0]
    platform = Platform(now=lambda: now[0], scopes=[Scope("biz", "2")])
    async with SimulatorServer(platform) as server:
        yield simulated.world_of(platform), server.url, now


HOSTS = [Target(2, f"10.0.0.{i}", i) for i in range(1, 1300)]


@pytest.mark.parametrize(
    ("api", "app_type", "base"),
    [("gateway", True, "/api/bk-nodeman/prod"), ("gateway", False, "/api/bk-nodeman/prod"), ("esb", True, "")],
)
async def test_against_the_simulator(api: str, app_type: bool, base: str) -> None:
    """All calls work over HTTP on the gateway, its app-type twin and the ESB; only the ESB has no job_list."""
    async with simulator() as (world, url, now), asking(url + base, api=api, app_type=app_type) as asker:
        filtered = [Filtered(HOSTS[9], "x", "IGNORED")]
        job = world.start_job(
            "INSTALL_AGENT", {HOSTS[0]: None, HOSTS[1]: "install", HOSTS[2]: REMOVED}, duration=60, filtered=filtered
        )
        now[0] += 70
        details = await asker.details(job.id, pagesize=500)
        assert (details.job.status, details.total) == ("part_failed", 3)
        assert details.job.start_time == 1_795_000_020
        assert details.job.statistics == Statistics(0, 0, 1, 1, 1, 3)
        rows = {row.host: row for row in details.hosts if row.host}
        assert rows[Host("0", "2", "10.0.0.2")].step(details.job) == "install"
        assert [row.filtered for row in details.hosts] == [False, False, False, True]
        result = await asker.result(job.subscription.id, pagesize=500)
        assert result.counter == {"success": 1, "failed": 1, "removed": 1}
        assert [row.failure[1] for row in result.instances if row.status == "failed"] == ["install"]
        if api == "esb":
            with pytest.raises(ApiError) as caught:
                await asker.list(bk_biz_id=2)
            assert caught.value.reason == "not_found"
        else:
            page = await asker.list(bk_biz_id=2)
            (listed,) = page.rows
            assert listed is not None
            assert (listed.id, listed.status, listed.bk_biz_ids) == (job.id, "part_failed", (2,))


@pytest.mark.parametrize("job_type", sorted(PLANS))
async def test_trap29_every_step_is_found_by_its_text(job_type: str) -> None:
    """Trap 29: where an older engine sends no step_code, the display name gives the same slug, in both languages."""
    async with simulator() as (world, url, now), asking(f"{url}/api/bk-nodeman/prod") as asker:
        plugin = job_type.endswith("PLUGIN")
        for step in PLANS[job_type]:
            assert step_slug(None, step.en, plugin=plugin) == step.code
            outcome = {HOSTS[0]: step.code}
            old = world.start_subscription(job_type, outcome, old_engine=True)
            job = world.start_job(job_type, outcome, old_engine=True)
            now[0] += 100
            (instance,) = (await asker.result(old.id, pagesize=10)).instances
            details = await asker.details(job.id, pagesize=10)
            (row,) = details.hosts
            assert (instance.failure[1], row.step(details.job)) == (step.code, step.code)


async def test_pages_cover_a_large_subscription() -> None:
    """Pages of 500 hold every instance once; the page after the last is empty and no error."""
    async with simulator() as (world, url, now), asking(f"{url}/api/bk-nodeman/prod") as asker:
        subscription = world.start_subscription("MAIN_INSTALL_PLUGIN", dict.fromkeys(HOSTS))
        now[0] += 100
        assert (await asker.result(subscription.id)).instances == ()
        pages = [await asker.result(subscription.id, page=page, pagesize=PAGE_SIZE) for page in (1, 2, 3, 4)]
        assert [len(page.instances) for page in pages] == [500, 500, 299, 0]
        assert len({row.instance_id for page in pages for row in page.instances}) == len(HOSTS)
        assert {page.total for page in pages} == {len(HOSTS)}


async def test_trap23_past_the_end_and_no_permission() -> None:
    """Trap 23: job_list past its last page is code 3800500; without permission the list is empty."""
    async with simulator() as (world, url, _), asking(f"{url}/api/bk-nodeman/prod") as asker:
        world.start_job("RESTART_AGENT", {HOSTS[0]: None}, created_by="somebody")
        with pytest.raises(ApiError) as caught:
            await asker.list(page=2)
        assert (caught.value.reason, caught.value.code) == ("api_error", "3800500")
        world.denied = {2}
        assert await asker.list(bk_biz_id=2) == JobPage((), 0)


async def test_trap25_the_removed_route() -> None:
    """Trap 25: on NodeMan 2.x get_task_info ends as code 1306201 of the ESB, which is retried and then http_5xx."""
    async with simulator() as (world, url, now), asking(url) as asker:
        task = world.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: "SSH_LOGIN_TIMEOUT"})
        now[0] += 100
        (row,) = (await asker.task(2, task.id)).hosts
        assert (row.status, row.err_code, row.step) == ("failed", "SSH_LOGIN_TIMEOUT", "other")
        world.legacy = False
        with pytest.raises(ApiError) as caught:
            await asker.task(2, task.id)
        assert (caught.value.reason, caught.value.code) == ("http_5xx", "1306201")


JOB_ANSWERS = sorted(file.name for file in FIXTURES.glob("nodeman_job_*__ok*.json"))


@pytest.mark.parametrize("file", JOB_ANSWERS)
def test_recorded_answers_have_the_usual_form(file: str) -> None:
    """The decoder of the usual form reads what the platform sends, and as the decoder of all other forms does."""
    usual, odd = (job_list_decoders if "job_list" in file else job_details_decoders)(CHINA)
    body = (FIXTURES / file).read_bytes()
    assert _values(usual.read(body)) == _values(odd.read(body))


def _values(answer: JobPage | JobDetails) -> list[object]:
    """Every value of an answer."""
    jobs = answer.rows if isinstance(answer, JobPage) else (answer.job,)
    found: list[object] = [answer.total]
    for job in jobs:
        assert job
        found += [job.id, job.job_type, job.status, job.start_time, job.end_time, job.statistics]
        found += [job.task_ids, job.subscription_id, job.bk_biz_ids]
    if isinstance(answer, JobDetails):
        for row in answer.hosts:
            found += [row.filtered, row.instance_id, row.host, row.bk_biz_id, row.status, row.end_time]
            found.append(row.step(answer.job))
    return found


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"start_time": "soon"}, "data.list[1].start_time is no time"),
        ({"status": ""}, "data.list[1].status is missing"),
        ({"id": "x"}, "data.list[1].id is no integer"),
        ({"task_id_list": 7}, "data.list[1].task_id_list"),
    ],
)
def test_a_bad_job_is_named_by_its_place(changed: dict[str, object], expected: str) -> None:
    """Also where all other rows have the usual form."""
    answer = json.loads((FIXTURES / "nodeman_job_list__ok.json").read_bytes())
    row = answer["data"]["list"][0]
    answer["data"]["list"] = [row, {**row, **changed}]
    body = json.dumps(answer).encode()
    with pytest.raises(ApiError, match=re.escape(expected)):
        read(Reply(200, body, {}), job_list_decoders(CHINA))
