"""What the plain counts share: samples, the result of a count, and how a count is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import FinishedRun
from exporter.metrics.family import Labels
from exporter.model import Scope

A = TypeVar("A")
C = TypeVar("C")

CONCURRENCY = 4
"""Calls of one count that run at once."""
PAGE = 500
"""Rows of a page of NodeMan."""

Id = int | str
"""The id of a run: a number, or text in NodeMan V3."""
Finished = Mapping[Id, Sequence[FinishedRun]]
"""The runs that a poller has counted as finished, by id, in their order."""


class Samples(dict[str, dict[Labels, float]]):
    """Values by sample name and labels."""

    def add(self, name: str, labels: Labels = (), by: float = 1.0) -> None:
        of_name = self.setdefault(name, {})
        of_name[labels] = of_name.get(labels, 0.0) + by

    def observe(self, name: str, labels: Labels, start: int | None, end: int | None, scale: int = 1000) -> None:
        """Observe the time between two times, of which `scale` make a second; not if one is missing or they contradict
        each other."""
        if start is not None and end is not None and start <= end:
            self.add(f"{name}_count", labels)
            self.add(f"{name}_sum", labels, (end - start) / scale)

    def latest(self, name: str, labels: Labels, value: float) -> None:
        of_name = self.setdefault(name, {})
        of_name[labels] = max(value, of_name.get(labels, value))

    def earliest(self, name: str, labels: Labels, value: float) -> None:
        of_name = self.setdefault(name, {})
        of_name[labels] = min(value, of_name.get(labels, value))

    def expect(self, *names: str) -> None:
        """Compare these samples even where there is nothing to count."""
        for name in names:
            self.setdefault(name, {})


class Recounted:
    """The result of a plain count.

    `samples`: the values that a poller must show; `at_least`: samples that it may exceed, since earlier runs of what
    was retried cannot be read again. `runs`: the status of the newest finished run, by id. `gone`: ids that were
    counted and that the platform no longer shows. `unknown`: (field, value) that no table contains. `notes`: lines to
    print.
    """

    def __init__(self) -> None:
        self.samples = Samples()
        self.at_least: set[str] = set()
        self.runs: dict[Id, str] = {}
        self.gone: set[Id] = set()
        self.unknown: set[tuple[str, str]] = set()
        self.notes: list[str] = []


class Recount(Generic[C, A]):
    """Reads again what the polls of one collector have read, and counts it. `C`: the settings of the collector, `A`:
    its API. A call may take `seconds`."""

    what: ClassVar[str]
    """What `Recounted.runs` are called, in the singular."""

    def __init__(self, scope: Scope, config: C, api: A, seconds: float, clock: Clock) -> None:
        self.scope = scope
        self.biz = int(scope.bk_scope_id)
        self.config: C = config
        self.api: A = api
        self.seconds = seconds
        self.clock = clock

    def note(self, records: Any) -> None:
        """Take the records of a complete poll, the first one first. Not needed where one answer contains everything."""

    async def read(self, finished: Finished) -> Recounted:
        """Read everything afresh and count it. Raises `ApiError`."""
        raise NotImplementedError

    def deadline(self) -> Deadline:
        """The deadline of a call that begins now."""
        return Deadline(self.seconds, self.clock)
