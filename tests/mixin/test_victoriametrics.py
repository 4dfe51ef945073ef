"""VictoriaMetrics: its vmalert evaluates every rule, and it answers every query of the dashboards."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest

from mixin.render import HERE, evaluate
from tests.mixin.conftest import NEWEST
from tests.support.components import Server, Stack, eventually, http
from tests.support.paths import GOLDEN


@pytest.fixture(scope="module")
def victoria() -> Iterator[Server]:
    """A VictoriaMetrics that holds the golden page."""
    if not (NEWEST / "vmalert").exists():
        pytest.skip("VictoriaMetrics is not here; scripts/newer_components.sh says why")
    with Stack() as stack:
        server = stack.server(
            "victoria-metrics",
            [
                str(NEWEST / "victoria-metrics"),
                "-storageDataPath={folder}/data",
                "-httpListenAddr={address}",
                "-retentionPeriod=1d",
                "-search.latencyOffset=0s",
            ],
            "/health",
        )
        page = (GOLDEN / "page.prom").read_bytes()
        status, _ = http(f"{server.url}/api/v1/import/prometheus?extra_label=job=blueking&extra_label=instance=x", page)
        assert status == 204
        yield server


def test_vmalert_evaluates_every_rule(victoria: Server) -> None:
    """Each recording rule and alert is healthy after its first evaluation."""
    with Stack() as stack:
        vmalert = stack.server(
            "vmalert",
            [
                str(NEWEST / "vmalert"),
                *(f"-rule={HERE}/prometheus/{name}.yml" for name in ("rules", "alerts")),
                f"-datasource.url={victoria.url}",
                f"-remoteWrite.url={victoria.url}",
                "-notifier.blackhole",
                "-evaluationInterval=1s",
                "-httpListenAddr={address}",
            ],
            "/health",
        )

        def evaluated() -> list[dict[str, str]]:
            groups = vmalert.json("/api/v1/rules")["data"]["groups"]
            rules: list[dict[str, str]] = [rule for group in groups for rule in group["rules"]]
            return rules if all(rule["health"] != "unknown" and rule["lastEvaluation"] > "2" for rule in rules) else []

        rules = eventually(evaluated)
    mixin = evaluate()
    parts = (mixin["prometheusRules"], mixin["prometheusAlerts"])
    assert len(rules) == sum(len(group["rules"]) for part in parts for group in part["groups"])
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


@pytest.mark.parametrize("file", sorted((HERE / "grafana").glob("*.json")), ids=lambda file: file.stem)
def test_victoriametrics_answers_every_query_of_the_dashboards(victoria: Server, file: pathlib.Path) -> None:
    """With each variable set to match anything."""
    expressions = re.findall(r'"expr": ("(?:[^"\\]|\\.)*")', file.read_text(encoding="utf-8"))
    assert expressions
    for expression in expressions:
        query = re.sub(r"\$\{?__(?:rate_)?interval\}?|\$\{?__range\}?", "5m", json.loads(expression))
        query = re.sub(r"\$\{?\w+\}?", ".*", query)
        status, body = http(f"{victoria.url}/api/v1/query", data=urlencode({"query": query}).encode())
        assert status == 200, f"{query}: {body.decode()}"
