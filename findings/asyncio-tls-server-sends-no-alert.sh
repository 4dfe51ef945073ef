#!/bin/sh
# A TLS server of asyncio that refuses a client for its missing certificate closes the connection without an alert.
#
# Expected: the client is told, as a blocking ssl.SSLSocket tells it (handshake failure, with TLS 1.2).
# Seen: the client gets the bare end of the connection, and cannot tell a refusal from a broken network.
# Cost: a client that sorts failures by the alert calls this a connection error.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'trustme==1.2.1' 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import asyncio
import socket
import ssl
import sys
import threading

import trustme

authority = trustme.CA()
certificate = authority.issue_cert("localhost")


def server_context():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def reason(port):
    """What a client without a certificate is told."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as raw, context.wrap_socket(raw, server_hostname="localhost"):
            return "connected"
    except ssl.SSLError as error:
        return error.reason
    except OSError as error:
        return type(error).__name__


def blocking():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            raw, _ = listener.accept()
            with raw:
                try:
                    server_context().wrap_socket(raw, server_side=True)
                except OSError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        told = reason(listener.getsockname()[1])
        thread.join(5)
        return told


async def by_asyncio():
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, ssl=server_context())
    told = await asyncio.to_thread(reason, server.sockets[0].getsockname()[1])
    server.close()
    return told


print("Python", sys.version.split()[0], ssl.OPENSSL_VERSION)
seen = {"blocking": blocking(), "asyncio": asyncio.run(by_asyncio())}
for kind, told in seen.items():
    print(f"{kind} server: the client is told {told}")
told = seen["asyncio"]
sys.exit(None if "ALERT" in seen["blocking"] and told and "ALERT" not in told else "changed")
PY
