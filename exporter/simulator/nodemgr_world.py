"""A simulated NodeMan V3: workflows whose tries are known to their end, and the truth about them.

There is no background task: each row is computed from the time of the read. Times are ms since the epoch. Facts:
bk-nodemgr internal/backend/storage/node/storage.go, pkg/workflow, apigw/apidocs.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from exporter.simulator.nodeman_ledger import rows

Domain = Literal["node", "plugin"]
RETENTION = 30 * 86_400_000
"""ms after a run for which its operations are kept."""
FAILED = frozenset({"failed", "timeout"})


@dataclass(frozen=True)
class Target:
    """A host. `bk_host_id` 0 or -1: it has no id yet."""

    biz: int
    ip: str
    bk_host_id: int = 0
    area: int = 0
    ipv6: str = ""


@dataclass(frozen=True)
class Part:
    """One try on one host: how long it takes (ms), how it ends, and in which step."""

    target: Target
    state: str
    step: str
    takes: int
    plugin: str = ""


@dataclass
class Try:
    """A run of a workflow, or a retry of some of its operations. `parts` by the number of the operation."""

    begin: int
    parts: dict[int, Part]

    @property
    def finish(self) -> int:
        return self.begin + max((part.takes for part in self.parts.values()), default=0)


@dataclass
class Workflow:
    """A workflow with all its tries, oldest first. `row_lag`: ms by which its operations show their end late.
    `settling`: ms until a retry is visible. `stuck`: no try ever ends."""

    domain: Domain
    id: str
    type: str
    roles: tuple[str, ...]
    tries: list[Try]
    row_lag: int = 0
    settling: int = 0
    stuck: bool = False
    operator: str = "admin"

    @property
    def operate_time(self) -> int:
        return self.tries[0].begin

    @property
    def biz_ids(self) -> tuple[int, ...]:
        return tuple(sorted({part.target.biz for part in self.tries[0].parts.values()}))

    def seen(self, now: int) -> int:
        """The number of the newest try that shows at `now`."""
        return max(
            (at for at, one in enumerate(self.tries) if at == 0 or one.begin + self.settling <= now),
            default=0,
        )

    def ended(self, at: int, now: int) -> bool:
        return not self.stuck and self.tries[at].finish <= now

    def newest(self, at: int) -> dict[int, tuple[int, Part]]:
        """By number of the operation: its newest try up to `at`, and the part of that try."""
        found: dict[int, tuple[int, Part]] = {}
        for number, one in enumerate(self.tries[: at + 1]):
            found |= {operation: (number, part) for operation, part in one.parts.items()}
        return found

    def status(self, at: int) -> str:
        """The status after try `at`. With terminated operations it is partial_failed."""
        states = {part.state for _, part in self.newest(at).values()}
        if states == {"success"}:
            return "success"
        return "failed" if states <= FAILED else "partial_failed"


@dataclass
class Truth:
    """The truth about one business: what ended in (since, until], and which hosts fail at `until`."""

    finished: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(domain, type, status) → ends."""
    reopened: Counter[str] = field(default_factory=Counter)
    durations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(domain, type) → first ends."""
    unfinished: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(type, step, state) → operations."""
    failing: dict[Target, tuple[str, str, str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Everything as lists of labels, with "value" where it is a count, for tests in other processes."""
        run, failure = ("domain", "workflow_type"), ("job_type", "step", "code")
        hosts = [
            {
                "bk_cloud_id": str(host.area),
                "bk_host_id": str(host.bk_host_id) if host.bk_host_id > 0 else "",
                "ip": host.ip or host.ipv6,
                **dict(zip(failure, labels, strict=True)),
            }
            for host, labels in self.failing.items()
        ]
        return {
            "workflows_finished": rows((*run, "status"), self.finished),
            "workflows_reopened": rows(run[:1], {(domain,): count for domain, count in self.reopened.items()}),
            "workflow_durations": rows(run, self.durations),
            "workflows_unfinished": rows(run, self.unfinished),
            "host_failures": rows(failure, self.failures),
            "hosts_failing": hosts,
        }


class NodemgrWorld:
    """All workflows of one platform. Changed attributes take effect with the next request.

    `zero`: the value for a missing time. `nulls`: rows have `null` for members that older versions did not have.
    `roles`: those that the user may see, None for all. `denied`: businesses that the user may not see.
    """

    def __init__(self, seed: int, now: Callable[[], float]) -> None:
        self.random = random.Random(f"{seed} nodemgr")
        self.workflows: dict[tuple[Domain, str], Workflow] = {}
        self.zero = 0
        self.nulls = False
        self.roles: set[str] | None = None
        self.denied: set[int] = set()
        self.keep: float | None = None
        """Seconds after which an ended workflow is forgotten; None: never."""
        self.traffic: list[Iterator[int]] = []
        """Iterators that start workflows; each yields the time of its next workflow."""
        self.quiet_until = 0
        """Traffic starts nothing before this time."""
        self._due: list[int] = []
        self._now = now
        self._numbers = itertools.count(1)

    @property
    def time(self) -> int:
        return int(self._now() * 1000)

    def id(self, prefix: str, *of: object) -> str:
        """An id as the platform forms it."""
        return f"{prefix}:{random.Random(f'{of}').getrandbits(128):032x}"

    def start(
        self, domain: Domain, type: str, parts: Sequence[Part], *, at: int | None = None, **given: object
    ) -> Workflow:
        """Start a workflow at `at`, by default now. Its parts are its operations."""
        number = next(self._numbers)
        roles = () if domain == "plugin" else ("proxy" if type.endswith("proxy") else "agent",)
        first = Try(self.time if at is None else at, dict(enumerate(parts)))
        workflow = Workflow(domain, self.id("wf", domain, number), type, roles, [first], **given)  # type: ignore[arg-type]
        self.workflows[domain, workflow.id] = workflow
        return workflow

    def retry(self, workflow: Workflow, parts: Mapping[int, Part], *, at: int | None = None) -> None:
        """Retry some operations of a workflow."""
        workflow.tries.append(Try(self.time if at is None else at, dict(parts)))

    def live(self) -> None:
        """Start the workflows that are due."""
        now = self.time
        self._due += [0] * (len(self.traffic) - len(self._due))
        for at, stream in enumerate(self.traffic):
            while self._due[at] <= now:
                self._due[at] = next(stream)
        if self.keep is not None:
            before = now - self.keep * 1000
            self.workflows = {
                key: one for key, one in self.workflows.items() if one.stuck or one.tries[-1].finish >= before
            }

    def truth(self, biz: int, since: int, until: int, ttl: int = 49 * 3_600_000) -> Truth:
        """What an exporter knows at `until`, if it made its baseline at `since` and has seen every end."""
        truth = Truth()
        newest: dict[Target, tuple[int, bool, tuple[str, str, str]]] = {}
        for one in self.workflows.values():
            if biz not in one.biz_ids or one.operate_time > until:
                continue
            at = one.seen(until)
            if not one.ended(at, until):
                truth.unfinished[one.domain, one.type] += 1
            for number, run in enumerate(one.tries[: at + 1]):
                if number and run.begin > since:
                    truth.reopened[one.domain] += 1
                if not one.ended(number, until):
                    continue
                if run.finish > since:
                    truth.finished[one.domain, one.type, one.status(number)] += 1
                    truth.durations[one.domain, one.type] += number == 0
                for part in run.parts.values():
                    labels = one.type, part.step, part.state
                    end = run.begin + part.takes
                    if part.target.biz != biz or end < until - ttl:
                        continue
                    failed = part.state != "success"
                    truth.failures[labels] += failed and end > since
                    newest[part.target] = max(newest.get(part.target, (0, False, labels)), (end, not failed, labels))
        truth.failures = +truth.failures
        truth.durations = +truth.durations
        truth.failing = {target: labels for target, (_, good, labels) in newest.items() if not good}
        return truth


NODE_STEPS = ("install_node_by_ssh", "wait_gse_ready", "transfer_pkg_to_node", "detect_info_by_ssh")
PLUGIN_STEPS = ("transfer_plugin_pkg_to_node", "install_plugin", "start_process", "verify_plugin_availability")
NODE_TYPES = ("install_agent", "upgrade_agent", "restart_agent", "reconfig_agent", "install_proxy")
PLUGIN_TYPES = ("install_plugin", "upgrade_plugin", "apply_plugin_subconfig", "restart_plugin")


def business(
    world: NodemgrWorld, biz: int, begin: int, *, every: float = 30.0, speed: float = 1.0, others: Iterable[int] = ()
) -> Iterator[int]:
    """The traffic of one business from `begin` on, a workflow every `every` seconds on average; see
    `NodemgrWorld.traffic`.

    A host is in one workflow at a time. Failed workflows are often retried, two minutes later at the earliest. Some
    workflows also have hosts of `others`.
    """
    rng = random.Random(f"{world.random.random()} {biz}")
    hosts = [
        Target(one, f"10.{one % 256}.0.{number}", one * 1000 + number)
        for one in (biz, *others)
        for number in range(1, 25)
    ]
    hosts += [Target(biz, f"10.{biz % 256}.1.{number}") for number in range(1, 5)]
    free = dict.fromkeys(hosts, 0)
    at = begin
    while True:
        at += 1 + int(rng.expovariate(speed / every) * 1000)
        yield at
        if at < world.quiet_until:
            continue
        ready = [host for host in hosts if free[host] <= at]
        some = rng.sample(ready, min(len(ready), rng.randint(1, 6)))
        if not any(host.biz == biz for host in some):
            continue
        domain: Domain = rng.choice(("node", "plugin"))
        names = ("bkmonitorbeat", "bkunifylogbeat")[: rng.randint(1, 2)] if domain == "plugin" else ("",)

        def part(host: Target, plugin: str, failing: float, domain: Domain = domain) -> Part:
            state, step = "success", "start_process" if domain == "plugin" else "sync_node_info"
            if rng.random() < failing:
                state = rng.choice(("failed", "failed", "timeout", "terminated"))
                step = rng.choice(PLUGIN_STEPS if domain == "plugin" else NODE_STEPS)
            return Part(host, state, step, int(rng.uniform(3, 90) / speed * 1000), plugin)

        failing = rng.choice((0.0, 0.0, 0.3, 1.0))
        parts = [part(host, name, failing) for host in some for name in names]
        type = rng.choice(PLUGIN_TYPES if domain == "plugin" else NODE_TYPES)
        workflow = world.start(domain, type, parts, at=at)
        while rng.random() < 0.5:
            left = {
                key: one for key, (_, one) in workflow.newest(len(workflow.tries) - 1).items() if one.state != "success"
            }
            if not left:
                break
            again = {key: part(one.target, one.plugin, 0.3) for key, one in left.items()}
            world.retry(workflow, again, at=workflow.tries[-1].finish + int(rng.uniform(120, 400) * 1000))
        free |= dict.fromkeys(some, workflow.tries[-1].finish + 1000)
