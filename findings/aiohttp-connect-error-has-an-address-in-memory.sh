#!/bin/sh
# aiohttp's text of a failed connection holds the address of an object in memory, also for plain http.
#
# Expected: the same failure has the same text, and `ssl:` is shown for https only.
# Seen: with an own SSLContext the text is `… ssl:<ssl.SSLContext object at 0x7f…> […]`, another one for each context.
# Cost: logs that fold equal lines, and alerts that group by text, see a new error each time.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'aiohttp==3.14.5' 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import asyncio
import socket
import ssl
import sys
from importlib.metadata import version

import aiohttp


async def failure(url):
    async with aiohttp.ClientSession() as session:
        try:
            await session.get(url, ssl=ssl.create_default_context())
        except aiohttp.ClientConnectorError as error:
            return str(error)
    return ""


with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
first = asyncio.run(failure(f"http://127.0.0.1:{port}/"))
print("aiohttp", version("aiohttp"), "Python", sys.version.split()[0])
print(first)
sys.exit(None if first.startswith(f"Cannot connect to host 127.0.0.1:{port} ssl:<ssl.SSLContext object at 0x") else "changed")
PY
