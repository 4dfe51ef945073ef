"""Content negotiation of /metrics: which of the two formats, and whether compressed."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum


class Format(Enum):
    """The value is the content type that is answered."""

    TEXT = "text/plain; version=0.0.4; charset=utf-8"
    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

    @property
    def openmetrics(self) -> bool:
        return self is Format.OPENMETRICS


def negotiate(accept: str | None, accept_encoding: str | None) -> tuple[Format, bool]:
    """The format, and whether to gzip, for these two request headers.

    The answer is OpenMetrics if the client names it in version 1.0.0, 0.0.1 (its draft) or without a version, and
    prefers no other format. All other clients get the classic text, also for a malformed header: browsers and
    scrapers read it.
    """
    openmetrics, text = 0.0, 0.0
    for media, parameters, quality in _choices(accept or ""):
        if media == "application/openmetrics-text":
            if parameters.get("version", "1.0.0") in ("1.0.0", "0.0.1"):
                openmetrics = max(openmetrics, quality)
        elif media in ("text/plain", "text/*", "*/*"):
            text = max(text, quality)
    coding = {name: quality for name, _, quality in _choices(accept_encoding or "")}
    gzip = coding.get("gzip", coding.get("*", 0.0))
    return (
        Format.OPENMETRICS if openmetrics and openmetrics >= text else Format.TEXT,
        gzip > 0 and gzip >= coding.get("identity", 0.0),
    )


def _choices(value: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """The elements of an Accept header: name, parameters, quality. A quality that is no number counts as refused."""
    for element in value.split(","):
        name, *rest = (part.strip() for part in element.split(";"))
        parameters = {}
        for part in rest:
            key, _, text = part.partition("=")
            parameters[key.strip().lower()] = text.strip().strip('"')
        try:
            quality = float(parameters.get("q", "1"))
        except ValueError:
            quality = 0.0
        yield name.lower(), parameters, quality if 0 <= quality <= 1 else 0.0
