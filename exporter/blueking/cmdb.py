"""CMDB: the businesses and business sets that the acting user may see.

search_business      POST URL/api/v3/biz/search/0          ESB: /api/c/compapi/v2/cc/search_business/
list_business_set    POST URL/api/v3/findmany/biz_set      ESB: /api/c/compapi/v2/cc/list_business_set/

CMDB filters by permission without an error: a user without any permission gets an empty list and success. Archived
businesses are left out. A list of sets is also empty when CMDB could not ask IAM. So an empty list never proves that
a scope is gone.
Sources: bk-cmdb inst_business.go, inst_business_set.go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from exporter.blueking.client import Deadline, Operation, ScopeClient
from exporter.blueking.envelope import Empty, Int, ResponseDecoder, WrongShape, listed
from exporter.blueking.text import clean_text
from exporter.config.schema import CmdbPlatform
from exporter.errors import ApiError
from exporter.model import Scope, ScopeType

BUSINESSES = 200
"""Businesses per page: what the documents allow."""
SETS = 500
"""Business sets per page: what the documents allow."""
PAGES = 1000
"""Pages after which a list that does not end is given up."""


class NamedScope(Struct, frozen=True, order=True):
    """A business or business set and its name."""

    scope: Scope
    name: str


class CmdbApi:
    """The lists of one CMDB. Every method reads all pages and raises ApiError only."""

    def __init__(self, client: ScopeClient, platform: CmdbPlatform) -> None:
        self._client = client
        self._esb = platform.api == "esb"
        self._url = platform.url

    async def businesses(self, deadline: Deadline) -> list[NamedScope]:
        """All businesses that are not archived."""
        url = self._address("search_business", "biz/search/0")
        return await self._read("search_business", url, "bk_biz", BUSINESSES, _BUSINESSES, deadline)

    async def business_sets(self, deadline: Deadline) -> list[NamedScope]:
        """All business sets."""
        url = self._address("list_business_set", "findmany/biz_set")
        return await self._read("list_business_set", url, "bk_biz_set", SETS, _SETS, deadline)

    def _address(self, component: str, path: str) -> str:
        return f"{self._url}/api/c/compapi/v2/cc/{component}/" if self._esb else f"{self._url}/api/v3/{path}"

    async def _read(
        self,
        api: str,
        url: str,
        prefix: str,
        limit: int,
        decoders: Sequence[ResponseDecoder[Any, _Page]],
        deadline: Deadline,
    ) -> list[NamedScope]:
        """Read pages by ascending id until one is not full. Changes in CMDB during the reading may shift a page."""
        found: dict[Scope, NamedScope] = {}
        total = 0
        for number in range(PAGES):
            params: dict[str, object] = {
                "fields": [f"{prefix}_id", f"{prefix}_name"],
                "page": {"start": number * limit, "limit": limit, "sort": f"{prefix}_id"},
            }
            if self._esb:
                params["bk_supplier_account"] = "0"
            operation = Operation(api, "cmdb", "esb" if self._esb else "app", "POST", url, params)
            page = await self._client.call(operation, decoders, deadline=deadline)
            total = max(total, page.count)
            found |= {one.scope: one for one in page.found}
            if page.rows < limit:
                break
        else:
            raise ApiError("decode", f"{api} does not end after {PAGES} pages", api=api)
        if len(found) < total:
            raise ApiError("decode", f"{api} gives {len(found)} of {total}", api=api)
        return list(found.values())


class _Page(Struct, frozen=True):
    """`count`: number of all matches, 0 where the API does not report it; `rows`: those of this page."""

    count: int
    rows: int
    found: list[NamedScope]


class _Business(Struct, gc=False):
    bk_biz_id: Int
    bk_biz_name: str = ""


class _Set(Struct, gc=False):
    bk_biz_set_id: Int
    bk_biz_set_name: str = ""


class _Businesses(Struct):
    count: Int = 0
    info: list[_Business] | Empty | None = None


class _Sets(Struct):
    info: list[_Set] | Empty | None = None


def _page_of(type_: ScopeType, count: int, rows: Sequence[tuple[int, str]]) -> _Page:
    for id, _ in rows:
        if id <= 0:
            raise WrongShape(f"data.info has the id {id}")
    return _Page(count, len(rows), [NamedScope(Scope(type_, str(id)), clean_text(name)) for id, name in rows])


def _businesses(data: _Businesses) -> _Page:
    return _page_of("biz", data.count, [(row.bk_biz_id, row.bk_biz_name) for row in listed(data.info)])


def _sets(data: _Sets) -> _Page:
    return _page_of("biz_set", 0, [(row.bk_biz_set_id, row.bk_biz_set_name) for row in listed(data.info)])


def _decoders(wire: type[Any], build: Callable[[Any], _Page]) -> Sequence[ResponseDecoder[Any, _Page]]:
    return (ResponseDecoder(wire, build, strict=False),)


_BUSINESSES = _decoders(_Businesses, _businesses)
_SETS = _decoders(_Sets, _sets)
