"""How many values a label may have when the platform chooses them (contract 4.1.13).

All families of a state share the values of a label: a value that is `other` in a gauge is `other` in a counter too.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping, Sequence

from exporter.metrics.family import Labels

PLATFORM_CHOSEN = frozenset({"code", "exit_code", "job_type", "os_type", "step", "workflow_type"})
"""Labels whose values no table of this program limits. A family that has one of them is bounded automatically."""
MOST_VALUES = 64
"""Values of one such label in one state; a later one is `OTHER`."""
OTHER = "other"


@functools.cache
def platform_chosen(names: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Position and name of the platform-chosen ones among the label names of a family."""
    return tuple((position, name) for position, name in enumerate(names) if name in PLATFORM_CHOSEN)


class LabelBounds:
    """Decides under which labels the series of one state are shown.

    `values`: the values so far by label name, oldest first. `room`: number of series that the page can still take;
    negative when it has too many. `full`: whether a label set was refused because there was no room.
    """

    def __init__(self, values: Mapping[str, tuple[str, ...]], room: int) -> None:
        self.room = room
        self.full = False
        self._before = values
        self._values: dict[str, dict[str, None]] = {}

    def admit(self, names: tuple[str, ...], labels: Labels, series: int, *shown: Container[Labels]) -> Labels:
        """The labels to use for `labels`, which are in none of `shown`, the label sets that the family has already.

        A value beyond the `MOST_VALUES`-th of its label becomes `OTHER`. A label set that is new then takes `series` of
        the room. Without room, all its platform-chosen values become `OTHER`; where it takes none, the new ones do.
        """
        chosen = platform_chosen(names)
        beyond = [at for at, name in chosen if not self._fits(name, labels[at])]
        fitting = _replaced(labels, beyond) if beyond else labels
        if not chosen or any(fitting in known for known in shown):
            return fitting
        if self.full or max(series, 1) > self.room:
            refused = _replaced(fitting, [at for at, name in chosen if series or not self._has(name, fitting[at])])
            self.full |= refused != fitting
            fitting = refused
            if any(fitting in known for known in shown):
                return fitting
        self.room -= series
        for at, name in chosen:
            if not self._has(name, fitting[at]):
                self._known(name)[fitting[at]] = None
        return fitting

    def values(self) -> Mapping[str, tuple[str, ...]]:
        """The values so far; the same object that was given if there is no new value."""
        grown = {
            name: tuple(known) for name, known in self._values.items() if len(known) > len(self._before.get(name, ()))
        }
        return {**self._before, **grown} if grown else self._before

    def _known(self, name: str) -> dict[str, None]:
        known = self._values.get(name)
        if known is None:
            known = self._values[name] = dict.fromkeys(self._before.get(name, ()))
        return known

    def _has(self, name: str, value: str) -> bool:
        return value in ("", OTHER) or value in self._known(name)

    def _fits(self, name: str, value: str) -> bool:
        return self._has(name, value) or len(self._known(name)) < MOST_VALUES


def _replaced(labels: Labels, positions: Sequence[int]) -> Labels:
    """Labels with `OTHER` at some positions, except where they are empty."""
    return tuple(OTHER if value and at in positions else value for at, value in enumerate(labels))
