"""T16: one execution on a million hosts of which half fail, in one scope and in two, and a start with these states."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.measure import MIB, Row, daemon, eventually, get, memory_of, python, scratch, server

HOSTS = 1_000_000
SCOPES = 2
TRACKED = 100_000
PEAK, STALL, STATE = 400 * MIB, 0.1, 0.2 * 138 * MIB
INTERVAL = 5.0


class Delay(threading.Thread):
    """The longest answer to /-/healthy, asked for every 5 ms: what the event loop was held up, and the other programs
    of the machine."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.worst = 0.0
        self.stopped = False
        self._address = url.removeprefix("http://")

    def run(self) -> None:
        client = http.client.HTTPConnection(self._address, timeout=60)
        while not self.stopped:
            began = time.perf_counter()
            client.request("GET", "/-/healthy")
            client.getresponse().read()
            self.worst = max(self.worst, time.perf_counter() - began)
            time.sleep(0.005)


@contextmanager
def _delay(url: str) -> Iterator[Delay]:
    delay = Delay(url)
    delay.start()
    try:
        yield delay
    finally:
        delay.stopped = True
        delay.join()


def _total(url: str, name: str) -> float:
    page = get(f"{url}/metrics", keep=True).body.decode()
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(f"{name}{{"))


def _wait_for(url: str, name: str, value: float) -> None:
    eventually(lambda: _total(url, name) == value, 300, 0.5)


def _rows(what: str, pid: int, delay: Delay) -> list[Row]:
    return [
        Row(
            target_id="T16",
            what=f"{what}: peak RSS",
            value=memory_of(pid, "VmHWM") / MIB,
            unit="MiB",
            target=PEAK / MIB,
        ),
        Row(target_id="T16", what=f"{what}: longest answer to /-/healthy", value=delay.worst, unit="s", target=STALL),
    ]


def measure() -> list[Row]:
    found: list[Row] = []
    with scratch() as folder, server(*python("bench.crowd", str(HOSTS))) as (_, platform):
        config = {
            "blueking": {
                "job": {"url": platform, "api": "v4"},
                "auth": {"app_code": "bench", "app_secret": "bench", "username": "admin"},
                "max_response_bytes": "512MiB",
                "request_timeout": "60s",
            },
            "collectors": {"job": {"interval": f"{INTERVAL:g}s"}},
            "scopes": [{"bk_scope_type": "biz", "bk_scope_id": str(scope)} for scope in range(1, SCOPES + 1)],
        }
        with daemon(config, folder) as (process, url, _), _delay(url) as delay:
            _wait_for(url, "blueking_exporter_collector_success", SCOPES)
            for scope in range(1, SCOPES + 1):
                get(f"{platform}/-/start?scope={scope}")
                _wait_for(url, "blueking_job_hosts_failing", scope * TRACKED)
                found += _rows(f"{scope} x {HOSTS:,} hosts", process.pid, delay)
        found.append(_state(folder))
        with daemon(config, folder) as (process, url, _), _delay(url) as delay:
            _wait_for(url, "blueking_exporter_collector_success", SCOPES)
            time.sleep(2 * INTERVAL)
            found += _rows("after a restart", process.pid, delay)
    return found


def _state(folder: Path) -> Row:
    size = sum(file.stat().st_size for file in folder.glob("state.db*"))
    return Row(
        target_id="T16", what=f"state of {SCOPES} scopes", value=size / MIB, unit="MiB", target=SCOPES * STATE / MIB
    )
