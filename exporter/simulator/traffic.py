"""Random traffic in JOB.

Every scope gets hosts, plans on a schedule, ad-hoc scripts and file distributions of people. Some plans fail on
certain hosts until somebody repairs them, hosts lose their agent for some time, failed executions are retried now and
then, some executions wait for an approval, a few are aborted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exporter.model import Scope
from exporter.simulator.world import NO_DEVIATION, Deviation, JobWorld, Outcome, StepScript, Target, target

HOSTS = 24
AGENT_ABNORMAL, GSE_AGENT_ABNORMAL, AGENT_MISSING = 1, 310, 18
SCRIPT_FAILURES: Sequence[tuple[Outcome, int]] = (
    ((104, 1), 5), ((104, 127), 3), ((104, 2), 2), ((104, 255), 1), ((104, -1073741510), 1),
    ((102, None), 2), ((103, 137), 1),
)  # fmt: skip
"""(result of a host, weight)."""
FILE_FAILURES: Sequence[tuple[Outcome, int]] = ((203, 4), (202, 2), (303, 1), (321, 1), (329, 1))


@dataclass
class Outage:
    """A host that fails everything with one code until `until` (ms)."""

    code: int
    until: int


class Business:
    """The traffic of one scope."""

    def __init__(self, world: JobWorld, scope: Scope) -> None:
        self.world = world
        self.scope = scope
        self.random = random.Random(f"{world.seed} {scope}")
        base = self.random.randrange(1, 60_000)
        self.hosts = [target(base + index, 0 if index % 6 else 5) for index in range(HOSTS)]
        number = 100 + base + HOSTS
        self.hosts += [Target(number, None, 7, "fd00:0:0:0:0:0:0:3"), Target(number + 1, None, 7)]
        self.container = Target(self.hosts[0].bk_host_id, container=number)
        self.outages: dict[Target, Outage] = {}
        self.broken: dict[tuple[str, Target], Outcome] = {}
        """(plan or kind of run, host) that fails until it is repaired."""
        for host in self.hosts[-8 : -7 + self.random.randrange(2)]:
            self.broken["disk-check", host] = (104, 28)
        self.plan_ids = {
            name: 1_000_100 + index
            for index, name in enumerate(("nightly-backup", "health-check", "release", "disk-check"))
        }

    def live(self, since: int) -> None:
        """Start the activities at `since` (ms). Each activity schedules itself again."""
        self.every(60, self.health_check, since)
        self.every(60, self.disk_check, since)
        self.every(240, self.nightly_backup, since)
        self.every(180, self.release, since)
        self.every(25, self.ad_hoc_script, since)
        self.every(70, self.ad_hoc_file, since)
        self.every(400, self.burst, since)
        self.every(600, self.lose_an_agent, since)
        self.every(300, self.break_something, since)

    def every(self, seconds: float, activity: Callable[[], None], since: int) -> None:
        """Repeat an activity at random times, with this average interval."""

        def happen() -> None:
            if self.world.flowing:
                self.every(seconds, activity, self.world.time)
                activity()

        self.world.at(since + 1 + int(self.random.expovariate(self.world.speed / seconds) * 1000), happen)

    def seconds(self, low: float, high: float) -> float:
        return self.random.uniform(low, high) / self.world.speed

    # What people and schedules do

    def health_check(self) -> None:
        hosts = self.hosts[: HOSTS // 2]
        self.run("health-check", 0, 3, [self.script("check", hosts, "health-check", 2, 8)])

    def disk_check(self) -> None:
        """A plan that nobody repairs: one host, in some businesses two, always fails."""
        self.run("disk-check", 0, 3, [self.script("df", self.hosts[-8:-2], "disk-check", 1, 5)])

    def nightly_backup(self) -> None:
        hosts = self.hosts[HOSTS // 3 :]
        steps = [
            self.script("dump", hosts, "nightly-backup", 5, 40),
            self.script("copy", hosts[:6], "nightly-backup copy", 3, 20, step_type=2),
        ]
        self.run("nightly-backup", 0, 3, steps)

    def release(self) -> None:
        approval = StepScript(
            3, self.seconds(20, 400), name="approve", status=13 if self.random.random() < 0.1 else None
        )
        hosts = self.random.sample(self.hosts, 8)
        rollout = self.script("rollout", hosts, "release", 20, 90, rolling_wait=self.seconds(5, 60))
        self.run("release", 0, 1, [approval, rollout])

    def ad_hoc_script(self) -> None:
        name = self.random.choice(("restart-app", "clean-logs", "查看磁盘", "patch kernel"))
        hosts = self.random.sample(self.hosts, self.random.randint(1, 8))
        chance = self.random.random()
        if chance < 0.02:
            self.run(name, 1, 2, [StepScript(results={self.container: (104, 1), hosts[0]: 9}, duration=1, name=name)])
        elif chance < 0.03:
            self.run(name, 1, 2, [self.script(name, hosts, name, 1, 2)], outcome=14)
        else:
            self.run(name, 1, self.random.choice((1, 2, 2)), [self.script(name, hosts, name, 1, 60)])

    def ad_hoc_file(self) -> None:
        hosts = self.random.sample(self.hosts, self.random.randint(1, 12))
        self.run(
            "push-config",
            2,
            self.random.choice((1, 2)),
            [self.script("push", hosts, "push-config", 2, 30, step_type=2)],
        )

    def burst(self) -> None:
        """A program starts many executions in the same millisecond, so that their order in the list is not fixed."""
        for host in self.random.sample(self.hosts, 4):
            self.run("collect-inventory", 1, 2, [self.script("collect", [host], "collect-inventory", 1, 20)])

    def lose_an_agent(self) -> None:
        host = self.random.choice(self.hosts)
        code = self.random.choice((AGENT_ABNORMAL, AGENT_ABNORMAL, GSE_AGENT_ABNORMAL, AGENT_MISSING))
        self.outages[host] = Outage(code, self.world.time + int(self.seconds(60, 600) * 1000))

    def break_something(self) -> None:
        """Runs of one kind fail on a host, for some time."""
        kinds = ("health-check", "nightly-backup", "restart-app", "push-config", "nightly-backup copy")
        kind, host = self.random.choice(kinds), self.random.choice(self.hosts)
        failures = FILE_FAILURES if kind in ("push-config", "nightly-backup copy") else SCRIPT_FAILURES
        outcomes, weights = zip(*failures, strict=True)
        self.broken[kind, host] = self.random.choices(outcomes, weights)[0]

        def repair() -> None:
            self.broken.pop((kind, host), None)

        self.world.at(self.world.time + int(self.seconds(60, 900) * 1000), repair)

    # How it goes

    def outcome(self, kind: str, host: Target) -> Outcome:
        outage = self.outages.get(host)
        if outage is not None and outage.until > self.world.time:
            return outage.code
        return self.broken.get((kind, host), 9)

    def script(
        self, name: str, hosts: Sequence[Target], kind: str, low: float, high: float,
        *, step_type: int = 1, rolling_wait: float | None = None,
    ) -> StepScript:  # fmt: skip
        results = {host: self.outcome(kind, host) for host in hosts}
        return StepScript(step_type, self.seconds(low, high), results, name, rolling_wait=rolling_wait)

    def run(
        self, name: str, task_type: int, launch_mode: int, steps: Sequence[StepScript], *, outcome: int | None = None
    ) -> None:
        number = self.start(name, task_type, launch_mode, steps, outcome=outcome)
        length = sum(step.duration + (step.rolling_wait or 0) for step in steps)
        if self.random.random() < 0.03:
            self.soon(length / 2, lambda: self.abort(number))
        elif (
            any(code not in (9, 3) for step in steps for code in step.results.values()) and self.random.random() < 0.15
        ):
            self.soon(length + self.seconds(20, 180), lambda: self.retry(number))

    def start(
        self,
        name: str,
        task_type: int,
        launch_mode: int,
        steps: Sequence[StepScript],
        *,
        outcome: int | None = None,
        deviation: Deviation = NO_DEVIATION,
        reused_id: int | None = None,
    ) -> int:
        # Now and then a row is committed later than others that were created after it.
        late = int(self.random.uniform(0, 1500)) if self.random.random() < 0.02 else 0
        return self.world.start(
            self.scope, name=name, operator=self.random.choice(("admin", "ops01", "ops02")), task_type=task_type,
            launch_mode=launch_mode, plan_id=self.plan_ids.get(name), steps=steps, outcome=outcome,
            pending_for=self.seconds(0, 2),
            visible_from=self.world.time + late, deviation=deviation, reused_id=reused_id,
        )  # fmt: skip

    def soon(self, seconds: float, event: Callable[[], None]) -> None:
        self.world.at(self.world.time + int(seconds * 1000), event)

    def abort(self, number: int) -> None:
        row = self.world.find(self.scope, number)
        if row is not None and row.end_time is None:
            self.world.stop(number, after=self.seconds(1, 5))

    def retry(self, number: int) -> None:
        row = self.world.find(self.scope, number)
        if row is None or row.status != 4:
            return
        step = next(step for step in row.steps if step.status == 4)
        results = {result.target: self.outcome(row.name, result.target) for result in step.results}
        self.world.retry(number, duration=self.seconds(2, 20), results=results)


class UnusualBusiness(Business):
    """Traffic on a platform with all known deviations.

    `patient` and `long` are seconds that the exporter under test needs, whatever the speed of the world: for some
    polls, and until its list window no longer contains an execution.
    """

    def __init__(self, world: JobWorld, scope: Scope, *, patient: float, long: float) -> None:
        super().__init__(world, scope)
        self.patient = patient
        self.long = long
        self.plain: list[int] = []
        """The newest executions without an deviation, which nobody retries."""

    def run(
        self, name: str, task_type: int, launch_mode: int, steps: Sequence[StepScript], *, outcome: int | None = None
    ) -> None:
        steps = [self.without_some_ids(step) for step in steps]
        length = sum(step.duration + (step.rolling_wait or 0) for step in steps)
        failed = any(code not in (9, 3) for step in steps for code in step.results.values())
        start = functools.partial(self.start, name, task_type, launch_mode)
        chance = self.random.random()
        if chance < 0.03:
            start(steps, outcome=outcome, deviation=Deviation(status_refused="for good"))
        elif chance < 0.04:
            start(steps, outcome=outcome, deviation=Deviation(status_refused="for now"))
        elif chance < 0.055:
            # It runs until nobody lists it by its creation any more.
            slow = dataclasses.replace(steps[0], duration=self.long * self.random.uniform(1.5, 4))
            start([slow, *steps[1:]], outcome=outcome, deviation=Deviation(look_up_refused=True))
        elif chance < 0.09:
            start(steps, outcome=outcome, deviation=self.unusual_times())
        elif chance < 0.13:
            # It ends before its last step does; only very few never settle.
            late = math.inf if chance < 0.094 else self.random.uniform(1, self.patient / 4)
            start([*steps[:-1], dataclasses.replace(steps[-1], settles_late=late)], outcome=outcome)
        elif chance < 0.16 and len(self.plain) > 50:
            start(steps, outcome=outcome, reused_id=self.plain.pop(self.random.randrange(len(self.plain) - 20)))
        elif chance < 0.20:
            number = start(steps)
            self.soon(length / 2, lambda: self.abort(number))
            self.soon(length + self.long * self.random.uniform(1.1, 1.6), lambda: self.resume(number))
        elif failed and chance < 0.24:
            number = start(steps, outcome=outcome)
            self.soon(length + self.patient, lambda: self.ignore(number))
        else:
            number = start(steps, outcome=outcome)
            if failed and self.random.random() < 0.2:
                self.soon(length + self.patient + self.seconds(20, 180), lambda: self.retry(number))
            else:
                self.plain = [*self.plain[-200:], number]

    def without_some_ids(self, step: StepScript) -> StepScript:
        """The same step, with some of its hosts shown without their ids."""
        results = {
            dataclasses.replace(host, bk_host_id=None) if host.ip and self.random.random() < 0.1 else host: outcome
            for host, outcome in step.results.items()
        }
        return dataclasses.replace(step, results=results)

    def unusual_times(self) -> Deviation:
        day = 86_400.0
        return self.random.choice(
            (
                Deviation(start_time=0),
                Deviation(start_time=self.world.time - int(400 * day * 1000)),
                Deviation(start_time=self.world.time + int(400 * day * 1000)),
                Deviation(start_time=self.world.time + (200 * 1000)),
                Deviation(end_time_late=self.patient / 4),
                Deviation(end_time_late=self.patient / 4, zero_end=True),
                Deviation(end_time_ahead=400 * day),
            )
        )

    def resume(self, number: int) -> None:
        """Run an execution again that was stopped or refused."""
        row = self.world.find(self.scope, number)
        if row is not None and row.status in (11, 13):
            self.world.retry(number, duration=self.patient / 4)

    def ignore(self, number: int) -> None:
        """Change the status to ignored_error and keep the end."""
        row = self.world.find(self.scope, number)
        if row is not None and row.status == 4:
            self.world.set_status(number, 6, end_time=row.end_time)


def populate(world: JobWorld, *, history: float) -> None:
    """Start traffic in every scope of the world, `history` seconds of it in the past."""
    since = world.time - int(history * 1000)
    for scope in world.scopes:
        Business(world, scope).live(since)
