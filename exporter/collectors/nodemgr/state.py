"""What is known of V3 workflows, what a poll brings, and what a row means after what is known.

Times of workflows and operations are ms since the epoch as the platform gives them, all others unix seconds.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar

import msgspec

from exporter.blueking.nodemgr import Domain, HostOperation, Workflow
from exporter.clock import DOUBTED
from exporter.collectors.nodeman import NodemanState, RunRecords
from exporter.model import UNKNOWN

NAME = "nodemgr"

FAILED_STATES = ("failed", "timeout", "terminated")
UNFINISHED_STATES = ("init", "launched", "running")
STATES = frozenset({*FAILED_STATES, *UNFINISHED_STATES, "success"})
STATUSES = frozenset({"running", "success", "failed", "partial_failed"})


def key_of(domain: Domain, workflow_id: str) -> str:
    """What a workflow is kept under: nodes and plugins have collections of their own on the platform."""
    return f"{domain}/{workflow_id}"


def parts_of(key: str) -> tuple[Domain, str]:
    """Domain and id of a workflow; see `key_of`."""
    domain, _, workflow_id = key.partition("/")
    return ("plugin" if domain == "plugin" else "node"), workflow_id


class Tracked(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of one workflow.

    `finish_time`: of its newest end that was counted, or that a baseline found. `counted`: that end is its present one.
    `reopened`: it has run again since that end, which was counted. `timed`: it has had its first end. `waits`: how many
    polls found it ended while operations still ran. `unread`: its hosts are still to be read, although it is counted.
    `taken`: failed operations with their instances, as `fingerprint`s. `new`: it was first seen after the baseline.
    `lost`: it was given up, and is kept as counted while it can still be listed.
    """

    type: str
    status: str
    operate_time: int
    finish_time: int | None
    counted: bool
    reopened: bool = False
    timed: bool = False
    waits: int = 0
    unread: bool = False
    taken: frozenset[int] = frozenset()
    new: bool = False
    lost: bool = False

    @property
    def failed(self) -> bool:
        """Whether its newest end was a failure, from which it may be retried."""
        return self.counted and self.status != "success" and not self.lost


class NodemgrState(NodemanState, frozen=True, kw_only=True):
    """`begin`: what began before it has been seen, and is forgotten unless it may still change; ms. `born`: when the
    baseline was made; ms. `workflows` by `key_of`."""

    TIMES: ClassVar[frozenset[str]] = NodemanState.TIMES | {"begin"}

    begin: int
    born: int
    workflows: dict[str, Tracked]


class NodemgrRecords(RunRecords[str, Workflow, HostOperation]):
    """By `key_of`. `begin` and `now` in ms, `gap` in seconds."""

    begin: int = 0
    now: int = 0
    gap: float = 0.0
    more: bool = False


def fingerprint(operation: HostOperation) -> int:
    """64 bits that stand for an operation and its newest instance."""
    name = f"{operation.id} {operation.instance}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())


def status_label(status: str) -> str:
    return status if status in STATUSES else UNKNOWN


def state_label(state: str) -> str:
    return state if state in STATES else UNKNOWN


def has_ended(row: Workflow) -> bool:
    """Whether a workflow has ended; one with an unknown status has, as soon as it has a finish time."""
    return row.finish_time is not None if row.status not in STATUSES else row.status != "running"


def is_running(operation: HostOperation) -> bool:
    """Whether an operation has not ended."""
    return operation.end is None if operation.state not in STATES else operation.state in UNFINISHED_STATES


def is_new_end(known: Tracked | None, row: Workflow) -> bool:
    """Whether `row` shows an end that has not been counted.

    A finish time that was missing at first belongs to the same end. Right after a retry the platform may show the end
    of the try before for a moment.
    """
    if not has_ended(row):
        return False
    if known is None:
        return True
    if known.finish_time is not None and row.finish_time == known.finish_time:
        return not (known.counted or known.reopened)
    return not known.counted or (row.finish_time is not None and known.finish_time is not None)


def known_times(row: Workflow, now: int) -> Workflow:
    """The row without a finish time in a future that the platform cannot know of."""
    if row.finish_time is None or row.finish_time <= now + round(DOUBTED * 1000):
        return row
    return msgspec.structs.replace(row, finish_time=None)
