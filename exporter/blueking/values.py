"""Values as both generations of NodeMan write them: times in four forms, numbers as text, hosts without an id."""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Mapping, Sequence
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
    if isinstance(value, datetime.datetime):
        return _positive(int((value if value.tzinfo else value.replace(tzinfo=zone)).timestamp()))
    try:
        return times(zone)[value]
    except WrongShape:
        raise WrongShape(f"{path} is no time") from None


@functools.cache
def times(zone: datetime.timezone) -> Mapping[Time, int | None]:
    """Unix seconds by the text or number that gives them, as `seconds` reads it; WrongShape without a path for what is
    no time. A value is read once: rows are the same from one poll to the next."""
    return _Times(zone)


class _Times(dict[Time, int | None]):
    MOST = 131_072
    """As many as the jobs of some thousand scopes have, in some 25 MB; then it begins anew."""

    def __init__(self, zone: datetime.timezone) -> None:
        self._zone = zone

    def __missing__(self, value: Time) -> int | None:
        try:
            number = self._read(value)
        except (ValueError, OverflowError):
            raise WrongShape("no time") from None
        if len(self) >= self.MOST:
            self.clear()
        self[value] = number
        return number

    def _read(self, value: Time) -> int | None:
        if value is None or value == "":
            return None
        if isinstance(value, str) and not value.isdigit():
            return seconds(datetime.datetime.fromisoformat(value), self._zone, "")
        number = float(value)
        return _positive(int(min(number / 1000 if number >= _MILLISECONDS else number, _LATEST)))


def _positive(number: int) -> int | None:
    return number if number > 0 else None


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
        number = _spelled(value)
    elif isinstance(value, float):
        number = int(value) if value.is_integer() else None
    else:
        number = value
    return number if number is not None and -(2**63) <= number < 2**63 else None


def _spelled(text: str) -> int | None:
    if len(text) > 20 or not text.isascii():
        return None
    try:
        return int(text)
    except ValueError:
        return None


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
    cloud = "" if bk_cloud_id is None else str(bk_cloud_id)
    # Nearly all are integers, which need no cleaning.
    return Host(cloud[:64] if isinstance(bk_cloud_id, int) else clean_text(cloud, 64), key, clean_text(ip, 64))
