"""Hours of two businesses, watched by the daemon and restarted in the middle, against the ledger of what happened.

Among the jobs are, at random: revoked ones, ones that say SUCCESS before their task exists, ones of two steps, ones
that are retried between two polls, retries that name a host that had not failed, tasks that cannot be created or lose
their pipeline for a while, and before the baseline more jobs than one poll reads.

In every round the platform is busy, then calm; then single nodes are retried, and everything is compared at one moment
in which the platform's clock stands. Between two comparisons the daemon is stopped and started on its state.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from exporter.model import Scope
from exporter.simulator.nodeman_ledger import Collector
from exporter.simulator.nodeman_world import REMOVED, Filtered, Job, NodemanWorld, Target, Traffic, steps_of
from tests.support.daemon import BIZ, EPOCH, Metrics
from tests.support.nodeman import FAILURE, OTHER, Nodeman, nodeman, own, watched

pytestmark = pytest.mark.looptime(noop_cycles=5)

INTERVAL = 20.0
BUSY = 900.0
ROUND = 3300.0
"""Seconds: long enough for the last retry to end, and for two looks at jobs with failing hosts."""

NODE = 320.0
"""How long a retried node takes: longer than LOOK_AGAIN. What happens between two reads of a job is no run."""
LEGACY = 6
"""Tasks of 1.x, beside the one of either business that Traffic starts."""

COLLECTORS: tuple[Collector, ...] = ("nodeman_job", "nodeman_subscription", "nodeman_task")
Values = Mapping[Any, float]
"""By the values of labels."""


class Life:
    """What Traffic does not do: jobs over both businesses, removed hosts, a subscription run again and again, tasks of
    1.x, single nodes that are retried, and what the platform does oddly. `odd` counts that by kind."""

    def __init__(self, world: NodemanWorld, hosts: Mapping[int, list[Target]], seed: int) -> None:
        self.world = world
        self.hosts = hosts
        self.calm = False
        self.random = random.Random(seed)
        self.odd: Counter[str] = Counter()
        self.traffic = Traffic(world, hosts, world.now() - 3600, every=30)
        self.own = {biz: world.start_subscription("MAIN_RESTART_PLUGIN", self._outcomes(biz)) for biz in hosts}
        for biz in hosts:
            world.plan(world.now() + 100, partial(self._subscription, biz))
            world.plan(world.now() + 90, partial(self._legacy, biz))
            world.plan(world.now() + 20, partial(self._odd, biz))
        world.plan(world.now() + 30, self._both)
        # More jobs than one poll reads, newer than some whose hosts fail.
        for number in range(seed % 3 * 120):
            host = self.random.choice(self.hosts[2])
            world.plan(world.now() - 1500 + number, partial(self._success, host))

    def rest(self, calm: bool) -> None:
        self.calm = self.traffic.calm = calm

    def _outcomes(self, biz: int, job_type: str = "MAIN_RESTART_PLUGIN") -> dict[Target, str | None]:
        hosts = self.random.sample(self.hosts[biz], self.random.randint(2, 9))
        steps = [step.code for step in steps_of(job_type)]
        return {host: self.random.choice([None, None, REMOVED, *steps]) for host in hosts}

    def _again(self, seconds: float, action: Callable[[], None]) -> None:
        self.world.plan(self.world.now() + seconds, action)

    def _subscription(self, biz: int) -> None:
        # One task after the other: of two that overlap the platform shows the newer one only.
        if not self.calm and self._happens(0.15, "task that cannot be created"):
            self.world.run_task(self.own[biz], {}, err_msg="no such module")
        elif not self.calm:
            task = self.world.run_task(self.own[biz], self._outcomes(biz), duration=60, jitter=0.5, pending=15)
            if self._happens(0.2, "pipeline that is missing for a while"):
                task.tree = False
                self.world.plan(self.world.now() + 120, partial(setattr, task, "tree", True))
        self._again(150, partial(self._subscription, biz))

    def _happens(self, probability: float, what: str) -> bool:
        happens = self.random.random() < probability
        self.odd[what] += happens
        return happens

    def _odd(self, biz: int) -> None:
        if not self.calm:
            kinds = (self._late_task, self._no_task, self._two_steps, self._quick_retry, self._odd_retry, self._revoked)
            kind = self.random.choice(kinds)
            self.odd[kind.__name__] += 1
            kind(biz)
        self._again(self.random.expovariate(1 / 35), partial(self._odd, biz))

    def _success(self, host: Target) -> None:
        self.world.start_job("RESTART_AGENT", {host: None}, duration=20)

    def _late_task(self, biz: int) -> None:
        """It says SUCCESS before its task exists."""
        filtered = [Filtered(self.random.choice(self.hosts[biz]), "该主机已安装", "IGNORED")]
        job_type = "INSTALL_AGENT"
        self.world.start_job(
            job_type, self._present(biz, job_type), filtered=filtered, duration=self.random.uniform(60, 120),
            task_after=self.random.uniform(2, 45), bk_biz_scope=[biz],
        )  # fmt: skip

    def _no_task(self, biz: int) -> None:
        """It says SUCCESS and never gets a task."""
        filtered = [Filtered(self.random.choice(self.hosts[biz]), "该主机已安装", "IGNORED")]
        job = self.world.start_job("INSTALL_AGENT", {}, filtered=filtered, without_task=True)
        self._again(self.random.uniform(1, 40), partial(self.world.refresh, job))

    def _two_steps(self, biz: int) -> None:
        first, second = self.random.choice(
            [("RESTART_AGENT", "MAIN_INSTALL_PLUGIN"), ("UPGRADE_AGENT", "RESTART_AGENT")]
        )
        hosts = {**self._present(biz, first), **self._present(biz, second)}
        self.world.start_job(first, hosts, second=second, duration=self.random.uniform(20, 120), jitter=0.4)

    def _quick_retry(self, biz: int) -> None:
        """It is retried so soon that a poll may not have seen its end, and maybe once more."""
        duration = self.random.uniform(5, 60)
        job = self.world.start_job("UPGRADE_AGENT", self._present(biz, "UPGRADE_AGENT"), duration=duration)
        self._again(duration + self.random.uniform(1, 8), partial(self._retry, job))
        self._again(duration + self.random.uniform(20, 40), partial(self._retry, job))

    def _odd_retry(self, biz: int) -> None:
        """The retry names a host that had not failed."""
        duration = self.random.uniform(20, 60)
        job = self.world.start_job("UPGRADE_AGENT", self._present(biz, "UPGRADE_AGENT"), duration=duration)
        self._again(duration + self.random.uniform(30, 90), partial(self._retry, job, extra=1))

    def _retry(self, job: Job, extra: int = 0) -> None:
        targets = [record.target for record in job.subscription.latest(job.task_ids)]
        outcomes = {target: self.random.choice([None, "run_upgrade_command"]) for target in targets}
        if all(
            record.status(self.world.now()) in ("FAILED", "SUCCESS") for record in job.subscription.latest(job.task_ids)
        ):
            self.world.retry(job, outcomes, duration=self.random.uniform(5, 15), extra=extra)

    def _revoked(self, biz: int) -> None:
        duration = self.random.uniform(60, 200)
        job = self.world.start_job("INSTALL_PROXY", self._present(biz, "INSTALL_PROXY"), duration=duration, jitter=0.3)
        self._again(duration * self.random.uniform(0.2, 0.9), partial(self.world.revoke, job))

    def _present(self, biz: int, job_type: str) -> dict[Target, str | None]:
        """Outcomes without removed hosts."""
        return {
            host: None if outcome == REMOVED else outcome for host, outcome in self._outcomes(biz, job_type).items()
        }

    def _legacy(self, biz: int) -> None:
        if not self.calm and len(self.world.legacy_tasks) < 2 + LEGACY:
            codes = ("SSH_LOGIN_TIMEOUT", "WAIT_AGENT_TIMEOUT")
            hosts = {
                host: self.random.choice([None, *codes]) for host in self.random.sample(self.hosts[biz], 4) if host.ip
            }
            self.world.start_legacy_task(biz, "INSTALL_PAGENT", hosts, duration=40, queue=7)
        self._again(200, partial(self._legacy, biz))

    def _both(self) -> None:
        if not self.calm:
            job_type = self.random.choice(["UPGRADE_AGENT", "INSTALL_AGENT"])
            hosts = {host: outcome for biz in self.hosts for host, outcome in self._outcomes(biz, job_type).items()}
            self.world.start_job(job_type, hosts, duration=50, jitter=0.3)
        self._again(240, self._both)

    def retry_nodes(self, watched: Nodeman) -> int:
        """Retry single hosts that fail now, each in the job in which it failed last; how many."""
        newest: dict[Target, tuple[float, Job]] = {}
        for job in self.world.jobs.values():
            for record in job.subscription.latest(job.task_ids):
                if not record.removed:
                    end = record.runs[-1].end
                    newest[record.target] = max(newest.get(record.target, (0.0, job)), (end, job), key=lambda x: x[0])
        retried = 0
        for biz in self.hosts:
            for target in watched.ledger.hosts_failing(biz, "nodeman_job"):
                job = newest[target][1]
                if self.random.random() < 0.5:
                    codes = [record.steps[-1].code for record in job.subscription.latest(job.task_ids)]
                    self.world.retry_node(job, target, self.random.choice([None, codes[0]]), duration=NODE)
                    retried += 1
        return retried


class Comparison:
    """Holds a page to the ledger, and counts."""

    def __init__(self, watched: Nodeman, life: Life, baselines: Mapping[Scope, float]) -> None:
        self.watched = watched
        self.life = life
        self.baselines = baselines
        self.values = 0

    def all(self, metrics: Metrics) -> None:
        for scope in self.baselines:
            self.jobs(metrics, scope)
            for collector in COLLECTORS:
                self.hosts(metrics, scope, collector)
            self.gauges(metrics, scope)

    def same(self, name: str, shown: Values, truth: Values) -> None:
        shown, truth = ({key: value for key, value in values.items() if value} for values in (shown, truth))
        assert shown == {key: pytest.approx(value, abs=1e-6) for key, value in truth.items()}, name
        self.values += len(truth)

    def jobs(self, metrics: Metrics, scope: Scope) -> None:
        ledger, biz = self.watched.ledger, int(scope.bk_scope_id)
        shown = metrics.by(nodeman("jobs_finished_total"), "job_type", "status", scope=scope)
        # What the baseline itself read has ended by that, at the very moment.
        truth = ledger.jobs_finished(biz, self.baselines[scope] - 0.5)
        # A job that was revoked shows TERMINATED until the statistics task comes by, maybe before the next poll.
        for job_type in {job_type for job_type, _ in truth}:
            seen, there = shown.get((job_type, "terminated"), 0), truth.get((job_type, "terminated"), 0)
            assert seen <= there
        merged = _by_type(shown.items()), _by_type(truth.items())
        self.same("finished", *merged)
        revoked = {job_type for job_type, status in truth if status == "terminated"}
        self.same(
            "finished by status",
            {key: value for key, value in shown.items() if key[0] not in revoked},
            {key: value for key, value in truth.items() if key[0] not in revoked},
        )
        lasted: dict[str, list[int]] = {}
        for job in self.watched.nodeman.jobs.values():
            # A job that said SUCCESS before its task existed keeps the end of that.
            first = job.ends[0][0] if job.ends and not job.provisional else 0.0
            if biz in job.bk_biz_scope and first > self.baselines[scope] - 0.5:
                assert job.end_time is not None
                lasted.setdefault(job.job_type, []).append(int(job.end_time) - int(job.start_time))
        shown = metrics.by(nodeman("job_duration_seconds_count"), "job_type", scope=scope)
        self.same("durations", shown, {(job_type,): len(times) for job_type, times in lasted.items()})
        shown = metrics.by(nodeman("job_duration_seconds_sum"), "job_type", scope=scope)
        self.same("seconds", shown, {(job_type,): sum(times) for job_type, times in lasted.items()})
        unfinished = metrics.by(nodeman("jobs_unfinished"), "job_type", "status", scope=scope)
        self.same("unfinished", unfinished, ledger.jobs_unfinished(biz))
        instances = metrics.by(nodeman("job_instances"), "job_type", "status", scope=scope)
        self.same("instances", instances, ledger.job_instances(biz))

    def hosts(self, metrics: Metrics, scope: Scope, collector: Collector) -> None:
        ledger, biz = self.watched.ledger, int(scope.bk_scope_id)
        only = {self.life.own[biz].id} if collector == "nodeman_subscription" else None
        shown = metrics.by(nodeman("host_failures_total"), *FAILURE, scope=scope, collector=collector)
        # 1.x tells no host's time of end: what was there at the baseline is taken as it was.
        self.same(
            f"{collector} failures", shown, ledger.host_failures(biz, collector, self.baselines[scope], only=only)
        )
        shown = metrics.by(nodeman("hosts_failing"), *FAILURE, scope=scope, collector=collector)
        failing = ledger.hosts_failing(biz, collector, only=only)
        truth = Counter((collector, f.newest.job_type, f.newest.step, f.newest.code) for f in failing.values())
        self.same(f"{collector} failing", shown, truth)
        name = nodeman("host_failing_since_timestamp_seconds")
        # A host that failed before it had an id may be known by its id from another failure.
        shown = metrics.by(name, "bk_cloud_id", "ip", scope=scope, collector=collector)
        assert len(shown) == len(failing)
        if collector == "nodeman_task":
            return
        begun = {
            (str(target.bk_cloud_id), target.ip): float(int(found.since))
            for target, found in failing.items()
            # Of a streak that began before the baseline the platform no longer shows the beginning.
            if target.ip and found.since >= self.baselines[scope]
        }
        self.same(f"{collector} since", {key: shown.get(key, 0.0) for key in begun}, begun)

    def gauges(self, metrics: Metrics, scope: Scope) -> None:
        ledger, biz = self.watched.ledger, int(scope.bk_scope_id)
        id = self.life.own[biz].id
        shown = metrics.by(nodeman("subscription_instances"), "status", scope=scope, subscription_id=str(id))
        self.same("subscription", shown, {(status,): n for status, n in ledger.subscription_instances(id).items()})
        now = self.watched.now()
        tasks: Counter[tuple[str, ...]] = Counter()
        for task in self.watched.nodeman.legacy_tasks.values():
            if task.bk_biz_id == biz:
                for host in task.hosts:
                    status = host.status(now).lower().replace("queue", "running")
                    tasks[str(task.id), task.job_type, status] += 1
        shown = metrics.by(nodeman("task_hosts"), "job_id", "job_type", "status", scope=scope)
        self.same("tasks", shown, tasks)


def _by_type(counts: Iterable[tuple[Any, float]]) -> Values:
    merged: dict[str, float] = {}
    for (job_type, _), value in counts:
        merged[job_type] = merged.get(job_type, 0) + value
    return merged


@pytest.mark.parametrize("seed", range(2))
async def test_what_is_shown_is_what_happened(
    tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """Every count, gauge and failing host of all three collectors equals the ledger's, over restarts of the daemon."""
    for name, value in (await compare(tmp_path, seed, rounds=1)).items():
        record_property(name, value)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(2, 12))
async def test_truth_soak(tmp_path: Path, seed: int, record_property: Callable[[str, object], None]) -> None:
    """The same for other seeds and twice as long: more than 2,000 jobs in all."""
    for name, value in (await compare(tmp_path, seed, rounds=2)).items():
        record_property(name, value)


async def compare(tmp_path: Path, seed: int, *, rounds: int) -> dict[str, int]:
    """Some rounds of a life against the ledger: how many values were equal, how many jobs there were and of which odd
    kinds, how many nodes were retried."""
    collectors: dict[str, Any] = {
        "job": {"interval": f"{INTERVAL:.0f}s"},
        "subscription": {"interval": f"{INTERVAL:.0f}s", "subscription_ids": [11, 12]},
        "task": {"interval": "20s", "job_ids": list(range(181, 183 + LEGACY))},
    }
    async with watched(tmp_path, scopes=(BIZ, OTHER), seed=seed, **collectors) as daemon:
        hosts = {biz: _hosts(biz) for biz in (2, 3)}
        life = Life(daemon.nodeman, hosts, seed)
        assert sorted(one.id for one in life.own.values()) == [11, 12]
        daemon.nodeman.advance()
        daemon.frozen = EPOCH
        await daemon.start()
        await daemon.poll()
        baselines = dict.fromkeys((BIZ, OTHER), EPOCH)
        daemon.frozen = None
        comparison = Comparison(daemon, life, baselines)
        nodes = 0
        for number in range(1, rounds + 1):
            begun = (number - 1) * ROUND
            life.rest(False)
            await daemon.sleep_until(begun + BUSY / 3)
            await daemon.restart()
            await daemon.sleep_until(begun + BUSY / 2)
            await daemon.restart(down=25)
            await daemon.sleep_until(begun + BUSY)
            life.rest(True)
            await daemon.sleep_until(begun + ROUND - 900)
            nodes += life.retry_nodes(daemon)
            metrics = await daemon.poll_at(begun + ROUND - 20)
            comparison.all(metrics)
        jobs = sum(job.start_time > EPOCH for job in daemon.nodeman.jobs.values())
        assert comparison.values > 75 * rounds
        assert jobs > 75 * rounds
        assert len(life.odd) >= 6
        assert all(not own(metrics, "truncated_total", scope=scope) for scope in baselines)
        return {"values": comparison.values, "jobs": jobs, "nodes": nodes, **life.odd}


def _hosts(biz: int) -> list[Target]:
    return [Target(biz, f"10.{biz}.0.{number}", biz * 1000 + number) for number in range(1, 31)]
