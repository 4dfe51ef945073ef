"""TLS towards BlueKing: what is refused and why, and certificates that are exchanged while the daemon runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509

from exporter.blueking.transport import BROKEN_HANDSHAKE, NOT_CONFIRMED
from exporter.config.schema import Tls
from exporter.errors import ConfigError
from tests.blueking.test_client import ask, refusal
from tests.support.certificates import Authority
from tests.support.upstream import EMPTY_PAGE, Peer, client

NAME = "blueking.test"
TLS12: dict[str, Any] = {"maximum_version": ssl.TLSVersion.TLSv1_2}
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(EMPTY_PAGE) + EMPTY_PAGE


class Pki:
    """Two authorities, of which the client trusts `ca`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = Authority(folder)
        self.other = Authority(folder, "other")
        names: list[x509.GeneralName] = [x509.DNSName(NAME)]
        self.server = self.ca.issue("server", names)
        self.expired = self.ca.issue("expired", names, end=-1.0)
        self.future = self.ca.issue("future", names, begin=1.0)
        self.foreign = self.other.issue("foreign", names)
        self.client = self.ca.issue("client")
        self.expired_client = self.ca.issue("expired-client", end=-1.0)
        self.foreign_client = self.other.issue("foreign-client")

    def context(self, pair: tuple[Path, Path], *, verify: bool = False, ciphers: str = "", **options: Any) -> Any:
        """Of a server. `verify`: it demands a client certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*pair)
        if verify:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca.file)
        if ciphers:
            context.set_ciphers(ciphers)
        for name, value in options.items():
            setattr(context, name, value)
        return context

    def tls(self, pair: tuple[Path, Path] | None = None, **changes: Any) -> Tls:
        """Of the client, which trusts `ca` and expects `NAME`."""
        cert_file, key_file = pair or (None, None)
        tls = Tls(ca_file=self.ca.file, cert_file=cert_file, key_file=key_file, server_name=NAME)
        return msgspec.structs.replace(tls, **changes)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@contextlib.contextmanager
def serving(context: ssl.SSLContext) -> Iterator[str]:
    """A server that sends TLS alerts, as those of C and Go do and asyncio does not; yields its URL."""

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as wrapped:
                    try:
                        wrapped.do_handshake()
                        if wrapped.recv(65536):
                            wrapped.sendall(ANSWER)
                    except OSError:
                        # What the client has sent is read, so that closing sends no RST, which may destroy the alert.
                        socket.socket.recv(wrapped, 65536)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            yield f"https://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


Case = tuple[Callable[[Pki], tuple[ssl.SSLContext, Tls]], str]
"""Both sides, and what the error must tell; "" where the request must succeed."""

HANDSHAKES: dict[str, Case] = {
    "good": (lambda p: (p.context(p.server), p.tls()), ""),
    "good with client certificate": (lambda p: (p.context(p.server, verify=True), p.tls(p.client)), ""),
    "good with TLS 1.2": (lambda p: (p.context(p.server, verify=True, **TLS12), p.tls(p.client)), ""),
    "not verified": (
        lambda p: (p.context(p.foreign), p.tls(ca_file=None, server_name=None, insecure_skip_verify=True)),
        "",
    ),
    "expired": (lambda p: (p.context(p.expired), p.tls()), "certificate has expired"),
    "not yet valid": (lambda p: (p.context(p.future), p.tls()), "certificate is not yet valid"),
    "unknown authority": (lambda p: (p.context(p.foreign), p.tls()), "unable to get local issuer certificate"),
    "system authorities only": (
        lambda p: (p.context(p.server), p.tls(ca_file=None)),
        "unable to get local issuer certificate",
    ),
    "other name": (lambda p: (p.context(p.server), p.tls(server_name="other.test")), "not valid for 'other.test'"),
    "address instead of name": (lambda p: (p.context(p.server), p.tls(server_name=None)), "not valid for '127.0.0.1'"),
    "old version": (
        lambda p: (
            p.context(
                p.server,
                minimum_version=ssl.TLSVersion.TLSv1,
                maximum_version=ssl.TLSVersion.TLSv1_1,
                ciphers="DEFAULT@SECLEVEL=0",
            ),
            p.tls(),
        ),
        "protocol version",
    ),
    "no common cipher": (
        lambda p: (p.context(p.server, ciphers="AES256-SHA256", **TLS12), p.tls()),
        "handshake failure",
    ),
    "no client certificate": (lambda p: (p.context(p.server, verify=True), p.tls()), "certificate"),
    "no client certificate, TLS 1.2": (
        lambda p: (p.context(p.server, verify=True, **TLS12), p.tls()),
        "handshake failure",
    ),
    "foreign client certificate": (lambda p: (p.context(p.server, verify=True), p.tls(p.foreign_client)), "unknown ca"),
    "expired client certificate": (
        lambda p: (p.context(p.server, verify=True), p.tls(p.expired_client)),
        "certificate expired",
    ),
}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("case", HANDSHAKES)
async def test_F23_handshakes_fail_with_the_reason_that_people_need(pki: Pki, case: str) -> None:
    """F71: reason `tls` for version, name, authority and client certificate, in the words of OpenSSL; one request."""
    sides, text = HANDSHAKES[case]
    context, tls = sides(pki)
    with serving(context) as url:
        async with client(tls=tls) as asking:
            if not text:
                assert await ask(asking, url) == 0
                return
            error = await refusal(asking, url)
    assert error.reason == "tls"
    assert text in str(error) or (str(error) == NOT_CONFIRMED and "client" in case)
    assert "object at 0x" not in str(error)


@contextlib.asynccontextmanager
async def peers(peer: Peer, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Every connection is handled by `peer`, after a handshake if there is a `context`."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await peer(reader, writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"\x16\x03\x03\x00\x50\x02")
    await writer.drain()


async def _http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()
    await reader.read()


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        (_close, BROKEN_HANDSHAKE),
        (_reset, BROKEN_HANDSHAKE),
        (_half, BROKEN_HANDSHAKE),
        (_http, "wrong version number"),
    ],
)
async def test_F71_a_handshake_that_breaks_is_tls(pki: Pki, peer: Peer, text: str) -> None:
    """Closed, reset, half an answer, and plain HTTP on the port."""
    async with peers(peer) as url, client(tls=pki.tls()) as asking:
        error = await refusal(asking, url)
    assert error.reason == "tls"
    assert text in str(error)


async def test_F71_asyncio_and_others_send_no_alert_for_a_missing_certificate(pki: Pki) -> None:
    """With TLS 1.3 the connection is then simply closed: the text names both causes."""

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("the handshake was not refused")

    async with peers(never, pki.context(pki.server, verify=True)) as url, client(tls=pki.tls()) as asking:
        error = await refusal(asking, url)
    assert (error.reason, str(error)) == ("tls", NOT_CONFIRMED)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_F01_a_connection_that_breaks_after_the_handshake_is_connect(pki: Pki, version: str) -> None:
    """The server has confirmed the handshake, so TLS is not to blame, and the call is tried again."""
    seen: list[None] = []

    async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append(None)

    context = pki.context(pki.server, maximum_version=getattr(ssl.TLSVersion, version))
    async with peers(closes, context) as url, client(tls=pki.tls()) as asking:
        assert (await refusal(asking, url)).reason == "connect"
    assert len(seen) > 1


async def test_F01_an_idle_connection_that_the_server_closes_is_no_tls_failure(pki: Pki) -> None:
    """Also where the server gives no session tickets: its answer has confirmed the handshake."""

    async def answers_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        await reader.readuntil(b"\r\n\r\n")

    async with peers(answers_once, pki.context(pki.server, num_tickets=0)) as url, client(tls=pki.tls()) as asking:
        assert await ask(asking, url) == 0
        assert await ask(asking, url) == 0, "tried again on a connection of its own"


async def test_F55_a_rotated_client_certificate_is_used_by_new_connections(pki: Pki, tmp_path: Path) -> None:
    """Not before `refresh_tls`, which the daemon calls every few seconds; connections that exist are not waited for."""
    names: list[str] = []

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        subject = writer.get_extra_info("peercert")["subject"]
        while await reader.readuntil(b"\r\n\r\n"):
            names.append(dict(pair for (pair,) in subject)["commonName"])
            writer.write(ANSWER)

    pair = tmp_path / "client.crt", tmp_path / "client.key"
    _copy(pki.client, pair)
    async with peers(answers, pki.context(pki.server, verify=True)) as url, client(tls=pki.tls(pair)) as asking:
        await ask(asking, url)
        _copy(pki.ca.issue("rotated"), pair)
        assert await asking.refresh_tls() == []
        await ask(asking, url)
        assert await asking.refresh_tls() == []
        await ask(asking, url)
    assert names == ["client", "rotated", "rotated"]


async def test_F55_a_rotated_authority_is_used_by_new_connections(pki: Pki, tmp_path: Path) -> None:
    """The server has a certificate of another authority now."""
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(pki.ca.file.read_bytes())
    with serving(pki.context(pki.foreign)) as url:
        async with client(tls=pki.tls(ca_file=ca_file)) as asking:
            assert (await refusal(asking, url)).reason == "tls"
            ca_file.write_bytes(pki.other.file.read_bytes())
            assert await asking.refresh_tls() == []
            assert await ask(asking, url) == 0


def _pair_of_two(pki: Pki, pair: tuple[Path, Path]) -> None:
    pair[0].write_bytes(pki.foreign_client[0].read_bytes())


def _no_pem(pki: Pki, pair: tuple[Path, Path]) -> None:
    pair[1].write_text("no key")


def _removed(pki: Pki, pair: tuple[Path, Path]) -> None:
    pair[0].unlink()


def _pipe(pki: Pki, pair: tuple[Path, Path]) -> None:
    pair[0].unlink()
    os.mkfifo(pair[0])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_pair_of_two, "key values mismatch"),
        (_no_pem, "no start line|NO_START_LINE|PEM"),
        (_removed, "No such file"),
        (_pipe, "no regular file"),
    ],
)
async def test_F55_a_broken_pair_keeps_the_old_one(
    pki: Pki, tmp_path: Path, damage: Callable[[Pki, tuple[Path, Path]], None], text: str
) -> None:
    """It is reported until the files are good again; a pipe is not waited for."""
    pair = tmp_path / "client.crt", tmp_path / "client.key"
    _copy(pki.client, pair)
    with serving(pki.context(pki.server, verify=True)) as url:
        async with client(tls=pki.tls(pair)) as asking:
            damage(pki, pair)
            for _ in range(2):
                (problem,) = await asking.refresh_tls()
                assert str(pair[0]) in problem.file
                assert problem.path in ("blueking.tls.cert_file", "blueking.tls.key_file")
                assert re.search(text, problem.message)
            assert await ask(asking, url) == 0
            _copy(pki.client, pair)
            assert await asking.refresh_tls() == []


async def test_unusable_tls_files_are_a_configuration_error(tmp_path: Path) -> None:
    """Reported at the start, not by every request."""
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    with pytest.raises(ConfigError, match=r"ca\.pem.*blueking\.tls"):
        async with client(tls=Tls(ca_file=file)):
            pass


def _copy(pair: tuple[Path, Path], to: tuple[Path, Path]) -> None:
    for source, target in zip(pair, to, strict=True):
        temporary = target.with_suffix(".new")
        temporary.write_bytes(source.read_bytes())
        temporary.replace(target)
