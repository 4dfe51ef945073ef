"""The process as its web server shows it: readiness, status, failures, the page."""

from __future__ import annotations

import asyncio

from exporter import __version__
from exporter.clock import Clock
from exporter.fleet import Fleet
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Exposition, Page
from exporter.sharing import Alone, Sharing
from exporter.status import FailureFilter, FailureFinder, Failures, Status, poller_statuses
from exporter.telemetry import Telemetry

READY_AFTER = 60.0
"""Seconds after which the process is ready even if some poller has not ended its first poll."""


class Process:
    """What is true of the whole process at this moment. Nothing of any scope is shown while its lease has lapsed:
    another replica may show it. `stopping`: set from the request to stop on."""

    def __init__(self, fleet: Fleet, sharing: Alone | Sharing, page: Page, telemetry: Telemetry, clock: Clock) -> None:
        self.stopping = asyncio.Event()
        self._fleet = fleet
        self._sharing = sharing
        self._page = page
        self._telemetry = telemetry
        self._clock = clock
        self._finder = FailureFinder(fleet)
        self._started = clock.wall()
        self._begun = clock.monotonic()
        self._ready = False

    def ready(self) -> bool:
        """Whether every poller has ended a poll, or a minute has passed. A reload never resets it, a stop does.

        With several replicas, this one must also have polled its share.
        """
        if not self._ready:
            complete = self._fleet.attempted and self._sharing.ready
            self._ready = complete or self._uptime() >= READY_AFTER
        return self._ready and not self.stopping.is_set()

    def status(self) -> Status:
        """What the landing page and /api/v1/status show."""
        return Status(
            version=__version__,
            started=self._started,
            uptime=self._uptime(),
            ready=self.ready(),
            series=sum(self._page.counts().values()),
            replicas=self._sharing.replicas(),
            pollers=poller_statuses(self._fleet) if self._sharing.valid else (),
        )

    async def failures(self, wanted: FailureFilter) -> Failures:
        """What /failures and /api/v1/failures show."""
        return await self._finder.find(wanted) if self._sharing.valid else Failures(visible=False)

    def exposition(self, form: Format, names: frozenset[str] | None, gzip: bool) -> Exposition:
        """The answer to a scrape of these families, None for all."""
        # Count first: counting determines how many series max_series cuts.
        self._telemetry.series(self._page.counts())
        self._sharing.measure()
        shown = names if self._sharing.valid else frozenset()
        exposition = self._page.exposition(form, shown, self._telemetry.render(form.openmetrics, names), gzip)
        if names is None:
            self._telemetry.exposition(exposition.size)
        return exposition

    def _uptime(self) -> float:
        return self._clock.monotonic() - self._begun
