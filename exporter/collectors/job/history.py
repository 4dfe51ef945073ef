"""Reading JOB's history: every execution of a time window, however many there are and however they are paged.

The list is ordered by create_time, newest first, rows of the same millisecond in no order at all. So a page is not
continued by its offset: the next one asks for what was created up to the oldest row so far, that millisecond included.
Then nothing can shift between two calls, no limit on offsets matters, and rows of one millisecond that fell on both
sides of a page boundary are simply seen again. Only a millisecond with more rows than a page needs offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from exporter.blueking.job import Execution, ExecutionPage
from exporter.errors import ApiError

MILLISECOND_ROUNDS = 32
"""Readings of an overfull millisecond: each comes in another order, so what one misses the next finds."""
SLICE_ROWS = 4_000
"""Rows that one poll reads of a long history: few enough to be read and examined within a poll's deadline."""
MOST_ROWS = 3 * SLICE_ROWS
"""Rows that one poll reads of a long history where the state is large: few enough to be kept in memory."""
START_LIMIT_CODE = "1241010"
"""JOB v3: `start` is past the limit that the operator of the platform set."""


class History(Protocol):
    """A list as one dialect pages it. `page_size`: rows of a full page; `max_offset`: past it the platform refuses."""

    page_size: int
    max_offset: int | None

    async def ask(self, begin: int, end: int, offset: int) -> ExecutionPage:
        """The page at that offset of the executions created in [begin, end], ms since the epoch."""


Keep = Callable[[Sequence[Execution]], Mapping[int, Execution]]
"""Which of the rows of a page are kept, by id. A row may be shown twice. Pages are not kept, so that a window of very
many rows that are known takes no memory."""


def by_id(rows: Sequence[Execution]) -> Mapping[int, Execution]:
    """Keep all rows."""
    return {row.id: row for row in rows}


class Window(msgspec.Struct, frozen=True):
    """The executions created in [begin, end] that were to be kept, except for the milliseconds in `unreadable`, which
    give no more than a part of theirs. `without_id`: those among them that hold a row without a usable id."""

    rows: dict[int, Execution]
    end: int
    unreadable: frozenset[int] = frozenset()
    without_id: frozenset[int] = frozenset()

    def with_newer(self, window: Window) -> Window:
        """This one and one that was read after it, whose rows are newer."""
        return Window(
            self.rows | window.rows,
            window.end,
            self.unreadable | window.unreadable,
            self.without_id | window.without_id,
        )


class TooMany(Exception):
    """The window holds more rows than were asked for: about `rows`, judging by the newest of them."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = rows


async def read_window(
    history: History, begin: int, end: int, *, at_most: int | None = None, keep: Keep = by_id
) -> Window:
    """Every row of [begin, end].

    Raises `ApiError`, and `TooMany` as soon as more than `at_most` rows to be kept are to be expected.
    """
    rows: dict[int, Execution] = {}
    unreadable: set[int] = set()
    without_id: set[int] = set()
    top = end
    while top > begin:
        page = await history.ask(begin, top, 0)
        times = page.times
        oldest, newest = min(times, default=top + 1), max(times, default=top + 1)
        rows |= keep(page.rows if oldest >= begin else [row for row in page.rows if row.create_time >= begin])
        without_id.update(at for at in page.unreadable if at >= begin)
        if _is_last(page, page.size, history):
            break
        if oldest > top or (oldest == top < newest):
            raise _nonsense(page)
        if oldest < newest:
            top = oldest
        else:
            if not await _read_millisecond(history, oldest, rows, keep):
                unreadable.add(oldest)
            top = oldest - 1
        if at_most is not None:
            expected = len(rows) * (end - begin) // max(1, end - top)
            if expected > at_most:
                raise TooMany(expected)
    else:
        # Not [begin, begin], to which v3 would add the next millisecond, maybe a page full of it.
        if top == begin and not await _read_millisecond(history, begin, rows, keep):
            unreadable.add(begin)
    return Window(rows, end, frozenset(unreadable | without_id), frozenset(without_id))


async def read_slice(history: History, begin: int, end: int, floor: int, rows: int, keep: Keep = by_id) -> Window:
    """The oldest part of [begin, end] that holds about so many rows, at most twice as many; all of it when it holds
    less. It ends at `floor` or later, however many rows that are."""
    while True:
        try:
            return await read_window(history, begin, end, at_most=2 * rows if end > floor else None, keep=keep)
        except TooMany as error:
            end = max(floor, begin + (end - begin) * rows // error.rows)


def _is_last(page: ExecutionPage, read: int, history: History) -> bool:
    # A full page is never the last, whatever its total; v3 sends a total, and a page that is not full may not be the
    # last.
    return page.size < history.page_size and (page.total is None or read >= page.total)


def _nonsense(page: ExecutionPage) -> ApiError:
    return ApiError("decode", f"the list repeats a page, or claims more rows than it sends (total {page.total})")


async def _read_millisecond(history: History, at: int, rows: dict[int, Execution], keep: Keep) -> bool:
    """Read the rows created at `at` and add those to be kept to `rows`. Returns whether they are all there.

    The window is [at - 1, at] because v3 wants an end after its begin; the rows of `at` come first. As many
    positions as distinct rows: nothing was missed.
    """
    found: set[int] = set()
    for _ in range(MILLISECOND_ROUNDS):
        positions = offset = 0
        while True:
            if history.max_offset is not None and offset > history.max_offset:
                return False
            try:
                page = await history.ask(at - 1, at, offset)
            except ApiError as error:
                if error.code == START_LIMIT_CODE:
                    return False
                raise
            if not page.size and not _is_last(page, offset, history):
                raise _nonsense(page)
            here = [row for row in page.rows if row.create_time == at]
            rows |= keep(here)
            found.update(row.id for row in here)
            positions += len(here)
            offset += page.size
            if len(here) < len(page.rows) or _is_last(page, offset, history):
                break
        if len(found) >= positions:
            return True
    return False
