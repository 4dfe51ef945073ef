"""Sample lines say exactly what was counted, to two independent parsers, whatever the labels hold."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.metrics.counts import Tally
from exporter.metrics.family import Chunk, Counts, Family, Labels
from exporter.metrics.negotiate import Format
from exporter.metrics.render import CountsChunk, header, number, render_counts, render_gauge, scope_prefix
from exporter.model import Scope
from tests.support.parsers import parse

COUNTER = Family("blueking_a_total", "counter", ("code", "text"), "Of a.", "甲。")
GAUGE = Family("blueking_g", "gauge", ("code", "text"), "Of g.", "乙。")
HISTOGRAM = Family("blueking_d_seconds", "histogram", ("code", "text"), "Of d.", "丙。")
SCOPE = Scope("biz", "2")
PREFIX = scope_prefix(SCOPE)
NEVER_HELD = math.inf

Sample = tuple[str, tuple[tuple[str, str], ...], float]


def samples(family: Family, chunk: Chunk, form: Format) -> list[Sample]:
    """The chunk as an independent parser understands it."""
    head = header(family.name, family.kind, family.help, form.openmetrics)
    lines, end = (chunk.openmetrics, "# EOF\n") if form.openmetrics else (chunk.text, "")
    parsed = parse(head + lines.decode() + end, form)
    return [(s.name, tuple(sorted(s.labels.items())), s.value) for metric in parsed for s in metric.samples]


def test_labels_of_the_owner_come_first() -> None:
    """One order for all families: collector, scope, then what the sample says."""
    chunk = render_gauge(GAUGE, scope_prefix(SCOPE, "job"), {("1", "t"): 5.0})
    assert chunk.text == b'blueking_g{collector="job",bk_scope_type="biz",bk_scope_id="2",code="1",text="t"} 5\n'


def test_a_family_without_labels_has_no_braces() -> None:
    """`x 1` is what every writer gives for a series without labels."""
    bare = Family("blueking_b_total", "counter", (), "Of b.", "丁。")
    tally = Tally(Counts(), 5, 0)
    tally.inc(bare.name)
    chunk = render_counts(bare, "", tally.freeze(), 10, 0)
    assert chunk.text == b"blueking_b_total 1\n"
    assert chunk.openmetrics == b"blueking_b_total 1\nblueking_b_created 5\n"


def test_a_held_counter_is_zero_with_its_birth_and_without_exemplar() -> None:
    """While held, the page shows that the series exists since its first event, and nothing of the event."""
    tally = Tally(Counts(), 100, 90)
    tally.inc("blueking_a_total", ("1", "t"), by=3, exemplar=42)
    counts = tally.freeze()
    during, after = (render_counts(COUNTER, "", counts, now, 90).openmetrics for now in (189.9, 190))
    assert during == b'blueking_a_total{code="1",text="t"} 0\nblueking_a_created{code="1",text="t"} 100\n'
    assert after == (
        b'blueking_a_total{code="1",text="t"} 3 # {job_instance_id="42"} 3 100\n'
        b'blueking_a_created{code="1",text="t"} 100\n'
    )
    assert render_counts(COUNTER, "", counts, math.inf, 90).openmetrics == after


def test_a_held_histogram_is_all_zero() -> None:
    """Buckets, sum and count are hidden together: one of them alone would be a lie."""
    tally = Tally(Counts(), 100, 90)
    tally.observe(HISTOGRAM.name, ("1", "t"), 2, (1.0, 10.0), exemplar_id=42)
    during = samples(HISTOGRAM, render_counts(HISTOGRAM, PREFIX, tally.freeze(), 150, 90), Format.OPENMETRICS)
    assert {value for name, _, value in during if not name.endswith("_created")} == {0}
    assert len(during) == 6


def test_bounds_are_go_floats_in_both_formats() -> None:
    """`le="1"` in one format and `le="1.0"` in the other would be two series to Prometheus."""
    tally = Tally(Counts(), 100, 0)
    tally.observe(HISTOGRAM.name, ("1", "t"), 2, (1, 0.5e-5, 86400))
    chunk = render_counts(HISTOGRAM, "", tally.freeze(), 150, 0)
    for text in (chunk.text, chunk.openmetrics):
        assert [line.split(b'le="')[1].split(b'"')[0] for line in text.splitlines() if b"le=" in line] == [
            b"1.0", b"5e-06", b"86400.0", b"+Inf",
        ]  # fmt: skip


def test_nan_is_no_sample() -> None:
    """A value that nobody knows is absent, the others stay."""
    chunk = render_gauge(GAUGE, PREFIX, {("1", "t"): math.nan, ("2", "t"): 1})
    assert (chunk.series, chunk.text.count(b"\n")) == (1, 1)
    assert b'code="2"' in chunk.text


def test_label_values_must_match_the_label_names() -> None:
    """A sample with a value too few would make a page that no scraper accepts."""
    with pytest.raises(ValueError):
        render_gauge(GAUGE, PREFIX, {("1",): 1})


def test_F09_a_lone_surrogate_does_not_cost_the_page() -> None:
    """Names are cleaned at the border; should one slip through, it is replaced here, not raised."""
    assert b'text="a?b"' in render_gauge(GAUGE, PREFIX, {("1", "a\ud800b"): 1}).text


def test_help_is_escaped() -> None:
    """A newline in a sentence must not begin a new line of the page."""
    assert header("x_total", "counter", 'a\nb\\c"d', openmetrics=False) == (
        '# HELP x_total a\\nb\\\\c"d\n# TYPE x_total counter\n'
    )
    assert header("x_total", "counter", 'a\nb\\c"d', openmetrics=True) == (
        '# HELP x a\\nb\\\\c\\"d\n# TYPE x counter\n'
    )


@given(st.floats(allow_nan=False))
def test_numbers_read_back_exactly(value: float) -> None:
    """No digit is lost, and a float that went through the state gives the same text as the integer before."""
    assert float(number(value)) == value
    if value.is_integer():
        assert number(value) == number(float(int(value)))


labels = st.tuples(st.text(max_size=20), st.text(max_size=20))
any_value = st.one_of(
    st.floats(),
    st.integers(-(2**53), 2**53),
    st.booleans(),
    st.sampled_from((0.0, -0.0, 1e-5, 1.00001, 0.1 + 0.2, 1e15, 9999999999999998.0, 1e16, math.inf, -math.inf)),
)


@given(st.lists(st.dictionaries(labels, any_value, max_size=5), max_size=4), st.booleans())
def test_a_gauge_writes_every_value_as_a_number_alone_is_written(
    scrapes: list[dict[Labels, float]], wholes: bool
) -> None:
    """What its neighbours are, and what was rendered before, makes no difference to a line."""
    for values in scrapes:
        if wholes:
            values = {each: value for each, value in values.items() if math.isfinite(value) and value == int(value)}
        alone = [render_gauge(GAUGE, PREFIX, {each: value}).text for each, value in values.items()]
        together = render_gauge(GAUGE, PREFIX, values)
        assert together.text == b"".join(alone)
        known = [value for value in values.values() if not math.isnan(value)]
        assert [line.rpartition(" ")[2] for line in together.text.decode().split("\n")[:-1]] == [*map(number, known)]


@given(st.dictionaries(labels, st.floats(allow_nan=False), max_size=5), st.text(max_size=10))
def test_F10_F50_any_labels_read_back_identical(values: dict[Labels, float], scope_id: str) -> None:
    """Newlines, quotes, backslashes, NUL, bidi controls: parsers of both formats give back what was put in."""
    chunk = render_gauge(GAUGE, scope_prefix(Scope("biz", scope_id)), values)
    expected = [
        (GAUGE.name, (("bk_scope_id", scope_id), ("bk_scope_type", "biz"), ("code", code), ("text", text)), value)
        for (code, text), value in values.items()
    ]
    assert chunk.series == len(values)
    for form in Format:
        assert samples(GAUGE, chunk, form) == expected


def test_counters_that_say_the_same_in_two_scopes_exist_once() -> None:
    """Thousands of scopes have had no event yet: each of them holds its labels and its birth, and shares the rest."""

    def chunk(scope: str, born: float) -> CountsChunk:
        tally = Tally(Counts(), born, 0)
        for code in range(20):
            tally.zero(COUNTER.name, (str(code), "some text"))
        rendered = render_counts(COUNTER, scope_prefix(Scope("biz", scope)), tally.freeze(), NEVER_HELD, 0)
        assert isinstance(rendered, CountsChunk)
        return rendered

    one, other = chunk("2", 5.0), chunk("3", 6.5)
    assert one.layout is other.layout
    assert one.values is other.values
    assert (one.births, other.births, one.exemplars) == ("5\n", "6.5\n", "")
    assert sum(map(sys.getsizeof, (one, one.births))) < 200 < one.sizes[0]


def test_rendering_keeps_nothing() -> None:
    """A month of polls renders each gauge a hundred thousand times."""
    before = 0
    for number_of in range(3000):
        render_gauge(GAUGE, PREFIX, {("a", "b"): float(number_of), ("a", "c"): number_of + 0.5})
        if number_of == 1000:
            before = sys.getallocatedblocks()
    assert sys.getallocatedblocks() - before < 100


@given(
    st.lists(st.tuples(labels, st.integers(0, 10**12), st.integers(1, 10**15)), min_size=1, max_size=8),
    st.lists(st.floats(0, 1e9), max_size=8),
)
def test_F50_any_counts_read_back_identical(
    increments: list[tuple[Labels, int, int]], observations: list[float]
) -> None:
    """Counters, histograms, births and exemplars pass both parsers and keep their sums."""
    tally = Tally(Counts(), 1_700_000_000.25, 0)
    for each, by, id in increments:
        tally.inc(COUNTER.name, each, by=by, exemplar=id)
        for value in observations:
            tally.observe(HISTOGRAM.name, each, value, (1.0, 1000.0), exemplar_id=id)
    counts = tally.freeze()
    for form in Format:
        parsed = samples(COUNTER, render_counts(COUNTER, PREFIX, counts, NEVER_HELD, 0), form)
        assert sum(v for name, _, v in parsed if name == COUNTER.name) == sum(by for _, by, _ in increments)
        assert {v for name, _, v in parsed if name == "blueking_a_created"} == (
            {1_700_000_000.25} if form.openmetrics else set()
        )
        chunk = render_counts(HISTOGRAM, PREFIX, counts, NEVER_HELD, 0)
        parsed = samples(HISTOGRAM, chunk, form)
        counted = sum(v for name, _, v in parsed if name == f"{HISTOGRAM.name}_count")
        assert counted == len(observations) * len(increments)
        assert chunk.series == len([name for name, _, _ in parsed if not name.endswith("_created")])
        assert chunk.sizes == (len(chunk.text), len(chunk.openmetrics))
