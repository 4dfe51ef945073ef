"""The daemon as a real process, and a simulated BlueKing beside it, for tests that look from outside.

`Simulated` listens in a thread of the test's process: `do` reaches into its world. `Daemon` is `blueking-exporter run`
with its files in a folder; the port is a free one, read back from its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from exporter.metrics.negotiate import Format
from exporter.model import Scope
from exporter.simulator.faults import Fault
from exporter.simulator.ledger import Truth
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from tests.support.components import eventually, http
from tests.support.parsers import parse
from tests.support.paths import ROOT

T = TypeVar("T")
BIZ = Scope("biz", "2")
OTHER = Scope("biz", "3")
FINISHED = "blueking_job_executions_finished_total"

PROGRAM = (sys.executable, "-c", "import sys; sys.modules['rich'] = None; from exporter.__main__ import main; main()")
"""`blueking-exporter` as users have it: rich comes with a tool of development only, and costs a fifth of the start."""

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]
"""(sample name, labels) → value."""


class Simulated:
    """A platform that listens on a free port while the context is open. `do` runs a function in its thread."""

    def __init__(self, *scopes: Scope, seed: int = 1) -> None:
        self.platform = Platform(seed=seed, scopes=scopes or (BIZ,))
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="simulator", daemon=True)
        self._server = SimulatorServer(self.platform)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._server.__aenter__(), self._loop).result(10)
        self.url = self._server.url
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._server.__aexit__(None, None, None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def do(self, work: Callable[[Platform], T]) -> T:
        async def call() -> T:
            return work(self.platform)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def start(self, scope: Scope = BIZ, **arguments: Any) -> int:
        """See JobWorld.start."""
        return self.do(lambda platform: platform.job.start(scope, **arguments))

    def fault(self, name: str, **arguments: Any) -> None:
        """Switch a fault on, over HTTP as other processes do; see control.py."""
        status, body = http(f"{self.url}/-/world/fault", json.dumps({"name": name, **arguments}).encode())
        assert status == 200, body

    def clear(self) -> None:
        status, _ = http(f"{self.url}/-/world/fault", b'{"clear": null}')
        assert status == 200

    def add(self, *faults: Fault) -> None:
        self.do(lambda platform: platform.faults.add(*faults))

    def truth(self, scope: Scope = BIZ, since_ms: int = 0) -> Truth:
        return self.do(lambda platform: platform.job.truth(scope, since_ms))

    def calls(self, api: str | None = None) -> int:
        """Requests answered so far, by the vendor's name of the operation."""
        return self.do(lambda platform: sum(api in (None, call.api) for call in platform.calls))


def configuration(url: str, scopes: Iterable[Scope] = (BIZ,), **changes: Any) -> dict[str, Any]:
    """A configuration that polls fast. `changes` replace top-level keys; mappings are merged into what is there."""
    config: dict[str, Any] = {
        "server": {"listen_address": ["127.0.0.1:0"]},
        "blueking": {
            "job": {"url": f"{url}/api/bk-job/prod", "api": "v4"},
            "auth": {"app_code": "blueking-exporter", "app_secret": "simulated", "username": "admin"},
            "requests_per_second": 1000,
            "request_timeout": "2s",
        },
        "collectors": {"job": {"interval": "200ms", "lookback": "5m"}},
        "counter_birth_hold": "0s",
        "scopes": [scope_entry(scope) for scope in scopes],
    }
    return merged(config, changes)


def scope_entry(scope: Scope) -> dict[str, Any]:
    return {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id, "name": f"Scope {scope}"}


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `changes`, mapping by mapping."""
    result = dict(config)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


class Daemon:
    """One run, or several, of the daemon in a folder. Killed with the context."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *arguments: str,
        environ: Mapping[str, str] | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.program = program
        self.folder = folder
        self.file = folder / "config.yaml"
        self.log_file = folder / "daemon.log"
        self.arguments = arguments
        self.environ = dict(environ or {})
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._read = 0
        self.write(config)

    def write(self, config: Mapping[str, Any]) -> None:
        """Write the configuration file atomically."""
        # JSON is YAML.
        text = json.dumps(config, indent=1)
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def spawn(self) -> None:
        """Start the process and wait for nothing."""
        self._read = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.program, "run", f"--config.file={self.file}", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment(), **self.environ},
            )

    def start(self) -> None:
        """Start the process and wait until it listens. RuntimeError with its log when it ends instead."""
        self.spawn()
        try:
            self.url = eventually(self.address, 20, 0.01)
        except BaseException:
            self.kill()
            raise

    def address(self) -> str:
        """Where this run listens; empty as long as it does not."""
        found = re.search(r"\bstarted\b.*?(https?://[\w.:\[\]]+:\d+)", self.log)
        if not found and self.process is not None and self.process.poll() is not None:
            raise SystemExit(f"the daemon ended with {self.process.returncode}:\n{self.log}")
        return found[1] if found else ""

    @property
    def log(self) -> str:
        """What this run has written."""
        with self.log_file.open("rb") as log:
            log.seek(self._read)
            return log.read().decode(errors="replace")

    def get(self, path: str, **arguments: Any) -> tuple[int, bytes]:
        return http(self.url + path, **arguments)

    def metrics(self, *names: str) -> Samples:
        """All samples of the classic page, or those of the families named."""
        query = "&".join(f"name[]={name}" for name in names)
        status, body = self.get(f"/metrics?{query}")
        assert status == 200, body
        return samples(body.decode())

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that carry these labels; KeyError without any."""
        return total(self.metrics(), name, **labels)

    def wait(self, condition: Callable[[Samples], bool], seconds: float = 15.0) -> Samples:
        """The first page that fulfils it."""
        page: Samples = {}

        def look() -> bool:
            nonlocal page
            page = self.metrics()
            return condition(page)

        try:
            eventually(look, seconds, 0.03)
        except TimeoutError:
            raise TimeoutError(f"{self.log[-3000:]}\n{dict(page)}") from None
        return page

    def wait_ready(self) -> None:
        eventually(lambda: self.get("/-/ready")[0] == 200, 15, 0.03)

    def wait_success(self, scope: Scope = BIZ, collector: str = "job") -> Samples:
        """Until a poll of this scope that began after this call was complete."""
        return self.wait_polled(time.time(), scope, collector)

    def wait_polled(self, since: float, scope: Scope = BIZ, collector: str = "job") -> Samples:
        """Wait until everything that happened before `since` (unix seconds) has been polled."""
        labels = {"collector": collector, "bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}
        name = "blueking_exporter_collector_watermark_timestamp_seconds"
        return self.wait(lambda page: total(page, name, **labels) > since + 0.001)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def exit_code(self, seconds: float = 10.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.exit_code()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


class NotifySocket:
    """The socket on which systemd hears from a service; `path` is the value of NOTIFY_SOCKET."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()

    def received(self) -> list[str]:
        """The lines received since the last call."""
        lines: list[str] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines += self._socket.recv(4096).decode().split("\n")
        return lines


def environment() -> dict[str, str]:
    """The environment of this process without the variables of the exporter."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BLUEKING_EXPORTER_")}
    return kept | {"PYTHONPATH": str(ROOT)}


def command(
    *arguments: str, environ: Mapping[str, str] | None = None, program: Sequence[str] = PROGRAM, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `blueking-exporter …` to its end, at most 30 seconds."""
    return subprocess.run(
        [*program, *arguments],
        capture_output=True, text=True, timeout=30, env={**environment(), **(environ or {})}, check=False, **options,
    )  # fmt: skip


def samples(text: str, form: Format = Format.TEXT) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a page; AssertionError when a series comes twice."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in parse(text, form):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} comes twice"
            found[key] = sample.value
    return found


def select(page: Samples, name: str, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
    """The samples of this name that carry these labels."""
    wanted = labels.items()
    return {key: value for (found, key), value in page.items() if found == name and wanted <= dict(key).items()}


def total(page: Samples, name: str, **labels: str) -> float:
    """The sum of the matching samples; KeyError without any."""
    found = select(page, name, **labels)
    if not found:
        raise KeyError(f"{name} {labels}")
    return sum(found.values())


def by_labels(page: Samples, name: str, names: Sequence[str], **labels: str) -> dict[tuple[str, ...], float]:
    """Values above 0 by the values of the labels `names`."""
    return {
        tuple(dict(key)[label] for label in names): value
        for key, value in select(page, name, **labels).items()
        if value
    }


def shown(page: Samples, scope: Scope = BIZ) -> dict[str, Any]:
    """The values of JOB on a page for one scope, in the form of `expected`."""
    own = {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}

    def read(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        return by_labels(page, f"blueking_job_{name}", labels, **own)

    host = ("bk_cloud_id", "bk_host_id", "ip")
    sums = read("execution_duration_seconds_sum", "task_type")
    return {
        "created": read("executions_created_total", "task_type", "launch_mode"),
        "finished": read("executions_finished_total", "task_type", "launch_mode", "status"),
        "reopened": read("executions_reopened_total").get((), 0),
        "lost": read("executions_lost_total").get((), 0),
        "unfinished": read("executions_unfinished", "task_type", "status"),
        "durations": read("execution_duration_seconds_count", "task_type"),
        "seconds": {key: round(value, 3) for key, value in sums.items()},
        "step_failures": read("step_failures_total", "step_type"),
        "host_results": read("host_results_total").get((), 0),
        "host_failures": read("host_failures_total", "code", "reason"),
        "exit_codes": read("host_exit_codes_total", "exit_code"),
        "hosts_failing": read("hosts_failing", "code", "reason"),
        "since": {key: round(value, 3) for key, value in read("host_failing_since_timestamp_seconds", *host).items()},
        "consecutive": read("host_consecutive_failures", *host),
    }


def expected(truth: Truth) -> dict[str, Any]:
    """The values that a page must show, by the ledger."""
    return {
        "created": dict(truth.created),
        "finished": dict(truth.finished),
        "reopened": truth.reopened,
        "lost": truth.lost,
        "unfinished": dict(truth.unfinished),
        "durations": {(name,): float(count) for name, (count, _) in truth.durations.items()},
        "seconds": {(name,): round(seconds, 3) for name, (_, seconds) in truth.durations.items() if seconds},
        "step_failures": {(name,): count for name, count in truth.step_failures.items()},
        "host_results": truth.host_results,
        "host_failures": dict(truth.host_failures),
        "exit_codes": {(name,): count for name, count in truth.exit_codes.items()},
        "hosts_failing": dict(truth.hosts_failing),
        "since": {_host(host): round(failing.since, 3) for host, failing in truth.failing.items()},
        "consecutive": {_host(host): failing.consecutive for host, failing in truth.failing.items()},
    }


def _host(host: Any) -> tuple[str, str, str]:
    return host.bk_cloud_id, host.bk_host_id, host.ip


@contextlib.contextmanager
def daemon(
    folder: Path, simulated: Simulated, *arguments: str, scopes: Iterable[Scope] = (BIZ,), **changes: Any
) -> Iterator[Daemon]:
    """A running daemon that polls `simulated`."""
    with Daemon(folder, configuration(simulated.url, scopes, **changes), *arguments) as running:
        yield running
