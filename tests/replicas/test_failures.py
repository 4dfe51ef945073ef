"""Three real processes on one store, with failures of the processes and of the store.

A scraper reads every page all the time. `Replicas.check` compares what it saw, and the union of the pages, with the
platform's truth. The exact times are tested in virtual time, in tests/state; here the limits are generous.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.components import ENGINES, Redis, Stack, eventually, require
from tests.support.replicas import SCOPES, TTL, Replicas

pytestmark = [pytest.mark.component, pytest.mark.timeout(240)]

TAKEOVER = TTL + 1.0
SLOW = 4.0
"""Seconds that this machine may be late."""
PERSISTENT = ("--appendonly", "yes", "--appendfsync", "everysec")


@pytest.fixture
def servers() -> Iterator[Stack]:
    with Stack(deadline=230.0) as stack:
        yield stack


def address(server: Redis) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


@pytest.mark.parametrize("engine", ["valkey", pytest.param("redis", marks=pytest.mark.slow)])
def test_replicas_come_and_go(servers: Stack, tmp_path: Path, engine: str) -> None:
    """kill -9, a return, SIGSTOP for longer than the ttl, SIGTERM, another pod: taken over in time, exact, one page per
    scope, no fall."""
    store = servers.redis(*PERSISTENT, engine=engine)
    with Replicas(tmp_path, address(store), "a", "b", "c") as replicas:
        assert sum(replicas.value(pod, "blueking_exporter_scopes_owned") for pod in "abc") == len(SCOPES)

        replicas["a"].kill()
        assert replicas.wait_served() < TAKEOVER + SLOW
        replicas.add("a")
        eventually(lambda: replicas.value("a", "blueking_exporter_scopes_owned") > 0)
        replicas.check(gap=TAKEOVER + SLOW)

        frozen = replicas["b"]
        frozen.signal(signal.SIGSTOP)
        time.sleep(TTL + 1.5)
        frozen.signal(signal.SIGCONT)
        replicas.wait_served()
        eventually(lambda: replicas.value("b", "blueking_exporter_fenced_total") > 0)
        replicas.check(gap=TAKEOVER + SLOW)

        replicas.forget()
        assert replicas["c"].stop() == 0
        replicas.add("d")
        eventually(lambda: replicas.value("d", "blueking_exporter_scopes_owned") > 0)
        replicas.wait_served()
        replicas.check(gap=TTL)  # nobody waited for a lease


@pytest.mark.parametrize("engine", ["redis", pytest.param("valkey", marks=pytest.mark.slow)])
def test_F46_the_store_stops_and_loses_its_data(servers: Stack, tmp_path: Path, engine: str) -> None:
    """Shorter than the ttl, SCRIPT FLUSH, kill -9 with an append-only file, FLUSHALL: nobody sees any of it."""
    store = servers.redis(*PERSISTENT, engine=engine)
    with Replicas(tmp_path, address(store), "a", "b", "c") as replicas:
        time.sleep(1.0)
        replicas.forget()
        store.pause()
        time.sleep(1.0)
        store.resume()
        store.ask("SCRIPT", "FLUSH")
        time.sleep(1.0)
        store.kill()
        store.start()
        time.sleep(1.0)
        replicas.check(gap=TTL)
        store.ask("FLUSHALL")
        eventually(lambda: store.ask("DBSIZE") == len(SCOPES) + 1)
        time.sleep(0.5)
        for pod in "abc":
            assert replicas.value(pod, "blueking_exporter_state_rollbacks_total") >= 1
        replicas.check(gap=TTL)


# The rest takes minutes: make replicas-test


def lapsed(replicas: Replicas) -> bool:
    return all(replicas.value(pod, "blueking_exporter_lease_valid") == 0 for pod in replicas.daemons)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_store_stops_for_longer_than_the_ttl(servers: Stack, tmp_path: Path, engine: str) -> None:
    """Every scope leaves every page; all is back soon after the store answers, exact."""
    store = servers.redis(*PERSISTENT, engine=engine)
    with Replicas(tmp_path, address(store), "a", "b", "c") as replicas:
        store.pause()
        eventually(lambda: replicas.served() == 0 and lapsed(replicas), TTL + SLOW)
        time.sleep(2.0)
        store.resume()
        assert replicas.wait_served() < TAKEOVER + SLOW
        replicas.check()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("away", [0.0, TTL + 2.0])
def test_F46_the_store_comes_back_with_an_old_snapshot(
    servers: Stack, tmp_path: Path, engine: str, away: float
) -> None:
    """kill -9 without an append-only file: what the snapshot lacks is written again from memory, also when every lease
    has lapsed meanwhile."""
    store = servers.redis(engine=engine)
    with Replicas(tmp_path, address(store), "a", "b", "c") as replicas:
        store.ask("SAVE")
        replicas["a"].kill()  # the snapshot names an owner that is gone
        replicas.wait_served()
        replicas.add("a")
        eventually(lambda: replicas.value("a", "blueking_exporter_scopes_owned") > 0)
        replicas.check()
        replicas.forget()
        store.kill()
        time.sleep(away)
        store.start()
        replicas.wait_served()
        time.sleep(1.0)
        replicas.check(gap=TTL if not away else 30.0)


TROUBLES: dict[str, tuple[list[tuple[str, ...]], list[tuple[str, ...]]]] = {
    "memory": ([("CONFIG", "SET", "maxmemory", "1")], [("CONFIG", "SET", "maxmemory", "0")]),
    "few replicas": (
        [("CONFIG", "SET", "min-replicas-to-write", "1")],
        [("CONFIG", "SET", "min-replicas-to-write", "0")],
    ),
    "replica": ([("REPLICAOF", "127.0.0.1", "1")], [("REPLICAOF", "NO", "ONE")]),
    "password": (
        [("CONFIG", "SET", "requirepass", "hunter2canary"), ("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")],
        [("CONFIG", "SET", "requirepass", "")],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_F46_the_store_refuses_writes(servers: Stack, tmp_path: Path, engine: str) -> None:
    """Out of memory, too few replicas, made a replica itself, another password: polls fail with the reason `state`,
    nothing is counted twice, and all continues when it is over."""
    store = servers.redis(*PERSISTENT, engine=engine)
    errors = "blueking_exporter_state_write_errors_total"
    with Replicas(tmp_path, address(store), "a", "b", "c") as replicas:
        for name, (begin, end) in TROUBLES.items():
            before = {pod: replicas.value(pod, errors) for pod in "abc"}
            for command in begin:
                store.ask(*command)
            eventually(lambda: lapsed(replicas), TTL + SLOW)
            assert any(replicas.value(pod, errors) > before[pod] for pod in "abc"), name
            for command in end:
                store.ask(*command, password="hunter2canary" if name == "password" else None)
            replicas.wait_served()
            replicas.check()
        assert all("hunter2canary" not in daemon.log for daemon in replicas.daemons.values())
        assert "user or password is refused" in replicas["a"].log


@pytest.mark.slow
def test_the_clock_of_the_store_is_wrong(servers: Stack, tmp_path: Path) -> None:
    """An hour ahead, then an hour back, by a library in front of its clock: nothing at all, since no key expires."""
    library, skew = moved_clock(tmp_path), tmp_path / "skew"
    skew.write_text("0")
    os.environ["LD_PRELOAD"], os.environ["SKEW_FILE"] = str(library), str(skew)
    try:
        store = servers.redis(engine="valkey")
    finally:
        del os.environ["LD_PRELOAD"], os.environ["SKEW_FILE"]

    def ahead() -> float:
        return float(store.ask("TIME")[0]) - time.time()

    with Replicas(tmp_path, address(store), "a", "b", "c") as replicas:
        for seconds in (3600, -3600):
            replicas.forget()
            skew.write_text(str(seconds))
            eventually(lambda: ahead() * seconds > 3000 * abs(seconds))  # noqa: B023
            time.sleep(TTL + 1.0)
            replicas.check(gap=TTL)
        assert all(replicas.value(pod, "blueking_exporter_state_rollbacks_total") == 0 for pod in "abc")


def moved_clock(folder: Path) -> Path:
    """A library that moves the wall clock by the seconds in the file SKEW_FILE."""
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(
        """
        #define _GNU_SOURCE
        #include <fcntl.h>
        #include <stdlib.h>
        #include <sys/syscall.h>
        #include <sys/time.h>
        #include <time.h>
        #include <unistd.h>
        static long skew(void) {
            char text[32] = {0};
            int file = open(getenv("SKEW_FILE"), O_RDONLY | O_CLOEXEC);
            if (file < 0) return 0;
            if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
            close(file);
            return atol(text);
        }
        int clock_gettime(clockid_t clock, struct timespec *now) {
            int result = syscall(SYS_clock_gettime, clock, now);
            if (clock == CLOCK_REALTIME) now->tv_sec += skew();
            return result;
        }
        int gettimeofday(struct timeval *restrict tv, void *restrict zone) {
            struct timespec now;
            clock_gettime(CLOCK_REALTIME, &now);
            tv->tv_sec = now.tv_sec;
            tv->tv_usec = now.tv_nsec / 1000;
            return 0;
        }
        time_t time(time_t *out) {
            struct timespec now;
            clock_gettime(CLOCK_REALTIME, &now);
            if (out) *out = now.tv_sec;
            return now.tv_sec;
        }
        """
    )
    subprocess.run([require("cc"), "-shared", "-fPIC", "-O1", "-o", library, source], check=True, capture_output=True)
    return library


# Sentinel


class Guarded(NamedTuple):
    """A primary with two replicas, watched by three sentinels."""

    servers: list[Redis]
    sentinels: list[Redis]

    @property
    def address(self) -> str:
        return "redis+sentinel://" + ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels) + "/blueking/0"

    def primary(self) -> Redis:
        """Who leads now, by the first sentinel."""
        (_, port) = self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "blueking")
        return next(server for server in self.servers if server.port == int(port))


def guarded(servers: Stack, engine: str) -> Guarded:
    primary = servers.redis(engine=engine)
    replicas = [
        servers.redis("--replicaof", f"127.0.0.1 {primary.port}", "--repl-diskless-sync-delay", "0", engine=engine)
        for _ in range(2)
    ]
    eventually(lambda: len(primary.ask("ROLE")[2]) == 2)
    sentinels = [servers.sentinel(primary, engine=engine, quorum=2) for _ in range(3)]
    found = [b"num-slaves", b"2", b"num-other-sentinels", b"2"]

    def complete(sentinel: Redis) -> bool:
        answer = sentinel.ask("SENTINEL", "MASTER", "blueking")
        known = list(answer.items()) if isinstance(answer, dict) else list(zip(answer[::2], answer[1::2], strict=True))
        flat = {str(name, "ascii") if isinstance(name, bytes) else name: value for name, value in known}
        return [int(flat["num-slaves"]), int(flat["num-other-sentinels"])] == [int(found[1]), int(found[3])]

    for sentinel in sentinels:
        eventually(lambda: complete(sentinel))  # noqa: B023
    return Guarded([primary, *replicas], sentinels)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_failover_by_sentinel(servers: Stack, tmp_path: Path, engine: str) -> None:
    """The primary is killed, alone and then together with a replica of the exporter: exact, no fall, one page each."""
    group = guarded(servers, engine)
    with Replicas(tmp_path, group.address, "a", "b", "c") as replicas:
        assert replicas.value("a", "blueking_exporter_state_replicas_acked") >= 1
        old = group.primary()
        old.kill()
        eventually(lambda: group.primary() is not old, 30)
        replicas.wait_served()
        replicas.check()
        old.start()
        eventually(lambda: len(group.primary().ask("ROLE")[2]) == 2, 60)
        old = group.primary()
        replicas["a"].kill()
        old.kill()
        eventually(lambda: group.primary() is not old, 30)
        replicas.wait_served()
        replicas.check()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_deposed_primary_that_wakes(servers: Stack, tmp_path: Path, engine: str) -> None:
    """The primary and a replica of the exporter are frozen together and woken together, old connections kept: what the
    deposed server takes in its first seconds is neither shown nor lost."""
    group = guarded(servers, engine)
    with Replicas(tmp_path, group.address, "a", "b", "c") as replicas:
        old, frozen = group.primary(), replicas["b"]
        frozen.signal(signal.SIGSTOP)
        old.pause()
        eventually(lambda: group.primary() is not old, 30)
        replicas.wait_served()
        time.sleep(TTL)
        old.resume()
        frozen.signal(signal.SIGCONT)
        time.sleep(TTL)
        replicas.wait_served()
        replicas.check()


@pytest.mark.slow
def test_nothing_is_shown_that_no_replica_has(servers: Stack, tmp_path: Path) -> None:
    """wait_replicas: without a replica of the server that acknowledges, pages are empty, until one follows again."""
    group = guarded(servers, "redis")
    with Replicas(tmp_path, group.address, "a", "b") as replicas:
        followers = [server for server in group.servers if server is not group.primary()]
        for follower in followers:
            follower.pause()
        eventually(lambda: replicas.served() == 0 and lapsed(replicas), TTL + SLOW)
        for follower in followers:
            follower.resume()
        replicas.wait_served()
        replicas.check()


@pytest.mark.slow
def test_prometheus_sees_one_series_for_each_scope(servers: Stack, tmp_path: Path) -> None:
    """With `instance` as a constant for series of scopes: through kill -9, a return and SIGTERM the series stay the
    same ones, none is reset, and what grew is what happened."""
    store = servers.redis(*PERSISTENT)
    relabel = [{"source_labels": ["bk_scope_id"], "regex": ".+", "target_label": "instance", "replacement": "blueking"}]
    with Replicas(tmp_path, address(store), "a", "b", "c") as replicas:
        ports = {pod: daemon.url.rpartition("/")[2] for pod, daemon in replicas.daemons.items()}
        prometheus = servers.prometheus(list(ports.values()), scrape={"metric_relabel_configs": relabel})
        created = "blueking_job_executions_created_total"
        eventually(lambda: len(prometheus.query(f"sum by (bk_scope_id) ({created})")) == len(SCOPES), 30)
        series = int(prometheus.value(f"count({created})") or 0)

        replicas["a"].kill()
        replicas.wait_served()
        time.sleep(3.0)
        assert replicas["b"].stop() == 0
        replicas.wait_served()
        replicas.check(calm=3.0)  # until Prometheus has seen all

        assert prometheus.value(f"count(count_over_time({created}[5m]))") == series
        assert prometheus.value(f"sum(resets({created}[5m]))") == 0
        assert prometheus.value(f"count(count by (instance) ({created}))") == 1
        happened = sum(sum(replicas.truth(scope).created.values()) for scope in SCOPES)
        assert prometheus.value(f"sum(last_over_time({created}[5m]))") == happened
