"""The user that the backend sees, behind a gateway that reads the user from X-Bkapi-Authorization only."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest

from exporter.blueking.client import Client, Deadline
from exporter.blueking.job import JobApi
from exporter.blueking.nodeman import NodemanApi
from exporter.clock import Clock
from exporter.config.schema import Auth, JobPlatform, NodemanPlatform, ScopeAuth
from exporter.config.secret import Secret
from exporter.errors import ApiError
from exporter.model import Scope
from exporter.simulator.nodeman_api import populate, world_of
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from tests.support import upstream

BIZ = Scope("biz", "2")
OTHER = Scope("biz", "3")
APP = {"bk_app_code": "blueking-exporter", "bk_app_secret": "simulated"}
NAMED = {**APP, "bk_username": "ops01"}


@pytest.fixture
async def simulator() -> AsyncIterator[SimulatorServer]:
    platform = Platform(scopes=[BIZ, OTHER])
    populate(platform, history=600.0)
    async with SimulatorServer(platform) as server:
        yield server


class Row(msgspec.Struct):
    """A line of the table: what is sent, how the platform is set, and whom JOB and the others take for the user."""

    credentials: dict[str, str]
    header: str
    job: str
    others: str
    platform: dict[str, bool] = {}


TABLE = {
    "no bk_username": Row(APP, "", job="", others=""),
    "X-Bk-Username only": Row(APP, "ops01", job="ops01", others=""),
    "bk_username only": Row(NAMED, "", job="ops01", others="ops01"),
    "both": Row(NAMED, "ops01", job="ops01", others="ops01"),
    "skip_user_verification": Row(NAMED, "ops01", job="ops01", others="", platform={"skips_user_verification": True}),
    "skip_user_verification, no header": Row(NAMED, "", job="", others="", platform={"skips_user_verification": True}),
    "beside a bad token": Row({**NAMED, "bk_token": "bad"}, "ops01", job="ops01", others=""),
    "from_username: false": Row(NAMED, "ops01", job="ops01", others="", platform={"takes_bk_username": False}),
    "old JOB, X-Bk-Username only": Row(APP, "ops01", job="", others="", platform={"job_reads_header": False}),
    "old JOB, bk_username only": Row(NAMED, "", job="ops01", others="ops01", platform={"job_reads_header": False}),
    "old JOB, both": Row(NAMED, "ops01", job="ops01", others="ops01", platform={"job_reads_header": False}),
}


@pytest.mark.parametrize("row", TABLE)
async def test_the_user_of_an_app_type_call(simulator: SimulatorServer, row: str) -> None:
    """JOB answers 401 without one; NodeMan lists nothing, with success, and fails to show details."""
    given, platform = TABLE[row], simulator.platform
    for name, value in given.platform.items():
        setattr(platform, name, value)
    headers = {"X-Bkapi-Authorization": json.dumps(given.credentials), "X-Bk-Username": given.header}

    async def ask(path: str, **arguments: Any) -> tuple[int, Any]:
        url = f"{simulator.url}/api/{path}"
        async with session.request(arguments.pop("method", "POST"), url, headers=headers, **arguments) as response:
            return response.status, json.loads(await response.read())

    async with aiohttp.ClientSession() as session:
        window = {"bk_scope_type": "biz", "bk_scope_id": "2", "create_time_start": "1", "create_time_end": "2"}
        path = "bk-job/prod/api/v4/system/get_job_instance_list"
        status, body = await ask(path, method="GET", params=window)
        assert (status, body.get("code")) == ((200, None) if given.job else (401, 1247002))
        assert platform.calls[-1].user == given.job
        _, body = await ask("bk-nodeman/prod/system/api/job/job_list/", json={"bk_biz_id": [2]})
        assert (body["code"], bool(body["data"]["list"])) == (0, bool(given.others))
        assert platform.calls[-1].user == given.others
        job_id = next(job.id for job in world_of(platform).jobs.values() if job.bk_biz_scope == (2,) and job.end_time)
        _, body = await ask(f"bk-nodeman/prod/system/api/job/{job_id}/details/", json={})
        assert body["code"] == (0 if given.others else 3800500)


class Apis:
    """Both APIs for one scope, asked as the exporter asks."""

    def __init__(self, client: Client, url: str, auth: ScopeAuth | None = None, scope: Scope = BIZ) -> None:
        asking = client.for_scope(scope, auth)
        self.scope = scope
        self.job = JobApi(asking, JobPlatform(f"{url}/api/bk-job/prod"))
        self.nodeman = NodemanApi(asking, NodemanPlatform(f"{url}/api/bk-nodeman/prod"), client.config.timezone)

    async def list_executions(self) -> None:
        now = int(time.time() * 1000)
        await self.job.list(self.scope, now - 1000, now, deadline=Deadline(5, Clock()))

    async def count_jobs(self) -> int:
        biz = int(self.scope.bk_scope_id)
        return len((await self.nodeman.job_list(bk_biz_id=biz, deadline=Deadline(5, Clock()))).rows)


@contextlib.asynccontextmanager
async def asking(**auth: Any) -> AsyncIterator[Client]:
    given = Auth("blueking-exporter", Secret("simulated"), "ops01")
    async with upstream.client(auth=msgspec.structs.replace(given, **auth)) as client:
        yield client


@pytest.mark.parametrize("token", [{}, {"bk_token": Secret("bad")}, {"access_token": Secret("bad")}])
async def test_the_exporter_is_taken_for_its_user_everywhere(
    simulator: SimulatorServer, token: dict[str, Secret]
) -> None:
    """It sends the name in both places and never a token beside it, whatever the configuration has for other calls."""
    async with asking(**token) as client:
        apis = Apis(client, simulator.url)
        for reads_header in (True, False):
            simulator.platform.job_reads_header = reads_header
            await apis.list_executions()
            assert await apis.count_jobs() > 0
    assert {call.user for call in simulator.platform.calls} == {"ops01"}


async def test_without_a_user_job_says_so_and_nodeman_does_not(simulator: SimulatorServer) -> None:
    """A gateway that drops the name, and a JOB that reads no header."""
    simulator.platform.takes_bk_username = False
    simulator.platform.job_reads_header = False
    async with asking() as client:
        apis = Apis(client, simulator.url)
        with pytest.raises(ApiError) as caught:
            await apis.list_executions()
        assert (caught.value.reason, caught.value.code) == ("auth", "1247002")
        assert await apis.count_jobs() == 0


async def test_a_scope_asks_with_its_own_user_and_tenant(simulator: SimulatorServer) -> None:
    """Each call carries those of its scope, or those of blueking.auth; a wrong tenant is a missing permission."""
    simulator.platform.tenants = {BIZ: "t2", OTHER: "t0"}
    async with asking(tenant_id="t0") as client:
        own = Apis(client, simulator.url, ScopeAuth("ops02", "t2"))
        inherited = Apis(client, simulator.url, ScopeAuth(), OTHER)
        await own.list_executions()
        assert await own.count_jobs() > 0
        await inherited.list_executions()
        told = [(call.scope, call.user, call.tenant_id) for call in simulator.platform.calls if call.scope]
        with pytest.raises(ApiError) as caught:
            await Apis(client, simulator.url, ScopeAuth(None, "t3")).list_executions()
    assert told == [("biz/2", "ops02", "t2"), ("biz/3", "ops01", "t0")]
    assert (caught.value.reason, caught.value.code) == ("permission", "1640302")
    assert simulator.platform.calls[-1].tenant_id == "t3"
