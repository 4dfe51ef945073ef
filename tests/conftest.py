"""Fixtures for all tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

from tests.support.components import Stack
from tests.support.process import BIZ, OTHER, Simulated


def pytest_configure() -> None:
    """No hypothesis example fails for being slow, since machines are shared. There is no event loop at first:
    otherwise pytest-asyncio makes Python create one that nothing closes."""
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")
    asyncio.set_event_loop(None)


@pytest.fixture(autouse=True)
def default_log() -> Iterator[None]:
    """Start with structlog's default configuration, whatever other tests or modules have configured."""
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
    """Starts real Prometheus, Alertmanager and Redis; stops them at the end of the test."""
    with Stack() as servers:
        yield servers
