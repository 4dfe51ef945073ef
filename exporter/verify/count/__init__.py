"""The plain count: what a collector must have counted, by what the platform shows when it is read once more.

Nothing here knows how a collector folds its polls. Of a run that was retried only the newest can be read again: earlier
ones are taken as the polls saw them. What ended before the first poll was never to be counted.

base        what all counts share        hosts     which hosts fail, from all results
job, nodeman, nodemgr                    the count of each API
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.verify.count.base import Recount
from exporter.verify.count.job import JobRecount
from exporter.verify.count.nodeman import NodemanJobRecount, SubscriptionRecount, TaskRecount
from exporter.verify.count.nodemgr import NodemgrRecount

RECOUNTS: Mapping[str, type[Recount[Any, Any]]] = {
    "job": JobRecount,
    "nodeman_job": NodemanJobRecount,
    "nodeman_subscription": SubscriptionRecount,
    "nodeman_task": TaskRecount,
    "nodemgr": NodemgrRecount,
}
"""The plain count of each collector."""
