"""F50: the fuzzers themselves work, and no target fails on its seeds or on a few thousand changed ones.

`make fuzz` runs them for longer.
"""

from __future__ import annotations

import pytest

from tests.fuzz.answers import CALLS, decoder_seeds
from tests.fuzz.random_inputs import Failed, run
from tests.fuzz.targets import TARGETS, Target

EXAMPLES = {"polls": 25, "http": 150}


@pytest.mark.parametrize("name", TARGETS)
def test_F50_a_target_takes_its_seeds(name: str) -> None:
    """Samples, examples and what the simulator answers."""
    for data in TARGETS[name].seeds:
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_F50_a_target_takes_changed_seeds(name: str) -> None:
    """Always the same ones here; every run of `make fuzz` finds others."""
    run(TARGETS[name], EXAMPLES.get(name, 300), 1)


def test_every_call_of_every_api_has_samples_to_begin_with() -> None:
    """A decoder that is fuzzed from nothing is hardly entered."""
    assert {seed[1] for seed in decoder_seeds()} == set(range(len(CALLS)))


def test_an_input_that_fails_is_reported_as_small_as_can_be() -> None:
    """Of a target that cannot stand an x."""

    def fails(data: bytes) -> None:
        assert b"x" not in data

    with pytest.raises(Failed) as failed:
        run(Target(fails, [b"aaaa"], [b"xyz"]), 500, 1)
    assert failed.value.data == b"x"
