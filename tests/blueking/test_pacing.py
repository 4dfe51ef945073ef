"""Which calls wait (contract, section 3), in virtual time: the gate, the budget for retries, and 3,000 scopes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from msgspec import Struct

from exporter import log
from exporter.blueking import pacing
from exporter.blueking.client import TRIES, Client, Deadline, Operation
from exporter.blueking.envelope import Reply, ResponseDecoder
from exporter.blueking.pacing import Call, Gate, RetryBudget
from exporter.blueking.transport import OnHeaders, Request
from exporter.clock import Clock
from exporter.errors import ApiError, Problem
from exporter.model import Scope
from tests.support.calls import Calls
from tests.support.upstream import EMPTY_PAGE, Recorder, config

LIST, STATUS = "get_job_instance_list", "get_job_instance_status"
BIZ = Scope("biz", "2")
OTHER = Scope("biz", "3")


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Thousands of retries are of no interest in a log."""
    log.configure("error")


class Page(Struct):
    job_instance_list: list[object]


DECODERS = [ResponseDecoder(Page, lambda page: len(page.job_instance_list))]
Behaviour = Callable[[], Awaitable[tuple[int, Mapping[str, str]]]]


def answers(seconds: float = 0.1, status: int = 200, **headers: str) -> Behaviour:
    """An answer after so long; `Retry_After="1"` is the header Retry-After."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def answer() -> tuple[int, Mapping[str, str]]:
        await asyncio.sleep(seconds)
        return status, named

    return answer


async def hangs() -> tuple[int, Mapping[str, str]]:
    """No answer."""
    await asyncio.Event().wait()
    raise AssertionError


class Platform:
    """A `Transport`: a platform without sockets. `behaviour` is that of each scope, by its id, else `usual`."""

    def __init__(self, usual: Behaviour | None = None) -> None:
        self.usual = usual or answers()
        self.behaviour: dict[str, Behaviour] = {}
        self.asked: defaultdict[str, list[float]] = defaultdict(list)
        self.flying: Counter[str] = Counter()
        self.most_flying: Counter[str] = Counter()

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def refresh_tls(self) -> list[Problem]:
        return []

    async def send(self, request: Request, seconds: float, on_headers: OnHeaders) -> Reply:
        scope = request.query["bk_scope_id"]
        self.asked[scope].append(asyncio.get_running_loop().time())
        self.flying[scope] += 1
        self.most_flying[scope] = max(self.most_flying[scope], self.flying[scope])
        try:
            async with asyncio.timeout(seconds):
                status, headers = await self.behaviour.get(scope, self.usual)()
        except TimeoutError:
            raise ApiError("timeout", "no answer") from None
        finally:
            self.flying[scope] -= 1
        on_headers(status, headers)
        return Reply(status, EMPTY_PAGE if status == 200 else b"", headers)

    @property
    def calls(self) -> int:
        return sum(map(len, self.asked.values()))


class Asking:
    """A client on a platform, in the time of the running loop."""

    def __init__(self, platform: Platform, **changes: Any) -> None:
        loop = asyncio.get_running_loop()
        self.platform = platform
        self.recorder = Recorder()
        self.clock = Clock(wall=lambda: 1_789_000_000 + loop.time(), monotonic=loop.time)
        settings = config(**{"request_timeout": 30.0, "requests_per_second": 100.0, **changes})
        self.client = Client(settings, self.clock, self.recorder, log.get(), platform)

    def deadline(self, seconds: float = 60.0) -> Deadline:
        return Deadline(seconds, self.clock)

    async def ask(self, scope: str, deadline: Deadline | None = None, api: str = LIST, system: Any = "job") -> str:
        """One call for a scope; the reason of its failure, or ""."""
        operation = Operation(api, system, "app", "GET", "http://blueking.test/", {"bk_scope_id": scope})
        try:
            asking = self.client.for_scope(Scope("biz", scope))
            await asking.call(operation, DECODERS, deadline=deadline or self.deadline())
        except ApiError as error:
            return error.reason
        return ""


def now() -> float:
    return asyncio.get_running_loop().time()


# ---- pauses ----------------------------------------------------------------------------------------------------------


@pytest.mark.looptime(noop_cycles=2)
async def test_F59_a_503_with_retry_after_pauses_only_its_scope() -> None:
    """Ten scopes, one of which answers 503 and Retry-After 120: the nine others keep their rhythm."""
    platform = Platform()
    platform.behaviour["9"] = answers(0.1, 503, Retry_After="120")
    asking = Asking(platform)

    async def poll(scope: str) -> None:
        while True:
            await asyncio.gather(asyncio.sleep(30), asking.ask(scope))

    tasks = [asyncio.create_task(poll(str(scope))) for scope in range(10)]
    await asyncio.sleep(300)
    await _cancel(tasks)
    assert [len(platform.asked[str(scope)]) for scope in range(9)] == [10] * 9
    spacings = [after - before for before, after in pairwise(platform.asked["9"])]
    assert min(spacings) >= 59.9, "it is left alone for a minute, which is the most that is believed"
    assert max(spacings) <= 91, "and asked again after that"


@pytest.mark.looptime(noop_cycles=2)
@pytest.mark.parametrize(("status", "reason"), [(500, "http_5xx"), (403, "permission"), (400, "http_4xx")])
async def test_F59_any_failure_with_retry_after_pauses_its_scope(status: int, reason: str) -> None:
    """A second call of the scope waits, one of another scope or system does not."""
    platform = Platform()
    platform.behaviour["2"] = answers(0.1, status, Retry_After="20")
    asking = Asking(platform)
    assert await asking.ask("2", asking.deadline(10)) == reason
    began = now()
    platform.behaviour.clear()
    assert await asking.ask("3") == ""
    assert await asking.ask("2", system="nodeman", api="job_list") == ""
    assert now() - began < 1
    assert await asking.ask("2", asking.deadline(10)) == reason, "the pause outlasts this poll"
    assert now() - began < 1
    assert await asking.ask("2", api=STATUS) == ""
    assert 19 < now() - began < 21


@pytest.mark.looptime(noop_cycles=2)
async def test_F59_a_429_pauses_its_api_for_all_scopes() -> None:
    """Other APIs continue; nobody waits longer than its deadline; one call after the pause, then the others."""
    platform = Platform()
    platform.behaviour["2"] = answers(0.1, 429, Retry_After="120")
    asking = Asking(platform)
    assert await asking.ask("2", asking.deadline(30)) == "rate_limited"
    began = now()
    platform.behaviour.clear()
    assert await asking.ask("3", asking.deadline(30)) == "rate_limited"
    assert await asking.ask("2", api=STATUS) == ""
    assert now() - began < 1
    results = await asyncio.gather(*(asking.ask(str(scope), asking.deadline(70)) for scope in range(50)))
    assert set(results) == {""}
    assert 59 < now() - began < 62, "a minute is the longest pause"


@pytest.mark.looptime(noop_cycles=2)
async def test_waiting_for_a_pause_blocks_nobody() -> None:
    """A paused call neither holds a slot nor stands before others in the queue."""
    platform = Platform()
    platform.behaviour["2"] = answers(0.1, 503, Retry_After="20")
    asking = Asking(platform, max_concurrency=1)
    await asking.ask("2", asking.deadline(10))
    platform.behaviour.clear()
    paused = [asyncio.create_task(asking.ask("2")) for _ in range(5)]
    await asyncio.sleep(0)
    began = now()
    assert await asking.ask("3") == ""
    assert now() - began < 1
    assert await asyncio.gather(*paused) == [""] * 5


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ---- the gate --------------------------------------------------------------------------------------------------------


class Turns:
    """A gate, and when calls passed it."""

    def __init__(self, rate: float = 1.0, slots: int = 10) -> None:
        self.clock = Clock(monotonic=now)
        self.waited = 0.0
        self.gate = Gate(rate, slots, self.clock, self._wait)
        self.passed: list[float] = []
        self.call = Call(LIST, "job", BIZ)

    def _wait(self, seconds: float) -> None:
        self.waited += seconds

    async def turn(self, deadline: Deadline | None = None, call: Call | None = None, hold: float = 0.0) -> None:
        async with self.gate.turn(call or self.call, deadline or Deadline(60, self.clock)):
            self.passed.append(now())
            await asyncio.sleep(hold)


@pytest.mark.looptime(noop_cycles=2)
async def test_time_in_the_queue_does_not_count_and_time_in_a_pause_does() -> None:
    """A poll of ten seconds that queued for twenty has ten left, even if three calls did; a pause of five costs 5."""
    turns = Turns()
    deadline = Deadline(10, turns.clock)
    await asyncio.gather(*(turns.turn() for _ in range(20)), *(turns.turn(deadline) for _ in range(3)))
    assert deadline.remaining() == pytest.approx(10)
    turns.gate.pause_api(turns.call, 5)
    await asyncio.gather(turns.turn(deadline), turns.turn(deadline))
    assert deadline.remaining() == pytest.approx(5)
    assert turns.waited == pytest.approx(sum(range(23)) + 5 + 6)


@pytest.mark.looptime(noop_cycles=2)
async def test_a_new_rate_holds_from_the_next_call_on() -> None:
    """A call that waits for a slow rate does not wait for it to the end; a slower rate spaces what comes after."""
    turns = Turns(rate=0.01)
    waiting = [asyncio.create_task(turns.turn()) for _ in range(4)]
    await asyncio.sleep(1)
    turns.gate.set_rate(2.0)
    await asyncio.gather(*waiting)
    assert turns.passed == pytest.approx([0, 1.5, 2.0, 2.5], abs=0.01)
    turns.gate.set_rate(0.25)
    await asyncio.gather(turns.turn(), turns.turn())
    assert turns.passed[4:] == pytest.approx([3.0, 7.0], abs=0.01)


@pytest.mark.looptime(noop_cycles=2)
async def test_a_pause_that_comes_while_calls_queue_takes_their_time() -> None:
    """Those that cannot outlast it fail at once, the others go when it ends, in order of arrival."""
    turns = Turns()
    short, long = Deadline(4, turns.clock), Deadline(10, turns.clock)
    order: list[str] = []

    async def queue(name: str, deadline: Deadline) -> None:
        try:
            await turns.turn(deadline)
            order.append(name)
        except ApiError as error:
            order.append(f"{name} {error.reason} at {now():.1f}: {error.retry_after:.0f} s more")

    tasks = [
        asyncio.create_task(queue(name, one)) for name, one in (("a", long), ("b", long), ("c", short), ("d", long))
    ]
    await asyncio.sleep(0.5)
    turns.gate.pause_scope(turns.call, 5, "http_5xx")
    turns.gate.pause_scope(turns.call, 1, "http_5xx")
    await asyncio.gather(*tasks)
    assert order == ["a", "c http_5xx at 0.5: 5 s more", "b", "d"]
    assert turns.passed == pytest.approx([0, 5.5, 6.5])


@pytest.mark.looptime(noop_cycles=2)
async def test_the_rate_holds_whatever_the_slots_do() -> None:
    """No burst after a time without calls, none when slots become free at once, and no gap as long as both are free."""
    turns = Turns(rate=10.0, slots=4)
    await asyncio.gather(*(turns.turn(hold=1.0) for _ in range(12)))
    await asyncio.sleep(60)
    await asyncio.gather(*(turns.turn() for _ in range(12)))
    spacings = [after - before for before, after in pairwise(turns.passed)]
    assert min(spacings) == pytest.approx(0.1, abs=1e-4)
    assert [round(at, 3) for at in turns.passed[:6]] == [0, 0.1, 0.2, 0.3, 1.0, 1.1]


@pytest.mark.looptime(noop_cycles=2)
async def test_cancelled_calls_leave_no_trace() -> None:
    """Cancelled in the queue, in a pause, at its turn and under way: the slots are free and the deadline runs."""
    turns = Turns(rate=1000.0, slots=2)
    deadline = Deadline(100, turns.clock)
    for pause in (0.0, 5.0):
        if pause:
            turns.gate.pause_api(turns.call, pause)
        tasks = [asyncio.create_task(turns.turn(deadline, hold=50)) for _ in range(5)]
        await asyncio.sleep(1)
        await _cancel(tasks)
    await asyncio.sleep(5)
    before = deadline.remaining()
    for _ in range(3):
        task = asyncio.create_task(turns.turn(deadline, hold=50))
        await asyncio.sleep(0)  # its turn has come, but it does not know yet
        await _cancel([task])
    await asyncio.wait_for(asyncio.gather(*(turns.turn(hold=1.0) for _ in range(4))), 5)
    assert deadline.remaining() < before


@pytest.mark.looptime(noop_cycles=2)
@pytest.mark.parametrize("why", ["pause", "slow"])
async def test_calls_that_wait_for_something_else_are_not_looked_at(why: str) -> None:
    """What a call costs does not depend on how many calls a pause or slow slots keep waiting."""
    work = []
    for waiting in (1, 500):
        turns = Turns(rate=1000.0, slots=4)
        if why == "slow":
            with contextlib.suppress(ApiError):
                async with turns.gate.turn(turns.call, Deadline(60, turns.clock)):
                    raise ApiError("timeout", "no answer")
        else:
            turns.gate.pause_scope(turns.call, 50, "http_5xx")
        held = [asyncio.create_task(turns.turn(hold=50)) for _ in range(waiting + 1)]
        await asyncio.sleep(2)
        with Calls(pacing.__file__) as calls:
            for _ in range(50):
                await asyncio.gather(*(turns.turn(call=Call(LIST, "job", OTHER)) for _ in range(3)))
        work.append(calls.python)
        await _cancel(held)
    assert work[1] < 2 * work[0], "a timer may wake the gate a little early, and then again"


@pytest.mark.looptime(noop_cycles=2)
@pytest.mark.parametrize("seed", range(20))
async def test_the_gate_keeps_its_limits_whatever_happens(seed: int) -> None:
    """Answers, timeouts, other errors, cancellations and pauses in any order: never more calls at once than slots, nor
    more a second than the rate; nobody is forgotten, and in the end all slots are free."""
    chance = random.Random(seed)
    slots, rate = chance.choice([1, 2, 4, 8, 9]), chance.choice([5.0, 50.0])
    turns = Turns(rate, slots)
    flying: Counter[Call] = Counter()
    slow: set[Call] = set()
    most = ended = 0
    calls = [Call(api, "job", scope) for api in (LIST, STATUS) for scope in (BIZ, OTHER, Scope("biz", "4"))]

    async def one() -> None:
        nonlocal most, ended
        call = chance.choice(calls)
        with contextlib.suppress(ApiError):
            async with turns.gate.turn(call, Deadline(chance.choice([5, 60]), turns.clock)):
                assert call not in slow or not flying[call], "a slow call is alone"
                flying[call] += 1
                turns.passed.append(now())
                most = max(most, flying.total())
                try:
                    await asyncio.sleep(chance.random())
                    if chance.random() < 0.3:
                        raise ApiError(chance.choice(["timeout", "timeout", "http_5xx"]), "")
                    slow.discard(call)
                except ApiError as error:
                    (slow.add if error.reason == "timeout" else slow.discard)(call)
                    raise
                finally:
                    flying[call] -= 1
        ended += 1

    tasks = []
    for _ in range(300):
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(chance.random() * 0.1)
        if chance.random() < 0.05:
            call, pause = chance.choice(calls), chance.random() * 8
            if chance.random() < 0.5:
                turns.gate.pause_api(call, pause)
            else:
                turns.gate.pause_scope(call, pause, "http_5xx")
        if chance.random() < 0.2:
            chance.choice(tasks).cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
    assert [result for result in results if isinstance(result, Exception)] == []
    assert ended + cancelled == 300
    assert most <= slots
    assert min((after - before for before, after in pairwise(turns.passed)), default=1.0) >= 0.5 / rate - 1e-4
    assert len(turns.passed) <= (turns.passed[-1] - turns.passed[0]) * rate + 1.5
    turns.passed.clear()
    await asyncio.sleep(10)
    free = [Call(f"api {number}", "job", BIZ) for number in range(slots)]
    begun = now()
    await asyncio.gather(*(turns.turn(call=call, hold=10) for call in free))
    assert turns.passed[-1] - begun <= slots / rate, "all slots are free"


# ---- scopes that do not answer ---------------------------------------------------------------------------------------


@pytest.mark.looptime(noop_cycles=2)
async def test_F60_a_scope_that_timed_out_holds_one_slot() -> None:
    """However many calls it wants to make; the first answer makes it a usual one again."""
    platform = Platform()
    platform.behaviour["2"] = hangs
    asking = Asking(platform)
    assert await asking.ask("2", asking.deadline(30)) == "timeout"
    platform.most_flying.clear()
    tasks = [asyncio.create_task(asking.ask("2", asking.deadline(30))) for _ in range(6)]
    await asyncio.sleep(170)
    assert platform.most_flying["2"] == 1
    platform.behaviour["2"] = answers(1.0)
    await asyncio.gather(*tasks)
    assert await asking.ask("2") == ""
    await asyncio.gather(*(asking.ask("2") for _ in range(6)))
    assert platform.most_flying["2"] == 6


@pytest.mark.looptime(noop_cycles=2)
async def test_F60_all_slow_scopes_together_hold_a_quarter_of_the_slots() -> None:
    """Each of them gets its turn, and the others are served as if they did not exist."""
    platform = Platform()
    slow = [str(scope) for scope in range(100, 116)]
    platform.behaviour = dict.fromkeys(slow, hangs)
    asking = Asking(platform, max_concurrency=8)
    await asyncio.gather(*(asking.ask(scope, asking.deadline(30)) for scope in slow))
    tasks = [asyncio.create_task(asking.ask(scope, asking.deadline(30))) for scope in slow]
    began = now()
    assert await asyncio.gather(*(asking.ask(str(scope)) for scope in range(90))) == [""] * 90
    assert now() - began < 2, "six slots serve sixty calls a second"
    most = 0
    while not all(task.done() for task in tasks):
        most = max(most, sum(platform.flying.values()))
        await asyncio.sleep(1)
    assert most == 2
    assert {len(platform.asked[scope]) for scope in slow} == {2}


@pytest.mark.looptime(noop_cycles=2)
async def test_F60_a_slow_api_leaves_the_others_of_its_scope_alone() -> None:
    """JOB hangs for all scopes: what is asked of NodeMan does not wait for it, and its answers do not free JOB."""
    platform = Platform()
    asking = Asking(platform, max_concurrency=8)
    scopes = [str(scope) for scope in range(20)]

    async def nodeman(scope: str) -> None:
        assert await asking.ask(scope, system="nodeman", api="job_list") == ""

    platform.usual = hangs
    await asyncio.gather(*(asking.ask(scope, asking.deadline(30)) for scope in scopes))
    tasks = [asyncio.create_task(asking.ask(scope, asking.deadline(30))) for scope in scopes]
    await asyncio.sleep(0.1)
    platform.usual = answers(0.05)  # for what is asked from now on
    began = now()
    for _ in range(3):
        await asyncio.gather(*map(nodeman, scopes))
    assert now() - began < 2
    await _cancel(tasks)


@pytest.mark.looptime(noop_cycles=2)
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 8])
async def test_F60_with_few_slots_one_is_for_slow_scopes(slots: int) -> None:
    """At least one, so that a scope can recover."""
    platform = Platform()
    platform.behaviour = {"2": hangs, "3": hangs, "4": hangs}
    asking = Asking(platform, max_concurrency=slots)
    for _ in range(2):
        await asyncio.gather(*(asking.ask(scope, asking.deadline(30)) for scope in "234"))
    platform.behaviour.clear()
    assert await asyncio.gather(*(asking.ask(scope) for scope in "2345")) == [""] * 4


# ---- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.looptime(noop_cycles=2)
async def test_F21_retries_are_a_share_of_the_calls_of_ten_minutes() -> None:
    """Whatever the calls of the poll, and never more within any ten minutes."""
    clock = Clock(monotonic=now)
    budget = RetryBudget(0.2, clock)
    calls: list[float] = []
    retries: list[float] = []
    chance = random.Random(1)
    for _ in range(6000):
        budget.count_call()
        calls.append(now())
        for _ in range(2):
            if chance.random() < 0.5 and budget.allow(chance.randrange(5)):
                retries.append(now())
        await asyncio.sleep(chance.random() * 2)
    for end in retries:
        within = sum(end - 600 < at <= end for at in retries)
        assert within <= max(10, 0.2 * sum(end - 600 <= at <= end for at in calls))
    assert len(retries) > 0.18 * len(calls), "what is allowed is used"


@pytest.mark.looptime(noop_cycles=2)
async def test_F21_ten_retries_are_always_allowed() -> None:
    """Everybody who asks for them, and again ten minutes later."""
    clock = Clock(monotonic=now)
    for share in (0.0, 0.2):
        budget = RetryBudget(share, clock)
        for answered in (0, 5):
            budget.count_call()
            assert sum(budget.allow(answered) for _ in range(20)) == 10
            await asyncio.sleep(650)


@pytest.mark.looptime(noop_cycles=2)
async def test_F21_retries_go_to_polls_that_have_got_far() -> None:
    """Half of the share is left for polls that have had an answer, a quarter for those with two, and so on."""
    budget = RetryBudget(0.2, Clock(monotonic=now))
    for _ in range(1000):
        budget.count_call()
    allowed = [sum(budget.allow(answered) for _ in range(300)) for answered in (0, 1, 2, 20)]
    assert allowed == [100, 50, 25, 24]


class Poll:
    """Polls of one scope: many calls until all of them have been answered once, then one call each."""

    def __init__(self, asking: Asking, scope: str, interval: float, baseline: int) -> None:
        self.asking = asking
        self.scope = scope
        self.interval = interval
        self.baseline = baseline
        self.completed: list[float] = []
        self.failed: Counter[str] = Counter()

    async def run(self) -> None:
        phase = random.Random(self.scope).random()
        begun = now()
        while True:
            deadline = self.asking.deadline(max(self.interval, 60))
            for _ in range(1 if self.completed else self.baseline):
                if reason := await self.asking.ask(self.scope, deadline):
                    self.failed[reason] += 1
                    break
            else:
                self.completed.append(now())
            elapsed = (now() - begun) / self.interval
            await asyncio.sleep(begun + ((elapsed - phase) // 1 + 1 + phase) * self.interval - now())


async def polling(
    asking: Asking, count: int, seconds: float, *, interval: float = 60.0, baseline: int = 9
) -> list[Poll]:
    """So many scopes for so long."""
    polls = [Poll(asking, str(scope), interval, baseline) for scope in range(count)]
    tasks = [asyncio.create_task(poll.run()) for poll in polls]
    await asyncio.sleep(seconds)
    await _cancel(tasks)
    return polls


@pytest.mark.looptime(noop_cycles=2)
async def test_F21_half_of_all_requests_fail_for_an_hour() -> None:
    """Every scope has its baseline of nine calls in the end, and the platform gets at most 1.2 times the calls."""
    chance = random.Random(1)

    async def fails() -> tuple[int, Mapping[str, str]]:
        await asyncio.sleep(0.1)
        return (200, {}) if chance.random() < 0.5 else (502, {})

    asking = Asking(Platform(fails))
    polls = await polling(asking, 30, 3600, interval=30)
    assert all(poll.completed for poll in polls)
    retries = asking.recorder.retries[LIST]
    assert retries <= 0.2 * (asking.platform.calls - retries) + 1


@pytest.mark.looptime(noop_cycles=2)
@pytest.mark.parametrize("outage", [answers(0.1, 502), hangs], ids=["502", "silence"])
async def test_F21_a_total_outage_costs_no_more_calls_than_good_times(outage: Behaviour) -> None:
    """After a healthy hour: at most 1.2 times its calls; and when it is over all scopes are polled within a minute."""
    asking = Asking(Platform())
    polls = [Poll(asking, str(scope), 30, 9) for scope in range(50)]
    tasks = [asyncio.create_task(poll.run()) for poll in polls]
    await asyncio.sleep(600)
    asking.platform.asked.clear()
    await asyncio.sleep(3600)
    healthy = asking.platform.calls
    asking.platform.usual = outage
    asking.platform.asked.clear()
    await asyncio.sleep(3600)
    assert 0 < asking.platform.calls <= 1.2 * healthy
    asking.platform.usual = answers()
    over = now()
    await asyncio.sleep(90)
    await _cancel(tasks)
    assert all(poll.completed[-1] > over for poll in polls)


@pytest.mark.looptime(noop_cycles=2)
async def test_F60_sixteen_of_five_hundred_scopes_never_answer() -> None:
    """The 484 others have their baselines of nine calls within 100 s, 44 of which are the rate limit, and then keep
    their rhythm."""
    platform = Platform(answers(0.02))
    platform.behaviour = {str(scope): hangs for scope in range(5, 500, 31)}
    polls = await polling(Asking(platform), 500, 400, interval=30)
    others = [poll for poll in polls if poll.scope not in platform.behaviour]
    assert len(others) == 484
    assert max(poll.completed[0] for poll in others) < 100
    assert not sum((poll.failed for poll in others), Counter())
    assert max(after - before for poll in others for before, after in pairwise(poll.completed[2:])) < 35


# ---- everything at once ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)  # of computing, on a machine that does other things too
@pytest.mark.looptime(noop_cycles=2)
async def test_F59_F60_three_thousand_scopes_with_every_trouble_at_once() -> None:
    """2,700 healthy scopes complete their baselines and keep their rhythm of a minute among 300 that are silent, answer
    503 with Retry-After, 502 or 403; and those are asked as often as they may be."""
    count, seconds = 3000, 600.0
    platform = Platform(answers(0.05))
    sick = {
        "silent": (hangs, [str(scope) for scope in range(0, 1500, 15)]),
        "busy": (answers(0.05, 503, Retry_After="120"), [str(scope) for scope in range(1500, 2000, 10)]),
        "broken": (answers(0.05, 502), [str(scope) for scope in range(2000, 2500, 5)]),
        "refused": (answers(0.05, 403), [str(scope) for scope in range(2500, 3000, 10)]),
    }
    platform.behaviour = {scope: behaviour for behaviour, scopes in sick.values() for scope in scopes}
    asking = Asking(platform, requests_per_second=100.0, max_concurrency=32, request_timeout=10.0)
    polls = {poll.scope: poll for poll in await polling(asking, count, seconds, baseline=3)}

    healthy = [poll for scope, poll in polls.items() if scope not in platform.behaviour]
    assert len(healthy) == 2700
    assert not sum((poll.failed for poll in healthy), Counter()), "no healthy poll has failed"
    # Three calls each, 9,000 in all, are 90 s at this rate; the silent ones may hold all slots twice, for 10 s.
    assert max(poll.completed[0] for poll in healthy) < 90 + 2 * 10 + 10
    rhythm = [after - before for poll in healthy for before, after in pairwise(poll.completed[2:])]
    assert max(rhythm) < 70, "a poll a minute, with a little queue"
    assert min(len(poll.completed) for poll in healthy) >= seconds / 60 - 4

    asked = {name: [len(platform.asked[scope]) for scope in scopes] for name, (_, scopes) in sick.items()}
    # 8 of 32 slots, 10 s each: 0.8 calls a second for 100 silent scopes.
    assert min(asked["silent"]) >= 0.8 * 0.8 * seconds / 100
    assert max(asked["silent"]) <= 2 * min(asked["silent"])
    assert set(asked["busy"]) <= {seconds // 60 - 1, seconds // 60, seconds // 60 + 1}
    assert max(asked["broken"]) <= TRIES * (seconds / 60 + 1)
    retries = asking.recorder.retries[LIST]
    assert retries <= 0.2 * (platform.calls - retries) + 1
