"""The TLS context of a client, built from `Tls`. It is built again when a file has changed."""

from __future__ import annotations

import ssl

from exporter.config.files import open_file, reason
from exporter.config.schema import Tls


class TlsFileError(Exception):
    """A file cannot be read, or OpenSSL refuses it. `key`: the key of `Tls` that names it."""

    def __init__(self, key: str, error: OSError | ValueError) -> None:
        super().__init__(f"cannot be used: {why(error)}")
        self.key = key


def client_context(tls: Tls) -> ssl.SSLContext:
    """Read the files, without waiting for a pipe or for the password of a key. Raises TlsFileError."""
    key = ""
    try:
        for key in ("cert_file", "key_file", "ca_file"):
            if file := getattr(tls, key):
                open_file(file).close()  # OpenSSL would wait for the writer of a pipe
        context = ssl.create_default_context(cafile=tls.ca_file)
        # Python's own default, but a distribution may build Python without it, as Debian does.
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        key = "cert_file"
        if tls.cert_file:
            # Without a password OpenSSL would ask the terminal for that of an encrypted key.
            context.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise TlsFileError(key, error) from None
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def why(error: OSError | ValueError) -> str:
    """Why a file cannot be used, in the words of OpenSSL or of the system."""
    if not isinstance(error, ssl.SSLError):
        return reason(error)
    if error.reason in (None, "PEM_LIB"):  # OpenSSL says no more
        return "not PEM, or without its key, or a key that needs a password"
    return error.reason.lower().replace("_", " ")
