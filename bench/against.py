"""T8, T13-T18: this tree beside an earlier commit, measured in turns in one run; T18 in this tree alone.

    python -m bench against-base                                        everything, at full size
    python -m bench T13 --rounds 1 --scopes 300 --minutes 0.5           one target, small

The earlier commit, `--base`, is checked out below .cache and gets an environment from its own files. Platforms run in
processes of their own, and are those of this tree for both builds. Daemons with many scopes begin with states: those of
one scope after its first poll, copied for all scopes.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from bench import anchors, million, polls
from bench.measure import (
    HERE,
    MIB,
    ROOT,
    Build,
    Row,
    cpu_of,
    daemon,
    eventually,
    free_port,
    get,
    memory_of,
    output,
    python,
    scratch,
    server,
    skipped,
    value,
    versus,
)
from bench.platform import config, scopes

T = TypeVar("T")
Figures = dict[str, float]

BASE = "782d593"
ROUNDS, MINUTES = 3, 1.0
"""Unless the command line has them."""
INTERVAL = 30.0
SCRAPE = 15.0
FEW = 30
"""Scopes of the daemon whose memory is taken off that of the daemon with many."""
TIMES = 10
"""So many more scopes, polled less often by as much, has one process of T18."""
CAUGHT_UP = (360.0, 9.0)
"""Minutes of history: many times `lookback`, in which rows must be told from known ones, and less than it."""
RATE = 200
FAST = 1000
"""Requests per second while nothing but the first polls is waited for."""
PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}
"""What a Prometheus sends with a scrape."""


class Run:
    """What one call of the command measures, and how long."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.base = base(flags.base)
        self.scopes: int = flags.scopes
        self.executions: int = flags.executions
        self.hosts: int = flags.hosts
        self.seconds = 60.0 * (flags.minutes or MINUTES)
        self._rounds: int = flags.rounds or ROUNDS

    def in_turns(self, measure: Callable[[Build], T]) -> tuple[list[T], list[T]]:
        """What `measure` finds in this tree and in the base. Which one is first changes from round to round."""
        found: tuple[list[T], list[T]] = ([], [])
        for number in range(self._rounds):
            for which in (0, 1) if number % 2 else (1, 0):
                found[which].append(measure((HERE, self.base)[which]))
        return found

    def here(self, measure: Callable[[], T]) -> list[T]:
        """What `measure` finds in each round, in this tree alone."""
        return [measure() for _ in range(self._rounds)]


def base(rev: str) -> Build:
    """The tree of a commit and an environment for it, both made at first use."""
    found = output("git", "rev-parse", "--short", f"{rev}^{{commit}}").strip()
    tree = ROOT / ".cache" / "base" / found
    if not (tree / "exporter").exists():
        output("git", "worktree", "add", "--force", "--detach", str(tree), found)
    output("make", "--silent", "-C", str(tree), ".venv/.ready")
    return Build(tree, str(tree / ".venv" / "bin" / "python"))


def compared(
    target_id: str, what: str, found: tuple[list[Figures], list[Figures]], name: str, unit: str, target: float | None
) -> Row:
    """One figure of both builds."""
    scale = {"ms": 1000, "KiB": 1 / 1024, "MiB": 1 / MIB}.get(unit, 1)
    ours, theirs = ([one[name] * scale for one in figures] for figures in found)
    return versus(target_id, what, ours, theirs, unit, target)


def polled(address: str, count: int) -> bool:
    """Whether each of so many scopes has been polled with success."""
    return value(address, "blueking_exporter_collector_success") == count


@contextlib.contextmanager
def with_states(build: Build, platform: str, count: int) -> Iterator[tuple[dict[str, Any], Path]]:
    """A configuration of so many scopes, and a folder with the states of all of them."""
    with scratch() as folder:
        store = {"state": {"url": f"sqlite:{folder}/state.db"}}
        with daemon({**config(platform, 1, "1s"), **store}, folder, build=build) as (_, address, _log):
            eventually(lambda: polled(address, 1))
        first, *others = scopes(count)
        with contextlib.closing(sqlite3.connect(folder / "state.db")) as db, db:
            select = "SELECT collector, bk_scope_type, payload, updated FROM state WHERE bk_scope_id = ?"
            (state,) = db.execute(select, (first.bk_scope_id,))
            insert = (
                "INSERT INTO state (collector, bk_scope_type, payload, updated, bk_scope_id) VALUES (?, ?, ?, ?, ?)"
            )
            db.executemany(insert, [(*state, one.bk_scope_id) for one in others])
        yield {**config(platform, count, f"{INTERVAL:g}s"), **store}, folder


def watch(address: str, pid: int, seconds: float) -> Figures:
    """CPU per poll, polls per second and memory of a daemon, scraped as by a Prometheus."""
    requests, began, used = _requests(address), time.monotonic(), cpu_of(pid)
    while (left := began + seconds - time.monotonic()) > 0:
        time.sleep(min(left, SCRAPE))
        get(f"{address}/metrics", PROMETHEUS)
    used, elapsed = cpu_of(pid) - used, time.monotonic() - began
    requests = _requests(address) - requests
    return {"cpu": used / requests, "rss": memory_of(pid), "per_second": requests / elapsed, "share": used / elapsed}


def _requests(address: str) -> float:
    """Requests to the platform, of which a quiet poll makes one."""
    return value(address, "blueking_exporter_api_requests_total")


def quiet(build: Build, platform: str, count: int, seconds: float) -> Figures:
    """A daemon on scopes in which nothing happens."""
    with (
        with_states(build, platform, count) as (settings, folder),
        daemon(settings, folder, core=0, build=build) as (process, address, _),
    ):
        eventually(lambda: polled(address, count), 300, 1)
        time.sleep(min(seconds, INTERVAL))
        return watch(address, process.pid, seconds)


def polls_and_memory(run: Run) -> list[Row]:
    """T13 and T14."""
    what = f"{run.scopes:,} quiet scopes at {INTERVAL:g} s"
    with server(*python("bench.platform", str(run.scopes), "0"), core=1) as (_, platform):
        many = run.in_turns(lambda build: quiet(build, platform, run.scopes, run.seconds))
        few = run.in_turns(lambda build: quiet(build, platform, FEW, min(run.seconds, SCRAPE)))
    for of_many, of_few in zip(many, few, strict=True):
        for more, less in zip(of_many, of_few, strict=True):
            more["scope"] = (more["rss"] - less["rss"]) / (run.scopes - FEW)
    return [
        compared("T13", f"{what}: CPU per poll", many, "cpu", "ms", 0.6),
        compared("T13", f"{what}: polls", many, "per_second", "/s", None),
        compared("T14", f"{what}: memory per scope beyond {FEW}", many, "scope", "KiB", 0.5),
        compared("T14", f"{what}: RSS", many, "rss", "MiB", None),
    ]


def pages(run: Run) -> list[Row]:
    """T8."""
    go, reason = anchors.build("poller")
    theirs: list[float] = []

    def once(build: Build) -> Figures:
        # An answer belongs to a poll of a scope: each run has a platform of its own.
        with server(*python("bench.pages")) as (_, url):
            found = polls.spent(url, build)
            if go and build is HERE:
                theirs.append(polls.spent_by_go(go, url))
            return found

    found = run.in_turns(once)
    rows = [compared("T8", f"{polls.WHAT}: {text}", found, case, "ms", None) for case, (text, _) in polls.CASES.items()]
    if not go:
        return [*rows, skipped("T8", f"{polls.WHAT} / Go", reason)]
    return [*rows, *polls.beside_go(found[0], theirs)]


def catch_up(run: Run) -> list[Row]:
    """T15."""

    def once(build: Build, minutes: float) -> Figures:
        history = python("bench.history", str(run.executions), str(minutes))
        with scratch() as folder, server(*history, core=1) as (_, platform):
            settings = {**config(platform, 1, "1s"), "state": {"url": f"sqlite:{folder}/state.db"}}
            settings["counter_birth_hold"] = "0s"
            settings["blueking"]["requests_per_second"] = FAST
            with daemon(settings, folder, build=build) as (_process, address, _):
                eventually(lambda: polled(address, 1))
            get(f"{platform}/-/return")
            with daemon(settings, folder, core=0, build=build) as (process, address, _):
                finished = "blueking_job_executions_finished_total"
                eventually(lambda: value(address, finished) >= run.executions, 300, 0.1)
                if value(address, finished) != run.executions:
                    raise RuntimeError(f"{build.root} counted {value(address, finished):.0f} executions")
                return {"cpu": cpu_of(process.pid), "peak": memory_of(process.pid, "VmHWM")}

    rows = []
    for minutes in CAUGHT_UP:
        found = run.in_turns(lambda build, minutes=minutes: once(build, minutes))  # type: ignore[misc]
        what = f"{run.executions:,} executions of {minutes:g} minutes caught up"
        rows += [
            compared("T15", f"{what}: CPU since the start", found, "cpu", "s", 0.5),
            compared("T15", f"{what}: peak RSS", found, "peak", "MiB", 0.5),
        ]
    return rows


def crowd(run: Run) -> list[Row]:
    """T16."""

    def once(build: Build) -> Figures:
        (first, again), state = million.run(build, run.hosts)
        return {
            "state": state,
            **{f"first {name}": figure for name, figure in vars(first).items() if name != "what"},
            **{f"again {name}": figure for name, figure in vars(again).items() if name != "what"},
        }

    found, what = run.in_turns(once), f"{run.hosts:,} hosts"

    def alone(what: str, name: str, target: float | None) -> Row:
        return _alone("T16", what, [one[name] for one in found[0]], "s", target)

    rows = [compared("T16", f"{what}: state", found, "state", "MiB", 0.2)]
    for prefix, when in (("first", what), ("again", f"{what}, restarted")):
        rows += [
            compared("T16", f"{when}: peak RSS", found, f"{prefix} peak", "MiB", 0.4),
            alone(f"{when}: longest answer to /-/healthy", f"{prefix} stall", million.STALL),
            alone(f"{when}: most CPU used until an answer", f"{prefix} stall_cpu", None),
        ]
    return rows


def start(run: Run) -> list[Row]:
    """T17."""
    with server(*python("bench.platform", str(run.scopes), "0"), core=1) as (_, platform):
        found = run.in_turns(lambda build: _start(build, platform, run.scopes))
    what = f"start with the states of {run.scopes:,} scopes"
    return [
        compared("T17", f"{what}: until the first complete page", found, "page", "s", 0.5),
        compared("T17", f"{what}: CPU until then", found, "page_cpu", "s", 0.5),
        compared("T17", f"{what}: until ready", found, "ready", "s", None),
        compared("T17", f"{what}: CPU until then", found, "ready_cpu", "s", None),
        versus("T17", f"{what}: until ready / what the request budget allows", [one["ready"] for one in found[0]],
               [run.scopes / RATE] * len(found[0]), "s", None),
    ]  # fmt: skip


def _start(build: Build, platform: str, count: int) -> Figures:
    with with_states(build, platform, count) as (settings, folder):
        address = f"http://127.0.0.1:{free_port()}"
        listen = {"server": {"listen_address": [address.removeprefix("http://")]}}
        began = time.monotonic()
        with daemon({**settings, **listen}, folder, core=0, wait=False, build=build) as (process, _, _log):

            def complete() -> bool:
                with contextlib.suppress(ConnectionError):
                    page = get(f"{address}/metrics", keep=True).body
                    return page.count(b"\nblueking_exporter_collector_watermark_timestamp_seconds{") == count
                return False

            def ready() -> bool:
                return get(f"{address}/-/ready").status == 200

            eventually(complete, 120, 0.01)
            page, page_cpu = time.monotonic() - began, cpu_of(process.pid)
            eventually(ready, 120, 0.1)
            return {
                "page": page, "page_cpu": page_cpu, "ready": time.monotonic() - began, "ready_cpu": cpu_of(process.pid),
            }  # fmt: skip


def many(run: Run) -> list[Row]:
    """T18."""
    count = run.scopes * TIMES
    pairs = run.here(
        lambda: (
            _discovered(run.scopes, INTERVAL, run.seconds),
            _discovered(count, INTERVAL * TIMES, run.seconds),
        )
    )
    fewer, more = [one for one, _ in pairs], [other for _, other in pairs]
    what = f"{count:,} scopes at {INTERVAL * TIMES:g} s"

    def alone(text: str, name: str, unit: str, target: float | None, scale: float = 1) -> Row:
        return _alone("T18", f"{what}: {text}", [one[name] * scale for one in more], unit, target)

    return [
        compared("T18", f"{what} / {run.scopes:,} at {INTERVAL:g} s: CPU per poll", (more, fewer), "cpu", "ms", 1.1),
        compared("T18", f"{what} / {run.scopes:,} at {INTERVAL:g} s: polls", (more, fewer), "per_second", "/s", None),
        alone("RSS", "rss", "MiB", 500, 1 / MIB),
        alone("longest answer to /-/healthy", "stall", "ms", 50, 1000),
        alone("most CPU used until an answer", "stall_cpu", "ms", None, 1000),
        alone("CPU of a reload without a change", "reload_cpu", "s", 2),
        alone("longest answer to /-/healthy meanwhile", "reload_stall", "ms", None, 1000),
        alone("most CPU used until an answer", "reload_stall_cpu", "ms", None, 1000),
    ]


def _discovered(count: int, interval: float, seconds: float) -> Figures:
    """A daemon on scopes that it found in CMDB."""
    with (
        server(*python("bench.platform", str(count), "0"), core=1) as (_, platform),
        with_states(HERE, platform, count) as (settings, folder),
    ):
        settings["blueking"] |= {"cmdb": {"url": f"{platform}/api/bk-cmdb/prod"}, "requests_per_second": FAST}
        settings["collectors"]["job"]["interval"] = f"{interval:g}s"
        settings |= {"scopes": [], "discovery": {"enabled": True}, "max_series": 10_000_000}
        with daemon(settings, folder, core=0) as (process, address, _):
            eventually(lambda: polled(address, count), 600, 2)
            time.sleep(min(seconds, INTERVAL))
            found = watch(address, process.pid, seconds)
            with million.delay_of(address, process.pid) as delay:
                watch(address, process.pid, min(seconds, 2 * SCRAPE))
            loaded = "blueking_exporter_config_last_reload_success_timestamp_seconds"
            with million.delay_of(address, process.pid) as reload_delay:
                before, began, used = value(address, loaded), time.monotonic(), cpu_of(process.pid)
                process.send_signal(signal.SIGHUP)
                eventually(lambda: value(address, loaded) != before, 120, 0.2)
                used, elapsed = cpu_of(process.pid) - used, time.monotonic() - began
        return {
            **found,
            "stall": delay.worst,
            "stall_cpu": delay.worst_cpu,
            "reload_cpu": used - found["share"] * elapsed,
            "reload_stall": reload_delay.worst,
            "reload_stall_cpu": reload_delay.worst_cpu,
        }


def _alone(target_id: str, what: str, figures: Sequence[float], unit: str, target: float | None) -> Row:
    return Row(target_id=target_id, what=what, value=median(figures), unit=unit, target=target, rounds=len(figures),
               low=min(figures), high=max(figures))  # fmt: skip


TARGETS: Mapping[str, Callable[[Run], list[Row]]] = {
    "T8": pages,
    "T13": polls_and_memory,
    "T14": polls_and_memory,
    "T15": catch_up,
    "T16": crowd,
    "T17": start,
    "T18": many,
}
"""What is measured for a target. T13 and T14 are measured together."""


def measure(flags: argparse.Namespace) -> list[Row]:
    """The rows of the chosen targets, all of them when none is chosen."""
    run = Run(flags)
    chosen = flags.targets or list(TARGETS)
    wanted = dict.fromkeys(TARGETS[target] for target in chosen)
    return [row for measured in wanted for row in measured(run) if row.target_id in chosen]
