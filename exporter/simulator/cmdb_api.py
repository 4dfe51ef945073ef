"""The CMDB of the simulated platform: search_business and list_business_set.

A user without permission gets an empty list and success; for business sets the list is then `info: null`. The same
happens when IAM fails. Facts: bk-cmdb inst_business.go, inst_business_set.go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from exporter.model import Scope
from exporter.simulator.answer import Answer
from exporter.simulator.platform import Call, Endpoint, Platform

GATEWAY = "/api/bk-cmdb/prod/api/v3"
ESB = "/api/c/compapi/v2/cc"
PAGE = 1000
"""The largest page of CMDB."""


@dataclass
class CmdbWorld:
    """The businesses and business sets, and which of them the user may see. Changed attributes take effect with the
    next request.

    `visible`: ids of the businesses and sets that the user may see, None for all. `archived`: businesses that the
    lists leave out. `iam_fails`: search_business refuses, list_business_set answers an empty list.
    """

    businesses: dict[int, str] = field(default_factory=dict)
    sets: dict[int, str] = field(default_factory=dict)
    archived: set[int] = field(default_factory=set)
    visible: set[int] | None = None
    iam_fails: bool = False

    @classmethod
    def of(cls, scopes: Iterable[Scope]) -> CmdbWorld:
        """A CMDB with these scopes."""
        world = cls()
        for scope in scopes:
            if scope.bk_scope_type == "biz":
                world.businesses[int(scope.bk_scope_id)] = f"业务{scope.bk_scope_id}"
            elif scope.bk_scope_type == "biz_set":
                world.sets[int(scope.bk_scope_id)] = f"业务集{scope.bk_scope_id}"
        return world


def routes(platform: Platform) -> list[Endpoint]:
    """The CMDB routes of gateway and ESB. They use `platform.cmdb`; if it is not set, it is created from the
    platform's scopes."""
    if platform.cmdb is None:
        platform.cmdb = CmdbWorld.of(platform.scopes)

    def world() -> CmdbWorld:
        assert isinstance(platform.cmdb, CmdbWorld)
        return platform.cmdb

    def businesses(call: Call) -> Answer:
        shown = {id: name for id, name in world().businesses.items() if id not in world().archived}
        if not call.user:
            return _refused(1199001, "the request has no user")
        if world().iam_fails:
            return _refused(1110008, "get authorized business list failed")
        return _listed(call, world(), shown, "bk_biz", counted=True)

    def sets(call: Call) -> Answer:
        if not call.user:
            return _refused(1199001, "the request has no user")
        return _listed(call, world(), {} if world().iam_fails else world().sets, "bk_biz_set", counted=False)

    return [
        Endpoint(("POST",), f"{GATEWAY}/biz/search/{{account}}", "search_business", "gateway", True, businesses),
        Endpoint(("POST",), f"{GATEWAY}/findmany/biz_set", "list_business_set", "gateway", True, sets),
        Endpoint(("POST",), f"{ESB}/search_business/", "search_business", "esb", False, businesses),
        Endpoint(("POST",), f"{ESB}/list_business_set/", "list_business_set", "esb", False, sets),
    ]


def _listed(call: Call, world: CmdbWorld, names: dict[int, str], prefix: str, *, counted: bool) -> Answer:
    page = call.params.get("page")
    start, limit = (page.get("start", 0), page.get("limit", 0)) if isinstance(page, dict) else (0, 0)
    if not isinstance(start, int) or not isinstance(limit, int) or not 0 < limit <= PAGE:
        return _refused(1199006, "page.limit is invalid")
    seen = sorted(id for id in names if world.visible is None or id in world.visible)
    fields = call.params.get("fields")
    wanted = fields if isinstance(fields, list) and fields else [f"{prefix}_id", f"{prefix}_name"]
    rows = [
        {name: value for name, value in ((f"{prefix}_id", id), (f"{prefix}_name", names[id])) if name in wanted}
        for id in seen[start : start + limit]
    ]
    info = rows if rows or counted else None
    return _answer(0, "success", {"count": len(seen) if counted else 0, "info": info})


def _refused(code: int, message: str) -> Answer:
    return _answer(code, message, None)


def _answer(code: int, message: str, data: object) -> Answer:
    return Answer({
        "result": code == 0, "code": code, "bk_error_code": code, "message": message, "bk_error_msg": message,
        "permission": None, "data": data,
    })  # fmt: skip
