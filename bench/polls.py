"""T8: a whole poll of a page of 199 rows, beside a Go poller that fetches, decodes, adds up and renders."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bench import anchors
from bench.measure import HERE, Build, Row, output, python, scratch, server, skipped, versus

SCOPES = 300
WHAT = "poll of a page of 199 rows"
CASES = {"new": ("all rows new, counted, committed, shown", 1.2), "known": ("all rows known already", 0.65)}
"""What is measured, and its target beside Go."""


def spent(url: str, build: Build = HERE) -> dict[str, float]:
    """CPU seconds of a poll by case."""
    with scratch() as folder:
        found: dict[str, float] = json.loads(
            output(*python("bench.polling", url, str(SCOPES), str(folder), build=build), build=build)
        )
    return found


def spent_by_go(program: str, url: str) -> float:
    """CPU seconds of a poll of the Go poller."""
    command = (program, f"{url}/api/v4/get_job_instance_list?fresh=1", str(SCOPES), "32")
    cpu: float = json.loads(output("env", "GOMAXPROCS=1", *command))["cpu"]
    return cpu / SCOPES


def measure(rounds: int = 5) -> list[Row]:
    go, reason = anchors.build("poller")
    if not go:
        return [skipped("T8", WHAT, reason)]
    ours, theirs = [], []
    for _ in range(rounds):
        with server(*python("bench.pages")) as (_process, url):
            ours.append(spent(url))
            theirs.append(spent_by_go(go, url))
    return beside_go(ours, theirs)


def beside_go(ours: Sequence[dict[str, float]], theirs: Sequence[float]) -> list[Row]:
    """The rows of T8. `ours` as of `spent`, `theirs` as of `spent_by_go`, a pair in each round."""
    return [
        versus("T8", f"{WHAT} / Go: {text}", [one[case] for one in ours], theirs, "s", target)
        for case, (text, target) in CASES.items()
    ]
