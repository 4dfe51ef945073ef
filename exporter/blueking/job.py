"""JOB: the history of executions and the status of one, in the dialects v4, v3 (gateway) and ESB.

| | v4 | v3 | esb |
|---|---|---|---|
| list | GET URL/api/v4/get_job_instance_list | GET URL/api/v3/… | POST URL/api/c/compapi/v2/jobv3/…/ |
| page | offset ≤ 10000, length ≤ 200, no total | start, length ≤ 1000, total; window ≤ 30 days | as v3 |
| per-target results | return_execute_object_result | return_ip_result, no IPv6, no containers | as v3 |
| nulls | left out | kept | kept |

App-type resources have twins under /system/. Both the names that the platform sends (job_instance_id, status, type) and
those of its documents (id, task_status, task_type) are understood. Times are ms since the epoch.

An answer about another scope or another execution than the one asked for is an error (reason `decode`). A row whose id
is beyond 64 bits is left out and reported by its creation time; other numbers beyond 64 bits are kept as the nearest
ones (times) or as unknown (enums).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import msgspec
from msgspec import Raw, Struct, field

from exporter.blueking.client import Deadline, Identity, Operation, ScopeClient
from exporter.blueking.envelope import Empty, Int, ResponseDecoder, WrongShape, listed, text_in
from exporter.blueking.long_lists import LongList, count_rows, cut_out
from exporter.blueking.text import clean_text
from exporter.config.schema import JobPlatform
from exporter.errors import ApiError
from exporter.model import Host, Scope

T = TypeVar("T")
W = TypeVar("W")

UNKNOWN_NUMBER = -1
"""Stands for an enum value that is absent or no number, as the status "NEW": in no table, so it becomes `unknown`."""

NO_PLAN = -1
"""`plan_id` of ad-hoc runs."""

_V3_MAX_WINDOW = 30 * 86_400_000

_Number: TypeAlias = int | float | str | None
"""A number in every form that is understood; of any size."""
_TargetNumber: TypeAlias = int | str | None
"""The same in the fast form of a target, whose id is stored as text."""
_LEAST, _MOST = -(2**63), 2**63 - 1


class Execution(Struct, frozen=True, gc=False, kw_only=True):
    """One row of the history. Times in ms since the epoch as the platform gives them; unknown numbers are kept.

    Field names on the wire and their order are the platform's: the usual page decodes straight into these, and fastest
    where the next member is the next field. `start_time` may be of any size: it is checked before it is kept.
    """

    scope_type: str = field(name="bk_scope_type", default="")
    scope_id: str = field(name="bk_scope_id", default="")
    id: Int = field(name="job_instance_id")
    plan_id: Int = field(name="job_plan_id")
    raw_name: Raw = field(name="name")
    launch_mode: Int
    status: Int
    start_time: int | None = None
    end_time: Int | None = None
    create_time: Int
    task_type: Int = field(name="type")

    @property
    def name(self) -> str:
        """Read when asked for: of most rows nobody does. "" where it is no text."""
        return text_in(self.raw_name)


class ExecutionPage(Struct, frozen=True):
    """One page, newest first; rows of one create_time have no order. `total` counts the whole window, None in v4.
    `unreadable`: creation times (ms) of rows that are left out because their id is beyond 64 bits."""

    rows: tuple[Execution, ...]
    total: int | None
    unreadable: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Rows as the platform counts them."""
        return len(self.rows) + len(self.unreadable)

    @property
    def times(self) -> list[int]:
        """Creation times of all rows."""
        return [row.create_time for row in self.rows] + list(self.unreadable)


class TargetResult(Protocol):
    """The result of a step on one target, as it came: tens of thousands may stand in one answer, so the host is read
    only when it is asked for, and numbers may be of any size."""

    @property
    def status(self) -> int: ...
    @property
    def exit_code(self) -> int | None: ...
    @property
    def end_time(self) -> int | None: ...
    @property
    def host(self) -> Host | None:
        """None for containers and for targets without any identity."""


class _Host(Struct, frozen=True, gc=False):
    bk_host_id: _TargetNumber = None
    bk_cloud_id: _TargetNumber = None
    ip: str | None = None
    ipv6: str | None = None


class _ExecuteObject(Struct, frozen=True, gc=False):
    """`type` 1 is a host, whose `resource_id` is its id in the CMDB; 2 is a container, others are not known."""

    type: _TargetNumber = None
    resource_id: _TargetNumber = None
    host: _Host | None = None


class ObjectResult(Struct, frozen=True, gc=False, kw_only=True):
    """`TargetResult` of v4."""

    execute_object: _ExecuteObject
    status: int
    exit_code: int | None = None
    end_time: int | None = None

    @property
    def host(self) -> Host | None:
        target, kind = self.execute_object, _number(self.execute_object.type)
        if kind == _CONTAINER:
            return None
        host = target.host or _Host()
        bk_host_id = _host_id(host.bk_host_id) or (_host_id(target.resource_id) if kind == _HOST else "")
        return _host(bk_host_id, host.bk_cloud_id, host.ip or host.ipv6)


class IpResult(Struct, frozen=True, gc=False, kw_only=True):
    """`TargetResult` of v3, which puts the host into the row."""

    bk_host_id: _TargetNumber
    ip: str | None = None
    bk_cloud_id: _TargetNumber = None
    status: int
    exit_code: int | None = None
    end_time: int | None = None
    ipv6: str | None = None

    @property
    def host(self) -> Host | None:
        return _host(_host_id(self.bk_host_id), self.bk_cloud_id, self.ip or self.ipv6)


def _host(bk_host_id: str, bk_cloud_id: _TargetNumber, ip: str | None) -> Host | None:
    """None without id and address: such targets would all be taken for the same one."""
    if not bk_host_id and not ip:
        return None
    cloud = "" if bk_cloud_id is None else bk_cloud_id
    # Nearly all are numbers, which need no cleaning.
    return Host(clean_text(cloud) if isinstance(cloud, str) else str(cloud), bk_host_id, clean_text(ip or ""))


class TargetResults(Protocol):
    """The results of a step. Where they are many, each pass over them decodes them anew."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[TargetResult]: ...
    def __reversed__(self) -> Iterator[TargetResult]: ...


class Step(Struct, frozen=True):
    """A step and the results of its newest attempt; `execute_count` 0 is the first."""

    id: int
    step_type: int
    status: int
    execute_count: int
    end_time: int | None
    results: TargetResults


class ExecutionStatus(Struct, frozen=True):
    """An execution with its steps, in their order. `scope_type` and `scope_id` are empty where the answer has none."""

    id: int
    status: int
    end_time: int | None
    steps: tuple[Step, ...]
    scope_type: str = ""
    scope_id: str = ""


class JobApi:
    """The two calls of one JOB platform. Both raise ApiError only."""

    def __init__(self, client: ScopeClient, platform: JobPlatform) -> None:
        self._client = client
        self.web_url = platform.web_url or ""
        self._v4 = platform.api == "v4"
        self._identity: Identity = "esb" if platform.api == "esb" else "app" if platform.app_type else "user"
        if self._identity == "esb":
            self._url = platform.url + "/api/c/compapi/v2/jobv3/{api}/"
        else:
            self._url = f"{platform.url}/api/{platform.api}/{'system/' if platform.app_type else ''}{{api}}"
        self.page_size = 200 if self._v4 else 1000
        """Rows that one page holds at most."""
        self.max_offset: int | None = 10_000 if self._v4 else None
        """The largest offset; None where only the operator may have set one (then code 1241010)."""
        self.max_window: int | None = None if self._v4 else _V3_MAX_WINDOW
        """The longest window in ms, None for any."""

    async def list(
        self,
        scope: Scope,
        begin: int,
        end: int,
        *,
        deadline: Deadline,
        status: int | None = None,
        job_instance_id: int | None = None,
        offset: int = 0,
        length: int | None = None,
    ) -> ExecutionPage:
        """Executions created in [begin, end], both inclusive, in ms.

        With `job_instance_id` the platform ignores the other filters except the scope. v3 refuses begin == end: it is
        asked for one ms more, so rows of end + 1 may be among them. Raises ApiError, `decode` for rows of another scope
        or id.
        """
        params: dict[str, object] = {
            "bk_scope_type": scope.bk_scope_type,
            "bk_scope_id": scope.bk_scope_id,
            "create_time_start": begin,
            "create_time_end": end if self._v4 else max(end, begin + 1),
            "offset" if self._v4 else "start": offset,
            "length": self.page_size if length is None else length,
            "status": status,
            "job_instance_id": job_instance_id,
        }
        page = await self._ask("get_job_instance_list", params, LIST_V4 if self._v4 else LIST_V3, deadline)
        kind, id = scope.bk_scope_type, scope.bk_scope_id
        for row in page.rows:
            if row.scope_id != id or row.scope_type != kind:
                _check_scope(row, scope, "get_job_instance_list")
            if job_instance_id is not None and row.id != job_instance_id:
                raise _other_id(row.id, job_instance_id, "get_job_instance_list")
        return page

    async def status(
        self, scope: Scope, job_instance_id: int, *, host_results: bool, deadline: Deadline
    ) -> ExecutionStatus:
        """One execution with its steps, with per-target results if asked for.

        v3 fails completely with ApiError code 1240002 where a target is a container and results are asked for. Raises
        ApiError, `decode` for an answer about another scope or id.
        """
        params: dict[str, object] = {
            "bk_scope_type": scope.bk_scope_type,
            "bk_scope_id": scope.bk_scope_id,
            "job_instance_id": job_instance_id,
            "return_execute_object_result" if self._v4 else "return_ip_result": host_results,
        }
        answer = await self._ask("get_job_instance_status", params, STATUS, deadline)
        _check_scope(answer, scope, "get_job_instance_status")
        if answer.id != job_instance_id:
            raise _other_id(answer.id, job_instance_id, "get_job_instance_status")
        return answer

    def _ask(
        self, api: str, params: dict[str, object], decoders: Sequence[ResponseDecoder[Any, T]], deadline: Deadline
    ) -> Awaitable[T]:
        method: Literal["GET", "POST"] = "POST" if self._identity == "esb" else "GET"
        operation = Operation(api, "job", self._identity, method, self._url.format(api=api), params)
        return self._client.call(operation, decoders, deadline=deadline)


def _check_scope(given: Execution | ExecutionStatus, asked: Scope, api: str) -> None:
    # Documents and some versions leave the scope out.
    kind, id = given.scope_type or asked.bk_scope_type, given.scope_id or asked.bk_scope_id
    if (kind, id) != (asked.bk_scope_type, asked.bk_scope_id):
        raise ApiError("decode", f"execution {given.id} is of scope {clean_text(f'{kind}/{id}', 64)}", api=api)


def _other_id(given: int, asked: int, api: str) -> ApiError:
    return ApiError("decode", f"the answer is about execution {given}, not about {asked}", api=api)


# Reading a page. The usual one decodes straight into its rows; only what differs takes the longer way.


class _UsualV4(Struct):
    job_instance_list: list[Execution]


class _UsualV3(Struct):
    data: list[Execution]
    total: Int | None = None


class _Row(Struct, gc=False):
    """A row in every form that is understood: aliases, numbers as text, nulls."""

    bk_scope_type: str | None = None
    bk_scope_id: int | str | None = None
    job_instance_id: _Number = None
    id: _Number = None
    status: _Number = None
    task_status: _Number = None
    type: _Number = None
    task_type: _Number = None
    launch_mode: _Number = None
    job_plan_id: _Number = None
    name: Raw = Raw()
    create_time: _Number = None
    start_time: _Number = None
    end_time: _Number = None


class _AnyV4(Struct):
    job_instance_list: list[_Row] | Empty | None


class _AnyV3(Struct):
    data: list[_Row] | Empty | None
    total: Int | None = None


def _page(rows: list[_Row] | Empty | None, total: int | None, path: str) -> ExecutionPage:
    found: list[Execution] = []
    unreadable: list[int] = []
    for index, row in enumerate(listed(rows)):
        at = f"{path}[{index}]"
        id = _whole(_either(row.job_instance_id, row.id), f"{at}.job_instance_id")
        created = _int64(row.create_time, f"{at}.create_time")
        if _LEAST <= id <= _MOST:
            found.append(_execution(row, id, created, at))
        else:
            unreadable.append(created)
    return ExecutionPage(tuple(found), total, tuple(unreadable))


def _execution(row: _Row, id: int, created: int, path: str) -> Execution:
    return Execution(
        scope_type=row.bk_scope_type or "",
        scope_id="" if row.bk_scope_id is None else str(row.bk_scope_id),
        id=id,
        status=_status(_either(row.status, row.task_status), f"{path}.status"),
        task_type=_number(_either(row.type, row.task_type)),
        launch_mode=_number(row.launch_mode),
        plan_id=NO_PLAN if row.job_plan_id is None else _number(row.job_plan_id),
        raw_name=row.name,
        create_time=created,
        start_time=_time(row.start_time, f"{path}.start_time"),
        end_time=_time(row.end_time, f"{path}.end_time"),
    )


LIST_V4: Sequence[ResponseDecoder[Any, ExecutionPage]] = (
    ResponseDecoder(_UsualV4, lambda page: ExecutionPage(tuple(page.job_instance_list), None)),
    ResponseDecoder(_AnyV4, lambda page: _page(page.job_instance_list, None, "data.job_instance_list"), strict=False),
)
LIST_V3: Sequence[ResponseDecoder[Any, ExecutionPage]] = (
    ResponseDecoder(_UsualV3, lambda page: ExecutionPage(tuple(page.data), page.total)),
    ResponseDecoder(_AnyV3, lambda page: _page(page.data, page.total, "data.data"), strict=False),
)


# Reading a status, in the same two ways.


class _UsualInstance(Struct, kw_only=True):
    bk_scope_type: str = ""
    bk_scope_id: str = ""
    job_instance_id: Int
    status: Int
    end_time: Int | None = None


class _UsualStep(Struct):
    step_instance_id: Int
    status: Int
    type: Int
    execute_count: Int = 0
    end_time: Int | None = None
    step_ip_result_list: tuple[IpResult, ...] | None = None
    step_execute_object_result_list: tuple[ObjectResult, ...] | None = None


class _UsualStatus(Struct):
    job_instance: _UsualInstance
    step_instance_list: list[_UsualStep]


def _usual_status(data: _UsualStatus) -> ExecutionStatus:
    instance = data.job_instance
    steps = tuple(_usual_step(step) for step in data.step_instance_list)
    return ExecutionStatus(
        instance.job_instance_id,
        instance.status,
        instance.end_time,
        steps,
        instance.bk_scope_type,
        instance.bk_scope_id,
    )


def _usual_step(step: _UsualStep) -> Step:
    results: tuple[TargetResult, ...] | None = step.step_execute_object_result_list
    if results is None:
        results = step.step_ip_result_list or ()
    return Step(step.step_instance_id, step.type, step.status, step.execute_count, step.end_time, results)


class _Result(_Host, frozen=True, gc=False):
    status: _Number = None
    exit_code: _Number = None
    end_time: _Number = None
    execute_object: _ExecuteObject | None = None


class _Step(Struct):
    step_instance_id: _Number = None
    status: _Number = None
    type: _Number = None
    execute_count: _Number = None
    end_time: _Number = None
    step_ip_result_list: list[_Result] | Empty | None = None
    step_execute_object_result_list: list[_Result] | Empty | None = None


class _Instance(Struct):
    bk_scope_type: str | None = None
    bk_scope_id: int | str | None = None
    job_instance_id: _Number = None
    id: _Number = None
    status: _Number = None
    task_status: _Number = None
    end_time: _Number = None


class _Status(Struct):
    job_instance: _Instance
    step_instance_list: list[_Step] | Empty | None


def _execution_status(data: _Status) -> ExecutionStatus:
    instance, steps = data.job_instance, data.step_instance_list
    path = "data.job_instance"
    return ExecutionStatus(
        id=_int64(_either(instance.job_instance_id, instance.id), f"{path}.job_instance_id"),
        status=_status(_either(instance.status, instance.task_status), f"{path}.status"),
        end_time=_time(instance.end_time, f"{path}.end_time"),
        steps=tuple(_step(step, f"data.step_instance_list[{index}]") for index, step in enumerate(listed(steps))),
        scope_type=instance.bk_scope_type or "",
        scope_id="" if instance.bk_scope_id is None else str(instance.bk_scope_id),
    )


def _step(step: _Step, path: str) -> Step:
    name, results = "step_execute_object_result_list", step.step_execute_object_result_list
    if results is None:
        name, results = "step_ip_result_list", step.step_ip_result_list
    return Step(
        id=_int64(step.step_instance_id, f"{path}.step_instance_id"),
        step_type=_number(step.type),
        status=_status(step.status, f"{path}.status"),
        execute_count=_int64(step.execute_count or 0, f"{path}.execute_count"),
        end_time=_time(step.end_time, f"{path}.end_time"),
        results=tuple([_result(row, f"{path}.{name}", index) for index, row in enumerate(listed(results))]),
    )


def _result(result: _Result, path: str, index: int) -> TargetResult:
    at = f"{path}[{index}]"
    status, exit_code = _status(result.status, f"{at}.status"), _integer(result.exit_code)
    end_time = _time(result.end_time, f"{at}.end_time")
    if result.execute_object is not None:
        return ObjectResult(execute_object=result.execute_object, status=status, exit_code=exit_code, end_time=end_time)
    return IpResult(
        bk_host_id=result.bk_host_id,
        ip=result.ip,
        bk_cloud_id=result.bk_cloud_id,
        status=status,
        exit_code=exit_code,
        end_time=end_time,
        ipv6=result.ipv6,
    )


_HOST, _CONTAINER = 1, 2


def _host_id(value: _TargetNumber) -> str:
    """The id in the CMDB; 0, -1 and null are none."""
    number = _integer(value) or 0
    return str(number) if 0 < number <= _MOST else ""


# Reading a status with so many results that they are taken out first, and decoded piece by piece.

LONG = 4 * 1024 * 1024
"""Bytes; of a longer status the results stay compressed."""
_RESULT_LISTS = ("step_ip_result_list", "step_execute_object_result_list")


class _ManyResults:
    """`TargetResults` out of a long list; all of them are valid. `read` decodes an array that begins at some index."""

    def __init__(self, rows: LongList, read: Callable[[bytes, int], Sequence[TargetResult]]) -> None:
        self._rows = rows
        self._read = read

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[TargetResult]:
        return itertools.chain.from_iterable(self._read(array, before) for before, array in self._rows.arrays())

    def __reversed__(self) -> Iterator[TargetResult]:
        return itertools.chain.from_iterable(reversed(self._read(array, 0)) for array in self._rows.arrays_backwards())


class _StatusDecoder(ResponseDecoder[W, ExecutionStatus]):
    """`rows` reads a long list that stands at a path. `count`: see `cut_out`."""

    def __init__(
        self,
        wire: type[W],
        build: Callable[[W], ExecutionStatus],
        rows: Callable[[LongList, str], TargetResults],
        count: Callable[[str, bytes], int],
        *,
        strict: bool = True,
    ) -> None:
        super().__init__(wire, build, strict=strict)
        self._rows = rows
        self._count = count

    def read(self, body: bytes | bytearray) -> ExecutionStatus:
        cut = cut_out(body, _RESULT_LISTS, _placeholder, self._count) if len(body) > LONG else None
        if cut is None:
            return super().read(body)
        rest, lists = cut
        answer = super().read(rest)
        steps = tuple(self._with_results(step, index, lists) for index, step in enumerate(answer.steps))
        return msgspec.structs.replace(answer, steps=steps)

    def _with_results(self, step: Step, index: int, lists: Sequence[LongList]) -> Step:
        number = _number_of_list(step.results)
        if number is None or number >= len(lists):
            return step
        rows = lists[number]
        path = f"data.step_instance_list[{index}].{rows.name}"
        return msgspec.structs.replace(step, results=self._rows(rows, path))


def _placeholder(number: int) -> bytes:
    """A result of either dialect that names the list which it stands for."""
    return b'{"bk_host_id":"list %d","status":0,"execute_object":{"resource_id":"list %d"}}' % (number, number)


def _number_of_list(results: TargetResults) -> int | None:
    """The number in a placeholder, None for results as the platform sends them."""
    row = next(iter(results), None) if len(results) == 1 else None
    name = row.execute_object.resource_id if isinstance(row, ObjectResult) else getattr(row, "bk_host_id", None)
    found = re.fullmatch(r"list (\d{1,9})", name) if isinstance(name, str) else None
    return int(found[1]) if found else None


_usual_rows: Mapping[str, msgspec.json.Decoder[Any]] = {
    "step_ip_result_list": msgspec.json.Decoder(tuple[IpResult, ...]),
    "step_execute_object_result_list": msgspec.json.Decoder(tuple[ObjectResult, ...]),
}
_any_rows: msgspec.json.Decoder[list[_Result]] = msgspec.json.Decoder(list[_Result], strict=False)


def _count_usual(name: str, array: bytes) -> int:
    """The number of rows, all of which have the usual form."""
    return len(_usual_rows[name].decode(array))


def _many_usual(rows: LongList, path: str) -> TargetResults:
    decode = _usual_rows[rows.name].decode
    return _ManyResults(rows, lambda array, before: decode(array))


def _many_of_any_form(rows: LongList, path: str) -> TargetResults:
    def read(array: bytes, before: int) -> Sequence[TargetResult]:
        try:
            decoded = _any_rows.decode(array)
        except msgspec.ValidationError as error:
            message = re.sub(r"`\$\[(\d+)\]", lambda at: f"`{path}[{before + int(at[1])}]", str(error))
            raise WrongShape(message) from None
        return [_result(row, path, index) for index, row in enumerate(decoded, before)]

    for before, array in rows.arrays():
        read(array, before)
    return _ManyResults(rows, read)


STATUS: Sequence[ResponseDecoder[Any, ExecutionStatus]] = (
    _StatusDecoder(_UsualStatus, _usual_status, _many_usual, _count_usual),
    _StatusDecoder(_Status, _execution_status, _many_of_any_form, count_rows, strict=False),
)


# Values.


def _either(value: _Number, alias: _Number) -> _Number:
    return alias if value is None else value


def _whole(value: _Number, path: str) -> int:
    """A whole number of any size, which must be there."""
    if value is None:
        raise WrongShape(f"{path} is missing")
    number = _integer(value)
    if number is None:
        raise WrongShape(f"{path} is no whole number")
    return number


def _int64(value: _Number, path: str) -> int:
    number = _whole(value, path)
    if not _LEAST <= number <= _MOST:
        raise WrongShape(f"{path} is beyond 64 bits")
    return number


def _status(value: _Number, path: str) -> int:
    if value is None:
        raise WrongShape(f"{path} is missing")
    return _number(value)


def _number(value: _Number) -> int:
    """The number of an enum; `UNKNOWN_NUMBER` for what can be none."""
    number = _integer(value)
    return UNKNOWN_NUMBER if number is None or not _LEAST <= number <= _MOST else number


def _time(value: _Number, path: str) -> int | None:
    """A time, at most the last one that 64 bits can tell."""
    if value is None:
        return None
    number = int(value) if isinstance(value, float) else _integer(value)
    if number is None:
        raise WrongShape(f"{path} is no time")
    return max(_LEAST, min(number, _MOST))


def _integer(value: _Number) -> int | None:
    """The integer that a number or text spells; None for anything else and for texts longer than that of any id."""
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if value is None or len(value) > 20 or not value.isascii():
        return None
    try:
        return int(value)
    except ValueError:
        return None
