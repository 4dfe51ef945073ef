"""GET /metrics: the page as it is, streamed; nothing is computed and nothing is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from aiohttp.web_request import BaseRequest

from exporter.metrics.negotiate import Format, negotiate
from exporter.web.reply import Reply, text

MOST_NAMES = 100


class Answer(Protocol):
    """The bytes of one exposition, to be iterated once; `length` in bytes where it is known before."""

    @property
    def length(self) -> int | None: ...

    def __iter__(self) -> Iterator[bytes]: ...


Exposition = Callable[[Format, frozenset[str] | None, bool], Answer]
"""(format, names or None for everything, gzip) → the page and the exporter's own metrics."""


def metrics(request: BaseRequest, exposition: Exposition) -> Reply:
    """The exposition in the format the scraper likes best; 400 for more than 100 `name[]`."""
    names = request.query.getall("name[]", [])
    if len(names) > MOST_NAMES:
        return text(400, f"at most {MOST_NAMES} name[] are taken")
    form, gzip = negotiate(
        ",".join(request.headers.getall("Accept", [])), ",".join(request.headers.getall("Accept-Encoding", []))
    )
    answer = exposition(form, frozenset(names) if names else None, gzip)
    headers = {"Vary": "Accept, Accept-Encoding"} | ({"Content-Encoding": "gzip"} if gzip else {})
    return Reply(200, form.value, answer, answer.length, headers)
