"""T8: a whole poll of a page of 200 rows, beside a Go poller that fetches, decodes, adds up and renders."""

from __future__ import annotations

import json
import os
import subprocess

from bench import anchors
from bench.measure import ROOT, Row, environment, python, scratch, server, skipped, versus

SCOPES = 300


def measure(rounds: int = 5) -> list[Row]:
    what = "poll of a page of 199 rows / Go"
    go, reason = anchors.build("poller")
    if not go:
        return [skipped("T8", what, reason)]
    ours: dict[str, list[float]] = {"new": [], "known": []}
    theirs = []
    for _ in range(rounds):
        with scratch() as folder, server(*python("bench.pages")) as (_, url):
            run = subprocess.run(
                python("bench.polling", url, str(SCOPES), str(folder)),
                cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
            )  # fmt: skip
            for name, value in json.loads(run.stdout).items():
                ours[name].append(value)
            anchor = subprocess.run(
                [go, f"{url}/api/v4/get_job_instance_list?fresh=1", str(SCOPES), "32"],
                env={**os.environ, "GOMAXPROCS": "1"}, capture_output=True, text=True, check=True,
            )  # fmt: skip
            theirs.append(json.loads(anchor.stdout)["cpu"] / SCOPES)
    return [
        versus("T8", f"{what}: all rows new, counted, committed, shown", ours["new"], theirs, "s", 0.65),
        versus("T8", f"{what}: all rows known already", ours["known"], theirs, "s", 0.65),
    ]
