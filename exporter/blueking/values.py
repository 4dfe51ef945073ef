"""Values as both generations of NodeMan write them: times in four forms, numbers as text, hosts without an id."""

from __future__ import annotations

import datetime
import functools
import re

from exporter.blueking.envelope import Int, WrongShape
from exporter.blueking.text import clean_text
from exporter.model import UNKNOWN, Host

Number = Int | float | str | None
Time = Int | float | str | None

OTHER_WORD = "other"
"""Stands for what should be a word of the platform and is none."""
_WORD = re.compile(r"[A-Za-z0-9_]{0,64}", re.ASCII)

_MILLISECONDS = 10**11
"""Epoch numbers from here on are ms: as seconds they would lie beyond the year 5000."""


@functools.lru_cache(maxsize=16_384)
def _seconds(value: Time | datetime.datetime, zone: datetime.timezone) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and not value.isdigit():
        value = datetime.datetime.fromisoformat(value)
    if isinstance(value, datetime.datetime):
        return int((value.replace(tzinfo=zone) if value.tzinfo is None else value).timestamp())
    number = float(value)
    return int(number / 1000 if abs(number) >= _MILLISECONDS else number)


def seconds(value: Time | datetime.datetime, zone: datetime.timezone, path: str) -> int | None:
    """Unix seconds of a time text with or without a zone (then it is of `zone`), or of an epoch number; None for none.

    Raises WrongShape for anything else.
    """
    try:
        return _seconds(value, zone)
    except (ValueError, OverflowError):
        raise WrongShape(f"{path} is no time") from None


def integer(value: Number) -> int | None:
    """The integer that a number or text spells, None for anything else."""
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if value is None or len(value) > 19 or not value.isascii():
        return None
    try:
        return int(value)
    except ValueError:
        return None


@functools.lru_cache(maxsize=1024)
def _lower(text: str) -> str:
    return clean_text(text, 64).lower()


def status_slug(value: Number, path: str = "") -> str:
    """A status in lower case; it may be a word that is not in `model.NODEMAN_STATUSES`.

    Where there is none, `unknown`, or WrongShape if a `path` is given.
    """
    if value is None or value == "":
        if path:
            raise WrongShape(f"{path} is missing")
        return UNKNOWN
    return _lower(str(value))


@functools.lru_cache(maxsize=1024)
def word(value: str | None) -> str:
    """A job type or error code as the platform spells it, "" for none: never free text, since it becomes a label."""
    return value or "" if _WORD.fullmatch(value or "") else OTHER_WORD


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
