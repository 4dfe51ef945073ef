"""HTTP and names over real sockets: large headers, name servers that fail, and addresses that change."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from exporter import log
from exporter.blueking.client import Client
from exporter.blueking.transport import HttpTransport
from exporter.clock import Clock
from tests.blueking.test_client import ask, refusal
from tests.support.upstream import Recorder, Upstream, client, config, raw, reply, sends

NAME = "blueking.test"
Found = list[tuple[socket.AddressFamily, Any, int, Any, tuple[Any, ...]]]


# ---- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [9_000, 20_000, 60_000, 65_000])
async def test_F71_large_headers_change_nothing(size: int) -> None:
    """A good answer is read, and a 403 that carries a whole permission request is `permission`."""
    async with Upstream(reply(X_Apply=size * "x"), reply(b"", 403, X_Apply=size * "x")) as upstream, client() as asking:
        assert await ask(asking, upstream.url) == 0
        assert (await refusal(asking, upstream.url)).reason == "permission"


async def test_F71_many_headers_change_nothing() -> None:
    """64 KiB in a thousand headers."""
    answer = reply()
    answer.headers.update({f"X-{number:04d}": 55 * "y" for number in range(1000)})
    async with Upstream(answer) as upstream, client() as asking:
        assert await ask(asking, upstream.url) == 0


@pytest.mark.parametrize("header", [b"X: " + 70_000 * b"y", b"\r\n".join(b"X: y" for _ in range(3000))])
async def test_F71_headers_have_a_bound(header: bytes) -> None:
    """What is larger is no answer; it is not read to its end."""
    async with raw(sends(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n\r\n")) as url, client() as asking:
        assert (await refusal(asking, url)).reason == "decode"


# ---- names -----------------------------------------------------------------------------------------------------------


def v4(address: str, port: int) -> Found:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]


def v6(address: str, port: int) -> Found:
    return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))]


@contextlib.asynccontextmanager
async def asking_by_name(look_up: Callable[..., Found], **changes: Any) -> AsyncIterator[Client]:
    """A client that looks names up with `look_up(host, port)`, and anew after 100 ms."""
    settings = config(**changes)

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> Found:
        assert host == NAME
        return look_up(port)

    transport = HttpTransport(settings, look_up=getaddrinfo, dns_ttl=0.1)
    async with Client(settings, Clock(), Recorder(), log.get(), transport) as asking:
        yield asking


def named(url: str) -> str:
    return f"http://{NAME}:{url.rpartition(':')[2]}"


async def test_F22_a_name_that_does_not_exist_is_connect() -> None:
    """The text tells what the resolver said, and the call is tried again."""

    def fails(port: int) -> Found:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with asking_by_name(fails) as asking:
        error = await refusal(asking, f"http://{NAME}:81")
    assert error.reason == "connect"
    assert str(error) == f"cannot connect to {NAME}:81: Name or service not known"


async def test_F22_a_silent_resolver_is_a_timeout_and_one_thread() -> None:
    """However many requests wait for the name, and after they have given up."""
    answer = threading.Event()
    looked_up: list[int] = []

    def silent(port: int) -> Found:
        looked_up.append(port)
        answer.wait(30)
        return v4("127.0.0.1", port)

    async with Upstream() as upstream, asking_by_name(silent, request_timeout=0.2) as asking:
        errors = await asyncio.gather(*(refusal(asking, named(upstream.url), 0.3) for _ in range(6)))
        assert {error.reason for error in errors} == {"timeout"}
        assert len(looked_up) == 1
        answer.set()
        assert await ask(asking, named(upstream.url)) == 0


async def test_F22_ipv6_only() -> None:
    """A name with nothing but an IPv6 address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"data":{"job_instance_list":[]}}'
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    async with await asyncio.start_server(serve, "::1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with asking_by_name(lambda port: v6("::1", port)) as asking:
            assert await ask(asking, f"http://{NAME}:{port}") == 0


async def test_F22_happy_eyeballs() -> None:
    """An address that never answers costs a quarter of a second, not the request."""
    # 192.0.2.1 is reserved for documentation: packets to it are dropped, or refused at once where there is no network.
    async with (
        Upstream() as upstream,
        asking_by_name(lambda port: v4("192.0.2.1", port) + v4("127.0.0.1", port)) as asking,
    ):
        assert await ask(asking, named(upstream.url)) == 0


async def test_F22_an_address_that_changes_is_looked_up_again() -> None:
    """The platform moved: what is asked after the time to live goes to the new address."""
    where = ["127.0.0.1"]
    async with (
        Upstream(reply(Connection="close")) as upstream,
        asking_by_name(lambda port: v4(where[0], port), request_timeout=0.3) as asking,
    ):
        assert await ask(asking, named(upstream.url)) == 0
        where[0] = "127.0.0.2"
        await asyncio.sleep(0.2)
        assert (await refusal(asking, named(upstream.url))).reason == "connect"
        where[0] = "127.0.0.1"
        await asyncio.sleep(0.2)
        assert await ask(asking, named(upstream.url)) == 0
