"""The Dockerfile is linted always; the image is built and run by `make image-test` only, because that takes minutes."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.support.components import LOOPBACK, eventually, free_port, http, require
from tests.support.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_dockerfile_passes_hadolint() -> None:
    """hadolint finds nothing to say, with no rule switched off."""
    lint = pathlib.Path(sys.executable).with_name("hadolint")
    result = subprocess.run([lint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")
    assert "hadolint ignore" not in DOCKERFILE


def test_base_is_pinned_by_digest() -> None:
    """The default base image is named by a digest, and it can be replaced by a build argument."""
    assert re.search(r"^ARG PYTHON_IMAGE=\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${PYTHON_IMAGE}", "scratch"]


def image(*arguments: str, timeout: float = 900) -> str:
    """The output of scripts/image.sh, which must succeed."""
    result = subprocess.run(
        ["sh", "scripts/image.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built() -> None:
    """The image, built from this very tree on a base of Debian packages."""
    require("buildah", "debootstrap")
    if os.geteuid() != 0:
        pytest.skip("debootstrap and chroot isolation need root")
    image("base")
    image("build")


@pytest.fixture(scope="module")
def files(built: None) -> pathlib.Path:
    """The file system of the image."""
    return pathlib.Path(image("root").strip())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_image_holds_no_shell_and_no_tools(files: pathlib.Path) -> None:
    """No shell, no package manager, no compiler: the executables are the interpreter and our command."""
    executables = {
        path.relative_to(files).as_posix()
        for folder in ("bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin", "opt/blueking-exporter/bin")
        for path in (files / folder).glob("*")
    }
    assert {name for name in executables if not re.search(r"bin/python[0-9.]*$", name)} == {
        "opt/blueking-exporter/bin/blueking-exporter"
    }
    assert not list(files.rglob("pip"))
    assert not list(files.rglob("*.h"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_image_is_configured_as_promised(built: None) -> None:
    """User, entry point, stop signal, health check and OCI labels are in the image's configuration."""
    config: dict[str, Any] = json.loads(image("inspect"))["Docker"]["config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["blueking-exporter"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "blueking-exporter", "healthcheck"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["licenses"] == "MIT"
    assert {"title", "description", "source", "version", "revision"} <= labels.keys()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_image_serves_and_is_healthy_as_nobody(files: pathlib.Path) -> None:
    """Inside the image's own file system, as uid 65532, the demo serves /metrics and the health check agrees."""
    address = f"{LOOPBACK}:{free_port()}"
    # chroot rather than `buildah run`, which does not pass signals on.
    enter = ["chroot", "--userspec=65532:65532", str(files), "/opt/blueking-exporter/bin/blueking-exporter"]
    environment = {"PATH": "/usr/sbin:/usr/bin:/opt/blueking-exporter/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    demo = subprocess.Popen([*enter, "demo", f"--web.listen-address={address}"], env=environment)
    try:
        eventually(lambda: demo.poll() is not None or http(f"http://{address}/-/ready")[0] == 200, seconds=90)
        assert demo.poll() is None
        assert b"blueking_exporter_build_info{" in http(f"http://{address}/metrics")[1]
        check = subprocess.run([*enter, "healthcheck", f"--url=http://{address}"], env=environment, check=False)
        assert check.returncode == 0
        status = pathlib.Path(f"/proc/{demo.pid}/status").read_text()
        assert re.search(r"^Uid:\t65532\t65532\t65532", status, re.MULTILINE)
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(15) == 0
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait()
