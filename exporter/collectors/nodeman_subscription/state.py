"""The state of the NodeMan subscription collector, the records of a poll, and what a row means. Times: unix seconds."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from exporter.blueking.nodeman_subscriptions import Instance
from exporter.collectors.base import FailedCall
from exporter.collectors.nodeman import NodemanState, known_end
from exporter.model import NODEMAN_UNFINISHED

NAME = "nodeman_subscription"
CHECK_AGAIN = 300.0
"""Seconds after which the failed instances are read again although no counter has moved: one may have failed anew. More
of them than fit on a page are read less often."""

Run = tuple[int, float]
"""Record and finish of an instance's run: retrying a node keeps the record and its start."""


class Subscription(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of a subscription. `born`: when it was first asked for, a run that ended before is not counted;
    `last_checked`: when all failed instances were last read, 0 before it has answered; `newest`: the newest record.
    `runs`: the newest finished run of the failed instances, and of the others that were read last; `failed`: whose
    run has failed. `action`: of any instance, for those that have no steps. `unread`: only the counter could be had."""

    counter: dict[str, int] = {}
    born: float = 0.0
    last_checked: float = 0.0
    newest: int = 0
    runs: dict[str, Run] = {}
    failed: frozenset[str] = frozenset()
    last_finished: float | None = None
    action: str = ""
    unread: bool = False


class SubscriptionState(NodemanState, frozen=True, kw_only=True):
    """By subscription id."""

    subscriptions: dict[int, Subscription]


class Answer(msgspec.Struct, frozen=True):
    """What one subscription answered. `newest`: the newest record. `instances`: rows that are news, with their steps
    where they show a run that is not known; `complete`: all failed ones are among them, so that one that is not no
    longer exists; `renewed`: so are the newest ones. `still_running`: instances that were listed as failed and say that
    they run. `failure`: why only the counter could be had, or another task than the newest one was read."""

    counter: dict[str, int]
    newest: int
    instances: tuple[Instance, ...] = ()
    complete: bool = False
    renewed: bool = False
    still_running: frozenset[str] = frozenset()
    unread: bool = False
    failure: FailedCall | None = None


class SubscriptionRecords(msgspec.Struct, frozen=True):
    """What one poll, begun at `watermark`, brought by subscription id; `errors` of those that are missing in it."""

    now: float
    watermark: float
    answers: dict[int, Answer]
    errors: tuple[FailedCall, ...]

    @property
    def size(self) -> int:
        """See `Records`."""
        return sum(len(answer.instances) for answer in self.answers.values())


def run_of(row: Instance, now: float) -> Run | None:
    """The run that a row shows, None while it has not ended."""
    if row.status not in ("failed", "success"):
        return None
    return row.record_id or 0, known_end(row.finish_time, now) or row.start_time or 0.0


def is_moving(counter: Mapping[str, int]) -> bool:
    return any(count and status in NODEMAN_UNFINISHED for status, count in counter.items())
