"""How cost grows from 30 to 3,000 scopes and from 1,000 to a million series: a table, and docs/performance.svg."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench import scopes
from bench.measure import MIB, ROOT, Row, cpu_of, get, memory_of, python, server

SCOPES = (30, 300, 3000)
SERIES = (1_000, 10_000, 100_000, 1_000_000)
PLOT = ROOT / "docs" / "performance.svg"


def by_series(rounds: int = 5) -> list[dict[str, float]]:
    """Server CPU of a plain scrape and of a repeated gzip one, in ms; MiB of the process."""
    found = []
    for series in SERIES:
        with server(*python("bench.served", str(series))) as (process, url):
            plain: list[float] = []
            cached: list[float] = []
            for _ in range(rounds + 1):
                for headers, values in (({}, plain), ({"Accept-Encoding": "gzip"}, cached)):
                    times = max(1, 20_000 // series)
                    before = cpu_of(process.pid)
                    for _ in range(times):
                        get(f"{url}/metrics", headers)
                    time.sleep(0.02)
                    values.append((cpu_of(process.pid) - before) / times)
            found.append(
                {
                    "series": series,
                    "plain_ms": median(plain[1:]) * 1000,
                    "gzip_ms": median(cached[1:]) * 1000,
                    "rss_mib": memory_of(process.pid) / MIB,
                }
            )
    return found


def measure(seconds: float = 90) -> tuple[list[Row], dict[str, Any]]:
    of_scopes = [scopes.run(count, seconds) for count in SCOPES]
    of_series = by_series()
    PLOT.write_text(plot(of_scopes, of_series))
    rows = [
        Row(target_id="growth", what=f"{one['scopes']:,} scopes: {name}", value=one[key] * scale, unit=unit)
        for one in of_scopes
        for name, key, scale, unit in (
            ("CPU of one core", "cpu_share", 100, "%"),
            ("RSS", "rss_bytes", 1 / MIB, "MiB"),
            ("median of /metrics", "scrape_median_seconds", 1000, "ms"),
        )
    ]
    rows += [
        Row(target_id="growth", what=f"{one['series']:,} series: {name}", value=one[key], unit=unit)
        for one in of_series
        for name, key, unit in (
            ("CPU of a plain scrape", "plain_ms", "ms"),
            ("CPU of a repeated gzip scrape", "gzip_ms", "ms"),
            ("RSS", "rss_mib", "MiB"),
        )
    ]
    return rows, {"scopes": of_scopes, "series": of_series}


def plot(of_scopes: Sequence[dict[str, Any]], of_series: Sequence[dict[str, Any]]) -> str:
    """Two panels, both axes logarithmic."""
    left = _panel(
        40, "scopes at 30 s", [one["scopes"] for one in of_scopes],
        {
            "CPU, % of a core": [one["cpu_share"] * 100 for one in of_scopes],
            "RSS, MiB": [one["rss_bytes"] / MIB for one in of_scopes],
            "/metrics, ms": [one["scrape_median_seconds"] * 1000 for one in of_scopes],
        },
    )  # fmt: skip
    right = _panel(
        440, "series on the page", [one["series"] for one in of_series],
        {
            "plain, ms CPU": [one["plain_ms"] for one in of_series],
            "RSS, MiB": [one["rss_mib"] for one in of_series],
            "gzip again, ms CPU": [one["gzip_ms"] for one in of_series],
        },
    )  # fmt: skip
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 320" font-family="sans-serif" font-size="12">\n'
        '<rect width="820" height="320" fill="#fff"/>\n' + left + right + "</svg>\n"
    )


_COLORS = ("#1f6feb", "#d1242f", "#1a7f37")
_LOW, _HIGH = -1.0, 3.0
"""Decades of the vertical axis: 0.1 to 1,000."""


def _panel(left: int, title: str, at: Sequence[float], lines: dict[str, list[float]]) -> str:
    top, bottom, right = 40, 260, left + 330
    first, last = math.log10(at[0]), math.log10(at[-1])

    def across(value: float) -> float:
        return left + (math.log10(value) - first) / (last - first) * (right - left)

    def up(value: float) -> float:
        share = (math.log10(max(value, 10**_LOW)) - _LOW) / (_HIGH - _LOW)
        return bottom - share * (bottom - top)

    out = [f'<text x="{(left + right) / 2:.0f}" y="305" text-anchor="middle" fill="#333">{title}</text>']
    for decade in range(int(_LOW), int(_HIGH) + 1):
        y = up(10.0**decade)
        out.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end" fill="#666">{10.0**decade:g}</text>')
    for value in at:
        out.append(f'<text x="{across(value):.1f}" y="280" text-anchor="middle" fill="#666">{value:,.0f}</text>')
    for number, (name, values) in enumerate(lines.items()):
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip(at, values, strict=True))
        color = _COLORS[number]
        out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{color}"/>'
            for x, y in zip(at, values, strict=True)
        ]
        out.append(f'<text x="{left + 5 + 115 * number}" y="25" fill="{color}">{name}</text>')
    return "\n".join(out) + "\n"
