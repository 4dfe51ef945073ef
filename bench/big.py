"""Big answers: how long a poll of an execution on 50,000 hosts holds the event loop."""

from __future__ import annotations

import json
import subprocess

from bench.measure import ROOT, Row, environment, python, scratch, server

SIZES = (1_000, 10_000, 50_000, 50_000, 50_000)
MOST = 0.1


def measure() -> list[Row]:
    with scratch() as folder, server(*python("bench.platform", str(len(SIZES)), "1", "0.001")) as (_, url):
        run = subprocess.run(
            python("bench.stalls", url, str(folder), *map(str, SIZES)),
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = []
    for one in json.loads(run.stdout):
        what = (
            f"execution on {one['hosts']:,} hosts, {one['failing']:,.0f} failing, {one['cpu']:.2f} s CPU: worst stall"
        )
        found.append(Row(target_id="big", what=what, value=one["stall"] * 1000, unit="ms CPU", target=MOST * 1000))
    return found
