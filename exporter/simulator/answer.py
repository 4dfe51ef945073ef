"""What one part of the platform hands to the next on the way back to the client."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Answer:
    """What a handler answers: a JSON value, or raw bytes that are sent as they are. `content_type` may be absent."""

    body: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str | None = "application/json"
