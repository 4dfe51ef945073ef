"""`python -m bench GROUP ...`: measures, prints a table with ratio, target and verdict, writes bench/out/GROUP.json."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bench import against, big, decode, economy, exposition, growth, million, polls, replicas, scopes, start
from bench.measure import OUT, Row

ROUNDS, MINUTES = 5, 5.0
"""Unless the command line has them."""
Found = tuple[list[Row], Any]
"""The rows, and whatever else is worth keeping."""


def _exposition(flags: argparse.Namespace) -> Found:
    sizes = (1_000, 10_000, 100_000, 1_000_000) if flags.series is None else flags.series
    rows = [
        row for size in sizes for row in exposition.scrapes(size, 3 if size >= 1_000_000 else flags.rounds or ROUNDS)
    ]
    return [
        *rows,
        *exposition.stall(),
        *exposition.slow_readers(),
        *exposition.updates(),
        *exposition.prometheus(),
    ], None


def _scopes(flags: argparse.Namespace) -> Found:
    found = scopes.run(flags.scopes, 60 * (flags.minutes or MINUTES))
    return scopes.rows(found), found


GROUPS: dict[str, tuple[str, Callable[[argparse.Namespace], Found]]] = {
    "exposition": (
        "T1-T6, T9: scrapes at 1k to 1M series, slow readers, updates, a real Prometheus (6 min)",
        _exposition,
    ),
    "decode": (
        "T7: answers of the platform beside the json module",
        lambda flags: (decode.measure(flags.rounds or ROUNDS), None),
    ),
    "poll": ("T8: whole polls beside a Go poller", lambda flags: (polls.measure(flags.rounds or ROUNDS), None)),
    "scopes": ("T10: 3,000 scopes on one core (--minutes 5, and 4 for the baseline)", _scopes),
    "economy": ("T11: calls to the platform", lambda flags: (economy.measure(), None)),
    "start": ("T12: start and imports", lambda flags: (start.measure(), None)),
    "big": ("an execution on 50,000 hosts", lambda flags: (big.measure(), None)),
    "million": ("T16: an execution on a million hosts (2 min)", lambda flags: (million.measure(), None)),
    "against-base": (
        f"{', '.join(against.TARGETS)}: this tree beside an earlier commit; one T alone is a group too",
        lambda flags: (against.measure(flags), None),
    ),
    "replicas": ("R1-R6: replicas on a real Redis (2 min)", lambda flags: (replicas.measure(), None)),
    "growth": (
        "30 to 3,000 scopes, 1k to 1M series; writes docs/performance.svg (12 min)",
        lambda flags: growth.measure(),
    ),
}


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = ["| | what | measured | target | rounds | |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row.skipped:
            lines.append(f"| {row.target_id} | {row.what} | | | | skipped: {row.skipped} |")
            continue
        value = f"{row.value:.3g} {row.unit}"
        if row.anchor is not None:
            value = f"{row.measured:.3g} ({value} / {row.anchor:.3g} {row.unit})"
        if row.low is not None and row.high is not None:
            value += f", {row.low:.3g} to {row.high:.3g}"
        target = "" if row.target is None else f"{'≥' if row.at_least else '≤'} {row.target:g}"
        verdict = {None: "", True: "pass", False: "FAIL"}[row.passed]
        lines.append(f"| {row.target_id} | {row.what} | {value} | {target} | {row.rounds} | {verdict} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Without a group: all but growth and against-base.",
        epilog="\n".join(f"{name:12} {text}" for name, (text, _) in GROUPS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", choices=[[], *GROUPS, *against.TARGETS], help=", ".join(GROUPS)
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds of a measurement (5; 3 against the base)")
    parser.add_argument("--series", type=int, nargs="+", help="sizes of the exposition")
    parser.add_argument("--scopes", type=int, default=3000)
    parser.add_argument(
        "--minutes", type=float, help="how long scopes are watched (5, 30 for the full run; 1 against the base)"
    )
    parser.add_argument("--executions", type=int, default=200_000, help="of the catch-up, T15")
    parser.add_argument("--hosts", type=int, default=million.HOSTS, help="of the execution of T16 against the base")
    parser.add_argument("--base", default=against.BASE, metavar="REV", help="the earlier commit")
    flags = parser.parse_args()
    flags.targets = [name for name in flags.groups if name in against.TARGETS]
    groups = list(dict.fromkeys("against-base" if name in against.TARGETS else name for name in flags.groups))
    OUT.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in groups or [name for name in GROUPS if name not in ("growth", "against-base")]:
        text, measure = GROUPS[name]
        print(f"\n{name}: {text}", flush=True)
        began = time.monotonic()
        rows, more = measure(flags)
        failed |= any(row.passed is False for row in rows)
        result = {"group": name, "seconds": time.monotonic() - began, "rows": rows, "more": more}
        (OUT / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)))
        print(table(rows), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
