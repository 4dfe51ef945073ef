"""Values as both generations of NodeMan write them: times in four forms, numbers as text, hosts without an id."""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Sequence
from typing import Any

from exporter.blueking.envelope import WrongShape
from exporter.blueking.text import clean_text
from exporter.log import redact
from exporter.model import UNKNOWN, Host

Number = int | float | str | None
"""An integer in any form; `integer` says which one, if a state can keep it."""
Time = int | float | str | None

OTHER_WORD = "other"
"""Replaces a value that should be a word of the platform but is not one."""
_WORD = re.compile(r"[A-Za-z0-9_]{0,64}", re.ASCII)

_MILLISECONDS = 10**11
"""Epoch numbers from here on are ms: as seconds they would lie beyond the year 5000."""
_LATEST = 10**12
"""Unix seconds of the latest time: later than any calendar shows, and small enough for a state."""


def seconds(value: Time | datetime.datetime, zone: datetime.timezone, path: str) -> int | None:
    """Unix seconds of a time text with or without a zone (then it is of `zone`), or of an epoch number.

    None for no time; 0 and less are no time. A time after `_LATEST` is read as `_LATEST`. Raises WrongShape for
    anything else.
    """
    try:
        number = _seconds(value, zone)
    except (ValueError, OverflowError):
        raise WrongShape(f"{path} is no time") from None
    return number if number is None or number > 0 else None


@functools.lru_cache(maxsize=16_384)
def _seconds(value: Time | datetime.datetime, zone: datetime.timezone) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and not value.isdigit():
        value = datetime.datetime.fromisoformat(value)
    if isinstance(value, datetime.datetime):
        return int((value.replace(tzinfo=zone) if value.tzinfo is None else value).timestamp())
    number = float(value)
    return int(min(number / 1000 if number >= _MILLISECONDS else number, _LATEST))


def check_rows(rows: Sequence[Any], zone: datetime.timezone, *times: str) -> None:
    """Refuse rows that cannot be read later: each needs a status, and each of its members `times` must be a time.

    Raises WrongShape with the path of the first one.
    """
    for index, row in enumerate(rows):
        if row.status is None or row.status == "":
            raise WrongShape(f"data.list[{index}].status is missing")
    for member in times:
        for index, row in enumerate(rows):
            seconds(getattr(row, member), zone, f"data.list[{index}].{member}")


def integer(value: Number) -> int | None:
    """The integer that a number or text spells, None for anything else and for what needs more than 64 bits."""
    if isinstance(value, str):
        if len(value) > 20 or not value.isascii():
            return None
        try:
            value = int(value)
        except ValueError:
            return None
    elif isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return value if value is not None and -(2**63) <= value < 2**63 else None


@functools.lru_cache(maxsize=1024)
def lower(text: str) -> str:
    """A status that is not empty, in lower case."""
    return clean_text(text, 64).lower()


def status_slug(value: Number, path: str = "") -> str:
    """A status in lower case; it may be a word that is not in `model.NODEMAN_STATUSES`.

    Where there is none, `unknown`, or WrongShape if a `path` is given.
    """
    if value is None or value == "":
        if path:
            raise WrongShape(f"{path} is missing")
        return UNKNOWN
    return lower(str(value))


@functools.lru_cache(maxsize=1024)
def word(value: str | None) -> str:
    """A job type or error code as the platform spells it, "" for none: never free text, since it becomes a label."""
    text = redact(value or "")
    return text if _WORD.fullmatch(text) else OTHER_WORD


def host(bk_cloud_id: Number, bk_host_id: Number, *addresses: str | None) -> Host | None:
    """A host by its id and the first address that is not empty; None without either, since such hosts would be one.

    CMDB separates several addresses of a host by commas.
    """
    ip = (next(filter(None, addresses), None) or "").partition(",")[0].strip()
    number = integer(bk_host_id)
    key = str(number) if number is not None and number > 0 else ""
    if not key and not ip:
        return None
    return Host("" if bk_cloud_id is None else clean_text(str(bk_cloud_id), 64), key, clean_text(ip, 64))
