"""The state of an older build is read, and counting continues where it stopped. See tests/support/history.py."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from exporter.metrics.negotiate import Format
from exporter.simulator.faults import Fault
from exporter.simulator.nodeman_ledger import Collector
from exporter.state.sqlite import SQLiteStore
from tests.support import history
from tests.support.daemon import EPOCH, Daemon, Metrics, daemon
from tests.support.nodeman import failing, failures, finished, watched
from tests.support.process import expected, shown

pytestmark = pytest.mark.looptime(noop_cycles=5)

FIXTURES = Path(__file__).parent
OURS = ("blueking_job_", "blueking_nodeman_", "blueking_exporter_collector_gap", "blueking_exporter_collector_trunc")
KEPT = ("_total", "_created", "_count", "_sum", "_bucket")


def counters(page: Metrics) -> dict[object, float]:
    """The counters and histograms of both platforms, with their times of creation."""
    ours = (
        "blueking_job_",
        "blueking_nodeman_",
        "blueking_exporter_collector_gap",
        "blueking_exporter_collector_trunc",
    )
    return {key: value for key, value in page.samples.items() if key[0].startswith(ours) and key[0].endswith(KEPT)}


async def resume(exporter: Daemon, kind: str) -> None:
    """Start this build on the old state, and hold its first page to the last page of the older build."""
    await asyncio.sleep(history.END + 60)
    shutil.copy(FIXTURES / "782d593.db", exporter.directory / "state.db")
    old = Metrics((FIXTURES / f"782d593-{kind}.txt").read_text(), Format.OPENMETRICS)
    exporter.platform.faults.add(Fault("http_500"))
    await exporter.start()
    page = await exporter.metrics(openmetrics=True)
    before, after = counters(old), counters(page)
    assert len(before) > 50
    assert {key: value for key, value in after.items() if value} == {k: v for k, v in before.items() if v}
    assert page.total("blueking_exporter_state_resets_total") == 0
    exporter.platform.faults.clear()


async def test_the_state_of_build_782d593_is_continued_job(tmp_path: Path) -> None:
    """Counters, tracked executions, failing hosts and watched names of JOB, then everything against the ledger."""
    async with daemon(tmp_path, scopes=(history.SCOPE,), job=history.JOB) as exporter:
        history.plan_job(exporter.world)
        await resume(exporter, "job")
        await asyncio.sleep(history.LATER - exporter.loop.time())
        page = await exporter.poll()
        since = int((EPOCH + history.BEGIN) * 1000)
        assert shown(page.samples) == expected(exporter.world.truth(history.SCOPE, since))
        assert page.own("gap_seconds_total") == page.own("truncated_total") == 0


async def test_a_state_of_an_older_build_is_marked_as_newer(tmp_path: Path) -> None:
    """Older builds refuse it then: they would count the ended executions again, for they do not read their place."""
    path = tmp_path / "state.db"
    shutil.copy(FIXTURES / "782d593.db", path)

    def version() -> int:
        with contextlib.closing(sqlite3.connect(path)) as db:
            found: int = db.execute("PRAGMA user_version").fetchone()[0]
            return found

    assert version() == 1
    store = SQLiteStore(path)
    await store.open(read_only=True)
    await store.close()
    assert version() == 1
    await store.open()
    await store.close()
    assert version() == 2


async def test_the_state_of_build_782d593_is_continued_nodeman(tmp_path: Path) -> None:
    """The same for jobs, a subscription and a task of NodeMan."""
    async with watched(tmp_path, scopes=(history.SCOPE,), **history.NODEMAN) as exporter:
        history.plan_nodeman(exporter.nodeman)
        await resume(exporter, "nodeman")
        await asyncio.sleep(history.LATER - exporter.loop.time())
        page = await exporter.poll()
        since, ledger = EPOCH + history.BEGIN, exporter.ledger
        assert finished(page) == ledger.jobs_finished(2, since)
        for collector in get_args(Collector):
            only = {11} if collector == "nodeman_subscription" else None
            got = {key: n for key, n in failures(page).items() if key[0] == collector}
            assert got == ledger.host_failures(2, collector, since, only=only)
            found = ledger.hosts_failing(2, collector, only=only).values()
            truth = Counter((collector, f.newest.job_type, f.newest.step, f.newest.code) for f in found)
            assert failing(page, collector=collector) == truth
