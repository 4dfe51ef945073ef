"""A platform with one execution on very many hosts in each scope: `python -m bench.crowd HOSTS`.

Every second host fails. GET /-/start?scope=N lets the execution of business N fail now.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator

from aiohttp import web

from bench.platform import serve

WRITE = 2**20


def rows(hosts: int, end: int) -> bytes:
    """Results as v4 sends them, without what nobody reads: about 170 bytes each."""

    def one(index: int) -> bytes:
        ip = b"10.%d.%d.%d" % (index >> 16, index >> 8 & 255, index & 255)
        code = 104 if index % 2 else 9
        return (
            b'{"execute_object":{"type":1,"resource_id":%d,"host":{"bk_host_id":%d,"bk_cloud_id":0,"ip":"%b"}},'
            b'"status":%d,"exit_code":%d,"end_time":%d}'
        ) % (1_000_000 + index, 1_000_000 + index, ip, code, index % 2, end)

    return b",".join(map(one, range(hosts)))


class Crowd:
    """The two calls of JOB v4."""

    def __init__(self, hosts: int) -> None:
        self._results = rows(hosts, int(time.time() * 1000))
        self._started: dict[int, int] = {}

    async def start(self, request: web.Request) -> web.Response:
        self._started[int(request.query["scope"])] = int(time.time() * 1000)
        return web.Response(text="started\n")

    async def list(self, request: web.Request) -> web.Response:
        scope = int(request.query["bk_scope_id"])
        at = self._started.get(scope, 0)
        begin, end = (int(request.query[f"create_time_{name}"]) for name in ("start", "end"))
        found = begin <= at <= end and request.query.get("status", "4") == "4"
        row = {
            "job_instance_id": 20_000_000_000 + scope, "job_plan_id": 1001, "name": "crowd", "launch_mode": 1,
            "status": 4, "type": 0, "create_time": at, "start_time": at, "end_time": at + 1000,
        }  # fmt: skip
        return web.json_response({"data": {"job_instance_list": [row] if found else []}})

    async def status(self, request: web.Request) -> web.StreamResponse:
        parts = list(self._status(int(request.query["bk_scope_id"])))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = sum(map(len, parts))
        await response.prepare(request)
        for part in parts:
            for begin in range(0, len(part), WRITE):
                await response.write(part[begin : begin + WRITE])
        return response

    def _status(self, scope: int) -> Iterator[bytes]:
        end = self._started[scope] + 1000
        yield b'{"data":{"job_instance":{"job_instance_id":%d,"status":4,"end_time":%d},' % (
            20_000_000_000 + scope,
            end,
        )
        yield b'"step_instance_list":[{"step_instance_id":1,"status":4,"type":1,"end_time":%d,' % end
        yield b'"step_execute_object_result_list":['
        yield self._results
        yield b"]}]}}"


async def run(hosts: int) -> None:
    crowd, app = Crowd(hosts), web.Application()
    app.router.add_get("/-/start", crowd.start)
    app.router.add_get("/{path:.*get_job_instance_list}", crowd.list)
    app.router.add_get("/{path:.*get_job_instance_status}", crowd.status)
    await serve(app)


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1])))
