"""Fuzz one target with hypothesis, which edits the seeds at random and shrinks what fails."""

from __future__ import annotations

import time

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.targets import Target

ROUND = 200
"""Inputs between two readings of the clock."""


class Failed(Exception):
    """A target has failed; `data` is the smallest input that was found to make it fail."""

    def __init__(self, data: bytes) -> None:
        super().__init__(repr(data[:100]))
        self.data = data


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Seeds with some of their bytes replaced, and any bytes."""
    new = st.binary(max_size=16)
    if target.words:
        new |= st.sampled_from(target.words)
    edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 32), new), min_size=1, max_size=8)
    return st.builds(_edited, st.sampled_from(target.seeds), edits) | st.binary(max_size=300)


def _edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for place, length, new in edits:
        at = int(place * len(data))
        data = data[:at] + new + data[at + length :]
    return data


def fuzz(target: Target, seconds: float, first: int = 0) -> int:
    """Run the target for so long; how many inputs it took. Raises `Failed`."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end or not count:
        count += run(target, ROUND, first + count)
    return count


def run(target: Target, examples: int, number: int) -> int:
    """Run the target on so many inputs, the same ones for the same number. Raises `Failed`."""
    count, last = 0, b""

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs(target))
    def one(data: bytes) -> None:
        nonlocal count, last
        count, last = count + 1, data
        target.run(data)

    try:
        one()
    except Exception as error:
        raise Failed(last) from error
    return count
