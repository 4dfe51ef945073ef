"""Scopes of several tenants, seen from outside."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from exporter.model import Scope
from tests.support.components import eventually
from tests.support.process import BIZ, OTHER, Daemon, Simulated, configuration, scope_entry, select

INFO = "blueking_scope_info"
THIRD = Scope("biz", "4")


def test_each_scope_asks_with_its_own_user_and_tenant(tmp_path: Path) -> None:
    """As configured for the scope, else in blueking.auth; the tenant is a label; a reload exchanges it."""
    with Simulated(BIZ, OTHER, THIRD) as simulated:
        simulated.platform.tenants = {BIZ: "red", OTHER: "blue", THIRD: "default"}
        config = configuration(simulated.url, blueking={"auth": {"tenant_id": "default"}})
        config["scopes"] = [
            {**scope_entry(BIZ), "auth": {"username": "ops-red", "tenant_id": "red"}},
            {**scope_entry(OTHER), "auth": {"tenant_id": "wrong"}},
            scope_entry(THIRD),
        ]
        with Daemon(tmp_path, config) as daemon:
            daemon.wait_success()
            daemon.wait_success(THIRD)
            refused = {"reason": "permission", "bk_scope_id": "3"}
            page = daemon.wait(lambda page: bool(select(page, "blueking_exporter_collector_errors_total", **refused)))
            assert {
                (labels["bk_scope_id"], labels["name"], labels["tenant_id"]) for labels in map(dict, select(page, INFO))
            } == {("2", "Scope biz/2", "red"), ("3", "Scope biz/3", "wrong"), ("4", "Scope biz/4", "default")}
            users = simulated.do(lambda platform: {(call.scope, call.user, call.tenant_id) for call in platform.calls})
            assert {("biz/2", "ops-red", "red"), ("biz/4", "admin", "default")} <= users

            config["scopes"][1]["auth"] = {"tenant_id": "blue"}
            daemon.write(config)
            daemon.signal(signal.SIGHUP)
            page = daemon.wait_success(OTHER)
            assert select(page, INFO, bk_scope_id="3", tenant_id="blue")
            assert not select(page, INFO, tenant_id="wrong")


@pytest.mark.parametrize("tenant", ["red", None])
def test_the_label_is_there_where_a_tenant_is_set(tmp_path: Path, tenant: str | None) -> None:
    """Without tenants nothing changes."""
    with Simulated(BIZ) as simulated:
        config = configuration(simulated.url, blueking={"auth": {"tenant_id": tenant}})
        with Daemon(tmp_path, config) as daemon:
            (labels,) = eventually(lambda: select(daemon.metrics(), INFO))
    expected = {"bk_scope_type": "biz", "bk_scope_id": "2", "name": "Scope biz/2"}
    assert dict(labels) == expected | ({"tenant_id": tenant} if tenant else {})
