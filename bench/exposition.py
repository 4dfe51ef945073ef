"""T1 to T6 and T9: what a scrape costs, beside client_golang and prometheus_client."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from subprocess import Popen

from bench import anchors
from bench.measure import (
    HERE,
    MIB,
    Row,
    child,
    cpu_of,
    eventually,
    forget_peak,
    free_port,
    get,
    memory_of,
    output,
    python,
    scratch,
    server,
    skipped,
    versus,
)
from bench.served import STALL

GZIP = {"Accept-Encoding": "gzip"}
Served = tuple[Popen[str], str]


def _cpu(served: Served, headers: dict[str, str] | None = None) -> tuple[float, float]:
    """CPU seconds of the server for one scrape, and the seconds to its first byte."""
    process, url = served
    before = cpu_of(process.pid)
    got = get(f"{url}/metrics", headers)
    if got.status != 200:
        raise RuntimeError(f"HTTP {got.status}")
    time.sleep(0.02)
    return cpu_of(process.pid) - before, got.first


def _change(served: Served) -> None:
    process, _ = served
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)


def scrapes(series: int, rounds: int) -> list[Row]:
    """T1, T2, and at 100k T3 and T4 at 1M."""
    name = f"{series:,} series"
    go, reason = anchors.build("exporter")
    if not go:
        return [skipped(target, name, reason) for target in ("T1", "T2", "T3", "T4")]
    ours: dict[str, list[float]] = {"changed": [], "plain": [], "first": [], "compressing": [], "cached": []}
    theirs: dict[str, list[float]] = {"plain": [], "first": [], "gzip": []}
    with (
        server(*python("bench.served", str(series))) as mine,
        server(go, str(series)) as anchor,
    ):
        idle, anchor_idle = memory_of(mine[0].pid), memory_of(anchor[0].pid)
        for number in range(rounds + 1):
            _change(mine)
            changed = _cpu(mine)
            plain, anchor_plain = _cpu(mine), _cpu(anchor)
            compressing, anchor_gzip = _cpu(mine, GZIP), _cpu(anchor, GZIP)
            cached = _cpu(mine, GZIP)
            if number:  # the first one warms up
                ours["changed"].append(changed[0])
                ours["plain"].append(plain[0])
                ours["first"].append(changed[1])
                ours["compressing"].append(compressing[0])
                ours["cached"].append(cached[0])
                theirs["plain"].append(anchor_plain[0])
                theirs["first"].append(anchor_plain[1])
                theirs["gzip"].append(anchor_gzip[0])
        settled = memory_of(mine[0].pid)
        forget_peak(mine[0].pid)
        get(f"{mine[1]}/metrics")
        growth = memory_of(mine[0].pid, "VmHWM") / settled
    big = series >= 1_000_000

    def ratio(target_id: str, what: str, mine: list[float], others: list[float], target: float | None) -> Row:
        what = f"{name}{what} / client_golang"
        unit = "B" if target_id == "T4" else "s"
        return versus(target_id, what, mine, others, unit, target if series >= 100_000 else None)

    return [
        ratio("T1", ", plain: server CPU", ours["plain"], theirs["plain"], 0.015 if big else 0.02),
        ratio("T1", ", plain, all changed: server CPU", ours["changed"], theirs["plain"], None),
        ratio("T2", ", gzip, all changed: server CPU", ours["compressing"], theirs["gzip"], None if big else 0.05),
        ratio("T2", ", gzip, nothing changed: server CPU", ours["cached"], theirs["gzip"], None if big else 0.005),
        ratio("T3", ": first byte", ours["first"], theirs["first"], None if big else 0.02),
        ratio("T4", ": RSS before a scrape", [idle], [anchor_idle], 0.35 if big else None),
        Row(
            target_id="T4",
            what=f"{name}: peak of a scrape / RSS before",
            value=growth,
            unit="×",
            target=1.1 if big else None,
        ),
    ]


def stall(rounds: int = 7) -> list[Row]:
    """T3: how long a scrape of 100k holds the event loop, beside the time prometheus_client takes to write them."""
    code = (
        "import json, time; from bench.updating import registered; from prometheus_client import generate_latest\n"
        "registry, _ = registered(100_000)\n"
        "def one():\n"
        "    began = time.process_time(); generate_latest(registry); return time.process_time() - began\n"
        f"print(json.dumps([one() for _ in range({rounds})]))"
    )
    printed = output(HERE.python, "-c", code)
    stalls = []
    with server(*python("bench.served", "100000", "beat")) as (_, url):
        get(f"{url}/metrics")
        for _ in range(rounds):
            get(f"{url}/metrics?name[]=none")  # begins anew
            get(f"{url}/metrics")
            time.sleep(0.05)
            text = get(f"{url}/metrics?name[]=none", keep=True).body.decode()
            stalls.append(float(text.split(STALL)[1].split()[0]))
    what = "100,000 series: worst stall of a scrape / generate_latest of prometheus_client"
    return [versus("T3", what, stalls, json.loads(printed), "s", 0.005)]


def slow_readers(readers: int = 20, seconds: float = 8.0) -> list[Row]:
    """T5: memory that each reader costs who takes a 10 MB page at 10 kB/s."""
    with server(*python("bench.served", "110000")) as (process, url):
        size = get(f"{url}/metrics").size
        before = memory_of(process.pid)
        host, port = url.removeprefix("http://").split(":")
        sockets: list[socket.socket] = []
        try:
            for _ in range(readers):
                client = socket.socket()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
                client.connect((host, int(port)))
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                client.settimeout(0.01)
                sockets.append(client)
            peak, end = before, time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.5)
                for client in sockets:
                    try:
                        client.recv(5_000)
                    except TimeoutError:
                        continue
                peak = max(peak, memory_of(process.pid))
        finally:
            for client in sockets:
                client.close()
    what = f"memory per slow reader of a page of {size / 1e6:.1f} MB"
    return [
        Row(target_id="T5", what=what, value=(peak - before) / readers / MIB, unit="MiB", target=1.0, rounds=readers)
    ]


def updates() -> list[Row]:
    """T6: 1 % of 100k series changed until it can be scraped."""
    measured = json.loads(output(*python("bench.updating")))
    ours, theirs = [one[0] for one in measured], [one[1] for one in measured]
    return [versus("T6", "1 % of 100,000 series changed / labels().set of prometheus_client", ours, theirs, "s", 0.25)]


def prometheus(series: int = 100_000, seconds: float = 75) -> list[Row]:
    """T9: `scrape_duration_seconds` of a real Prometheus."""
    what = f"{series:,} series: scrape_duration_seconds / client_golang"
    binary = shutil.which("prometheus")
    go, reason = anchors.build("exporter")
    if binary is None or not go:
        return [skipped("T9", what, reason or "no prometheus here")]
    with (
        scratch() as folder,
        server(*python("bench.served", str(series))) as (_, mine),
        server(go, str(series)) as (_, anchor),
    ):
        jobs = [
            {
                "job_name": name,
                "static_configs": [{"targets": [url.removeprefix("http://")]}],
                # What is measured is the scrape, not the storage.
                "metric_relabel_configs": [{"source_labels": ["__name__"], "regex": "bench_.*", "action": "drop"}],
            }
            for name, url in (("ours", mine), ("client_golang", anchor))
        ]
        file, port = folder / "prometheus.yaml", free_port()
        file.write_text(
            json.dumps({"global": {"scrape_interval": "5s", "scrape_timeout": "5s"}, "scrape_configs": jobs})
        )
        command = (
            binary, f"--config.file={file}", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
        )  # fmt: skip
        with child(*command, log=folder / "prometheus.log"):
            time.sleep(seconds)
            ours, theirs = _durations(port, "ours"), _durations(port, "client_golang")
    rounds = min(len(ours), len(theirs))
    return [versus("T9", what, ours[:rounds], theirs[:rounds], "s", 0.2)]


def _durations(port: int, job: str) -> Sequence[float]:
    query = urllib.parse.urlencode({"query": f'scrape_duration_seconds{{job="{job}"}}[10m]'})

    def ask() -> list[float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=30) as answer:
            found = json.load(answer)["data"]["result"]
        return [float(value) for _, value in found[0]["values"]] if found else []

    return list(eventually(ask, 30, 1))
