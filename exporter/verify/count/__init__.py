"""The plain count: what a collector must have counted, by what the platform shows when it is read once more.

Nothing here knows how a collector folds its polls. Of a run that was retried only the newest can be read again: earlier
ones are taken as the polls saw them. What ended before the first poll was never to be counted.

base        what all counts share        hosts     which hosts fail, from all results
job, nodeman, nodemgr                    the count of each API
"""

from __future__ import annotations

from exporter.clock import Clock
from exporter.collectors.base import Platforms
from exporter.config.schema import ScopeConfig
from exporter.verify.count.base import Reader, Recount
from exporter.verify.count.job import JobRecount
from exporter.verify.count.nodeman import NodemanJobRecount, SubscriptionRecount, TaskRecount
from exporter.verify.count.nodemgr import NodemgrRecount


def recount(collector: str, one: ScopeConfig, apis: Platforms, reader: Reader, clock: Clock) -> Recount | None:
    """The plain count for a collector of this scope, None for one that has none."""
    if collector == "job" and apis.job:
        return JobRecount(one, apis.job, reader, clock)
    if collector == "nodeman_job" and apis.nodeman:
        return NodemanJobRecount(one, apis.nodeman, reader, clock)
    if collector == "nodeman_subscription" and apis.nodeman:
        return SubscriptionRecount(one, apis.nodeman, reader, clock)
    if collector == "nodeman_task" and apis.nodeman_legacy:
        return TaskRecount(one, apis.nodeman_legacy, reader, clock)
    if collector == "nodemgr" and apis.nodemgr:
        return NodemgrRecount(one, apis.nodemgr, reader, clock)
    return None
