#!/bin/sh
# A cancelled loop.sock_accept of asyncio can have accepted a connection, which nobody gets then.
#
# Expected: a call that ends in CancelledError has taken nothing. The connection stays in the backlog for the next accept.
# Seen: when the cancellation comes in the turn of the loop in which the connection was accepted, the new socket is
# dropped: a ResourceWarning tells of it, and the client's connection is closed without an answer.
# Cost: a server that stops and starts accepting (a limit on connections, a reload) loses a client now and then. Wait
# until the listener is readable, then call its accept without waiting.
# Runs with the python3 that is found; the standard library is all that it needs.
set -eu
python3 -W always::ResourceWarning - <<'PY'
import asyncio
import gc
import socket
import sys


async def main():
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        accepting = asyncio.create_task(loop.sock_accept(listener))
        await asyncio.sleep(0.05)
        with socket.create_connection(listener.getsockname()) as client:
            await asyncio.sleep(0)
            # The loop accepts in this turn; the cancellation comes before the task is told.
            loop.call_soon(accepting.cancel)
            await asyncio.wait([accepting])
            cancelled = accepting.cancelled()
            del accepting
            gc.collect()
            try:
                listener.accept()
                waiting = True
            except BlockingIOError:
                waiting = False
            client.settimeout(5)
            return cancelled, waiting, client.recv(1)


cancelled, waiting, received = asyncio.run(main())
print("Python", sys.version.split()[0])
print("the accept was cancelled:", cancelled)
print("the connection is still there to accept:", waiting)
print("the client sees the end of its connection:", received == b"")
assert (cancelled, waiting, received) == (True, False, b""), "this has changed"
PY
echo "still so"
