"""The members of BlueKing's answers: those that a decoder reads, and the others that the vendor documents.

A member is named by its path, as in `data.job_instance_list[].status`.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from exporter.blueking.envelope import ResponseDecoder
from exporter.blueking.job import LIST_V3, LIST_V4, STATUS
from exporter.blueking.nodeman_jobs import job_details_decoders, job_list_decoders
from exporter.blueking.nodeman_legacy import get_task_info_decoders
from exporter.blueking.nodeman_subscriptions import TARGET_HOSTS, task_result_decoders
from exporter.blueking.nodemgr import OPERATIONS, WORKFLOWS


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


ENVELOPE = names("result code data error message permission job_request_id request_id")
"""Members of an envelope that exporter.blueking.envelope reads."""
ENVELOPE_DOCUMENTED = names("errors trace_id")

_ROW = "job_template_id operator total_time bk_biz_id"
_TIMES = "create_time total_time"
_RESULT = "tag error_code start_time total_time"
_STEP = "id node_name pipeline_id extra_info create_time start_time finish_time status step_code"
_NODE = "pipeline_id create_time start_time finish_time status node_name"
_SUB_STEP = "pipeline_id index create_time log ex_data inputs"
_CMDB_HOST = "bk_biz_name bk_cloud_name bk_supplier_account bk_host_name"
_KIND = "created_by job_type_display cost_time"
_WORKFLOW = "tenant_id trigger_id operator bk_biz_name statistics"
_OPERATION = {
    "data": "total",
    "data.operations[]": "operator create_time",
    "data.operations[].latest_oper_inst_brief_data.life_cycle": "create_time start_time stop_time",
    "data.operations[].latest_oper_inst_brief_data.latest_action_inst_brief_data": "tags",
}

_DOCUMENTED: Mapping[str, Mapping[str, str]] = {
    "get_job_instance_list": {
        "data": "start length",
        "data.job_instance_list[]": _ROW,
        "data.data[]": _ROW,
    },
    "get_job_instance_status": {
        "data": "finished",
        "data.job_instance": f"name {_TIMES} start_time bk_biz_id",
        "data.step_instance_list[]": f"name {_TIMES} start_time",
        "data.step_instance_list[].step_ip_result_list[]": _RESULT,
        "data.step_instance_list[].step_execute_object_result_list[]": _RESULT,
        "data.step_instance_list[].step_execute_object_result_list[].execute_object": "container",
        "data.step_instance_list[].step_execute_object_result_list[].execute_object.host": (
            "bk_cloud_name bk_agent_id alive"
        ),
    },
    "job_list": {
        "data.list[]": (
            f"{_KIND} from_system global_params bk_biz_scope_display error_hosts is_auto_trigger type step_type "
            "op_type op_type_display step_type_display policy_name"
        ),
    },
    "job_details": {
        "data": f"{_KIND} ip_filter_list meta",
        "data.list[]": (
            "bk_cloud_name bk_biz_name job_id op_type op_type_display cost_time is_manual ap_id current_version "
            "target_version suppressed_by_id start_time"
        ),
    },
    "task_result": {
        f"data{rows}[]{path}": names
        for rows in (".list", "")
        for path, names in (
            ("", "create_time pipeline_id"),
            (".instance_info.host", _CMDB_HOST),
            (".instance_info.service", "id name bk_module_id"),
            (".steps[]", _STEP),
            (".steps[].target_hosts[]", _NODE),
            (".steps[].target_hosts[].sub_steps[]", _SUB_STEP),
        )
    },
    "get_task_info": {
        "data": (
            "creator bk_supplier_account bk_supplier_id bk_cloud_id global_params job_type_desc op_target host_count"
        ),
        "data.hosts[]": "job_id err_code_desc",
        "data.hosts[].host": "id bk_biz_id outer_ip node_type os_type has_cygwin",
    },
    "node_workflow_list": {
        "data.items[]": f"{_WORKFLOW} bk_networkarea_id bk_networkunit_id node_role",
    },
    "plugin_workflow_list": {"data.items[]": f"{_WORKFLOW} bk_host_id"},
    "node_operation_list": {
        **_OPERATION,
        "data.operations[].node_deployment_info": "bk_networkunit_id node_version",
    },
    "plugin_operation_list": {
        **_OPERATION,
        "data.operations[].plugin_deployment_info": "bk_networkunit_id plugin_name plugin_version",
    },
}  # fmt: skip
"""Documented members that the exporter does not read, by the path of their object. From the vendor's API documents and
public source."""


_OTHER = (
    "details actions id name type system_id system_name related_resource_types instances type_name code_name apply_url "
    "info count bk_biz_set_id bk_biz_set_name"
)
"""Members of errors and of the lists of CMDB."""


class Members:
    """The members of an object that the exporter reads, by name. `everything`: the value is read as a whole, or the
    names of its members are data."""

    def __init__(self, *, everything: bool = False) -> None:
        self.by_name: dict[str, Members] = {}
        self.everything = everything

    def merge(self, other: Members) -> Members:
        """Add the members that another decoder reads of the same object."""
        self.everything |= other.everything
        for name, members in other.by_name.items():
            self.by_name.setdefault(name, Members()).merge(members)
        return self

    def unread(self, value: object, path: str = "") -> Iterator[str]:
        """The paths of the unread members of `value`. A path appears once per occurrence."""
        if isinstance(value, list):
            for item in value:
                yield from self.unread(item, f"{path}[]")
        elif isinstance(value, dict) and not self.everything:
            for name, member in value.items():
                at = f"{path}.{name}" if path else name
                known = self.by_name.get(name)
                if known is None:
                    yield at
                else:
                    yield from known.unread(member, at)


@functools.cache
def vocabulary() -> frozenset[str]:
    """All member names that a decoder reads or a document names."""
    found = {*ENVELOPE, *ENVELOPE_DOCUMENTED, *names(_OTHER)}
    for api, objects in _DOCUMENTED.items():
        found.update(*map(names, objects.values()))
        waiting = [read_members(api)]
        while waiting:
            if (members := waiting.pop()) is not None:
                found |= members.by_name.keys()
                waiting += members.by_name.values()
    return frozenset(found)


def is_documented(api: str, path: str) -> bool:
    """Whether a document names this unread member of an answer of `api`."""
    parent, _, name = path.rpartition(".")
    if not parent:
        return name in ENVELOPE_DOCUMENTED
    return name in names(_DOCUMENTED[api].get(parent, ""))


@functools.cache
def read_members(api: str) -> Members | None:
    """The members that the decoders of `api` read in a successful answer; None for an API that is not checked."""
    zone = datetime.UTC
    decoders: Mapping[str, Sequence[ResponseDecoder[Any, Any]]] = {
        "get_job_instance_list": (*LIST_V4, *LIST_V3),
        "get_job_instance_status": STATUS,
        "job_list": job_list_decoders(zone),
        "job_details": job_details_decoders(zone),
        "task_result": task_result_decoders(zone, lambda instance: True),
        "get_task_info": get_task_info_decoders(zone),
        "node_workflow_list": WORKFLOWS,
        "plugin_workflow_list": WORKFLOWS,
        "node_operation_list": OPERATIONS,
        "plugin_operation_list": OPERATIONS,
    }
    if api not in decoders:
        return None
    answer = Members()
    answer.by_name = {name: Members(everything=True) for name in ENVELOPE}
    answer.by_name["data"] = data = Members()
    for decoder in decoders[api]:
        data.merge(_members(msgspec.inspect.type_info(decoder.wire)))
    if api == "task_result":
        hosts = _members(msgspec.inspect.type_info(TARGET_HOSTS))
        for rows in (data.by_name["list"], data):
            rows.by_name["steps"].by_name["target_hosts"] = hosts
    return answer


def _members(wire: msgspec.inspect.Type) -> Members:
    match wire:
        case msgspec.inspect.StructType():
            members = Members()
            for field in wire.fields:
                members.by_name.setdefault(field.encode_name, Members()).merge(_members(field.type))
            return members
        case msgspec.inspect.UnionType():
            members = Members()
            for one in wire.types:
                members.merge(_members(one))
            return members
        case msgspec.inspect.CollectionType():
            return _members(wire.item_type)
        case msgspec.inspect.Metadata():
            return _members(wire.type)
        case msgspec.inspect.DictType() | msgspec.inspect.AnyType() | msgspec.inspect.RawType():
            return Members(everything=True)
        case _:
            return Members()
