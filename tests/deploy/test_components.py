"""The real servers that other tests stand on do start, answer and stop here."""

from __future__ import annotations

import pytest

from tests.support.components import Stack, eventually, http, require

pytestmark = pytest.mark.component


def test_prometheus_scrapes_itself_through_the_stack(stack: Stack) -> None:
    """A started Prometheus scrapes a target and answers a query about it."""
    alertmanager = stack.alertmanager()
    prometheus = stack.prometheus([f"127.0.0.1:{alertmanager.port}"], alertmanager=alertmanager)
    assert eventually(lambda: prometheus.value('up{job="blueking"}')) == 1
    assert prometheus.value("absent_metric") is None
    assert eventually(lambda: prometheus.json("/api/v1/alertmanagers")["data"]["activeAlertmanagers"])


def test_redis_is_gone_after_the_stack() -> None:
    """What a stack started does not outlive it."""
    require("redis-server")
    with Stack() as stack:
        redis = stack.redis()
        assert redis.process.poll() is None
    assert redis.process.poll() is not None
    with pytest.raises(OSError, match="refused"):
        http(redis.url)
