#!/bin/sh
# After an asyncio.TaskGroup has raised, its task still counts as asked to cancel (Python 3.11 and 3.12).
#
# Expected: the group cancels its own task to stop the body, and takes that back before it raises. `cancelling()` is 0
# again, as before the group.
# Seen: `cancelling()` is 1 when a child failed while the task waited at the end of the group, and it stays 1 for the
# rest of the task's life. Nested groups and timeouts do not expect this: with Python up to 3.11.3 (Debian 12 has
# 3.11.2) the next asyncio.timeout that expires ends in CancelledError, not TimeoutError. Mended in Python 3.13.
# Cost: a long-lived task that calls a group and survives its errors ends in silence at its next timeout. Use
# asyncio.gather and cancel the rest, or call `uncancel` as often as the group did not.
# Runs with the python3 that is found; the standard library is all that it needs.
set -eu
python3 - <<'PY'
import asyncio
import sys


async def fails():
    await asyncio.sleep(0)
    raise ValueError


async def main():
    task = asyncio.current_task()
    seen = []
    for _ in range(2):
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
        except* ValueError:
            seen.append(task.cancelling())
    try:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)
    except (TimeoutError, asyncio.CancelledError) as error:
        return seen, type(error).__name__


version = sys.version_info[:3]
seen, timeout = asyncio.run(main())
print("Python", sys.version.split()[0])
print("cancelling() after a first and a second group that raised:", *seen)
print("an asyncio.timeout that expires afterwards raises", timeout)
assert seen == ([1, 2] if version < (3, 13) else [0, 0]), "this has changed"
assert timeout == ("CancelledError" if version < (3, 11, 4) else "TimeoutError"), "this has changed"
PY
echo "still so"
