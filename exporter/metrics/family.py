"""A metric family as one declarative row: the catalogue is made of these, and so are the page and the documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import msgspec

Labels = tuple[str, ...]
"""Label values in the order of `Family.labels`, cleaned (no lone surrogates, no controls), not yet escaped."""

SCOPE_LABELS = ("bk_scope_type", "bk_scope_id")
HOST_LABELS = ("bk_cloud_id", "bk_host_id", "ip")


class Family(msgspec.Struct, frozen=True):
    """One metric family of the page.

    `name` is the full classic name (a counter ends in `_total`). `labels` are its own label names, in order; those
    of its owner (the scope, or collector and scope) come before them on the page. `help` and `help_zh` are one sentence
    each. `per_collector`: its owner is a collector of a scope, not the scope. `detail`: its series may be cut by
    `max_series`. `gauge`: for gauges, reads the samples off a view of the collector's state; what it does not return
    is absent from the page, except that a `sticky` family goes on showing 0 for a label set that it has shown since
    the start. Counters and histograms have no function: they are read from the state's counts by name.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    help_zh: str
    per_collector: bool = False
    detail: bool = False
    sticky: bool = False
    gauge: Callable[[Any], Mapping[Labels, float]] | None = None


class Exemplar(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An exemplar: the execution behind the newest increment. `timestamp` in unix seconds."""

    job_instance_id: int
    value: float
    timestamp: float


class Count(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One counter series. `born` (unix seconds) is its `_created`; before `shown` it is exposed as 0."""

    value: float
    born: float
    shown: float
    exemplar: Exemplar | None = None


class Distribution(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One histogram series. `bounds` are the upper bounds without +Inf, `counts` are per bucket (not cumulative),
    one longer."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float
    born: float
    shown: float
    exemplars: tuple[Exemplar | None, ...]


class Counts(msgspec.Struct, frozen=True, gc=False):
    """All counters and histograms of one state: family name → label values besides the scope's → series.

    `values`: what its platform-chosen labels may say, by label name; see `metrics.bounds`."""

    counters: dict[str, dict[Labels, Count]] = {}
    histograms: dict[str, dict[Labels, Distribution]] = {}
    values: Mapping[str, tuple[str, ...]] = {}


class Chunk(Protocol):
    """The series of one family and one owner as sample lines, each ended by a newline, without HELP and TYPE.

    `series` counts distinct series (a histogram's buckets, sum and count each count, `_created` does not). `sizes` are
    those of `text` and `openmetrics` in bytes.
    """

    @property
    def series(self) -> int: ...
    @property
    def sizes(self) -> tuple[int, int]: ...
    @property
    def text(self) -> bytes:
        """In Prometheus text 0.0.4."""

    @property
    def openmetrics(self) -> bytes:
        """In OpenMetrics 1.0.0."""


class GaugeChunk(msgspec.Struct, frozen=True, gc=False):
    """A `Chunk` of a gauge, whose lines are the same in both formats."""

    text: bytes
    series: int

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.text), len(self.text)

    @property
    def openmetrics(self) -> bytes:
        return self.text


NO_SERIES = GaugeChunk(b"", 0)
