"""Dashboards as far as they can be tried without Grafana, and every other query that we ship.

Queries of dashboards and of the cookbook are run against a real Prometheus that scrapes the demo, and have to bring
numbers; those of runbooks and rules have to run. The JSON is checked against the types that Grafana itself is built
with.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import subprocess
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from mixin.render import evaluate
from tests.support.components import IN_CI, LOOPBACK, Prometheus, Stack, eventually, free_port, require
from tests.support.paths import ROOT
from tests.support.process import PROGRAM, environment

DASHBOARDS: dict[str, dict[str, Any]] = evaluate()["grafanaDashboards"]
BUILT_IN = {"__rate_interval": "30s", "__range": "2m"}
SCHEMA = ("@grafana/schema@13.2.3", "typescript@7.0.2")
OPTIONS = {"timeseries": "TimeSeries", "stat": "Stat", "bargauge": "BarGauge", "heatmap": "Heatmap", "table": "Table"}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries_of(page: pathlib.Path) -> list[str]:
    """The PromQL of a page; a blank line separates two queries."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```promql\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [query.strip() for block in blocks for query in block.split("\n\n")]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    """No two panels share a cell of the grid, none leaves it, each has an id of its own."""
    cells: dict[tuple[int, int], str] = {}
    for panel in DASHBOARDS[name]["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in cells, f"{panel['title']} covers {cells[x, y]}"
                cells[x, y] = panel["title"]
    ids = [panel["id"] for panel in DASHBOARDS[name]["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_say_what_they_show(name: str) -> None:
    """Titles and descriptions are there in both languages, every panel has a unit, graphs list all values at once."""
    dashboard = DASHBOARDS[name]
    assert dashboard["graphTooltip"] == 1
    for panel in [*dashboard["panels"], dashboard]:
        assert re.search(r"[A-Za-z]", panel["title"]), panel["title"]
    for panel in panels(dashboard):
        assert re.search(r"[\u4e00-\u9fff]|IP|CPU", panel["title"]), panel["title"]
        assert re.search(r"[A-Za-z].*[\u4e00-\u9fff]", panel["description"]), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        if panel["type"] == "timeseries":
            assert panel["options"]["tooltip"] == {"mode": "multi", "sort": "desc"}, panel["title"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_can_be_imported_anywhere(name: str) -> None:
    """The uid is stable, there is no numeric id, and every query goes to the data source that the viewer chooses."""
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == "blueking-" + name.removesuffix(".json")
    assert dashboard["schemaVersion"] >= 39, "that of Grafana 11"
    assert not {"id", "__inputs", "__requires"} & dashboard.keys()
    variables = dashboard["templating"]["list"]
    assert variables[0]["type"] == "datasource"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    queries = [
        *panels(dashboard),
        *variables[1:],
        *(query for panel in panels(dashboard) for query in panel["targets"]),
    ]
    assert all(query["datasource"] == chosen for query in queries)


def test_links_between_dashboards_lead_somewhere() -> None:
    """Each /d/UID in a link is the uid of a dashboard here, and sets variables that it has."""
    links = set(re.findall(r'"(/d/[^"]+)"', json.dumps(DASHBOARDS)))
    assert links
    for link in links:
        uid, query = re.fullmatch(r"/d/([^?]+)\?(.*)", link).groups()  # type: ignore[union-attr]
        (target,) = [dashboard for dashboard in DASHBOARDS.values() if dashboard["uid"] == uid]
        names = {variable["name"] for variable in target["templating"]["list"]}
        assert set(re.findall(r"var-(\w+)=", query)) <= names


@pytest.mark.component
def test_json_fits_the_types_of_grafana() -> None:
    """TypeScript accepts each dashboard, and the options of each panel, as what Grafana's own code works with."""
    lines = ["import type { Dashboard } from '@grafana/schema';"]
    for kind, type_name in OPTIONS.items():
        module = f"@grafana/schema/dist/esm/raw/composable/{kind}/panelcfg/x/{type_name}PanelCfg_types.gen"
        lines.append(f"import type {{ Options as {type_name} }} from '{module}';")
    # In JSON the value of an enum is a plain word.
    lines.append(
        "type Plain<T> = T extends string ? `${T}` : T extends number | boolean | null | undefined ? T"
        " : T extends (infer U)[] ? Plain<U>[] : { [K in keyof T]: Plain<T[K]> };"
    )
    for name, dashboard in DASHBOARDS.items():
        lines.append(f"// {name}\nexport const d{len(lines)}: Plain<Dashboard> = {json.dumps(dashboard)};")
        for panel in panels(dashboard):
            kind, options = OPTIONS[panel["type"]], json.dumps(panel["options"])
            lines.append(f"// {panel['title']}\nexport const o{len(lines)}: Plain<Partial<{kind}>> = {options};")
    folder = ROOT / ".cache/grafana-schema"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules/.bin/tsc").exists():
        npm = [require("npm"), "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"]
        (folder / "package.json").write_text('{"private": true}')
        result = subprocess.run([*npm, *SCHEMA], cwd=folder, check=False, capture_output=True, text=True)
        if result.returncode:
            reason = f"npm does not get {' '.join(SCHEMA)}: {result.stderr[-300:]}"
            pytest.fail(reason, pytrace=False) if IN_CI else pytest.skip(reason)
    (folder / "dashboards.ts").write_text("\n".join(lines), encoding="utf-8")
    tsc = [str(folder / "node_modules/.bin/tsc"), "--noEmit", "--skipLibCheck", "--strict", "--target", "es2022"]
    tsc += ["--module", "esnext", "--moduleResolution", "bundler", "dashboards.ts"]
    result = subprocess.run(tsc, cwd=folder, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def demo(components: None) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `blueking-exporter demo`."""
    require("prometheus")
    port = free_port()
    with (
        Stack(deadline=400) as stack,
        subprocess.Popen(
            [*PROGRAM, "demo", f"--web.listen-address={LOOPBACK}:{port}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        ) as process,
    ):  # fmt: skip
        try:
            yield stack.prometheus([f"{LOOPBACK}:{port}"])
        finally:
            process.terminate()


def values_of(prometheus: Prometheus, query: str) -> list[str]:
    """What a variable offers: label_values(metric, label)."""
    metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
    found: list[str] = prometheus.json(f"/api/v1/label/{label}/values?" + urllib.parse.urlencode({"match[]": metric}))[
        "data"
    ]
    return found


def substitute(query: str, chosen: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: chosen[match[1]], query)


def choose(prometheus: Prometheus, dashboard: dict[str, Any]) -> dict[str, str]:
    """A value for each variable, taken from what its query offers."""
    chosen = dict(BUILT_IN)
    for variable in dashboard["templating"]["list"][1:]:
        query = substitute(variable["query"]["query"], chosen)
        offered = eventually(lambda query=query: values_of(prometheus, query), 20)  # type: ignore[misc]
        chosen[variable["name"]] = variable.get("allValue") or offered[0]
    return chosen


def has_numbers(prometheus: Prometheus, query: str) -> bool:
    return any(math.isfinite(float(series["value"][1])) for series in prometheus.query(query))


def without_data(prometheus: Prometheus, queries: dict[str, str], seconds: float = 75.0) -> dict[str, str]:
    """Those of `queries` (name → PromQL) that never had a finite value within the time."""
    missing = dict(queries)

    def all_seen() -> bool:
        for name, query in list(missing.items()):
            if has_numbers(prometheus, query):
                del missing[name]
        return not missing

    try:
        eventually(all_seen, seconds, 0.5)
    except TimeoutError:
        return missing
    return {}


@pytest.mark.component
@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_of_a_dashboard_has_data(name: str, demo: Prometheus) -> None:
    """With values that the variables themselves offer, each query of each panel brings a number from the demo."""
    chosen = choose(demo, DASHBOARDS[name])
    queries = {
        f"{panel['title']} {query['refId']}": substitute(query["expr"], chosen)
        for panel in panels(DASHBOARDS[name])
        for query in panel["targets"]
    }
    assert len(queries) >= len(panels(DASHBOARDS[name]))
    assert not without_data(demo, queries)


@pytest.mark.component
def test_table_columns_come_from_their_queries(demo: Prometheus) -> None:
    """Every column of a table is a label of one of its queries or the value of one."""
    for dashboard in DASHBOARDS.values():
        chosen = choose(demo, dashboard)
        for panel in panels(dashboard):
            if panel["type"] != "table":
                continue
            fields = (
                {"Value"} if len(panel["targets"]) == 1 else {f"Value #{query['refId']}" for query in panel["targets"]}
            )
            for query in panel["targets"]:
                for series in demo.query(substitute(query["expr"], chosen)):
                    fields |= series["metric"].keys()
            columns = panel["transformations"][1]["options"]["include"]["names"]
            assert set(columns) <= fields, panel["title"]


@pytest.mark.component
def test_every_query_of_the_cookbook_has_data(demo: Prometheus) -> None:
    """The queries that answer the ten questions bring numbers from the demo, and are the same in both languages."""
    queries = queries_of(ROOT / "docs/en/cookbook.md")
    assert queries == queries_of(ROOT / "docs/zh/cookbook.md")
    assert len(queries) >= 10
    assert not without_data(demo, dict(zip(queries, queries, strict=True)))


@pytest.mark.component
def test_every_query_of_runbooks_and_rules_runs(demo: Prometheus) -> None:
    """Each is more than PromQL that parses: labels match where series are joined. Answers may be empty."""
    mixin = evaluate()
    rules = [
        rule
        for part in ("prometheusRules", "prometheusAlerts")
        for group in mixin[part]["groups"]
        for rule in group["rules"]
    ]
    queries = [rule["expr"] for rule in rules]
    for runbook in sorted((ROOT / "docs/en/runbooks").iterdir()):
        queries += queries_of(runbook)
    assert len(queries) > 60
    for query in queries:
        demo.query(query)
