"""`state` and `once` on Redis: for one command at a time, while no replica runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.simulator.world import StepScript, target
from tests.support.components import Stack, eventually
from tests.support.process import BIZ, FINISHED, Daemon, Simulated, command, configuration, select, total

pytestmark = pytest.mark.component


def finish(simulated: Simulated, count: int) -> None:
    for _ in range(count):
        simulated.start(steps=[StepScript(duration=0.0, results={target(1): 9})])


@pytest.mark.parametrize("engine", ["valkey", pytest.param("redis", marks=pytest.mark.slow)])
def test_counts_move_from_sqlite_to_redis_and_back(
    stack: Stack, tmp_path: Path, simulated: Simulated, engine: str
) -> None:
    """Export, import, and a daemon that continues where the other one stopped, in both directions."""
    address = f"redis://127.0.0.1:{stack.redis(engine=engine).port}/3"
    daemon = Daemon(tmp_path, configuration(simulated.url, state={"lease_ttl": "15s"}))
    file = f"--config.file={daemon.file}"
    with daemon:
        daemon.wait_success()
        finish(simulated, 2)
        assert total(daemon.wait_success(), FINISHED) == 2
        assert daemon.stop() == 0
    exported = command("state", "export", file)
    assert exported.returncode == 0, exported.stderr
    imported = command("state", "import", file, f"--state.url={address}", input=exported.stdout)
    assert imported.returncode == 0, imported.stderr

    finish(simulated, 1)
    shared = Daemon(tmp_path, configuration(simulated.url, state={"url": address, "lease_ttl": "3s"}))
    with shared:
        assert total(shared.wait_success(), FINISHED) == 3
        assert shared.value("blueking_exporter_takeovers_total", cause="released") == 1, "at once, not after a lease"

        for words in (("import", file), ("reset", file, "--collector=job", "--scope=biz/2")):
            refused = command("state", *words, input=exported.stdout)
            assert refused.returncode == 1
            assert "is in use by" in refused.stderr
        refused = command("once", file)
        assert refused.returncode == 1
        assert "is in use by" in refused.stderr
        listed = command("state", "list", file)
        assert listed.returncode == 0
        assert "biz/2" in listed.stdout
        assert shared.stop() == 0

    finish(simulated, 2)
    done = command("once", file)
    assert done.returncode == 0, done.stderr
    assert f'{FINISHED}{{bk_scope_type="biz",bk_scope_id="2"' in done.stdout
    back = command("state", "export", file)
    assert back.returncode == 0, back.stderr
    assert command("state", "import", file, f"--state.url=sqlite:{tmp_path}/new.db", input=back.stdout).returncode == 0
    with Daemon(tmp_path, configuration(simulated.url, state={"url": f"sqlite:{tmp_path}/new.db"})) as daemon:
        assert total(daemon.wait_success(BIZ), FINISHED) == 5


@pytest.mark.slow
def test_a_reset_key_begins_with_a_baseline(stack: Stack, tmp_path: Path, simulated: Simulated) -> None:
    """After `state reset` nothing of the past is counted, and a replica that was killed is no obstacle."""
    server = stack.redis()
    config = configuration(simulated.url, state={"url": f"redis://127.0.0.1:{server.port}", "lease_ttl": "3s"})
    daemon = Daemon(tmp_path, config)
    with daemon:
        daemon.wait_success()
        finish(simulated, 2)
        assert total(daemon.wait_success(), FINISHED) == 2
    file = f"--config.file={daemon.file}"
    reset = command("state", "reset", file, "--collector=job", "--scope=biz/2")
    assert reset.returncode == 0, reset.stderr
    assert server.ask("KEYS", "blueking:s:*") == []
    with Daemon(tmp_path, config) as daemon:
        page = daemon.wait_success()
        assert sum(select(page, FINISHED).values()) == 0
        eventually(lambda: server.ask("HLEN", "blueking:members") == 1)
