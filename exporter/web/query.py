"""The parameters of a request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import get_args

from aiohttp.web_request import BaseRequest

from exporter.model import ScopeType
from exporter.status import FailureFilter

LONGEST_TEXT = 200
_ID = re.compile("[1-9][0-9]{0,18}")
_PAGE = re.compile("[1-9][0-9]{0,5}")


class QueryError(Exception):
    """A parameter is wrong. The text says which and why; it does not repeat the value."""


def parameters(request: BaseRequest, known: Iterable[str]) -> dict[str, str]:
    """The value of each known parameter, "" for one that is absent. Raises QueryError for a repeated or unknown one."""
    values = dict.fromkeys(known, "")
    given: set[str] = set()
    for name, value in request.query.items():
        if name not in values:
            raise QueryError(f"known parameters: {', '.join(values)}")
        if name in given:
            raise QueryError(f"{name} is given twice")
        given.add(name)
        values[name] = value
    return values


def failure_filter(values: dict[str, str]) -> FailureFilter:
    """The filter of these parameters, those that are absent match everything. Raises QueryError."""
    wanted = FailureFilter(**{name: value.strip() for name, value in values.items() if name in _FILTERS})
    if wanted.bk_scope_type not in ("", *get_args(ScopeType)):
        raise QueryError(f"bk_scope_type: want {', '.join(get_args(ScopeType))}")
    if wanted.bk_scope_id and not _ID.fullmatch(wanted.bk_scope_id):
        raise QueryError("bk_scope_id: want a positive number")
    if max(len(wanted.collector), len(wanted.code), len(wanted.text)) > LONGEST_TEXT:
        raise QueryError(f"want at most {LONGEST_TEXT} characters")
    return wanted


def page_number(value: str) -> int:
    """A page, counted from 1; the first when it is absent. Raises QueryError."""
    if value and not _PAGE.fullmatch(value):
        raise QueryError("page: want a number from 1")
    return int(value or 1)


_FILTERS = FailureFilter.__struct_fields__
