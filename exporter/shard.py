"""Which process polls which scope, by rendezvous hashing: every scope has a weight for each name, the highest wins.

A name that comes or goes moves the scopes that it gets or had, and no others.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from hashlib import blake2b

import msgspec

from exporter.errors import ConfigError, Problem
from exporter.model import Scope


def weight(name: str, item: str) -> int:
    """How much `item` belongs to `name`."""
    return int.from_bytes(blake2b(f"{name}/{item}".encode(), digest_size=8).digest(), "big")


def pod_name(environ: Mapping[str, str] = os.environ) -> str:
    """The name of this process that a restart keeps: `POD_NAME`, else the name of the host."""
    return environ.get("POD_NAME") or socket.gethostname()


class Shard(msgspec.Struct, frozen=True):
    """One of `total` processes that share the scopes, each with a state of its own. `ordinal` counts from 0."""

    ordinal: int = 0
    total: int = 1

    def owns(self, scope: Scope) -> bool:
        """Whether this process polls `scope`."""
        return self.total == 1 or self.ordinal == max(range(self.total), key=lambda n: weight(str(n), str(scope)))

    def __str__(self) -> str:
        return f"shard {self.ordinal} of {self.total}"


def read_shard(shard: int | None, total: int | None, environ: Mapping[str, str] = os.environ) -> Shard | None:
    """The shard that `--shard` and `--total-shards` name, None without them. Raises ConfigError.

    With the total alone, the ordinal is that at the end of the pod's name: a StatefulSet names its pods NAME-0, NAME-1.
    """
    if shard is None and total is None:
        return None
    if total is None:
        raise ConfigError([Problem("--shard", 0, 0, "", "needs --total-shards beside it")])
    if total < 1:
        raise ConfigError([Problem("--total-shards", 0, 0, "", "want a number of at least 1")])
    source = "--shard"
    if shard is None:
        source = "--total-shards"
        found = re.search(r"-([0-9]{1,6})$", pod_name(environ))
        if not found:
            message = "needs --shard beside it: neither POD_NAME nor the name of the host ends in -NUMBER"
            raise ConfigError([Problem(source, 0, 0, "", message)])
        shard = int(found[1])
    if not 0 <= shard < total:
        raise ConfigError([Problem(source, 0, 0, "", f"{shard} is no shard of {total}: they are counted from 0")])
    return Shard(shard, total)
