"""1 % of 100,000 series changed until it can be seen, beside prometheus_client: `python -m bench.updating`, JSON."""

from __future__ import annotations

import gc
import json
import time

from prometheus_client import CollectorRegistry, Gauge

from bench import series

SERIES = 100_000
ROUNDS = 30


def registered(count: int) -> tuple[CollectorRegistry, list[Gauge]]:
    """The series of bench/series.py in prometheus_client."""
    registry = CollectorRegistry()
    names = ("bk_scope_type", "bk_scope_id", "task_type", "launch_mode", "status")
    gauges = [Gauge(family.name, family.help, names, registry=registry) for family in series.FAMILIES]
    for owner in range(count // series.PER_SCOPE):
        for gauge, samples in zip(gauges, series.values(owner), strict=True):
            for labels, value in samples.items():
                gauge.labels("biz", series.scope(owner).bk_scope_id, *labels).set(value)
    return registry, gauges


def measure() -> list[tuple[float, float]]:
    """CPU seconds of ours and of `labels().set`, round by round."""
    page = series.filled(SERIES)
    owners = range(0, SERIES // series.PER_SCOPE, 100)
    _, gauges = registered(SERIES)
    measured = []
    for generation in range(1, ROUNDS + 1):
        changed = {owner: series.values(owner, generation) for owner in owners}
        gc.collect()  # before each of the two: it also empties the caches of the processor
        began = time.process_time()
        for owner, values in changed.items():
            series.show(page, owner, values)
        ours = time.process_time() - began
        gc.collect()
        began = time.process_time()
        for owner, values in changed.items():
            number = series.scope(owner).bk_scope_id
            for gauge, samples in zip(gauges, values, strict=True):
                for labels, value in samples.items():
                    gauge.labels("biz", number, *labels).set(value)
        measured.append((ours, time.process_time() - began))
    return measured


if __name__ == "__main__":
    print(json.dumps(measure()))
