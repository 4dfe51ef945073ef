"""F74: alerts depend on the platform, not on how Prometheus scrapes: intervals, phases, gaps, restarts, handovers."""

from __future__ import annotations

import json
import pathlib
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import yaml

from mixin.render import HERE
from tests.support.components import require

MINUTE = 60
HOUR = 3600
POLL = 30
END = 6 * HOUR - 1
EVENT = 10 * MINUTE
"""When each counter grows for the only time. Its alerts have ended long before `QUIET`."""
QUIET = 3 * HOUR
GRID = 15
PHASES = 16

TARGET = {"job": "blueking", "instance": "a:10071"}
SUCCESSOR = {"job": "blueking", "instance": "b:10071"}
SCOPE = {"collector": "job", "bk_scope_type": "biz", "bk_scope_id": "2"}

Value = Callable[[int], float | None]
"""What a series shows at a time, None when it is not on the page."""


@dataclass(frozen=True)
class Pages:
    """What Prometheus finds at a scrape.

    `phase`: when polls succeed in their interval; `scraped`: when scrapes happen in theirs, rules being evaluated at 0;
    `process`: the begin of the process that is scraped at a time.
    """

    phase: float
    scraped: int = 0
    instance: Callable[[int], Mapping[str, str]] = lambda now: TARGET
    process: Callable[[int], int] = lambda now: 0

    def series(self) -> Iterator[tuple[str, dict[str, str], Value]]:
        last = "blueking_exporter_collector_last_success_timestamp_seconds"
        yield "up", {}, lambda now: 1
        yield "blueking_exporter_collector_success", SCOPE, lambda now: 1
        yield "blueking_exporter_collector_interval_seconds", SCOPE, lambda now: POLL
        yield last, SCOPE, lambda now: (now - self.phase) // POLL * POLL + self.phase
        for name in ("gap_seconds", "truncated"):
            yield f"blueking_exporter_collector_{name}_total", SCOPE, lambda now: 600 * (now >= EVENT)
        for name, labels in (("unknown_values", {"field": "job.status"}), ("series_dropped", {"family": "x"})):
            yield (
                f"blueking_exporter_{name}_total",
                labels,
                lambda now: 1 if self.process(now) <= EVENT <= now else None,
            )


def inputs(
    pages: Pages, every: int, end: int = END, missed: Callable[[int], bool] = lambda now: False
) -> Iterator[dict[str, str]]:
    """The samples of all scrapes but the missed ones, in promtool's notation: a value every `GRID`, or none."""
    times = range(0, end, GRID)
    for name, labels, value in pages.series():
        found: dict[str, list[str]] = {}
        for index, now in enumerate(times):
            shown = value(now) if now % every == pages.scraped % every and not missed(now) else None
            if shown is not None:
                found.setdefault(json.dumps(pages.instance(now)), ["_"] * len(times))[index] = f"{shown:g}"
        for target, values in found.items():
            inside = ",".join(f"{label}={json.dumps(of)}" for label, of in {**json.loads(target), **labels}.items())
            yield {"series": f"{name}{{{inside}}}", "values": " ".join(values)}


def problems(folder: pathlib.Path, tests: Sequence[Mapping[str, object]], evaluation: str = "1m") -> str:
    """What promtool finds wrong, empty when nothing."""
    for name in ("rules.yml", "alerts.yml"):
        (folder / name).write_text((HERE / "prometheus" / name).read_text(encoding="utf-8"), encoding="utf-8")
    file = folder / "tests.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": ["rules.yml", "alerts.yml"], "evaluation_interval": evaluation, "tests": tests})
    )
    done = subprocess.run(
        [require("promtool"), "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def silent(since: int, end: int = END) -> dict[str, object]:
    """No alert fires between `since` and `end`. A target that is not scraped for long is down, which is true."""
    alerts = 'ALERTS{alertstate="firing", alertname!="BlueKingExporterDown"}'
    return {
        "expr": f"count by (alertname) (max_over_time({alerts}[{end - since}s]))",
        "eval_time": f"{end}s",
        "exp_samples": [],
    }


def fired(alert: str, at: int) -> dict[str, object]:
    return {
        "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})',
        "eval_time": f"{at}s",
        "exp_samples": [{"labels": "{}", "value": 1}],
    }


GROWN = (
    "BlueKingHistoryGap",
    "BlueKingHistoryTruncated",
    "BlueKingExporterUnknownValues",
    "BlueKingExporterSeriesLimit",
)


@pytest.mark.component
@pytest.mark.parametrize("every", [15, 30, MINUTE, 2 * MINUTE], ids=lambda every: f"{every}s")
def test_F74_no_alert_fires_in_any_phase_of_polls_and_scrapes(tmp_path: pathlib.Path, every: int) -> None:
    """Pollers every 30 s are well; rules are evaluated every minute, which is Prometheus' default, and every 15 s."""
    end = EVENT
    tests = [
        {
            "name": f"phase {phase} of 16, scraped at {scraped} s",
            "interval": f"{GRID}s",
            "input_series": list(inputs(Pages(phase * POLL / PHASES, scraped), every, end)),
            "promql_expr_test": [silent(0, end - 1)],
        }
        for phase in range(PHASES)
        for scraped in range(0, min(every, MINUTE), GRID)
    ]
    assert not problems(tmp_path, tests)
    assert not problems(tmp_path, tests[:PHASES], "15s")


@pytest.mark.component
@pytest.mark.parametrize("every", [15, 30, MINUTE, 2 * MINUTE], ids=lambda every: f"{every}s")
def test_F74_a_counter_that_grew_alerts_once_and_not_after_gaps(tmp_path: pathlib.Path, every: int) -> None:
    """Each counter grows once, which its alert tells in time; later the scrapes stop for 2, 10 and 70 minutes."""
    begin = QUIET + 30 * MINUTE

    def missed(length: int) -> Callable[[int], bool]:
        return lambda now: begin <= now < begin + length

    tests = [
        {
            "name": f"gap of {gap} minutes",
            "interval": f"{GRID}s",
            "input_series": list(inputs(Pages(7), every, missed=missed(gap * MINUTE))),
            "promql_expr_test": [silent(QUIET), *(fired(alert, EVENT + 5 * MINUTE) for alert in GROWN)],
        }
        for gap in (0, 2, 10, 70)
    ]
    assert not problems(tmp_path, tests)


@pytest.mark.component
@pytest.mark.parametrize("every", [30, MINUTE, 2 * MINUTE], ids=lambda every: f"{every}s")
def test_F74_no_alert_fires_because_of_a_restart_or_a_handover(tmp_path: pathlib.Path, every: int) -> None:
    """The state brings old counts along: to the next process, or to another replica and back."""
    restart, back = QUIET + 20 * MINUTE, QUIET + 50 * MINUTE
    cases = {
        "restart": Pages(7, process=lambda now: restart if now >= restart else 0),
        "handover": Pages(
            7,
            instance=lambda now: SUCCESSOR if restart <= now < back else TARGET,
            process=lambda now: restart if now >= restart else 0,
        ),
    }
    tests = [
        {
            "name": name,
            "interval": f"{GRID}s",
            "input_series": list(inputs(pages, every)),
            "promql_expr_test": [silent(QUIET)],
        }
        for name, pages in cases.items()
    ]
    assert not problems(tmp_path, tests)


@pytest.mark.component
@pytest.mark.parametrize("every", [15, 30, MINUTE, 2 * MINUTE], ids=lambda every: f"{every}s")
def test_F74_a_platform_that_hangs_is_reported_within_two_scrapes_and_three_minutes(
    tmp_path: pathlib.Path, every: int
) -> None:
    """The other side: the newest complete poll of all scopes is old, and gets older."""
    stop, end = EVENT, EVENT + 10 * MINUTE
    last = "blueking_exporter_collector_last_success_timestamp_seconds"
    tests = []
    for phase in range(0, POLL, 6):
        series = []
        for one in inputs(Pages(phase), every, end):
            if one["series"].startswith(last):
                values = (
                    value if value == "_" else f"{min(float(value), stop + phase):g}" for value in one["values"].split()
                )
                one = {"series": one["series"], "values": " ".join(values)}
            series.append(one)
        told = stop + phase + 3 * MINUTE + 2 * every
        tests.append(
            {
                "name": f"phase {phase}",
                "interval": f"{GRID}s",
                "input_series": series,
                "promql_expr_test": [fired("BlueKingPlatformUnreachable", told)],
            }
        )
    assert not problems(tmp_path, tests, "15s")
