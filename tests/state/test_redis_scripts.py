"""The scripts on real servers do what the model says, in any order of calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from exporter.state.redis_client import BEAT, CLAIM, COMMIT, FORGET, RELEASE, script
from tests.support.components import ENGINES, Redis, Stack
from tests.support.redis_model import Model

ACTORS = st.sampled_from(["a.1", "b.1", "c.1"])
NUMBERS = st.integers(0, 2**53 - 1)


@pytest.fixture(params=ENGINES)
def server(request: pytest.FixtureRequest, stack: Stack) -> Redis:
    return stack.redis(engine=request.param)


def machine(server: Redis) -> type[RuleBasedStateMachine]:
    """Three replicas that call the scripts at random, against `server` and the model at once."""

    class Scripts(RuleBasedStateMachine):
        """`granted`: who was given an epoch; `accepted`: whose commits were taken under it."""

        @initialize()
        def empty(self) -> None:
            server.ask("FLUSHALL")
            self.model = Model()
            self.granted: dict[int, str] = {}
            self.accepted: dict[int, set[str]] = {}
            self.newest = 0
            self.saved: dict[str, dict[str, bytes]] = {}

        def both(self, text: str, key: str, *arguments: str | bytes) -> Any:
            command = script(text, key, *arguments)
            real, modelled = server.ask(*command), self.model.run(command)  # type: ignore[arg-type]
            if text == BEAT:
                real[1] = dict(zip(real[1][::2], real[1][1::2], strict=True))
                modelled[1] = dict(zip(modelled[1][::2], modelled[1][1::2], strict=True))
            assert real == modelled
            return real

        def stands(self) -> tuple[str, str]:
            own, epoch = server.ask("HMGET", "k", "own", "epoch")
            return (own or b"").decode(), (epoch or b"0").decode()

        @rule(me=ACTORS, stale=st.booleans(), ahead=st.integers(1, 2**40))
        def claim(self, me: str, stale: bool, ahead: int) -> None:
            own, epoch = ("a.1", "1") if stale else self.stands()
            new = int(epoch) + ahead
            done = self.both(CLAIM, "k", me, own, epoch, str(new))
            if done[0] == 1:
                assert new > self.newest, "epochs only grow"
                self.newest = new
                self.granted[new] = me

        @rule(me=ACTORS, ver=st.integers(1, 12), payload=st.binary(max_size=20), right=st.booleans(), old=NUMBERS)
        def commit(self, me: str, ver: int, payload: bytes, right: bool, old: int) -> None:
            epoch = self.stands()[1] if right else str(old)
            before = server.ask("HGET", "k", "ver")
            done = self.both(COMMIT, "k", me, epoch, str(ver), "run", "1", "1", payload)
            if done[0] == 1:
                assert ver > int(before or 0), "a late commit undoes nothing"
                self.accepted.setdefault(int(epoch), set()).add(me)

        @rule(me=ACTORS, right=st.booleans())
        def release(self, me: str, right: bool) -> None:
            self.both(RELEASE, "k", me, self.stands()[1] if right else "7")

        @rule(right=st.booleans(), upd=st.sampled_from(["", "1"]))
        def forget(self, right: bool, upd: str) -> None:
            own, epoch = self.stands() if right else ("b.1", "2")
            if self.both(FORGET, "k", own, epoch, upd):
                self.newest = 0
                self.granted.clear()
                self.accepted.clear()

        @rule(me=ACTORS, number=st.integers(1, 20), confirmed=st.integers(0, 20), dead=ACTORS, right=st.booleans())
        def beat(self, me: str, number: int, confirmed: int, dead: str, right: bool) -> None:
            stands = (server.ask("HGET", "members", dead) or b"").decode() if right else "7:0:ready:x"
            written, _ = self.both(BEAT, "members", me, str(confirmed), f"{number}:0:ready:x", dead, stands)
            assert written in (0, 1)

        @invariant()
        def one_writer_per_epoch(self) -> None:
            for epoch, writers in getattr(self, "accepted", {}).items():
                assert writers == {self.granted[epoch]}

        @invariant()
        def the_same_data(self) -> None:
            if hasattr(self, "model"):
                for key in ("k", "members"):
                    held = server.ask("HGETALL", key)
                    found = dict(zip(held[::2], held[1::2], strict=True)) if isinstance(held, list) else held
                    assert found == {name.encode(): value for name, value in self.model.data.get(key, {}).items()}

    return Scripts


@pytest.mark.component
def test_scripts_do_what_the_model_does(server: Redis) -> None:
    """Random interleavings of three replicas: answers and data are those of the model, each epoch has one writer."""
    checked = settings(max_examples=20, stateful_step_count=30, deadline=None, derandomize=True)
    run_state_machine_as_test(machine(server), settings=checked)


@pytest.mark.component
@pytest.mark.parametrize("epoch", [2**53 - 2, 10**15 + 1, 1_795_000_000_001])
def test_large_epochs_and_versions_keep_every_digit(server: Redis, epoch: int) -> None:
    """Lua writes numbers with 14 digits; these never pass through one on their way into the store."""
    assert server.ask(*script(CLAIM, "k", "me", "", "0", str(epoch))) == [1, b"me", str(epoch).encode()]  # type: ignore[arg-type]
    commit = script(COMMIT, "k", "me", str(epoch), str(epoch), "run", "1", "1", b"\x00payload")
    assert server.ask(*commit) == [1, b"me", str(epoch).encode()]  # type: ignore[arg-type]
    again = script(COMMIT, "k", "me", str(epoch), str(epoch), "run", "1", "1", b"late")
    assert server.ask(*again)[0] == 2  # type: ignore[arg-type]
    assert server.ask("HMGET", "k", "ver", "p") == [str(epoch).encode(), b"\x00payload"]
