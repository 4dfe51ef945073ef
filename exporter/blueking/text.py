"""Texts that others wrote, made safe to keep, to log and to show.

The rule: characters that move the cursor, hide or reorder text, or cannot be encoded (C0 and C1 controls with newline,
tab and NUL, bidi controls, U+2028, U+2029, the byte order mark, lone surrogates) become U+FFFD, one for one; secrets
become `***`; then the text is cut at `LIMIT` characters. Everything else stays as it came.
"""

from __future__ import annotations

import re

from exporter.log import redact

LIMIT = 256
"""Characters kept of a text: more than any real name has, and it bounds the state and the page."""

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def clean_text(text: str, limit: int = LIMIT) -> str:
    """`text` without secrets and the characters named above, not longer than `limit`."""
    text = redact(text)
    if len(text) <= limit and text.isprintable():
        return text
    return _UNSAFE.sub("\ufffd", text[:limit])
