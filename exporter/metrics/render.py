"""Sample lines: one family of one owner becomes a chunk when its values change.

The lines of gauges are written then, and scrapes pass them on. Counters are many and seldom change, and with `_created`
OpenMetrics says twice as much: of them a chunk holds the values, and their lines are written for a scrape, which keeps
the pieces that do not change.

Both formats write names, labels and values the same way. They differ in HELP and TYPE, and in what OpenMetrics has on
top: `_created` samples and exemplars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from operator import itemgetter
from sys import intern

import msgspec

from exporter.metrics.counts import held
from exporter.metrics.family import (
    NO_SERIES,
    Chunk,
    Count,
    Counts,
    Distribution,
    Exemplar,
    Family,
    GaugeChunk,
    Labels,
)
from exporter.model import Scope

_json_lines = msgspec.json.Encoder().encode_lines


def scope_prefix(scope: Scope, collector: str | None = None) -> str:
    """The owner's part of the label text; with `collector` for families that have this label."""
    text = f'bk_scope_type="{_escape(scope.bk_scope_type)}",bk_scope_id="{_escape(scope.bk_scope_id)}"'
    return text if collector is None else f'collector="{_escape(collector)}",{text}'


def render_gauge(family: Family, prefix: str, samples: Mapping[Labels, float]) -> GaugeChunk:
    """One line per sample, in the order of `samples`. A NaN is a value nobody knows: it gives no line."""
    values = _lines([*samples.values()])
    if "nan" in values:
        samples = {labels: value for labels, value in samples.items() if value == value}
        values = _lines([*samples.values()])
    parts = [_head(family, family.name, prefix)] * (3 * len(samples))
    parts[1::3] = _tails(family.labels).row(family.name, samples)
    parts[2::3] = values.splitlines(keepends=True)
    text = encode(parts)
    return GaugeChunk(text, len(samples))


def render_value(family: Family, prefix: str, value: float, labels: Labels = ()) -> GaugeChunk:
    """The only line of a gauge; see `render_gauge`."""
    if labels:
        prefix = _join(prefix, label_text(family.labels, labels))
    return GaugeChunk(encode((f"{family.name}{_braced(prefix)} {number(value)}\n",)), 1)


def render_counts(family: Family, prefix: str, counts: Counts, now: float, hold: float) -> Chunk:
    """The family's counters or histograms. `now` and `hold` (seconds) decide which are still exposed as 0.

    Exemplars of what is exposed as 0 are not shown; `_created` is the true birth.
    """
    values: list[float] = []
    exemplars: list[Exemplar | None] = []
    bounds: list[tuple[float, ...]] = []
    series: Mapping[Labels, Count | Distribution]
    if family.kind == "counter":
        series = counters = counts.counters.get(family.name, {})
        for count in counters.values():
            hidden = count.shown > now and held(count.shown, now, hold)
            values.append(0 if hidden else count.value)
            exemplars.append(None if hidden else count.exemplar)
    else:
        series = histograms = counts.histograms.get(family.name, {})
        for one in histograms.values():
            hidden = held(one.shown, now, hold)
            lines = [*accumulate(one.counts), one.sum, sum(one.counts)]
            values += [0] * len(lines) if hidden else lines
            exemplars += [None] * len(lines) if hidden else [*one.exemplars, None, None]
            bounds.append(one.bounds)
    if not series:
        return NO_SERIES
    births = [one.born for one in series.values()]
    # Most scopes have the same values, and the series of a scope the same birth: each text exists once.
    return CountsChunk(
        _layout(family.name, family.kind, family.labels, bool(prefix), tuple(series), tuple(bounds)),
        prefix,
        intern(_lines(values)),
        _birth(births[0]) if births.count(births[0]) == len(births) else intern("".join(map(_birth, births))),
        "".join(["\n" if one is None else _exemplar(one) for one in exemplars]) if any(exemplars) else "",
    )


@lru_cache(maxsize=16)
def _birth(born: float) -> str:
    """As the end of a line. All families of a scope are usually born with the scope."""
    return f"{number(born)}\n"


class CountsChunk(msgspec.Struct, frozen=True, gc=False):
    """A `Chunk` of counters or histograms: what differs from those of other owners. Its lines are made when they are
    sent.

    `prefix`: labels of the owner. `values`: of all lines, `births`: of all series or one for all of them, each ended by
    a newline; `exemplars`: of all lines, each up to the end of its line, or "" if there are none.
    """

    layout: _Layout
    prefix: str
    values: str
    births: str
    exemplars: str

    @property
    def series(self) -> int:
        return self.layout.lines

    @property
    def sizes(self) -> tuple[int, int]:
        layout, prefix, values, births = self.layout, _bytes(self.prefix), len(self.values), len(self.births)
        if self.births.count("\n") == 1:
            births *= layout.births
        exemplars = len(self.exemplars) - layout.lines if self.exemplars else 0
        return (
            layout.size + layout.lines * prefix + values,
            layout.openmetrics_size + (layout.lines + layout.births) * prefix + values + births + exemplars,
        )

    @property
    def text(self) -> bytes:
        return self._filled(self.layout.text, self.values.splitlines(keepends=True))

    @property
    def openmetrics(self) -> bytes:
        values, births = self.values.splitlines(keepends=True), self.births.splitlines(keepends=True)
        if self.exemplars:
            ends = self.exemplars.splitlines(keepends=True)
            values = [value[:-1] + end for value, end in zip(values, ends, strict=True)]
        if len(births) == 1:
            births *= self.layout.births
        return self._filled(self.layout.openmetrics, self.layout.in_openmetrics([*values, *births]))

    def _filled(self, parts: Sequence[str], values: Sequence[str]) -> bytes:
        filled = list(parts)
        filled[1::4] = [self.prefix] * len(values)
        filled[3::4] = values
        return encode(filled)


class _Layout:
    """The lines of a family with certain label sets, the same for all owners that have these.

    `text` and `openmetrics` have four parts for each line: what comes before the labels of the owner, these labels,
    what comes between them and the value, the value with the end of the line. Labels and value are empty here. The
    sizes are in bytes. `lines` and `births` are the number of values in the text and of `_created` samples.
    `in_openmetrics` picks the values of the lines of OpenMetrics from those of the text and the births after them.
    """

    __slots__ = ("births", "in_openmetrics", "lines", "openmetrics", "openmetrics_size", "size", "text")

    def __init__(self, series: Sequence[Sequence[tuple[str, str]]], created: Sequence[tuple[str, str]]) -> None:
        """`series`: for each series its lines, `created`: its `_created` line; both as what comes before and after the
        labels of the owner."""
        lines = [line for one in series for line in one]
        all_lines: list[tuple[str, str]] = []
        order: list[int] = []
        for number_of, (one, birth) in enumerate(zip(series, created, strict=True)):
            first = len(order) - number_of
            order += (*range(first, first + len(one)), len(lines) + number_of)
            all_lines += (*one, birth)
        self.text = _parts(lines)
        self.openmetrics = _parts(all_lines)
        self.size = len(encode(self.text))
        self.openmetrics_size = len(encode(self.openmetrics))
        self.lines, self.births = len(lines), len(created)
        self.in_openmetrics: Callable[[list[str]], Sequence[str]] = itemgetter(*order) if len(order) > 1 else list


def _parts(lines: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(part for before, after in lines for part in (before, "", after, ""))


@lru_cache(maxsize=4096)
def _layout(
    name: str,
    kind: str,
    label_names: tuple[str, ...],
    owned: bool,
    series: tuple[Labels, ...],
    bounds: tuple[tuple[float, ...], ...],
) -> _Layout:
    """`owned`: there are labels of an owner. `series`: their labels. `bounds`: of each, if they are histograms."""

    def line(sample: str, labels: str) -> tuple[str, str]:
        before, after = (f"{sample}{{", "} ") if labels or owned else (sample, " ")
        # The same texts are in the layouts of other label sets.
        return intern(before), intern(f"{',' if owned and labels else ''}{labels}{after}")

    created_name = f"{name.removesuffix('_total')}_created"
    lines, created = [], []
    for number_of, values in enumerate(series):
        own = label_text(label_names, values)
        created.append(line(created_name, own))
        if kind == "counter":
            lines.append([line(name, own)])
            continue
        les = (*(repr(float(bound)) for bound in bounds[number_of]), "+Inf")
        buckets = [line(f"{name}_bucket", _join(own, f'le="{le}"')) for le in les]
        lines.append([*buckets, line(f"{name}_sum", own), line(f"{name}_count", own)])
    return _Layout(lines, created)


def header(name: str, kind: str, text: str, openmetrics: bool) -> str:
    """HELP and TYPE of a family, given by its classic name. OpenMetrics names a counter without `_total`."""
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    if openmetrics:
        text = text.replace('"', r"\"")
        if kind == "counter":
            name = name.removesuffix("_total")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def sample_names(family: str, kind: str) -> set[str]:
    """Every name under which a family, given by its classic name, or one of its samples appears in either format."""
    if kind == "counter":
        base = family.removesuffix("_total")
        return {family, base, f"{base}_created"}
    if kind == "histogram":
        return {family, *(f"{family}_{suffix}" for suffix in ("bucket", "sum", "count", "created"))}
    return {family}


def _lines(values: list[float]) -> str:
    """Each number, as `number` writes it, on a line of its own."""
    # All in one go: a call for each would cost twice as much. It has to be a list: of any other collection msgspec 0.22
    # never frees the iterator (findings/msgspec-encode-lines-iterator.sh).
    text = _json_lines(values).decode()
    # JSON knows no NaN and no infinity, and writes signs, exponents and very small numbers in its own way.
    if "n" in text or "-" in text or "e" in text or "0.0000" in text:
        return "".join([f"{number(value)}\n" for value in values])
    return text.replace(".0\n", "\n")


def number(value: float) -> str:
    """The shortest text that every parser reads back as the same float; whole numbers have no fraction."""
    if -1e16 < value < 1e16:
        whole = int(value)
        return str(whole) if whole == value else repr(value)
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def _exemplar(exemplar: Exemplar) -> str:
    """What ends a line of OpenMetrics."""
    at = number(exemplar.timestamp)
    return f' # {{job_instance_id="{exemplar.job_instance_id}"}} {number(exemplar.value)} {at}\n'


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _join(left: str, right: str) -> str:
    return f"{left},{right}" if left and right else left or right


def _head(family: Family, name: str, prefix: str) -> str:
    """What the lines of one family and owner begin with, up to where their own labels begin if it has such."""
    if not family.labels:
        return name + _braced(prefix)
    return f"{name}{{{prefix}," if prefix else f"{name}{{"


class _Tails(dict[Labels, str]):
    """What stands between `_head` and the value, by label values.

    The same few label sets recur in thousands of scopes; escaping them each time costs ten times as much.
    """

    MOST = 8192

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self._names = names
        self._rows: dict[str, tuple[tuple[Labels, ...], list[str]]] = {}

    def __missing__(self, labels: Labels) -> str:
        text = label_text(self._names, labels)
        tail = f"{text}}} " if text else " "
        if len(self) >= self.MOST:
            self.clear()
        self[labels] = tail
        return tail

    def row(self, family: str, samples: Iterable[Labels]) -> list[str]:
        """The tails of all samples of a family and owner."""
        # Most scopes show the same label sets as the one before, and comparing is cheaper than looking up.
        labels = tuple(samples)
        before, row = self._rows.get(family, ((), []))
        if labels != before:
            row = [self[each] for each in labels]
            if len(row) <= self.MOST:
                self._rows[family] = labels, row
        return row


_tails = cache(_Tails)


def label_text(names: Iterable[str], values: Iterable[str]) -> str:
    """`name="value"` pairs, escaped and joined by commas."""
    return ",".join([f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True)])


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(encode((text,)))


def encode(lines: Iterable[str]) -> bytes:
    """Lines as they are sent."""
    # Labels are cleaned at the border; should a lone surrogate slip through, one "?" is better than no page at all.
    return "".join(lines).encode("utf-8", "replace")
