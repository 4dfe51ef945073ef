"""JOB in its three dialects: what is asked, and how every known form of answer is read."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from exporter.blueking.client import Deadline
from exporter.blueking.envelope import Reply, read
from exporter.blueking.job import (
    LIST_V4,
    NO_PLAN,
    UNKNOWN_NUMBER,
    Execution,
    ExecutionPage,
    ExecutionStatus,
    JobApi,
    Step,
)
from exporter.clock import Clock
from exporter.config.schema import JobPlatform
from exporter.errors import ApiError
from exporter.model import Host, Scope, job_outcome, job_status_slug
from tests.support.paths import FIXTURES
from tests.support.upstream import SAMPLES, Recorder, Upstream, client, reply

SCOPE = Scope("biz", "2")


async def ask(
    body: object, *, api: str = "v4", status: int = 200, headers: dict[str, str] | None = None, biz: str = "2"
) -> ExecutionPage:
    """The page that the list call for a business makes of `body`, bytes or what is to be JSON."""
    page = await _call(body, api, status, headers, "list", biz)
    assert isinstance(page, ExecutionPage)
    return page


async def ask_status(
    body: object, *, api: str = "v4", status: int = 200, headers: dict[str, str] | None = None
) -> ExecutionStatus:
    """The execution that the status call makes of `body`."""
    execution = await _call(body, api, status, headers, "status")
    assert isinstance(execution, ExecutionStatus)
    return execution


async def _call(
    body: object, api: Any, status: int, headers: dict[str, str] | None, call: str, scope: str = "2"
) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = reply(raw, status)
    answer.headers.update(headers or {})
    async with Upstream(answer) as upstream, client() as asking:
        job = JobApi(asking.for_scope(SCOPE), JobPlatform(upstream.url, api))
        deadline = Deadline(0.4, Clock())
        if call == "list":
            return await job.list(Scope("biz", scope), 1, 2, deadline=deadline)
        asked = re.search(rb'"job_instance_id": *(\d+)', raw)
        return await job.status(SCOPE, int(asked[1]) if asked else 411, host_results=True, deadline=deadline)


def row(**changes: Any) -> dict[str, Any]:
    """A row as the platform sends it."""
    return {
        "job_instance_id": 411,
        "job_plan_id": 1001,
        "name": "nightly",
        "launch_mode": 3,
        "status": 3,
        "type": 0,
        "create_time": 1789000000000,
        "start_time": 1789000001200,
        "end_time": 1789000004200,
        **changes,
    }


ROW = Execution(
    id=411,
    status=3,
    task_type=0,
    launch_mode=3,
    plan_id=1001,
    raw_name=Raw(b'"nightly"'),
    create_time=1789000000000,
    start_time=1789000001200,
    end_time=1789000004200,
)


def v4(*rows: dict[str, Any]) -> dict[str, Any]:
    """A page of v4."""
    return {"data": {"job_instance_list": list(rows)}}


def told(step: Step) -> list[tuple[Host | None, int, int | None, int | None]]:
    """What a step tells of its targets."""
    return [(result.host, result.status, result.exit_code, result.end_time) for result in step.results]


def finished(*results: dict[str, Any], name: str = "step_execute_object_result_list", **changes: Any) -> dict[str, Any]:
    """A status answer with one step."""
    step = {
        "step_instance_id": 75,
        "status": 4,
        "type": 1,
        "execute_count": 1,
        "end_time": 9,
        name: list(results),
        **changes,
    }
    return {
        "data": {"job_instance": {"job_instance_id": 411, "status": 4, "end_time": 9}, "step_instance_list": [step]}
    }


@pytest.mark.parametrize(
    ("api", "app_type", "method", "path"),
    [
        ("v4", True, "GET", "/api/v4/system/get_job_instance_list"),
        ("v4", False, "GET", "/api/v4/get_job_instance_list"),
        ("v3", True, "GET", "/api/v3/system/get_job_instance_list"),
        ("v3", False, "GET", "/api/v3/get_job_instance_list"),
        ("esb", True, "POST", "/api/c/compapi/v2/jobv3/get_job_instance_list/"),
    ],
)
async def test_list_is_asked_in_the_words_of_the_dialect(api: Any, app_type: bool, method: str, path: str) -> None:
    """Path, method and names of the paging parameters differ, the meaning does not."""
    answer = reply('{"data":{"job_instance_list":[],"data":null}}')
    async with Upstream(answer) as upstream, client() as asking:
        job = JobApi(asking.for_scope(SCOPE), JobPlatform(upstream.url, api, app_type))
        await job.list(SCOPE, 10, 20, status=2, job_instance_id=7, offset=30, deadline=Deadline(5, Clock()))
    (asked,) = upstream.asked
    assert (asked.method, asked.path) == (method, path)
    sent = json.loads(asked.body) if method == "POST" else asked.query
    wanted: dict[str, object] = {
        "bk_scope_type": "biz",
        "bk_scope_id": "2",
        "create_time_start": 10,
        "create_time_end": 20,
        "offset" if api == "v4" else "start": 30,
        "length": 200 if api == "v4" else 1000,
        "status": 2,
        "job_instance_id": 7,
    }
    if method == "GET":
        assert sent == {name: str(value) for name, value in wanted.items()}
    else:
        assert {name: value for name, value in sent.items() if name in wanted} == wanted
        assert asked.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("api", "path", "flag"),
    [
        ("v4", "/api/v4/system/get_job_instance_status", "return_execute_object_result"),
        ("v3", "/api/v3/system/get_job_instance_status", "return_ip_result"),
        ("esb", "/api/c/compapi/v2/jobv3/get_job_instance_status/", "return_ip_result"),
    ],
)
@pytest.mark.parametrize("host_results", [True, False])
async def test_status_asks_for_results_by_the_dialects_flag(api: Any, path: str, flag: str, host_results: bool) -> None:
    """v4 ignores the flag of v3 silently; a boolean in a query is the text true or false."""
    async with Upstream(reply(json.dumps(finished()))) as upstream, client() as asking:
        job = JobApi(asking.for_scope(SCOPE), JobPlatform(upstream.url, api))
        await job.status(SCOPE, 411, host_results=host_results, deadline=Deadline(5, Clock()))
    (asked,) = upstream.asked
    assert asked.path == path
    if api == "esb":
        assert json.loads(asked.body)[flag] is host_results
    else:
        assert asked.query[flag] == str(host_results).lower()


def test_limits_of_the_dialects() -> None:
    """The collector splits windows by these."""
    limits = {}
    apis: list[Literal["v4", "v3", "esb"]] = ["v4", "v3", "esb"]
    for api in apis:
        job = JobApi(client().for_scope(SCOPE), JobPlatform("http://x", api))
        limits[api] = (job.page_size, job.max_offset, job.max_window)
    assert limits == {
        "v4": (200, 10_000, None),
        "v3": (1000, None, 2_592_000_000),
        "esb": (1000, None, 2_592_000_000),
    }


async def test_v3_is_never_asked_for_an_empty_window() -> None:
    """v3 answers 1241007 when the end is not greater than the start."""
    async with Upstream(reply('{"data":{"data":[]}}')) as upstream, client() as asking:
        await JobApi(asking.for_scope(SCOPE), JobPlatform(upstream.url, "v3")).list(
            SCOPE, 10, 10, deadline=Deadline(5, Clock())
        )
    assert upstream.asked[0].query["create_time_end"] == "11"


READ: dict[str, Any] = {
    # file: what of it must come out; for errors (reason, code)
    "job_v3_list__ok_empty_inner_data_is_null.json": (0, []),
    "job_v3_list__ok_bk_biz_id_null_when_compat_toggle_off.json": (2, [(20000000412, 3), (20000000411, 4)]),
    "job_v3_list__ok_total_larger_than_page.json": (48211, [(20000000412, 3), (20000000411, 4)]),
    "job_v3_list__ok_unknown_future_codes.json": (2, [(20000000500, 99), (20000000499, 16)]),
    "job_v3_list__error_http200_missing_or_bad_time.json": ("api_error", "1241007"),
    "job_v3_list__error_http200_start_over_limit.json": ("api_error", "1241010"),
    "job_v3_list__error_http200_scope_not_exist.json": ("not_found", "1243049"),
    "job_v3_list__error_http200_missing_query_param_get.json": ("api_error", "1240003"),
    "job_v3_list__error_http200_no_permission.json": ("permission", "9900403"),
    "job_v3_status__ok_failed_with_ip_results.json": {
        75: [("101", 9, 0), ("102", 9, 0)],
        76: [("101", 9, 0), ("102", 104, 127), ("103", 1, None)],
    },
    "job_v3_status__ok_return_ip_result_false.json": {70: []},
    "job_v3_status__ok_pending_all_times_null.json": {71: [("101", 5, None)]},
    "job_v3_status__ok_waiting_user_manual_confirm_step.json": {80: [], 81: []},
    "job_v3_status__ok_rolling_waiting.json": {90: [("101", 9, 0), ("102", 5, None)]},
    "job_v3_status__ok_large_and_negative_exit_codes.json": {
        92: [("101", 104, 2147483647), ("102", 104, -1073741510), ("103", 104, 255)]
    },
    "job_v3_status__error_http200_not_exist.json": ("not_found", "1244006"),
    "job_v3_status__error_http200_bad_id.json": ("api_error", "1241007"),
    "job_v3_step_status__ok_groups_truncated_to_one_host.json": ("decode", "0"),  # another API
    "job_v3_cron_list__ok.json": (2, [(1000031, 1), (1000032, 2)]),  # another API of the same shape
    "job_v2_status__ok_blocks_string_times.json": ("decode", "0"),  # another API
    "job_v4_list__ok_mixed_statuses_nulls_omitted.json": (
        None,
        [(20000000412 - i, s) for i, s in enumerate((3, 4, 2, 1, 7, 10, 11, 13, 14))],
    ),
    "job_v4_list__ok_empty.json": (None, []),
    "job_v4_list__ok_unknown_future_codes.json": (None, [(20000000500, 99)]),
    "job_v4_list__doc_shape_id_task_status_task_type.json": (None, [(102, 3)]),
    "job_v4_list__error_400_offset_out_of_range.json": ("api_error", "INVALID_ARGUMENT"),
    "job_v4_list__error_400_missing_time.json": ("api_error", "INVALID_ARGUMENT"),
    "job_v4_list__error_403_no_permission.json": ("permission", "NO_PERMISSION"),
    "job_v4_status__ok_failed_with_execute_objects.json": {
        75: [("101", 9, 0)],
        76: [("102", 104, 127), ("103", 1, None)],
    },
    "job_v4_status__ok_ipv6_only_host.json": {97: [("301", 9, 0)]},
    "job_v4_status__ok_host_without_any_ip.json": {98: [("302", 2, None)]},
    "job_v4_status__ok_large_and_negative_exit_codes.json": {
        100: [("101", 104, 2147483647), ("102", 104, -1073741510)]
    },
    "job_v4_status__doc_shape_step_ip_result_list.json": {75: [("101", 9, 0)]},
    "job_v4_status__error_404_not_exist.json": ("not_found", "NOT_FOUND"),
    "job_v4_status__error_400_bad_id.json": ("api_error", "INVALID_ARGUMENT"),
    "job_v4_status__error_400_type_mismatch.json": ("api_error", "INVALID_ARGUMENT"),
    "job_v4_status__error_429_resource_exhausted.json": ("rate_limited", "RESOURCE_EXHAUSTED"),
    "job_v4_status__error_403_no_permission_view_history.json": ("permission", "NO_PERMISSION"),
    "job_gateway__error_401_empty_body.txt": ("auth", ""),
    "job_gateway__error_401_missing_user_info.json": ("auth", "1247002"),
    "esb__error_http200_rate_limited.json": ("rate_limited", "1306429"),
    "esb__error_http200_user_auth_failed.json": ("auth", "1306000"),
    "esb__error_http200_third_party_timeout.json": ("http_5xx", "1306201"),
    "esb__error_http200_third_party_404.json": ("http_5xx", "1306201"),
    "esb__error_http200_third_party_500.json": ("http_5xx", "1306201"),
    "esb__error_http200_third_party_not_json.json": ("http_5xx", "1306201"),
    "esb__error_404_unknown_path.json": ("not_found", ""),
    "esb__job_v3_list_ok_wrapped.json": (1, [(20000000412, 3)]),
    "esb__job_v3_status_error_wrapped.json": ("not_found", "1244006"),
    "gateway__error_429_rate_limit_reset_header_absent.json": ("rate_limited", "1642901"),
    "gateway__error_429_concurrency_limit.json": ("rate_limited", "1642904"),
    "gateway__error_400_app_code_empty.json": ("auth", "1640001"),
    "gateway__error_400_bad_secret.json": ("auth", "1640001"),
    "gateway__error_400_header_not_json.json": ("auth", "1640001"),
    "gateway__error_400_user_not_verified.json": ("auth", "1640001"),
    "gateway__error_400_access_token_invalid.json": ("auth", "1640001"),
    "gateway__error_403_app_no_permission.json": ("permission", "1640301"),
    "gateway__error_403_cross_tenant.json": ("permission", "1640302"),
    "gateway__error_403_ip_not_allowed.json": ("permission", "1640302"),
    "gateway__error_500_auth_backend_unavailable.json": ("http_5xx", "1650001"),
    "gateway__error_504_backend_timeout.json": ("http_5xx", "1650401"),
    "gateway__ok_with_rate_limit_headers.json": (None, []),
}


@pytest.mark.parametrize(
    "sample",
    [sample for sample in SAMPLES if sample["file"].startswith(("job_", "gateway__", "esb__"))],
    ids=lambda sample: sample["file"],
)
async def test_F11_every_sample_is_read_as_its_note_says(sample: dict[str, Any]) -> None:
    """All samples of JOB, gateway and ESB, with their status and headers, over HTTP."""
    name = sample["file"]
    body = (FIXTURES / name).read_bytes()
    api = "v3" if "v3" in name or "v2" in name else "v4"
    asked: dict[str, Any] = {"api": api, "status": sample["http_status"], "headers": sample["headers"]}
    try:
        if "_status__" in name or "status_error" in name:
            answer: ExecutionPage | ExecutionStatus = await ask_status(body, **asked)
        else:
            answer = await ask(body, biz="1" if "doc_shape" in name else "2", **asked)
    except ApiError as error:
        got: Any = (error.reason, error.code)
    else:
        if isinstance(answer, ExecutionPage):
            got = (answer.total, [(found.id, found.status) for found in answer.rows])
        else:
            got = {
                step.id: [
                    (result.host.bk_host_id, result.status, result.exit_code) for result in step.results if result.host
                ]
                for step in answer.steps
            }
    assert got == READ[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"job_instance_id": None, "id": 411},
        {"job_instance_id": "411", "status": "3", "type": "0", "launch_mode": "3", "job_plan_id": "1001"},
        {"status": None, "task_status": 3, "type": None, "task_type": 0},
        {"create_time": "1789000000000", "start_time": 1789000001200.0, "end_time": "1789000004200"},
        {"bk_biz_id": None, "total_time": None, "operator": None, "new_member": {"a": [1]}},
    ],
)
async def test_F12_both_names_and_numbers_as_text_mean_the_same(changes: dict[str, Any]) -> None:
    """Documents and platform disagree on names, gateways on types; the record is the same."""
    odd = {name: value for name, value in row(**changes).items() if value is not None or name in changes}
    assert (await ask(v4(odd))).rows == (ROW,)
    assert (await ask({"code": 0, "data": {"total": "1", "data": [odd]}}, api="v3")).rows == (ROW,)


async def test_F12_an_empty_list_has_several_forms() -> None:
    """v3 sends null inside, others an empty object."""
    forms: list[object] = [[], {}, None]
    for rows in forms:
        assert (await ask({"data": {"job_instance_list": rows}})).rows == ()
        assert (await ask({"data": {"data": rows}}, api="v3")).rows == ()
        answer = finished()
        answer["data"]["step_instance_list"] = rows
        assert (await ask_status(answer)).steps == ()
        assert (await ask_status(finished(step_execute_object_result_list=rows))).steps[0].results == ()


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (v4(row(), row(create_time=None)), "data.job_instance_list[1].create_time"),
        (v4(row(), row(job_instance_id=None)), "data.job_instance_list[1].job_instance_id"),
        (v4(row(status=None)), "data.job_instance_list[0].status"),
        (v4(row(start_time="yesterday")), "data.job_instance_list[0].start_time"),
        (v4(row(create_time=2**63)), "data.job_instance_list[0].create_time"),
        (v4(row(create_time=1e30)), "data.job_instance_list[0].create_time"),
        (v4(row(job_instance_id=1.5)), "data.job_instance_list[0].job_instance_id"),
        ({"data": {}}, "job_instance_list"),
        ({"data": {"job_instance_list": {"0": row()}}}, "data.job_instance_list"),
        ({"data": None}, "data"),
        ({"job_request_id": "x"}, "data"),
    ],
)
async def test_F12_anything_else_is_decode_and_names_the_path(body: dict[str, Any], path: str) -> None:
    """An answer that is not understood is not an empty one."""
    with pytest.raises(ApiError) as caught:
        await ask(body)
    assert caught.value.reason == "decode"
    assert path in str(caught.value)


@pytest.mark.parametrize("id", [2**63, 2**70, -(2**63) - 1, 1e30, str(2**63)])
async def test_F66_a_row_whose_id_is_beyond_64_bits_is_left_out(id: object) -> None:
    """The other rows are read; the one that is left out is known by its creation time, and counts as a row."""
    rows = row(job_instance_id=id, create_time=1789000000007), row()
    for page in (await ask(v4(*rows)), await ask({"code": 0, "data": {"total": 2, "data": list(rows)}}, api="v3")):
        assert page.rows == (ROW,)
        assert (page.unreadable, page.size) == ((1789000000007,), 2)


@pytest.mark.parametrize(
    ("sent", "read"),
    [(1e30, 2**63 - 1), (2**70, 2**63 - 1), (-1e30, -(2**63)), (-5, -5), (1789000004200.5, 1789000004200), (0, 0)],
)
async def test_F66_times_beyond_every_calendar_cost_no_row(sent: object, read: int) -> None:
    """They are kept as the nearest time that 64 bits can tell, which the collector takes for none."""
    (found,) = (await ask(v4(row(start_time=sent, end_time=sent)))).rows
    assert found.end_time == read
    answer = await ask_status(finished({"execute_object": {}, "status": 9, "end_time": sent}, end_time=sent))
    (step,) = answer.steps
    assert (step.end_time, [result.end_time for result in step.results]) == (read, [read])


@pytest.mark.parametrize("member", ["status", "type", "launch_mode", "job_plan_id"])
@pytest.mark.parametrize("value", [2**63, -(2**70), 1e30, "x"])
async def test_F66_enums_of_any_size_cost_no_row(member: str, value: object) -> None:
    """What can be no status, type or mode is unknown."""
    (found,) = (await ask(v4(row(**{member: value})))).rows
    assert UNKNOWN_NUMBER in (found.status, found.task_type, found.launch_mode, found.plan_id)


@pytest.mark.parametrize("where", [{"step_instance_id": 2**63}, {"execute_count": 2**63}, {"execute_count": "x"}])
async def test_F66_a_step_that_cannot_be_kept_is_decode(where: dict[str, Any]) -> None:
    """Its execution is counted without host results, as after any status call that fails for good."""
    with pytest.raises(ApiError) as caught:
        await ask_status(finished(**where))
    assert caught.value.reason == "decode"
    assert next(iter(where)) in str(caught.value)


@pytest.mark.parametrize(
    "scope", [{"bk_scope_type": "biz", "bk_scope_id": "3"}, {"bk_scope_type": "biz_set", "bk_scope_id": "2"}]
)
async def test_4_1_14_rows_and_answers_of_another_scope_are_decode(scope: dict[str, str]) -> None:
    """Not of the business that was asked for: the call fails, whatever else the page holds."""
    page = v4(row(bk_scope_type="biz", bk_scope_id="2"), row(**scope))
    answer = finished()
    answer["data"]["job_instance"] |= scope
    for call, body in ((ask, page), (ask_status, answer)):
        with pytest.raises(ApiError) as caught:
            await call(body)
        assert caught.value.reason == "decode"
        assert "/".join(scope.values()) in str(caught.value)
    for same in ({"bk_scope_id": 2}, {"bk_scope_type": "biz"}, {"bk_scope_type": None, "bk_scope_id": None}):
        assert len((await ask(v4(row(**same)))).rows) == 1


async def test_4_1_14_an_answer_about_another_execution_is_decode() -> None:
    """Of the status call, and of a list that was asked for one id."""
    async with Upstream(reply(json.dumps(finished()))) as upstream, client() as asking:
        job = JobApi(asking.for_scope(SCOPE), JobPlatform(upstream.url, "v4"))
        with pytest.raises(ApiError) as caught:
            await job.status(SCOPE, 412, host_results=True, deadline=Deadline(5, Clock()))
        assert caught.value.reason == "decode"
    async with Upstream(reply(json.dumps(v4(row())))) as upstream, client() as asking:
        job = JobApi(asking.for_scope(SCOPE), JobPlatform(upstream.url, "v4"))
        with pytest.raises(ApiError) as caught:
            await job.list(SCOPE, 1, 2, job_instance_id=412, deadline=Deadline(5, Clock()))
        assert caught.value.reason == "decode"


async def test_F12_v3_without_its_rows_is_no_empty_page() -> None:
    """An inner null is an empty page; no inner data, or no data at all, is an answer that went wrong."""
    for data in ({}, {"total": 0}, None):
        with pytest.raises(ApiError) as caught:
            await ask({"code": 0, "result": True, "data": data}, api="v3")
        assert caught.value.reason == "decode"


@pytest.mark.parametrize("status", [12, 99, "NEW", "", "9" * 5000, -5])
async def test_F13_unknown_statuses_are_kept_and_become_unknown(status: object) -> None:
    """A status of the future does not lose the row; it has ended once there is an end time."""
    (found,) = (await ask(v4(row(status=status)))).rows
    assert found.status == (status if isinstance(status, int) else UNKNOWN_NUMBER)
    assert job_status_slug(found.status) == "unknown"
    assert job_outcome(found.status, ended=found.end_time is not None) == "failure"


async def test_F13_what_only_labels_may_be_absent() -> None:
    """Type, launch mode, plan and name may be null or missing: the execution is counted all the same."""
    bare = {"job_instance_id": 1, "status": 2, "create_time": 5}
    nulls = row(type=None, launch_mode=None, job_plan_id=None, name=None, start_time=None, end_time=None)
    for odd in (bare, {**nulls, **bare}):
        (found,) = (await ask(v4(odd))).rows
        assert (found.id, found.status, found.task_type, found.launch_mode) == (1, 2, UNKNOWN_NUMBER, UNKNOWN_NUMBER)
        assert (found.plan_id, found.name, found.create_time, found.end_time) == (NO_PLAN, "", 5, None)


async def test_F09_F10_unusual_names_cost_no_page() -> None:
    """Invalid bytes, lone surrogates and controls are replaced, a long name is cut, the other rows are untouched."""
    page = json.dumps(v4(row(), row(name="BYTES"), row(name="\ud800"), row(name="a\nb\u202e"), row(name="长" * 5000)))
    rows = (await ask(page.encode().replace(b"BYTES", b"a\xffb"))).rows
    assert [found.name for found in rows] == ["nightly", "a\ufffdb", "\ufffd", "a\ufffdb\ufffd", "长" * 256]
    odd: list[object] = [["x"], {"a": "b"}, 7, True, None]
    assert [found.name for found in (await ask(v4(*(row(name=name) for name in odd)))).rows] == [""] * len(odd)


async def test_F14_times_pass_through_as_they_came() -> None:
    """Zero, far future and an end before the start are for the collector to judge."""
    odd = row(create_time=0, start_time=253402300799000, end_time=1)
    (found,) = (await ask(v4(odd))).rows
    assert (found.create_time, found.start_time, found.end_time) == (0, 253402300799000, 1)


HOST = {"bk_host_id": 101, "bk_cloud_id": 0, "ip": "10.0.0.1", "ipv6": "fd00::1"}


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ({"type": 1, "resource_id": "101", "host": HOST}, Host("0", "101", "10.0.0.1")),
        ({"type": "1", "resource_id": 101, "host": {**HOST, "bk_host_id": "101"}}, Host("0", "101", "10.0.0.1")),
        ({"type": 1, "host": {"bk_host_id": 5, "bk_cloud_id": 7, "ipv6": "fd00::3"}}, Host("7", "5", "fd00::3")),
        ({"type": 1, "resource_id": "302", "host": {"bk_cloud_id": 7}}, Host("7", "302", "")),
        ({"type": 1, "resource_id": "302"}, Host("", "302", "")),
        ({"type": 1, "host": {**HOST, "bk_host_id": -1}}, Host("0", "", "10.0.0.1")),
        ({"type": 1, "host": {"ip": "10.0.0.1\n", "bk_cloud_id": None}}, Host("", "", "10.0.0.1\ufffd")),
        ({"type": 2, "resource_id": "88", "container": {"id": 88}}, None),
        ({"type": 2, "resource_id": "88", "host": HOST}, None),
        ({"type": 9, "resource_id": "88"}, None),
        ({"type": 9, "resource_id": "88", "host": HOST}, Host("0", "101", "10.0.0.1")),
        ({"type": 1}, None),
        ({}, None),
    ],
)
async def test_v4_targets_are_hosts_by_their_id(target: dict[str, Any], host: Host | None) -> None:
    """`resource_id` stands in for the id of a host; containers and what has no identity are no hosts."""
    (step,) = (await ask_status(finished({"execute_object": target, "status": 104}))).steps
    assert told(step) == [(host, 104, None, None)]


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ({"bk_host_id": 101, "bk_cloud_id": 0, "ip": "10.0.0.1"}, Host("0", "101", "10.0.0.1")),
        ({"bk_host_id": None, "bk_cloud_id": "5", "ip": "10.0.0.1"}, Host("5", "", "10.0.0.1")),
        ({"bk_host_id": 0, "bk_cloud_id": None, "ip": "10.0.0.1"}, Host("", "", "10.0.0.1")),
        ({"bk_host_id": 101, "bk_cloud_id": 0, "ip": None}, Host("0", "101", "")),
        ({"bk_host_id": None, "bk_cloud_id": 0, "ip": ""}, None),
    ],
)
@pytest.mark.parametrize("api", ["v3", "v4"])
async def test_v3_targets_may_lack_id_or_address(api: str, target: dict[str, Any], host: Host | None) -> None:
    """Rows from before the host id have none, IPv6-only hosts no address; one v4 build used the names of v3."""
    answer = finished({**target, "status": 9}, name="step_ip_result_list")
    (step,) = (await ask_status(answer, api=api)).steps
    assert told(step) == [(host, 9, None, None)]


@pytest.mark.parametrize("name", ["step_execute_object_result_list", "step_ip_result_list"])
async def test_F12_a_target_is_read_by_what_is_in_it(name: str) -> None:
    """Either list may have rows in the form of the other dialect, or of both."""
    flat = {"bk_host_id": 7, "bk_cloud_id": 0, "ip": "10.0.0.1", "status": 9}
    nested = {"execute_object": {"type": 1, "resource_id": "8", "host": {"bk_cloud_id": 0}}, "status": 9}
    for rows in ([flat, nested], [flat, flat], [nested, nested], [{**flat, "execute_object": None}, nested]):
        (step,) = (await ask_status(finished(*rows, name=name))).steps
        assert [host for host, *_ in told(step)] == [
            Host("0", "8", "") if row is nested else Host("0", "7", "10.0.0.1") for row in rows
        ]


@pytest.mark.parametrize(
    ("sent", "exit_code"),
    [(-1073741510, -1073741510), ("127", 127), ("-1", -1), ("killed", None), ("", None), (None, None)],
)
async def test_F12_exit_codes_are_numbers_or_unknown(sent: object, exit_code: int | None) -> None:
    """An exit code may be a number, a text or null."""
    result = {"execute_object": {"type": 1, "resource_id": "1"}, "status": "104", "exit_code": sent, "end_time": "9"}
    (step,) = (await ask_status(finished(result))).steps
    assert told(step) == [(Host("", "1", ""), 104, exit_code, 9)]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (finished(step_instance_id=None), "data.step_instance_list[0].step_instance_id"),
        (finished(status=None), "data.step_instance_list[0].status"),
        (finished({}), "data.step_instance_list[0].step_execute_object_result_list[0].status"),
        (finished({"status": []}), "data.step_instance_list[0].step_execute_object_result_list[0].status"),
        ({"data": {"step_instance_list": []}}, "job_instance"),
        ({"data": {"job_instance": {"job_instance_id": 1, "status": 3}}}, "step_instance_list"),
    ],
)
async def test_F12_status_errors_name_the_path(body: dict[str, Any], path: str) -> None:
    """As for the list."""
    with pytest.raises(ApiError) as caught:
        await ask_status(body)
    assert caught.value.reason == "decode"
    assert path in str(caught.value)


async def test_v3_container_failure_is_reported_by_its_code() -> None:
    """The collector asks again without host results when it sees this code; it is not retried here."""
    recorder = Recorder()
    answer = reply('{"code":1240002,"result":false,"message":"Internal error"}')
    async with Upstream(answer) as upstream, client(recorder) as asking:
        job = JobApi(asking.for_scope(SCOPE), JobPlatform(upstream.url, "v3"))
        with pytest.raises(ApiError) as caught:
            await job.status(SCOPE, 411, host_results=True, deadline=Deadline(5, Clock()))
    assert (caught.value.reason, caught.value.code, caught.value.api) == (
        "api_error",
        "1240002",
        "get_job_instance_status",
    )
    assert recorder.requests == [("get_job_instance_status", "200")]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "host", "type", "ip"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted([*row(), "id", "task_status", "task_type"])), _JSON))
def test_F50_any_row_is_an_execution_or_an_api_error(odd: dict[str, Any]) -> None:
    """Whatever stands in the members, the fields of the record have their types and the state can keep them."""
    with contextlib.suppress(ApiError):
        page = read(Reply(200, json.dumps(v4({**row(), **odd})).encode(), {}), LIST_V4)
        for found in page.rows:
            numbers = msgspec.structs.asdict(found)
            for text in ("raw_name", "scope_type", "scope_id"):
                del numbers[text]
            msgspec.convert(numbers, dict[str, int | None])
            del numbers["start_time"]
            assert msgspec.msgpack.encode([found.name, *numbers.values()])
