"""Static shards: several processes that share the scopes without a common store."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import ConfigError
from exporter.model import Scope
from exporter.shard import Shard, read_shard
from exporter.simulator.world import StepScript, target
from tests.support.process import FINISHED, Daemon, Simulated, command, configuration, select, total

SCOPES = [Scope("biz", str(number)) for number in range(2, 12)]


@pytest.fixture
def simulated() -> Iterator[Simulated]:
    with Simulated(*SCOPES) as platform:
        yield platform


def owned(shard: Shard) -> list[Scope]:
    return [scope for scope in SCOPES if shard.owns(scope)]


def run(folder: Path, simulated: Simulated, *arguments: str, **changes: object) -> Daemon:
    folder.mkdir(exist_ok=True)
    return Daemon(folder, configuration(simulated.url, SCOPES, **changes), *arguments)


# Who has what


def test_every_scope_belongs_to_one_shard() -> None:
    """8 shards of 30,000 scopes: each within 5 % of its eighth, every scope on exactly one."""
    scopes = [Scope("biz", str(number)) for number in range(1, 4001)]
    owners = Counter(ordinal for scope in scopes for ordinal in range(8) if Shard(ordinal, 8).owns(scope))
    assert sum(owners.values()) == len(scopes)
    assert max(abs(count - 500) for count in owners.values()) < 75


def test_a_ninth_shard_takes_a_ninth_and_moves_nothing_else() -> None:
    """8 → 9 → 8: what moves goes to the new shard, and comes back."""
    scopes = [Scope("biz", str(number)) for number in range(1, 2001)]
    for scope in scopes:
        before = next(n for n in range(8) if Shard(n, 8).owns(scope))
        after = next(n for n in range(9) if Shard(n, 9).owns(scope))
        assert after in (before, 8)
    moved = sum(Shard(8, 9).owns(scope) for scope in scopes)
    assert abs(moved / len(scopes) - 1 / 9) < 0.02


@given(name=st.sampled_from(["exporter-3", "blueking-exporter-0", "a-b-12"]), total=st.integers(13, 40))
def test_a_statefulset_names_the_ordinal(name: str, total: int) -> None:
    """With --total-shards alone the ordinal is that at the end of POD_NAME."""
    assert read_shard(None, total, {"POD_NAME": name}) == Shard(int(name.rpartition("-")[2]), total)


@pytest.mark.parametrize(
    ("shard", "total", "pod", "told"),
    [
        (0, None, "", "--shard: needs --total-shards"),
        (4, 4, "", "--shard: 4 is no shard of 4"),
        (-1, 4, "", "--shard: -1 is no shard of 4"),
        (0, 0, "", "--total-shards: want a number of at least 1"),
        (None, 3, "exporter-3", "--total-shards: 3 is no shard of 3"),
        (None, 3, "exporter", "--total-shards: needs --shard"),
        (None, 3, "exporter-7d4b", "--total-shards: needs --shard"),
    ],
)
def test_wrong_shards_are_named(shard: int | None, total: int | None, pod: str, told: str) -> None:
    """Each mistake is an error that names the flag."""
    with pytest.raises(ConfigError, match=told):
        read_shard(shard, total, {"POD_NAME": pod} if pod else {"POD_NAME": "host"})


@pytest.mark.parametrize("name", ["check", "run", "once"])
@pytest.mark.parametrize("given_as", ["flag", "variable"])
def test_shards_with_redis_are_refused(tmp_path: Path, simulated: Simulated, name: str, given_as: str) -> None:
    """Replicas on Redis share the scopes by themselves: exit 2, and the flag is named."""
    daemon = run(tmp_path, simulated, state={"url": "redis://127.0.0.1:1"})
    flags = ["--shard=0", "--total-shards=2"] if given_as == "flag" else []
    environ = {} if flags else {"BLUEKING_EXPORTER_SHARD": "0", "BLUEKING_EXPORTER_TOTAL_SHARDS": "2"}
    done = command(name, f"--config.file={daemon.file}", *flags, environ=environ)
    assert done.returncode == 2
    assert "--shard: replicas on Redis share the scopes by themselves" in done.stderr


# The daemon


def test_two_shards_show_every_scope_once(tmp_path: Path, simulated: Simulated) -> None:
    """The union of both pages is what one process would show; each says which shard it is."""
    shards = [
        run(tmp_path / "0", simulated, "--shard=0", "--total-shards=2"),
        run(tmp_path / "1", simulated, "--total-shards=2"),
    ]
    shards[1].environ["POD_NAME"] = "exporter-1"
    with shards[0], shards[1]:
        shown = []
        for ordinal, daemon in enumerate(shards):
            mine = owned(Shard(ordinal, 2))
            for scope in mine:
                simulated.start(scope)
                page = daemon.wait_success(scope)
            assert total(page, "blueking_exporter_shard_ordinal") == ordinal
            assert total(page, "blueking_exporter_total_shards") == 2
            infos = [dict(labels)["bk_scope_id"] for labels in select(page, "blueking_scope_info")]
            polled = {dict(labels)["bk_scope_id"] for labels in select(page, "blueking_exporter_collector_success")}
            assert sorted(infos) == sorted(polled) == sorted(scope.bk_scope_id for scope in mine)
            shown += infos
        assert sorted(shown) == sorted(scope.bk_scope_id for scope in SCOPES)


def test_F47_the_same_shard_twice_is_seen(tmp_path: Path, simulated: Simulated) -> None:
    """On one state file the second is refused; with a state of its own both say the same ordinal, for the alert."""
    arguments = ("--shard=0", "--total-shards=2")
    with run(tmp_path / "0", simulated, *arguments) as first:
        first.wait_ready()
        second = command("run", f"--config.file={first.file}", *arguments)
        assert second.returncode == 1
        assert "held by another process" in second.stderr
        with run(tmp_path / "1", simulated, *arguments) as other:
            assert other.value("blueking_exporter_shard_ordinal") == first.value("blueking_exporter_shard_ordinal")


def test_a_state_of_another_shard_is_refused_unless_that_is_wanted(tmp_path: Path, simulated: Simulated) -> None:
    """Another ordinal or number of shards: exit 1 with both named. Accepted, what stays continues and what has moved
    away is forgotten, so that it begins with a baseline if it comes back."""
    (stays,) = [scope for scope in owned(Shard(0, 2)) if Shard(0, 3).owns(scope)][:1]
    (moves,) = [scope for scope in owned(Shard(0, 2)) if not Shard(0, 3).owns(scope)][:1]
    with run(tmp_path, simulated, "--shard=0", "--total-shards=2") as daemon:
        for scope in (stays, moves):
            daemon.wait_success(scope)
            simulated.start(scope, steps=[StepScript(duration=0.0, results={target(1): 9})])
        daemon.wait(lambda page: all(_finished(page, scope) == 1 for scope in (stays, moves)))
        assert daemon.stop() == 0
    refused = command("run", f"--config.file={daemon.file}", "--shard=0", "--total-shards=3")
    assert refused.returncode == 1
    assert "was written by shard 0 of 2, this is shard 0 of 3" in refused.stderr
    refused = command("run", f"--config.file={daemon.file}")
    assert refused.returncode == 1
    accept = {"state": {"accept_reshard": True}}
    with run(tmp_path, simulated, "--shard=0", "--total-shards=3", **accept) as daemon:
        page = daemon.wait_success(stays)
        assert _finished(page, stays) == 1
        assert not select(page, FINISHED, bk_scope_id=moves.bk_scope_id)
        assert "event=state_resharded" in daemon.log
        assert daemon.stop() == 0
    with run(tmp_path, simulated, "--shard=0", "--total-shards=2", **accept) as daemon:
        daemon.wait_success(moves)
        assert _finished(daemon.wait_success(moves), moves) == 0
        assert daemon.stop() == 0
    with sqlite3.connect(tmp_path / "state.db") as db:
        assert db.execute("SELECT * FROM shard").fetchall() == [(0, 2)]
    db.close()


def test_a_state_without_shards_is_that_of_the_only_one(tmp_path: Path, simulated: Simulated) -> None:
    """From one process to shards: refused for the second, and for the first too, since scopes have moved away."""
    with run(tmp_path, simulated) as daemon:
        daemon.wait_success(SCOPES[0])
        assert daemon.stop() == 0
    for ordinal in (0, 1):
        refused = command("run", f"--config.file={daemon.file}", f"--shard={ordinal}", "--total-shards=2")
        assert "was written by shard 0 of 1" in refused.stderr
    with run(tmp_path, simulated, "--shard=0", "--total-shards=1") as daemon:
        daemon.wait_success(SCOPES[0])


def test_once_polls_its_shard_only(tmp_path: Path, simulated: Simulated) -> None:
    """The text of `once` holds the scopes of the shard and no others."""
    daemon = run(tmp_path, simulated)
    done = command("once", f"--config.file={daemon.file}", "--shard=1", "--total-shards=2")
    assert done.returncode == 0
    for scope in SCOPES:
        assert (f'bk_scope_id="{scope.bk_scope_id}"' in done.stdout) == Shard(1, 2).owns(scope)


def _finished(page: object, scope: Scope) -> float:
    return sum(select(page, FINISHED, bk_scope_id=scope.bk_scope_id).values())  # type: ignore[arg-type]
