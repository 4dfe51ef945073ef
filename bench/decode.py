"""T7: decoding the platform's answers, beside the json module: CPU seconds and the memory at the peak."""

from __future__ import annotations

import datetime
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import msgspec

from bench import pages
from bench.measure import MIB, Row, forget_peak, memory_of, output, python
from exporter.blueking.envelope import Reply, ResponseDecoder, read
from exporter.blueking.job import LIST_V3, LIST_V4, STATUS
from exporter.blueking.nodeman_jobs import job_details_decoders, job_list_decoders
from exporter.blueking.nodeman_subscriptions import task_result_decoders

BASE = 1_789_000_000_000
KNOWN = "nodeman task_result, 500 known instances"
TARGETS = {"list": 5.0, "status": 5.0, "nodeman": 4.0}


def _status(hosts: int, *, v4: bool) -> bytes:
    """Members in the order in which JOB sends them."""
    chance = random.Random(1)
    results: list[dict[str, object]] = []
    for index in range(hosts):
        ip = f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}"
        length = chance.randrange(100, 30_000)
        status = {"status": chance.choice((9, 9, 9, 9, 11, 104)), "tag": "", "exit_code": 0}
        times = {"start_time": BASE, "end_time": BASE + length, "total_time": length}
        if v4:
            host = {
                "bk_host_id": 1_000_000 + index,
                "bk_cloud_id": 0,
                "bk_cloud_name": "Default Area",
                "ip": ip,
                "bk_agent_id": f"020000000000{index:012x}",
            }
            target = {"type": 1, "resource_id": str(1_000_000 + index), "host": host}
            results.append({"execute_object": target, **status, **times})
        else:
            host = {"bk_host_id": 1_000_000 + index, "ip": ip, "bk_cloud_id": 0}
            results.append({**host, **status, "error_code": 0, **times})
    step = {
        "step_instance_id": 75,
        "name": "stop",
        "status": 4,
        "type": 1,
        "execute_count": 0,
        "start_time": BASE,
        "end_time": BASE + 3000,
        "total_time": 3000,
        "create_time": BASE,
        "step_execute_object_result_list" if v4 else "step_ip_result_list": results,
    }
    instance = {
        "bk_scope_type": "biz",
        "bk_scope_id": "2",
        "job_instance_id": 411,
        "status": 4,
        "end_time": BASE + 3000,
    }
    data = {"finished": True, "job_instance": instance, "step_instance_list": [step]}
    return json.dumps({"data": data}, separators=(",", ":")).encode()


def _task_result(instances: int) -> bytes:
    """As Django writes it: spaces after separators, text escaped."""
    chance = random.Random(1)
    names = ("注册主机到配置平台", "选择接入点", "安装", "查询Agent状态", "托管 processbeat 插件进程", "更新任务状态")
    times = {"start_time": "2026-03-23 16:46:01", "finish_time": "2026-03-23 16:47:08"}
    listed = []
    for index in range(instances):
        status = chance.choice(("SUCCESS", "SUCCESS", "SUCCESS", "FAILED"))
        pipeline = {"pipeline_id": f"{chance.getrandbits(128):032x}"}
        ip = f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}"
        host = {
            "bk_biz_id": 4,
            "bk_host_id": index + 1,
            "bk_biz_name": "测试业务",
            "bk_cloud_id": 0,
            "bk_cloud_name": "直连区域",
            "bk_host_innerip": ip,
            "bk_host_innerip_v6": None,
            "bk_supplier_account": "0",
        }
        info = {"host": host, "service": {}}
        steps: list[dict[str, object]] = [
            {"index": number, "node_name": name, "step_code": None, **pipeline, "log": "", "ex_data": None,
             "status": status, **times}
            for number, name in enumerate(names)
        ]  # fmt: skip
        steps[2]["inputs"] = {"instance_info": {**info, "scope": [], "process": {}}}
        name = "[agent] 安装"
        target = {"node_name": f"{name} 0:{ip}", **pipeline, "status": status, **times, "sub_steps": steps}
        step = {
            "id": "agent", "type": "AGENT", "action": "INSTALL_AGENT", "extra_info": {}, **pipeline,
            "node_name": name, "status": status, **times, "target_hosts": [target],
        }  # fmt: skip
        listed.append(
            {
                "task_id": 1,
                "record_id": index,
                "instance_id": f"host|instance|host|{index + 1}",
                "create_time": "2026-03-23 16:46:01",
                **pipeline,
                "instance_info": info,
                **times,
                "steps": [step],
                "status": status,
            }
        )
    data = {"total": instances, "list": listed, "status_counter": {"SUCCESS": instances, "total": instances}}
    return _nodeman(data)


def _job_list(jobs: int) -> bytes:
    chance = random.Random(1)
    statuses = ("pending", "running", "success", "failed", "ignored", "total")
    listed = []
    for index in range(jobs):
        counts = dict.fromkeys(statuses, 0) | {"success": (hosts := chance.randrange(1, 200)), "total": hosts}
        begun = f"2026-03-23 {index // 60 % 24:02}:{index % 60:02}"
        listed.append(
            {
                "id": 90_000 - index,
                "created_by": "admin",
                "from_system": "",
                "job_type": "MAIN_INSTALL_PLUGIN",
                "subscription_id": 50_000 - index,
                "task_id_list": [70_000 - index],
                "start_time": f"{begun}:01+0800",
                "end_time": f"{begun}:58+0800",
                "status": "SUCCESS",
                "global_params": {},
                "statistics": {f"{status}_count": count for status, count in counts.items()},
                "bk_biz_scope": [2],
                "error_hosts": [],
                "is_auto_trigger": False,
                "type": "PLUGIN",
                "step_type": "PLUGIN",
                "op_type": "INSTALL",
                "op_type_display": "安装",
                "step_type_display": "插件",
                "policy_name": None,
                "cost_time": "57",
                "bk_biz_scope_display": ["测试业务"],
                "job_type_display": "安装插件",
            }
        )
    return _nodeman({"total": jobs, "list": listed})


def _job_details(hosts: int) -> bytes:
    chance = random.Random(1)
    listed = []
    for index in range(hosts):
        ip = f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}"
        failed = chance.random() < 0.25
        listed.append(
            {
                "instance_id": f"host|instance|host|{index + 1}",
                "ip": ip,
                "inner_ip": ip,
                "inner_ipv6": None,
                "bk_host_id": index + 1,
                "bk_cloud_id": 0,
                "bk_cloud_name": "直连区域",
                "bk_biz_id": 2,
                "bk_biz_name": "测试业务",
                "status": "FAILED" if failed else "SUCCESS",
                "start_time": "2026-03-23 16:46:01+0800",
                "end_time": f"2026-03-23 16:{47 + index // 60 % 12}:{index % 60:02}+0800",
                "op_type": "INSTALL",
                "op_type_display": "安装",
                "node_id": 2 if failed else 4,
                "status_display": "安装 失败" if failed else "执行成功",
                "step": "安装" if failed else "更新任务状态",
                "cost_time": 67.0,
                "is_manual": False,
                "ap_id": 1,
            }
        )
    about = {"job_id": 187, "created_by": "admin", "job_type": "INSTALL_AGENT", "job_type_display": "安装 Agent"}
    times = {"end_time": "2026-03-23 16:59:00+0800", "start_time": "2026-03-23 16:46:01+0800", "cost_time": "779"}
    return _nodeman(
        {**about, "ip_filter_list": [], "total": hosts, "list": listed, "statistics": {}, "status": "FAILED", **times}
    )


def _nodeman(data: dict[str, object]) -> bytes:
    return json.dumps({"result": True, "data": data, "code": 0, "message": ""}).encode()


def _v3(listed: list[dict[str, object]]) -> bytes:
    data = {"start": 0, "length": 1000, "total": len(listed), "data": listed}
    return json.dumps({"code": 0, "result": True, "data": data}, ensure_ascii=False, separators=(",", ":")).encode()


def cases() -> dict[str, tuple[bytes, Sequence[ResponseDecoder[Any, Any]], int]]:
    """The body, its decoders, and how often one measurement decodes it."""
    return {
        "list of v4, 200 rows": (pages.body(pages.rows(200, BASE, 20_000_000_000)), LIST_V4, 50),
        "list of v3, 1,000 rows": (_v3(pages.rows(1000, BASE, 20_000_000_000)), LIST_V3, 10),
        "status of v4, 10,000 hosts": (_status(10_000, v4=True), STATUS, 1),
        "status of v4, 50,000 hosts": (_status(50_000, v4=True), STATUS, 1),
        "status of v3, 10,000 hosts": (_status(10_000, v4=False), STATUS, 1),
        KNOWN: (_task_result(500), task_result_decoders(datetime.UTC, lambda instance: False), 5),
        "nodeman job_details, 500 hosts": (_job_details(500), job_details_decoders(datetime.UTC), 10),
        "nodeman job_list, 500 jobs": (_job_list(500), job_list_decoders(datetime.UTC), 10),
        # Not only decoded: the sub-steps are made into what is counted, which is done once for each run.
        "every sub-step of nodeman task_result, 500 new instances": (
            _task_result(500),
            task_result_decoders(datetime.UTC, lambda instance: True),
            5,
        ),
    }


def _timed(work: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times


def measure(rounds: int = 9) -> list[Row]:
    found = []
    for name, (body, decoders, times) in cases().items():
        ours, theirs = [], []
        for number in range(rounds + 1):
            gc.collect()
            anchor = _timed(lambda body=body: json.loads(body), times)  # type: ignore[misc]
            mine = _timed(lambda body=body, decoders=decoders: read(Reply(200, body, {}), decoders), times)  # type: ignore[misc]
            if number:
                theirs.append(anchor)
                ours.append(mine)
        ratios = [anchor / mine for mine, anchor in zip(ours, theirs, strict=True)]
        found.append(
            Row(
                target_id="T7",
                what=f"json / {name} ({len(body) / 1e6:.2f} MB in {median(ours) * 1000:.2f} ms)",
                value=median(ratios),
                unit="×",
                target=TARGETS.get(name.split()[0]),
                at_least=True,
                rounds=rounds,
                low=min(ratios),
                high=max(ratios),
            )
        )
    for name in ("status of v4, 50,000 hosts", KNOWN):
        mine, anchor = (_peak(name, which) for which in ("ours", "json"))
        found.append(
            Row(target_id="T7", what=f"peak memory of {name} / json", value=mine / MIB, anchor=anchor / MIB, unit="MiB",
                target=0.35 if name.startswith("status") else None)
        )  # fmt: skip
    return found


def _peak(case: str, which: str) -> float:
    """Bytes that decoding one body adds at its peak, in a process of its own."""
    return float(output(*python("bench.decode", case, which)))


def _measure_peak(case: str, which: str) -> None:
    import os

    body, decoders, _ = cases()[case]
    small = msgspec.json.encode({"data": {}})
    json.loads(small)
    gc.collect()
    before = memory_of(os.getpid())
    forget_peak(os.getpid())
    kept = json.loads(body) if which == "json" else read(Reply(200, body, {}), decoders)
    print(memory_of(os.getpid(), "VmHWM") - before)
    del kept


if __name__ == "__main__":
    _measure_peak(sys.argv[1], sys.argv[2])
