"""What happened on two simulated platforms while an older build watched them and left its state.

`tests/state/782d593.db` and the pages beside it were made by this file in a worktree of commit 782d593, the last one
before states, collectors and tests were rearranged. FOLDER/state.db is the state:

    git worktree add /tmp/base 782d593
    PYTHONPATH=/tmp/base:. python tests/support/history.py FOLDER

Times are seconds of virtual time. The exporter ran from BEGIN to END; what comes later is for the build that continues.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.model import Scope
from exporter.simulator.nodeman_world import NodemanWorld
from exporter.simulator.nodeman_world import Target as NodemanTarget
from exporter.simulator.world import JobWorld, StepScript, target

SCOPE = Scope("biz", "2")
BEGIN, END, LATER = 60.0, 600.0, 4800.0
HOSTS = [NodemanTarget(2, f"10.2.0.{number}", number) for number in range(1, 9)]

JOB: dict[str, Any] = {"interval": "30s", "watch": [{"name": "nightly-*", "as": "nightly", "max_age": "26h"}]}
NODEMAN: dict[str, Any] = {
    "job": {"interval": "30s"},
    "subscription": {"interval": "30s", "subscription_ids": [11]},
    "task": {"interval": "30s", "job_ids": [181]},
}


def plan_job(world: JobWorld) -> None:
    """Executions of JOB: ended before the baseline, failed, retried, stopped, still running at END, ended later."""
    start = world.time

    def at(seconds: float, event: Callable[[], object]) -> None:
        world.at(start + round(seconds * 1000), lambda: (event(), None)[1])

    def run(name: str, task_type: int, duration: float, results: dict[int, Any], **more: Any) -> int:
        steps = [StepScript(2 if task_type == 2 else 1, duration, {target(n): r for n, r in results.items()})]
        return world.start(SCOPE, name=name, task_type=task_type, steps=steps, **more)

    ids: dict[str, int] = {}
    for number in range(3):
        run("before", 1, 5.0, {number + 1: 9})
    run("before-failed", 0, 5.0, {9: (104, 1)}, plan_id=77)
    run("long-before", 1, 3000.0, {1: 9})
    at(100, lambda: run("nightly-backup", 0, 10.0, {1: (104, 3), 2: 310, 3: 9}, plan_id=1001, launch_mode=3))
    at(160, lambda: ids.update(retried=run("restart-app", 1, 4.0, {4: (104, 127), 5: 9})))
    at(220, lambda: run("push-config", 2, 8.0, {6: 9, 7: 303}, launch_mode=1))
    at(230, lambda: run("push-config", 2, 8.0, {6: 9}, launch_mode=1))
    at(260, lambda: run("nightly-backup", 0, 10.0, {1: (104, 3), 2: 9, 3: 9}, plan_id=1001, launch_mode=3))
    at(300, lambda: run("long", 1, 4000.0, {8: (104, 9)}))
    at(330, lambda: ids.update(stopped=run("stopped", 1, 500.0, {5: 9})))
    at(360, lambda: world.stop(ids["stopped"]))
    at(400, lambda: world.retry(ids["retried"], duration=3.0, results={target(4): (104, 126)}))
    at(END + 200, lambda: run("nightly-backup", 0, 10.0, {1: 9, 2: 9, 3: 9}, plan_id=1001, launch_mode=3))
    at(END + 300, lambda: world.retry(ids["retried"], duration=3.0))
    at(END + 400, lambda: run("restart-app", 1, 4.0, {5: 101}))


def plan_nodeman(world: NodemanWorld) -> None:
    """Jobs, a subscription and a task of 1.x: ended before the baseline, failed, retried, running at END."""
    start = world.now()
    jobs: dict[str, Any] = {}

    def failing(job_type: str, count: int, step: str | None, duration: float) -> Any:
        return world.start_job(job_type, dict.fromkeys(HOSTS[:count], step), duration=duration)

    subscription = world.start_subscription("MAIN_RESTART_PLUGIN", {HOSTS[0]: None, HOSTS[1]: None}, duration=20)
    outcomes = {HOSTS[2]: "SSH_LOGIN_TIMEOUT", HOSTS[3]: None}
    world.start_legacy_task(2, "INSTALL_PAGENT", outcomes, duration=200, queue=7)
    failing("INSTALL_AGENT", 1, None, 20)
    world.plan(start + 100, lambda: jobs.update(done=failing("UPGRADE_AGENT", 3, None, 40)))
    world.plan(start + 200, lambda: jobs.update(retried=failing("INSTALL_AGENT", 2, "install", 40)))
    hosts = {HOSTS[0]: "gse_operate_proc", HOSTS[1]: None}
    world.plan(start + 250, lambda: jobs.update(task=world.run_task(subscription, hosts, duration=30)))
    world.plan(start + 400, lambda: jobs.update(long=failing("INSTALL_AGENT", 4, None, 2500)))
    world.plan(start + END + 300, lambda: jobs.update(again=world.retry(jobs["retried"], duration=60)))
    world.plan(start + END + 500, lambda: jobs.update(more=failing("UPGRADE_AGENT", 1, "push_upgrade_package", 40)))


async def record(kind: str, folder: Path) -> None:
    """Let the build in `sys.path` watch a history, and keep its last page beside its state."""
    if kind == "job":
        watching = importlib.import_module("tests.daemon").daemon(folder, scopes=(SCOPE,), job=JOB)
    else:
        watching = importlib.import_module("tests.nodeman").watched(folder, scopes=(SCOPE,), **NODEMAN)
    async with watching as exporter:
        plan_job(exporter.world) if kind == "job" else plan_nodeman(exporter.nodeman)
        await asyncio.sleep(BEGIN)
        await exporter.start()
        await asyncio.sleep(END - exporter.loop.time())
        page = await exporter.metrics(openmetrics=True)
        (folder / f"782d593-{kind}.txt").write_text(page.text)


if __name__ == "__main__":
    import looptime

    for kind in ("job", "nodeman"):
        looptime.new_event_loop(start=0.0).run_until_complete(record(kind, Path(sys.argv[1])))
