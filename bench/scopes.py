"""T10: thousands of scopes on one core, for minutes; and how cost grows with their number."""

from __future__ import annotations

import re
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import (
    MIB,
    Row,
    cpu_of,
    daemon,
    eventually,
    get,
    memory_of,
    python,
    scratch,
    server,
)
from bench.platform import config

INTERVAL = 30.0
SCRAPE = 5.0
"""Seconds between two scrapes, alternately plain and gzip: more than any Prometheus asks."""


def _value(text: str, name: str) -> float:
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


def _values(text: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)]


def run(scopes: int, seconds: float) -> dict[str, Any]:
    """One daemon on core 0 watching `scopes` scopes, one of 30 busy; the platform and we use the others.

    Counts from the end of the first poll of the last scope on.
    """
    with (
        scratch() as folder,
        server(*python("bench.platform", str(scopes), str(max(1, scopes // 30))), core=1) as (
            _,
            url,
        ),
    ):
        settings = {**config(url, scopes, f"{INTERVAL:.0f}s"), "state": {"url": f"sqlite:{folder}/state.db"}}
        began = time.monotonic()
        with daemon(settings, folder, core=0) as (process, address, log):
            pid = process.pid

            def polled() -> bool:
                # `ready` alone means nothing after a minute.
                page = get(f"{address}/metrics?name[]=blueking_exporter_collector_success", keep=True).body.decode()
                return len(_values(page, "blueking_exporter_collector_success")) == scopes

            eventually(polled, 600, 2)
            baseline = time.monotonic() - began
            time.sleep(INTERVAL)
            return {
                "scopes": scopes,
                "baseline_seconds": baseline,
                **_watch(pid, address, folder, scopes, seconds, log),
            }


def _watch(pid: int, address: str, folder: Path, scopes: int, seconds: float, log: Path) -> dict[str, Any]:
    began, used = time.monotonic(), cpu_of(pid)
    written = _written(pid)
    text = get(f"{address}/metrics", keep=True).body.decode()
    commits = _value(text, "blueking_exporter_state_writes_total")
    took: list[float] = []
    meanwhile: list[float] = []
    lags: list[float] = []
    behind: list[float] = []
    memory: list[tuple[float, float]] = []
    unsuccessful = 0
    count = 0
    while time.monotonic() - began < seconds:
        time.sleep(SCRAPE)
        gzip = count % 2 == 1
        before = cpu_of(pid)
        got = get(f"{address}/metrics", {"Accept-Encoding": "gzip"} if gzip else None, keep=not gzip)
        count += 1
        took.append(got.last)
        meanwhile.append(cpu_of(pid) - before)
        memory.append((time.monotonic() - began, memory_of(pid)))
        if not gzip:
            text = got.body.decode()
            lags.append(_value(text, "blueking_exporter_event_loop_lag_seconds"))
            watermarks = _values(text, "blueking_exporter_collector_watermark_timestamp_seconds")
            behind.append(max(0.0, time.time() - min(watermarks) - INTERVAL))
            failing = [value for value in _values(text, "blueking_exporter_collector_success") if value != 1]
            unsuccessful = max(unsuccessful, len(failing))
    elapsed = time.monotonic() - began
    return {
        "seconds": elapsed,
        "series": sum(_values(text, "blueking_exporter_series")),
        "page_bytes": len(text),
        "cpu_share": (cpu_of(pid) - used) / elapsed,
        "rss_bytes": memory[-1][1],
        "rss_peak_bytes": memory_of(pid, "VmHWM"),
        "rss_after_five_minutes": next((size for at, size in memory if at >= 300), memory[0][1]),
        "scrape_median_seconds": median(took),
        "scrape_p99_seconds": _p99(took),
        "scrape_p99_cpu_seconds": _p99(meanwhile),
        "lag_median_seconds": median(lags),
        "lag_max_seconds": max(lags),
        "late_max_seconds": max(behind),
        "unsuccessful_max": unsuccessful,
        "commits_per_second": (_value(text, "blueking_exporter_state_writes_total") - commits) / elapsed,
        "written_bytes_per_second": (_written(pid) - written) / elapsed,
        "state_bytes": sum(file.stat().st_size for file in folder.glob("state.db*")),
        "finished": sum(_values(text, "blueking_job_executions_finished_total")),
        "log_lines": len(log.read_text().splitlines()),
    }


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def _written(pid: int) -> int:
    """Bytes that the process caused to be written to disk."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    return 0


def rows(found: dict[str, Any]) -> list[Row]:
    """The targets of T10."""
    what = f"{found['scopes']:,} scopes at 30 s, {found['seconds'] / 60:.0f} min:"

    def row(name: str, value: float, unit: str, target: float | None) -> Row:
        return Row(target_id="T10", what=f"{what} {name}", value=value, unit=unit, target=target)

    return [
        row("CPU of one core", found["cpu_share"], "share", 0.5),
        row("RSS", found["rss_bytes"] / MIB, "MiB", 400),
        row("polls late by at most", found["late_max_seconds"], "s", INTERVAL),
        row("scopes without success", found["unsuccessful_max"], "", 0),
        row("p99 of /metrics", found["scrape_p99_seconds"] * 1000, "ms", 50),
        row("p99 of the CPU used during /metrics, polls included", found["scrape_p99_cpu_seconds"] * 1000, "ms", None),
        row("memory since minute 5", found["rss_bytes"] / found["rss_after_five_minutes"], "×", 1.05),
        row("worst loop lag seen", found["lag_max_seconds"] * 1000, "ms", None),
        row("commits", found["commits_per_second"], "/s", None),
        row("state written", found["written_bytes_per_second"] / 1000, "kB/s", None),
        row("state file", found["state_bytes"] / MIB, "MiB", None),
    ]
