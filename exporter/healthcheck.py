"""The command `healthcheck`: asks the daemon whether it is ready, without shell, curl or event loop."""

from __future__ import annotations

import base64
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

AUTH = "BLUEKING_EXPORTER_HEALTHCHECK_AUTH"
TIMEOUT = 5.0


def healthcheck(url: str, web_config_file: Path | None, environ: Mapping[str, str] = os.environ) -> str:
    """Ask /-/ready, or another page. Returns "" for a 200, else what is wrong. Raises ConfigError for the web file.

    `url` is an address (`127.0.0.1:10071`) or a page. `user:password` for basic authentication comes from
    `BLUEKING_EXPORTER_HEALTHCHECK_AUTH`. The certificate of a loopback address is not verified: it names another
    host.
    """
    tls = False
    if web_config_file is not None:
        from exporter.config.web_file import load_web

        tls = load_web(web_config_file).tls is not None
    page = urllib.parse.urlsplit(url if "//" in url else f"{'https' if tls else 'http'}://{url}")
    if page.path in ("", "/"):
        page = page._replace(path="/-/ready")
    page = page._replace(netloc=page.netloc.rpartition("@")[2])  # a password in it would be printed with every error
    request = urllib.request.Request(page.geturl())
    if environ.get(AUTH):
        request.add_header("Authorization", "Basic " + base64.b64encode(environ[AUTH].encode()).decode())
    context = ssl.create_default_context()
    if page.hostname in ("127.0.0.1", "::1", "localhost"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(request, timeout=TIMEOUT) as answer:
            return "" if answer.status == 200 else f"{page.geturl()} answers {answer.status}"
    except urllib.error.HTTPError as error:
        return f"{page.geturl()} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{page.geturl()}: {getattr(error, 'reason', None) or error}"
