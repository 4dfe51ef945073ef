"""A platform on which many executions ended while nobody looked: `python -m bench.history EXECUTIONS MINUTES`.

At first its clock is so many minutes behind, and there are no executions. GET /-/return sets the clock right: the
executions have ended between the two moments.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from bisect import bisect_left, bisect_right
from email.utils import formatdate
from itertools import islice

import msgspec
from aiohttp import web

from bench.platform import scopes, serve

MARGIN = 60.0
"""Seconds without executions after the one moment and before the other."""
PLANS = 50


class History:
    """The list of executions of JOB v4, for one scope."""

    def __init__(self, count: int, minutes: float) -> None:
        self.behind = minutes * 60
        # The first poll of an exporter comes before the first of them.
        first, span = time.time() - self.behind + MARGIN, self.behind - 2 * MARGIN
        self._created: list[int] = []  # Unix milliseconds
        self._rows: list[bytes] = []
        self._statuses: list[int] = []
        chance, (scope,) = random.Random(1), scopes(1)
        for number in range(count):
            created = int((first + span * number / count) * 1000)
            length = chance.randrange(1_000, 20_000)
            plan = chance.randrange(PLANS)
            status = chance.choice((3, 3, 3, 3, 3, 3, 3, 3, 3, 5))
            row = {
                "bk_biz_id": int(scope.bk_scope_id), "bk_scope_type": scope.bk_scope_type,
                "bk_scope_id": scope.bk_scope_id, "job_instance_id": 20_000_000_000 + number,
                "job_plan_id": 1_000_000 + plan, "job_template_id": plan, "name": f"业务-部署 web-{plan} 发布",
                "operator": f"admin{plan}", "launch_mode": 1 + plan % 3, "status": status, "start_time": created,
                "end_time": created + length, "total_time": length, "create_time": created, "type": 0,
            }  # fmt: skip
            self._created.append(created)
            self._rows.append(msgspec.json.encode(row))
            self._statuses.append(status)

    async def list(self, request: web.Request) -> web.Response:
        query = request.query
        now = time.time() - self.behind
        begin, end = (int(query.get(f"create_time_{edge}", now * 1000)) for edge in ("start", "end"))
        newest, oldest = bisect_right(self._created, min(end, now * 1000)), bisect_left(self._created, begin)
        matching = range(newest - 1, oldest - 1, -1)
        found = (
            index for index in matching if query.get("status", str(self._statuses[index])) == str(self._statuses[index])
        )
        offset = int(query.get("offset", 0))
        rows = b",".join(self._rows[index] for index in islice(found, offset, offset + int(query.get("length", 10))))
        body = b'{"data":{"job_instance_list":[' + rows + b"]}}"
        return web.Response(body=body, content_type="application/json", headers={"Date": formatdate(now, usegmt=True)})

    async def come_back(self, request: web.Request) -> web.Response:
        self.behind = 0.0
        return web.Response(text="returned\n")


async def run(count: int, minutes: float) -> None:
    history, app = History(count, minutes), web.Application()
    app.router.add_get("/-/return", history.come_back)
    app.router.add_get("/{path:.*get_job_instance_list}", history.list)
    await serve(app)


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]), float(sys.argv[2])))
