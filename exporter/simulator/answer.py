"""The answer of a handler, before it is sent."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Answer:
    """The answer of a handler: a JSON value, or raw bytes that are sent unchanged. `content_type` may be None."""

    body: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str | None = "application/json"
