"""The series of the exposition benchmarks: 100 per scope, four families with five labels, the same in Go."""

from __future__ import annotations

from exporter.metrics.family import Family, Labels
from exporter.metrics.page import Page
from exporter.metrics.render import render_gauge, scope_prefix
from exporter.model import Key, Scope

FAMILIES = tuple(
    Family(name, "gauge", ("task_type", "launch_mode", "status"), f"Help of {name}.", "")
    for name in ("bench_instances", "bench_seconds", "bench_last_end_seconds", "bench_hosts")
)
STATUSES = (
    *("pending", "running", "success", "failed", "skipped", "ignored", "waiting_user", "ended", "abnormal"),
    *("stopping", "stopped", "confirm_stop", "dropped", "rolling_wait"),
)
LABEL_SETS: tuple[Labels, ...] = tuple(
    (task_type, launch_mode, status)
    for task_type in ("job", "script", "file")
    for launch_mode in ("web", "api", "cron")
    for status in STATUSES
)[:125:5]
PER_SCOPE = len(FAMILIES) * len(LABEL_SETS)


def scope(number: int) -> Scope:
    return Scope("biz", str(2_000_000 + 7 * number))


def value(family: int, owner: int, index: int, generation: int = 0) -> float:
    """Skewed like real counts: most are small."""
    mixed = (family * 1_000_003 + owner * 7919 + index * 104_729) * 2_654_435_761 & 0xFFFFFFFF
    return float(mixed % 10 ** (1 + mixed % 7) + generation)


def values(owner: int, generation: int = 0) -> list[dict[Labels, float]]:
    """The samples of one scope, by family."""
    return [
        {labels: value(family, owner, index, generation) for index, labels in enumerate(LABEL_SETS)}
        for family in range(len(FAMILIES))
    ]


def show(page: Page, owner: int, samples: list[dict[Labels, float]]) -> None:
    """What a poller does when its values have changed."""
    prefix = scope_prefix(scope(owner))
    page.put(
        Key("job", scope(owner)),
        {family.name: render_gauge(family, prefix, one) for family, one in zip(FAMILIES, samples, strict=True)},
    )


def filled(series: int) -> Page:
    """A page of so many series."""
    page = Page(FAMILIES, max_series=10**9)
    for owner in range(max(1, series // PER_SCOPE)):
        show(page, owner, values(owner))
    return page
