"""A platform that has one answer: for each scope a page of executions that have just ended. `python -m bench.pages`.

The first unfiltered question of a scope finds nothing, so that a baseline is empty; the next poll finds all rows new,
and those after it find them known.
"""

from __future__ import annotations

import asyncio
import json
import random
from email.utils import formatdate

from aiohttp import web

from bench.platform import serve

ROWS = 199
"""One less than a full page of v4, so that it is the last."""


LATENCY = 0.05
"""Seconds that the platform takes, as a real one does: answers come one by one."""


def rows(count: int, newest: int, first_id: int, seed: int = 1) -> list[dict[str, object]]:
    """Executions as JOB v4 lists them, newest first, all ended."""
    chance = random.Random(seed)
    listed: list[dict[str, object]] = []
    for index in range(count):
        created = newest - 5 * index
        length = chance.randrange(1, 5)
        listed.append(
            {
                "bk_biz_id": 2,
                "bk_scope_type": "biz",
                "bk_scope_id": "2005005123",
                "job_instance_id": first_id - index,
                "job_plan_id": chance.randrange(1, 10**6),
                "job_template_id": chance.randrange(10**6),
                "name": f"业务-部署 web-{chance.randrange(10_000)} 发布",
                "operator": f"admin{chance.randrange(100)}",
                "launch_mode": chance.randrange(1, 4),
                "status": chance.choice((3, 3, 3, 3, 5)),
                "start_time": created,
                "end_time": created + length,
                "total_time": length,
                "create_time": created,
                "type": chance.randrange(3),
            }
        )
    return listed


def body(listed: list[dict[str, object]]) -> bytes:
    """Compact, as a Java server writes it."""
    return json.dumps({"data": {"job_instance_list": listed}}, ensure_ascii=False, separators=(",", ":")).encode()


async def run() -> None:
    asked: dict[str, int] = {}
    pages: dict[str, bytes] = {}

    async def listing(request: web.Request) -> web.Response:
        scope, end = request.query["bk_scope_id"], int(request.query.get("create_time_end", 1_700_000_000_000))
        await asyncio.sleep(LATENCY)
        found = body([])
        if "status" not in request.query:
            asked[scope] = asked.get(scope, 0) + 1
            if asked[scope] > 1 or "fresh" in request.query:
                if scope not in pages:
                    # Rows of another scope than the one asked for would be refused.
                    listed = rows(ROWS, end - 10, 20_000_000_000)
                    pages[scope] = body([{**row, "bk_biz_id": int(scope), "bk_scope_id": scope} for row in listed])
                found = pages[scope]
        return web.Response(body=found, content_type="application/json", headers={"Date": formatdate(usegmt=True)})

    app = web.Application()
    for infix in ("", "/system"):
        app.router.add_get(f"/api/v4{infix}/get_job_instance_list", listing)
    await serve(app)


if __name__ == "__main__":
    asyncio.run(run())
