"""The exporter tells about itself in both formats, knows what it does not know, and cannot be flooded."""

from __future__ import annotations

import pytest

from exporter.metrics.negotiate import Format
from exporter.telemetry import MOST_FIELDS, PROCESS_FAMILIES, Telemetry
from tests.support.parsers import parse


def samples(telemetry: Telemetry, form: Format = Format.TEXT) -> dict[str, float]:
    """Every sample by its name and sorted label values."""
    text = telemetry.render(form.openmetrics).decode() + ("# EOF\n" if form.openmetrics else "")
    return {
        " ".join([s.name, *(v for _, v in sorted(s.labels.items()))]): s.value
        for metric in parse(text, form)
        for s in metric.samples
    }


def busy() -> Telemetry:
    """Everything has happened once."""
    telemetry = Telemetry("1.2.3")
    telemetry.api_request("get_job_instance_list", "200", 0.2)
    telemetry.api_retry("get_job_instance_list")
    telemetry.throttled(1.5)
    telemetry.inflight(1)
    telemetry.quota("job_list", 99)
    telemetry.skew(-3.5)
    telemetry.state_reset()
    telemetry.unknown_values("job.status")
    telemetry.series({"blueking_job_executions_unfinished": 9})
    telemetry.series_dropped("blueking_job_host_consecutive_failures", 4)
    telemetry.state_written(1_700_000_000.5)
    telemetry.state_size(4096)
    telemetry.state_write_error()
    telemetry.rendered(0.01)
    telemetry.exposition(1000)
    telemetry.discovered({"biz": 3}, 1_700_000_002.5)
    telemetry.discovery_failed("timeout")
    telemetry.loop_lag(0.002)
    telemetry.config_loaded("abc", 1_700_000_000)
    return telemetry


def test_every_row_is_shown_once_something_happened() -> None:
    """No metric of the table is forgotten, and both formats give the same values."""
    telemetry = busy()
    text = telemetry.render(openmetrics=False).decode()
    for family in PROCESS_FAMILIES:
        assert text.count(f"# TYPE {family.name} {family.kind}\n") == 1
    classic, openmetrics = samples(telemetry), samples(telemetry, Format.OPENMETRICS)
    changing = ("process_", "python_")
    assert {k: v for k, v in classic.items() if not k.startswith(changing)} == {
        k: v for k, v in openmetrics.items() if not k.startswith(changing) and "_created" not in k
    }


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        ("blueking_exporter_api_requests_total get_job_instance_list 200", 1),
        ("blueking_exporter_api_request_duration_seconds_bucket get_job_instance_list 0.25", 1),
        ("blueking_exporter_api_retries_total get_job_instance_list", 1),
        ("blueking_exporter_api_throttle_seconds_total", 1.5),
        ("blueking_exporter_api_inflight_requests", 1),
        ("blueking_exporter_api_quota_remaining job_list", 99),
        ("blueking_exporter_api_clock_skew_seconds", -3.5),
        ("blueking_exporter_unknown_values_total job.status", 1),
        ("blueking_exporter_series blueking_job_executions_unfinished", 9),
        ("blueking_exporter_series_dropped_total blueking_job_host_consecutive_failures", 4),
        ("blueking_exporter_state_bytes", 4096),
        ("blueking_exporter_state_last_write_timestamp_seconds", 1_700_000_000.5),
        ("blueking_exporter_config_info abc", 1),
        ("blueking_exporter_total_shards", 1),
        ("blueking_exporter_discovery_scopes biz", 3),
        ("blueking_exporter_discovery_last_success_timestamp_seconds", 1_700_000_002.5),
        ("blueking_exporter_discovery_errors_total timeout", 1),
    ],
)
def test_what_happened_is_reported(sample: str, value: float) -> None:
    """Each event reaches its metric with its labels."""
    assert samples(busy())[sample] == value


@pytest.mark.parametrize(
    "name",
    [
        "api_clock_skew_seconds",
        "api_quota_remaining",
        "state_last_write_timestamp_seconds",
        "state_bytes",
        "render_duration_seconds",
        "exposition_bytes",
        "event_loop_lag_seconds",
        "config_last_reload_successful",
    ],
)
def test_what_is_not_known_is_absent(name: str) -> None:
    """A 0 would be a statement; there is neither sample nor header."""
    assert f"blueking_exporter_{name}" not in Telemetry().render(openmetrics=False).decode()


def test_memory_state_has_no_size() -> None:
    """Without a file there is no size, but there are writes."""
    telemetry = Telemetry()
    telemetry.state_written(5)
    telemetry.state_size(None)
    told = samples(telemetry)
    assert told["blueking_exporter_state_writes_total"] == 1
    assert "blueking_exporter_state_bytes" not in told


def test_created_is_openmetrics_only() -> None:
    """In the classic text it would be a second family per counter."""
    telemetry = busy()
    assert b"_created" not in telemetry.render(openmetrics=False)
    assert b"blueking_exporter_state_writes_created " in telemetry.render(openmetrics=True)


@pytest.mark.parametrize("name", ["state_writes", "state_writes_total", "state_writes_created"])
def test_a_name_selects_its_family(name: str) -> None:
    """The filter of the page holds for this part too."""
    text = Telemetry().render(openmetrics=False, names={f"blueking_exporter_{name}"}).decode()
    assert text.splitlines()[1:] == [
        "# TYPE blueking_exporter_state_writes_total counter",
        "blueking_exporter_state_writes_total 0",
    ]


def test_fields_and_codes_are_bounded() -> None:
    """A platform that invents a new word with every answer cannot fill the page."""
    telemetry = Telemetry()
    for number in range(MOST_FIELDS + 10):
        telemetry.unknown_values(f"field{number}")
    telemetry.unknown_values("field0")
    telemetry.api_request("job_list", "99999", 0.1)
    told = samples(telemetry)
    assert told["blueking_exporter_unknown_values_total other"] == 10
    assert told["blueking_exporter_unknown_values_total field0"] == 2
    assert told["blueking_exporter_api_requests_total job_list other"] == 1


def test_series_of_families_that_are_gone_leave() -> None:
    """A family without series has no count, not its last one."""
    telemetry = Telemetry()
    telemetry.series({"a": 1, "b": 2})
    telemetry.series({"b": 3})
    told = samples(telemetry)
    assert told["blueking_exporter_series b"] == 3
    assert "blueking_exporter_series a" not in told


def test_a_failed_reload_keeps_the_configuration_in_use() -> None:
    """Only the success flag falls; hash and time stay those of what is running."""
    telemetry = busy()
    telemetry.config_reload_failed()
    told = samples(telemetry)
    assert told["blueking_exporter_config_last_reload_successful"] == 0
    assert told["blueking_exporter_config_info abc"] == 1
    assert told["blueking_exporter_config_last_reload_success_timestamp_seconds"] == 1_700_000_000


def test_process_metrics_need_nothing_but_the_process_directory() -> None:
    """Under ProcSubset=pid there is no /proc/stat: the start time comes from the clocks, and agrees with the age."""
    told = samples(Telemetry())
    assert told["process_resident_memory_bytes"] > 0
    assert 0 < told["process_start_time_seconds"] < 4e9
    assert any(name.startswith("python_info") for name in told)
