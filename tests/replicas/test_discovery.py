"""Discovery with several replicas: one asks CMDB, all poll what it has found."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.model import Scope
from tests.support.components import Stack, eventually, free_port
from tests.support.process import Daemon, Simulated, configuration, select

pytestmark = pytest.mark.component

SCOPES = [Scope("biz", str(number)) for number in range(2, 8)]
LIST = "search_business"


def test_one_replica_asks_cmdb_and_all_share_what_it_finds(stack: Stack, tmp_path: Path) -> None:
    """Each found scope is on one page. The asking one is killed: another one asks. A start needs no CMDB: what was
    found is in the store."""
    store = stack.redis("--appendonly", "yes")
    with Simulated(*SCOPES) as simulated:
        config = configuration(simulated.url, (), state={"url": f"redis://127.0.0.1:{store.port}", "lease_ttl": "3s"})
        config["blueking"]["cmdb"] = {"url": f"{simulated.url}/api/bk-cmdb/prod"}
        config["discovery"] = {"enabled": True, "interval": "1s"}
        daemons = {}

        def start(pod: str) -> Daemon:
            folder = tmp_path / pod
            folder.mkdir(exist_ok=True)
            daemons[pod] = Daemon(folder, config, environ={"POD_NAME": pod})
            daemons[pod].start()
            return daemons[pod]

        def shown() -> list[str]:
            pages = [one.metrics() for one in daemons.values()]
            infos = [select(page, "blueking_exporter_collector_success") for page in pages]
            return sorted(dict(labels)["bk_scope_id"] for info in infos for labels in info)

        def asking() -> set[str]:
            """The replicas that have asked CMDB so far."""
            name = "blueking_exporter_api_requests_total"
            return {pod for pod, one in daemons.items() if select(one.metrics(), name, api=LIST)}

        expected = sorted(scope.bk_scope_id for scope in SCOPES)
        try:
            start("a")
            start("b")
            eventually(lambda: shown() == expected, 60)
            (first,) = asking()
            daemons.pop(first).kill()
            eventually(lambda: asking() and shown() == expected, 60)
            for pod in list(daemons):
                assert daemons.pop(pod).stop() == 0

            config["blueking"]["cmdb"]["url"] = f"http://127.0.0.1:{free_port()}/api/bk-cmdb/prod"
            start("c")
            eventually(lambda: shown() == expected, 60)
            eventually(lambda: "event=discovery_failed" in daemons["c"].log)
        finally:
            for one in daemons.values():
                one.kill()
