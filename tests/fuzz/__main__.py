"""Fuzz the exporter: `python -m tests.fuzz [--seconds N] [TARGET ...]`, `python -m tests.fuzz TARGET --input FILE`.

With atheris where it is installed, else with hypothesis. An input that makes a target fail is kept in
.cache/fuzz/TARGET.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from exporter import log
from tests.fuzz.random_inputs import Failed, fuzz
from tests.fuzz.targets import TARGETS, Target
from tests.support.paths import ROOT

KEPT = ROOT / ".cache" / "fuzz"
GUIDED = importlib.util.find_spec("atheris") is not None
MEMORY = 2048
"""MiB that an input may make the process use."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", choices=[[], *TARGETS], help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="time for each target (60)")
    parser.add_argument("--input", type=Path, help="run the target on this file only")
    flags = parser.parse_args()
    log.configure("error", "logfmt")
    if flags.input:
        (name,) = flags.targets
        TARGETS[name].run(flags.input.read_bytes())
        return 0
    failed = False
    for name in flags.targets or TARGETS:
        print(f"{name}: {flags.seconds} s with {'atheris' if GUIDED else 'hypothesis'}", flush=True)
        folder = KEPT / name
        folder.mkdir(parents=True, exist_ok=True)
        attempt = guided if GUIDED else unguided
        failed |= not attempt(name, TARGETS[name], folder, flags.seconds)
    return int(failed)


def guided(name: str, target: Target, folder: Path, seconds: int) -> bool:
    """Whether the target took all inputs that atheris found. What reached new branches is kept for the next time."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for data in target.seeds:
        (corpus / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    command = [
        *(sys.executable, "-m", "tests.fuzz.guided", name, str(corpus), f"-max_total_time={seconds}"),
        *(f"-artifact_prefix={folder}/", f"-rss_limit_mb={MEMORY}", "-timeout=30", "-max_len=65536"),
        *("-print_final_stats=1", "-verbosity=0"),
    ]
    if target.words:
        words = folder / "words"
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        command.append(f"-dict={words}")
    log_file = folder / "log"
    with log_file.open("w") as output:
        done = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=seconds + 300
        )
    told = log_file.read_text(errors="replace").splitlines()
    if done.returncode:
        print("\n".join(told[-40:]), f"\nagain: {sys.executable} -m tests.fuzz {name} --input FILE", flush=True)
    else:
        print(*(line for line in told if "executed_units" in line or "average_exec" in line), sep="\n", flush=True)
    return done.returncode == 0


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def unguided(name: str, target: Target, folder: Path, seconds: int) -> bool:
    """Whether the target took all inputs of so many seconds. The failing one is kept, as small as it could be made."""
    try:
        count = fuzz(target, seconds)
    except Failed as failed:
        file = folder / f"crash-{hashlib.sha1(failed.data, usedforsecurity=False).hexdigest()}"
        file.write_bytes(failed.data)
        print(f"failed: {failed.__cause__!r}\nagain: {sys.executable} -m tests.fuzz {name} --input {file}", flush=True)
        return False
    print(f"{count} inputs", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
