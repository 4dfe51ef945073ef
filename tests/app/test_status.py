"""What a real daemon shows beside the metrics: links to the platform, the size of the page."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

from exporter.simulator.world import StepScript, target
from tests.support.process import BIZ, OTHER, Daemon, Simulated, configuration, select, total

WEB_URL = "https://job.example.com/site"
SIZE = "blueking_exporter_exposition_bytes"


def test_failures_lead_to_the_pages_of_job(tmp_path: Path, simulated: Simulated) -> None:
    """With `web_url` the executions and hosts of /api/v1/failures have the address of JOB's page, else null."""
    config = configuration(simulated.url, blueking={"job": {"web_url": f"{WEB_URL}/"}})
    with Daemon(tmp_path, config) as daemon:
        daemon.wait_success()
        step = StepScript(duration=0.0, results={target(1): (104, 1)})
        id = simulated.start(name="nightly", steps=[step])
        daemon.wait_success()
        (execution,), (host,) = json.loads(daemon.get("/api/v1/failures")[1]).values()
        assert execution["job_instance_id"] == host["job_instance_id"] == id
        assert execution["url"] == host["url"] == f"{WEB_URL}/api_execute/{id}"
        assert execution["job_id"] is host["job_id"] is None
    with Daemon(tmp_path, configuration(simulated.url)) as daemon:
        (execution,), (host,) = json.loads(daemon.get("/api/v1/failures")[1]).values()
        assert execution["url"] is host["url"] is None


def rows(daemon: Daemon, query: str = "") -> list[str]:
    """The text of each host of the page /failures?query."""
    status, body = daemon.get(f"/failures{query and '?'}{query}")
    assert status == 200, body
    found = re.findall(r'<tr><td class="host">(.*?)</tr>', body.decode(), re.DOTALL)
    return [" ".join(re.sub("<[^>]*>", " ", row).split()) for row in found]


def test_the_failures_page_of_a_daemon(tmp_path: Path, simulated: Simulated) -> None:
    """Hosts oldest first, 200 at a time, with reason, streak and link; every filter; executions newest first."""
    config = configuration(simulated.url, [BIZ, OTHER], blueking={"job": {"web_url": WEB_URL}})
    with Daemon(tmp_path, config) as daemon:
        daemon.wait_success()
        results = {target(number): (310, None) if number % 10 == 0 else (104, 1) for number in range(1, 251)}
        first = simulated.start(name="Nightly", steps=[StepScript(duration=0.0, results=results)])
        daemon.wait_success()
        again = simulated.start(name="Nightly", steps=[StepScript(duration=0.0, results={target(1): (104, 1)})])
        other = simulated.start(OTHER, name="Weekly", steps=[StepScript(duration=0.0, results={target(900): (104, 1)})])
        daemon.wait_success()
        daemon.wait_success(OTHER)

        executions = [row for row in rows(daemon) if "ago" in row]
        hosts = [row for number in (1, 2) for row in rows(daemon, f"page={number}") if "ago" not in row]
        assert [row.split()[0] for row in executions] == ["Weekly", "Nightly", "Nightly"]
        assert len(hosts) == len(set(hosts)) == 251
        (row,) = (row for row in hosts if row.startswith("10.0.0.1 "))
        assert row.startswith("10.0.0.1 host 101 · cloud 0 Scope biz/2 biz/ 2 job script nonzero exit 104 ")
        assert row.endswith(f" 2 {again}")
        assert hosts[-1].startswith("10.0.3.132 "), "the newest streak is the last"
        page = daemon.get("/failures")[1].decode()
        assert f'<a href="{WEB_URL}/api_execute/{first}" rel="noreferrer">{first}</a>' in page
        assert "<b>226</b>" in page, "hosts with the most frequent reason"

        def found(query: str) -> tuple[int, int]:
            every = rows(daemon, query)
            return sum("ago" not in row for row in every), sum("ago" in row for row in every)

        assert found("bk_scope_type=biz&bk_scope_id=3") == (1, 1)
        assert found("bk_scope_type=biz_set") == (0, 0)
        assert found("code=310") == (25, 0), "executions have no code"
        assert found("code=310&bk_scope_id=3") == (0, 0)
        assert found("collector=job&text=10.0.3.132") == (1, 0)
        assert found("collector=nodeman_job") == (0, 0)
        assert found("text=WEEKLY") == (0, 1)
        assert found("text=agent_abnormal") == (25, 0)
        assert found(f"text={other}") == (0, 1)
        assert found("text=scope+biz/3") == (1, 1), "the name of the scope"

        assert "newest poll" not in page
        simulated.fault("http_502", bk_scope_type="biz", bk_scope_id="3")
        daemon.wait(lambda page: bool(select(page, "blueking_exporter_collector_errors_total", bk_scope_id="3")))
        assert "The newest poll of 1 scopes" in daemon.get("/failures")[1].decode()
        assert found("bk_scope_id=3") == (1, 1), "what was known stays"


def test_exposition_bytes_is_the_size_of_the_whole_page(tmp_path: Path, simulated: Simulated) -> None:
    """The newest whole page before compression, whatever selection or compression was asked for since."""
    with Daemon(tmp_path, configuration(simulated.url)) as daemon:
        daemon.wait_success()
        size = len(daemon.get("/metrics")[1])
        for path in ("/metrics?name[]=up", f"/metrics?name[]={SIZE}"):
            daemon.get(path)
        assert total(daemon.metrics(SIZE), SIZE) == size
        status, body = daemon.get("/metrics", headers={"Accept-Encoding": "gzip"})
        page = gzip.decompress(body)
        assert (status, len(body) < len(page)) == (200, True)
        assert total(daemon.metrics(SIZE), SIZE) == len(page)
        status, body = daemon.get("/metrics", headers={"Accept": "application/openmetrics-text"})
        assert total(daemon.metrics(SIZE), SIZE) == len(body)
