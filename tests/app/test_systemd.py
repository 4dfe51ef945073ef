"""The unit files are sound and tight, and the daemon keeps the promises that they make to systemd."""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from exporter import systemd
from tests.support.components import LOOPBACK, eventually, free_port, http, require
from tests.support.paths import ROOT
from tests.support.process import NotifySocket

UNITS = ROOT / "systemd"
COMMAND = pathlib.Path(sys.executable).with_name("blueking-exporter")
CONFIG = """
blueking:
  job: {url: "http://127.0.0.1:9/api/bk-job/prod"}
  auth: {app_code: app, app_secret_file: "${CREDENTIALS_DIRECTORY}/app_secret", username: admin}
scopes: [{bk_scope_type: biz, bk_scope_id: 2}]
"""
# As systemd does: the socket becomes descriptor 3, and LISTEN_PID names the very process that is to take it.
PASS_SOCKET = """
import os, sys
from tests.support.paths import ROOT
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


def verify(root: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """What systemd says of the units below `root`, where their commands exist."""
    units = root / "etc/systemd/system"
    if not units.exists():
        shutil.copytree(UNITS, units, ignore=shutil.ignore_patterns("etc", "*.md"))
    for command in ("opt/blueking-exporter/bin/blueking-exporter", "bin/kill"):
        (root / command).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("/bin/true", root / command)
    argv = [require("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", f"--root={root}"]
    argv += ["blueking-exporter.service", "blueking-exporter.socket"]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.mark.component
def test_units_verify_without_a_message(tmp_path: pathlib.Path) -> None:
    """systemd accepts the service, its socket and the drop-in without a message."""
    result = verify(tmp_path)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.component
def test_verify_would_notice_a_misspelt_key(tmp_path: pathlib.Path) -> None:
    """The silence of the other test means something: a misspelt key in the drop-in breaks it."""
    verify(tmp_path)
    drop_in = tmp_path / "etc/systemd/system/blueking-exporter.service.d/socket.conf"
    drop_in.write_text(drop_in.read_text() + "Wathdog=1\n")
    assert "Wathdog" in verify(tmp_path).stderr


@pytest.mark.component
def test_exposure_is_at_most_1_5() -> None:
    """The sandbox of the unit is rated 1.5 or better by systemd itself."""
    argv = [require("systemd-analyze"), "security", "--offline=true", "--no-pager", "--threshold=15"]
    result = subprocess.run([*argv, UNITS / "blueking-exporter.service"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    rating = re.search(r"exposure level for blueking-exporter.service: ([0-9.]+)", result.stdout)
    assert rating is not None
    assert float(rating[1]) <= 1.5


def test_example_configuration_is_valid(tmp_path: pathlib.Path) -> None:
    """The configuration shipped for /etc passes `check`, with the secret where the unit puts it."""
    (tmp_path / "app_secret").write_text("s3cr3t\n")
    result = subprocess.run(
        [COMMAND, "check", f"--config.file={UNITS / 'etc/blueking-exporter/config.yaml'}"],
        env=os.environ | {"CREDENTIALS_DIRECTORY": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "s3cr3t" not in result.stdout + result.stderr


class Manager:
    """Plays systemd for one service: notify socket, credentials, state folder, environment of the unit."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self._socket.setblocking(False)
        (folder / "app_secret").write_text("s3cr3t\n")
        (folder / "config.yaml").write_text(CONFIG)
        self.environment = os.environ | {
            "NOTIFY_SOCKET": str(folder / "notify"),
            "CREDENTIALS_DIRECTORY": str(folder),
            "WATCHDOG_USEC": "1000000",
            "BLUEKING_EXPORTER_STATE_URL": f"sqlite:{folder}/state.db",
        }
        self.service: subprocess.Popen[bytes] | None = None

    def start(self, listener: socket.socket | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Start the command of the unit with the variables of the unit and `environment`, and pass it `listener`."""
        argv: list[str | pathlib.Path] = [COMMAND, "run", f"--config.file={self.folder / 'config.yaml'}"]
        if listener is not None:
            argv = [sys.executable, "-c", PASS_SOCKET, str(listener.fileno()), *argv]
        with (self.folder / "log").open("wb") as log:
            self.service = subprocess.Popen(
                argv,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()] if listener is not None else [],
            )
        return self.service

    def expect(self, message: str, seconds: float = 20.0) -> None:
        """Wait for `message` among those that have not been looked at; what came before it is then looked at."""
        end = time.monotonic() + seconds
        while message not in self.messages:
            try:
                self.messages += self._socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                assert self.service is not None
                ended = self.service.poll()
                assert ended is None or message.startswith("STOPPING"), f"ended with {ended}: {self.log()}"
                assert time.monotonic() < end, f"no {message}: {self.messages}\n{self.log()}"
                time.sleep(0.02)
        del self.messages[: self.messages.index(message) + 1]

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def close(self) -> None:
        if self.service is not None and self.service.poll() is None:
            self.service.kill()
            self.service.wait()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: pathlib.Path) -> Iterator[Manager]:
    """A fake systemd manager with an own folder."""
    manager = Manager(tmp_path)
    yield manager
    manager.close()


def test_notify_protocol(manager: Manager) -> None:
    """Ready, watchdog, reload and stop are reported to the manager in the order that Type=notify asks for."""
    service = manager.start(BLUEKING_EXPORTER_WEB_LISTEN_ADDRESS=f"{LOOPBACK}:{free_port()}")
    manager.expect("READY=1")
    manager.expect("WATCHDOG=1")
    manager.expect("WATCHDOG=1")
    service.send_signal(signal.SIGHUP)
    manager.expect("RELOADING=1")
    manager.expect("READY=1")
    service.send_signal(signal.SIGTERM)
    manager.expect("STOPPING=1")
    assert service.wait(10) == 0, manager.log()
    assert "s3cr3t" not in manager.log()


@pytest.mark.looptime
@pytest.mark.parametrize("waits", [0.1, 1.0, 30.0, 600.0])
async def test_the_watchdog_is_fed_at_half_of_its_time(tmp_path: pathlib.Path, waits: float) -> None:
    """WatchdogSec, whatever it is: the first WATCHDOG=1 at once, the next ones half of it apart."""
    with NotifySocket(tmp_path) as notify:
        environ = {"NOTIFY_SOCKET": notify.path, "WATCHDOG_USEC": str(int(waits * 1e6))}
        feeding = asyncio.create_task(systemd.feed_watchdog(environ))
        for fed in range(1, 50):
            await asyncio.sleep(waits / 100)
            assert len(notify.received()) == 1, f"number {fed}"
            await asyncio.sleep(waits / 2 - waits / 100)
        feeding.cancel()


@pytest.mark.looptime
async def test_nothing_is_fed_where_no_watchdog_waits(tmp_path: pathlib.Path) -> None:
    """No WATCHDOG_USEC, or one that is for another process."""
    with NotifySocket(tmp_path) as notify:
        for environ in ({}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "often"}):
            await systemd.feed_watchdog({"NOTIFY_SOCKET": notify.path, **environ})
        assert notify.received() == []


def test_socket_activation(manager: Manager) -> None:
    """With the drop-in's variable the daemon serves on the socket that it was passed and opens none of its own."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        manager.start(listener, LISTEN_FDS="1", BLUEKING_EXPORTER_WEB_SYSTEMD_SOCKET="true")
    manager.expect("READY=1")
    assert eventually(lambda: http(f"http://{LOOPBACK}:{port}/-/healthy")[0]) == 200
