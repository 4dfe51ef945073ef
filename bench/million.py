"""T16: one execution on a million hosts of which half fail, in one scope and in two, and a start with these states."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.measure import (
    HERE,
    MIB,
    Build,
    Row,
    cpu_of,
    daemon,
    eventually,
    get,
    memory_of,
    python,
    scratch,
    server,
    value,
)

HOSTS = 1_000_000
SCOPES = 2
TRACKED = 100_000
PEAK, STALL, STATE = 400 * MIB, 0.1, 0.2 * 138 * MIB
INTERVAL = 5.0


class Delay(threading.Thread):
    """The longest answer of a daemon to /-/healthy, asked for every 5 ms: `worst` by the clock, in which other programs
    of the machine have their share, `worst_cpu` the CPU that the process used until an answer, in whatever thread."""

    def __init__(self, url: str, pid: int) -> None:
        super().__init__(daemon=True)
        self.worst = self.worst_cpu = 0.0
        self.stopped = False
        self._address = url.removeprefix("http://")
        self._pid = pid

    def run(self) -> None:
        client = http.client.HTTPConnection(self._address, timeout=60)
        while not self.stopped:
            began, used = time.perf_counter(), cpu_of(self._pid)
            client.request("GET", "/-/healthy")
            client.getresponse().read()
            self.worst = max(self.worst, time.perf_counter() - began)
            self.worst_cpu = max(self.worst_cpu, cpu_of(self._pid) - used)
            time.sleep(0.005)


@contextmanager
def delay_of(url: str, pid: int) -> Iterator[Delay]:
    """Watch a daemon until the context is left."""
    delay = Delay(url, pid)
    delay.start()
    try:
        yield delay
    finally:
        delay.stopped = True
        delay.join()


@dataclass
class Stage:
    """A moment of a run: `peak` bytes of memory until then, and the longest answers as `Delay` has them."""

    what: str
    peak: float
    stall: float
    stall_cpu: float


def run(build: Build = HERE, hosts: int = HOSTS, scopes: int = 1) -> tuple[list[Stage], float]:
    """What a daemon needs for one such execution in each scope, and after a restart; and the bytes of its state."""
    stages: list[Stage] = []
    with scratch() as folder, server(*python("bench.crowd", str(hosts))) as (_, platform):
        config = {
            "blueking": {
                "job": {"url": platform, "api": "v4"},
                "auth": {"app_code": "bench", "app_secret": "bench", "username": "admin"},
                "max_response_bytes": "512MiB",
                "request_timeout": "60s",
            },
            "collectors": {"job": {"interval": f"{INTERVAL:g}s"}},
            "counter_birth_hold": "0s",
            "scopes": [{"bk_scope_type": "biz", "bk_scope_id": str(scope)} for scope in range(1, scopes + 1)],
            "state": {"url": f"sqlite:{folder}/state.db"},
        }

        def reached(what: str, pid: int, delay: Delay) -> None:
            stages.append(Stage(what, memory_of(pid, "VmHWM"), delay.worst, delay.worst_cpu))

        with daemon(config, folder, build=build) as (process, url, _), delay_of(url, process.pid) as delay:
            _wait_for(url, "blueking_exporter_collector_success", scopes)
            for scope in range(1, scopes + 1):
                get(f"{platform}/-/start?scope={scope}")
                _wait_for(url, "blueking_job_executions_finished_total", scope)
                _wait_for(url, "blueking_job_hosts_failing", scope * min(hosts // 2, TRACKED))
                reached(f"{scope} x {hosts:,} hosts", process.pid, delay)
        state = sum(file.stat().st_size for file in folder.glob("state.db*"))
        with daemon(config, folder, build=build) as (process, url, _), delay_of(url, process.pid) as delay:
            _wait_for(url, "blueking_exporter_collector_success", scopes)
            time.sleep(2 * INTERVAL)
            reached("after a restart", process.pid, delay)
    return stages, state


def _wait_for(url: str, name: str, at_least: float) -> None:
    eventually(lambda: value(url, name) >= at_least, 300, 0.5)


def measure() -> list[Row]:
    stages, state = run(scopes=SCOPES)
    rows = []
    for stage in stages:
        what = f"{stage.what}: peak RSS"
        rows.append(Row(target_id="T16", what=what, value=stage.peak / MIB, unit="MiB", target=PEAK / MIB))
        what = f"{stage.what}: longest answer to /-/healthy"
        rows.append(Row(target_id="T16", what=what, value=stage.stall, unit="s", target=STALL))
    what = f"state of {SCOPES} scopes"
    return [*rows, Row(target_id="T16", what=what, value=state / MIB, unit="MiB", target=SCOPES * STATE / MIB)]
