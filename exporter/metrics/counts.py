"""The counters and histograms of one state: how they are added to, and when a new series may show its value.

A counter that appears with its first event would hide that event from `increase()`: a series must have been 0 first.
So a new series is *held*: exposed as 0 until `shown`, while its true value is already in the state.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping

import msgspec

from exporter.metrics.bounds import OTHER, LabelBounds, platform_chosen
from exporter.metrics.family import Count, Counts, Distribution, Exemplar, Family, Labels


def held(shown: float, now: float, hold: float) -> bool:
    """Whether a series is still to be exposed as 0. False for `now` = inf, which is how `once` ignores the hold.

    A `shown` further away than `hold` can only come from a wall clock that was set back since; the series was visible
    then, and a visible counter must not fall to 0.
    """
    return now < shown <= now + hold


class _Sum(msgspec.Struct, gc=False):
    """A counter series while it is added to; see `Count`."""

    value: float
    born: float
    shown: float
    exemplar: Exemplar | None = None


class _Spread(msgspec.Struct, gc=False):
    """A histogram series while it is added to; see `Distribution`."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float
    born: float
    shown: float
    exemplars: list[Exemplar | None]


class Observations:
    """Finite values in the buckets of a histogram. `thousandths`: a thousand times their sum, which is exact if values
    are whole milliseconds. `exemplars`, by bucket: time, id and value of the newest one."""

    __slots__ = ("bounds", "counts", "exemplars", "thousandths")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.thousandths = 0
        self.exemplars: dict[int, tuple[float, int, float]] = {}


class Tally:
    """Adds to `Counts` without changing them: families that nothing is added to are shared with the result.

    `now`: unix seconds, the birth of series that are new; `hold`: seconds for which those are held. `families`: those
    that are added to, as far as they have platform-chosen labels; `room`: series that the page can still take; both
    decide which labels a new series has (see `LabelBounds`). A poll may add thousands of events to a few series, so
    records are made once, by `freeze`.
    """

    def __init__(
        self, counts: Counts, now: float, hold: float, families: Iterable[Family] = (), room: int = sys.maxsize
    ) -> None:
        self.now = now
        self._names = {
            family.name: family.labels
            for family in families
            if family.kind != "gauge" and platform_chosen(family.labels)
        }
        self.bounds = LabelBounds(counts.values or _values_of(counts, self._names), room)
        self._before = counts
        self._hold = hold
        self._counters: dict[str, dict[Labels, _Sum]] = {}
        self._histograms: dict[str, dict[Labels, _Spread]] = {}

    def zero(self, family: str, labels: Labels = ()) -> None:
        """Let the counter exist at 0, never held. One that exists is left alone."""
        if not self.has(family, labels):
            self._counters.setdefault(family, {})[labels] = _Sum(0, self.now, self.now)

    def inc(self, family: str, labels: Labels = (), by: float = 1, exemplar: Exemplar | int | None = None) -> None:
        """Add to a counter. `exemplar`: the execution behind this event (its id stands for value `by` at `now`).

        ValueError when `by` is negative or not finite: it would spoil the counter for good.
        """
        if not 0 <= by < math.inf:
            raise ValueError(f"{family}: a counter cannot grow by {by}")
        added = self._counters.get(family)
        if added is None:
            added = self._counters[family] = {}
        series = added.get(labels)
        if series is None:
            before = self._before.counters.get(family, {})
            labels = self._bounded(family, labels, 1, added, before)
            series = added.get(labels)
            if series is None:
                old = before.get(labels)
                series = added[labels] = (
                    _Sum(old.value, old.born, old.shown, old.exemplar)
                    if old
                    else _Sum(0, self.now, self.now + self._hold)
                )
        series.value += by
        if exemplar is not None:
            series.exemplar = self._exemplar(exemplar, by)

    def observe(
        self,
        family: str,
        labels: Labels,
        value: float,
        bounds: tuple[float, ...],
        exemplar_id: int | None = None,
    ) -> None:
        """Add one observation to a histogram; `bounds`: ascending upper bounds without +Inf, in the unit of `value`.

        Other bounds than before restart the series with a new birth. ValueError when `value` is not finite.
        """
        if not -math.inf < value < math.inf:
            raise ValueError(f"{family}: {value} cannot be observed")
        series = self._spread(family, labels, bounds)
        bucket = bisect_left(bounds, value)
        series.counts[bucket] += 1
        series.sum += value
        if exemplar_id is not None:
            series.exemplars[bucket] = Exemplar(exemplar_id, value, self.now)

    def observe_many(self, family: str, labels: Labels, many: Observations) -> None:
        """Add observations that have been put into buckets; see `observe`."""
        series = self._spread(family, labels, many.bounds)
        series.sum += many.thousandths / 1000
        for bucket, count in enumerate(many.counts):
            series.counts[bucket] += count
        for bucket, (_, id, value) in many.exemplars.items():
            series.exemplars[bucket] = Exemplar(id, value, self.now)

    def _spread(self, family: str, labels: Labels, bounds: tuple[float, ...]) -> _Spread:
        """The histogram series with these labels, empty if it is new or had other bounds."""
        added = self._histograms.get(family)
        if added is None:
            added = self._histograms[family] = {}
        series = added.get(labels)
        if series is None or series.bounds != bounds:
            before = self._before.histograms.get(family, {})
            labels = self._bounded(family, labels, len(bounds) + 3, added, before)
            series = added.get(labels)
            if series is None or series.bounds != bounds:
                old = before.get(labels)
                series = added[labels] = (
                    _Spread(old.bounds, list(old.counts), old.sum, old.born, old.shown, list(old.exemplars))
                    if old and old.bounds == bounds
                    else self._empty(bounds)
                )
        return series

    def rebucket(self, family: str, bounds: tuple[float, ...]) -> None:
        """Restart, at 0 and with a new birth, the histograms of a family that have other bounds than these."""
        for labels, old in self._before.histograms.get(family, {}).items():
            if old.bounds != bounds:
                self._histograms.setdefault(family, {}).setdefault(labels, self._empty(bounds))

    def freeze(self) -> Counts:
        """The old counts and the additions; the same object if nothing was added."""
        values = self.bounds.values()
        if not self._counters and not self._histograms and values == self._before.values:
            return self._before
        counters, histograms = dict(self._before.counters), dict(self._before.histograms)
        for name, sums in self._counters.items():
            counters[name] = counters.get(name, {}) | {
                labels: Count(one.value, one.born, one.shown, one.exemplar) for labels, one in sums.items()
            }
        for name, spreads in self._histograms.items():
            histograms[name] = histograms.get(name, {}) | {
                labels: Distribution(one.bounds, tuple(one.counts), one.sum, one.born, one.shown, tuple(one.exemplars))
                for labels, one in spreads.items()
            }
        return Counts(counters, histograms, values)

    def has(self, family: str, labels: Labels) -> bool:
        """Whether this counter series exists."""
        return labels in self._counters.get(family, ()) or labels in self._before.counters.get(family, ())

    def _bounded(self, family: str, labels: Labels, series: int, *shown: Container[Labels]) -> Labels:
        """The labels of a series, `shown` being those that the family has."""
        names = self._names.get(family)
        if names is None or any(labels in known for known in shown):
            return labels
        return self.bounds.admit(names, labels, series, *shown)

    def _empty(self, bounds: tuple[float, ...]) -> _Spread:
        size = len(bounds) + 1
        return _Spread(bounds, [0] * size, 0, self.now, self.now + self._hold, [None] * size)

    def _exemplar(self, exemplar: Exemplar | int, value: float) -> Exemplar:
        return Exemplar(exemplar, value, self.now) if isinstance(exemplar, int) else exemplar


def _values_of(counts: Counts, names: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
    """The values of the platform-chosen labels in these families, for a state of a build that did not list them."""
    values: dict[str, dict[str, None]] = {}
    for family, labels in names.items():
        for at, name in platform_chosen(labels):
            for series in (counts.counters.get(family, {}), counts.histograms.get(family, {})):
                known = values.setdefault(name, {})
                known.update((each[at], None) for each in series if each[at] not in ("", OTHER))
    return {name: tuple(known) for name, known in values.items() if known}
