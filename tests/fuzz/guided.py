"""Fuzz one target with atheris, which looks for new branches: `python -m tests.fuzz.guided TARGET FLAG ...`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["exporter"]):
    from exporter import log
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    log.configure("error", "logfmt")
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]].run)
    atheris.Fuzz()
