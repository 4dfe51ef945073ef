"""When a call may start: the rate limit, the slots, pauses, and the retry budget.

One rate limit and one number of slots hold for all calls of this process. Besides, a failure delays only the calls that
it concerns (contract, section 3):

    what happened                          who waits
    429                                    all calls of that API, as long as the platform says
    503 or another failure + Retry-After   the calls for that scope to that system, as long as the platform says
    the newest call timed out              that scope has one slot for such calls, and all such scopes share a quarter
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from operator import attrgetter
from types import TracebackType

import msgspec

from exporter.clock import Clock
from exporter.errors import ApiError, ApiReason
from exporter.model import Scope


class Deadline:
    """The time that one poll has. Its clock stands still while a call of the poll queues for its turn, so that a long
    queue makes no poll time out. It runs during a pause that the platform asked for.

    `answered` counts the calls of the poll that have succeeded.
    """

    def __init__(self, seconds: float, clock: Clock) -> None:
        self.answered = 0
        self._clock = clock
        self._left = seconds
        self._since = clock.monotonic()
        self._queueing = 0

    def remaining(self) -> float:
        """Seconds left; negative when it has passed."""
        return self._left if self._queueing else self._left - (self._clock.monotonic() - self._since)

    def stop(self) -> None:
        """Stop the clock: a call begins to queue. Calls of one poll may queue at the same time."""
        self._left = self.remaining()
        self._queueing += 1

    def resume(self) -> None:
        """The opposite of `stop`: a call no longer queues."""
        self._queueing -= 1
        self._since = self._clock.monotonic()


class Call(msgspec.Struct, frozen=True):
    """One call: the vendor's name of the API, the system it belongs to, and the scope it is made for."""

    api: str
    system: str
    scope: Scope | None


PauseKey = tuple[object, ...]


def _pause_keys(call: Call) -> tuple[PauseKey, PauseKey]:
    """The keys under which a pause of the call's API and a pause of its scope are registered."""
    return (call.api,), (call.system, call.scope)


class _Waiter:
    """A call that has not started. The clock of its deadline stands still, except while a pause holds the call.

    `number`: in order of arrival. `place`: where it waits, None when it does not wait any more.
    """

    __slots__ = ("arrived", "call", "deadline", "number", "paused", "place", "started", "turn")

    def __init__(self, call: Call, deadline: Deadline, arrived: float, number: int) -> None:
        self.call = call
        self.deadline = deadline
        self.arrived = arrived
        self.number = number
        self.turn: asyncio.Future[ApiError | None] = asyncio.get_running_loop().create_future()
        self.place: _Waiters | None = None
        self.paused = self.started = False
        deadline.stop()

    def wait(self, place: _Waiters, *, paused: bool = False) -> None:
        """Wait there from now on."""
        if self.place is not None:
            del self.place[self]
        self.place = place
        place[self] = None
        if paused and not self.paused:
            self.deadline.resume()
        elif self.paused and not paused:
            self.deadline.stop()
        self.paused = paused

    def leave(self) -> None:
        """Wait no longer."""
        if self.place is not None:
            del self.place[self]
            self.place = None
            if not self.paused:
                self.deadline.resume()


_Waiters = OrderedDict[_Waiter, None]
"""Calls that wait, the first one first; a dict finds its first slowly."""


class _Slow:
    """The calls in flight, and which (API, scope) are slow, that is, whose newest call timed out."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._apis: dict[Scope | None, set[str]] = {}
        self._in_flight: Counter[tuple[str, Scope | None]] = Counter()
        self._slow_in_flight = 0

    def may_start(self, call: Call) -> bool:
        """Whether a slot is free. Slow calls share a few slots, and each scope may use one of them."""
        apis = self._apis.get(call.scope, ())
        if call.api not in apis:
            return True
        return self._slow_in_flight < self._slots and not any(self._in_flight[api, call.scope] for api in apis)

    def start(self, call: Call) -> None:
        self._in_flight[call.api, call.scope] += 1
        self._slow_in_flight += self._is_slow(call)

    def end(self, call: Call, timed_out: bool | None) -> bool:
        """Whether a slow call may start now that could not. `timed_out` None: the call was cancelled."""
        was_slow = self._is_slow(call)
        self._slow_in_flight -= was_slow
        self._in_flight[call.api, call.scope] -= 1
        others = self._in_flight[call.api, call.scope]
        if not others:
            del self._in_flight[call.api, call.scope]
        if timed_out is None or timed_out == was_slow:
            return was_slow
        apis = self._apis.setdefault(call.scope, set())
        if timed_out:
            apis.add(call.api)
            self._slow_in_flight += others
        else:
            apis.remove(call.api)
            self._slow_in_flight -= others
        if not apis:
            del self._apis[call.scope]
        return was_slow

    def _is_slow(self, call: Call) -> bool:
        return call.api in self._apis.get(call.scope, ())


class Gate:
    """Lets calls through: `rate` per second, evenly spaced, and at most `slots` at once.

    The next call is the first in order of arrival that may start: a call that waits for the end of a pause or for a
    slow slot does not delay the calls behind it. There is no burst: a token bucket with saved tokens would exceed
    the rate in the second in which all pollers start. `waited` is called with the seconds that each call waited.
    """

    def __init__(self, rate: float, slots: int, clock: Clock, waited: Callable[[float], None]) -> None:
        self._spacing = 1.0 / rate
        self._free = slots
        self._slow = _Slow(max(1, slots // 4))
        self._clock = clock
        self._waited = waited
        self._next = float("-inf")  # when the next call may start
        self._awaited = False  # whether a call waits for that
        self._arrived = 0
        self._queue: _Waiters = OrderedDict()  # in order of arrival
        self._slow_queue: _Waiters = OrderedDict()  # those that were found to wait for a slow slot
        self._paused: dict[PauseKey, _Waiters] = {}  # by the pause that holds them
        self._pauses: dict[PauseKey, tuple[float, ApiReason]] = {}  # until when, and why
        self._timer: asyncio.TimerHandle | None = None

    def set_rate(self, rate: float) -> None:
        """Let `rate` calls through per second from now on."""
        self._spacing = 1.0 / rate
        self._next = min(self._next, self._clock.monotonic() + self._spacing)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._dispatch()

    @property
    def queued(self) -> int:
        """Calls that wait for nothing but a slot or the rate limit."""
        return len(self._queue)

    def pause_api(self, call: Call, seconds: float) -> None:
        """Let no call of this API through for `seconds`. Pauses overlap, they do not add up."""
        self._pause(_pause_keys(call)[0], seconds, "rate_limited")

    def pause_scope(self, call: Call, seconds: float, reason: ApiReason) -> None:
        """Let no call for this scope to this system through for `seconds`."""
        self._pause(_pause_keys(call)[1], seconds, reason)

    def turn(self, call: Call, deadline: Deadline) -> _Turn:
        """A slot, an async context manager that is entered when it is the call's turn.

        Raises ApiError with the reason of a pause that outlasts the deadline. An ApiError `timeout` that leaves the
        context makes this API slow for this scope, another end makes it normal.
        """
        return _Turn(self, call, deadline)

    async def enter(self, call: Call, deadline: Deadline) -> None:
        """Wait for the call's turn; see `turn`."""
        now = self._clock.monotonic()
        if self._free and not self._queue and not self._pauses and now >= self._next and self._slow.may_start(call):
            self._start(call, now)
            self._waited(0.0)
            return
        self._arrived += 1
        waiter = _Waiter(call, deadline, now, self._arrived)
        try:
            self._place(waiter)
            self._dispatch()
            refused = await waiter.turn
        except asyncio.CancelledError:
            if waiter.started:
                self.leave(call, None)
            raise
        finally:
            waiter.leave()
        if refused:
            raise refused
        self._waited(self._clock.monotonic() - waiter.arrived)

    def leave(self, call: Call, timed_out: bool | None) -> None:
        """Give the slot back. `timed_out` None: the call was cancelled."""
        self._free += 1
        if self._slow.end(call, timed_out) and self._slow_queue:
            self._queue_again([*self._slow_queue])
        self._dispatch()

    def _dispatch(self) -> None:
        """Start every call that may start now, and set a timer for the next one."""
        while self._free and self._queue:
            now = self._clock.monotonic()
            if now < self._next:
                self._wake_at(self._next - now)
                return
            waiter = next(iter(self._queue))
            if waiter.turn.done():  # it was cancelled
                waiter.leave()
            elif self._slow.may_start(waiter.call):
                self._start(waiter.call, now)
                waiter.started = True
                waiter.leave()
                waiter.turn.set_result(None)
            else:
                waiter.wait(self._slow_queue)
        self._awaited = False

    def _queue_again(self, waiters: Iterable[_Waiter]) -> None:
        """Let calls queue that a slow slot or a pause has kept out, in their order of arrival."""
        for waiter in waiters:
            self._place(waiter)
        for waiter in sorted(self._queue, key=attrgetter("number")):
            self._queue.move_to_end(waiter)

    def _start(self, call: Call, now: float) -> None:
        # If a call has waited for `_next`, the event loop may be late; the calls behind it must not add to the delay.
        due = max(self._next, now - self._spacing / 2) if self._awaited else now
        self._next, self._awaited = due + self._spacing, False
        self._free -= 1
        self._slow.start(call)

    def _wake_at(self, seconds: float) -> None:
        self._awaited = True
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._dispatch()

    # Pauses

    def _pause(self, key: PauseKey, seconds: float, reason: ApiReason) -> None:
        until = self._clock.monotonic() + seconds
        if key not in self._pauses:
            asyncio.get_running_loop().call_later(seconds, self._end_pause, key)
        elif until <= self._pauses[key][0]:
            return
        self._pauses[key] = until, reason
        for waiter in [*self._queue, *self._slow_queue, *self._paused.get(key, ())]:
            if key in _pause_keys(waiter.call):
                self._place(waiter)

    def _end_pause(self, key: PauseKey) -> None:
        left = self._pauses[key][0] - self._clock.monotonic()
        if left > 0:  # it has been prolonged
            asyncio.get_running_loop().call_later(left, self._end_pause, key)
            return
        del self._pauses[key]
        self._queue_again([*self._paused.pop(key, ())])
        self._dispatch()

    def _place(self, waiter: _Waiter) -> None:
        """Let a call queue, or wait for a pause; fail it when the pause is longer than its deadline allows."""
        pauses = [key for key in _pause_keys(waiter.call) if key in self._pauses] if self._pauses else ()
        longest = max(pauses, key=lambda key: self._pauses[key][0], default=None)
        if longest is None:
            waiter.wait(self._queue)
            return
        until, reason = self._pauses[longest]
        left = until - self._clock.monotonic()
        waiter.wait(self._paused.setdefault(longest, OrderedDict()), paused=True)
        if left > 0 and left >= waiter.deadline.remaining() and not waiter.turn.done():
            text = f"BlueKing asked for a pause of {left:.0f} s more, which is longer than this poll may take"
            waiter.turn.set_result(ApiError(reason, text, retry_after=left))


class _Turn:
    """See `Gate.turn`."""

    __slots__ = ("_call", "_deadline", "_gate")

    def __init__(self, gate: Gate, call: Call, deadline: Deadline) -> None:
        self._gate, self._call, self._deadline = gate, call, deadline

    async def __aenter__(self) -> None:
        await self._gate.enter(self._call, self._deadline)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        timed_out = error.reason == "timeout" if isinstance(error, ApiError) else None if error else False
        self._gate.leave(self._call, timed_out)


class RetryBudget:
    """How many calls may be retried: a share of the first tries within ten minutes, but always `LEAST`.

    Retries go where they help most. A poll that fails at its first call loses nothing and runs again by itself, so it
    may use half of the share. The more calls of a poll have succeeded, the more of the share it may use. Without this
    order, no poll of many calls would be complete while half of all requests fail.
    """

    WINDOW = 600.0
    LEAST = 10
    BUCKET = 10.0

    def __init__(self, share: float, clock: Clock) -> None:
        self._share = share
        self._clock = clock
        self._buckets: deque[_Bucket] = deque()

    def count_call(self) -> None:
        """Count the first try of a call."""
        self._bucket().calls += 1

    def allow(self, answered: int) -> bool:
        """Whether a call may be tried again; if so, the retry is counted. `answered`: see `Deadline`."""
        bucket = self._bucket()
        begin = bucket.start - self.WINDOW
        # Retries are counted a little longer than calls, so that no ten minutes hold more than the budget.
        retries = sum(each.retries for each in self._buckets)
        calls = sum(each.calls for each in self._buckets if each.start > begin)
        if retries + 1 > max(self.LEAST, self._share * calls * (1 - 0.5 ** (1 + answered))):
            return False
        bucket.retries += 1
        return True

    def _bucket(self) -> _Bucket:
        now = self._clock.monotonic()
        while self._buckets and self._buckets[0].start <= now - self.WINDOW - self.BUCKET:
            self._buckets.popleft()
        if not self._buckets or self._buckets[-1].start <= now - self.BUCKET:
            self._buckets.append(_Bucket(now))
        return self._buckets[-1]


class _Bucket(msgspec.Struct):
    """Calls and retries in the ten seconds from `start` on."""

    start: float
    calls: int = 0
    retries: int = 0
