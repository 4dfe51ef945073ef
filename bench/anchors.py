"""The Go programs that are measured beside ours, built from Debian's packages without a download."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from bench.measure import OUT, ROOT

GOPATH = Path("/usr/share/gocode")


def build(name: str) -> tuple[str, str]:
    """The path of a built program of bench/go, or "" and the reason."""
    go = shutil.which("go")
    if go is None:
        return "", "no Go here: apt-get install golang-go golang-github-prometheus-client-golang-dev"
    OUT.mkdir(parents=True, exist_ok=True)
    binary = OUT / name
    environ = {**os.environ, "GO111MODULE": "off", "GOPATH": str(GOPATH), "GOCACHE": str(OUT / "go-cache")}
    built = subprocess.run(
        [go, "build", "-o", str(binary), str(ROOT / "bench" / "go" / f"{name}.go")],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ("", f"go build failed: {built.stderr.strip()[:200]}") if built.returncode else (str(binary), "")
