"""Addresses of the state: which are accepted, and the error of each mistake, without the password."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.config.secret import Secret
from exporter.config.state_url import RedisUrl, StateUrl
from exporter.config.values import InvalidValue

PASSWORD = "hunter2-canary"


def parse(text: str) -> str | RedisUrl:
    return StateUrl().parse(text, Path("/etc/exporter"))


def problem(text: str) -> str:
    with pytest.raises(InvalidValue) as caught:
        parse(text)
    return f"{caught.value.message} {caught.value.suggestion}".strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://store", RedisUrl("redis", (("store", 6379),))),
        ("redis://10.0.0.7:7000/3", RedisUrl("redis", (("10.0.0.7", 7000),), db=3)),
        ("redis://store:6379/", RedisUrl("redis", (("store", 6379),))),
        ("redis://[::1]:7000/1", RedisUrl("redis", (("::1", 7000),), db=1)),
        ("rediss://:p%40ss@store/0", RedisUrl("rediss", (("store", 6379),), password=Secret("p@ss"))),
        ("redis://:a/b@store", RedisUrl("redis", (("store", 6379),), password=Secret("a/b"))),
        ("redis://u:a:b@store", RedisUrl("redis", (("store", 6379),), username="u", password=Secret("a:b"))),
        ("unix:///run/redis.sock", RedisUrl("unix", path="/run/redis.sock")),
        ("unix://:pw@/run/redis.sock?db=2", RedisUrl("unix", path="/run/redis.sock", db=2, password=Secret("pw"))),
        (
            "redis+sentinel://s1,s2:7001/blueking/4",
            RedisUrl("redis+sentinel", (("s1", 26379), ("s2", 7001)), service="blueking", db=4),
        ),
        ("redis+sentinel://s1/blueking", RedisUrl("redis+sentinel", (("s1", 26379),), service="blueking")),
        ("memory:", "memory:"),
        ("sqlite:state.db", "sqlite:/etc/exporter/state.db"),
    ],
)
def test_addresses_that_are_taken(text: str, expected: str | RedisUrl) -> None:
    """Each form of the reference, with its defaults."""
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"redis://{PASSWORD}@store", ":PASSWORD@"),
        ("redis://:@store", "the password before @ is empty"),
        (f"redis://:{PASSWORD}#@store", "%23"),
        (f"redis://:{PASSWORD}?@store", "no options"),
        ("redis://store/0/1", "nothing may follow"),
        ("redis://store/one", "number of the database"),
        ("redis://store/-1", "number of the database"),
        ("redis://store:port", "HOST:PORT"),
        ("redis://store:0", "port from 1"),
        ("redis://store:65536", "port from 1"),
        ("redis://a,b/0", "redis+sentinel://"),
        ("redis://store?ssl_cert_reqs=none", "state.tls"),
        ("redis://store?socket_timeout=5", "lease_ttl"),
        ("redis://[::g]:1", "IPv6"),
        ("redis://[1:2]:1", "IPv6"),
        ("redis:///0", "HOST:PORT"),
        ("redis://", "redis://"),
        ("redis:store", "redis://"),
        ("redi://store", "redis"),
        ("rediss+sentinel://store/x", "redis+sentinel"),
        ("postgres://store", "memory:"),
        ("redis+sentinel://s1:26379", "/NAME/DB"),
        ("redis+sentinel://s1//0", "name of the server"),
        ("redis+sentinel://s1,s1/x", "twice"),
        ("redis+sentinel://s1,/x", "HOST:PORT"),
        ("redis+sentinel://s1/x/0/9", "nothing may follow"),
        ("unix://run/redis.sock", "unix:///PATH"),
        ("unix:///run/redis.sock?db=x", "number of the database"),
        ("unix:///run/redis.sock?timeout=1", "?db=NUMBER"),
        ("unix:///run/", "unix:///PATH"),
    ],
)
def test_every_mistake_is_named_without_the_password(text: str, told: str) -> None:
    """What is wrong, and what would be right; never a part of what was written, which may be the password."""
    message = problem(text)
    assert told in message
    assert PASSWORD not in message


@given(text=st.text(max_size=60), scheme=st.sampled_from(["redis://", "rediss://", "unix://", "redis+sentinel://", ""]))
def test_any_text_is_an_address_or_a_problem_that_repeats_nothing(text: str, scheme: str) -> None:
    """No text raises anything else, and no problem shows what was written."""
    word = f"zzz{text}zzz"
    told = ""
    try:
        told = repr(getattr(parse(f"{scheme}{word}"), "password", None))
    except InvalidValue as error:
        told = error.message
    assert "zzz" not in told


def test_an_address_is_printed_without_credentials() -> None:
    """In logs and errors: where, not who."""
    for text, shown in (
        (f"redis://user:{PASSWORD}@store:1/2", "redis://store:1/2"),
        (f"redis+sentinel://:{PASSWORD}@s1,s2/name/3", "redis+sentinel://s1:26379,s2:26379/name/3"),
        (f"unix://:{PASSWORD}@/run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("redis://[::1]:7000", "redis://[::1]:7000/0"),
    ):
        assert str(parse(text)) == shown
        assert PASSWORD not in repr(parse(text))
