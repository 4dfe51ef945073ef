"""What a collector is: `fetch` does the I/O of one poll, `observe` folds its records into the state.

    records = await collector.fetch(state, deadline)        all or nothing; raises ApiError
    observed = collector.observe(state, records, tally)     pure: no clock, no network, no log

Adding an API to watch: see CONTRIBUTING.md.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import msgspec

from exporter.blueking.job import JobApi
from exporter.blueking.nodeman import NodemanApi
from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.blueking.nodemgr import NodemgrApi
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.failing_hosts import FailingHosts, Run
from exporter.config.schema import ScopeConfig
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Counts, Family
from exporter.model import Scope

GAP = "blueking_exporter_collector_gap_seconds_total"
TRUNCATED = "blueking_exporter_collector_truncated_total"


class CollectorState(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The fields of every collector's state. The whole state is committed at once; nothing else is kept.

    `last_success`: wall clock of the newest complete poll; `watermark`: platform time up to which everything is
    counted; both in unix seconds.
    """

    TIMES: ClassVar[frozenset[str]] = frozenset({"last_success", "watermark"})
    """Fields that only tell up to when history was read. With an older value of all of them, more is read again."""

    counts: Counts
    last_success: float
    watermark: float | None = None

    def equals_except_times(self, other: Self) -> bool:
        """Whether a poll that leads from one state to the other has found nothing new."""
        contents = _contents(type(self))
        return bool(contents(self) == contents(other))


@functools.cache
def _contents(state_type: type[CollectorState]) -> Callable[[CollectorState], Any]:
    """The fields of a state but for its `TIMES`. Parts that both states share are compared by identity."""
    return attrgetter(*(name for name in state_type.__struct_fields__ if name not in state_type.TIMES))


S = TypeVar("S", bound=CollectorState)
S_co = TypeVar("S_co", bound=CollectorState, covariant=True)


WITHOUT_HOSTS = "counted without host results"
"""A `consequence` of `FailedCall`."""


class FailedCall(msgspec.Struct, frozen=True):
    """A call that failed without failing the poll. `about`: the object it was made for, such as "job 181";
    `consequence`: what the poll did without the answer; `request_id`: as in `ApiError`; `configured`: whether the
    configuration names the object."""

    reason: str
    about: str
    consequence: str
    message: str
    request_id: str = ""
    configured: bool = False

    @classmethod
    def of(cls, error: ApiError, about: str, consequence: str, *, configured: bool = False) -> FailedCall:
        return cls(error.reason, about, consequence, str(error), error.request_id, configured)


class FinishedRun(msgspec.Struct, frozen=True, gc=False):
    """A run that was counted as finished. `failed`: its outcome is a failure. Times in unix seconds, as the platform
    gives them; None where it gives none.

    `failed_hosts`: how many hosts failed, by code (NodeMan 2.x, which has none: by step), as far as their results were
    read by then.
    """

    id: Run
    name: str
    status: str
    failed: bool
    start: float | None
    end: float | None
    failed_hosts: Mapping[str, int] = {}


def shown_id(run: Run) -> int | str:
    """The id of a run as its platform names it: that of a workflow of NodeMan V3 is kept with its domain before it."""
    return run if isinstance(run, int) else run.partition("/")[2]


class Observed(msgspec.Struct, Generic[S_co], frozen=True):
    """The result of one poll. `unknown`: (field, value) of words that the tables do not contain, for the log and
    `unknown_values_total`. `errors`: calls that failed without failing the poll. `more`: history is left to read, so
    poll again at once. `finished`: the runs that this poll has counted as finished, to be read once."""

    state: S_co
    unknown: tuple[tuple[str, str], ...] = ()
    errors: tuple[FailedCall, ...] = ()
    more: bool = False
    finished: Iterable[FinishedRun] = ()


class Trial(msgspec.Struct, frozen=True):
    """The result of a trial of a collector. `calls_per_day`: the API calls to expect. `notes`: what the answers cannot
    show and a person has to check. `certain`: it is certain that the scope exists and may be watched."""

    calls_per_day: float
    notes: tuple[str, ...] = ()
    certain: bool = True


class Platforms(msgspec.Struct, frozen=True):
    """The APIs that a collector may ask, None where the platform is not configured."""

    job: JobApi | None = None
    nodeman: NodemanApi | None = None
    nodeman_legacy: NodemanLegacyApi | None = None
    nodemgr: NodemgrApi | None = None


class Records(Protocol):
    """The result of one `fetch`."""

    @property
    def size(self) -> int:
        """Number of rows: the time to fold the records grows with it."""


class FailedExecution(msgspec.Struct, frozen=True):
    """A recent failure, for /api/v1/failures. `end` in unix seconds, None where the platform gave none."""

    id: Run
    name: str
    status: str
    end: float | None


LEAST_CATCHUP = 600.0
"""Seconds: with a shorter `max_catchup`, a watermark that is committed a minute late could show a gap after `kill -9`
where there is none."""


class Collector(Protocol):
    """Watches one API of BlueKing for one scope. Instances are cheap and keep nothing that must survive a restart.

    Each collector has its own types of records and state: the poller only passes them from one method to the next.
    """

    name: ClassVar[str]
    families: ClassVar[tuple[Family, ...]]
    state_type: ClassVar[type[Any]]
    failure_labels: ClassVar[tuple[str, ...]]
    run_id: ClassVar[str]
    """What /api/v1/failures calls the id of a run, as `job_id`; "" where runs have none. Texts are `workflow_id`."""
    scope: Scope
    interval: float

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock) -> Collector | None:
        """The collector of this scope, None when it is switched off."""

    @property
    def commits_later(self) -> bool:
        """Whether a poll that found nothing new may be committed up to a minute later; see `LEAST_CATCHUP`."""

    async def fetch(self, state: Any, deadline: Deadline) -> Any:
        """Everything one poll needs from the platform. Raises `ApiError`; then nothing has changed."""

    def observe(self, state: Any, records: Any, tally: Tally) -> Observed[Any]:
        """The next state. `tally` starts with the counts of `state`; its `now` is the wall clock, for
        `last_success`."""

    def unchanged(self, state: Any, records: Any, now: float) -> Any | None:
        """The state that `observe` would return, if it is certain without folding that nothing but its `TIMES` changes.

        Asked only after a poll that was observed with the same configuration. `now`: the wall clock.
        """

    async def probe(self, state: Any, deadline: Deadline) -> Trial:
        """Try the calls that `fetch` did not need for this state. Raises `ApiError`."""

    def view(self, state: Any) -> Any:
        """What the `gauge` functions of the families read."""

    def failing_hosts(self, state: Any) -> FailingHosts:
        """The hosts that fail now; the labels of their failures are named by `failure_labels`."""

    def url(self, run: Run) -> str:
        """The platform's page of a run, "" where there is none or `web_url` is not configured."""

    def failed_executions(self, state: Any) -> list[FailedExecution]:
        """The newest failures in the state, newest first."""


T = TypeVar("T")

MANY = 2000
"""Rows that are folded in one go, in some 20 ms."""


async def fold(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, which is pure Python without side effects and folds `size` rows.

    Many rows are folded in a thread, so that the event loop can run meanwhile.
    """
    return work() if size <= MANY else await asyncio.to_thread(work)
