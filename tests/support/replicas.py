"""Several daemons on one store, a platform with traffic, and a scraper that reads every page."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from exporter.model import Scope
from exporter.simulator.ledger import Truth
from exporter.simulator.world import StepScript, target
from tests.support.components import eventually, http
from tests.support.process import FINISHED, Daemon, Samples, Simulated, configuration, expected, samples, shown

TTL = 3.0
SCOPES = tuple(Scope("biz", str(number)) for number in range(2, 14))
EVERY = 0.15
"""Seconds between two scrapes of one target."""
ROUND = 1.0
"""A scope that is seen at A, then B, then A within so many seconds was on both pages at once."""
_SAMPLE = re.compile(rf'^{FINISHED}{{bk_scope_type="biz",bk_scope_id="(\d+)",[^}}]*}} (\S+)$', re.M)


class Seen(NamedTuple):
    """One scope on one page. `begun` and `ended`: of the scrape, monotonic seconds."""

    begun: float
    ended: float
    pod: str
    finished: float


class Replicas:
    """Daemons by the names of their pods, beside a simulated platform with traffic."""

    def __init__(self, folder: Path, url: str, *pods: str, state: dict[str, Any] | None = None) -> None:
        self.simulated = Simulated(*SCOPES)
        self.daemons: dict[str, Daemon] = {}
        self.seen: dict[str, list[Seen]] = defaultdict(list)
        self._folder = folder
        self._state = {"url": url, "lease_ttl": f"{TTL:g}s", **(state or {})}
        self._pods = pods
        self._stopping = threading.Event()
        self._calm = threading.Event()
        self._threads: list[threading.Thread] = []
        self._began_ms = 0

    def __enter__(self) -> Self:
        self.simulated.__enter__()
        for pod in self._pods:
            self.add(pod)
        eventually(self._all_succeed, 60, 0.1)  # baselines are complete
        self._began_ms = int(time.time() * 1000)
        self._run(self._start_executions)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(10)
        for daemon in self.daemons.values():
            daemon.kill()
        self.simulated.__exit__(None, None, None)

    def _all_succeed(self) -> bool:
        name = "blueking_exporter_collector_last_success_timestamp_seconds"
        return sum(found == name for found, _ in self.union()) == len(SCOPES)

    def add(self, pod: str) -> Daemon:
        """Start a replica, or another run of one."""
        folder = self._folder / pod
        folder.mkdir(parents=True, exist_ok=True)
        config = configuration(self.simulated.url, SCOPES, state=self._state, collectors={"job": {"interval": "500ms"}})
        daemon = self.daemons[pod] = Daemon(folder, config, environ={"POD_NAME": pod})
        daemon.start()
        self._run(self._scrape, pod, daemon)
        return daemon

    def __getitem__(self, pod: str) -> Daemon:
        return self.daemons[pod]

    # What is asked

    def pages(self) -> dict[str, Samples]:
        """All pages that answer now."""
        found: dict[str, Samples] = {}
        for pod, daemon in self.daemons.items():
            with contextlib.suppress(OSError):
                found[pod] = samples(http(f"{daemon.url}/metrics", timeout=2.0)[1].decode())
        return found

    def union(self) -> Samples:
        """What Prometheus knows of scopes: the pages together. AssertionError when a scope is on two of them."""
        found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for page in self.pages().values():
            scoped = {key: value for key, value in page.items() if any(name == "bk_scope_id" for name, _ in key[1])}
            assert not found.keys() & scoped.keys()
            found |= scoped
        return found

    def served(self) -> int:
        """Scopes that some page shows now."""
        names = "name[]=blueking_scope_info"
        found: set[str] = set()
        for daemon in list(self.daemons.values()):
            with contextlib.suppress(OSError):
                text = http(f"{daemon.url}/metrics?{names}", timeout=1.0)[1].decode()
                found.update(re.findall(r'bk_scope_id="(\d+)"', text))
        return len(found)

    def wait_served(self, seconds: float = 40.0) -> float:
        """Until every scope is shown; seconds it took."""
        began = time.monotonic()
        eventually(lambda: self.served() == len(SCOPES), seconds, 0.05)
        return time.monotonic() - began

    def value(self, pod: str, name: str, **labels: str) -> float:
        return self.daemons[pod].value(name, **labels)

    def truth(self, scope: Scope) -> Truth:
        """What has happened since all baselines were complete."""
        return self.simulated.truth(scope, self._began_ms)

    def check(self, *, gap: float = 30.0, calm: float = 0.0) -> None:
        """The truth: every page together shows what has happened, each scope was on one page at a time, no count ever
        fell, and none was away for longer than `gap` seconds. With `calm` nothing happens any more, and
        so many seconds are left to others to see it."""
        self._calm.set()
        time.sleep(0.3)
        truths = {scope: expected(self.truth(scope)) for scope in SCOPES}

        def exact() -> bool:
            page = self.union()
            for scope in SCOPES:
                found = shown(page, scope)
                for part in ("created", "finished", "durations", "host_results"):
                    assert found[part] == truths[scope][part], (scope, part)
            return True

        eventually(exact, 30.0, 0.2)
        time.sleep(calm)
        if not calm:
            self._calm.clear()
        assert self.falls() == []
        assert self.doubles() == []
        assert self.longest_gap() <= gap

    def falls(self) -> list[tuple[str, float, float]]:
        """Each scope whose count fell: from, to."""
        found = []
        for scope, seen in self.seen.items():
            # What had been read before this scrape began.
            read = sorted(seen, key=lambda one: one.ended)
            highest, position = 0.0, 0
            for one in sorted(seen, key=lambda one: one.begun):
                while read[position].ended < one.begun:
                    highest = max(highest, read[position].finished)
                    position += 1
                if one.finished < highest:
                    found.append((scope, highest, one.finished))
        return found

    def doubles(self) -> list[tuple[str, Seen, Seen, Seen]]:
        """Each time that a scope was seen at A, then at B, then at A again."""
        found = []
        for scope, seen in self.seen.items():
            ordered = sorted(seen, key=lambda one: one.begun)
            for index, one in enumerate(ordered):
                for other in ordered[index + 1 :]:
                    if other.begun > one.ended + ROUND:
                        break
                    if other.pod == one.pod or other.begun < one.ended:
                        continue
                    later = (third for third in ordered if third.pod == one.pod and third.begun > other.ended)
                    again = next(later, None)
                    if again and again.begun < one.ended + ROUND:
                        found.append((scope, one, other, again))
        return found

    def forget(self) -> None:
        """Measure gaps from now on."""
        self._from = time.monotonic()

    _from = 0.0

    def longest_gap(self) -> float:
        """Seconds between two times at which some page showed a scope, at the most."""
        longest = 0.0
        for seen in self.seen.values():
            times = sorted(one.ended for one in seen if one.ended > self._from)
            longest = max([longest, *(after - before for before, after in itertools.pairwise(times))])
        return longest

    # What goes on meanwhile

    def _run(self, work: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _start_executions(self) -> None:
        number = 0
        while not self._stopping.wait(0.05):
            if not self._calm.is_set():
                number += 1
                results: Any = {target(1): 9} if number % 3 else {target(1): (104, 1)}
                self.simulated.start(SCOPES[number % len(SCOPES)], steps=[StepScript(duration=0.0, results=results)])

    def _scrape(self, pod: str, daemon: Daemon) -> None:
        process, url = daemon.process, f"{daemon.url}/metrics?name[]={FINISHED}"
        assert process is not None
        while not self._stopping.wait(EVERY) and process.poll() is None:
            begun = time.monotonic()
            try:
                text = http(url, timeout=1.0)[1].decode()
            except OSError:
                continue
            ended = time.monotonic()
            counts: dict[str, float] = defaultdict(float)
            for scope, value in _SAMPLE.findall(text):
                counts[scope] += float(value)
            for scope, count in counts.items():
                self.seen[scope].append(Seen(begun, ended, pod, count))
