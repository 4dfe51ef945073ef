"""T8, T13-T18: this tree beside an earlier commit, measured in turns in one run.

    python -m bench against-base                        everything, at full size
    python -m bench T13 --rounds 1 --scopes 300 --minutes 0.5

The earlier commit, `--base`, is checked out below .cache and gets an environment from its own files. Platforms run
in processes of their own, and are those of this tree for both. The daemons begin with states: those of one scope after
its first poll, copied for all scopes.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.measure import (
    HERE,
    MIB,
    ROOT,
    Build,
    Row,
    cpu_of,
    daemon,
    eventually,
    get,
    memory_of,
    output,
    python,
    scratch,
    server,
    versus,
)
from bench.platform import config, scopes

BASE = "782d593"
INTERVAL = 30.0
SCRAPE = 15.0
ROUNDS, MINUTES = 3, 1.0
"""Unless the command line has them."""
FEW = 30
"""Scopes of the daemon whose memory is taken off that of the daemon with many."""
PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}
"""What a Prometheus sends with a scrape."""


def base(rev: str) -> Build:
    """The tree of a commit and an environment for it, both made at first use."""
    found = output("git", "rev-parse", "--short", f"{rev}^{{commit}}").strip()
    tree = ROOT / ".cache" / "base" / found
    if not (tree / "exporter").exists():
        output("git", "worktree", "add", "--force", "--detach", str(tree), found)
    output("make", "--silent", "-C", str(tree), ".venv/.ready")
    return Build(tree, str(tree / ".venv" / "bin" / "python"))


def in_turns(rounds: int, builds: tuple[Build, Build], measure: Callable[[Build], Any]) -> tuple[list[Any], list[Any]]:
    """What `measure` finds for both builds in each round. Which one is first changes from round to round."""
    found: tuple[list[Any], list[Any]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            found[which].append(measure(builds[which]))
    return found


def value(address: str, name: str) -> float:
    """The sum of all series of a metric."""
    page = get(f"{address}/metrics?name[]={name}", keep=True).body.decode()
    return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)))


def polled(address: str, count: int) -> bool:
    """Whether each of so many scopes has been polled with success."""
    return value(address, "blueking_exporter_collector_success") == count


@contextlib.contextmanager
def with_states(build: Build, platform: str, count: int) -> Iterator[tuple[dict[str, Any], Path]]:
    """A configuration of so many scopes, and a folder with the states of all of them."""
    with scratch() as folder:
        state = {"state": {"url": f"sqlite:{folder}/state.db"}}
        with daemon({**config(platform, 1, "1s"), **state}, folder, build=build) as (_, address, _log):
            eventually(lambda: polled(address, 1))
        first, *others = scopes(count)
        with contextlib.closing(sqlite3.connect(folder / "state.db")) as db, db:
            copy = "SELECT collector, bk_scope_type, ?, payload, updated FROM state WHERE bk_scope_id = ?"
            db.executemany(f"INSERT INTO state {copy}", [(one.bk_scope_id, first.bk_scope_id) for one in others])
        yield {**config(platform, count, f"{INTERVAL:g}s"), **state}, folder


def quiet(build: Build, platform: str, count: int, seconds: float) -> dict[str, float]:
    """A daemon on scopes in which nothing happens, from the second poll of each on, scraped as by a Prometheus."""
    with (
        with_states(build, platform, count) as (settings, folder),
        daemon(settings, folder, core=0, build=build) as (process, address, _),
    ):
        eventually(lambda: polled(address, count), 300, 1)
        time.sleep(min(seconds, INTERVAL))
        polls, began, used = _requests(address), time.monotonic(), cpu_of(process.pid)
        while (left := began + seconds - time.monotonic()) > 0:
            time.sleep(min(left, SCRAPE))
            get(f"{address}/metrics", PROMETHEUS)
        used, elapsed = cpu_of(process.pid) - used, time.monotonic() - began
        polls = _requests(address) - polls
        return {
            "cpu": used / polls,
            "rss": memory_of(process.pid),
            "polls": polls / (count * elapsed / INTERVAL),
        }


def _requests(address: str) -> float:
    """Requests to the platform, of which a quiet poll makes one."""
    return value(address, "blueking_exporter_api_requests_total")


def polls_and_memory(flags: argparse.Namespace, builds: tuple[Build, Build]) -> list[Row]:
    """T13 and T14."""
    count, seconds = flags.scopes, 60 * (flags.minutes or MINUTES)
    what = f"{count:,} quiet scopes at {INTERVAL:g} s"
    with server(*python("bench.platform", str(count), "0"), core=1) as (_, platform):
        ours, theirs = in_turns(flags.rounds or ROUNDS, builds, lambda build: quiet(build, platform, count, seconds))
        few = in_turns(flags.rounds or ROUNDS, builds, lambda build: quiet(build, platform, FEW, min(seconds, SCRAPE)))
    for found, found_few in zip((ours, theirs), few, strict=True):
        for many, less in zip(found, found_few, strict=True):
            many["scope"] = (many["rss"] - less["rss"]) / (count - FEW)

    def column(name: str, scale: float) -> tuple[list[float], list[float]]:
        return [one[name] * scale for one in ours], [one[name] * scale for one in theirs]

    return [
        versus("T13", f"{what}: CPU per poll", *column("cpu", 1000), "ms", 0.6),
        versus("T13", f"{what}: polls, of those due", *column("polls", 1), "", None),
        versus("T14", f"{what}: memory per scope beyond {FEW}", *column("scope", 1 / 1024), "KiB", 0.5),
        versus("T14", f"{what}: RSS", *column("rss", 1 / MIB), "MiB", None),
    ]


TARGETS: dict[str, Callable[[argparse.Namespace, tuple[Build, Build]], list[Row]]] = {
    "T13": polls_and_memory,
    "T14": polls_and_memory,
}
"""What is measured for a target. Some are measured together."""


def measure(flags: argparse.Namespace) -> list[Row]:
    """The rows of the chosen targets, all of them when none is chosen."""
    builds = (HERE, base(flags.base))
    chosen = flags.targets or list(TARGETS)
    wanted = dict.fromkeys(TARGETS[target] for target in chosen)
    return [row for measured in wanted for row in measured(flags, builds) if row.target_id in chosen]
