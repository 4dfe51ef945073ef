"""What a real daemon shows beside the metrics: links to the platform, the size of the page."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.simulator.world import StepScript, target
from tests.support.process import Daemon, Simulated, configuration, total

WEB_URL = "https://job.example.com/site"
SIZE = "blueking_exporter_exposition_bytes"


@pytest.fixture
def simulated() -> Iterator[Simulated]:
    with Simulated() as running:
        yield running


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
