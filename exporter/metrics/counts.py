"""The counters and histograms of one state: how they are added to, and when a new series may show its value.

A counter that appears with its first event would hide that event from `increase()`: a series must have been 0 first.
So a new series is *held*: exposed as 0 until `shown`, while its true value is already in the state.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping
from operator import add

from exporter.metrics.bounds import OTHER, LabelBounds, platform_chosen
from exporter.metrics.family import Count, Counts, Distribution, Exemplar, Family, Labels


def held(shown: float, now: float, hold: float) -> bool:
    """Whether a series is still to be exposed as 0. False for `now` = inf, which is how `once` ignores the hold.

    A `shown` further away than `hold` can only come from a wall clock that was set back since; the series was visible
    then, and a visible counter must not fall to 0.
    """
    return now < shown <= now + hold


class Observations:
    """What is added to one histogram series; see `Distribution`. `exemplars`: the newest ones, by bucket."""

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, Exemplar] = {}

    def added_to(self, old: Distribution) -> Distribution:
        """The series after these observations."""
        exemplars = list(old.exemplars)
        for bucket, exemplar in self.exemplars.items():
            exemplars[bucket] = exemplar
        counts = tuple(map(add, old.counts, self.counts))
        return Distribution(self.bounds, counts, old.sum + self.sum, old.born, old.shown, tuple(exemplars))


class Tally:
    """Adds to `Counts` without changing them: families that nothing is added to are shared with the result.

    `now`: unix seconds, the birth of series that are new; `hold`: seconds for which those are held. `families`: those
    that are added to, as far as they have platform-chosen labels; `room`: series that the page can still take; both
    decide which labels a new series has (see `LabelBounds`).
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
        self._counters: dict[str, dict[Labels, Count]] = {}
        """The whole family, of those that are added to."""
        self._histograms: dict[str, dict[Labels, Observations]] = {}

    def zero(self, family: str, labels: Labels = ()) -> None:
        """Let the counter exist at 0, never held. One that exists is left alone."""
        if not self.has(family, labels):
            self._added(family)[labels] = Count(0, self.now, self.now)

    def inc(self, family: str, labels: Labels = (), by: float = 1, exemplar: Exemplar | int | None = None) -> None:
        """Add to a counter. `exemplar`: the execution behind this event (its id stands for value `by` at `now`).

        ValueError when `by` is negative or not finite: it would spoil the counter for good.
        """
        if not 0 <= by < math.inf:
            raise ValueError(f"{family}: a counter cannot grow by {by}")
        series = self._added(family)
        old = series.get(labels)
        if old is None:
            labels = self._bounded(family, labels, 1, series)
            old = series.get(labels) or Count(0, self.now, self.now + self._hold)
        newest = old.exemplar if exemplar is None else self._exemplar(exemplar, by)
        series[labels] = Count(old.value + by, old.born, old.shown, newest)

    def observe(
        self,
        family: str,
        labels: Labels,
        value: float,
        bounds: tuple[float, ...],
        exemplar_id: int | None = None,
    ) -> None:
        """Add one observation to a histogram; `bounds`: ascending upper bounds without +Inf, in the unit of `value`.

        ValueError when `value` is not finite.
        """
        if not -math.inf < value < math.inf:
            raise ValueError(f"{family}: {value} cannot be observed")
        series = self.histogram(family, labels, bounds)
        bucket = bisect_left(bounds, value)
        series.counts[bucket] += 1
        series.sum += value
        if exemplar_id is not None:
            series.exemplars[bucket] = Exemplar(exemplar_id, value, self.now)

    def histogram(self, family: str, labels: Labels, bounds: tuple[float, ...]) -> Observations:
        """What is added to a histogram series, to add finite values to; the series exists from now on. Other bounds
        than before restart it with a new birth."""
        added = self._histograms.setdefault(family, {})
        series = added.get(labels)
        if series is None:
            labels = self._bounded(family, labels, len(bounds) + 3, added, self._before.histograms.get(family, {}))
            series = added.get(labels)
        if series is None or series.bounds != bounds:
            series = added[labels] = Observations(bounds)
        return series

    def rebucket(self, family: str, bounds: tuple[float, ...]) -> None:
        """Restart, at 0 and with a new birth, the histograms of a family that have other bounds than these."""
        for labels, old in self._before.histograms.get(family, {}).items():
            if old.bounds != bounds:
                self._histograms.setdefault(family, {}).setdefault(labels, Observations(bounds))

    def freeze(self) -> Counts:
        """The old counts and the additions; the same object if nothing was added. Nothing is added after that."""
        values = self.bounds.values()
        if not self._counters and not self._histograms and values == self._before.values:
            return self._before
        counters, histograms = self._before.counters | self._counters, dict(self._before.histograms)
        for name, added in self._histograms.items():
            series = histograms[name] = dict(histograms.get(name, {}))
            for labels, observed in added.items():
                old = series.get(labels)
                if old is None or old.bounds != observed.bounds:
                    old = self._empty(observed.bounds)
                series[labels] = observed.added_to(old)
        return Counts(counters, histograms, values)

    def has(self, family: str, labels: Labels) -> bool:
        """Whether this counter series exists."""
        return labels in self._counters.get(family, self._before.counters.get(family, {}))

    def _added(self, family: str) -> dict[Labels, Count]:
        """The counter series of a family, to be added to."""
        series = self._counters.get(family)
        if series is None:
            series = self._counters[family] = dict(self._before.counters.get(family, {}))
        return series

    def _bounded(self, family: str, labels: Labels, series: int, *shown: Container[Labels]) -> Labels:
        """The labels of a series, `shown` being those that the family has."""
        names = self._names.get(family)
        if names is None or any(labels in known for known in shown):
            return labels
        return self.bounds.admit(names, labels, series, *shown)

    def _empty(self, bounds: tuple[float, ...]) -> Distribution:
        size = len(bounds) + 1
        return Distribution(bounds, (0,) * size, 0, self.now, self.now + self._hold, (None,) * size)

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
