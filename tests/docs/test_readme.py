"""What the README says in two languages is the same, leads somewhere, and is accepted by the tools it is meant for."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

from tests.support.components import check_promql
from tests.support.paths import ROOT

COMMAND = pathlib.Path(sys.executable).with_name("blueking-exporter")
PAIRS = [
    ("README.md", "README.zh-CN.md"),
    ("docs/en/least-privilege.md", "docs/zh/least-privilege.md"),
]
PAGES = [*sum(PAIRS, ()), "CONTRIBUTING.md", "SECURITY.md", "deploy/README.md", "systemd/README.md"]


def blocks(page: str, language: str = "[a-z]*") -> list[str]:
    """The code blocks of a page, without comments and trailing space."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(r"[ ]*#[^\n]*", "", block) for block in found]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_parts(english: str, chinese: str) -> None:
    """Code blocks (comments and display names apart), headings and tables of both languages correspond."""

    def shape(page: str) -> tuple[list[str], int, int]:
        text = (ROOT / page).read_text()
        code = [re.sub(r"name: .*", "name:", block) for block in blocks(page)]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        return code, len(re.findall(r"^#+ ", prose, re.MULTILINE)), len(re.findall(r"^\|", prose, re.MULTILINE))

    assert shape(english) == shape(chinese)


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_lead_somewhere(page: str) -> None:
    """Each relative link names a file or folder that exists."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.component
def test_queries_of_the_readme_are_promql(tmp_path: pathlib.Path) -> None:
    """promtool parses every query of the README."""
    (block,) = blocks("README.md", "promql")
    queries = [query.strip() for query in block.split("\n\n")]
    assert len(queries) >= 5
    check_promql(queries, tmp_path)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_configuration_of_the_readme_is_valid(page: str, tmp_path: pathlib.Path) -> None:
    """The least configuration that the README shows passes `check`."""
    (config, _) = blocks(page, "yaml")
    (tmp_path / "app_secret").write_text("s3cr3t")
    file = tmp_path / "config.yaml"
    file.write_text(re.sub(r"app_secret_file: \S+", "app_secret_file: app_secret", config))
    argv = [str(COMMAND), "check", f"--config.file={file}"]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
