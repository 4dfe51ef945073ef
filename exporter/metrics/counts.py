"""The counters and histograms of one state: how they are added to, and when a new series may show its value.

A counter that appears with its first event would hide that event from `increase()`: a series must have been 0 first.
So a new series is *held*: exposed as 0 until `shown`, while its true value is already in the state.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from exporter.metrics.family import Count, Counts, Distribution, Exemplar, Labels


def held(shown: float, now: float, hold: float) -> bool:
    """Whether a series is still to be exposed as 0. False for `now` = inf, which is how `once` ignores the hold.

    A `shown` further away than `hold` can only come from a wall clock that was set back since; the series was visible
    then, and a visible counter must not fall to 0.
    """
    return now < shown <= now + hold


def next_reveal(counts: Counts, now: float) -> float | None:
    """The earliest moment after `now` (unix seconds) at which a held series shows its value; None without any."""
    return min(
        (
            series.shown
            for families in (counts.counters, counts.histograms)
            for family in families.values()
            for series in family.values()
            if series.shown > now
        ),
        default=None,
    )


class Tally:
    """Adds to `Counts` without changing them: families that nothing is added to are shared with the result.

    `now`: unix seconds, the birth of series that are new; `hold`: seconds for which those are held.
    """

    def __init__(self, counts: Counts, now: float, hold: float) -> None:
        self._before = counts
        self._now = now
        self._hold = hold
        self._counters: dict[str, dict[Labels, Count]] = {}
        self._histograms: dict[str, dict[Labels, Distribution]] = {}

    def zero(self, family: str, labels: Labels = ()) -> None:
        """Let the counter exist at 0, never held. One that exists is left alone."""
        if labels not in self.series(family):
            self._write(family)[labels] = Count(0, self._now, self._now)

    def inc(self, family: str, labels: Labels = (), by: float = 1, exemplar: Exemplar | int | None = None) -> None:
        """Add to a counter. `exemplar`: the execution behind this event (its id stands for value `by` at `now`).

        ValueError when `by` is negative or not finite: it would spoil the counter for good.
        """
        if not 0 <= by < math.inf:
            raise ValueError(f"{family}: a counter cannot grow by {by}")
        old = self.series(family).get(labels)
        seen = self._exemplar(exemplar, by)
        self._write(family)[labels] = (
            Count(old.value + by, old.born, old.shown, seen or old.exemplar)
            if old
            else Count(by, self._now, self._now + self._hold, seen)
        )

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
        if not math.isfinite(value):
            raise ValueError(f"{family}: {value} cannot be observed")
        series = self._histograms.get(family)
        if series is None:
            series = self._histograms[family] = dict(self._before.histograms.get(family, {}))
        old = series.get(labels)
        if old is None or old.bounds != bounds:
            size = len(bounds) + 1
            old = Distribution(bounds, (0,) * size, 0, self._now, self._now + self._hold, (None,) * size)
        bucket = bisect_left(bounds, value)
        counts, exemplars = list(old.counts), list(old.exemplars)
        counts[bucket] += 1
        exemplars[bucket] = self._exemplar(exemplar_id, value) or exemplars[bucket]
        series[labels] = Distribution(bounds, tuple(counts), old.sum + value, old.born, old.shown, tuple(exemplars))

    def freeze(self) -> Counts:
        """What was there with what was added; the very same object when nothing was added."""
        if not self._counters and not self._histograms:
            return self._before
        return Counts(
            {**self._before.counters, **self._counters},
            {**self._before.histograms, **self._histograms},
        )

    def series(self, family: str) -> dict[Labels, Count]:
        """The counter series of a family as they are now, with what was added. Not to be changed."""
        return self._counters.get(family) or self._before.counters.get(family) or {}

    def _write(self, family: str) -> dict[Labels, Count]:
        series = self._counters.get(family)
        if series is None:
            series = self._counters[family] = dict(self._before.counters.get(family, {}))
        return series

    def _exemplar(self, exemplar: Exemplar | int | None, value: float) -> Exemplar | None:
        return Exemplar(exemplar, value, self._now) if isinstance(exemplar, int) else exemplar
