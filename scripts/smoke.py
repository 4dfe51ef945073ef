"""Start `blueking-exporter demo` as a user would, wait until ready, read its page, stop it; exit 0 if all held."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

READY_WITHIN = 90.0
STOPPED_WITHIN = 15.0
COUNTER = "blueking_job_executions_finished_total{"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body.decode()


def wait_for(what: str, url: str, fits: str, daemon: subprocess.Popen[bytes], seconds: float) -> str:
    end = time.monotonic() + seconds
    while True:
        if daemon.poll() is not None:
            sys.exit(f"smoke: the demo ended by itself with {daemon.returncode}")
        try:
            body = get(url)
            if fits in body:
                return body
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() > end:
            sys.exit(f"smoke: no {what} within {seconds:.0f} s")
        time.sleep(0.2)


def main() -> None:
    command = pathlib.Path(sys.executable).with_name("blueking-exporter")
    address = f"127.0.0.1:{free_port()}"
    daemon = subprocess.Popen([command, "demo", f"--web.listen-address={address}"], env=os.environ | {"NO_COLOR": "1"})
    try:
        wait_for("readiness", f"http://{address}/-/ready", "", daemon, READY_WITHIN)
        page = wait_for("JOB counter", f"http://{address}/metrics", COUNTER, daemon, READY_WITHIN)
        daemon.send_signal(signal.SIGTERM)
        code = daemon.wait(STOPPED_WITHIN)
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()
    if code != 0:
        sys.exit(f"smoke: exit code {code} after SIGTERM")
    print(f"smoke: ready, {len(page.splitlines())} lines of metrics, stopped with 0")


if __name__ == "__main__":
    main()
