"""T12: how soon the daemon answers, and what the command line imports."""

from __future__ import annotations

import resource
import sys
import time
from statistics import median

from bench.measure import Row, cpu_of, daemon, eventually, free_port, get, output, scratch
from bench.platform import config

ROUNDS = 9


def _command(*command: str) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output(*command)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _start() -> tuple[float, float]:
    """Wall seconds from the start of the process to the first whole answer of /metrics, and its CPU seconds by then."""
    with scratch() as folder:
        port = free_port()
        settings = {
            **config("http://127.0.0.1:9", 10, "30s"),
            "server": {"listen_address": [f"127.0.0.1:{port}"]},
            "state": {"url": f"sqlite:{folder}/state.db"},
        }
        began = time.perf_counter()
        with daemon(settings, folder, wait=False) as (process, _, _log):

            def answers() -> bool:
                try:
                    return get(f"http://127.0.0.1:{port}/metrics").status == 200
                except OSError:
                    return False

            eventually(answers, 20, 0.002)
            return time.perf_counter() - began, cpu_of(process.pid)


def measure() -> list[Row]:
    imports, bare, starts = [], [], []
    _start()  # compiles
    for _ in range(ROUNDS):
        bare.append(_command(sys.executable, "-c", "pass"))
        imports.append(_command(sys.executable, "-c", "import exporter.cli"))
        starts.append(_start())

    def row(what: str, measured: list[tuple[float, float]], which: int, target: float | None) -> Row:
        values = [one[which] for one in measured]
        return Row(
            target_id="T12",
            what=what,
            value=median(values),
            unit="s",
            target=target,
            rounds=ROUNDS,
            low=min(values),
            high=max(values),
        )

    return [
        row("start to first /metrics, wall", starts, 0, 0.5),
        row("start to first /metrics, CPU", starts, 1, None),
        row("import of the command line", imports, 0, 0.25),
        row("Python alone", bare, 0, None),
    ]
