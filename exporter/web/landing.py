"""GET /: the landing page (a first, plain form)."""

from __future__ import annotations

from aiohttp import web

from exporter.web.reply import Reply, text
from exporter.web.status import Status


def landing(request: web.BaseRequest, status: Status, telemetry_path: str) -> Reply:
    return text(200, f"blueking-exporter {status.version}")
