"""Where the state is kept: `state.url`.

A Redis address is parsed here and not by redis-py, which takes unknown options for connection arguments, ignores what
follows the database and repeats the address, password included, in its errors.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import unquote

import msgspec

from exporter.config.secret import Secret
from exporter.config.values import InvalidValue, Text, did_you_mean

SCHEMES = ("sqlite", "memory", "redis", "rediss", "unix", "redis+sentinel")

_HOST = re.compile(r"(\[[0-9A-Fa-f:.%a-z]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_PORTS = {"redis": 6379, "rediss": 6379, "redis+sentinel": 26379}


class RedisUrl(msgspec.Struct, frozen=True):
    """A Redis or Valkey server.

    `hosts`: the server, or the sentinels that know it; empty with `unix`. `path`: of the socket, with `unix`.
    `service`: name under which the sentinels know the server. Text and equality: `str()` shows no credentials.
    """

    scheme: Literal["redis", "rediss", "unix", "redis+sentinel"]
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    username: str = ""
    password: Secret | None = None

    @property
    def sentinels(self) -> bool:
        return self.scheme == "redis+sentinel"

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}" + (f"?db={self.db}" if self.db else "")
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{self.scheme}://{hosts}/" + (f"{self.service}/" if self.service else "") + str(self.db)


class StateUrl(Text):
    """`sqlite:PATH` (made absolute), `memory:`, or a Redis address."""

    def __init__(self) -> None:
        super().__init__(
            "sqlite:PATH, memory:, or redis://, rediss://, unix:// or redis+sentinel:// with an address",
            r"sqlite:.+|memory:|(?:rediss?|unix|redis\+sentinel)://.+",
            private=True,
        )

    def parse(self, value: object, directory: Path) -> str | RedisUrl:
        scheme, colon, _ = value.partition(":") if isinstance(value, str) else ("", "", "")
        if colon and scheme not in SCHEMES and re.fullmatch(r"[a-z+]{2,20}", scheme):
            raise InvalidValue(self.want, did_you_mean(scheme, SCHEMES), shown=False)
        text: str = super().parse(value, directory)
        if scheme == "memory":
            return text
        if scheme == "sqlite":
            return f"sqlite:{directory / text.removeprefix('sqlite:')}"
        return _parse(text)

    def write(self, value: object) -> str:
        return str(value)


def _parse(text: str) -> RedisUrl:
    """A Redis address. Messages never hold a part of it: any part may be a misplaced password."""
    scheme, _, rest = text.partition("://")
    rest, _, query = rest.partition("?")
    if "#" in text:
        _wrong("no fragment in the address; # in a password is written %23")
    userinfo, at, place = rest.rpartition("@")
    username, password = _credentials(userinfo) if at else ("", None)
    if scheme == "unix":
        if not place.startswith("/") or place.endswith("/"):
            _wrong("want unix:///PATH/OF/THE/SOCKET")
        return RedisUrl("unix", (), unquote(place), "", _option_db(query), username, password)
    if query:
        _wrong("no options in the address; timeouts follow from lease_ttl, TLS is configured by state.tls")
    hosts, *path = place.split("/")
    if path and path[-1] == "":
        path.pop()
    service = ""
    if scheme == "redis+sentinel":
        if not path:
            _wrong("want redis+sentinel://HOST:PORT,HOST:PORT/NAME/DB; NAME is what the sentinels call the server")
        service = unquote(path.pop(0))
        if not re.fullmatch(r"[A-Za-z0-9._-]+", service):
            _wrong("the name of the server has other characters than letters, digits, '.', '_' and '-'")
    elif "," in hosts:
        _wrong("want one host; several sentinels are given with redis+sentinel://")
    if len(path) > 1:
        _wrong("nothing may follow the number of the database")
    found = tuple(_host(host, _PORTS[scheme]) for host in hosts.split(","))
    if len(set(found)) != len(found):
        _wrong("one sentinel is given twice")
    return RedisUrl(scheme, found, "", service, _db(path[0]) if path else 0, username, password)  # type: ignore[arg-type]


def _credentials(userinfo: str) -> tuple[str, Secret | None]:
    username, colon, password = userinfo.partition(":")
    if not colon:
        _wrong("a word before @ is ambiguous: write :PASSWORD@ for a password, USER:PASSWORD@ for both")
    if not password:
        _wrong("the password before @ is empty")
    return unquote(username), Secret(unquote(password))


def _host(text: str, port: int) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    if not match:
        _wrong("want HOST or HOST:PORT; '@', '?' and '#' in a password are written %40, %3F and %23")
    host = match[1]
    if host.startswith("["):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            _wrong("want an IPv6 address inside the brackets")
    number = int(match[2]) if match[2] else port
    if not 1 <= number <= 65535:
        _wrong("want a port from 1 to 65535")
    return host, number


def _db(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text):
        _wrong("want the number of the database after the last /")
    return int(text)


def _option_db(query: str) -> int:
    if not query:
        return 0
    name, _, value = query.partition("=")
    if name != "db" or "&" in query:
        _wrong("the only option is ?db=NUMBER")
    return _db(value)


def _wrong(message: str) -> NoReturn:
    raise InvalidValue(message, shown=False)
