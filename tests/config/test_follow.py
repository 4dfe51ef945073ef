"""Scope files while the daemon runs: half-written ones, ones that are no files (F56), and when a change is taken up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from exporter.model import Scope
from tests.support.daemon import Daemon as VirtualDaemon
from tests.support.daemon import daemon as virtual_daemon
from tests.support.process import Daemon, Simulated, configuration

SCOPES = [Scope("biz", str(number)) for number in range(2, 6)]
LINES = [f"- {{bk_scope_type: biz, bk_scope_id: {scope.bk_scope_id}}}\n" for scope in SCOPES]


async def shown(exporter: VirtualDaemon) -> list[str]:
    """The scopes on the page."""
    page = await exporter.metrics()
    return sorted(dict(labels)["bk_scope_id"] for name, labels in page.samples if name == "blueking_scope_info")


async def reload_metric(exporter: VirtualDaemon) -> float:
    return (await exporter.metrics()).total("blueking_exporter_config_last_reload_successful")


ALL = [scope.bk_scope_id for scope in SCOPES]


@contextlib.asynccontextmanager
async def following(folder: Path, text: str) -> AsyncIterator[tuple[VirtualDaemon, Path]]:
    """An exporter in virtual time whose scopes all stand in one file."""
    async with virtual_daemon(folder, scopes=SCOPES) as exporter:
        file = folder / "a.scopes"
        file.write_text(text)
        exporter.change(scopes=[], scope_files=["*.scopes"])
        await exporter.start()
        yield exporter, file


@pytest.mark.looptime
@pytest.mark.parametrize("cut", [0, len(LINES[0]), len(LINES[0]) + 20])
@pytest.mark.parametrize("way", ["in place", "removed first"])
async def test_F56_a_file_that_is_written_in_two_halves_drops_no_scope(tmp_path: Path, cut: int, way: str) -> None:
    """Whether or not the first half is a list by itself: the second one has some seconds to come."""
    text = "".join(LINES)
    async with following(tmp_path, text) as (exporter, file):
        assert await shown(exporter) == ALL
        for pause in (0.5, 1.5, 2.5):
            if way == "removed first":
                file.unlink()
                await asyncio.sleep(0.2)
            file.write_text(text[:cut])
            await asyncio.sleep(pause)
            file.write_text(text)
            for _ in range(20):
                await asyncio.sleep(1)
                assert await shown(exporter) == ALL
        assert await reload_metric(exporter) == 1


@pytest.mark.looptime
async def test_F56_a_broken_file_keeps_the_scopes_and_shows_in_the_metric(tmp_path: Path) -> None:
    """However long it stays broken; once it is whole again it is taken up."""
    async with following(tmp_path, "".join(LINES)) as (exporter, file):
        file.write_text(LINES[0] + "- {bk_scope_type: biz, bk_sco")
        await asyncio.sleep(60)
        assert await shown(exporter) == ALL
        assert await reload_metric(exporter) == 0
        file.write_text("".join(LINES[:2]))
        await asyncio.sleep(10)
        assert await shown(exporter) == ALL[:2]
        assert await reload_metric(exporter) == 1


@pytest.mark.looptime
async def test_F56_a_reload_refuses_a_file_that_is_being_written(tmp_path: Path) -> None:
    """500 names the file, and no scope leaves; the next reload takes the whole file at once."""
    text = "".join(LINES)
    async with following(tmp_path, text) as (exporter, file):
        file.write_text(LINES[0])
        reload = asyncio.create_task(exporter.ask("/-/reload", method="POST"))
        await asyncio.sleep(0.5)
        file.write_text(LINES[0] + LINES[1])
        status, body = await reload
        assert status == 500
        assert f"{file}:1:1: is being written: it has changed since it was read" in body.decode()
        assert await shown(exporter) == ALL
        file.write_text(LINES[0] + LINES[1] + "- {bk_scope_type: biz, bk_scope_i")
        status, body = await exporter.ask("/-/reload", method="POST")
        assert (status, f"{file}:4:1: YAML syntax" in body.decode()) == (500, True)
        assert await shown(exporter) == ALL
        file.write_text(LINES[0] + LINES[1])
        assert (await exporter.ask("/-/reload", method="POST"))[0] == 200
        assert await shown(exporter) == ALL[:2]


@pytest.mark.looptime
async def test_a_change_is_taken_up_within_ten_seconds(tmp_path: Path) -> None:
    """Added, changed and removed scope files, without a reload."""
    async with following(tmp_path, LINES[0]) as (exporter, file):
        assert await shown(exporter) == ["2"]
        other = tmp_path / "b.scopes"
        for text, expected in ((LINES[1], ["2", "3"]), (LINES[1] + LINES[2], ["2", "3", "4"])):
            other.write_text(text)
            await asyncio.sleep(9)
            assert await shown(exporter) == expected
        file.unlink()
        await asyncio.sleep(9)
        assert await shown(exporter) == ["3", "4"]


@pytest.fixture
def simulated() -> Iterator[Simulated]:
    with Simulated(*SCOPES) as running:
        yield running


def pipe(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("plant", [pipe, directory, device])
@pytest.mark.parametrize("what", ["scope file", "configuration", "secret"])
def test_F56_what_is_no_file_is_an_error_and_never_waited_for(
    tmp_path: Path, simulated: Simulated, plant: Callable[[Path], None], what: str
) -> None:
    """A reload answers with the place, the scopes stay, and SIGTERM ends the daemon."""
    scopes, secret = tmp_path / "a.scopes", tmp_path / "secret"
    scopes.write_text("".join(LINES))
    secret.write_text("simulated")
    auth = {"app_secret": None, "app_secret_file": "secret"}
    config = configuration(simulated.url, [], blueking={"auth": auth}, scope_files=["*.scopes"])
    with Daemon(tmp_path, config, "--web.enable-lifecycle") as running:
        running.wait_success()
        file = {"scope file": scopes, "configuration": running.file, "secret": secret}[what]
        file.unlink()
        plant(file)
        status, body = running.get("/-/reload", data=b"")
        assert status == 500
        place = {
            "scope file": "config.yaml:{}:{}: scope_files[0]: ",
            "configuration": "config.yaml:1:1: cannot be read: ",
            "secret": "blueking.auth.app_secret_file: ",
        }[what]
        assert place.partition("{")[0] in body.decode()
        assert "Is a directory" in body.decode() or "is no regular file" in body.decode()
        names = {dict(labels).get("bk_scope_id") for name, labels in running.metrics() if name == "blueking_scope_info"}
        assert sorted(str(name) for name in names) == ALL
        running.signal(signal.SIGTERM)
        assert running.exit_code(5) == 0
