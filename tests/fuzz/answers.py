"""Fuzz targets that answer as BlueKing would: one response to one call, and whole polls of a simulated platform."""

from __future__ import annotations

import asyncio
import copy
import datetime
import json
import math
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec

from exporter.blueking.client import Operation, ScopeClient
from exporter.blueking.cmdb import CmdbApi
from exporter.blueking.envelope import CODES, NODEMGR_CODES, Reply, ResponseDecoder, read
from exporter.blueking.job import JobApi
from exporter.blueking.nodeman import NodemanApi
from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.blueking.nodemgr import NodemgrApi
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors import COLLECTORS
from exporter.collectors.base import Platforms
from exporter.config.schema import (
    CmdbPlatform,
    Collectors,
    JobPlatform,
    LegacyPlatform,
    NodemanJobConfig,
    NodemanPlatform,
    NodemanSubscriptionConfig,
    NodemanTaskConfig,
    NodemgrConfig,
    NodemgrPlatform,
    ScopeConfig,
)
from exporter.errors import ApiError
from exporter.exposed import page_families
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Page
from exporter.model import Scope
from exporter.poller import Poller, Services, Settings
from exporter.simulator import api, gateway, nodeman_api, nodeman_world, nodemgr_api, nodemgr_world
from exporter.simulator.platform import Answer, Call, Endpoint, Platform
from exporter.simulator.world import StepScript, target
from exporter.state.memory import MemoryStore
from exporter.telemetry import Telemetry
from tests.support.parsers import parse
from tests.support.paths import FIXTURES

T = TypeVar("T")

URL = "http://platform"
SCOPE = Scope("biz", "2")
CHINA = datetime.timezone(datetime.timedelta(hours=8))
STATUSES = (200, 200, 200, 200, 201, 204, 302, 400, 401, 403, 404, 429, 500, 503)


class OneAnswer:
    """A `ScopeClient` that gets the same response to every call."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    async def call(self, operation: Operation, decoders: Sequence[ResponseDecoder[Any, T]], *, deadline: Deadline) -> T:
        return _read(operation, self._reply, decoders)


def _read(operation: Operation, reply: Reply, decoders: Sequence[ResponseDecoder[Any, T]]) -> T:
    return read(reply, decoders, NODEMGR_CODES if operation.system == "nodemgr" else CODES)


Ask = Callable[[ScopeClient, Deadline], Coroutine[Any, Any, object]]

CALLS: Mapping[str, Ask] = {
    "list_v4": lambda client, end: JobApi(client, JobPlatform(URL, "v4")).list(SCOPE, 0, 9, deadline=end),
    "list_v3": lambda client, end: JobApi(client, JobPlatform(URL, "v3")).list(SCOPE, 0, 9, deadline=end),
    "list_esb": lambda client, end: JobApi(client, JobPlatform(URL, "esb")).list(SCOPE, 0, 9, deadline=end),
    "status_v4": lambda client, end: JobApi(client, JobPlatform(URL, "v4")).status(
        SCOPE, 20000000001, host_results=True, deadline=end
    ),
    "status_v3": lambda client, end: JobApi(client, JobPlatform(URL, "v3")).status(
        SCOPE, 20000000001, host_results=True, deadline=end
    ),
    "job_list": lambda client, end: _nodeman(client).job_list(bk_biz_id=2, deadline=end),
    "job_details": lambda client, end: _nodeman(client).job_details(1, pagesize=10, deadline=end),
    "task_result": lambda client, end: _nodeman(client).task_result(
        1, pagesize=10, with_steps=lambda instance: True, deadline=end
    ),
    "get_task_info": lambda client, end: NodemanLegacyApi(client, LegacyPlatform(URL), CHINA).get_task_info(
        2, 1, deadline=end
    ),
    "node_workflow_list": lambda client, end: _nodemgr(client).workflows("node", 2, deadline=end),
    "plugin_workflow_list": lambda client, end: _nodemgr(client).workflows("plugin", 2, deadline=end),
    "node_operation_list": lambda client, end: _nodemgr(client).operations("node", "wf:1", deadline=end),
    "plugin_operation_list": lambda client, end: _nodemgr(client).operations("plugin", "wf:1", deadline=end),
    "search_business": lambda client, end: CmdbApi(client, CmdbPlatform(URL)).businesses(end),
    "list_business_set": lambda client, end: CmdbApi(client, CmdbPlatform(URL)).business_sets(end),
}
"""Every call of every API."""

CMDB_ANSWERS = {
    "search_business": {"count": 2, "info": [{"bk_biz_id": 2, "bk_biz_name": "演示"}, {"bk_biz_id": 3}]},
    "list_business_set": {"count": 0, "info": [{"bk_biz_set_id": 9, "bk_biz_set_name": "all"}]},
}
"""`data` of answers of CMDB."""


def _nodeman(client: ScopeClient) -> NodemanApi:
    return NodemanApi(client, NodemanPlatform(URL), CHINA)


def _nodemgr(client: ScopeClient) -> NodemgrApi:
    return NodemgrApi(client, NodemgrPlatform(URL))


def decoders(data: bytes) -> None:
    """Any response to a call gives a value, which is then read, or an ApiError. The first byte says with what status,
    the second one to which call."""
    if len(data) < 2:
        return
    reply = Reply(STATUSES[data[0] % len(STATUSES)], bytearray(data[2:]), {"Content-Type": "application/json"})
    ask = list(CALLS.values())[data[1] % len(CALLS)]
    clock = Clock(lambda: 0.0, lambda: 0.0)
    try:
        value = _finished(ask(cast(ScopeClient, OneAnswer(reply)), Deadline(30, clock)))
    except ApiError as error:
        str(error).encode()
    else:
        _read_all(value)


def decoder_seeds() -> list[bytes]:
    """Each sample answer to each call that it may be an answer to."""
    words = {"list": ("list_",), "status": ("status_",), "job_list": ("job_list",), "details": ("job_details",)}
    seeds = []
    for file in sorted(FIXTURES.glob("*.json")):
        if "manifest" in file.name:
            continue
        for number, name in enumerate(CALLS):
            system, api_of_file, *_ = file.name.split("__")
            if system != "nodemgr":
                api_of_file = system
            if api_of_file.endswith(name) or any(
                api_of_file.endswith(word) and name.startswith(starts) for word, starts in words.items()
            ):
                seeds.append(bytes((0, number)) + file.read_bytes())
    for name, data in CMDB_ANSWERS.items():
        answer = {"result": True, "code": 0, "message": "success", "permission": None, "data": data}
        seeds.append(bytes((0, list(CALLS).index(name))) + _encoded(answer))
    return seeds


def _finished(call: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that never waits."""
    try:
        call.send(None)
    except StopIteration as stop:
        return cast(T, stop.value)
    raise AssertionError("it waited")


def _read_all(value: object) -> None:
    """Read what is only decoded when it is asked for."""
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            _read_all(getattr(value, name))
        for name in ("name", "host"):
            _read_all(getattr(value, name, None))
    elif isinstance(value, list | tuple):
        for item in value:
            _read_all(item)


# Whole polls


class Choices:
    """What fuzz data decides, taken from its front; when it is used up, always the first choice."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        size = 1 if limit <= 256 else 3
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken) % limit if limit else 0

    def bytes(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken


ODD: Sequence[object] = (
    None, True, False, 0, -1, 1, 4, 9, 10**18, 2**63, -(2**63) - 1, 10**400, 0.5, 1e30, -0.0, "", "x" * 70000, "OK",
    "-1", "1e5", "2026-11-23 09:00:00+0800", "2026-11-23T09:00:00Z", "0001-01-01 00:00:00", "9999-12-31 23:59:59",
    "\ud800", "\x00\u202e\n\"\\", [], {}, [[]], [None], [{}], {"": {}}, 20000000001, 1789000000000, 32503680000000,
    "FAILED", "?",
)  # fmt: skip


class MutatedPlatform:
    """A `ScopeClient` in front of a simulated platform. `choices` decide what happens to its answers."""

    def __init__(self, platform: Platform) -> None:
        self.choices: Choices | None = None
        self._platform = platform
        self._endpoints = [
            (re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", endpoint.path.rstrip("/")) + "/?"), endpoint)
            for routes in (api.routes, nodeman_api.routes, nodemgr_api.routes)
            for endpoint in routes(platform)
        ]

    async def call(self, operation: Operation, decoders: Sequence[ResponseDecoder[Any, T]], *, deadline: Deadline) -> T:
        answer = self._answer(operation)
        status, body = answer.status, _encoded(answer.body)
        if self.choices is not None:
            status, body = mutated(self.choices, status, body)
        return _read(operation, Reply(status, bytearray(body), answer.headers), decoders)

    def _answer(self, operation: Operation) -> Answer:
        path = operation.url.removeprefix(URL)
        endpoint, args = self._endpoint(path, operation.method)
        params = {name: value for name, value in operation.params.items() if value is not None}
        if operation.method == "GET":
            params = {
                name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in params.items()
            }
        call = Call(
            endpoint.api, endpoint.dialect, endpoint.app_type, operation.method, path, args, params, "zh",
            self._platform.now(), user="admin",
        )  # fmt: skip
        answer = cast(Answer, endpoint.handler(call))
        return gateway.esb_wrap(self._platform, call, answer) if call.dialect == "esb" else answer

    def _endpoint(self, path: str, method: str) -> tuple[Endpoint, Mapping[str, str]]:
        for pattern, endpoint in self._endpoints:
            if (found := pattern.fullmatch(path)) and method in endpoint.methods:
                return endpoint, found.groupdict()
        raise AssertionError(f"the simulator does not serve {method} {path}")


def mutated(choices: Choices, status: int, body: bytes) -> tuple[int, bytes]:
    """The answer, or what became of it: another status, other bytes, or another value somewhere in it."""
    kind = choices.below(8)
    if kind == 1:
        status = STATUSES[choices.below(len(STATUSES))]
    elif kind == 2:
        at = choices.below(len(body) + 1)
        body = body[:at] + choices.bytes(choices.below(8)) + body[at + choices.below(16) :]
    elif kind >= 3:
        value = json.loads(body)
        for _ in range(1 + choices.below(3)):
            _change(choices, value)
        body = _encoded(value)
    return status, body


def _change(choices: Choices, value: Any) -> None:
    places = list(_places(value))
    if not places:
        return
    container, key = places[choices.below(len(places))]
    what = choices.below(len(ODD) + 3)
    if what < len(ODD):
        container[key] = copy.deepcopy(ODD[what])
    elif what == len(ODD):
        del container[key]
    elif isinstance(container, list):
        container.insert(choices.below(len(container)), copy.deepcopy(container[key]))
    else:
        other, other_key = places[choices.below(len(places))]
        container[key] = copy.deepcopy(other[other_key])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value: its container and key there."""
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = range(len(container)) if isinstance(container, list) else list(container)
        for key in keys:
            yield container, key
            if isinstance(container[key], dict | list):
                waiting.append(container[key])


def _encoded(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")


INTERVAL = 60.0
MUTATED, CLEAN = 4, 9
"""Polls with mutated answers, then polls without, until all scopes succeed again."""


def polls(data: bytes) -> None:
    """All collectors poll a platform whose answers are mutated, then one whose answers are not. Each poll succeeds or
    fails for a reason of the platform; counters never fall; pages are valid; and in the end every scope is well."""
    asyncio.run(_polls(Choices(data)))


async def _polls(choices: Choices) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_raise)
    now = 1_789_000_000.0
    platform = Platform(scopes=[SCOPE], now=lambda: now)
    client = MutatedPlatform(platform)
    populate(platform)
    page = Page(page_families())
    clock = Clock(lambda: now, lambda: now)
    services = Services(MemoryStore(), page, Telemetry(), clock)
    pollers = [Poller(collector, Settings(0.0, 5, 30.0), services) for collector in collectors(client, platform, clock)]
    shown: dict[str, float] = {}
    try:
        for number in range(1 + MUTATED + CLEAN):
            client.choices = choices if 1 <= number <= MUTATED and choices.below(4) else None
            for poller in pollers:
                for _ in range(20):
                    if not await poller.poll():
                        break
                assert poller.reason != "internal", poller.message
            if number in (0, MUTATED, MUTATED + CLEAN):
                shown = _checked(page, shown)
            now += INTERVAL
            _go_on(platform, number)
        assert all(poller.success for poller in pollers), [(str(poller.key), poller.message) for poller in pollers]
    finally:
        for poller in pollers:
            poller.close()


def _raise(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    raise context.get("exception") or AssertionError(context["message"])


def collectors(client: MutatedPlatform, platform: Platform, clock: Clock) -> list[Any]:
    """One of each."""
    asking = cast(ScopeClient, client)
    apis = Platforms(
        JobApi(asking, JobPlatform(URL + "/api/bk-job/prod")),
        NodemanApi(asking, NodemanPlatform(URL + "/api/bk-nodeman/prod"), CHINA),
        NodemanLegacyApi(asking, LegacyPlatform(URL), CHINA),
        NodemgrApi(asking, NodemgrPlatform(URL + "/api/bk-nodemgr/prod")),
    )
    world = nodeman_api.world_of(platform)
    config = Collectors(
        nodeman_job=NodemanJobConfig(enabled=True, job_ids=tuple(world.jobs)[:1]),
        nodeman_subscription=NodemanSubscriptionConfig(enabled=True, subscription_ids=tuple(world.subscriptions)[:2]),
        nodeman_task=NodemanTaskConfig(enabled=True, job_ids=tuple(world.legacy_tasks)),
        nodemgr=NodemgrConfig(enabled=True),
    )
    built = (collector.build(ScopeConfig(SCOPE, "", config), apis, clock) for collector in COLLECTORS)
    return [collector for collector in built if collector is not None]


def populate(platform: Platform) -> None:
    """Something of everything that is watched."""
    _go_on(platform, 0)
    world = nodeman_api.world_of(platform)
    hosts = [nodeman_world.Target(2, f"10.0.0.{number}", number) for number in (1, 2)]
    world.start_job("INSTALL_AGENT", {hosts[0]: "install", hosts[1]: None}, duration=100.0)
    world.start_legacy_task(2, "INSTALL_AGENT", {hosts[0]: "E1", hosts[1]: None}, duration=100.0)


def _go_on(platform: Platform, number: int) -> None:
    """Something that fails and something that succeeds."""
    for code in (104, 9):
        steps = [StepScript(1, 30.0, {target(1): (code, 1), target(2): 9})]
        platform.job.start(SCOPE, plan_id=1001, task_type=0, steps=steps)
    host = nodemgr_world.Target(2, "10.0.0.4", 4)
    parts = [nodemgr_world.Part(host, state, "start_process", 20_000) for state in ("failed", "success")]
    workflow = nodemgr_api.world_of(platform).start("node", "install_agent", parts[:1])
    nodemgr_api.world_of(platform).retry(workflow, {0: parts[number % 2]}, at=workflow.tries[0].finish + 150_000)
    nodemgr_api.world_of(platform).start("plugin", "install_plugin", parts)
    if number % 3 == 2:
        one = nodeman_world.Target(2, "10.0.0.3", 3)
        nodeman_api.world_of(platform).start_job("MAIN_STOP_PLUGIN", {one: "gse_operate_proc"}, duration=20.0)


def _checked(page: Page, before: Mapping[str, float]) -> dict[str, float]:
    """The counters of a page that both parsers read, none of which has fallen."""
    counters: dict[str, float] = {}
    for form in Format:
        text = b"".join(page.exposition(form)).decode()
        for family in parse(text, form):
            for sample in family.samples:
                assert not math.isnan(sample.value), sample
                if family.type == "counter" and sample.name.endswith("_total") and form is Format.TEXT:
                    counters[f"{sample.name}{sorted(sample.labels.items())}"] = sample.value
    fallen = [name for name, value in before.items() if counters.get(name, -1.0) < value]
    assert not fallen, fallen
    return counters
