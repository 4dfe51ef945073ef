"""Bad input from NodeMan: what the daemon makes of it, over real HTTP. The ids are those of the catalogue of faults."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.simulator.nodeman_world import Target
from tests.support.daemon import EPOCH, Metrics
from tests.support.nodeman import HOSTS, Nodeman, failing, failures, finished, nodeman, own, since, watched

pytestmark = pytest.mark.looptime(noop_cycles=5)

INSTALL = ("nodeman_job", "INSTALL_AGENT", "install", "")
MEMORY = {"url": "memory:"}
ALL: dict[str, Any] = {
    "job": {},
    "subscription": {"subscription_ids": [11]},
    "task": {"job_ids": [181]},
    "state": MEMORY,
}
COLLECTORS = {"nodeman_job": "job_list", "nodeman_subscription": "task_result", "nodeman_task": "get_task_info"}
UNKNOWN = "blueking_exporter_unknown_values_total"

Answer = dict[str, Any]


def counters(metrics: Metrics) -> dict[object, float]:
    """Every counter and histogram of NodeMan."""
    ends = ("_total", "_bucket", "_count", "_sum")
    return {key: value for key, value in metrics.samples.items() if "_nodeman_" in key[0] and key[0].endswith(ends)}


def unknown(metrics: Metrics, field: str) -> float:
    return metrics.samples.get((UNKNOWN, frozenset({("field", field)})), 0)


def populate(daemon: Nodeman) -> None:
    """One failure for each collector, half a minute from now."""
    daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", {HOSTS[0]: "install_package", HOSTS[1]: None}, duration=30)
    daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: "JOB_TIMEOUT", HOSTS[1]: None}, duration=30)


class Switch:
    """A change of answers that can be switched on and off."""

    def __init__(self, change: Callable[[str, Answer], Answer | bytes]) -> None:
        self.change = change
        self.on = False

    def __call__(self, path: str, answer: Answer) -> Answer | bytes:
        return self.change(path, answer) if self.on else answer


async def spoilt_and_mended(tmp_path: Path, change: Callable[[str, Answer], Answer | bytes], reason: str) -> None:
    """While every answer is changed polls fail with `reason` and nothing moves; then all is counted, once."""
    switch = Switch(change)
    async with watched(tmp_path, change=switch, **ALL) as daemon:
        populate(daemon)
        await daemon.start()
        before = counters(await daemon.metrics())
        switch.on = True
        daemon.failing_on("INSTALL_AGENT", HOSTS[2], duration=30)
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert counters(metrics) == before
        for collector in COLLECTORS:
            assert own(metrics, "success", collector=collector) == 0
            assert own(metrics, "errors_total", collector=collector, reason=reason) >= 2
        switch.on = False
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert sorted(labels[0] for labels, value in failures(metrics).items() if value == 1) == sorted(COLLECTORS)


@pytest.mark.parametrize("fault", ["garbage", "html_200"])
async def test_F04_nodeman_what_is_no_json(tmp_path: Path, fault: str) -> None:
    """Random bytes and a captive portal under 200: decode, nothing changes, the next poll continues."""
    async with watched(tmp_path, **ALL) as daemon:
        populate(daemon)
        await daemon.start()
        before = counters(await daemon.metrics())
        daemon.fault(fault)
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert counters(metrics) == before
        for collector in COLLECTORS:
            assert own(metrics, "errors_total", collector=collector, reason="decode") >= 2
        daemon.platform.faults.clear()
        metrics = await daemon.poll()
        assert sum(failures(metrics).values()) == 2


def _replaced(text: bytes) -> Callable[[str, Answer], bytes]:
    return lambda path, answer: text


def _spoilt(value: bytes) -> Callable[[str, Answer], bytes]:
    """Every number that is needed becomes this."""
    rows = b'{"id":%b,"job_id":%b,"status":"RUNNING","record_id":1}'
    data = b'{"id":%b,"total":%b,"list":[' + rows + b'],"status_counter":{"RUNNING":%b},"statistics":{}}'
    return _replaced(b'{"result":true,"code":0,"data":' + data.replace(b"%b", value) + b"}")


@pytest.mark.parametrize(
    "change",
    [
        _replaced(b"[" * 100_000 + b"]" * 100_000),
        _replaced(b'{"result":true,"code":0,"data":' + b'{"list":[' * 50_000 + b"]}" * 50_000 + b"}"),
        _spoilt(b"9" * 5000),
        _spoilt(b"NaN"),
        _spoilt(b"1e400"),
        _spoilt(b"1.5"),
    ],
    ids=["deep", "deep_inside", "huge", "nan", "infinity", "fraction"],
)
async def test_F08_nodeman_json_that_hurts(tmp_path: Path, change: Callable[[str, Answer], bytes]) -> None:
    """Depth, integers of 5000 digits, NaN, 1e400: decode is counted, nothing crashes, nothing moves."""
    await spoilt_and_mended(tmp_path, change, "decode")


async def test_F08_nodeman_of_duplicate_keys_the_last_one_wins(tmp_path: Path) -> None:
    """A status that stands twice."""

    def twice(path: str, answer: Answer) -> bytes:
        return json.dumps(answer).replace('"status": "', '"status": "NEVER", "status": "').encode()

    async with watched(tmp_path, change=twice, job={}, state=MEMORY) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(60)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == {INSTALL: 1}


@pytest.mark.parametrize(
    ("code", "reason"),
    [(3800001, "api_error"), ("3800001", "api_error"), ("9900403", "permission"), (9900403, "permission"),
     (3800401, "auth"), ("PERMISSION_DENIED", "api_error"), (3800500, "api_error"), (1306201, "http_5xx")],
)  # fmt: skip
async def test_F11_nodeman_refusals_under_200(tmp_path: Path, code: object, reason: str) -> None:
    """result false with HTTP 200, the code as number or text, and the extra key `errors`."""

    def refuse(path: str, answer: Answer) -> Answer:
        return {"result": False, "code": code, "data": None, "message": f"出错（{code}）", "errors": None}

    await spoilt_and_mended(tmp_path, refuse, reason)


@pytest.mark.parametrize("code", [0, "0", "OK", None])
async def test_F11_nodeman_codes_of_success(tmp_path: Path, code: object) -> None:
    """0, "0" and "OK" are a success for both generations."""
    async with watched(tmp_path, change=lambda path, answer: answer | {"code": code}, **ALL) as daemon:
        populate(daemon)
        await daemon.start()
        metrics = await daemon.metrics()
        assert all(own(metrics, "success", collector=collector) == 1 for collector in COLLECTORS)


def _as_text(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value] or {}
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


async def test_F12_nodeman_numbers_as_text_and_empty_lists_as_objects(tmp_path: Path) -> None:
    """Ids, counts and totals as text, `{}` for `[]`: the same page as from the documented forms."""

    def told(path: str, answer: Answer) -> Answer:
        return answer | {"data": _as_text(answer["data"])}

    pages: list[dict[object, float]] = []
    for change in (None, told):
        folder = tmp_path / str(len(pages))
        folder.mkdir()
        async with watched(folder, change=change, **ALL) as daemon:
            # Both at the same place in the half minutes of the platform.
            begun = 30.0 * math.ceil(daemon.loop.time() / 30)
            await daemon.sleep_until(begun)
            populate(daemon)
            await daemon.start()
            daemon.failing_on("INSTALL_AGENT", HOSTS[2], duration=10)
            await daemon.sleep_until(begun + 100)
            metrics = await daemon.poll()
            pages.append({
                key: value - EPOCH - begun if "timestamp" in key[0] else value
                for key, value in metrics.samples.items()
                if "_nodeman_" in key[0]
            })  # fmt: skip
    assert len(pages[0]) > 40
    assert pages[0] == pages[1]


@pytest.mark.parametrize("data", [None, [], "x", 7, {"list": "x", "total": 1}])
async def test_F12_nodeman_anything_else_is_decode(tmp_path: Path, data: object) -> None:
    """`data` that is null or of another shape fails the poll as decode. An empty list is a subscription of nothing."""

    def odd(path: str, answer: Answer) -> Answer:
        return answer | {"data": data}

    async with watched(tmp_path, change=odd, **ALL) as daemon:
        populate(daemon)
        await daemon.start()
        metrics = await daemon.metrics()
        for name in COLLECTORS:
            expected = 0 if data == [] and name == "nodeman_subscription" else 1
            assert own(metrics, "errors_total", collector=name, reason="decode") == expected, name


@pytest.mark.parametrize("status", ["NEW", 12, "99", "状态"])
async def test_F13_nodeman_unknown_statuses(tmp_path: Path, status: object) -> None:
    """A word or number that no table has is `unknown`: terminal with an end time, one label, named in the metric."""

    def odd(path: str, answer: Answer) -> Answer:
        data = answer["data"]
        for row in data.get("list", []):
            if row["status"] == "FAILED":
                row["status"] = status
        if "status_counter" in data and "FAILED" in data["status_counter"]:
            data["status_counter"] = {
                **{k: v for k, v in data["status_counter"].items() if k != "FAILED"}, str(status): 1, "NEWER": 1,
            }  # fmt: skip
        return answer

    collectors: dict[str, Any] = {"job": {}, "subscription": {"subscription_ids": [11]}, "state": MEMORY}
    async with watched(tmp_path, change=odd, **collectors) as daemon:
        daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", {HOSTS[0]: "install_package"}, duration=30)
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[2], duration=10)
        await daemon.sleep_until(100)
        metrics = await daemon.poll(3)
        assert finished(metrics) == {("INSTALL_AGENT", "unknown"): 1}
        assert metrics.by(nodeman("subscription_instances"), "status")[("unknown",)] == 2
        assert unknown(metrics, "nodeman_job.status") == 1
        assert unknown(metrics, "nodeman_subscription.status") == 2


async def test_F13_nodeman_unusual_error_codes_of_1x(tmp_path: Path) -> None:
    """A code that is no word becomes `other`, one that is new passes through."""
    async with watched(tmp_path, task={"job_ids": [181]}, state=MEMORY) as daemon:
        outcomes = {HOSTS[0]: "BRAND_NEW_CODE", HOSTS[1]: "ssh: 10.0.0.1 refused", HOSTS[2]: "另一个"}
        daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", dict(outcomes), duration=30)
        await daemon.start()
        await daemon.sleep_until(60)
        metrics = await daemon.poll()
        assert {labels[3]: value for labels, value in failures(metrics).items()} == {"BRAND_NEW_CODE": 1, "other": 2}


def _times(**changes: object) -> Callable[[str, Answer], Answer]:
    def change(path: str, answer: Answer) -> Answer:
        data = answer["data"] or {}
        for row in [data, *data.get("list", [])]:
            for name, value in changes.items():
                if row.get(name):
                    row[name] = value
        return answer

    return change


@pytest.mark.parametrize(
    ("changes", "duration", "odd"),
    [
        ({}, 50.0, 0),
        ({"start_time": "2026-11-18 19:06:40+0800", "end_time": "2026-11-18 19:06:41+0800"}, 1.0, 0),
        ({"start_time": "2026-11-18 11:06:40+0000", "end_time": "2026-11-18 19:06:50"}, 10.0, 0),
        ({"start_time": 1795000000000, "end_time": "1795000003"}, 3.0, 0),
        ({"end_time": "1970-01-01 08:00:00+0800"}, None, 0),
        ({"end_time": "1970-01-02 08:00:00+0800"}, None, 1),
        ({"end_time": "9999-12-31 23:59:59+0800"}, None, 1),
        ({"start_time": "2026-11-18 01:30:00-0400", "end_time": "2026-11-18 01:20:00-0500"}, 3000.0, 0),
    ],
)
async def test_F14_nodeman_forms_of_time(
    tmp_path: Path, changes: dict[str, object], duration: float | None, odd: int
) -> None:
    """With zone, without, epoch; before the start, far in the past and the future; a fold: counted, never negative."""
    async with watched(tmp_path, change=_times(**changes), job={}, state=MEMORY) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=30)
        await daemon.sleep_until(100)
        metrics = await daemon.poll(2)
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == {INSTALL: 1}
        assert metrics.get(nodeman("job_duration_seconds_sum"), job_type="INSTALL_AGENT") == duration
        assert unknown(metrics, "nodeman_job.end_time") == odd
        assert all(value >= 0 for value in counters(metrics).values())
        assert all(EPOCH - 1e6 < value <= EPOCH + 200 for value in since(metrics).values())


async def test_F14_nodeman_an_end_that_stays_null(tmp_path: Path) -> None:
    """FAILED without an end time: counted once, without a duration; filled in later it is the same run."""
    switch = Switch(_times(end_time=None))
    switch.on = True
    async with watched(tmp_path, change=switch, job={}, state=MEMORY) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=30)
        await daemon.sleep_until(100)
        metrics = await daemon.poll(2)
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == failing(metrics) == {INSTALL: 1}
        assert metrics.get(nodeman("job_duration_seconds_count"), job_type="INSTALL_AGENT") is None
        switch.on = False
        metrics = await daemon.poll(2)
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert metrics.get(nodeman("job_duration_seconds_sum"), job_type="INSTALL_AGENT") == 50


@pytest.mark.parametrize("api", ["job_list", "job_details", "task_result"])
async def test_F16_nodeman_a_page_that_repeats_for_ever(tmp_path: Path, api: str) -> None:
    """No progress ends the reading; what is affected is not half counted."""
    hosts = [Target(2, f"10.9.{n // 250}.{n % 250}", 5000 + n) for n in range(600)]
    async with watched(tmp_path, job={}, subscription={"subscription_ids": [11]}, state=MEMORY) as daemon:
        daemon.nodeman.start_subscription("RESTART_AGENT", dict.fromkeys(hosts, "restart"), duration=50)
        await daemon.start()
        for host in hosts:
            daemon.nodeman.start_job("RESTART_AGENT", {host: None}, duration=10)
        daemon.failing_on("INSTALL_AGENT", *hosts, duration=40)
        daemon.fault("repeated_page", api=api)
        await daemon.sleep_until(60)
        metrics = await daemon.poll(2)
        if api == "job_details":
            # Of one job nothing more can be had.
            assert own(metrics, "truncated_total") == 1
            assert finished(metrics)[("INSTALL_AGENT", "failed")] == 1
            assert sum(failures(metrics).values()) == 600
            return
        collector = "nodeman_job" if api == "job_list" else "nodeman_subscription"
        assert own(metrics, "success", collector=collector) == 0
        assert own(metrics, "errors_total", collector=collector, reason="decode") >= 1
        assert not any(labels[0] == collector for labels in failures(metrics))
        daemon.platform.faults.clear()
        metrics = await daemon.poll()
        assert sum(failures(metrics).values()) == 1200


async def test_F16_nodeman_jobs_that_arrive_between_two_pages(tmp_path: Path) -> None:
    """New jobs shift the pages: rows that come twice count once, none is lost."""
    calls: list[int] = []

    def arrive(path: str, answer: Answer) -> Answer:
        if "job_list" in path and len(answer["data"]["list"]) == 500 and len(calls) < 4:
            calls.append(1)
            for host in HOSTS[:7]:
                daemon.nodeman.start_job("UPGRADE_AGENT", {host: None}, duration=10)
        return answer

    async with watched(tmp_path, change=arrive, job={}) as daemon:
        daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: None}, duration=10)
        await daemon.start()
        await daemon.stop()
        for number in range(1200):
            daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[number % 40]: None}, duration=10)
        await daemon.start()
        await daemon.sleep_until(200)
        metrics = await daemon.poll(3)
        assert len(calls) >= 2, "there was more than one page"
        assert finished(metrics) == {
            ("RESTART_AGENT", "success"): 1201, ("UPGRADE_AGENT", "success"): 7 * len(calls),
        }  # fmt: skip


async def test_F16_nodeman_a_job_that_the_list_shows_late(tmp_path: Path) -> None:
    """One with a lower id than others that have been counted: it is new all the same, and counted once."""

    def hide(path: str, answer: Answer) -> Answer:
        if "job_list" in path:
            answer["data"]["list"] = [row for row in answer["data"]["list"] if row["id"] != hidden]
        return answer

    switch, hidden = Switch(hide), 182
    switch.on = True
    async with watched(tmp_path, change=switch, job={}, state=MEMORY) as daemon:
        daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: None}, duration=10)
        await daemon.start()
        for host in HOSTS[1:4]:
            daemon.nodeman.start_job("UPGRADE_AGENT", {host: None}, duration=10)
        await daemon.sleep_until(100)
        assert finished(await daemon.poll())[("UPGRADE_AGENT", "success")] == 2
        switch.on = False
        assert finished(await daemon.poll())[("UPGRADE_AGENT", "success")] == 3
        assert finished(await daemon.poll(2))[("UPGRADE_AGENT", "success")] == 3


async def test_F16_nodeman_tasks_in_another_order(tmp_path: Path) -> None:
    """The same task ids in another order, or fewer of them, are no new run."""

    def turn(path: str, answer: Answer) -> Answer:
        for row in answer["data"].get("list", []):
            if "task_id_list" in row:
                row["task_id_list"] = row["task_id_list"][::-1][:1]
        return answer

    switch = Switch(turn)
    async with watched(tmp_path, change=switch, job={}, state=MEMORY) as daemon:
        await daemon.start()
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(60)
        await daemon.poll()
        daemon.nodeman.retry(job, duration=20)
        await daemon.sleep_until(160)
        before = finished(await daemon.poll())
        assert sum(before.values()) == 2
        switch.on = True
        assert finished(await daemon.poll(2)) == before
        switch.on = False
        assert finished(await daemon.poll(2)) == before


async def test_F16_nodeman_totals_that_lie(tmp_path: Path) -> None:
    """A total that is 1000 too high is no reason to ask beyond a page that is not full."""
    async with watched(tmp_path, **ALL) as daemon:
        populate(daemon)
        await daemon.start()
        daemon.fault("wrong_total")
        daemon.failing_on("INSTALL_AGENT", HOSTS[2], duration=10)
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert own(metrics, "success") == 1
        assert failures(metrics)[INSTALL] == 1


async def test_F18_nodeman_a_finished_job_that_comes_back(tmp_path: Path) -> None:
    """Gone for a while, back to running, pending and success in turn: counted once per return, counters never fall."""
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        await daemon.start()
        job = daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: None}, duration=10)
        await daemon.sleep_until(60)
        assert finished(await daemon.poll()) == {("RESTART_AGENT", "success"): 1}
        # The task is gone too, so that the platform does not mend the row by itself.
        job.task_ids.clear()
        highest = 1.0
        for status, count in (
            ("RUNNING", 1), ("PENDING", 1), ("SUCCESS", 2), ("SUCCESS", 2), ("PENDING", 2), ("FAILED", 2),
        ):  # fmt: skip
            job.status = status
            metrics = await daemon.poll()
            shown = finished(metrics)
            assert shown[("RESTART_AGENT", "success")] == count
            assert sum(shown.values()) >= highest
            highest = sum(shown.values())
        assert finished(metrics) == {("RESTART_AGENT", "success"): 2, ("RESTART_AGENT", "failed"): 1}
        del daemon.nodeman.jobs[job.id]
        await daemon.poll()
        daemon.nodeman.jobs[job.id] = job
        metrics = await daemon.poll()
        assert sum(finished(metrics).values()) == highest
        assert own(metrics, "success") == 1


async def test_F18_nodeman_a_job_that_is_left_out_for_one_poll(tmp_path: Path) -> None:
    """An unfinished job that the list leaves out and the details tell is no other run, and is not lost."""
    switch = Switch(lambda path, answer: answer | {"data": {"total": 0, "list": []}} if "job_list" in path else answer)
    async with watched(tmp_path, change=switch, job={}, state=MEMORY) as daemon:
        await daemon.start()
        daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: None}, duration=100)
        metrics = await daemon.poll(2)
        switch.on = True
        metrics = await daemon.poll()
        assert metrics.get(nodeman("jobs_unfinished"), job_type="RESTART_AGENT", status="running") == 1
        switch.on = False
        await daemon.sleep_until(200)
        assert finished(await daemon.poll()) == {("RESTART_AGENT", "success"): 1}


@pytest.mark.parametrize("days", [8, -8])
async def test_F58_one_wrong_date_lets_no_host_go(tmp_path: Path, days: int) -> None:
    """One answer of each API days ahead or back: failing hosts still fail, and no job is forgotten."""
    async with watched(tmp_path, **ALL) as daemon:
        populate(daemon)
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[2], duration=30)
        await daemon.sleep_until(100)
        before = await daemon.poll()
        assert len(failing(before)) == 3
        for api in COLLECTORS.values():
            daemon.fault("clock_skew", api=api, times=1, value=days * 86_400)
        for _ in range(3):
            page = await daemon.poll()
            assert failing(page) == failing(before)
            assert counters(page) == counters(before)
