"""Discovery: businesses and business sets of CMDB become scopes. They are removed only if CMDB no longer lists them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from exporter.blueking.cmdb import NamedScope
from exporter.config.schema import Discovery, ScopeChoice
from exporter.discovery import DiscoveryState
from exporter.model import Scope
from exporter.simulator.cmdb_api import CmdbWorld
from exporter.simulator.faults import Fault
from exporter.simulator.world import StepScript, target
from tests.support.components import free_port
from tests.support.daemon import BIZ, COLLECTOR, Daemon, Metrics, daemon
from tests.support.process import Simulated, command, configuration

pytestmark = pytest.mark.looptime

SHOP, GAME, SET = Scope("biz", "3"), Scope("biz", "4"), Scope("biz_set", "9001")
MINUTE = 60.0
ROUND = 10 * MINUTE


@asynccontextmanager
async def discovering(
    folder: Path, discovery: Mapping[str, Any] | None = None, *, esb: bool = False, **top: Any
) -> AsyncIterator[tuple[Daemon, CmdbWorld]]:
    """A daemon that finds the businesses 2 (configured too), 3 and 4 and the set 9001; not started."""
    top = {"job": {"interval": "2m"}, **top}
    async with daemon(folder, scopes=(BIZ, SHOP, GAME, SET), **top) as one:
        world = CmdbWorld({2: "Demo", 3: "Shop [eu]", 4: "Game"}, {9001: "All games"})
        one.platform.cmdb = world
        one.platform.trusts_usernames = True  # of an exempted application, as the ESB wants it
        url = one.file.read_text(encoding="utf-8").split("url: ")[1].split("/api/")[0].strip()
        settings = one._settings
        platforms = settings["blueking"] | {
            "cmdb": {"url": url if esb else f"{url}/api/bk-cmdb/prod", "api": "esb" if esb else "gateway"}
        }
        one.change(
            blueking=platforms,
            scopes=[{"bk_scope_type": "biz", "bk_scope_id": 2, "name": "As configured"}],
            discovery={"enabled": True, **(discovery or {})},
        )
        yield one, world


def scopes(metrics: Metrics) -> dict[str, str]:
    """The scopes on the page and their names."""
    return {
        f"{labels['bk_scope_type']}/{labels['bk_scope_id']}": labels["name"]
        for (name, pairs), _ in metrics.samples.items()
        if name == "blueking_scope_info" and (labels := dict(pairs))
    }


def about_discovery(metrics: Metrics) -> dict[tuple[str, ...], float]:
    return {
        (name.removeprefix("blueking_exporter_discovery_"), *dict(pairs).values()): value
        for (name, pairs), value in metrics.samples.items()
        if name.startswith("blueking_exporter_discovery_") and not name.endswith("_created")
    }


async def rounds(one: Daemon, number: int = 1) -> Metrics:
    """The page after so many queries of CMDB."""
    before = len(one.calls(api="search_business"))
    await asyncio.sleep(number * ROUND)
    await asyncio.sleep(2)
    assert len(one.calls(api="search_business")) - before >= number
    return await one.metrics()


@pytest.mark.parametrize("esb", [False, True], ids=["gateway", "esb"])
async def test_businesses_of_cmdb_are_watched_and_configured_scopes_win(tmp_path: Path, esb: bool) -> None:
    """A scope that is found begins with a baseline; only those beside the configured ones are counted as found."""
    async with discovering(tmp_path, {"biz_set": {"include": ["*"]}}, esb=esb) as (one, _):
        one.world.start(SHOP, steps=[StepScript(duration=0, results={target(1): 9})])
        await one.start()
        metrics = await one.poll(2)
        assert scopes(metrics) == {
            "biz/2": "As configured", "biz/3": "Shop [eu]", "biz/4": "Game", "biz_set/9001": "All games"
        }  # fmt: skip
        assert metrics.total("blueking_job_executions_finished_total", bk_scope_id="3") == 0
        found = about_discovery(metrics)
        assert (found["scopes", "biz"], found["scopes", "biz_set"]) == (2, 1)
        assert found["last_success_timestamp_seconds",] == pytest.approx(one.now(), abs=5 * MINUTE)
        one.world.start(SHOP, steps=[StepScript(duration=0, results={target(1): 9})])
        assert (await one.poll(2)).total("blueking_job_executions_finished_total", bk_scope_id="3") == 1


async def test_only_complete_lists_retire_a_scope(tmp_path: Path) -> None:
    """An error and an empty list retire nothing; the third complete list without the scope does."""
    async with discovering(tmp_path) as (one, world):
        await one.start()
        await one.poll(2)
        world.visible = set()
        assert "biz/4" in scopes(await rounds(one, 4))
        world.visible, world.iam_fails = None, True
        metrics = await rounds(one, 4)
        assert "biz/4" in scopes(metrics)
        assert about_discovery(metrics)["errors_total", "api_error"] == 4
        world.iam_fails = False
        world.archived = {4}
        assert "biz/4" in scopes(await rounds(one, 2))
        assert scopes(await rounds(one)) == {"biz/2": "As configured", "biz/3": "Shop [eu]"}
        world.archived = set()
        assert "biz/4" in scopes(await rounds(one))


async def test_a_start_needs_no_cmdb(tmp_path: Path) -> None:
    """What was found is part of the state, and so is what was counted in it."""
    async with discovering(tmp_path) as (one, _):
        await one.start()
        await one.poll(2)
        one.world.start(GAME, steps=[StepScript(duration=0, results={target(1): 9})])
        await one.poll(2)
        one.platform.faults.add(Fault("http_503", api="search_business"))
        await one.restart(down=5 * MINUTE)
        metrics = await one.poll()
        assert set(scopes(metrics)) == {"biz/2", "biz/3", "biz/4"}
        assert metrics.total("blueking_job_executions_finished_total", bk_scope_id="4") == 1
        assert about_discovery(metrics)["errors_total", "http_5xx"] == 1


@pytest.mark.parametrize(
    ("discovery", "expected"),
    [
        ({"biz": {"include": [4, "Shop [eu]"]}}, {"biz/2", "biz/3", "biz/4"}),
        ({"biz": {"include": ["?ame"]}}, {"biz/2", "biz/4"}),
        ({"biz": {"include": ["*"], "exclude": ["Shop*", "4"]}}, {"biz/2"}),
        ({"biz": {"include": []}, "biz_set": {"include": [9001]}}, {"biz/2", "biz_set/9001"}),
    ],
    ids=["id and exact name", "pattern", "exclude", "sets only"],
)
async def test_include_and_exclude(tmp_path: Path, discovery: dict[str, Any], expected: set[str]) -> None:
    """Ids, names and patterns; in patterns only * and ? are special."""
    async with discovering(tmp_path, discovery) as (one, _):
        await one.start()
        assert set(scopes(await one.poll(2))) == expected
        if discovery["biz"]["include"] == []:
            assert not one.calls(api="search_business")


async def test_found_scopes_take_the_defaults_and_the_overrides_of_discovery(tmp_path: Path) -> None:
    """`collectors` of discovery change found scopes only; a reload changes them at once, without asking CMDB."""
    overrides = {"collectors": {"job": {"interval": "3m"}}}
    async with discovering(tmp_path, overrides, job={"interval": "40s"}) as (one, _):
        await one.start()
        metrics = await one.poll(2)
        assert metrics.own("interval_seconds") == 40
        assert metrics.own("interval_seconds", scope=SHOP) == 180
        asked = len(one.calls(api="search_business"))
        one.change(discovery={"enabled": True, "biz": {"include": ["*"], "exclude": [3]}})
        assert (await one.ask("/-/reload", method="POST"))[0] == 200
        metrics = await one.metrics()
        assert metrics.own("interval_seconds", scope=SHOP) is None
        assert metrics.own("interval_seconds", scope=GAME) == 40
        one.change(discovery={"enabled": False})
        assert (await one.ask("/-/reload", method="POST"))[0] == 200
        metrics = await one.metrics()
        assert set(scopes(metrics)) == {"biz/2"}
        assert about_discovery(metrics) == {}
        assert len(one.calls(api="search_business")) == asked


async def test_sets_are_watched_in_job_only(tmp_path: Path) -> None:
    """NodeMan knows businesses only, so a set that is found has no NodeMan collector."""
    async with discovering(tmp_path, {"biz_set": {"include": ["*"]}}) as (one, _):
        job = one._settings["blueking"]["job"]["url"]
        nodeman = {"url": job.replace("bk-job", "bk-nodeman")}
        one._settings["collectors"]["nodeman_job"] = {"enabled": True}
        one.change(blueking=one._settings["blueking"] | {"nodeman": nodeman})
        await one.start()
        metrics = await one.poll(2)
        assert metrics.own("success", scope=SET) == 1
        assert metrics.get(f"{COLLECTOR}success", scope=SHOP, collector="nodeman_job") == 1
        assert metrics.get(f"{COLLECTOR}interval_seconds", scope=SET, collector="nodeman_job") is None


async def test_many_businesses_are_read_page_by_page(tmp_path: Path) -> None:
    """450 businesses with three calls; wrong totals change nothing."""
    async with discovering(tmp_path, {"biz": {"include": ["4*"]}}) as (one, world):
        world.businesses = {number: f"{number} business" for number in range(2, 452)}
        world.businesses[4] = "Game"
        await one.start()
        metrics = await one.poll(2)
        assert len(one.calls(api="search_business")) == 3
        assert len(scopes(metrics)) == 1 + sum(str(number).startswith("4") for number in range(5, 452))


@given(
    st.lists(
        st.one_of(st.none(), st.frozensets(st.integers(1, 6))),
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_a_scope_is_watched_until_it_was_missing_often_enough(
    answers: list[frozenset[int] | None], retire_after: int
) -> None:
    """Compared with a plain count per business; None is an empty list."""
    discovery = Discovery(enabled=True, biz=ScopeChoice(("*",)), retire_after=retire_after)
    state, missing = DiscoveryState(), dict[int, int]()
    for now, ids in enumerate(answers):
        listed = [NamedScope(Scope("biz", str(id)), f"name {id}") for id in sorted(ids or ())]
        state = state.observe([listed], discovery, float(now))
        if ids:
            missing = {id: 0 if id in ids else count + 1 for id, count in (dict.fromkeys(ids, 0) | missing).items()}
            missing = {id: count for id, count in missing.items() if count < retire_after}
        assert {one.scope.bk_scope_id: one.missing for one in state.found} == {
            str(id): count for id, count in missing.items()
        }


@pytest.mark.looptime(enabled=False)
def test_once_and_probe_find_scopes_too(tmp_path: Path) -> None:
    """`once` polls what CMDB lists; `probe` asks each found scope and names what include does not find."""
    file = tmp_path / "config.yaml"

    def run(name: str) -> subprocess.CompletedProcess[str]:
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return command(name, f"--config.file={file}")

    with Simulated(BIZ, SHOP) as simulated:
        settings = configuration(simulated.url, ())
        settings["blueking"]["cmdb"] = {"url": f"{simulated.url}/api/bk-cmdb/prod"}
        settings["discovery"] = {"enabled": True, "biz": {"include": ["业务*", "no such name", 77]}}
        done = run("once")
        assert done.returncode == 0
        assert 'bk_scope_id="3"' in done.stdout
        done = run("probe")
        assert done.returncode == 0, done.stdout
        assert "ok    discovery: 2 scopes beside the configured ones" in done.stdout
        assert 'warn  discovery.biz.include: CMDB lists nothing that is "no such name"' in done.stdout
        assert 'warn  discovery.biz.include: CMDB lists nothing that is "77"' in done.stdout
        assert "ok    job biz/3:" in done.stdout
        settings["blueking"]["cmdb"]["url"] = f"http://127.0.0.1:{free_port()}/api/bk-cmdb/prod"
        done = run("probe")
        assert done.returncode == 1
        assert "FAIL  discovery: search_business: connect" in done.stdout


def kept(folder: Path) -> set[tuple[str, str]]:
    """Collector and scope id of the states on disk."""
    with contextlib.closing(sqlite3.connect(folder / "state.db")) as db:
        return set(db.execute("SELECT collector, bk_scope_id FROM state"))


async def test_what_was_found_is_kept_like_the_states_of_pollers(tmp_path: Path) -> None:
    """It is not purged however long CMDB does not answer, and written again when the state file was damaged."""
    everything = {("discovery", "0"), ("job", "2"), ("job", "3"), ("job", "4")}
    async with discovering(tmp_path, job={"interval": "3h"}) as (one, world):
        await one.start()
        await one.until(lambda: kept(tmp_path) == everything)
        await one.stop()
        with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as db, db:
            db.execute("UPDATE state SET updated = 0")
        world.iam_fails = True
        await one.start()
        await asyncio.sleep(2 * 3600)
        assert kept(tmp_path) == everything
        with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as db:
            db.execute("PRAGMA wal_checkpoint(RESTART)")
        os.truncate(tmp_path / "state.db", 0)
        await asyncio.sleep(60)
        assert kept(tmp_path) == everything
        await one.restart()
        assert set(scopes(await one.metrics())) == {"biz/2", "biz/3", "biz/4"}
