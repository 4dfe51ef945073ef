"""Reading a history completely, against a list that pages by the rules of JOB and shuffles what has no order."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from exporter.blueking.job import Execution, ExecutionPage
from exporter.collectors.job.collector import MOST_GROWTH
from exporter.collectors.job.history import SLICE_ROWS, TooMany, Window, read_slice, read_window
from exporter.errors import ApiError

DAY = 86_400_000
V4, V3 = 200, 1000


def created(row: Execution) -> int:
    return row.create_time


def row(id: int, created: int) -> Execution:
    return Execution(
        id=id, plan_id=-1, raw_name=Raw(b'"run"'), launch_mode=2, status=2, create_time=created, task_type=1
    )


class Listing:
    """JOB's list: newest first, rows of one millisecond in another order at every call.

    v4: no total, `offset` up to 10,000. v3: a total, and an end that must be after the begin, so that asking for one
    millisecond shows the next one too; `start_limit` is what the operator may have set.
    """

    def __init__(
        self,
        create_times: list[int],
        *,
        page_size: int = V4,
        v3: bool = False,
        start_limit: int | None = None,
        shuffles: bool = True,
    ) -> None:
        self.rows = [row(1000 + n, at) for n, at in enumerate(sorted(create_times))]
        self.page_size, self.v3, self.start_limit = page_size, v3, start_limit
        self.max_offset = None if v3 else 10_000
        self.calls: list[tuple[int, int, int]] = []
        self.spoil: Callable[[int, ExecutionPage], ExecutionPage] = lambda number, page: page
        self._shuffle: Callable[[list[Execution]], None] = Random(1).shuffle if shuffles else lambda rows: None

    @property
    def ids(self) -> set[int]:
        return {row.id for row in self.rows}

    async def ask(self, begin: int, end: int, offset: int) -> ExecutionPage:
        self.calls.append((begin, end, offset))
        if self.v3:
            assert end - begin <= 30 * DAY, "more than 30 days is 1241002"
            end = max(end, begin + 1)
            if self.start_limit is not None and offset > self.start_limit:
                raise ApiError("api_error", "start is past the limit", code="1241010")
        else:
            assert offset <= 10_000, "v4 refuses such an offset"
        rows = self.rows
        low, high = bisect_left(rows, begin, key=created), bisect_right(rows, end, key=created)
        # Shuffle the milliseconds that this page touches, and no others: that is what the page can show.
        first = max(low, high - offset - self.page_size)
        last = max(low, high - offset)
        if first < last:
            from_ = max(low, bisect_left(rows, created(rows[first]), key=created))
            to = min(high, bisect_right(rows, created(rows[last - 1]), key=created))
            part = rows[from_:to]
            self._shuffle(part)
            part.sort(key=created)
            shown = part[first - from_ : last - from_][::-1]
        else:
            shown = []
        return self.spoil(len(self.calls), ExecutionPage(tuple(shown), high - low if self.v3 else None))

    async def window(self, begin: int, end: int) -> Window:
        return await read_window(self, begin, end)


async def test_F17_an_overfull_millisecond_in_a_fixed_order() -> None:
    """A platform that happens to show ties in the same order each time is read just as well."""
    for count in (V4 - 1, V4, V4 + 1, 450):
        listing = Listing([500] * count, shuffles=False)
        window = await listing.window(0, 1000)
        assert window.rows.keys() == listing.ids
        assert not window.unreadable


def within(listing: Listing, begin: int, end: int) -> set[int]:
    return {row.id for row in listing.rows if begin <= row.create_time <= end}


# Few milliseconds for many rows: most pages end inside one. Small pages keep the examples small.
TIMES = st.lists(st.integers(100, 112), max_size=60)


@given(TIMES, st.integers(2, 6), st.booleans(), st.integers(98, 112), st.integers(0, 14))
async def test_4_1_4_every_row_of_a_window_exactly_once(
    times: list[int], page_size: int, v3: bool, begin: int, length: int
) -> None:
    """However many rows share a millisecond and wherever the pages break, all of them are read."""
    listing = Listing(times, page_size=page_size, v3=v3)
    end = begin + max(length, 1)
    window = await listing.window(begin, end)
    assert window.end == end
    read = {id for id, row in window.rows.items() if row.create_time <= end}
    # A millisecond whose rows come in another order at every call may stay unread in part; it must say so.
    assert read == within(listing, begin, end) or window.unreadable
    assert read <= within(listing, begin, end)
    assert len(window.rows.keys() - read) == 0 or v3


@pytest.mark.parametrize("count", [0, 1, 199, 200, 201, 20_000])
async def test_4_1_4_no_more_calls_than_pages(count: int) -> None:
    """A history costs its pages and one tenth more for the rows that two pages share."""
    random = Random(count)
    listing = Listing([random.randrange(50_000) for _ in range(count)])
    window = await listing.window(-1, 50_000)
    assert window.rows.keys() == listing.ids
    assert len(listing.calls) <= 1.1 * math.ceil(max(count, 1) / V4) + 1


async def test_F17_a_millisecond_beyond_the_cap_is_reported_by_v4_and_read_by_v3() -> None:
    """v4 refuses what lies past an offset of 10,000; v3 has no limit unless its operator set one."""
    crowded = [500] * 10_300
    assert (await Listing(crowded, shuffles=False).window(0, 1000)).unreadable == {500}
    v3 = Listing(crowded, page_size=V3, v3=True, shuffles=False)
    window = await v3.window(0, 1000)
    assert window.rows.keys() == v3.ids
    assert not window.unreadable


@pytest.mark.parametrize(("v3", "page_size"), [(False, V4), (True, V3)])
async def test_F17_more_rows_than_the_offset_cap(v3: bool, page_size: int) -> None:
    """30,000 rows are read by time, without ever asking for an offset, for the price of their pages."""
    listing = Listing([at // 3 for at in range(30_000)], page_size=page_size, v3=v3)
    window = await listing.window(0, 20_000)
    assert window.rows.keys() == listing.ids
    assert not window.unreadable
    assert {offset for _, _, offset in listing.calls} == {0}
    assert len(listing.calls) <= 1.1 * 30_000 / page_size + 2


async def test_F17_a_millisecond_with_more_rows_than_a_page() -> None:
    """450 rows of one millisecond between others are read by offset, again and again until nothing is missing."""
    listing = Listing([100] * 50 + [101] * 450 + [102] * 50)
    window = await listing.window(0, 200)
    assert window.rows.keys() == listing.ids
    assert not window.unreadable


async def test_F17_a_millisecond_that_cannot_be_read_is_counted_and_the_rest_is_read() -> None:
    """Past offset 10,000 JOB v4 tells nothing: one truncated millisecond, and everything around it is there."""
    listing = Listing([100] * 10 + [101] * 10_300 + [102] * 10)
    window = await listing.window(0, 200)
    assert len(window.unreadable) == 1
    assert {row.id for row in listing.rows if row.create_time != 101} <= window.rows.keys()


async def test_F17_an_operators_limit_on_start_truncates_only_what_needs_it() -> None:
    """v3 refuses a `start` past the operator's limit: time needs none, a millisecond of 3,000 rows does."""
    spread = Listing(list(range(5000)), page_size=V3, v3=True, start_limit=500)
    assert (await spread.window(0, 5000)).rows.keys() == spread.ids
    dense = Listing([100] * 10 + [101] * 3000 + [102] * 10, page_size=V3, v3=True, start_limit=500)
    window = await dense.window(0, 200)
    assert len(window.unreadable) == 1
    assert {row.id for row in dense.rows if row.create_time != 101} <= window.rows.keys()


@pytest.mark.parametrize("v3", [False, True])
async def test_F17_a_full_millisecond_after_the_begin_of_a_window(v3: bool) -> None:
    """The window's first millisecond is asked for last, where v3 shows the next one too: that is no repeated page."""
    for begin in (100, 101):
        listing = Listing([100, 100] + [101] * 25 + [102], page_size=10, v3=v3)
        window = await listing.window(begin, 200)
        assert within(listing, begin, 200) == window.rows.keys()


async def test_F16_a_page_that_repeats_for_ever_fails() -> None:
    """A platform that ignores the window sends the same full page again: an error, not a loop and not half a count."""
    listing = Listing(list(range(1000)))
    first = await listing.ask(0, 1000, 0)
    listing.spoil = lambda number, page: first
    with pytest.raises(ApiError, match="repeats a page"):
        await listing.window(0, 1000)
    assert len(listing.calls) <= 4


async def test_F16_a_total_that_promises_more_than_there_is_fails() -> None:
    """v3 says 1,005 and sends 5: nobody knows what is missing, so the poll fails."""
    for begin in (0, 1):
        listing = Listing(list(range(1, 6)), page_size=V3, v3=True)
        listing.spoil = lambda number, page: ExecutionPage(page.rows, (page.total or 0) + 1000)
        with pytest.raises(ApiError, match="claims more rows"):
            await listing.window(begin, 1000)


@pytest.mark.parametrize("total", [0, 3, 10])
async def test_F16_a_total_that_promises_less_than_there_is_cuts_nothing(total: int) -> None:
    """A full page is never the last one, whatever its total says."""
    listing = Listing(list(range(35)), page_size=10, v3=True)
    listing.spoil = lambda number, page: ExecutionPage(page.rows, min(total, page.total or 0))
    assert (await listing.window(0, 1000)).rows.keys() == listing.ids


async def test_F16_new_executions_arriving_while_reading_shift_nothing() -> None:
    """At every call two more executions are created at the new end: those of the window are still read once each."""
    listing = Listing(list(range(1000)))
    wanted = listing.ids

    def arrive(number: int, page: ExecutionPage) -> ExecutionPage:
        listing.rows += [row(9_000_000 + 2 * number + n, 2000) for n in (0, 1)]
        return page

    listing.spoil = arrive
    window = await listing.window(0, 3000)
    assert wanted <= window.rows.keys()
    assert len(listing.calls) <= 7


async def test_F16_rows_of_another_time_are_not_taken() -> None:
    """Rows from before the window, of a platform that ignores the filter, are not counted."""
    listing = Listing([10, 20])
    everything = await listing.ask(0, 100, 0)
    listing.spoil = lambda number, page: everything
    assert {row.create_time for row in (await listing.window(15, 100)).rows.values()} == {20}


@pytest.mark.parametrize("count", [5_000, 100_000])
async def test_a_window_stops_at_the_rows_it_may_have(count: int) -> None:
    """A window that is too dense is given up as soon as that shows: at its first page if it is even."""
    listing = Listing(list(range(count)))
    with pytest.raises(TooMany) as too_many:
        await read_window(listing, 0, count, at_most=1000)
    assert len(listing.calls) == 1
    assert too_many.value.rows == pytest.approx(count, rel=0.02)


async def test_a_window_stops_when_the_older_part_proves_too_dense() -> None:
    """The newest page says nothing about what lies before it: no more is read in vain than was to be kept."""
    listing = Listing([*range(5_000), *range(50_000, 100_000, 250)])
    with pytest.raises(TooMany):
        await read_window(listing, 0, 100_000, at_most=1000)
    assert len(listing.calls) <= 1 + 1000 / V4 + 1


async def slices(listing: Listing, begin: int, end: int, lookback: int = 0) -> list[tuple[int, Window]]:
    """A history read as the collector does: each slice begins where the one before it ended, and is as long as that one
    would have been with the wanted number of rows."""
    read: list[tuple[int, Window]] = []
    watermark, last = begin, end
    while not read or read[-1][1].end < end:
        window = await read_slice(listing, begin - lookback, last, min(end, watermark + 1000), SLICE_ROWS)
        read.append((begin, window))
        span = (window.end - watermark) * SLICE_ROWS // max(SLICE_ROWS // MOST_GROWTH, len(window.rows))
        watermark = begin = window.end
        lookback, last = 0, min(end, watermark + max(span, 1000))
        assert len(read) < 500, "no progress"
    return read


def uniform(count: int, days: float) -> list[int]:
    return [int(n * days * DAY / count) for n in range(count)]


def bursts(count: int, days: float) -> list[int]:
    """All executions of a day within a few minutes."""
    return [int(n * days // count) * DAY + n % 300_000 for n in range(count)]


@pytest.mark.parametrize("page_size", [V4, V3])
@pytest.mark.parametrize("history", [uniform, bursts])
async def test_4_1_3_a_long_history_comes_in_slices_oldest_first(
    history: Callable[[int, float], list[int]], page_size: int
) -> None:
    """20,000 executions of seven days: slices of bounded size, contiguous and complete, for the price of the pages."""
    listing = Listing(history(20_000, 7), page_size=page_size, v3=page_size == V3)
    read = await slices(listing, 0, 7 * DAY)
    assert all(before.end == begin for (_, before), (begin, _) in pairwise(read))
    ends = [window.end for _, window in read]
    assert ends == sorted(ends)
    assert ends[-1] == 7 * DAY
    assert set().union(*(window.rows for _, window in read)) == listing.ids
    for begin, window in read:
        assert window.rows.keys() >= within(listing, begin, window.end)
        assert len(window.rows) <= 2 * SLICE_ROWS + page_size
    # Each slice costs a few pages for finding out how dense it is, more when the newest page says nothing about that.
    pages = 20_000 / page_size
    assert len(listing.calls) <= (1.1 if history is uniform else 2) * pages + 4 * len(read) + 4


async def test_4_1_3_a_second_that_is_denser_than_a_slice_is_read_whole() -> None:
    """A slice never ends earlier than a second after the watermark, so that a flood cannot stop the catch-up."""
    listing = Listing([DAY + n % 900 for n in range(12_000)] + [2 * DAY])
    read = await slices(listing, 0, 3 * DAY)
    assert set().union(*(window.rows for _, window in read)) == listing.ids
    assert not any(window.unreadable for _, window in read)


async def test_4_1_3_an_empty_history_is_one_slice() -> None:
    """A week without any execution costs one call."""
    listing = Listing([])
    read = await slices(listing, 0, 7 * DAY, lookback=600_000)
    assert [(window.end, len(window.rows)) for _, window in read] == [(7 * DAY, 0)]
    assert len(listing.calls) == 1


@pytest.mark.parametrize("without_id", [lambda id: id % 3 == 0, lambda id: id >= 1300, lambda id: True])
@pytest.mark.parametrize("spacing", [1, 0.01])
async def test_F66_rows_without_a_usable_id_hide_no_others(without_id: Callable[[int], bool], spacing: float) -> None:
    """A third of the rows, the newest pages, or all of them: the others are read, their milliseconds are reported."""
    listing = Listing([DAY + int(n * spacing) for n in range(1500)])

    def spoil(_: int, page: ExecutionPage) -> ExecutionPage:
        times = tuple(row.create_time for row in page.rows if without_id(row.id))
        return ExecutionPage(tuple(row for row in page.rows if not without_id(row.id)), page.total, times)

    listing.spoil = spoil
    window = await read_window(listing, DAY, 2 * DAY)
    assert window.rows.keys() == {id for id in listing.ids if not without_id(id)}
    assert window.without_id == {row.create_time for row in listing.rows if without_id(row.id)}
    assert window.unreadable == window.without_id
