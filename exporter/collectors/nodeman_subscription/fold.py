"""How the records of a poll become counts: the fold of the NodeMan subscription collector. Times are unix seconds."""

from __future__ import annotations

import msgspec

from exporter.blueking.nodeman_subscriptions import Instance
from exporter.collectors.base import TRUNCATED, Observed
from exporter.collectors.failing_hosts import HostResult
from exporter.collectors.nodeman import FUTURE, NodemanFold, ended, is_after_baseline, is_ours, known_end
from exporter.collectors.nodeman_subscription.state import (
    CHECK_AGAIN,
    NAME,
    Answer,
    Run,
    Subscription,
    SubscriptionRecords,
    SubscriptionState,
    run_of,
)
from exporter.config.schema import NodemanSubscriptionConfig
from exporter.model import NODEMAN_STATUSES, NODEMAN_UNFINISHED

STEP_DURATION = "blueking_nodeman_step_duration_seconds"
STEP_BUCKETS = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


class Fold(NodemanFold[SubscriptionState, NodemanSubscriptionConfig, SubscriptionRecords]):
    """See `NodemanFold`."""

    def result(self) -> Observed[SubscriptionState]:
        before = self.state.subscriptions if self.state else {}
        # Without an answer nothing is shown, but failures from now on are counted once it answers.
        subscriptions = {
            id: msgspec.structs.replace(before.get(id) or Subscription(born=self.records.watermark), counter={})
            for id in self.config.subscription_ids
        }
        for id, answer in self.records.answers.items():
            subscriptions[id] = self._subscription(id, before.get(id), answer)
        hosts = self.fold_hosts(self.records.now, settled=CHECK_AGAIN)
        return Observed(
            SubscriptionState(
                counts=self.tally.freeze(),
                last_success=self.tally.now,
                watermark=self.records.watermark,
                hosts=hosts,
                subscriptions=subscriptions,
            ),
            unknown=tuple(self.unknown),
            errors=self.records.errors,
        )

    def _subscription(self, id: int, known: Subscription | None, answer: Answer) -> Subscription:
        now = self.records.now
        for status, count in answer.counter.items():
            if status not in NODEMAN_STATUSES and (known is None or status not in known.counter):
                self.unknown.append(("nodeman_subscription.status", status))
            if count < 0 and (known is None or count != known.counter.get(status)):
                self.unknown.append(("nodeman_subscription.status_counter", str(count)))
        if answer.unread and (known is None or answer.counter != known.counter):
            self.tally.inc(TRUNCATED)
        known = known or Subscription(born=now)
        first = not known.last_checked
        if not answer.instances and not answer.complete:
            return msgspec.structs.replace(known, counter=answer.counter, newest=answer.newest, unread=answer.unread)
        action = next((row.job_type for row in answer.instances if row.job_type), known.action)
        runs: dict[str, Run] = {}
        failed = set() if answer.complete else set(known.failed)
        last = known.last_finished
        for row in answer.instances:
            if not is_ours(row, self.biz):
                continue
            name, finish = row.instance_id, known_end(row.finish_time, now)
            if finish is not None and ended(row.status, finish):
                last = max(finish, last or finish)
            # One that runs again has not succeeded yet. One that was found failed is read again until it has ended.
            runs_again = name in known.failed and row.status in NODEMAN_UNFINISHED
            if row.status == "failed" or runs_again or name in answer.still_running:
                failed.add(name)
            else:
                failed.discard(name)
            run, before = run_of(row, now), known.runs.get(name)
            # Whether it is new is what `fetch` read the steps by.
            if run and row.steps is not None:
                news = (
                    finish is not None and finish >= int(known.born) if first else is_after_baseline(finish, known.born)
                )
                news |= not first and (row.record_id or 0) > known.newest
                self._take(id, row, action, before, counts=news)
                runs[name] = run
            elif run and before:
                runs[name] = before
        kept = {name: run for name, run in known.runs.items() if name in failed or not answer.renewed}
        return Subscription(
            answer.counter,
            known.born,
            now if answer.complete else known.last_checked,
            answer.newest,
            kept | runs,
            frozenset(failed),
            last,
            action,
        )

    def _take(self, id: int, row: Instance, action: str, before: Run | None, *, counts: bool) -> None:
        """Count a finished run that is not known, and update the failing hosts."""
        job_type, step = row.failure if row.status == "failed" else (row.job_type, "")
        labels = (NAME, job_type or action, step, "")
        if counts:
            self._observe_steps(row, since=before[1] if before and before[0] == row.record_id else 0.0)
            if row.status == "failed":
                self.count_failure(labels)
        if (host := row.host) is not None:
            end = known_end(row.finish_time, self.records.now) or self.records.now
            failure = labels if row.status == "failed" else None
            self.results.append(HostResult(host, row.record_id or id, "", end, failure))

    def _observe_steps(self, row: Instance, since: float) -> None:
        """Sub-steps that finished after `since`: retrying a node shows those before it again."""
        for step in row.steps or ():
            if step.start_time is None or step.finish_time is None or step.finish_time <= since:
                continue
            if step.finish_time < step.start_time or step.finish_time > self.records.now + FUTURE:
                self.unknown.append(("nodeman_subscription.finish_time", str(step.finish_time)))
                continue
            self.tally.observe(
                STEP_DURATION, (step.job_type, step.step), step.finish_time - step.start_time, STEP_BUCKETS
            )
