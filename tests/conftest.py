"""Fixtures that every test may ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.components import Stack


@pytest.fixture
def stack() -> Iterator[Stack]:
    """Real Prometheus, Alertmanager and Redis on demand; stopped with the test."""
    with Stack() as servers:
        yield servers
