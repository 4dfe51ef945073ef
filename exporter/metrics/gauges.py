"""The samples of one state's gauges: with bounded labels, and with the zeros of what was shown before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from exporter.metrics.bounds import LabelBounds, platform_chosen
from exporter.metrics.family import Family, Labels


class Gauges:
    """What the gauges of one state show, and have shown since the start of the process."""

    def __init__(self) -> None:
        self._shown: dict[str, Mapping[Labels, float]] = {}

    def read(self, families: Iterable[Family], view: Any, bounds: LabelBounds) -> dict[str, Mapping[Labels, float]]:
        """The samples of each gauge family that has some, read off `view`.

        Samples whose labels become the same are added up. A `sticky` family has a 0 for each label set that was shown
        before and has no sample now.
        """
        read: dict[str, Mapping[Labels, float]] = {}
        for family in families:
            if family.gauge is None:
                continue
            samples = family.gauge(view)
            shown = self._shown.get(family.name, {})
            if platform_chosen(family.labels) and samples.keys() != shown.keys():
                samples = _bounded(family, samples, shown, bounds)
            if family.sticky and shown:
                samples = dict.fromkeys(sorted(shown), 0.0) | dict(samples)
            if samples:
                read[family.name] = samples
        return read

    def show(self, samples: Mapping[str, Mapping[Labels, float]]) -> None:
        """These samples, which `read` gave, are shown from now on."""
        self._shown = dict(samples)


def _bounded(
    family: Family, samples: Mapping[Labels, float], shown: Mapping[Labels, float], bounds: LabelBounds
) -> Mapping[Labels, float]:
    # Detail series take no room: max_series cuts them.
    series = 0 if family.detail else 1
    bounded: dict[Labels, float] = {}
    for labels, value in samples.items():
        if labels not in shown and labels not in bounded:
            labels = bounds.admit(family.labels, labels, series, shown, bounded)
        bounded[labels] = bounded.get(labels, 0.0) + value
    return bounded
