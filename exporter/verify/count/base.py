"""What the plain counts share: samples, what a count found, and how long one call may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import FinishedRun
from exporter.metrics.family import Labels

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


class Recount(Protocol):
    """Reads again what the polls of one collector have read, and counts it."""

    what: str
    """What `Recounted.runs` are called, in the singular."""

    def note(self, records: Any) -> None:
        """Take the records of a complete poll, the first one first."""

    async def read(self, finished: Finished) -> Recounted:
        """Read everything afresh and count it. Raises `ApiError`."""


class Reader:
    """Gives each call its deadline."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds

    def deadline(self) -> Deadline:
        return Deadline(self._seconds, self._clock)
