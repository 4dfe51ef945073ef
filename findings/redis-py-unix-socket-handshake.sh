#!/bin/sh
# redis-py's asyncio client greets twice over a unix socket, and a wrong password is another error there than over TCP.
#
# Expected: one AUTH per connection, and AuthenticationError for a wrong password whatever the transport.
# Seen: over TCP AuthenticationError; over a unix socket ConnectionError. With the right password AUTH arrives twice.
# Cost: who tells "wrong password" from "no server" by the exception is wrong over unix://. Look at `__cause__`.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'redis==8.1.0' 2>/dev/null
"$work/venv/bin/python" - "$work/socket" <<'PY'
import asyncio
import sys
from importlib.metadata import version

import redis.asyncio as client

PASSWORD = "right"
greetings = []


async def serve(reader, writer):
    """Just enough of a server: AUTH with a password, OK to everything else."""
    while line := await reader.readline():
        parts = []
        for _ in range(int(line[1:])):
            await reader.readline()
            parts.append((await reader.readline()).strip().decode())
        name = parts[0].upper()
        if name == "HELLO":
            writer.write(b"-ERR unknown command\r\n")
        elif name == "AUTH":
            greetings.append("AUTH")
            writer.write(b"+OK\r\n" if parts[-1] == PASSWORD else b"-WRONGPASS invalid username-password pair\r\n")
        else:
            writer.write(b"+OK\r\n")
    writer.close()


async def told(**where):
    """How often AUTH arrives for one PING with the right password, and the error with a wrong one."""
    greetings.clear()
    one = client.Redis(password=PASSWORD, protocol=2, retry=None, **where)
    await one.ping()
    await one.aclose()
    count = len(greetings)
    one = client.Redis(password="wrong", protocol=2, retry=None, **where)
    try:
        await one.ping()
        error = "none"
    except Exception as caught:
        error = type(caught).__name__
    await one.aclose()
    return count, error


async def main():
    path = sys.argv[1]
    tcp = await asyncio.start_server(serve, "127.0.0.1", 0)
    unix = await asyncio.start_unix_server(serve, path)
    seen = {
        "TCP": await told(host="127.0.0.1", port=tcp.sockets[0].getsockname()[1]),
        "unix socket": await told(unix_socket_path=path),
    }
    tcp.close()
    unix.close()
    return seen


print("redis-py", version("redis"), "Python", sys.version.split()[0])
seen = asyncio.run(main())
for kind, (count, error) in seen.items():
    print(f"{kind}: AUTH arrives {count} times; a wrong password raises {error}")
sys.exit(None if seen == {"TCP": (1, "AuthenticationError"), "unix socket": (2, "ConnectionError")} else "changed")
PY
