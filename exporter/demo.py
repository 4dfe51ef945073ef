"""A simulated BlueKing and the daemon that watches it, in one process, over real HTTP."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from exporter import log
from exporter.app import run
from exporter.config.load import Override, load
from exporter.reload import Options
from exporter.simulator.server import SimulatorServer, create_platform, sample_config

SPEED = 10.0
"""How much faster than in reality executions start and end, so that there is something to see within seconds."""


async def demo(overrides: Mapping[str, Override], *, seed: int, say: Callable[[str], None]) -> None:
    """Run until SIGTERM, SIGINT or SIGHUP; `say` gets the addresses to open. Counts live in a temporary directory."""
    platform = create_platform(seed=seed, speed=SPEED)
    async with SimulatorServer(platform) as server:
        with tempfile.TemporaryDirectory(prefix="blueking-exporter-demo-") as directory:
            file = Path(directory) / "config.yaml"
            file.write_text(sample_config(server.url, platform), encoding="utf-8")
            loaded = load(file, overrides)
            log.configure(loaded.config.log.level, loaded.config.log.format)

            def started(addresses: Sequence[str]) -> None:
                page = addresses[0]
                say(f"simulated BlueKing   {server.url}")
                say(f"status               {page}/")
                say(f"metrics              {page}{loaded.config.server.telemetry_path}")
                say(f"failing hosts        {page}/failures")
                say("Press Ctrl-C to stop. 按 Ctrl-C 结束。")

            await run(Options(file, overrides), loaded, started, in_terminal=True)
