"""The API of the simulated NodeMan: job_list, job_details, task_result, and get_task_info of 1.x.

Facts: bk-nodeman v2.4.7, from its source code and from running it (apps/generic.py, apps/node_man,
apps/backend/subscription); NodeMan 1.x from its documents and a public copy of its source code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from exporter.simulator.nodeman_world import (
    LEGACY_STEPS,
    Job,
    LegacyTask,
    NodemanWorld,
    Record,
    Step,
    Subscription,
    SubStep,
    Target,
    Traffic,
)
from exporter.simulator.platform import Answer, Call, Dialect, Endpoint, Platform
from exporter.simulator.traffic import Business

Handler = Callable[[Call], Answer]

GATEWAY = "/api/bk-nodeman/prod"
ESB = "/api/c/compapi/v2/nodeman"

JOB_KINDS_ZH = {"AGENT": "Agent", "PROXY": "Proxy", "PLUGIN": "插件"}
OPERATIONS_ZH = {
    "INSTALL": "安装", "REINSTALL": "重装", "UNINSTALL": "卸载", "UPGRADE": "升级", "RESTART": "重启", "RELOAD": "重载",
    "START": "启动", "STOP": "停止", "DELEGATE": "托管", "UNDELEGATE": "取消托管",
}  # fmt: skip
CLOUDS = {0: "直连区域", 7: "idc-b"}


class Refused(Exception):
    """NodeMan refuses the call, with HTTP 200. `code` is text for a missing permission, else a number."""

    def __init__(self, code: int | str, message: str, data: object = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


def world_of(platform: Platform) -> NodemanWorld:
    """The NodeMan of a platform. The first call creates an empty one."""
    if not isinstance(platform.nodeman, NodemanWorld):
        platform.nodeman = NodemanWorld(platform.now, platform.seed)
    return platform.nodeman


def populate(
    platform: Platform, hosts: Mapping[int, Sequence[Target]] | None = None, *, history: float = 7200.0
) -> Traffic:
    """Start traffic in every business, `history` seconds of it in the past, on `hosts`; the default are the hosts of
    JOB.

    Returns a policy and a task of 1.x per business, which can be configured by their ids.
    """
    if hosts is None:
        hosts = {
            int(scope.bk_scope_id): [
                Target(int(scope.bk_scope_id), host.ip or "", host.bk_host_id, host.bk_cloud_id, host.ipv6 or "")
                for host in Business(platform.job, scope).hosts
                if host.ip or host.ipv6
            ]
            for scope in platform.scopes
            if scope.bk_scope_type == "biz"
        }
    world = world_of(platform)
    traffic = Traffic(world, hosts, platform.now() - history, speed=platform.speed)
    world.advance()
    return traffic


def routes(platform: Platform) -> list[Endpoint]:
    """All NodeMan routes of the platform: gateway, gateway for applications (`/system/`), ESB."""
    api = NodemanApi(world_of(platform))
    endpoints: list[Endpoint] = []

    def add(path: str, name: str, dialect: Dialect, handler: Handler, method: str = "POST", app: bool = False) -> None:
        endpoints.append(Endpoint((method,), path, name, dialect, app, handler))

    for prefix, system in ((GATEWAY, False), (f"{GATEWAY}/system", True)):
        add(f"{prefix}/api/job/job_list/", "job_list", "gateway", api.job_list, app=system)
        add(f"{prefix}/api/job/{{job_id}}/details/", "job_details", "gateway", api.job_details, app=system)
        add(f"{prefix}/backend/api/subscription/task_result/", "task_result", "gateway", api.task_result, app=system)
    # The ESB publishes no job_list.
    add(f"{ESB}/api/job/details/", "job_details", "esb", api.job_details)
    add(f"{ESB}/backend/api/subscription/task_result/", "task_result", "esb", api.task_result)
    add(f"{ESB}/subscription_task_result/", "task_result", "esb", api.task_result)
    add(f"{ESB}/get_task_info/", "get_task_info", "esb", api.get_task_info, "GET")
    return endpoints


class NodemanApi:
    """The handlers. `world` may be changed between calls."""

    def __init__(self, world: NodemanWorld) -> None:
        self.world = world

    def job_list(self, call: Call) -> Answer:
        return self._answer(self._job_list, call)

    def job_details(self, call: Call) -> Answer:
        return self._answer(self._job_details, call)

    def task_result(self, call: Call) -> Answer:
        return self._answer(self._task_result, call)

    def _answer(self, handler: Callable[[Call, float], object], call: Call) -> Answer:
        try:
            data = handler(call, self.world.advance())
        except Refused as refused:
            return Answer({
                "result": False, "code": refused.code, "data": refused.data,
                "message": f"{refused.message}（{refused.code}）", "errors": None,
            })  # fmt: skip
        except Exception:
            return Answer({
                "result": False, "code": 3800500, "data": None,
                "message": "系统错误，请联系管理员（3800500）", "errors": None,
            })  # fmt: skip
        return Answer({"result": True, "data": data, "code": 0, "message": ""})

    # job_list

    def _job_list(self, call: Call, now: float) -> object:
        world, params = self.world, call.params
        page, pagesize = _integer(params, "page", 1), _integer(params, "pagesize", 10)
        lists = ("job_id", "status", "created_by", "bk_biz_id", "step_type", "op_type")
        wanted = {name: _list(params, name) for name in lists}
        begin, end = self._time(params, "start_time"), self._time(params, "end_time")
        ids = None if wanted["job_id"] is None else {int(str(i)) for i in wanted["job_id"] if str(i).isdigit()}
        rows = []
        for job in sorted(world.jobs.values(), key=lambda job: -job.id):
            if (
                (ids is not None and job.id not in ids)
                or (wanted["status"] is not None and job.status not in wanted["status"])
                or (wanted["created_by"] is not None and job.created_by not in wanted["created_by"])
                or (wanted["step_type"] is not None and _kind(job.job_type) not in wanted["step_type"])
                or (wanted["op_type"] is not None and _operation(job.job_type) not in wanted["op_type"])
                or (params.get("hide_auto_trigger_job") and job.is_auto_trigger)
                or (begin is not None and job.start_time < begin)
                or (end is not None and job.start_time > end)
                or not self._visible(job, call.user, wanted["bk_biz_id"])
            ):
                continue
            rows.append(job)
        sort = params.get("sort")
        if isinstance(sort, dict):
            rows.sort(key=lambda job: job.statistics.get(sort["head"], 0), reverse=sort["sort_type"] == "DEC")
        pages = -(-len(rows) // pagesize) or 1
        if not 1 <= page <= pages:
            raise Refused(3800500, "系统错误，请联系管理员")
        if call.fault("permission"):
            rows = []
        if call.fault("repeated_page"):
            page = 1
        shown = rows[(page - 1) * pagesize : page * pagesize]
        return {
            "total": len(rows) + (1000 if call.fault("wrong_total") else 0),
            "list": [self._job_row(job, now, call) for job in shown],
        }

    def _visible(self, job: Job, user: str, wanted: Sequence[object] | None) -> bool:
        # Nobody is refused here: what the caller may not see is left out, of a forbidden or unknown business all, and
        # everything when no user has arrived.
        if not user:
            return False
        scope = set(job.bk_biz_scope)
        if scope and not scope & self.world.denied and (not wanted or scope & set(wanted)):
            return True
        return bool(scope) and job.created_by == user and not wanted

    def _job_row(self, job: Job, now: float, call: Call) -> dict[str, object]:
        return {
            "id": job.id,
            "created_by": job.created_by,
            "from_system": "",
            "job_type": job.job_type,
            "subscription_id": job.subscription.id,
            "task_id_list": list(job.task_ids),
            "start_time": self._zoned(job.start_time),
            "end_time": self._zoned(job.end_time),
            "status": job.status,
            "global_params": job.global_params or {},
            "statistics": dict(job.statistics),
            "bk_biz_scope": list(job.bk_biz_scope),
            "error_hosts": self._error_hosts(job),
            "is_auto_trigger": job.is_auto_trigger,
            **_meta(job.job_type, call),
            "policy_name": job.subscription.name,
            "cost_time": _cost_time(job, now),
            "bk_biz_scope_display": [f"biz-{biz}" for biz in job.bk_biz_scope],
            "job_type_display": f"{_operation_text(job.job_type, call)} {JOB_KINDS_ZH.get(_kind(job.job_type), '')}",
        }

    @staticmethod
    def _error_hosts(job: Job) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = [
            {"ip": host.target.ip, "msg": host.reason, "status": host.status or "IGNORED"} for host in job.filtered
        ]
        if job.nothing_to_change:
            rows.append({"ip": "", "msg": "没有需要变更的实例", "status": "IGNORED"})
        return rows

    # job_details

    def _job_details(self, call: Call, now: float) -> object:
        world, params = self.world, call.params
        job_id = _integer({"job_id": call.path_args.get("job_id", params.get("job_id"))}, "job_id", None)
        page, pagesize = _integer(params, "page", 1), _integer(params, "pagesize", 10)
        job = world.jobs.get(job_id)
        if job is None:
            raise Refused(3801012, f"不存在ID为{job_id}的任务")
        if call.fault("repeated_page"):
            page = 1
        if not call.user:
            raise Refused(3800500, "系统错误，请联系管理员")
        if call.fault("permission") or set(job.bk_biz_scope) & world.denied:
            permission = {"system_id": "bk_nodeman", "actions": [{"id": "task_history_view", "name": "任务历史查看"}]}
            data = {"permission": permission, "apply_url": "http://iam.example.com/apply"}
            raise Refused("9900403", "当前用户无 [任务历史查看] 权限", data)
        # The platform splits a text into its letters here, so that the form of its own documents matches nothing.
        conditions = [c for c in _objects(params.get("conditions")) if c["key"] == "status"]
        statuses: list[object] | None = [value for c in conditions for value in c["value"]] or None
        instance_ids: list[object] | None = None
        for condition in _objects(params.get("conditions")):
            if condition["key"] == "instance_id":
                value = condition["value"]
                instance_ids = [*(instance_ids or []), *([value] if isinstance(value, str) else value)]
        # A task that is not ready is no error here, unlike in task_result: the job looks as if it had no instances.
        records: list[Record] = []
        if job.task_ids:
            if failed := [t.err_msg for i in job.task_ids if (t := job.subscription.tasks[i]).err_msg]:
                raise Refused(3800014, f"创建订阅任务失败：{failed[0]}")
            if job.subscription.ready(job.task_ids, now):
                records = job.subscription.latest(job.task_ids)
        chosen = _choose(records, statuses, instance_ids, now)
        shown = chosen if pagesize == -1 else chosen[(page - 1) * pagesize : page * pagesize]
        _need_trees(job.subscription, shown)
        world.refresh(job, esb=call.dialect == "esb")
        rows = [self._host_row(job, record, now, call) for record in reversed(shown)]
        rows += [row for row in self._filtered_rows(job) if not statuses or row["status"] in statuses]
        details: dict[str, object] = {
            "job_id": job.id,
            "created_by": job.created_by,
            "job_type": job.job_type,
            "job_type_display": f"{_operation_text(job.job_type, call)} {JOB_KINDS_ZH.get(_kind(job.job_type), '')}",
            "ip_filter_list": [row["ip"] for row in self._filtered_rows(job)],
            "total": len(chosen) + (1000 if call.fault("wrong_total") else 0),
            "list": rows,
            "statistics": dict(job.statistics),
            "status": job.status,
            "end_time": self._zoned(job.end_time),
            "start_time": self._zoned(job.start_time),
            "cost_time": _cost_time(job, now),
            "meta": _meta(job.job_type, call),
        }
        if _kind(job.job_type) == "PLUGIN":
            policy = job.subscription
            details["meta"] = {
                **_meta(job.job_type, call),
                "name": policy.name,
                "category": policy.category,
                "plugin_name": policy.plugin_name,
            }
        return details

    def _host_row(self, job: Job, record: Record, now: float, call: Call) -> dict[str, object]:
        target = record.target
        start, finish = record.bounds(now)
        # Of several steps the platform looks at the first one only.
        shown = record.sub_steps(now)[: record.first_steps]
        zh = call.language == "zh"
        index, display, name = -1, "等待执行" if zh else "Waiting for execution", _name(shown[-1].step, call)
        for i, sub_step in enumerate(shown):
            if sub_step.status in ("RUNNING", "FAILED"):
                index, name = i, _name(sub_step.step, call)
                if sub_step.status == "RUNNING":
                    display = f"正在 {name}" if zh else f"Running {name}"
                else:
                    display = f"{name} 失败" if zh else f"{name} failed"
                break
        else:
            if shown[-1].status == "SUCCESS":
                index, display = len(shown) - 1, "执行成功" if zh else "Succeed"
        row: dict[str, object] = {
            "instance_id": record.instance_id,
            "ip": long_address(target),
            "inner_ip": target.ip,
            "inner_ipv6": _long(target.ipv6) if target.ipv6 else None,
            "bk_host_id": record.host_id(now),
            "bk_cloud_id": target.bk_cloud_id,
            "bk_cloud_name": CLOUDS.get(target.bk_cloud_id),
            "bk_biz_id": target.bk_biz_id,
            "bk_biz_name": f"biz-{target.bk_biz_id}",
            "status": record.shown_status(now),
            "start_time": self._zoned(start),
            "end_time": self._zoned(finish),
            "op_type": _operation(job.job_type),
            "op_type_display": _operation_text(job.job_type, call),
            "node_id": index,
            "status_display": display,
            "step": name,
        }
        if start is not None:
            row["cost_time"] = (now if finish is None else finish) - start
        row |= {"is_manual": False, "ap_id": 1}
        if job.subscription.category == "policy":
            row |= {"current_version": "1.2.3", "target_version": "1.2.4"}
        return row

    @staticmethod
    def _filtered_rows(job: Job) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for host in job.filtered:
            target = host.target
            rows.append({
                "filter_host": True, "bk_host_id": target.bk_host_id, "ip": target.ip, "inner_ip": target.ip or None,
                "inner_ipv6": target.ipv6 or None, "bk_cloud_id": target.bk_cloud_id,
                "bk_cloud_name": CLOUDS.get(target.bk_cloud_id), "bk_biz_id": target.bk_biz_id,
                "bk_biz_name": f"biz-{target.bk_biz_id}", "job_id": None, "status": host.status or "FAILED",
                "status_display": host.reason, "step": "",
            })  # fmt: skip
        if job.nothing_to_change:
            rows.append({
                "filter_host": True, "bk_host_id": None, "ip": "", "inner_ip": None, "inner_ipv6": None,
                "bk_cloud_id": None, "bk_cloud_name": None, "bk_biz_id": None, "bk_biz_name": None, "job_id": None,
                "status": "IGNORED", "status_display": "没有需要变更的实例", "step": "",
            })  # fmt: skip
        return rows

    # task_result

    def _task_result(self, call: Call, now: float) -> object:
        params = call.params
        page, pagesize = _integer(params, "page", 1), _integer(params, "pagesize", -1)
        subscription_id = _integer(params, "subscription_id", None)
        if call.fault("repeated_page"):
            page = 1
        task_ids = _list(params, "task_id_list")
        subscription = self.world.subscriptions.get(subscription_id)
        if subscription is None or not subscription.tasks:
            raise Refused(3800003, f"订阅[{subscription_id}] 不存在关联的任务")
        chosen_tasks = [int(str(i)) for i in task_ids or [max(subscription.tasks)]]
        if missing := sorted(set(chosen_tasks) - set(subscription.tasks)):
            raise Refused(3800003, f"订阅任务不存在：{missing}")
        everything = bool(params.get("need_aggregate_all_tasks"))
        if not everything:
            for i in chosen_tasks:
                if message := subscription.tasks[i].err_msg:
                    raise Refused(3800014, f"创建订阅任务失败：{message}")
            if not subscription.ready(chosen_tasks, now):
                raise Refused(3800015, "订阅任务未准备就绪，请稍后再尝试查询")
        records = subscription.latest(subscription.tasks if everything else chosen_tasks)
        statuses, instance_ids = _list(params, "statuses"), _list(params, "instance_id_list")
        excluded = set(_list(params, "exclude_instance_ids") or ())
        chosen = [r for r in _choose(records, statuses, instance_ids, now) if r.instance_id not in excluded]
        if pagesize == -1 or bool(params.get("return_all")):
            shown = chosen
        else:
            shown = chosen[(page - 1) * pagesize : page * pagesize]
        _need_trees(subscription, shown)
        detail = bool(params.get("need_detail"))
        rows = [self._instance_row(subscription, record, now, detail, call) for record in reversed(shown)]
        if pagesize == -1 and not params.get("return_all"):
            return rows
        counter = Counter(record.status(now) for record in records)
        total = len(chosen) + (1000 if call.fault("wrong_total") else 0)
        return {"total": total, "list": rows, "status_counter": {**counter, "total": len(records)}}

    def _instance_row(
        self, subscription: Subscription, record: Record, now: float, detail: bool, call: Call
    ) -> dict[str, object]:
        target = record.target
        start, finish = (self._local(t) for t in record.bounds(now))
        created = self._local(record.created)
        pipeline = f"{record.id:032x}"
        info = _instance_info(target, record.host_id(now))
        status = record.shown_status(now)
        row: dict[str, object] = {
            "task_id": record.task_id, "record_id": record.id, "instance_id": record.instance_id,
            "create_time": created, "pipeline_id": pipeline,
            "instance_info": _full_info(info, target) if detail else info, "start_time": start, "finish_time": finish,
        }  # fmt: skip
        if target.service_id is not None:
            return {**row, "steps": [], "status": status}
        shown = record.sub_steps(now)
        parts = [(subscription.action, shown[: record.first_steps])]
        if subscription.second:
            parts.append((subscription.second, shown[record.first_steps :]))
        steps = [self._step_of(subscription, record, now, detail, call, *part) for part in parts]
        return {**row, "steps": steps, "status": status}

    def _step_of(
        self,
        subscription: Subscription,
        record: Record,
        now: float,
        detail: bool,
        call: Call,
        action: str,
        shown: Sequence[SubStep],
    ) -> dict[str, object]:
        """One step of an instance: one action, its sub-steps."""
        target, old, created = record.target, subscription.old_engine, self._local(record.created)
        pipeline = f"{record.id:032x}"
        sub_steps = []
        for i, sub_step in enumerate(shown):
            item: dict[str, object] = {
                "index": i, "node_name": _name(sub_step.step, call), "step_code": sub_step.step.code,
                "pipeline_id": f"{record.id:030x}{i:02x}",
                "log": "[INFO] x" if detail and sub_step.start is not None else "", "ex_data": None,
                "status": sub_step.status, "start_time": self._local(sub_step.start),
                "finish_time": self._local(sub_step.finish),
            }  # fmt: skip
            if old:
                del item["step_code"], item["log"], item["ex_data"]
                item["create_time"] = created
            elif i == 2:
                # The whole instance is repeated among the inputs of one sub-step, whether details are asked for or not.
                item["inputs"] = {"instance_info": _full_info(_instance_info(target, record.host_id(now)), target)}
            sub_steps.append(item)
        progress = _collect(shown)
        times = {
            "start_time": self._local(shown[0].start),
            "finish_time": self._local(max((s.finish for s in shown if s.finish is not None), default=None))
            if progress in ("SUCCESS", "FAILED")
            else None,
        }
        kind = "PLUGIN" if _kind(action) == "PLUGIN" else "AGENT"
        step_id = subscription.plugin_name or kind.lower()
        operation = _operation_text(action, call)
        step: dict[str, object] = {
            "id": step_id, "type": kind, "action": action, "extra_info": {}, "pipeline_id": pipeline,
            "node_name": f"[{step_id}] {operation}", "status": progress, **times,
            "target_hosts": [{
                "node_name": f"[{step_id}] {operation} {target.bk_cloud_id}:{target.ip or target.ipv6}",
                "pipeline_id": pipeline, "status": progress, **times, "sub_steps": sub_steps,
            }],
        }  # fmt: skip
        if old:
            step |= {"create_time": created, "step_code": None}
        return step

    # NodeMan 1.x

    def get_task_info(self, call: Call) -> Answer:
        """The ESB forwards this to `/gateway/{biz}/tasks/{job}/`, which NodeMan 2.x does not have."""
        if not self.world.legacy:
            return Answer(NOT_FOUND_HTML, 404, content_type="text/html; charset=utf-8")
        now = self.world.advance()
        try:
            biz, job_id = int(str(call.params["bk_biz_id"])), int(str(call.params["job_id"]))
        except (KeyError, ValueError):
            return Answer({"message": "bk_biz_id, job_id", "code": "VALIDATE_ERROR", "data": None, "result": False})
        task = self.world.legacy_tasks.get(job_id)
        if biz in self.world.denied:
            return Answer({"message": "Permission denied.", "code": "PERMISSION_DENIED", "data": None, "result": False})
        if task is None or task.bk_biz_id != biz:
            return Answer({"message": "Not found.", "code": "OBJECT_NOT_EXIST", "data": None, "result": False})
        return Answer({"message": "success", "code": "OK", "data": self._legacy_data(task, now), "result": True})

    def _legacy_data(self, task: LegacyTask, now: float) -> dict[str, object]:
        operation = OPERATIONS_ZH.get(_operation(task.job_type), "")
        statuses = Counter(host.status(now) for host in task.hosts)
        systems = {"WINDOWS": 0, "AIX": 0, "LINUX": 0} | Counter(host.target.os_type for host in task.hosts)
        hosts = []
        for host in task.hosts:
            status = host.status(now)
            code = {"QUEUE": "INIT", "RUNNING": "STILL_RUNNING", "SUCCESS": "SUCCESS"}.get(status, host.err_code)
            target = host.target
            hosts.append({
                "job_id": str(task.id), "status": status, "err_code": code,
                "step": f"{LEGACY_STEPS[status]}({operation})", "err_code_desc": None,
                "host": {
                    "id": host.id, "bk_biz_id": str(task.bk_biz_id), "bk_cloud_id": str(target.bk_cloud_id),
                    "inner_ip": target.ip, "outer_ip": "", "node_type": "PAGENT", "os_type": target.os_type,
                    "has_cygwin": False,
                },
            })  # fmt: skip
        done = statuses["SUCCESS"] + statuses["FAILED"] == len(task.hosts)
        return {
            "id": task.id, "creator": "admin", "bk_biz_id": str(task.bk_biz_id), "bk_supplier_account": "",
            "bk_supplier_id": "0", "bk_cloud_id": str(task.hosts[0].target.bk_cloud_id) if task.hosts else "0",
            "job_type": task.job_type, "hosts": hosts, "global_params": {"plugin": {"id": 3}} if task.plugin else None,
            "start_time": self._local(task.start_time),
            "end_time": self._local(max(h.end for h in task.hosts)) if done and task.hosts else None,
            "status_count": {
                # Whatever is neither a success nor a failure counts as running, the queue included.
                "running_count": statuses["RUNNING"] + statuses["QUEUE"],
                "failed_count": statuses["FAILED"], "success_count": statuses["SUCCESS"],
            },
            "os_count": systems, "host_count": len(task.hosts),
            "job_type_desc": f"{operation}{task.job_type.rsplit('_', 1)[-1]}",
            "op_target": {"name": task.plugin, "config_file": f"{task.plugin}.conf" if task.plugin else ""},
        }  # fmt: skip

    # Times: the rows of jobs carry the zone of the server, those of subscriptions and of 1.x do not

    @property
    def _zone(self) -> timezone:
        return timezone(timedelta(hours=self.world.utc_offset))

    def _local(self, at: float | None) -> str | None:
        return None if at is None else datetime.fromtimestamp(at, self._zone).strftime("%Y-%m-%d %H:%M:%S")

    def _zoned(self, at: float | None) -> str | None:
        return None if at is None else datetime.fromtimestamp(at, self._zone).strftime("%Y-%m-%d %H:%M:%S%z")

    def _time(self, params: Mapping[str, Any], name: str) -> float | None:
        if params.get(name) is None:
            return None
        try:
            value = datetime.fromisoformat(str(params[name]))
        except ValueError:
            raise Refused(3800001, f"({name}): 日期时间格式错误。 ") from None
        return (value if value.tzinfo else value.replace(tzinfo=self._zone)).astimezone(UTC).timestamp()


NOT_FOUND_HTML = b"<!DOCTYPE HTML>\n<html>\n<head><title>404</title></head>\n<body></body>\n</html>\n"


def _integer(params: Mapping[str, Any], name: str, default: int | None) -> int:
    value = params.get(name)
    if value is None:
        if default is None:
            raise Refused(3800001, f"({name}): 1.该字段是必填项。 ")
        return default
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).lstrip("-").isdigit():
        raise Refused(3800001, f"({name}): 1.请填写合法的整数值。 ")
    return int(value)


def _list(params: Mapping[str, Any], name: str) -> list[object] | None:
    value = params.get(name)
    if value is None or isinstance(value, list):
        return value
    raise Refused(3800001, f"({name}): 1.期望为一个列表。 ")


def _objects(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise Refused(3800001, "(conditions): 1.期望为一个列表。 ")


def _collect(sub_steps: Sequence[SubStep]) -> str:
    """The status of a step as the platform computes it from its sub-steps."""
    found = {sub_step.status for sub_step in sub_steps}
    if found == {"SUCCESS"}:
        return "SUCCESS"
    return next((status for status in ("FAILED", "RUNNING") if status in found), "PENDING")


def _need_trees(subscription: Subscription, shown: Sequence[Record]) -> None:
    """Refuse the call if the pipeline tree of a task is missing: then NodeMan cannot build its rows."""
    if not all(subscription.tasks[record.task_id].tree for record in shown):
        raise Refused(3800500, "系统错误，请联系管理员")


def _choose(
    records: Sequence[Record], statuses: Sequence[object] | None, instance_ids: Sequence[object] | None, now: float
) -> list[Record]:
    """Filter the newest records. None is no filter, an empty list matches nothing."""
    return [
        record
        for record in records
        if (statuses is None or record.status(now) in statuses)
        and (instance_ids is None or record.instance_id in instance_ids)
    ]


def _instance_info(target: Target, host_id: int | None) -> dict[str, object]:
    if target.service_id is not None:
        host: dict[str, object] = {
            "bk_biz_id": target.bk_biz_id, "bk_cloud_id": target.bk_cloud_id,
            "bk_host_innerip": target.ip, "bk_host_innerip_v6": target.ipv6 or None,
        }  # fmt: skip
        service = {"id": target.service_id, "name": "redis", "bk_module_id": 7, "bk_host_id": target.bk_host_id}
        return {"host": host, "service": service}
    host = {
        "bk_biz_id": target.bk_biz_id, "bk_host_id": host_id, "bk_biz_name": f"biz-{target.bk_biz_id}",
        "bk_cloud_id": target.bk_cloud_id, "bk_cloud_name": CLOUDS.get(target.bk_cloud_id),
        "bk_host_innerip": target.ip, "bk_host_innerip_v6": target.ipv6 or None, "bk_supplier_account": "0",
        "bk_host_name": f"h{target.bk_host_id}",
    }  # fmt: skip
    if host_id is None:
        del host["bk_host_id"]
    return {"host": host, "service": {}}


def _full_info(info: Mapping[str, object], target: Target) -> dict[str, object]:
    host = info["host"]
    assert isinstance(host, dict)
    os_type = "2" if target.os_type == "WINDOWS" else "1"
    return {**info, "host": {**host, "os_type": os_type}, "scope": [], "process": {}}


def long_address(target: Target) -> str:
    """The address of a host as NodeMan shows it: IPv6 in eight groups of four digits."""
    return target.ip or _long(target.ipv6)


def _long(ipv6: str) -> str:
    if not ipv6:
        return ""
    head, _, tail = ipv6.partition("::")
    groups = [g for g in head.split(":") if g], [g for g in tail.split(":") if g]
    middle = ["0"] * (8 - len(groups[0]) - len(groups[1])) if "::" in ipv6 else []
    return ":".join(group.zfill(4) for group in (*groups[0], *middle, *groups[1]))


def _kind(job_type: str) -> str:
    return job_type.rsplit("_", 1)[-1]


def _operation(job_type: str) -> str:
    return job_type.rsplit("_", 1)[0].replace("MAIN_", "")


def _operation_text(job_type: str, call: Call) -> str:
    operation = _operation(job_type)
    return OPERATIONS_ZH.get(operation, operation) if call.language == "zh" else operation.capitalize()


def _name(step: Step, call: Call) -> str:
    return step.zh if call.language == "zh" else step.en


def _meta(job_type: str, call: Call) -> dict[str, object]:
    kind = _kind(job_type)
    return {
        "type": kind, "step_type": kind, "op_type": _operation(job_type),
        "op_type_display": _operation_text(job_type, call), "step_type_display": JOB_KINDS_ZH.get(kind, kind),
    }  # fmt: skip


def _cost_time(job: Job, now: float) -> str:
    # The platform takes the seconds of a time difference without its days.
    return str(int((now if job.end_time is None else job.end_time) - job.start_time) % 86400)
