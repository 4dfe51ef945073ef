"""What every group needs: clocks and memory of other processes, HTTP from outside, children that do not outlive us."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

ROOT = Path(__file__).parent.parent
MIB = 2**20
OUT = ROOT / "bench" / "out"
"""Results and what was built, not under version control."""


@dataclass(frozen=True)
class Build:
    """A version of the exporter: its source tree, and a Python with everything that the tree needs."""

    root: Path
    python: str

    @property
    def program(self) -> tuple[str, ...]:
        """`blueking-exporter` as users have it: rich comes with a tool of development only."""
        start = "import runpy, sys; sys.modules['rich'] = None; runpy.run_module('exporter', run_name='__main__')"
        return (self.python, "-c", start)

    def environment(self) -> dict[str, str]:
        """As installed: modules are compiled already, which a checkout may be kept from."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return kept | {"PYTHONPATH": str(self.root), "PYTHONPYCACHEPREFIX": str(OUT / "pycache")}


HERE = Build(ROOT, sys.executable)


class Row(msgspec.Struct, kw_only=True):
    """One line of the table. `ratio` is compared with `target`; `passed` None: measured for information only."""

    target_id: str
    what: str
    value: float
    unit: str
    anchor: float | None = None
    target: float | None = None
    at_least: bool = False
    rounds: int = 1
    low: float | None = None
    high: float | None = None
    skipped: str = ""

    @property
    def measured(self) -> float:
        return self.value if self.anchor is None else self.value / self.anchor if self.anchor else float("inf")

    @property
    def passed(self) -> bool | None:
        if self.target is None or self.skipped:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target


def versus(
    target_id: str, what: str, ours: Sequence[float], anchors: Sequence[float], unit: str, target: float | None
) -> Row:
    """Medians of both, and the spread of the ratio over the rounds, which were interleaved."""
    ratios = [mine / other for mine, other in zip(ours, anchors, strict=True)]
    return Row(
        target_id=target_id,
        what=what,
        value=median(ours),
        anchor=median(anchors),
        unit=unit,
        target=target,
        rounds=len(ours),
        low=min(ratios),
        high=max(ratios),
    )


def skipped(target_id: str, what: str, reason: str) -> Row:
    return Row(target_id=target_id, what=what, value=0.0, unit="", skipped=reason)


def cpu_of(pid: int) -> float:
    """CPU seconds of all threads of another process."""
    return time.clock_gettime(((~pid) << 3) | 2)


def memory_of(pid: int, key: str = "VmRSS") -> float:
    """`VmRSS` or `VmHWM`, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak(pid: int) -> None:
    """Let `VmHWM` begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Got(msgspec.Struct):
    """An answer; times in seconds since the request was sent."""

    status: int
    first: float
    last: float
    size: int
    body: bytes = b""


def get(url: str, headers: Mapping[str, str] | None = None, *, keep: bool = False, timeout: float = 120) -> Got:
    """GET over a connection of its own, read as fast as it comes."""
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.rpartition(":")
    lines = "".join(f"{key}: {value}\r\n" for key, value in (headers or {}).items())
    kept = bytearray()
    with socket.create_connection((name, int(port)), timeout) as client:
        began = time.perf_counter()
        client.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{lines}\r\n".encode())
        buffer = bytearray(MIB)
        count = client.recv_into(buffer)
        first = time.perf_counter() - began
        head = bytes(buffer[:count])
        size = count
        while count:
            if keep:
                kept += buffer[:count]
            count = client.recv_into(buffer)
            size += count
        last = time.perf_counter() - began
    top, _, _ = head.partition(b"\r\n\r\n")
    return Got(int(head.split(b" ", 2)[1]), first, last, size - len(top) - 4, bytes(kept[len(top) + 4 :]))


def value(address: str, name: str) -> float:
    """The sum of all series of a metric on the page of a daemon."""
    page = get(f"{address}/metrics?name[]={name}", keep=True).body.decode()
    return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)))


def eventually(condition: Callable[[], Any], seconds: float = 60, pause: float = 0.02) -> Any:
    """The first truthy value of `condition`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(pause)
    return value


def output(*command: str, build: Build = HERE) -> str:
    """What a command prints that runs to its end."""
    run = subprocess.run(command, cwd=build.root, env=build.environment(), capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {run.returncode}: {run.stderr}")
    return run.stdout


@contextlib.contextmanager
def child(
    *command: str, core: int | None = None, log: Path | None = None, build: Build = HERE, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the context. `core`: the only one it may use."""
    pinned = ["taskset", "-c", str(core), *command] if core is not None else list(command)
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(log.open("w")) if log else None
        process = subprocess.Popen(
            pinned,
            cwd=build.root,
            stdin=subprocess.DEVNULL,
            stdout=options.pop("stdout", sink),
            stderr=sink,
            text=True,
            env={**build.environment(), **options.pop("env", {})},
            **options,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()


@contextlib.contextmanager
def server(*command: str, core: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A child that says its URL on its first line."""
    with child(*command, core=core, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"{command} ended with {process.wait()}")
        yield process, url


@contextlib.contextmanager
def daemon(
    config: Mapping[str, Any], folder: Path, core: int | None = None, *, wait: bool = True, build: Build = HERE
) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """`blueking-exporter run` on a free port: the process, its address and its log."""
    file, log = folder / "config.yaml", folder / "daemon.log"
    file.write_text(json.dumps({"server": {"listen_address": ["127.0.0.1:0"]}, **config}))
    command = (*build.program, "run", f"--config.file={file}", "--log.format=json")
    with child(*command, core=core, log=log, build=build) as process:

        def address() -> str:
            for line in log.read_text().splitlines():
                if '"started"' in line and (found := re.search(r"http://[\w.:]+", line)):
                    return found[0]
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-2000:])
            return ""

        yield process, eventually(address, 60) if wait else "", log


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="blueking-exporter-bench-") as folder:
        yield Path(folder)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def python(module: str, *arguments: str, build: Build = HERE) -> tuple[str, ...]:
    return (build.python, "-m", module, *arguments)
