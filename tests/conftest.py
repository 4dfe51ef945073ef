"""Fixtures that every test may ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

from tests.support.components import Stack
from tests.support.process import BIZ, OTHER, Simulated


def pytest_configure() -> None:
    """Let no example fail for being slow, since machines are shared; say that there is no event loop, else
    pytest-asyncio lets Python make one, which nobody closes."""
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")
    asyncio.set_event_loop(None)


@pytest.fixture(autouse=True)
def default_log() -> Iterator[None]:
    """Begin with the log as structlog makes it, whatever other tests or modules have configured."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture
def simulated() -> Iterator[Simulated]:
    """A simulated platform with two businesses, in real time."""
    with Simulated(BIZ, OTHER) as running:
        yield running


@pytest.fixture
def stack() -> Iterator[Stack]:
    """Real Prometheus, Alertmanager and Redis on demand; stopped with the test."""
    with Stack() as servers:
        yield servers
