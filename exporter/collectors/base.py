"""What a collector is: `fetch` does the I/O of one poll, `observe` folds its records into the state.

    records = await collector.fetch(state, deadline)        all or nothing; raises ApiError
    observed = collector.observe(state, records, tally)     pure: no clock, no network, no log

Adding an API to watch is one file here and one line in `COLLECTORS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgspec

from exporter.blueking.job import JobApi
from exporter.blueking.nodeman import NodemanApi
from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.failing_hosts import FailingHosts
from exporter.config.schema import ScopeConfig
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Counts, Family
from exporter.model import Scope

GAP = "blueking_exporter_collector_gap_seconds_total"
TRUNCATED = "blueking_exporter_collector_truncated_total"


class CollectorState(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What every collector's state has. All of it is committed together; what is not in it does not exist.

    `last_success`: wall clock of the newest complete poll; `watermark`: platform time up to which everything is
    counted; both in unix seconds.
    """

    counts: Counts
    last_success: float
    watermark: float | None = None


S = TypeVar("S", bound=CollectorState)
S_co = TypeVar("S_co", bound=CollectorState, covariant=True)


WITHOUT_HOSTS = "counted without host results"
"""Consequence of a call that failed."""


class FailedCall(msgspec.Struct, frozen=True):
    """A call that failed without failing the poll. `about`: what it was made for, as "job 181"; `consequence`: what the
    poll did without its answer."""

    reason: str
    about: str
    consequence: str
    message: str

    @classmethod
    def of(cls, error: ApiError, about: str, consequence: str) -> FailedCall:
        return cls(error.reason, about, consequence, str(error))


class Observed(msgspec.Struct, Generic[S_co], frozen=True):
    """What one poll changed. `unknown`: (field, value) of words that the tables do not have, for the log and
    `unknown_values_total`. `errors`: calls that failed without failing the poll. `more`: there is history left to read,
    poll again at once."""

    state: S_co
    unknown: tuple[tuple[str, str], ...] = ()
    errors: tuple[FailedCall, ...] = ()
    more: bool = False


class Platforms(msgspec.Struct, frozen=True):
    """The APIs that a collector may ask, None where the platform is not configured."""

    job: JobApi | None = None
    nodeman: NodemanApi | None = None
    nodeman_legacy: NodemanLegacyApi | None = None


class Records(Protocol):
    """What one `fetch` brought."""

    @property
    def size(self) -> int:
        """Rows in it, which is what folding it takes its time for."""


class Attempts:
    """How often one thing has failed the poll of its scope for a reason that may pass: lives with the poller."""

    MOST = 5
    """Polls that one execution may fail before it is counted without what it does not tell."""

    def __init__(self) -> None:
        self._failed: dict[int, int] = {}

    def exhausted(self, id: int, error: ApiError) -> bool:
        """Whether to go on without `id`: at once after an answer that is final, else after `MOST` failed polls."""
        return not error.transient or self._failed.get(id, 0) >= self.MOST

    def give_up(self, id: int, error: ApiError) -> bool:
        """`exhausted`; where not, the poll fails because of `id` once more."""
        if self.exhausted(id, error):
            return True
        self.charge((id,))
        return False

    def charge(self, ids: Iterable[int]) -> None:
        """The present poll fails, and these are what it could not get."""
        for id in ids:
            self._failed[id] = self._failed.get(id, 0) + 1

    def forget(self, ids: Iterable[int]) -> None:
        """These have been dealt with."""
        for id in ids:
            self._failed.pop(id, None)


class FailedExecution(msgspec.Struct, frozen=True):
    """A recent failure, for /api/v1/failures. `end` in unix seconds, None where the platform gave none."""

    id: int
    name: str
    status: str
    end: float | None


class Collector(Protocol):
    """One API of BlueKing watched for one scope. Instances are cheap and keep nothing that must survive.

    The types of records and state are the collector's own business: the poller hands them from one method to the next.
    """

    name: ClassVar[str]
    families: ClassVar[tuple[Family, ...]]
    state_type: ClassVar[type[Any]]
    failure_labels: ClassVar[tuple[str, ...]]
    scope: Scope
    interval: float

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock) -> Collector | None:
        """The collector of this scope, None when it is switched off."""

    async def fetch(self, state: Any, deadline: Deadline) -> Any:
        """Everything one poll needs from the platform. Raises `ApiError`; then nothing has changed."""

    def observe(self, state: Any, records: Any, tally: Tally) -> Observed[Any]:
        """The next state. `tally` counts on from `state`; its `now` is the wall clock, for `last_success`."""

    async def probe(self, state: Any, deadline: Deadline) -> float:
        """Ask what `fetch` with this state did not have to ask; the API calls per day to expect. Raises `ApiError`."""

    def view(self, state: Any) -> Any:
        """What the `gauge` functions of the families read."""

    def failing_hosts(self, state: Any) -> FailingHosts:
        """The hosts that fail now; the labels of their failures are named by `failure_labels`."""

    def failed_executions(self, state: Any) -> list[FailedExecution]:
        """The newest failures in the state, newest first."""


T = TypeVar("T")

MANY = 2000
"""Rows that are folded in one go, in some 20 ms."""


async def fold(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, which is pure Python, pure, and takes `size` rows.

    Many are folded in a thread: there the interpreter lets the event loop in between.
    """
    return work() if size <= MANY else await asyncio.to_thread(work)


async def gather_bounded(calls: Iterable[Coroutine[Any, Any, T]], limit: int) -> list[T]:
    """The results of `calls` in their order, at most `limit` under way at once. The first error ends them all."""
    numbered = list(enumerate(calls))
    if not numbered:
        return []
    waiting = iter(numbered)
    results: dict[int, T] = {}

    async def work() -> None:
        for index, call in waiting:
            results[index] = await call

    first: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(limit, len(numbered))):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
    finally:
        for _, call in waiting:
            call.close()
    try:
        if first is not None:
            raise first
    finally:
        # Raised outside the handler and forgotten here: in a circle with the group it would hold on to whole answers.
        first = None
    return [results[index] for index in sorted(results)]
