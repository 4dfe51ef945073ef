"""The page and the web server without pollers, for sizes no simulator makes: `python -m bench.served SERIES [beat]`.

Filled through the same calls that a poller uses. SIGUSR1 changes every value, after which a gzip scrape compresses
everything again. With `beat` the page ends with the longest stall of the event loop since the scrape before, in seconds
of CPU.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time

from bench import series
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Exposition
from exporter.status import FailureFilter, Failures, Status
from exporter.web.server import Backend, WebServer, listen

BEAT = 0.001
STALL = "bench_stall_seconds"


async def run(count: int, beat: bool) -> None:
    page = series.filled(count)
    worst, generation = 0.0, 0

    async def measure() -> None:
        nonlocal worst
        while True:
            used = time.process_time()
            await asyncio.sleep(BEAT)
            worst = max(worst, time.process_time() - used)

    def exposition(form: Format, names: frozenset[str] | None, gzip: bool) -> Exposition:
        nonlocal worst
        extra = f"{STALL} {worst!r}\n".encode() if beat else b""
        worst = 0.0
        return page.exposition(form, names, extra, gzip)

    def change() -> None:
        nonlocal generation
        generation += 1
        for owner in range(max(1, count // series.PER_SCOPE)):
            series.show(page, owner, series.values(owner, generation))
        print("changed", flush=True)

    async def reload() -> list[str]:
        return []

    async def failures(wanted: FailureFilter) -> Failures:
        return Failures((), ())

    def status() -> Status:
        raise NotImplementedError

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, change)
    sockets = listen(["127.0.0.1:0"])
    beating = asyncio.create_task(measure()) if beat else None
    gc.collect()
    gc.freeze()
    backend = Backend(exposition=exposition, status=status, failures=failures, ready=lambda: True, reload=reload)
    print(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", flush=True)
    await WebServer(backend).run(sockets)
    assert beating is None or beating.done()


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]), "beat" in sys.argv))
