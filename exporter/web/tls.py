"""The `tls_server_config` section as an `ssl` context."""

from __future__ import annotations

import os
import ssl
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from exporter.config.secret import Secret
from exporter.config.web_file import CIPHERS, CURVES, VERSIONS, TlsServer

_VERSIONS = dict(
    zip(
        VERSIONS,
        (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3),
        strict=True,
    )
)


class TlsError(Exception):
    """The section reads well, but OpenSSL does not take it. `key` is the one to blame."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def context(tls: TlsServer) -> ssl.SSLContext:
    """A fresh context, so that no session of an older certificate or CA can be resumed. Raises TlsError."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.set_alpn_protocols(["http/1.1"])
    made.options |= ssl.OP_NO_RENEGOTIATION
    lowest = tls.min_version
    suites = [CIPHERS[name] for name in tls.cipher_suites if name in CIPHERS]
    if tls.cipher_suites and not suites:
        # Only suites of TLS 1.3 are allowed, so an older version could agree on none.
        if tls.max_version != "TLS13":
            raise TlsError("cipher_suites", f"none of them exists in {tls.max_version}")
        lowest = "TLS13"
    level = "@SECLEVEL=0" if tls.min_version in ("TLS10", "TLS11") else ""
    if suites or level:
        made.set_ciphers(":".join(suites or ["DEFAULT"]) + (f":{level}" if level else ""))
    if not tls.prefer_server_cipher_suites:
        made.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TLS10 is asked for by name
        made.minimum_version = _VERSIONS[lowest]
        made.maximum_version = _VERSIONS[tls.max_version]
    if tls.curve_preferences:
        try:
            made.set_ecdh_curve(CURVES[tls.curve_preferences[0]])
        except (ValueError, ssl.SSLError):
            raise TlsError("curve_preferences", "this Python's OpenSSL does not take the curve") from None
    _certificate(made, tls)
    if tls.client_auth_type != "NoClientCert":
        required = tls.client_auth_type == "RequireAndVerifyClientCert"
        made.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        key = "client_ca_file" if tls.client_ca_file else "client_ca"
        try:
            made.load_verify_locations(tls.client_ca_file, cadata=tls.client_ca.reveal() if tls.client_ca else None)
        except (OSError, ValueError) as error:
            raise TlsError(key, f"is no CA certificate: {_why(error)}") from None
    return made


def _certificate(made: ssl.SSLContext, tls: TlsServer) -> None:
    key = "cert_file" if tls.cert_file else "cert"
    with ExitStack() as open_files:
        try:
            cert = tls.cert_file or open_files.enter_context(_as_file(tls.cert))
            private = tls.key_file or open_files.enter_context(_as_file(tls.key))
            # Without a password OpenSSL would ask the terminal for that of an encrypted key.
            made.load_cert_chain(cert, private, password=lambda: "")
        except (OSError, ValueError) as error:
            raise TlsError(key, f"certificate and key cannot be used: {_why(error)}") from None


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").lower().replace("_", " ")
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "not PEM"


@contextmanager
def _as_file(secret: Secret | None) -> Iterator[Path]:
    # ssl reads certificates from files only; this one has no name on any disk.
    assert secret is not None
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, secret.reveal().encode())
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
