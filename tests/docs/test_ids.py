"""Every id that code and tests cite (F39, 4.1.4) leads to a page, in both languages."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT

CODE = [
    file
    for folder in ("exporter", "tests", "bench", "mixin", "scripts")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file.name != "test_ids.py"
]
FAULT = re.compile(r"\bF\d{2}\b")
SECTION = re.compile(r"(?<![\d.])4\.1\.\d{1,2}(?![\d.]*\d)")


def cited(pattern: re.Pattern[str]) -> set[str]:
    return {found for file in CODE for found in pattern.findall(file.read_text(encoding="utf-8"))}


def page(language: str, name: str) -> str:
    return (ROOT / "docs" / language / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_fault_that_is_cited_has_one_row_in_the_list(language: str) -> None:
    rows = re.findall(r"^\| (F\d{2}) \|", page(language, "faults.md"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert cited(FAULT) <= set(rows)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_section_that_is_cited_has_a_heading(language: str) -> None:
    headings = re.findall(r"^### (4\.1\.\d+) ", page(language, "semantics.md"), re.MULTILINE)
    assert headings == [f"4.1.{number}" for number in range(1, 16)]
    assert cited(SECTION) <= set(headings)


def test_both_languages_list_the_same_faults_in_the_same_order() -> None:
    english, chinese = (re.findall(r"^\| (F\d{2}) \|", page(one, "faults.md"), re.MULTILINE) for one in ("en", "zh"))
    assert english == chinese


def test_every_fault_of_the_list_is_shown_by_a_test() -> None:
    """The page says that the tests carry the id."""
    tests = {
        found
        for file in CODE
        if file.is_relative_to(ROOT / "tests")
        # Names of tests are words joined by underscores, which are word characters to a pattern.
        for found in re.findall(r"F\d{2}(?!\d)", file.read_text(encoding="utf-8"))
    }
    listed = re.findall(r"^\| (F\d{2}) \|", page("en", "faults.md"), re.MULTILINE)
    assert [one for one in listed if one not in tests] == []
