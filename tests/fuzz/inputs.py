"""Fuzz targets for what people and clients give: configuration, web configuration, raw HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.config.load import load
from exporter.config.web_file import load_web
from exporter.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.web import Running, running


@contextlib.contextmanager
def _file(name: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="blueking-exporter-fuzz-") as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def configuration(data: bytes) -> None:
    """Any text is a configuration, or all that is wrong with it, each with a place. Half of it is a scope file."""
    main, _, scopes = data.partition(b"\n--- scope file ---\n")
    with _file("config.yaml", main) as path:
        (path.parent / "scopes.yaml").write_bytes(scopes)
        try:
            load(path, environ={"HOME": "/", "EMPTY": ""})
        except ConfigError as error:
            _check(error)


def web_configuration(data: bytes) -> None:
    """The same for the web configuration file."""
    with _file("web.yaml", data) as path:
        try:
            load_web(path)
        except ConfigError as error:
            _check(error)


def _check(error: ConfigError) -> None:
    assert error.problems
    for line in str(error).splitlines():
        assert re.search(r"[\w.]+:[1-9]\d*:[1-9]\d*: .", line), line


def configuration_seeds() -> list[bytes]:
    example = (ROOT / "config.example.yaml").read_bytes()
    scopes = b'- {bk_scope_type: biz, bk_scope_id: "7", name: seven}\n'
    return [
        example,
        example + b'\nscope_files: ["scopes.yaml"]\n--- scope file ---\n' + scopes,
        *(file.read_bytes() for file in sorted((ROOT / "tests/config/broken").glob("*.yaml"))),
    ]


def web_configuration_seeds() -> list[bytes]:
    return [
        b"basic_auth_users:\n  admin: $2y$10$4nQUxXGWL1zmqcqGWnT4ZuZf6p3C1B3nGzkF2dWq3PpJcX5u3o6Wy\n",
        b"tls_server_config:\n  cert_file: a.pem\n  key_file: b.pem\n  min_version: TLS12\n",
        b"tls_server_config: {cert: x, cipher_suites: [TLS_AES_128_GCM_SHA256], curve_preferences: [CurveP256]}\n",
        b"http_server_config:\n  http2: false\n  headers:\n    X-Frame-Options: deny\n",
        b"rate_limit:\n  interval: 1s\n  burst: 5\n",
    ]


SILENCE = 0.02
"""Seconds."""


class _Server:
    """A web server in a loop of its own, for as long as the process runs."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._note)
        self.unhandled: list[dict[str, Any]] = []
        self._context = running()
        self.run: Running = self.loop.run_until_complete(self._context.__aenter__())

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.unhandled.append(context)

    async def send(self, data: bytes) -> bytes:
        """What comes back. Nothing more is sent once the server is silent: it then waits for us, or has closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.run.port)
        answer = b""
        try:
            writer.write(data)
            with contextlib.suppress(TimeoutError):
                while more := await asyncio.wait_for(reader.read(1 << 16), SILENCE):
                    answer += more
            writer.write_eof()
            async with asyncio.timeout(30):
                return answer + await reader.read()
        except ConnectionError:
            return answer
        finally:
            writer.close()


_server: _Server | None = None


def http(data: bytes) -> None:
    """Any bytes on a connection get a response that is no 500, or none, and the next client is served."""
    global _server
    _server = _server or _Server()
    for sent in (data, b"GET /-/healthy HTTP/1.0\r\n\r\n"):
        answer = _server.loop.run_until_complete(_server.send(sent))
        assert not _server.unhandled, _server.unhandled
        assert answer == b"" or re.match(rb"HTTP/\d\.\d [1-5]\d\d ", answer), answer[:200]
        assert b" 500 " not in answer.partition(b"\r\n")[0], answer[:200]
    assert answer.startswith(b"HTTP/1.0 200"), answer[:200]


def http_seeds() -> list[bytes]:
    host = b"Host: test\r\n"
    return [
        b"GET /metrics HTTP/1.1\r\n"
        + host
        + b"Accept: application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1\r\n\r\n",
        b"GET /metrics?name[]=up&name%5B%5D=b HTTP/1.1\r\n" + host + b"Accept-Encoding: gzip;q=0.5\r\n\r\n",
        b"HEAD / HTTP/1.1\r\n"
        + host
        + b"Accept-Language: zh-CN,en;q=0.5\r\n\r\nGET /api/v1/status HTTP/1.1\r\n"
        + host
        + b"\r\n",
        b"POST /-/reload HTTP/1.1\r\n"
        + host
        + b"Origin: null\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"GET /api/v1/failures?bk_scope_type=biz&bk_scope_id=2 HTTP/1.1\r\n"
        + host
        + b"Authorization: Basic YTpi\r\n\r\n",
        b"GET /failures?page=2&text=%ff&code=104&collector=job HTTP/1.1\r\n" + host + b"Content-Length: 3\r\n\r\nabc",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
