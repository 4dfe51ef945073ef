"""Tests with real components run twice: with the installed ones, and with the newest that Debian has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

NEWEST = ROOT / ".cache/newer/root/usr/bin"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Add the fixture below to every test that is marked `component`."""
    if metafunc.definition.get_closest_marker("component"):
        if "components" not in metafunc.fixturenames:
            metafunc.fixturenames.insert(0, "components")
        metafunc.parametrize("components", ["installed", "newest"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def components(request: pytest.FixtureRequest) -> Iterator[None]:
    """Put the newest components first in PATH. They are not available everywhere, so they are skipped also in CI."""
    if request.param == "installed":
        yield
        return
    if not (NEWEST / "promtool").exists():
        pytest.skip("the newest components are not here; scripts/newer_components.sh says why")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{NEWEST}{os.pathsep}{os.environ['PATH']}")
        yield
