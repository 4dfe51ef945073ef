"""Poll as the daemon does for a time, read the same again, count it plainly, and print every difference.

A poll and the second reading cannot happen at the same moment. So each (collector, scope) is polled, read again and
polled once more. If both polls show the same, the plain count must be equal to them. If not, a counter must lie between
the two polls, and gauges cannot be compared.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter import log
from exporter.blueking.client import Client
from exporter.blueking.transport import HttpTransport
from exporter.clock import Clock
from exporter.collectors import COLLECTORS
from exporter.collectors.base import TRUNCATED, Collector, FinishedRun, Records
from exporter.config.schema import Config
from exporter.discovery import add_found
from exporter.errors import ApiError, ExporterError
from exporter.exposed import ERRORS, page_families
from exporter.fleet import platforms
from exporter.metrics.bounds import OTHER
from exporter.metrics.family import Labels
from exporter.metrics.page import Page
from exporter.poller import Observation, Poller, Services, Settings
from exporter.state.memory import MemoryStore
from exporter.telemetry import Telemetry
from exporter.verify.answers import Answers
from exporter.verify.count import RECOUNTS
from exporter.verify.count.base import Id, Recount, Recounted, Samples

ROUNDS = 5
"""How many times a (collector, scope) is read again while the polls before and after differ."""
SHOWN = 20
"""Most ids that a line lists."""

Line = tuple[str, bool]
"""A line to print, and False for a problem."""


class VerifiedPoller(Poller):
    """A poller that remembers what it has counted. `finished`: the runs that it has counted, by id; `unknown`: (field,
    value) that no table contains."""

    def __init__(
        self, collector: Collector, settings: Settings, services: Services, recount: Recount[Any, Any]
    ) -> None:
        super().__init__(collector, settings, services)
        self.recount = recount
        self.finished: dict[Id, list[FinishedRun]] = {}
        self.unknown: set[tuple[str, str]] = set()

    async def observe(self, records: Records) -> Observation:
        observation = await super().observe(records)
        self.recount.note(records)
        self.unknown.update(observation.observed.unknown)
        for run in observation.observed.finished:
            self.finished.setdefault(run.id, []).append(run)
        return observation

    async def catch_up(self) -> bool:
        """Poll until there is no history left to read. Returns whether the last poll succeeded."""
        while await self.poll():
            pass
        return self.success is True

    def samples(self) -> Samples:
        """The values that it has counted. A new series is not shown as 0 first, as it is on /metrics."""
        shown = Samples()
        if self.state is None:
            return shown
        for name, counters in self.state.counts.counters.items():
            shown[name] = {labels: count.value for labels, count in counters.items()}
        for name, spreads in self.state.counts.histograms.items():
            shown[f"{name}_count"] = {labels: float(sum(spread.counts)) for labels, spread in spreads.items()}
            shown[f"{name}_sum"] = {labels: spread.sum for labels, spread in spreads.items()}
        for name, gauges in self.report.samples.items():
            shown[name] = dict(gauges)
        return shown


async def verify(
    config: Config, seconds: float, record: Path | None = None, clock: Clock | None = None
) -> AsyncGenerator[Line, None]:
    """The lines to print, after `seconds` of polling. Nothing is stored, nothing on BlueKing is changed.

    `record`: a folder for copies of the answers. Raises `ExporterError` if it cannot be used, `ConfigError`.
    """
    clock = clock or Clock()
    answers = Answers(HttpTransport(config.blueking), record)
    services = Services(MemoryStore(), Page(page_families(), config.max_series), Telemetry(), clock)
    async with Client(config.blueking, clock, services.telemetry, log.get(), answers) as client:
        try:
            if config.discovery.enabled:
                config, _ = await add_found(config, client, clock)
        except ApiError as error:
            yield f"FAIL  discovery: {error}", False
            return
        unused: dict[str, list[str]] = {}
        pollers = _pollers(config, client, services)
        await _poll(pollers, seconds)
        for poller in pollers:
            for line in await _verify(poller):
                yield line
    for api, path in answers.documented:
        unused.setdefault(f"{api}: {path.rpartition('.')[0]}", []).append(path.rpartition(".")[2])
    for where, names in unused.items():
        yield f"note  {where}: documented, and not used: {', '.join(names)}", True
    if answers.unchecked:
        yield f"note  members are not checked in the answers of {', '.join(sorted(answers.unchecked))}", True
    for api, path in answers.undocumented:
        yield f"FAIL  {api}: {path} is in no document, and not used", False
    if answers.problem:
        raise ExporterError(answers.problem)
    if record is not None:
        yield f"note  {answers.files} answers recorded in {record}; read them before you send them", True


def _pollers(config: Config, client: Client, services: Services) -> list[VerifiedPoller]:
    settings, clock, seconds = Settings.of(config), services.clock, 2 * config.blueking.request_timeout
    made: list[VerifiedPoller] = []
    for one in config.scopes:
        apis = platforms(client, one)
        for kind in COLLECTORS:
            if (collector := kind.build(one, apis, clock)) is not None:
                own = getattr(one.collectors, kind.name)
                recount = RECOUNTS[kind.name](one.scope, own, getattr(apis, own.platform), seconds, clock)
                made.append(VerifiedPoller(collector, settings, services, recount))
    return made


async def _poll(pollers: Sequence[VerifiedPoller], seconds: float) -> None:
    """Let them run until each has polled once, and then for `seconds`."""
    async with asyncio.TaskGroup() as tasks:
        try:
            for poller in pollers:
                poller.start(lambda one: one.begin(tasks))
            while not all(poller.attempted for poller in pollers):  # noqa: ASYNC110 (no event for this alone)
                await asyncio.sleep(0.05)
            await asyncio.sleep(seconds)
        finally:
            for poller in pollers:
                poller.stop()


async def _verify(poller: VerifiedPoller) -> list[Line]:
    """The lines about one (collector, scope)."""
    if poller.state is None:
        return [(f"FAIL  {poller.key}: no poll was complete: {poller.reason}; {poller.message}", False)]
    for _ in range(ROUNDS):
        if not await poller.catch_up():
            return [(f"FAIL  {poller.key}: {poller.reason}; {poller.message}", False)]
        before, finished = poller.samples(), {id: len(runs) for id, runs in poller.finished.items()}
        try:
            recounted = await poller.recount.read(poller.finished)
        except ApiError as error:
            return [(f"FAIL  {poller.key}: cannot be read again: {error.reason}; {error}", False)]
        if not await poller.catch_up():
            return [(f"FAIL  {poller.key}: {poller.reason}; {poller.message}", False)]
        after = poller.samples()
        if all(before.get(name) == after.get(name) for name in recounted.samples):
            break
    moving = any(before.get(name) != after.get(name) for name in recounted.samples)
    if moving:
        gauges = {family.name for family in poller.collector.families if family.kind == "gauge"}
        recounted.samples = Samples({name: of for name, of in recounted.samples.items() if name not in gauges})
        recounted.notes.append("it changed all the time: counters lie between two polls, gauges are not compared")
    wrong = [*_differences(poller, before, recounted, after), *_runs(poller, recounted, finished)]
    wrong += [f"{field} has the unknown value {value}" for field, value in sorted(poller.unknown | recounted.unknown)]
    lines: list[Line] = [(f"DIFF  {poller.key}: {text}", False) for text in wrong]
    notes = list(recounted.notes)
    retried = sum(len(runs) > 1 for runs in poller.finished.values())
    notes += [f"{retried} runs were retried; their earlier ends are as the polls counted them"] if retried else []
    for (reason,), failed in poller.report.errors.counters.get(ERRORS, {}).items():
        notes.append(f"{failed.value:.0f} calls or polls failed with the reason {reason}; later polls made up for them")
    if truncated := after.get(TRUNCATED, {}).get((), 0.0):
        notes.append(f"{TRUNCATED} is {truncated:.0f}: so many objects could not be read while polling")
    lines += [(f"note  {poller.key}: {text}", True) for text in notes]
    if not wrong:
        series = sum(map(len, recounted.samples.values()))
        lines.insert(0, (f"ok    {poller.key}: {series} values equal, {len(poller.finished)} runs finished", True))
    return lines


def _differences(
    poller: VerifiedPoller, before: Mapping[str, Mapping[Labels, float]], recounted: Recounted, after: Samples
) -> Iterator[str]:
    families = {family.name: family for family in poller.collector.families}
    for name, expected in recounted.samples.items():
        old, new = before.get(name, {}), after.get(name, {})
        if any(OTHER in labels for labels in new):
            # Label values beyond the limit of the page are shown as one.
            old, expected, new = _sum(old), _sum(expected), _sum(new)
        # A sum of durations depends on the order of its parts.
        tolerance = 0.0 if name in families else 1e-9
        for labels in sorted({*old, *expected, *new}):
            value = expected.get(labels, 0.0)
            low, high = sorted((old.get(labels, 0.0), new.get(labels, 0.0)))
            within = value <= high or math.isclose(value, high, rel_tol=tolerance)
            within &= name in recounted.at_least or value >= low or math.isclose(value, low, rel_tol=tolerance)
            if not within:
                polled = f"{high:.15g}" if low == high else f"{low:.15g} to {high:.15g}"
                family = families.get(name) or families[name.removesuffix("_count").removesuffix("_sum")]
                pairs = ",".join(f'{label}="{one}"' for label, one in zip(family.labels, labels, strict=False))
                yield f"{name}{{{pairs}}}: counted {polled} while polling, {value:.15g} when read again"


def _sum(values: Mapping[Labels, float]) -> dict[Labels, float]:
    return {(): sum(values.values(), 0.0)}


def _runs(poller: VerifiedPoller, recounted: Recounted, before: Mapping[Id, int]) -> Iterator[str]:
    """Runs whose newest end differs. `before`: how many ends of each run were counted before the second reading."""
    what, counted = poller.recount.what, poller.finished
    missing = _sorted(id for id in recounted.runs if id not in counted)
    gone = _sorted(id for id in recounted.gone if id in before)
    other = [
        f"{id} (counted as {counted[id][-1].status}, is {recounted.runs[id]})"
        for id in _sorted(recounted.runs)
        if id in counted and before.get(id) == len(counted[id]) and counted[id][-1].status != recounted.runs[id]
    ]
    for text, ids in (("ended and not counted", missing), ("counted and not shown any more", gone), ("changed", other)):
        if ids:
            more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            yield f"{what}s {text}: {', '.join(map(str, ids[:SHOWN]))}{more}"


def _sorted(ids: Iterable[Id]) -> list[Id]:
    return sorted(ids, key=lambda id: (str(id).isdecimal(), len(str(id)), str(id)))
