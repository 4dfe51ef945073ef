"""Ask each scope and collector once before a deployment: is it reachable and permitted, and what will it cost?"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from exporter import log
from exporter.blueking.client import Client
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.config.schema import Config
from exporter.discovery import add_found, unmatched
from exporter.errors import ApiError
from exporter.exposed import page_families
from exporter.fleet import pollers
from exporter.metrics.page import Page
from exporter.model import Key
from exporter.poller import Poller, Services
from exporter.state.memory import MemoryStore
from exporter.telemetry import Telemetry

DAY = 86400.0
_NO_USER = (
    "no user has arrived behind the gateway: ask its administrator to let bk_username of this application pass "
    "(from_username) and to switch skip_user_verification off for these resources"
)
HINTS = {
    "1306201": "the ESB gives this code for many causes: a backend that failed or timed out, and the route of "
    "get_task_info, which NodeMan 2.x no longer has",
    "1247002": _NO_USER,  # JOB
    "3800007": _NO_USER,  # NodeMan V3
}


class Finding(msgspec.Struct, frozen=True):
    """The result for one (collector, scope). `error` is empty when nothing is wrong; see `Trial` for the other
    fields."""

    key: Key
    error: str
    series: int = 0
    calls_per_day: float = 0.0
    notes: tuple[str, ...] = ()
    certain: bool = True

    def __str__(self) -> str:
        if self.error:
            return f"FAIL  {self.key}: {self.error}"
        cost = f"about {self.series} series, {self.calls_per_day:.0f} API calls per day"
        return "; ".join([f"{'ok' if self.certain else '?':<5} {self.key}: {cost}", *self.notes])


class Quotas(Telemetry):
    """Remembers what the gateway says is left, by API, beside everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.remaining: dict[str, float] = {}

    def quota(self, api: str, remaining: float) -> None:
        self.remaining[api] = remaining


class Discovered(msgspec.Struct, frozen=True):
    """What CMDB lists. `error` is empty when all is well; `unmatched`: configured entries that name nothing of it."""

    scopes: int = 0
    unmatched: tuple[tuple[str, str], ...] = ()
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"FAIL  discovery: {self.error}"
        warnings = "".join(f'\nwarn  {path}: CMDB lists nothing that is "{entry}"' for path, entry in self.unmatched)
        return f"ok    discovery: {self.scopes} scopes beside the configured ones{warnings}"


async def probe(config: Config, telemetry: Telemetry) -> AsyncGenerator[Finding | Discovered, None]:
    """What was discovered, where that is enabled, then one finding per poller, in the order of the configuration.

    Nothing is stored; BlueKing is only read.
    """
    clock = Clock()
    services = Services(MemoryStore(), Page(page_families(), config.max_series), telemetry, clock)
    async with Client(config.blueking, clock, telemetry, log.get()) as client:
        if config.discovery.enabled:
            try:
                extended, listed = await add_found(config, client, clock)
            except ApiError as error:
                yield Discovered(error=explain(error))
            else:
                found = len(extended.scopes) - len(config.scopes)
                yield Discovered(found, tuple(unmatched(config.discovery, listed)))
                config = extended
        for poller in pollers(config, client, services):
            yield await _probe(poller, config, clock)


async def _probe(poller: Poller, config: Config, clock: Clock) -> Finding:
    collector = poller.collector
    seconds = max(collector.interval, 2 * config.blueking.request_timeout)
    try:
        records = await collector.fetch(None, Deadline(seconds, clock))
        observation = await poller.observe(records)
        poller.take(observation)
        trial = await collector.probe(poller.state, Deadline(seconds, clock))
    except ApiError as error:
        return Finding(poller.key, explain(error))
    finally:
        poller.close()
    failed = observation.observed.errors
    if wrong := [each for each in failed if each.configured and each.reason != "not_ready"]:
        return Finding(poller.key, "; ".join(f"{each.about}: {each.reason}; {each.message}" for each in wrong))
    notes = [f"{each.about}: {each.reason}, {each.consequence}; {each.message}" for each in failed]
    notes += trial.notes
    return Finding(poller.key, "", poller.exposed.series, trial.calls_per_day, tuple(notes), trial.certain)


def explain(error: ApiError) -> str:
    """The error with hints for its repair: the name of the missing permission, the meanings of a vague code."""
    parts = [f"{error.api}: {error.reason}" if error.api else error.reason]
    if error.code:
        parts.append(f"code {error.code}")
    if error.actions:
        parts.append(f"missing permission: {', '.join(error.actions)}")
    parts.append(str(error))
    if error.request_id:
        parts.append(f"request id {error.request_id}")
    if error.code in HINTS:
        parts.append(HINTS[error.code])
    return "; ".join(parts)


async def report(config: Config) -> AsyncGenerator[tuple[str, bool], None]:
    """The lines to print, each with whether it reports a success."""
    series, calls, quotas = 0, 0.0, Quotas()
    async with aclosing(probe(config, quotas)) as findings:
        async for finding in findings:
            if isinstance(finding, Finding):
                series += finding.series
                calls += finding.calls_per_day
            yield str(finding), not finding.error
    for api, remaining in sorted(quotas.remaining.items()):
        yield f"quota {api}: {remaining:.0f} requests left, says the gateway", True
    yield f"total about {series} series, {calls:.0f} API calls per day ({calls / DAY:.2f} per second)", True
