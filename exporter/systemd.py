"""Two protocols of systemd: state notification (sd_notify, with the watchdog) and socket activation."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping

from exporter.errors import ConfigError, Problem

FIRST_SOCKET = 3


def notify(*lines: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send lines such as `READY=1` to the service manager. False when there is none or it cannot be reached."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError:
        return False
    return True


def watchdog_interval(environ: Mapping[str, str] = os.environ) -> float | None:
    """Seconds between two `WATCHDOG=1`: half of WatchdogSec. None when it is not set for this process."""
    try:
        microseconds = int(environ.get("WATCHDOG_USEC", "0"))
        mine = int(environ.get("WATCHDOG_PID", str(os.getpid()))) == os.getpid()
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 and mine else None


async def feed_watchdog(environ: Mapping[str, str] = os.environ) -> None:
    """Send `WATCHDOG=1` at half of WatchdogSec as long as the event loop runs. Returns at once without a watchdog."""
    interval = watchdog_interval(environ)
    while interval is not None:
        notify("WATCHDOG=1", environ=environ)
        await asyncio.sleep(interval)


def sockets(environ: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening sockets that a socket unit passed to this process. Raises ConfigError when there are none."""
    try:
        mine = int(environ.get("LISTEN_PID", "0")) == os.getpid()
        count = int(environ.get("LISTEN_FDS", "0")) if mine else 0
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError([Problem("--web.systemd-socket", 0, 0, "", "systemd passed no socket (LISTEN_FDS)")])
    passed = [socket.socket(fileno=fd) for fd in range(FIRST_SOCKET, FIRST_SOCKET + count)]
    for one in passed:
        one.set_inheritable(False)
    return passed
