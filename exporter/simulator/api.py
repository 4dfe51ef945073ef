"""The API of the simulated JOB: get_job_instance_list and get_job_instance_status in v4, v3 and ESB form.

Facts: bk-job EsbGetJobInstanceList{V3,V4}ResourceImpl, EsbGetJobInstanceStatusV3ResourceImpl,
OpenApiGetJobInstanceStatusV4ResourceImpl, EsbExceptionControllerAdvice, EsbV4ExceptionControllerAdvice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from exporter.model import JOB_STATUSES, LAUNCH_MODES, TASK_TYPES, Scope, job_outcome
from exporter.simulator.platform import Answer, Call, Dialect, Endpoint, Platform
from exporter.simulator.world import RUNNING, STOPPING, WAITING_USER, Execution, Result, Step, Target

LIST, STATUS = "get_job_instance_list", "get_job_instance_status"
GATEWAY = "/api/bk-job/{stage}/api"

THIRTY_DAYS = 2_592_000_000
ALL_TIME = 2**62
V4_MAX_OFFSET = 10_000
V4_MAX_LENGTH = 200
V3_MAX_LENGTH = 1000
SHOWS_ELAPSED = frozenset({RUNNING, WAITING_USER, STOPPING})
"""Statuses for which the list, and only the list, returns the time elapsed so far as total_time."""
AGENT_CODES = frozenset({1, 310})

NO_PERMISSION, INTERNAL, BAD_REQUEST, NO_SCOPE, NO_INSTANCE, NO_USER = (
    9900403, 1240002, 1240003, 1243049, 1244006, 1247002,
)  # fmt: skip
TOO_LONG, MISSING, MISSING_OR_ILLEGAL, ILLEGAL_REASON, TYPE_MISMATCH, BIND_FAILED = (
    1241002, 1241004, 1241007, 1241010, 1241020, 1241025,
)  # fmt: skip

V4_ERRORS = {
    NO_PERMISSION: (403, "NO_PERMISSION"),
    INTERNAL: (500, "INTERNAL"),
    NO_SCOPE: (404, "NOT_FOUND"),
    NO_INSTANCE: (404, "NOT_FOUND"),
}
"""HTTP status and code word in v4; all other codes are INVALID_ARGUMENT."""

MESSAGES = {
    NO_PERMISSION: ("用户({0})权限不足，请前往权限中心确认并申请补充后重试", "User ({0}) permission not allowed, please confirm and apply permission in IAM and try again"),  # noqa: E501
    INTERNAL: ("服务器内部错误", "Internal server error"),
    BAD_REQUEST: ("错误的请求", "Bad Request"),
    NO_SCOPE: ("业务/业务集不存在或已归档", "Business/Business Set not exist or archived"),
    NO_INSTANCE: ("任务实例不存在", "Task instance does not exist"),
    NO_USER: ("缺少用户信息", "Missing user info"),
    TOO_LONG: ("请求参数[{0}]非法", "Invalid request parameter [{0}]"),
    MISSING: ("缺少请求参数[{0}]", "Missing request parameter [{0}]"),
    MISSING_OR_ILLEGAL: ("请求参数[{0}]缺失或不合法", "Missing or invalid request parameter [{0}]"),
    ILLEGAL_REASON: ("请求参数[start]不合法，原因：start的值不能超过{0}", "Invalid request parameter [start], reason: The value of start cannot exceed {0}"),  # noqa: E501
    TYPE_MISMATCH: ("参数[{0}]类型不匹配", "Parameter [{0}] type mismatch"),
    BIND_FAILED: ("字段[{0}]绑定失败", "Fields [{0}] bind failed"),
}  # fmt: skip


class Unavailable(Exception):
    """A proxy answers that JOB is not available."""


class Refused(Exception):
    """JOB refuses the call. `action`: the missing IAM action."""

    def __init__(self, code: int, detail: object = "", *, action: str = "", scope: Scope | None = None) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.action = action
        self.scope = scope


def routes(platform: Platform) -> Iterable[Endpoint]:
    """Both operations in every dialect. Those of the gateway are there twice: for users and for applications
    (`/system/`)."""
    job = _Job(platform)
    for api in (LIST, STATUS):
        for version in ("v4", "v3"):
            dialect: Dialect = "v4" if version == "v4" else "v3"
            methods = ("GET",) if version == "v4" else ("GET", "POST")
            for infix in ("", "/system"):
                path = f"{GATEWAY}/{version}{infix}/{api}"
                yield Endpoint(methods, path, api, dialect, bool(infix), job.answer)
        yield Endpoint(("GET", "POST"), f"/api/c/compapi/v2/jobv3/{api}/", api, "esb", False, job.answer)


@dataclass
class _Job:
    platform: Platform

    def answer(self, call: Call) -> Answer:
        request_id = f"{self.platform.random.getrandbits(80):020x}"
        if not call.user:
            # Written by JOB's own gateway, which knows one shape only and sets no Content-Type.
            message = _message(NO_USER, "", call)
            body = {"code": NO_USER, "result": False, "job_request_id": request_id, "message": message}
            return Answer(body, 401, content_type=None)
        try:
            if call.fault("refused"):
                raise Refused(BAD_REQUEST)
            operation = self.history if call.api == LIST else self.status
            data = operation(call)
        except Refused as refused:
            return self._refusal(refused, call, request_id)
        except Unavailable:
            return Answer(b"<html>503 Service Unavailable</html>", 503, content_type="text/html")
        if call.dialect == "v4":
            return Answer({"data": _without_nulls(data), "job_request_id": request_id})
        return Answer({"code": 0, "result": True, "job_request_id": request_id, "data": data})

    def history(self, call: Call) -> object:
        v4 = call.dialect == "v4"
        parameters = _Parameters(call)
        scope = parameters.scope()
        names = ("create_time_start", "create_time_end")
        if v4:
            begin, end = (parameters.number(name, required=MISSING) for name in names)
            offset, length = parameters.number("offset", 0), parameters.number("length", 10)
            for name, value, low, high in (("offset", offset, 0, V4_MAX_OFFSET), ("length", length, 1, V4_MAX_LENGTH)):
                if not low <= value <= high:
                    raise Refused(BIND_FAILED, f"getJobInstanceList.{name}")
        else:
            absent = BAD_REQUEST if call.method == "GET" and call.dialect == "v3" else MISSING_OR_ILLEGAL
            begin, end = (parameters.number(name, required=absent) for name in names)
            offset, length = parameters.number("start", 0), parameters.number("length", 20)
        self._permit(scope, call, "access_business")
        if not v4:
            for name, value in (("create_time_start", begin), ("create_time_end", end)):
                if value < 1 or end <= begin:
                    raise Refused(MISSING_OR_ILLEGAL, name)
            if end - begin > THIRTY_DAYS:
                raise Refused(TOO_LONG, "create_time_end")
            if not 1 <= length <= V3_MAX_LENGTH:
                raise Refused(BAD_REQUEST)
            if self.platform.v3_start_limit is not None and offset > self.platform.v3_start_limit:
                raise Refused(ILLEGAL_REASON, self.platform.v3_start_limit)
        if call.fault("ignored_time_filter"):
            begin, end = 0, ALL_TIME
        if call.fault("repeated_page"):
            offset = 0
        found = self._filtered(scope, begin, end, parameters, v4)
        rows = [self._row(row, call) for row in found[offset : offset + length]]
        if v4:
            return {"job_instance_list": rows}
        total = len(found) + (1000 if call.fault("wrong_total") else 0)
        return {"start": offset, "length": length, "total": total, "data": rows or None}

    def _filtered(self, scope: Scope, begin: int, end: int, parameters: _Parameters, v4: bool) -> list[Execution]:
        world = self.platform.job
        if one := parameters.number("job_instance_id", 0):
            row = world.find(scope, one)
            if row and row.deviation.look_up_refused:
                raise Refused(BAD_REQUEST)
            return [row] if row else []
        status, mode, kind = (parameters.optional(name) for name in ("status", "launch_mode", "type"))
        if (status is not None and status not in JOB_STATUSES) or (mode is not None and mode not in LAUNCH_MODES):
            raise Refused(INTERNAL)
        if kind is not None and kind not in TASK_TYPES:
            if not v4:
                raise Refused(TOO_LONG, "type")
            kind = None
        name, operator = parameters.text("name"), parameters.text("operator")
        return [
            row
            for row in world.between(scope, begin, end)
            if (status is None or (row.status == status and not row.deviation.look_up_refused))
            and (mode is None or row.launch_mode == mode)
            and (kind is None or row.task_type == kind)
            and name in row.name
            and operator in ("", row.operator)
        ]

    def status(self, call: Call) -> object:
        v4 = call.dialect == "v4"
        parameters = _Parameters(call)
        scope = parameters.scope()
        number = parameters.number("job_instance_id", 0, mismatch=TYPE_MISMATCH)
        if number < 1:
            raise (
                Refused(BIND_FAILED, "getJobInstanceStatus.taskInstanceId")
                if v4
                else Refused(MISSING_OR_ILLEGAL, "job_instance_id")
            )
        self._permit(scope, call, "access_business")
        row = self.platform.job.find(scope, number)
        if row is None:
            raise Refused(NO_INSTANCE)
        if scope in self.platform.denied_history:
            raise Refused(NO_PERMISSION, call.user, action="view_history", scope=scope)
        if row.deviation.status_refused == "for good":
            raise Refused(BAD_REQUEST)
        if row.deviation.status_refused == "for now":
            raise Unavailable
        shown = parameters.flag("return_execute_object_result" if v4 else "return_ip_result")
        results = _v4_results if v4 else _v3_results
        return {
            "finished": job_outcome(row.status, row.end_time is not None) is not None,
            "job_instance": {
                **self._scope(row.scope),
                "job_instance_id": row.id,
                "status": row.status,
                "name": row.name,
                "create_time": row.create_time,
                **_times(row),
            },
            "step_instance_list": [
                {
                    "step_instance_id": step.id,
                    "name": step.script.name,
                    "status": step.status,
                    "type": step.script.step_type,
                    "execute_count": step.execute_count,
                    **_times(step),
                    "create_time": step.create_time,
                    **results(step, shown),
                }
                for step in row.steps
            ],
        }

    def _permit(self, scope: Scope, call: Call, action: str) -> None:
        if scope not in self.platform.scopes:
            raise Refused(NO_SCOPE)
        if scope in self.platform.denied or call.fault("permission"):
            raise Refused(NO_PERMISSION, call.user, action=action, scope=scope)

    def _scope(self, scope: Scope) -> dict[str, object]:
        biz = int(scope.bk_scope_id) if scope.bk_scope_type == "biz" and self.platform.fills_bk_biz_id else None
        return {"bk_biz_id": biz, "bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}

    def _row(self, row: Execution, call: Call) -> dict[str, object]:
        times = _times(row)
        if times["total_time"] is None and row.start_time is not None and row.status in SHOWS_ELAPSED:
            times["total_time"] = max(0, int(call.at * 1000) - row.start_time)
        return {
            **self._scope(row.scope),
            "job_instance_id": row.id,
            "job_plan_id": row.plan_id,
            "job_template_id": row.template_id,
            "name": row.name,
            "operator": row.operator,
            "launch_mode": row.launch_mode,
            "status": row.status,
            **times,
            "create_time": row.create_time,
            "type": row.task_type,
        }

    def _refusal(self, refused: Refused, call: Call, request_id: str) -> Answer:
        message = _message(refused.code, refused.detail, call)
        permission = _permission(refused.action, refused.scope) if refused.scope else None
        if call.dialect != "v4":
            body = {"code": refused.code, "result": False, "job_request_id": request_id, "message": message}
            return Answer({**body, "permission": permission} if permission else body)
        status, word = V4_ERRORS.get(refused.code, (400, "INVALID_ARGUMENT"))
        error: dict[str, object] = {"code": word, "message": message}
        if permission:
            error["data"] = permission
        else:
            error["details"] = [{"code": str(refused.code), "message": message}]
        return Answer({"error": error, "job_request_id": request_id}, status)


class _Parameters:
    """The parameters of one call, validated as JOB validates them."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._given: Mapping[str, object] = call.params

    def number(
        self, name: str, default: int | None = None, *, required: int | None = None, mismatch: int = TYPE_MISMATCH
    ) -> int:
        value = self.optional(name, mismatch)
        if value is None:
            value = default
        if value is None:
            raise Refused(required or MISSING, name)
        return value

    def optional(self, name: str, mismatch: int = TYPE_MISMATCH) -> int | None:
        value = self._given.get(name)
        if value is None or value == "":
            return None
        try:
            return int(str(value))
        except ValueError:
            raise Refused(mismatch if self._call.dialect == "v4" else BAD_REQUEST, name) from None

    def text(self, name: str) -> str:
        return str(self._given.get(name) or "")

    def flag(self, name: str) -> bool:
        return str(self._given.get(name, "")).lower() in ("true", "1")

    def scope(self) -> Scope:
        kind, key = self.text("bk_scope_type"), self.text("bk_scope_id")
        if kind in ("biz", "biz_set", "tenant_set") and key:
            named: Literal["biz", "biz_set", "tenant_set"] = kind  # type: ignore[assignment]
            return Scope(named, key)
        biz = self.optional("bk_biz_id")
        if self._call.dialect == "v4" or biz is None:
            name = "bk_scope_id" if kind else "bk_scope_type"
            raise Refused(MISSING if self._call.dialect == "v4" else MISSING_OR_ILLEGAL, name)
        return Scope("biz_set" if 8_000_000 <= biz <= 9_999_999 else "biz", str(biz))


def _message(code: int, detail: object, call: Call) -> str:
    return MESSAGES[code][call.language == "en"].format(detail)


def _permission(action: str, scope: Scope | None) -> dict[str, object]:
    related = []
    if action == "access_business" and scope is not None:
        instance = {"type": "biz", "type_name": "业务", "id": scope.bk_scope_id, "name": f"demo {scope.bk_scope_id}"}
        related.append({
            "system_id": "bk_cmdb", "system_name": "配置平台", "type": "biz", "type_name": "业务",
            "instances": [[instance]],
        })  # fmt: skip
    name = {"access_business": "业务访问", "view_history": "查看执行历史"}[action]
    actions = [{"id": action, "name": name, "related_resource_types": related}]
    return {"system_id": "bk_job", "system_name": "作业平台", "actions": actions}


def _times(row: Execution | Step | Result) -> dict[str, int | None]:
    total = None if row.start_time is None or row.end_time is None else row.end_time - row.start_time
    return {"start_time": row.start_time, "end_time": row.end_time, "total_time": total}


def _tag(step: Step) -> str | None:
    return None if step.start_time is None else ""


def _v3_results(step: Step, shown: bool) -> dict[str, object]:
    if not shown:
        return {"step_ip_result_list": None}
    rows = []
    for result in step.results:
        where = result.target
        if where.container is not None:
            raise Refused(INTERNAL)  # the server dereferences the host that a container does not have
        rows.append({
            "bk_host_id": where.bk_host_id, "ip": where.ip, "bk_cloud_id": where.bk_cloud_id,
            "status": result.status, "tag": _tag(step), "exit_code": result.exit_code,
            "error_code": 117 if result.status in AGENT_CODES else 0, **_times(result),
        })  # fmt: skip
    return {"step_ip_result_list": rows}


def _v4_results(step: Step, shown: bool) -> dict[str, object]:
    if not shown or not step.results:
        return {}
    return {
        "step_execute_object_result_list": [
            {
                "execute_object": _execute_object(result.target),
                "status": result.status,
                "tag": _tag(step),
                "exit_code": result.exit_code,
                **_times(result),
            }
            for result in step.results
        ]
    }


def _execute_object(where: Target) -> dict[str, object]:
    if where.container is not None:
        container = {
            "id": where.container,
            "container_id": f"docker://{where.container:064x}",
            "node_host_id": where.bk_host_id,
            "name": f"app-{where.container}",
        }
        return {"type": 2, "resource_id": str(where.container), "container": container}
    host = {
        "bk_host_id": where.bk_host_id,
        "bk_cloud_id": where.bk_cloud_id,
        "bk_cloud_name": "Default Area" if where.bk_cloud_id == 0 else None,
        "ip": where.ip,
        "ipv6": where.ipv6,
        "bk_agent_id": f"02000000{where.bk_host_id:016x}" if where.bk_host_id is not None else None,
    }
    resource = None if where.bk_host_id is None else str(where.bk_host_id)
    return {"type": 1, "resource_id": resource, "host": host}


def _without_nulls(value: object) -> object:
    """The v4 serializer drops every null member."""
    if isinstance(value, dict):
        return {name: _without_nulls(member) for name, member in value.items() if member is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
