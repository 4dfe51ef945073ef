"""The page contains exactly what the owners put, in both formats, plain and compressed; a change renders only what
changed.

After an intended change of the format: UPDATE_GOLDEN=1 pytest tests/metrics/test_page.py, then read the diff.
"""

from __future__ import annotations

import gzip
import os
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.metrics.counts import Tally
from exporter.metrics.family import HOST_LABELS, Chunk, Counts, Family, GaugeChunk, Labels
from exporter.metrics.negotiate import Format, negotiate
from exporter.metrics.page import CHANGES, PIECE, WRITE, Page, Piece, Snapshot
from exporter.metrics.render import render_counts, render_gauge, scope_prefix
from exporter.model import Key, Scope
from tests.support.parsers import parse
from tests.support.paths import GOLDEN

FINISHED = Family("blueking_job_executions_finished_total", "counter", ("status",), "Executions that ended.", "结束")
UNFINISHED = Family("blueking_job_executions_unfinished", "gauge", (), "Executions not ended.", "未结束")
DURATION = Family("blueking_job_execution_duration_seconds", "histogram", (), 'Start to "end".', "耗时")
FAILING = Family("blueking_job_hosts_failing_since", "gauge", HOST_LABELS, "Hosts.", "主机", detail=True)
STREAK = Family("blueking_job_host_consecutive_failures", "gauge", HOST_LABELS, "Hosts.", "主机", detail=True)
SUCCESS = Family("blueking_exporter_collector_success", "gauge", (), "Works.", "成功", per_collector=True)
UNUSED = Family("blueking_unused", "gauge", (), "Never put.", "未用")
FAMILIES = (FINISHED, UNFINISHED, DURATION, FAILING, STREAK, SUCCESS, UNUSED)


def key(number: int, collector: str = "job") -> Key:
    """The owner of scope `number`."""
    return Key(collector, Scope("biz", str(number)))


def gauge(owner: Key, family: Family = UNFINISHED, value: float = 1) -> dict[str, Chunk]:
    """One sample without own labels."""
    return {family.name: render_gauge(family, scope_prefix(owner.scope), {(): value})}


def hosts(owner: Key, *ids: int, family: Family = FAILING) -> dict[str, Chunk]:
    """Failing hosts, oldest streak first."""
    samples: dict[Labels, float] = {("0", str(id), "10.0.0.1"): 1.0 for id in ids}
    return {family.name: render_gauge(family, scope_prefix(owner.scope), samples)}


def body(page: Page, form: Format = Format.TEXT, names: set[str] | None = None, *, compressed: bool = False) -> str:
    """What a scraper reads."""
    sent = b"".join(page.exposition(form, names, gzip=compressed))
    return (gzip.decompress(sent) if compressed else sent).decode()


def sample_page() -> Page:
    """Two scopes with every kind of series: held and shown, with exemplars, with awkward text."""
    page = Page(FAMILIES)
    for number in (2, 3):
        tally = Tally(Counts(), 1_700_000_000, 90)
        tally.zero(FINISHED.name, ("success",))
        tally.inc(FINISHED.name, ("success",), by=number, exemplar=20_000_000_001)
        tally.observe(DURATION.name, (), 0.5, (1, 60), exemplar_id=20_000_000_001)
        tally = Tally(tally.freeze(), 1_700_000_060.5, 90)
        tally.inc(FINISHED.name, ("failed",), exemplar=20_000_000_002)
        tally.observe(DURATION.name, (), 90.25, (1, 60), exemplar_id=20_000_000_002)
        counts, prefix = tally.freeze(), scope_prefix(Scope("biz", str(number)))
        page.put(
            key(number),
            {
                FINISHED.name: render_counts(FINISHED, prefix, counts, 1_700_000_100, 90),
                DURATION.name: render_counts(DURATION, prefix, counts, 1_700_000_100, 90),
                FAILING.name: render_gauge(FAILING, prefix, {("0", "7", 'a"b\\c\nd'): 1_699_999_999.5}),
                SUCCESS.name: render_gauge(SUCCESS, scope_prefix(Scope("biz", str(number)), "job"), {(): 1}),
            },
        )
    return page


@pytest.mark.parametrize(("form", "file"), [(Format.TEXT, "page.prom"), (Format.OPENMETRICS, "page.openmetrics")])
def test_the_page_is_the_golden_one(form: Format, file: str) -> None:
    """Every byte of a page with all kinds of series is as it was agreed on."""
    text = body(sample_page(), form)
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / file).write_bytes(text.encode())
    assert text.encode() == (GOLDEN / file).read_bytes()


def test_both_formats_say_the_same() -> None:
    """Apart from `_created`, a scraper gets the same samples whichever format it asks for."""
    page = sample_page()
    classic, openmetrics = (
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for metric in parse(body(page, form), form)
            for sample in metric.samples
            if not sample.name.endswith("_created")
        }
        for form in Format
    )
    assert classic == openmetrics
    assert len(classic) == sum(page.counts().values())


def test_put_replaces_all_of_an_owner() -> None:
    """What a poll does not render any more leaves the page at once, header and all."""
    page = Page(FAMILIES)
    page.put(key(2), gauge(key(2)) | hosts(key(2), 1, 2))
    page.put(key(2), gauge(key(2), value=3))
    assert body(page) == (
        "# HELP blueking_job_executions_unfinished Executions not ended.\n"
        "# TYPE blueking_job_executions_unfinished gauge\n"
        'blueking_job_executions_unfinished{bk_scope_type="biz",bk_scope_id="2"} 3\n'
    )
    page.remove(key(2))
    assert body(page) == ""
    assert body(page, Format.OPENMETRICS) == "# EOF\n"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((n, FINISHED.name) for n in (FINISHED.name, FINISHED.name[:-6], f"{FINISHED.name[:-6]}_created")),
        *((DURATION.name + suffix, DURATION.name) for suffix in ("", "_bucket", "_sum", "_count", "_created")),
        (SUCCESS.name, SUCCESS.name),
    ],
)
def test_a_name_selects_its_family(name: str, family: str) -> None:
    """`name[]` takes a family or sample name of either format and gives the whole family."""
    page = sample_page()
    for form in Format:
        text = body(page, form, {name})
        typed = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
        assert typed == [family.removesuffix("_total") if form.openmetrics else family]


def test_an_unknown_name_gives_an_empty_page() -> None:
    """Also in OpenMetrics, where empty means the end mark alone."""
    assert body(sample_page(), Format.OPENMETRICS, {"nope"}) == "# EOF\n"


def test_F49_two_collectors_cannot_write_the_same_series() -> None:
    """Prometheus would silently keep the first of them; here it is an error, and the page stays as it was."""
    page = Page(FAMILIES)
    page.put(key(2), gauge(key(2)))
    before = body(page)
    with pytest.raises(ValueError, match="repeats"):
        page.put(key(2, "nodeman_job"), gauge(key(2)))
    assert body(page) == before


def test_F49_scopes_of_the_same_number_are_kept_apart() -> None:
    """The same business listed as biz and as biz_set gives two series, not one twice."""
    page = Page(FAMILIES)
    for owner in (Key("job", Scope("biz", "2")), Key("job", Scope("biz_set", "2"))):
        page.put(owner, gauge(owner))
    lines = [line for line in body(page).splitlines() if not line.startswith("#")]
    assert len(set(lines)) == 2


def test_collectors_share_families_that_have_their_label() -> None:
    """`collector` keeps them apart."""
    page = Page(FAMILIES)
    for collector in ("job", "nodeman_job"):
        scope = Scope("biz", "2")
        page.put(Key(collector, scope), {SUCCESS.name: render_gauge(SUCCESS, scope_prefix(scope, collector), {(): 1})})
    assert page.counts() == {SUCCESS.name: 2}


def test_an_unknown_family_is_refused() -> None:
    """A row that nobody listed would be missing from the reference."""
    with pytest.raises(ValueError, match="not a family"):
        Page(FAMILIES).put(key(2), {"x": GaugeChunk(b"x 1\n", 1)})


def big_page() -> Page:
    """Enough scopes for several pieces of each of two families."""
    page = Page(FAMILIES)
    for number in range(3000):
        page.put(key(number), gauge(key(number)) | hosts(key(number), 1, 2))
    return page


def test_an_unchanged_page_is_the_same_snapshot() -> None:
    """Fifty scrapes between two polls share one snapshot and what it has compressed."""
    page = big_page()
    before = page.snapshot(Format.TEXT)
    page.put(key(5), gauge(key(5)) | hosts(key(5), 1, 2))
    assert page.snapshot(Format.TEXT) is before


def test_a_change_renews_only_the_piece_that_holds_it() -> None:
    """All other pieces are the very same objects, so nothing of them is compressed again."""
    page = big_page()
    before = page.snapshot(Format.TEXT).pieces
    page.put(key(1500), gauge(key(1500), value=2) | hosts(key(1500), 1, 2))
    after = page.snapshot(Format.TEXT).pieces
    assert len(before) == len(after) > 10
    assert sum(a is not b for a, b in zip(before, after, strict=True)) == 1


def test_pieces_stay_bounded_when_chunks_grow() -> None:
    """Compressing a piece is one step of the event loop; growth must not make it a long one."""
    page = big_page()
    for number in range(3000):
        page.put(key(number), hosts(key(number), *range(10)))
    sizes = [piece.size for piece in page.snapshot(Format.TEXT).pieces]
    assert max(sizes) <= 2 * PIECE
    assert body(page).count("\n") == 2 + 30_000


def test_gzip_is_one_member_of_the_same_page() -> None:
    """curl and httpx stop after the first member: everything is in it, also after a change and with the tail."""
    page = big_page()
    for value in (1, 2):
        page.put(key(7), gauge(key(7), value=value))
        for form in Format:
            plain = b"".join(page.exposition(form, extra=b"x 1\n"))
            for _ in range(2):
                unzip = zlib.decompressobj(wbits=31)
                sent = b"".join(page.exposition(form, extra=b"x 1\n", gzip=True))
                assert unzip.decompress(sent) == plain
                assert (unzip.eof, unzip.unused_data) == (True, b"")


def test_the_page_is_sent_in_bounded_writes() -> None:
    """No write is much larger than a slow reader may hold, and the announced length is the true one."""
    exposition = big_page().exposition(Format.TEXT, extra=b"x 1\n")
    sizes = [len(write) for write in exposition]
    assert max(sizes) < WRITE + 2 * PIECE
    assert sum(sizes) == exposition.length == exposition.size


def test_a_snapshot_keeps_its_moment() -> None:
    """A slow reader gets one consistent page, whatever the pollers put meanwhile."""
    page = big_page()
    reader = iter(page.exposition(Format.TEXT))
    first = next(reader)
    for number in range(3000):
        page.put(key(number), {})
    assert b"".join([first, *reader]).count(b"\n") == 3000 * 3 + 4


any_bytes = st.one_of(
    st.binary(max_size=2000),  # does not compress
    st.builds(lambda unit, size: (unit * size)[:size], st.binary(min_size=1, max_size=300), st.integers(0, 3 * PIECE)),
)


@given(st.lists(st.lists(any_bytes, max_size=3), max_size=6), any_bytes, st.randoms(use_true_random=False))
def test_pieces_compressed_apart_are_one_gzip_text(texts: list[list[bytes]], extra: bytes, rng: random.Random) -> None:
    """Whatever is in the pieces, none, empty or large ones, and in whatever order they are put together later."""
    pieces = [Piece(tuple(GaugeChunk(one, 1) for one in lines), sum(map(len, lines))) for lines in texts]
    for _ in range(2):
        snapshot = Snapshot(pieces)
        for _ in range(2):
            plain = b"".join(snapshot.plain(extra))
            assert plain == b"".join([*(line for piece in pieces for line in piece.lines), extra])
            assert gzip.decompress(b"".join(snapshot.gzip(extra))) == plain
        rng.shuffle(pieces)


def cutting_page(limit: int) -> tuple[Page, list[tuple[str, int]]]:
    """A page with a bound, and what it reports as cut."""
    cut: list[tuple[str, int]] = []
    return Page(FAMILIES, limit, lambda family, n: cut.append((family, n))), cut


def test_max_series_cuts_the_newest_details_evenly() -> None:
    """The bound costs the longest lists first; counters and plain gauges are never cut."""
    page, cut = cutting_page(8)
    page.put(key(2), gauge(key(2)) | hosts(key(2), 1, 2, 3, 4, 5, 6))
    page.put(key(3), gauge(key(3)) | hosts(key(3), 1, 2))
    page.put(key(4), gauge(key(4)))
    assert page.counts() == {UNFINISHED.name: 3, FAILING.name: 5}
    assert cut == [(FAILING.name, 3)]
    kept = [line for line in body(page).splitlines() if line.startswith(FAILING.name)]
    assert [line.split('bk_host_id="')[1].split('"')[0] for line in kept] == ["1", "2", "3", "1", "2"]


def test_max_series_cuts_all_detail_families_to_the_same_depth() -> None:
    """One number bounds every owner and family."""
    page, _ = cutting_page(6)
    page.put(key(2), hosts(key(2), 1, 2, 3, 4) | hosts(key(2), 1, 2, 3, 4, family=STREAK))
    assert page.counts() == {FAILING.name: 3, STREAK.name: 3}


def test_a_series_counts_as_dropped_when_it_enters_the_cut() -> None:
    """Staying cut is not counted again; leaving and returning is."""
    page, cut = cutting_page(2)
    page.put(key(2), hosts(key(2), 1, 2, 3))
    page.counts()
    page.put(key(2), hosts(key(2), 1, 2, 3) | gauge(key(2)))
    page.counts()
    page.put(key(2), hosts(key(2), 1, 2, 3))
    page.counts()
    page.put(key(2), hosts(key(2), 1, 2, 4))
    page.counts()
    assert [n for _, n in cut] == [1, 1, 1]


def test_max_series_can_be_lifted() -> None:
    """A reload with a higher bound brings back what was cut."""
    page, _ = cutting_page(2)
    page.put(key(2), hosts(key(2), 1, 2, 3))
    assert page.counts() == {FAILING.name: 2}
    page.limit(100)
    assert page.counts() == {FAILING.name: 3}
    assert body(page).count("bk_host_id") == 3


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 40))
def test_the_cut_fits_and_wastes_nothing(sizes: list[int], limit: int) -> None:
    """The page holds at most `max_series`; one series more per owner would not have fitted."""
    page, cut = cutting_page(limit)
    for number, size in enumerate(sizes):
        page.put(key(number), hosts(key(number), *range(size)))
    shown = page.counts().get(FAILING.name, 0)
    assert shown <= limit
    assert shown + sum(n for _, n in cut) == sum(sizes)
    assert body(page).count("bk_host_id") == shown
    if shown < sum(sizes):
        level = max(min(k, size) for size in sizes for k in range(10) if sum(min(k, s) for s in sizes) <= limit)
        assert shown + sum(size > level for size in sizes) > limit


def test_changes_for_later_are_made_when_the_page_is_read() -> None:
    page, made = Page(FAMILIES), []

    def change(number: int, value: float) -> None:
        made.append(number)
        page.change(key(number), gauge(key(number), value=value))

    page.change_later(key(1), lambda: change(1, 1))
    page.change_later(key(1), lambda: change(1, 2))  # instead of the one before
    page.change_later(key(2), lambda: change(2, 1))
    page.remove(key(2))
    assert made == []
    assert page.counts() == {UNFINISHED.name: 1}
    assert f'{UNFINISHED.name}{{bk_scope_type="biz",bk_scope_id="1"}} 2' in body(page)
    assert made == [1], "once, and nothing for an owner that is gone"


def test_changes_for_later_are_bounded() -> None:
    page, made = Page(FAMILIES), []
    for number in range(CHANGES):
        page.change_later(key(number), lambda number=number: made.append(number))  # type: ignore[misc]
        assert len(made) == (CHANGES if number == CHANGES - 1 else 0)


def test_any_history_of_puts_leaves_what_was_put_last() -> None:
    """Random puts, growth, shrinking and removals: the page equals one that was built from the end state alone."""
    rng = random.Random(1)
    page, last = Page(FAMILIES), {}
    for _ in range(3000):
        owner = key(rng.randrange(40))
        chunks = hosts(owner, *range(rng.choice((0, 1, 5, 400)))) if rng.random() < 0.9 else {}
        page.put(owner, chunks)
        last[owner] = chunks
    fresh = Page(FAMILIES)
    for owner, chunks in last.items():
        fresh.put(owner, chunks)
    assert sorted(body(page).splitlines()) == sorted(body(fresh).splitlines())
    assert page.counts() == fresh.counts()


OPENMETRICS, TEXT = Format.OPENMETRICS, Format.TEXT


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, TEXT),
        ("", TEXT),
        ("*/*", TEXT),
        ("text/html,application/xhtml+xml,*/*;q=0.8", TEXT),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", OPENMETRICS),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
            "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            OPENMETRICS,
        ),
        ("application/openmetrics-text; version=1.0.0; q=0.5, text/plain; q=0.7", TEXT),
        ("application/openmetrics-text;q=0", TEXT),
        ("application/openmetrics-text;version=2.0.0", TEXT),
        ("application/openmetrics-text;q=loud", TEXT),
        ("Application/OpenMetrics-Text; Version=\"1.0.0\"", OPENMETRICS),
        (";;,=,\x00", TEXT),
    ],
)  # fmt: skip
def test_the_format_is_negotiated(accept: str | None, form: Format) -> None:
    """OpenMetrics for who asks for a version that is spoken here and likes nothing better; classic text otherwise."""
    assert negotiate(accept, None) == (form, False)


@pytest.mark.parametrize(
    ("encoding", "compressed"),
    [
        (None, False),
        ("", False),
        ("gzip", True),
        ("deflate, gzip;q=0.5, br", True),
        ("gzip;q=0", False),
        ("gzip;q=0, *", False),
        ("*", True),
        ("*;q=0", False),
        ("identity", False),
        ("gzip;q=0.2, identity;q=0.8", False),
        ("gzip, identity", True),
        ("GZIP ; q=0.001", True),
    ],
)
def test_gzip_is_negotiated(encoding: str | None, compressed: bool) -> None:
    """A quality of 0 is a no, also where `*` would allow it."""
    assert negotiate(None, encoding) == (TEXT, compressed)


def test_content_types_are_the_ones_that_prometheus_knows() -> None:
    """Spelled as both specifications do, with the charset."""
    assert TEXT.value == "text/plain; version=0.0.4; charset=utf-8"
    assert OPENMETRICS.value == "application/openmetrics-text; version=1.0.0; charset=utf-8"
