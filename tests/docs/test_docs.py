"""Runbooks and pages: both languages say the same, every alert has its runbook, every query asks for what exists."""

from __future__ import annotations

import pathlib
import re

import pytest

from exporter.exposed import COLLECTOR_FAMILIES, page_families
from exporter.telemetry import PROCESS_FAMILIES, SHARING_FAMILIES
from mixin.render import evaluate
from tests.support.components import check_promql
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
MIXIN = evaluate()
ALERTS = [rule["alert"] for group in MIXIN["prometheusAlerts"]["groups"] for rule in group["rules"]]
RECORDS = [rule["record"] for group in MIXIN["prometheusRules"]["groups"] for rule in group["rules"]]
PAGES = ["cookbook.md", "connect.md", "verify.md", *(f"runbooks/{alert}.md" for alert in ALERTS)]
SECTIONS = {
    "en": ["Meaning", "Impact", "Diagnosis", "Mitigation"],
    "zh": ["含义", "影响", "诊断", "处理"],
}
TARGET_METRICS = {"up", "scrape_duration_seconds", "process_start_time_seconds"}
"""What a page may use beside our own: of Prometheus and of every process."""


def read(language: str, page: str) -> str:
    return (DOCS / language / page).read_text(encoding="utf-8")


def blocks(text: str, kind: str = "[a-z]*") -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def queries(text: str) -> list[str]:
    return [query.strip() for block in blocks(text, "promql") for query in block.split("\n\n")]


def known_names() -> set[str]:
    """Every sample name that the exporter may show, and what the rules record."""
    names = {*RECORDS, *TARGET_METRICS}
    for family in (*page_families(), *COLLECTOR_FAMILIES, *PROCESS_FAMILIES, *SHARING_FAMILIES):
        histogram = [family.name + suffix for suffix in ("_bucket", "_sum", "_count")]
        names |= set(histogram) if family.kind == "histogram" else {family.name}
    return names


def used_names(query: str) -> set[str]:
    """The metrics of a query: words with our prefix, of a recording rule or of a target, outside quotes."""
    bare = re.sub(r'"[^"]*"', "", query)
    return set(re.findall(r"\b(?:[a-z_]+:)?blueking_[a-z0-9_:]+|\bup\b|\b(?:process|scrape)_[a-z_]+", bare))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_alert_has_its_runbook_and_no_other_exists(language: str) -> None:
    """The folder of runbooks is the list of alerts."""
    assert {file.stem for file in (DOCS / language / "runbooks").iterdir()} == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_a_runbook_leads_from_meaning_to_mitigation(alert: str) -> None:
    """Four sections in both languages, queries to diagnose with, and where the ids of failures are."""
    for language, sections in SECTIONS.items():
        text = read(language, f"runbooks/{alert}.md")
        assert text.startswith(f"# {alert}\n")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == sections
        assert len(queries(text)) >= 2
        assert "/api/v1/failures" in text
        assert re.search(r"^- ", text.split(f"## {sections[3]}")[1], re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_parts(page: str) -> None:
    """Code blocks are the same; headings, list items, table rows and links correspond; each links to the other."""

    def shape(language: str) -> tuple[object, ...]:
        text = read(language, page)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        counts = [len(re.findall(pattern, prose, re.MULTILINE)) for pattern in (r"^#+ ", r"^- ", r"^\|")]
        links = sorted(
            link for link in re.findall(r"\]\(([^)]+)\)", prose) if "/en/" not in link and "/zh/" not in link
        )
        return blocks(text), counts, links

    assert shape("en") == shape("zh")
    up = "../" * (page.count("/") + 1)
    assert f"({up}zh/{page})" in read("en", page)
    assert f"({up}en/{page})" in read("zh", page)
    assert not re.search(r"[\u4e00-\u9fff]", read("en", page).split("\n", 4)[4]), "no Chinese left in English"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(language: str, page: str) -> None:
    """Each relative link names a file that exists."""
    links = re.findall(r"\]\(([^)#:]+)\)", read(language, page))
    assert links
    here = (DOCS / language / page).parent
    assert not [link for link in links if not (here / link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_queries_use_metrics_that_exist(page: str) -> None:
    """Each metric of a query is in the catalogue, recorded by a rule, or Prometheus' own."""
    for query in queries(read("en", page)):
        assert used_names(query)
        assert not used_names(query) - known_names(), query


def test_rules_and_dashboards_use_metrics_that_exist() -> None:
    """The same for every expression of the mixin, templates of texts included."""
    rules = [
        rule
        for part in ("prometheusRules", "prometheusAlerts")
        for group in MIXIN[part]["groups"]
        for rule in group["rules"]
    ]
    expressions = [rule["expr"] for rule in rules]
    for dashboard in MIXIN["grafanaDashboards"].values():
        expressions += [query["expr"] for panel in dashboard["panels"] for query in panel.get("targets", [])]
        expressions += [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    used = set().union(*map(used_names, expressions))
    own = {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds"}
    assert used - known_names() == own, "of prometheus_client"


@pytest.mark.component
def test_queries_of_all_pages_are_promql(tmp_path: pathlib.Path) -> None:
    """promtool parses each query."""
    check_promql([query for page in PAGES for query in queries(read("en", page))], tmp_path)


def test_the_cookbook_answers_ten_questions() -> None:
    """Ten headings, a query under each."""
    parts = read("en", "cookbook.md").split("\n## ")[1:]
    assert len(parts) == 10
    assert all(queries(part) for part in parts)
