"""Big answers: how long polls of an execution on 50,000 hosts and of 10,000 instances hold the event loop."""

from __future__ import annotations

import json

from bench.measure import Row, output, python, scratch, server

SIZES = (1_000, 10_000, 50_000, 50_000, 50_000)
INSTANCES = 10_000
MOST = 0.1


def measure() -> list[Row]:
    with (
        scratch() as folder,
        server(*python("bench.platform", str(len(SIZES)), "1", "0.001", str(INSTANCES))) as (_, url),
    ):
        printed = output(*python("bench.stalls", url, str(folder), *map(str, SIZES)))
    sizes = [f"subscription of {INSTANCES:,} instances", *(f"execution on {size:,} hosts" for size in SIZES)]
    return [
        Row(
            target_id="big",
            what=f"{size}, {one['failing']:,} failing, {one['cpu']:.2f} s CPU: worst stall",
            value=one["stall"] * 1000,
            unit="ms CPU",
            target=MOST * 1000,
        )
        for size, one in zip(sizes, json.loads(printed), strict=True)
    ]
