"""The TLS context of a client, built from `Tls`. It is built again when a file has changed."""

from __future__ import annotations

import ssl

from exporter.config.files import open_file
from exporter.config.schema import Tls


def client_context(tls: Tls) -> ssl.SSLContext:
    """Read the files, without waiting for a pipe. Raises OSError and ValueError."""
    for file in (tls.ca_file, tls.cert_file, tls.key_file):
        if file:
            open_file(file).close()  # OpenSSL would wait for the writer of a pipe
    context = ssl.create_default_context(cafile=tls.ca_file)
    # Python's own default, but a distribution may build Python without it, as Debian does.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
