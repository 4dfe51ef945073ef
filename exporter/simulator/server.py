"""The simulated platform over HTTP. Beside the vendor's paths it serves those of control.py."""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from email.utils import formatdate
from types import TracebackType
from typing import Self

from aiohttp import web

from exporter.model import Scope
from exporter.simulator import api, cmdb_api, control, faults, gateway, nodeman_api, nodemgr_api
from exporter.simulator.faults import Fault
from exporter.simulator.platform import Answer, Call, Endpoint, Platform

PLATFORM = web.AppKey("platform", Platform)
KEPT = 600.0
"""Seconds for which the commands keep ended executions and jobs, besides the history that they start with."""
CALLS = 2_000
"""How many calls the log keeps."""


ROUTES: tuple[Callable[[Platform], Iterable[Endpoint]], ...] = (
    api.routes,
    nodeman_api.routes,
    nodemgr_api.routes,
    cmdb_api.routes,
)
"""The modules that serve the routes."""


def create_app(platform: Platform) -> web.Application:
    """All routes of this platform, as one application."""
    app = web.Application(client_max_size=10 * 2**20)
    app[PLATFORM] = platform
    for provide in ROUTES:
        for endpoint in provide(platform):
            paths = {endpoint.path, endpoint.path.rstrip("/")}
            for path in sorted(paths if endpoint.path.endswith("/") else {endpoint.path, endpoint.path + "/"}):
                for method in endpoint.methods:
                    app.router.add_route(method, path, _handler(platform, endpoint))
    control.add_routes(app, platform)
    app.router.add_route("*", "/api/c/compapi/{path:.*}", _unknown_component)
    app.router.add_route("*", "/api/{gateway}/{stage}/{path:.*}", _unknown_resource)
    return app


def _handler(platform: Platform, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        given = {**request.query, **await _body(request)}
        call = Call(
            endpoint.api, endpoint.dialect, endpoint.app_type, request.method, request.path, dict(request.match_info),
            {name: value for name, value in given.items() if name not in gateway.CREDENTIALS},
            "en" if request.headers.get("Blueking-Language", "").startswith("en") else "zh",
            platform.now(),
        )  # fmt: skip
        call.tenant_id = request.headers.get("X-Bk-Tenant-Id", "")
        call.faults = platform.faults.choose(call.api, call.scope, call.params)
        logged = platform.log(call)
        for fault in call.faults:
            if fault.name == "latency":
                await asyncio.sleep(fault.seconds(1))
        answer = await _answer(platform, endpoint, request, call, given)
        response = await _send(platform, request, call, answer)
        logged.user, logged.tenant_id = call.user, call.tenant_id
        logged.status = None if response.status == faults.UNANSWERED else response.status
        if isinstance(response, web.Response) and isinstance(response.body, bytes):
            logged.nbytes = len(response.body)
        return response

    return handle


async def _answer(
    platform: Platform, endpoint: Endpoint, request: web.Request, call: Call, given: Mapping[str, object]
) -> Answer:
    for fault in call.faults:
        if (instead := _replacement(platform, fault, request, call)) is not None:
            return instead
    refused = gateway.authenticate(platform, call, request.headers, request.cookies, given)
    limited, quota = gateway.limit(platform, call)
    answer = refused or limited
    if answer is None:
        made = endpoint.handler(call)
        answer = await made if inspect.isawaitable(made) else made
        if call.dialect == "esb":
            answer = gateway.esb_wrap(platform, call, answer)
    answer.headers.update(quota)
    return answer


def _replacement(platform: Platform, fault: Fault, request: web.Request, call: Call) -> Answer | None:
    if fault.name.startswith("rate_limited"):
        if call.dialect == "esb":
            return gateway.esb_error(platform, 1306429, "Access frequency exceeds the limit")
        answer = gateway.rate_limited(platform)
        if fault.name == "rate_limited":
            answer.headers["X-Bkapi-RateLimit-Reset"] = str(fault.value or 1)
        elif fault.name == "rate_limited_200":
            answer.status = 200
        answer.headers.update(fault.headers)
        return answer
    if fault.name == "bad_credentials":
        if call.dialect == "esb":
            return gateway.esb_error(platform, 1306000, "APP authentication failed")
        reason = 'Parameters error [reason="bk_app_code or bk_app_secret is incorrect"]'
        return gateway.gateway_error(platform, 400, 1640001, "INVALID_ARGS", reason)
    return faults.replace(fault, str(request.url), platform.faults.garbage())


async def _send(platform: Platform, request: web.Request, call: Call, answer: Answer) -> web.StreamResponse:
    if not isinstance(answer.body, bytes):
        answer.body = json.dumps(answer.body, ensure_ascii=False, separators=(",", ":")).encode()
    skew = call.fault("clock_skew")
    ahead = platform.skew + (skew.seconds(3600) if skew else 0)
    answer.headers["Date"] = formatdate(int(platform.now() + ahead), usegmt=True)
    for fault in call.faults:
        answer = faults.rewrite(fault, answer)
    for fault in call.faults:
        if (broken := await faults.break_off(fault, request, answer)) is not None:
            return broken
    assert isinstance(answer.body, bytes)
    headers = dict(answer.headers)
    if answer.content_type is not None:
        headers["Content-Type"] = answer.content_type
    return web.Response(status=answer.status, body=answer.body, headers=headers)


async def _body(request: web.Request) -> dict[str, object]:
    if not request.can_read_body:
        return {}
    try:
        value = json.loads(await request.read())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


async def _unknown_component(request: web.Request) -> web.StreamResponse:
    return web.json_response({"result": False, "data": None, "message": "The content does not exist"}, status=404)


async def _unknown_resource(request: web.Request) -> web.StreamResponse:
    platform = request.app[PLATFORM]
    answer = gateway.gateway_error(platform, 404, 1640401, "API_NOT_FOUND", "API not found")
    return web.json_response(answer.body, status=404, headers=answer.headers)


def default_scopes(count: int) -> list[Scope]:
    """`count` businesses from 2 on, and the business set 9001."""
    return [*(Scope("biz", str(2 + index)) for index in range(count)), Scope("biz_set", "9001")]


def sample_config(url: str, platform: Platform) -> str:
    """A configuration (YAML text) for this simulator: NodeMan in businesses, JOB in all scopes."""
    world = nodeman_api.world_of(platform)
    world.advance()
    listed = []
    for scope in platform.scopes:
        kind, number = scope.bk_scope_type, scope.bk_scope_id
        listed.append(f'  - bk_scope_type: {kind}\n    bk_scope_id: "{number}"\n    name: Simulated {kind} {number}')
        if kind == "biz":
            policies = sorted(one.id for one in world.subscriptions.values() if one.name == f"policy-{number}")
            tasks = sorted(task.id for task in world.legacy_tasks.values() if task.bk_biz_id == int(number))
            jobs = [job.id for job in world.jobs.values() if job.bk_biz_scope == (int(number),)][-2:]
            listed.append("    collectors:\n      nodemgr: {enabled: true}")
            listed.append(f"      nodeman_job: {{enabled: true, job_ids: {jobs}}}")
            if policies:
                listed.append(f"      nodeman_subscription: {{enabled: true, subscription_ids: {policies}}}")
            if tasks:
                listed.append(f"      nodeman_task: {{enabled: true, job_ids: {tasks}}}")
    scopes = "\n".join(listed)
    return f"""\
blueking:
  job: {{url: "{url}/api/bk-job/prod", api: v4}}
  nodeman: {{url: "{url}/api/bk-nodeman/prod"}}
  nodeman_legacy: {{url: "{url}"}}
  nodemgr: {{url: "{url}/api/bk-nodemgr/prod"}}
  auth: {{app_code: blueking-exporter, app_secret: simulated, username: admin}}
  requests_per_second: 50
collectors:
  job:
    interval: 10s
    lookback: 2m
    reopen_window: 10m
    watch: [{{name: nightly-backup, max_age: 1h}}, {{name: disk-check, max_age: 30m}}, {{name: release}}]
  nodeman_job: {{interval: 10s, max_finished_age: 10m}}
  nodeman_subscription: {{interval: 10s}}
  nodeman_task: {{interval: 10s}}
  nodemgr: {{interval: 10s, lookback: 2m, reopen_window: 10m}}
counter_birth_hold: 45s   # for scrapes every 30 s
scopes:
{scopes}
"""


class SimulatorServer:
    """A platform that listens on a real socket while the context is open. `url` contains the port that was chosen for
    port 0."""

    def __init__(self, platform: Platform, host: str = "127.0.0.1", port: int = 0) -> None:
        self.platform = platform
        self.host = host
        self.port = port
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        self._runner = web.AppRunner(
            create_app(self.platform), access_log=None, shutdown_timeout=1, handler_cancellation=True
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port)
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if _is_v6(self.host) else self.host
        return f"http://{host}:{self.port}"


def _is_v6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def create_platform(
    *, seed: int = 1, scopes: int = 3, speed: float = 1.0, fault_list: str = "", now: Callable[[], float] = time.time
) -> Platform:
    """A platform with traffic, as the commands `simulate` and `demo` use it. Raises ValueError for an unknown fault.

    It can run for days: it drops executions and jobs that ended long ago, and all but the newest calls.
    """
    platform = Platform(seed=seed, scopes=default_scopes(scopes), speed=speed, now=now)
    platform.faults.add(*faults.parse_faults(fault_list))
    platform.rate_limit = 100
    # Enough of a past to look at, however fast it went by and however many scopes share the work of making it.
    history = max(300.0, 3600.0 / speed / max(1, scopes / 100))
    platform.job.populate(history=history)
    nodeman_api.populate(platform, history=600.0)
    nodemgr_api.populate(platform, history=600.0)
    platform.job.keep_for(history + KEPT)
    nodeman_api.world_of(platform).keep_for(600.0 + KEPT)
    nodemgr_api.world_of(platform).keep = 600.0 + KEPT
    platform.calls = deque(maxlen=CALLS)
    return platform


async def run(
    listen_address: str = "127.0.0.1:10072",
    *,
    seed: int = 1,
    scopes: int = 3,
    speed: float = 1.0,
    fault_list: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Serve until cancelled. `say` is called with the URL and a configuration for the exporter. Raises ValueError,
    OSError."""
    host, _, port = listen_address.rpartition(":")
    platform = create_platform(seed=seed, scopes=scopes, speed=speed, fault_list=fault_list)
    async with SimulatorServer(platform, host.strip("[]") or "127.0.0.1", int(port)) as server:
        say(f"# simulated BlueKing at {server.url}; a configuration to watch it with:\n")
        say(sample_config(server.url, platform))
        await asyncio.Event().wait()
