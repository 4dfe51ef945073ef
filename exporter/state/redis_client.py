"""One connection to a Redis or Valkey server, and the scripts that run there.

Everything goes over one connection, in order: a heartbeat that a server confirms vouches for every commit that was sent
to it before. Requests that come while the connection is busy go out together as the next pipeline. There are no
retries: a request without an answer has an unknown outcome, and the scripts are made so that repeating one is safe.

Scripts are sent as text each time: a promoted replica or a restarted server knows none by their hash.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from redis.asyncio.connection import AbstractConnection, Connection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from exporter import log
from exporter.config.secret import Secret
from exporter.config.state_url import RedisUrl
from exporter.errors import StateError, StateUnreachable
from exporter.telemetry import Telemetry


class RunId:
    """Stands for the run id of the server that a command is sent to."""


RUN_ID = RunId()
Command = tuple[str | bytes | int | RunId, ...]
Place = tuple[str, int]

LEAST_VERSION = (7, 0)
MOST_COMMANDS = 256
MOST_BYTES = 2**20
"""Bounds of one pipeline, so that a heartbeat never waits long for what is under way."""
RECONNECT = 0.25
"""Seconds between two attempts to connect."""
PASSING = frozenset({"BUSY", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "TRYAGAIN"})
"""Codes of errors that pass by themselves, beside those that redis-py has a class for."""

BEAT = """
local before = redis.call('HGET', KEYS[1], ARGV[1]) or '0'
if tonumber(string.match(before, '^%d+')) < tonumber(ARGV[2]) then return {0, redis.call('HGETALL', KEYS[1])} end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
for i = 4, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i+1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
return {1, redis.call('HGETALL', KEYS[1])}"""
"""members; me, number of my newest confirmed heartbeat, value, [dead, its value]... → 1 or, when that heartbeat is not
there any more, 0 and nothing is written; all members. A late heartbeat cannot hide that the store has lost writes."""

CLAIM = """
local c = redis.call('HMGET', KEYS[1], 'own', 'epoch')
local own, epoch = c[1] or '', c[2] or '0'
if own ~= ARGV[2] or epoch ~= ARGV[3] then return {0, own, epoch} end
redis.call('HSET', KEYS[1], 'own', ARGV[1], 'epoch', ARGV[4])
return {1, ARGV[1], ARGV[4]}"""
"""key; me, expected own, expected epoch, new epoch → whether it is mine now, own, epoch."""

COMMIT = """
local c = redis.call('HMGET', KEYS[1], 'own', 'epoch', 'ver')
local own, epoch, ver = c[1] or '', c[2] or '0', c[3] or '0'
if own ~= ARGV[1] or epoch ~= ARGV[2] then return {0, own, epoch} end
if tonumber(ver) >= tonumber(ARGV[3]) then return {2, own, epoch} end
redis.call('HSET', KEYS[1], 'ver', ARGV[3], 'run', ARGV[4], 'upd', ARGV[5], 'schema', ARGV[6], 'p', ARGV[7])
return {1, own, epoch}"""
"""key; me, epoch, ver, run, upd, schema, payload → 1 done, 0 somebody else's, 2 a newer one is there."""

RELEASE = """
local c = redis.call('HMGET', KEYS[1], 'own', 'epoch')
if c[1] ~= ARGV[1] or c[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'own', '')
return 1"""
"""key; me, epoch → 1 when it was mine."""

FORGET = """
local c = redis.call('HMGET', KEYS[1], 'own', 'epoch', 'upd')
if (c[1] or '') ~= ARGV[1] or (c[2] or '0') ~= ARGV[2] or (c[3] or '') ~= ARGV[3] then return 0 end
return redis.call('DEL', KEYS[1])"""
"""key; expected own, epoch, upd → 1 when it was deleted."""


def script(text: str, key: str, *arguments: str | bytes | int | RunId) -> Command:
    """The command that runs a script on one key."""
    return ("EVAL", text, 1, key, *arguments)


class Client(Protocol):
    """See `RedisClient`."""

    @property
    def run_id(self) -> str: ...

    @property
    def restarts(self) -> int: ...

    async def connect(self) -> None: ...

    async def run(self, *commands: Command, urgent: bool = False) -> list[Any]: ...

    async def close(self) -> None: ...


class Credentials(CredentialProvider):
    """User and password of this moment: a file may have changed since the last connection."""

    def __init__(self, username: str, password: Secret | None) -> None:
        self._username = username
        self._password = password

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = self._password.reveal() if self._password else ""
        log.redact_values([password])
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()

    def __bool__(self) -> bool:
        return bool(self._username or self._password)


class _TlsConnection(Connection):
    """TCP with a given TLS context: redis-py's own always trusts the authorities of the system too."""

    def __init__(self, context: ssl.SSLContext, server_name: str | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tls = {"ssl": context} | ({"server_hostname": server_name} if server_name else {})

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), **self._tls}


class _Request:
    __slots__ = ("answers", "commands", "size")

    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = commands
        self.size = sum(len(part) for command in commands for part in command if isinstance(part, (str, bytes)))
        self.answers: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        # The caller may be gone by then; asyncio would log an exception that nobody has retrieved.
        self.answers.add_done_callback(lambda done: done.cancelled() or done.exception())


class RedisClient:
    """See the module. `run_id`: of the server process at the other end, empty while there is none; `info`: what it
    said of itself; `restarts`: how often it was another process than before.

    `budget`: seconds for connecting, and for one pipeline. `wait_replicas`: replicas that must have acknowledged a
    pipeline, else all of it counts as failed. `probe`: commands that the user must be allowed to run.
    """

    def __init__(
        self,
        url: RedisUrl,
        *,
        credentials: Credentials,
        sentinel_credentials: Credentials,
        tls: Callable[[], tuple[ssl.SSLContext, str | None]] | None,
        budget: float,
        wait_replicas: int,
        probe: Sequence[Command],
        telemetry: Telemetry,
    ) -> None:
        self.run_id = ""
        self.restarts = 0
        self.info: Mapping[str, str] = {}
        self._url = url
        self._credentials = credentials
        self._sentinel_credentials = sentinel_credentials
        self._tls = tls
        self._budget = budget
        self._wait_replicas = wait_replicas
        self._probe = probe
        self._telemetry = telemetry
        self._last_run_id = ""
        self._connection: AbstractConnection | None = None
        self._queue: deque[_Request] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._failure: StateError = StateUnreachable(f"state {url}: not connected yet")

    async def connect(self) -> None:
        """Reach the server and check that it fits. `StateUnreachable` when it may come back by itself, else
        `StateError`."""
        await self.disconnect()
        try:
            async with asyncio.timeout(self._budget):
                await self._connect()
        except (RedisError, OSError, TimeoutError) as error:
            await self.disconnect()
            raise self._error(error) from None
        except BaseException:
            await self.disconnect()
            raise

    async def disconnect(self) -> None:
        """Close the connection. The next request opens another, to the server that is the primary then."""
        connection, self._connection = self._connection, None
        self.run_id = ""
        if connection is not None:
            await _close(connection)

    async def close(self) -> None:
        """Close for good; what is waiting fails."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender])
        await self.disconnect()

    async def run(self, *commands: Command, urgent: bool = False) -> list[Any]:
        """The answers to `commands`, which run in this order on one connection. Raises `StateError` when one of them
        failed or was not confirmed in time; what the server did is unknown then. `urgent`: before what is waiting."""
        request = _Request(commands)
        if urgent:
            self._queue.appendleft(request)
        else:
            self._queue.append(request)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="state")
        try:
            # One budget to wait for a connection or for one's turn, one for the pipeline itself.
            async with asyncio.timeout(2 * self._budget):
                return await asyncio.shield(request.answers)
        except TimeoutError:
            # Not sent yet: it never will be. Sent: nobody waits for the answer any more.
            request.answers.cancel()
            raise type(self._failure)(str(self._failure)) from None

    async def _send(self) -> None:
        while self._queue:
            if self._connection is None:
                try:
                    await self.connect()
                except StateError as error:
                    self._failure = error
                    await asyncio.sleep(RECONNECT)
                    continue
                self._failure = StateUnreachable(f"state {self._url}: no answer within {2 * self._budget:g}s")
            if batch := self._next():
                await self._exchange(batch)

    def _next(self) -> list[_Request]:
        batch: list[_Request] = []
        commands = size = 0
        while self._queue:
            first = self._queue[0]
            if first.answers.done():
                self._queue.popleft()
                continue
            commands, size = commands + len(first.commands), size + first.size
            if batch and (commands > MOST_COMMANDS or size > MOST_BYTES):
                break
            batch.append(self._queue.popleft())
        return batch

    async def _exchange(self, batch: Sequence[_Request]) -> None:
        assert self._connection is not None
        commands = [
            tuple(self.run_id if part is RUN_ID else part for part in command)
            for request in batch
            for command in request.commands
        ]
        if self._wait_replicas:
            commands.append(("WAIT", self._wait_replicas, int(self._budget * 500)))
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._budget):
                answers = await _ask(self._connection, commands)
        except (RedisError, OSError, TimeoutError) as error:
            await self.disconnect()
            self._failure = self._error(error)
            self._fail(batch, self._failure)
            return
        except BaseException:
            self._fail(batch, StateError("the state is closed"))
            raise
        self._telemetry.state_roundtrip(time.monotonic() - began)
        if self._wait_replicas:
            acknowledged = answers.pop()
            if isinstance(acknowledged, RedisError) or acknowledged < self._wait_replicas:
                # This server may have been deposed: the next connection is to the one that leads then.
                await self.disconnect()
                self._failure = StateUnreachable(
                    f"state {self._url}: {acknowledged} of {self._wait_replicas} replicas have acknowledged"
                    " (wait_replicas)"
                )
                self._fail(batch, self._failure)
                return
            self._telemetry.state_acknowledged(acknowledged)
        if any(isinstance(answer, ReadOnlyError) for answer in answers):
            await self.disconnect()
        position = 0
        for request in batch:
            part = answers[position : position + len(request.commands)]
            position += len(part)
            if request.answers.done():
                continue
            if failed := _first_error(part):
                request.answers.set_exception(self._error(failed))
            else:
                request.answers.set_result(part)

    def _fail(self, batch: Sequence[_Request], error: StateError) -> None:
        for request in batch:
            if not request.answers.done():
                request.answers.set_exception(error)

    # Connecting

    async def _connect(self) -> None:
        connection = self._connection = self._open(await self._primary(), self._credentials, self._url.db)
        await connection.connect()  # type: ignore[no-untyped-call]
        role, info = await _ask(connection, [("ROLE",), ("INFO",)], strict=True)
        self.info = _info(info)
        self._check(role)
        await _ask(connection, self._probe, strict=True)
        if self.info["run_id"] != self._last_run_id:
            await self._warn(connection)
        self.run_id = self.info["run_id"]
        if self.run_id != self._last_run_id:
            self.restarts += 1
            self._last_run_id = self.run_id

    def _check(self, role: Sequence[Any]) -> None:
        version = self.info.get("valkey_version") or self.info.get("redis_version", "0")
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST_VERSION:
            wanted = ".".join(map(str, LEAST_VERSION))
            raise StateError(f"state {self._url}: the server has version {version}, at least {wanted} is needed")
        if self.info.get("redis_mode") == "cluster":
            raise StateError(f"state {self._url}: Redis Cluster is not supported, a single primary is needed")
        if bytes(role[0]) != b"master":
            message = f"state {self._url}: the server is a replica, its primary is needed"
            raise StateUnreachable(message) if self._url.sentinels else StateError(message)

    async def _warn(self, connection: AbstractConnection) -> None:
        """Log settings with which the server may lose counts. Raises StateError for a setting that surely does."""
        policy = self.info.get("maxmemory_policy", "noeviction")
        if policy.startswith("allkeys-") and self.info.get("maxmemory", "0") != "0":
            raise StateError(
                f"state {self._url}: maxmemory-policy {policy} evicts counts when the memory is full;"
                " set noeviction, or use a server of its own"
            )
        if policy != "noeviction":
            log.get().warning("state_may_be_evicted", policy=policy, message="set maxmemory-policy noeviction")
        if self.info.get("aof_enabled") == "0":
            # CONFIG may be forbidden; then nobody can tell.
            (save,) = await _ask(connection, [("CONFIG", "GET", "save")])
            if isinstance(save, list) and save[1:] == [b""]:
                log.get().warning(
                    "state_not_persistent",
                    message="the server writes neither an append-only file nor snapshots",
                    consequence="its restart, while no replica runs, loses all counts",
                )

    def _open(self, place: Place | str, credentials: Credentials, db: int) -> AbstractConnection:
        arguments: dict[str, Any] = {
            "db": db,
            "credential_provider": credentials or None,
            "socket_timeout": None,  # every exchange has its own
            "socket_connect_timeout": self._budget,
            "retry": Retry(NoBackoff(), 0),
            "health_check_interval": 0,
            "protocol": 2,
        }
        if isinstance(place, str):
            return UnixDomainSocketConnection(path=place, **arguments)
        arguments |= {"host": place[0], "port": place[1]}
        if self._tls is None:
            return Connection(**arguments)
        context, server_name = self._tls()
        return _TlsConnection(context, server_name, **arguments)

    async def _primary(self) -> Place | str:
        """Where the server is now. Of several sentinels the one with the newest configuration is right: one that was
        cut off or frozen still names the old primary."""
        if not self._url.sentinels:
            return self._url.path or self._url.hosts[0]
        answers = await asyncio.gather(*map(self._ask_sentinel, self._url.hosts), return_exceptions=True)
        known = [answer for answer in answers if not isinstance(answer, BaseException)]
        if known:
            return max(known)[1]
        raise next(answer for answer in answers if isinstance(answer, BaseException))

    async def _ask_sentinel(self, place: Place) -> tuple[int, Place]:
        """The epoch of the sentinel's configuration, and the address of the primary in it."""
        connection = self._open(place, self._sentinel_credentials, 0)
        try:
            async with asyncio.timeout(self._budget / 2):
                await connection.connect()  # type: ignore[no-untyped-call]
                (answer,) = await _ask(connection, [("SENTINEL", "MASTER", self._url.service)], strict=True)
        except TimeoutError:
            raise StateUnreachable(f"state {self._url}: the sentinel {place[0]}:{place[1]} does not answer") from None
        except (RedisError, OSError) as error:
            raise self._error(error, f"the sentinel {place[0]}:{place[1]}: ") from None
        finally:
            await _close(connection)
        fields = text_fields(answer)
        return int(fields["config-epoch"]), (fields["ip"], int(fields["port"]))

    def _error(self, error: Exception, who: str = "") -> StateError:
        """The StateError for an error of redis-py. The server's own text carries no secret; the library's text may hold
        the address, which is no secret either."""
        if isinstance(error.__cause__, RedisError):
            error = error.__cause__  # redis-py makes a ConnectionError of what goes wrong on a unix socket
        at = f"state {self._url}: {who}"
        text = log.redact(str(error)) or type(error).__name__
        if isinstance(error, TimeoutError):
            return StateUnreachable(f"{at}no answer within {self._budget:g}s")
        if isinstance(error, AuthenticationError):
            return StateError(f"{at}user or password is refused: {text}")
        if isinstance(error, NoPermissionError) or "can't run this command" in text or "ACL failure" in text:
            return StateError(f"{at}a right is missing: {text}")
        if isinstance(error, InvalidResponse):
            return StateError(f"{at}the server does not speak the protocol of Redis")
        passing = isinstance(error, (ReadOnlyError, OutOfMemoryError)) or text.split(" ")[0] in PASSING
        if isinstance(error, ResponseError) and not passing:
            return StateError(f"{at}{text}")
        tls = isinstance(error.__context__, ssl.SSLError) or isinstance(error, ssl.SSLError)
        return (StateError if tls else StateUnreachable)(f"{at}{text}")


async def _ask(connection: AbstractConnection, commands: Sequence[Command], *, strict: bool = False) -> list[Any]:
    """The answer to each command; errors of single commands are among them, unless `strict`."""
    await connection.send_packed_command(connection.pack_commands(commands), check_health=False)  # type: ignore[arg-type]
    answers: list[Any] = []
    for _ in commands:
        try:
            answers.append(await connection.read_response())
        except ResponseError as error:
            answers.append(error)
    if strict and (failed := _first_error(answers)):
        raise failed
    return answers


def _first_error(answers: Sequence[Any]) -> RedisError | None:
    return next((answer for answer in answers if isinstance(answer, RedisError)), None)


async def _close(connection: AbstractConnection) -> None:
    with contextlib.suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)


def text_fields(flat: Sequence[bytes]) -> dict[str, str]:
    """A list of names and values in turn, as RESP 2 has a map."""
    return dict(zip(map(bytes.decode, flat[::2]), map(bytes.decode, flat[1::2]), strict=True))


def _info(text: bytes) -> dict[str, str]:
    lines = text.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
