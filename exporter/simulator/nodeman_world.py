"""A simulated NodeMan 2.x and 1.x: subscriptions, tasks, instance records, and the jobs that show them.

There is no background task: the course of an instance is decided when its task is created, and every read computes
from the clock how far it has come. So the world works in real, fast and virtual time. Changes of a job (retry, revoke,
the platform's own statistics task every 30 s) have a time; each read first carries out those that are due, in order.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

UNFINISHED = ("PENDING", "RUNNING")
COUNTED = ("PENDING", "RUNNING", "SUCCESS", "FAILED", "IGNORED")
"""The statuses that `statistics` contains; REMOVED and all others are missing in it."""

REMOVED = "REMOVED"
"""An outcome of a host: it left the scope of the subscription, and its steps never run."""

STATISTICS_PERIOD = 30.0
"""Seconds between two runs of the platform's task that updates the rows of unfinished and terminated jobs."""


@dataclass(frozen=True, slots=True)
class Target:
    """A host of CMDB; its id is None if it is never registered. With a `service_id`: a service instance on it."""

    bk_biz_id: int
    ip: str
    bk_host_id: int | None = None
    bk_cloud_id: int = 0
    ipv6: str = ""
    os_type: str = "LINUX"
    service_id: int | None = None

    def instance_id(self, by_address: bool) -> str:
        """The id of the instance in a subscription. It contains the address if the host is not registered yet."""
        if self.service_id is not None:
            return f"service|instance|service|{self.service_id}"
        if self.bk_host_id is not None and not by_address:
            return f"host|instance|host|{self.bk_host_id}"
        return f"host|instance|host|{self.ip or self.ipv6}-{self.bk_cloud_id}-0"


@dataclass(frozen=True, slots=True)
class Step:
    """One sub-step of a pipeline: its code, and its name in both languages."""

    code: str
    zh: str
    en: str


def _steps(text: str) -> tuple[Step, ...]:
    return tuple(Step(*(part.strip() for part in line.split("|"))) for line in text.strip().splitlines())


REGISTER = "add_or_update_hosts"
_REGISTER = f"{REGISTER} | 新增或更新主机信息 | Add or Update host information"
_AGENT_STATUS = "get_agent_status | 查询Agent状态 | Query Agent Status"
_PROCESS_STATUS = "update_process_status | 更新主机进程状态 | Update host process status"
_PLUGIN_STATUS = "update_host_process_status | 更新插件部署状态为{0} | Update plugin deployment status is {0}"

PLANS: Mapping[str, tuple[Step, ...]] = {
    "INSTALL_AGENT": _steps(f"""
        {_REGISTER}
        choose_access_point | 选择接入点 | Select access point
        install | 安装 | Install
        {_AGENT_STATUS}
        push_host_identifier | 推送主机身份信息 | Push host identify information
        install_plugins | 安装预设插件 | Install preset plugin"""),
    "INSTALL_PROXY": _steps(f"""
        {_REGISTER}
        query_password | 查询主机密码 | Query host password
        configure_policy | 配置策略 | Configure policy
        install | 安装 | Install
        {_AGENT_STATUS}
        check_policy_gse_to_proxy | 检测 GSE Server 到 Proxy 策略 | Detecting GSE Server to Proxy Policy
        push_files_to_proxy | 下发文件到Proxy | Transfer file to Proxy"""),
    "RESTART_AGENT": _steps(f"""
        restart | 重启 | Restart
        {_AGENT_STATUS}
        {_PROCESS_STATUS}"""),
    "UPGRADE_AGENT": _steps(f"""
        push_upgrade_package | 下发升级包 | Transfer upgrade package
        run_upgrade_command | 下发升级脚本命令 | Send upgrade script command
        {_AGENT_STATUS}
        {_PROCESS_STATUS}"""),
    "MAIN_INSTALL_PLUGIN": _steps(f"""
        init_process_status | 初始化进程状态 | Initializing process state
        check_agent_status | 查询Agent状态 | Query Agent Status
        transfer_package | 下发安装包 | Transfer installation package
        install_package | 安装插件包 | Install plugin package
        render_and_push_config | 渲染下发配置 | Rendering config
        gse_operate_proc | 托管进程 | Supervised process
        {_PLUGIN_STATUS.format("RUNNING")}
        reset_retry_times | 重置重试次数 | Reset retries"""),
    "MAIN_RESTART_PLUGIN": _steps(f"""
        check_agent_status | 查询Agent状态 | Query Agent Status
        gse_operate_proc | 重启进程 | Restart process
        {_PLUGIN_STATUS.format("RUNNING")}"""),
    "MAIN_STOP_PLUGIN": _steps(f"""
        gse_operate_proc | 停止进程 | Stop process
        {_PLUGIN_STATUS.format("TERMINATED")}"""),
}
"""Sub-steps by job type. Other job types of a kind run as the first one of their kind."""

LEGACY_STEPS = {"QUEUE": "任务初始化", "RUNNING": "执行安装脚本", "SUCCESS": "任务执行成功", "FAILED": "任务执行失败"}


def steps_of(job_type: str) -> tuple[Step, ...]:
    """The sub-steps a host goes through in a job of this type."""
    if job_type in PLANS:
        return PLANS[job_type]
    return PLANS["MAIN_INSTALL_PLUGIN" if job_type.endswith("PLUGIN") else "INSTALL_AGENT"]


@dataclass(slots=True)
class Run:
    """One attempt on one instance, from sub-step `first` on. `ends`: the ends of the sub-steps that it reaches.
    `failed_step`: whether the last of them fails. `revoked`: when the attempt was stopped."""

    begin: float
    first: int
    ends: list[float]
    end: float
    failed: bool
    failed_step: bool = True
    revoked: float | None = None


@dataclass(slots=True)
class SubStep:
    step: Step
    status: str
    start: float | None
    finish: float | None


class Record:
    """One instance in one task: a subscription instance record of the platform. retry_node adds a run to it.
    `registered`: the host has its CMDB id already; otherwise the first sub-step sets it. `first_steps`: how many of
    `steps` belong to the first step of the subscription."""

    __slots__ = (
        "created", "first_steps", "id", "instance_id", "registered", "removed", "runs", "steps", "target", "task_id",
    )  # fmt: skip

    def __init__(
        self, id: int, task_id: int, target: Target, steps: tuple[Step, ...], created: float, registered: bool = False
    ) -> None:
        registers = steps[0].code == REGISTER
        self.id = id
        self.task_id = task_id
        self.target = target
        self.instance_id = target.instance_id(by_address=registers)
        self.steps = steps
        self.first_steps = len(steps)
        self.created = created
        self.registered = registered or not registers
        self.removed = False
        self.runs: list[Run] = []

    def begin_run(self, begin: float, seconds: float, fails_in: str | None, first: int = 0) -> None:
        """Start an attempt that takes `seconds` and fails in the sub-step `fails_in`; None: it succeeds."""
        last = len(self.steps) - 1
        if fails_in is not None:
            last = next(i for i, step in enumerate(self.steps) if step.code == fails_in and i >= first)
        count = last - first + 1
        ends = [begin + seconds * (i + 1) / count for i in range(count)]
        self.runs.append(Run(begin, first, ends, ends[-1], fails_in is not None))

    def status(self, at: float) -> str:
        """The stored status of the record."""
        if self.removed:
            return REMOVED
        run = self.runs[-1]
        if run.revoked is not None and at >= run.revoked:
            return "FAILED"
        if at < run.begin:
            return "PENDING"
        if at < run.end:
            return "RUNNING"
        return "FAILED" if run.failed else "SUCCESS"

    def shown_status(self, at: float) -> str:
        """The status of its row. The platform computes it from the sub-steps: there a revoked record still runs."""
        run = self.runs[-1] if self.runs else None
        if run and run.revoked is not None and run.revoked <= at < run.end:
            return "RUNNING"
        return self.status(at)

    def bounds(self, at: float) -> tuple[float | None, float | None]:
        """Start and finish as the platform shows them: a retried node keeps the start of its pipeline."""
        if self.removed:
            return self.created, self.created
        if at < self.runs[0].begin:
            return None, None
        return self.runs[0].begin, self.runs[-1].end if at >= self.runs[-1].end else None

    def sub_steps(self, at: float) -> list[SubStep]:
        """All sub-steps at a point in time, PENDING if not reached. A revoked record may show none that failed."""
        shown = [SubStep(step, "PENDING", None, None) for step in self.steps]
        if self.removed:
            return shown
        for run in self.runs:
            for i in range(run.first, len(shown)):
                shown[i] = SubStep(self.steps[i], "PENDING", None, None)
            start = run.begin
            for i, end in enumerate(run.ends, run.first):
                if at < start:
                    break
                if at < end:
                    shown[i] = SubStep(self.steps[i], "RUNNING", start, None)
                    break
                failed = run.failed and run.failed_step and i == run.first + len(run.ends) - 1
                shown[i] = SubStep(self.steps[i], "FAILED" if failed else "SUCCESS", start, end)
                start = end
        return shown

    def host_id(self, at: float) -> int | None:
        """The CMDB id, None until the host is registered."""
        if self.registered or self.sub_steps(at)[0].status == "SUCCESS":
            return self.target.bk_host_id
        return None

    def revoke(self, at: float) -> None:
        """Stop the present attempt: the record fails at once. The running sub-step continues to its end. Then no
        sub-step has failed, except that the last sub-step, if it was running, fails."""
        run = self.runs[-1]
        if at < run.begin:
            self.runs[-1] = Run(at, run.first, [], at, True, revoked=at)
        elif at < run.end:
            reached = next(i for i, end in enumerate(run.ends) if end > at) + 1
            last = reached == len(run.ends)
            end = run.ends[reached - 1]
            self.runs[-1] = Run(run.begin, run.first, run.ends[:reached], end, True, failed_step=last, revoked=at)


@dataclass(slots=True)
class Task:
    """One execution of a subscription. It is ready at `ready_at`; with an `err_msg` never. Without its pipeline `tree`
    the platform cannot build its rows."""

    id: int
    created: float
    ready_at: float
    records: list[Record] = field(default_factory=list)
    err_msg: str = ""
    tree: bool = True


@dataclass(slots=True)
class Subscription:
    """An action and its instances. `old_engine`: steps are shown as older engines show them, with create_time and
    without step_code. `second`: the action of a second step."""

    id: int
    action: str
    name: str | None = None
    plugin_name: str | None = None
    category: str | None = None
    old_engine: bool = False
    second: str = ""
    tasks: dict[int, Task] = field(default_factory=dict)

    @property
    def step_type(self) -> str:
        return self.action.rsplit("_", 1)[-1]

    def ready(self, task_ids: Iterable[int], at: float) -> bool:
        return all(at >= self.tasks[i].ready_at and not self.tasks[i].err_msg for i in task_ids)

    def latest(self, task_ids: Iterable[int]) -> list[Record]:
        """The newest record of each instance in these tasks, by ascending record id."""
        newest = {record.instance_id: record for i in sorted(task_ids) for record in self.tasks[i].records}
        return sorted(newest.values(), key=lambda record: record.id)


@dataclass(frozen=True, slots=True)
class Filtered:
    """A host that the job never ran on. Without a stored status it is shown as FAILED and counted as IGNORED."""

    target: Target
    reason: str
    status: str | None = None


@dataclass(slots=True)
class Job:
    """A row of the platform's job table: status, statistics and end_time as stored last, which may be out of date."""

    id: int
    job_type: str
    subscription: Subscription
    task_ids: list[int]
    start_time: float
    bk_biz_scope: tuple[int, ...]
    filtered: list[Filtered]
    statistics: dict[str, int]
    status: str = "PENDING"
    end_time: float | None = None
    created_by: str = "admin"
    is_auto_trigger: bool = False
    global_params: dict[str, object] = field(default_factory=dict)
    nothing_to_change: bool = False
    provisional: bool = False
    """Whether it was stored as a success before its task existed; then `end_time` is no end."""
    settled: float = 0.0
    ends: list[tuple[float, str]] = field(default_factory=list)
    """When a terminal status was stored, and which one: what readers of the API can see."""

    def store_status(self, status: str, at: float) -> None:
        if self.status in UNFINISHED and status not in UNFINISHED:
            self.ends.append((at, status))
        self.status = status


@dataclass(slots=True)
class LegacyHost:
    """A host of a NodeMan 1.x task: queued before `begin`, then running until `end`. `err_code` "" is success."""

    id: int
    target: Target
    begin: float
    end: float
    err_code: str

    def status(self, at: float) -> str:
        if at < self.begin:
            return "QUEUE"
        if at < self.end:
            return "RUNNING"
        return "FAILED" if self.err_code else "SUCCESS"


@dataclass(slots=True)
class LegacyTask:
    id: int
    bk_biz_id: int
    job_type: str
    start_time: float
    hosts: list[LegacyHost]
    plugin: str = ""


Outcome = str | None
"""How a host ends: None for success, the code of the sub-step that fails, or `REMOVED`."""


class NodemanWorld:
    """One NodeMan. `now` returns unix seconds. `language` and `utc_offset` (hours) are those of the server. `denied`:
    businesses whose task history the caller may not see. `legacy` False: the routes of 1.x do not exist, as in 2.x.
    Methods take effect now; `plan()` schedules a change."""

    def __init__(self, now: Callable[[], float], seed: int = 0, language: str = "zh", utc_offset: float = 8.0) -> None:
        self._now = now
        self._event_time: float | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = {"subscription": 10, "task": 100, "record": 1000, "job": 180, "legacy": 180, "event": 0}
        self.random = random.Random(seed)
        self.language = language
        self.utc_offset = utc_offset
        self.denied: set[int] = set()
        self.legacy = True
        self.subscriptions: dict[int, Subscription] = {}
        self.jobs: dict[int, Job] = {}
        self.legacy_tasks: dict[int, LegacyTask] = {}
        self._open: dict[int, Job] = {}
        self._keep = math.inf
        self._forget_at = math.inf
        self._pinned: frozenset[int] = frozenset()

    def now(self) -> float:
        """The time of the event being carried out, else the clock's."""
        return self._now() if self._event_time is None else self._event_time

    def plan(self, at: float, action: Callable[[], None]) -> None:
        """Carry out `action` at a point in time; inside it `now()` is that time."""
        heapq.heappush(self._events, (at, self._id("event"), action))

    def advance(self) -> float:
        """Bring the world up to the clock; returns the time. Every read calls this first."""
        now = self.now()
        while self._event_time is None and self._events and self._events[0][0] <= now:
            self._event_time, _, action = heapq.heappop(self._events)
            try:
                action()
            finally:
                self._event_time = None
        for job in list(self._open.values()):
            self._settle(job, now)
        if now >= self._forget_at:
            self._forget(now)
        return now

    def keep_for(self, seconds: float) -> None:
        """From now on drop jobs that ended longer ago than this, with their tasks. Jobs that exist now are kept."""
        self._keep = seconds
        self._pinned = frozenset(self.jobs)
        self._forget_at = self.now()

    def _forget(self, now: float) -> None:
        self._forget_at = now + self._keep / 10
        for job in list(self.jobs.values()):
            subscription = job.subscription
            ended = job.id not in self._open and job.end_time is not None and job.end_time < now - self._keep
            # The newest task of a policy is what the policy shows.
            shown = subscription.name is not None and max(subscription.tasks, default=0) in job.task_ids
            if not ended or shown or job.id in self._pinned:
                continue
            del self.jobs[job.id]
            for id in job.task_ids:
                del subscription.tasks[id]
            if not subscription.tasks:
                del self.subscriptions[subscription.id]

    # What somebody does on the platform

    def start_subscription(
        self,
        action: str,
        hosts: Mapping[Target, Outcome] | None = None,
        *,
        name: str | None = None,
        plugin_name: str | None = None,
        category: str | None = None,
        old_engine: bool = False,
        second: str = "",
        duration: float = 60.0,
        pending: float = 0.0,
        jitter: float = 0.0,
        ready_after: float = 0.0,
    ) -> Subscription:
        """Create a subscription and, if there are hosts, its first task. `action`, and `second` for a second step, are
        job types."""
        subscription = Subscription(self._id("subscription"), action, name, plugin_name, category, old_engine, second)
        self.subscriptions[subscription.id] = subscription
        if hosts is not None:
            self.run_task(
                subscription, hosts, duration=duration, pending=pending, jitter=jitter, ready_after=ready_after
            )
        return subscription

    def run_task(
        self,
        subscription: Subscription,
        hosts: Mapping[Target, Outcome],
        *,
        duration: float = 60.0,
        pending: float = 0.0,
        jitter: float = 0.0,
        ready_after: float = 0.0,
        err_msg: str = "",
        registered: Collection[Target] = (),
    ) -> Task:
        """Run a subscription on hosts: each waits `pending` seconds once ready, then takes `duration` (1 ± jitter)."""
        now = self.now()
        task = Task(self._id("task"), now, now + ready_after, err_msg=err_msg)
        subscription.tasks[task.id] = task
        steps = first = steps_of(subscription.action)
        if subscription.second:
            steps = (*first, *steps_of(subscription.second))
        for target, outcome in hosts.items() if not err_msg else ():
            record = Record(self._id("record"), task.id, target, steps, now, target in registered)
            record.first_steps = len(first)
            record.removed = outcome == REMOVED
            if not record.removed:
                seconds = duration * (1 + self.random.uniform(-jitter, jitter))
                record.begin_run(task.ready_at + pending, seconds, outcome)
            task.records.append(record)
        return task

    def start_job(
        self,
        job_type: str,
        hosts: Mapping[Target, Outcome],
        *,
        duration: float = 60.0,
        pending: float = 0.0,
        jitter: float = 0.0,
        ready_after: float = 0.0,
        err_msg: str = "",
        filtered: Sequence[Filtered] = (),
        subscription: Subscription | None = None,
        plugin_name: str | None = None,
        created_by: str = "admin",
        is_auto_trigger: bool = False,
        without_task: bool = False,
        task_after: float = 0.0,
        old_engine: bool = False,
        second: str = "",
        bk_biz_scope: Sequence[int] | None = None,
    ) -> Job:
        """Start a job with its own subscription, or with the subscription of a policy.

        Without hosts and `filtered` there is nothing to change. `err_msg`: the creation of the task fails.
        `without_task`: the task is never created and the job stays PENDING. `task_after`: the task is created so many
        seconds later, and somebody reads the job before and after that; if the job has only `filtered` hosts, the
        first read makes it a success.
        """
        kind = job_type.rsplit("_", 1)[-1]
        if subscription is None:
            plugin = plugin_name or ("basereport" if kind == "PLUGIN" else None)
            subscription = self.start_subscription(job_type, plugin_name=plugin, old_engine=old_engine, second=second)
        run = partial(
            self.run_task,
            subscription,
            hosts,
            duration=duration,
            pending=pending,
            jitter=jitter,
            ready_after=ready_after,
            err_msg=err_msg,
        )
        task_ids = [] if without_task or task_after else [run().id]
        targets = [*hosts, *(f.target for f in filtered)]
        scope = bk_biz_scope if bk_biz_scope is not None else sorted({target.bk_biz_id for target in targets})
        statistics: dict[str, int] = {}
        if kind != "PLUGIN" and not err_msg:
            # The first run of the statistics task will call the filtered hosts ignored.
            statistics = {"success_count": 0, "failed_count": len(filtered), "running_count": 0}
            statistics["pending_count"] = len(hosts)
            statistics["total_count"] = len(hosts) + len(filtered)
        now = self.now()
        job = Job(self._id("job"), job_type, subscription, task_ids, now, tuple(scope), list(filtered), statistics)
        job.created_by = created_by
        job.is_auto_trigger = is_auto_trigger
        job.settled = now
        self.jobs[job.id] = self._open[job.id] = job
        if task_after:
            self.plan(now + min(1.0, task_after / 2), partial(self._look_early, job))
            self.plan(now + task_after, partial(self._create_task, job, run))
        return job

    def _look_early(self, job: Job) -> None:
        """Somebody reads the details of a job that has no task yet."""
        job.provisional = bool(job.filtered)
        self.refresh(job)
        if job.provisional:
            job.ends.clear()

    def _create_task(self, job: Job, run: Callable[[], Task]) -> None:
        """Create the task late; somebody reads the details as soon as it runs."""
        task = run()
        job.task_ids.append(task.id)
        self.plan(max(record.runs[0].begin for record in task.records if record.runs), partial(self.refresh, job))

    def retry(
        self,
        job: Job,
        outcomes: Mapping[Target, Outcome] | None = None,
        *,
        only: Collection[Target] | None = None,
        extra: int = 0,
        duration: float = 60.0,
        ready_after: float = 0.0,
    ) -> Task | None:
        """Retry the failed hosts, or `only` these, in a new task; hosts without an outcome succeed. None if there is
        nothing to retry. `extra`: how many hosts that had not failed were named too."""
        self.refresh(job)
        now = self.now()
        failed = [
            r
            for r in job.subscription.latest(job.task_ids)
            if r.status(now) == "FAILED" and (only is None or r.target in only)
        ]
        if not failed:
            return None
        hosts = {r.target: (outcomes or {}).get(r.target) for r in failed}
        known = {r.target for r in failed if r.host_id(now) is not None}
        task = self.run_task(job.subscription, hosts, duration=duration, ready_after=ready_after, registered=known)
        job.task_ids.append(task.id)
        statistics = job.statistics
        statistics["running_count"] = statistics.get("running_count", 0) + len(failed) + extra
        statistics["failed_count"] = statistics.get("failed_count", 0) - len(failed) - extra
        job.store_status("RUNNING", now)
        self._open[job.id] = job
        return task

    def retry_node(
        self, job: Job, target: Target, outcome: Outcome = None, *, duration: float = 60.0, pending: float = 2.0
    ) -> None:
        """Continue a failed host from its failed sub-step. The row of the job changes only after somebody has read the
        details."""
        self.refresh(job)
        record = next(r for r in job.subscription.latest(job.task_ids) if r.target == target)
        run = record.runs[-1]
        first = run.first + max(0, len(run.ends) - 1)
        record.begin_run(self.now() + pending, duration, outcome, first)

    def revoke(self, job: Job) -> None:
        """Stop a job: hosts that have not ended fail. The row is TERMINATED until the statistics task runs."""
        self._settle(job, self.now())
        now = self.now()
        for record in job.subscription.latest(job.task_ids):
            if not record.removed and record.status(now) in UNFINISHED:
                record.revoke(now)
        job.store_status("TERMINATED", now)
        job.end_time = now
        self._open[job.id] = job

    def start_legacy_task(
        self,
        bk_biz_id: int,
        job_type: str,
        hosts: Mapping[Target, Outcome],
        *,
        duration: float = 60.0,
        queue: float = 0.0,
        plugin: str = "",
    ) -> LegacyTask:
        """Start a NodeMan 1.x task; a host's outcome is its err_code. Each waits `queue` longer than the one before."""
        now = self.now()
        rows = [
            LegacyHost(40 + i, target, now + queue * i, now + queue * i + duration, outcome or "")
            for i, (target, outcome) in enumerate(hosts.items())
        ]
        task = LegacyTask(self._id("legacy"), bk_biz_id, job_type, now, rows, plugin)
        self.legacy_tasks[task.id] = task
        return task

    # What the platform does by itself

    def refresh(self, job: Job, *, esb: bool = False) -> None:
        """Store the job's statistics and status as of now. Reading the details does the same. While a task is not
        ready nothing is counted, except that filtered hosts are counted over the ESB, which ends the job."""
        now = self.now()
        self._settle(job, now)
        ready = bool(job.task_ids) and job.subscription.ready(job.task_ids, now)
        counter: Counter[str] = Counter()
        if ready:
            counter = Counter(record.status(now) for record in job.subscription.latest(job.task_ids))
            if not counter and not job.filtered:
                job.nothing_to_change = True
        filtered = ready or esb or not job.task_ids
        self._store_statistics(job, counter, now, filtered=filtered)

    def _settle(self, job: Job, now: float) -> None:
        """Carry out the runs of the statistics task since the last read, if they change something."""
        first = math.floor(job.settled / STATISTICS_PERIOD) + 1
        last = math.floor(now / STATISTICS_PERIOD)
        job.settled = now
        if job.id not in self._open or last < first:
            return
        records = job.subscription.latest(job.task_ids)
        moments = [m for r in records for run in r.runs[-1:] for m in (run.begin, run.end)]
        moments += [job.subscription.tasks[i].ready_at for i in job.task_ids]
        ticks = {first, last} | {max(first, math.ceil(m / STATISTICS_PERIOD)) for m in moments if m <= now}
        for tick in sorted(t for t in ticks if t <= last):
            if job.status not in (*UNFINISHED, "TERMINATED"):
                del self._open[job.id]
                return
            self._run_statistics_task(job, records, tick * STATISTICS_PERIOD)

    def _run_statistics_task(self, job: Job, records: Sequence[Record], at: float) -> None:
        if not job.task_ids:
            return
        newest = job.subscription.tasks[max(job.task_ids)]
        if newest.err_msg:
            job.global_params[str(newest.id)] = {"err_msg": newest.err_msg}
            job.store_status("FAILED", at)
            job.end_time = at
        elif at >= newest.ready_at:
            self._store_statistics(job, Counter(record.status(at) for record in records), at)

    def _store_statistics(self, job: Job, counter: Counter[str], at: float, *, filtered: bool = True) -> None:
        counts = counter + Counter(f.status or "IGNORED" for f in (job.filtered if filtered else ()))
        if job.nothing_to_change:
            counts["IGNORED"] += 1
        total = sum(counts[status] for status in COUNTED)
        unfinished = counts["PENDING"] + counts["RUNNING"]
        status = job.status
        if total == 0:
            status = "PENDING"
        elif counts["IGNORED"] == total:
            status = "SUCCESS"
        elif unfinished == 0:
            status = "PART_FAILED" if counts["SUCCESS"] else "FAILED"
            if counts["FAILED"] == 0:
                status = "SUCCESS"
        elif counts["RUNNING"]:
            status = "RUNNING"
        job.statistics.update({f"{name.lower()}_count": counts[name] for name in COUNTED}, total_count=total)
        job.store_status(status, at)
        if job.end_time is None and status not in UNFINISHED:
            job.end_time = at
        if status in UNFINISHED:
            self._open[job.id] = job

    def _id(self, kind: str) -> int:
        self._ids[kind] += 1
        return self._ids[kind]


def make_hosts(bk_biz_id: int, count: int) -> list[Target]:
    """Invented hosts of a business, the same for the same arguments; some in another cloud area, some IPv6 only."""
    hosts = []
    for i in range(1, count + 1):
        cloud = 7 if i % 10 == 9 else 0
        ipv6 = f"fd00::{bk_biz_id:x}:{i:x}" if i % 25 == 24 else ""
        ip = "" if ipv6 else f"10.{bk_biz_id % 256}.{i // 250 % 256}.{i % 250 + 1}"
        os_type = "WINDOWS" if i % 7 == 6 else "LINUX"
        hosts.append(Target(bk_biz_id, ip, bk_biz_id * 100_000 + i, cloud, ipv6, os_type))
    return hosts


class Traffic:
    """Random traffic from a seed: jobs of all kinds, retries, revokes, a policy, and a task of 1.x.

    From `since` on each business starts a job every `every` seconds on average, on its `hosts`. `speed` divides all
    times. While `calm` is set nothing new starts.
    """

    def __init__(
        self,
        world: NodemanWorld,
        hosts: Mapping[int, Sequence[Target]],
        since: float,
        every: float = 240.0,
        speed: float = 1.0,
    ) -> None:
        self.world = world
        self.hosts = hosts
        self.every = every / speed
        self.speed = speed
        self.calm = False
        self.policies: dict[int, Subscription] = {}
        self.legacy: dict[int, LegacyTask] = {}
        self._bad = {host for rows in hosts.values() for host in rows if self._chance(0.08)}
        for bk_biz_id in hosts:
            world.plan(since, partial(self._begin, bk_biz_id))

    def _begin(self, biz: int) -> None:
        world, hosts = self.world, self.hosts[biz]
        self.policies[biz] = world.start_subscription(
            "MAIN_INSTALL_PLUGIN", self._outcomes("MAIN_INSTALL_PLUGIN", hosts), name=f"policy-{biz}",
            plugin_name="basereport", category="policy", jitter=0.5,
        )  # fmt: skip
        codes = {host: "SSH_LOGIN_TIMEOUT" if host in self._bad else None for host in hosts[:8] if host.ip}
        self.legacy[biz] = world.start_legacy_task(biz, "INSTALL_PAGENT", codes, queue=5.0)
        self._next(biz)

    def _next(self, biz: int) -> None:
        self.world.plan(self.world.now() + self.world.random.expovariate(1 / self.every), lambda: self._job(biz))

    def _job(self, biz: int) -> None:
        if self.calm:
            return self._next(biz)
        world, rng = self.world, self.world.random
        job_type = rng.choice(list(PLANS))
        hosts = rng.sample(list(self.hosts[biz]), min(len(self.hosts[biz]), rng.randint(1, 12)))
        filtered = [Filtered(hosts.pop(), "该主机已安装", "IGNORED")] if len(hosts) > 3 and self._chance(0.2) else []
        duration = rng.uniform(20, 300) / self.speed
        policy = self.policies[biz] if job_type == "MAIN_INSTALL_PLUGIN" and self._chance(0.5) else None
        job = world.start_job(
            job_type, self._outcomes(job_type, hosts), filtered=filtered, subscription=policy,
            duration=duration, pending=rng.uniform(0, 20) / self.speed, jitter=0.4,
            ready_after=rng.uniform(0, 10) / self.speed, is_auto_trigger=policy is not None,
        )  # fmt: skip
        if self._chance(0.05):
            world.plan(world.now() + duration / 2, lambda: world.revoke(job))
        elif self._chance(0.4):
            world.plan(world.now() + duration * 2 + rng.uniform(60, 600) / self.speed, lambda: self._retry(job))
        return self._next(biz)

    def _retry(self, job: Job) -> None:
        if job.id not in self.world.jobs:
            return
        failed = [r.target for r in job.subscription.latest(job.task_ids) if r.status(self.world.now()) == "FAILED"]
        self.world.retry(
            job, self._outcomes(job.job_type, failed), duration=self.world.random.uniform(20, 120) / self.speed
        )

    def _outcomes(self, job_type: str, hosts: Sequence[Target]) -> dict[Target, Outcome]:
        rng, steps = self.world.random, steps_of(job_type)
        failing = {host for host in hosts if self._chance(0.9 if host in self._bad else 0.02)}
        return {host: rng.choice(steps).code if host in failing else None for host in hosts}

    def _chance(self, probability: float) -> bool:
        return self.world.random.random() < probability
