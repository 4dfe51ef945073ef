"""The daemon beside a simulated NodeMan V3, over real HTTP on loopback, in virtual time; see daemon.py."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from exporter.model import Scope
from exporter.simulator import nodemgr_api
from exporter.simulator.nodemgr_world import NodemgrWorld, Part, Target, Truth, Workflow
from tests.support.daemon import BIZ, Daemon, Metrics
from tests.support.nodeman import Change, listening

HOSTS = [Target(2, f"10.2.0.{number}", number) for number in range(1, 21)]
FOREIGN = [Target(3, f"10.3.0.{number}", 300 + number) for number in range(1, 6)]
FAILURE = ("job_type", "step", "code")


class Nodemgr(Daemon):
    """A simulated NodeMan V3 and the exporter that watches it."""

    @property
    def v3(self) -> NodemgrWorld:
        return nodemgr_api.world_of(self.platform)

    def configure_v3(self, url: str, nodemgr: dict[str, Any] | None = None, **top: Any) -> None:
        """Write the configuration. `nodemgr`: keys of the collector."""
        self._settings = {
            "server": {"listen_address": ["127.0.0.1:0"]},
            "blueking": {
                "nodemgr": {"url": f"{url}/api/bk-nodemgr/prod", "web_url": "https://nodemgr.example.com"},
                "auth": {"app_code": "blueking-exporter", "app_secret": "simulated", "username": "admin"},
                "requests_per_second": 1000,
            },
            "collectors": {
                "job": {"enabled": False},
                "nodemgr": {"enabled": True, "interval": "30s", **(nodemgr or {})},
            },
            "counter_birth_hold": "0s",
            "scopes": [
                {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}
                for scope in self.platform.scopes
            ],
            **top,
        }
        self.file.write_text(yaml.safe_dump(self._settings), encoding="utf-8")

    def run(self, *ends: tuple[Target, str], takes: float = 5, step: str = "wait_gse_ready", **given: Any) -> Workflow:
        """A node workflow that starts now: a host and how its operation ends, each after so many seconds."""
        parts = [Part(host, state, step, int(takes * 1000)) for host, state in ends]
        return self.v3.start("node", given.pop("type", "install_agent"), parts, **given)

    def again(self, workflow: Workflow, *ends: str, takes: float = 5, step: str = "wait_gse_ready") -> None:
        """Retry the first operations of a workflow now, with these ends; "" leaves one out."""
        before = workflow.newest(len(workflow.tries) - 1)
        parts = {
            number: Part(before[number][1].target, state, step, int(takes * 1000))
            for number, state in enumerate(ends)
            if state
        }
        self.v3.retry(workflow, parts)

    def asked(self, since: float = 0.0) -> Counter[str]:
        return Counter(call.api for call in self.calls(since))


def finished(metrics: Metrics, scope: Scope = BIZ) -> dict[tuple[str, ...], float]:
    name = "blueking_nodemgr_workflows_finished_total"
    return metrics.by(name, "domain", "workflow_type", "status", scope=scope)


def reopened(metrics: Metrics, scope: Scope = BIZ) -> dict[tuple[str, ...], float]:
    return metrics.by("blueking_nodemgr_workflows_reopened_total", "domain", scope=scope)


def unfinished(metrics: Metrics, scope: Scope = BIZ) -> dict[tuple[str, ...], float]:
    """Without the label sets that stay at 0."""
    shown = metrics.by("blueking_nodemgr_workflows_unfinished", "domain", "workflow_type", scope=scope)
    return {labels: value for labels, value in shown.items() if value}


def failures(metrics: Metrics, scope: Scope = BIZ) -> dict[tuple[str, ...], float]:
    return metrics.by("blueking_nodeman_host_failures_total", *FAILURE, scope=scope, collector="nodemgr")


def failing(metrics: Metrics, scope: Scope = BIZ) -> dict[tuple[str, ...], float]:
    """Without the label sets that stay at 0."""
    shown = metrics.by("blueking_nodeman_hosts_failing", *FAILURE, scope=scope, collector="nodemgr")
    return {labels: value for labels, value in shown.items() if value}


def own(metrics: Metrics, name: str, *, scope: Scope = BIZ, **labels: str) -> float:
    """The exporter's own metric about the collector; 0 if it is absent."""
    full = f"blueking_exporter_collector_{name}"
    return metrics.get(full, collector="nodemgr", scope=scope, **labels) or 0.0


def differences(metrics: Metrics, truth: Truth, scope: Scope = BIZ) -> list[str]:
    """Where the page and the truth differ; of counters, gauges and the number of durations."""
    durations = metrics.by("blueking_nodemgr_workflow_duration_seconds_count", "domain", "workflow_type", scope=scope)
    pairs: dict[str, tuple[dict[Any, float], Counter[Any]]] = {
        "finished": (finished(metrics, scope), truth.finished),
        "reopened": ({labels[0]: value for labels, value in reopened(metrics, scope).items()}, truth.reopened),
        "durations": (durations, truth.durations),
        "unfinished": (unfinished(metrics, scope), truth.unfinished),
        "failures": (failures(metrics, scope), truth.failures),
        "failing": (failing(metrics, scope), Counter(truth.failing.values())),
    }
    return [
        f"{name} {labels}: {shown.get(labels, 0)} instead of {true.get(labels, 0)}"
        for name, (shown, true) in pairs.items()
        for labels in {**shown, **true}
        if shown.get(labels, 0) != true.get(labels, 0)
    ]


@contextlib.asynccontextmanager
async def watched(
    directory: Path,
    *,
    scopes: Sequence[Scope] = (BIZ,),
    seed: int = 1,
    nodemgr: dict[str, Any] | None = None,
    change: Change | None = None,
    **top: Any,
) -> AsyncIterator[Nodemgr]:
    """A platform that listens and a configured exporter that has not been started. Its clock ticks in seconds.

    `change`: what happens to every answer on its way.
    """
    one = Nodemgr(directory, scopes=scopes, tick=1.0, seed=seed)
    async with listening(one, change) as url:
        one.configure_v3(url, nodemgr, **top)
        yield one
