"""F44: answers with a row for each of very many hosts are cut into pieces, and say the same as in one piece."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.blueking.envelope import Reply, read
from exporter.blueking.job import LONG, STATUS, ExecutionStatus
from exporter.blueking.long_lists import PIECE, cut_out
from exporter.errors import ApiError

LISTS = ("step_ip_result_list", "step_execute_object_result_list")
Row = dict[str, Any]


def v3(number: int, **more: Any) -> Row:
    return {"bk_host_id": number, "ip": "10.0.0.1", "bk_cloud_id": 0, "status": 9, "exit_code": 0, **more}


def v4(number: int, **more: Any) -> Row:
    host = {"bk_host_id": number, "ip": "10.0.0.1"}
    return {"execute_object": {"type": 1, "resource_id": number, "host": host}, "status": 9, "exit_code": 0, **more}


def status(*lists: list[Row], name: str = LISTS[0], indent: int | None = None) -> bytes:
    """An execution with a step for each of these lists of results."""
    steps = [{"step_instance_id": id, "status": 4, "type": 1, name: rows} for id, rows in enumerate(lists)]
    body = {"data": {"job_instance": {"job_instance_id": 7, "status": 4}, "step_instance_list": steps}}
    return json.dumps(body, indent=indent).encode()


def decoded(body: bytes) -> ExecutionStatus:
    assert len(body) > LONG
    return read(Reply(200, bytearray(body), {}), STATUS)


def results(answer: ExecutionStatus) -> list[list[tuple[str, int, int | None]]]:
    """Each result of each step."""
    return [
        [(r.host.bk_host_id if r.host else "", r.status, r.exit_code) for r in step.results] for step in answer.steps
    ]


def expected(*lists: list[Row]) -> list[list[tuple[str, int, int | None]]]:
    def number(row: Row) -> str:
        return str(row["bk_host_id"] if "bk_host_id" in row else row["execute_object"]["resource_id"])

    return [[(number(row), int(row["status"]), row["exit_code"]) for row in rows] for rows in lists]


TEXTS = st.sampled_from(
    [
        '}],"a":[{"',
        "},{",
        "} ,\n {",
        '"',
        "\\",
        '\\"},{\\"',
        "}]",
        '{"step_ip_result_list":[{',
        "x" * 3000,
        "主机",
        "\x7f",
    ]
)
EXTRAS = st.dictionaries(
    st.sampled_from(["tags", "step_ip_result_list", "s"]),
    TEXTS | st.lists(st.fixed_dictionaries({"a": TEXTS, "b": st.lists(st.just({}), max_size=3)}), max_size=3),
    max_size=3,
)


@given(
    st.lists(st.lists(EXTRAS, min_size=1, max_size=9), min_size=1, max_size=3),
    st.sampled_from([(v3, LISTS[0]), (v4, LISTS[1])]),
    st.sampled_from([None, 1]),
    st.booleans(),
)
@settings(max_examples=40)
def test_F44_a_long_status_reads_as_a_short_one(
    extras: list[list[Row]], form: tuple[Any, str], indent: int | None, numbers_as_text: bool
) -> None:
    """Whatever stands in the rows: texts that look like the end of a row, lists in rows, the names of the lists."""
    make, name = form
    lists = [[make(1 + number, **extra) for number, extra in enumerate(step)] for step in extras]
    many = [make(1 + number, **extra, log="x" * 16_000) for number, extra in enumerate(extras[0] * 300)][:300]
    if numbers_as_text:
        many[-1]["status"] = "104"
    answer = decoded(status(*lists, many, name=name, indent=indent))
    assert results(answer) == expected(*lists, many)
    assert [len(step.results) for step in answer.steps] == [*map(len, lists), len(many)]
    assert [[r.status for r in reversed(step.results)][::-1] for step in answer.steps] == [
        [r.status for r in step.results] for step in answer.steps
    ]


@pytest.mark.parametrize(("make", "name"), [(v3, LISTS[0]), (v4, LISTS[1])])
def test_F44_many_hosts_are_kept_in_small_pieces(make: Any, name: str) -> None:
    """Nothing of the answer is decoded at once but what surrounds the lists and one piece."""
    rows = [make(number, log="x" * 20) for number in range(1, 60_001)]
    body = status(rows, [], rows[:1], name=name)
    cut = cut_out(body, LISTS, lambda number: b'{"number":%d}' % number)
    assert cut is not None
    rest, lists = cut
    assert len(rest) < 1000
    assert [(one.name, len(one)) for one in lists] == [(name, 60_000), (name, 1)]
    arrays = list(lists[0].arrays())
    assert [json.loads(array) for _, array in arrays] == [
        rows[before:after] for (before, _), (after, _) in zip(arrays, [*arrays[1:], (60_000, b"")], strict=True)
    ]
    assert max(len(array) for _, array in arrays) < PIECE + 1000
    assert results(decoded(body)) == expected(rows, [], rows[:1])


@pytest.mark.parametrize(
    ("odd", "path"),
    [
        ({"status": None}, "data.step_instance_list[1].step_ip_result_list[19999].status is missing"),
        ({"end_time": []}, "`data.step_instance_list[1].step_ip_result_list[19999].end_time`"),
        ({"bk_host_id": {}}, "`data.step_instance_list[1].step_ip_result_list[19999].bk_host_id`"),
    ],
)
def test_F12_the_error_names_the_row_of_a_long_list(odd: Row, path: str) -> None:
    """Counted over all pieces."""
    rows = [v3(number, log="x" * 200) for number in range(1, 20_001)]
    with pytest.raises(ApiError) as caught:
        decoded(status([v3(1)], [*rows[:-1], v3(1, **odd)]))
    assert caught.value.reason == "decode"
    assert path in str(caught.value)


@pytest.mark.parametrize("end", [b"", b"}", b"]}]}}x", b'{"', b",]}]}}", b"\xff]}]}}"])
def test_F04_a_long_status_that_is_broken_is_decode(end: bytes) -> None:
    """Cut short, with a tail that is none, or with bytes that are no text."""
    body = status([v3(number, log="x" * 200) for number in range(1, 20_001)])
    with pytest.raises(ApiError) as caught:
        decoded(body[: -len(b"]}]}}")] + end)
    assert caught.value.reason == "decode"


def test_F09_invalid_text_in_a_long_list_costs_nothing_else() -> None:
    """Bytes that are no UTF-8 and lone surrogates are replaced, as in a short answer."""
    rows = [v3(number, log="@" + "x" * 200) for number in range(1, 20_001)]
    body = status(rows).replace(b"@", b"\xff\\ud800")
    assert results(decoded(body)) == expected(rows)


def test_a_row_that_looks_like_a_placeholder_is_a_row() -> None:
    """Where the platform itself sends such a name as id, it is that of no host."""
    answer = decoded(status([v3(1, bk_host_id="list 0")], [v3(2, log="x" * LONG)]))
    assert [[r.status for r in step.results] for step in answer.steps] == [[9], [9]]
