"""Sample lines: one family of one owner becomes bytes, once, when its values change. Scrapes only pass bytes on.

Both formats write names, labels and values the same way. They differ in HELP and TYPE, and in what OpenMetrics has on
top: `_created` samples and exemplars.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import accumulate

import msgspec

from exporter.metrics.counts import held
from exporter.metrics.family import SCOPE_LABELS, Chunk, Counts, Distribution, Exemplar, Family, Labels
from exporter.model import Scope

_json_lines = msgspec.json.Encoder().encode_lines


def scope_prefix(scope: Scope, collector: str | None = None) -> str:
    """The owner's part of the label text; with `collector` for families that have this label."""
    text = label_text(SCOPE_LABELS, (scope.bk_scope_type, scope.bk_scope_id))
    return text if collector is None else _join(label_text(("collector",), (collector,)), text)


def render_gauge(family: Family, prefix: str, samples: Mapping[Labels, float]) -> Chunk:
    """One line per sample, in the order of `samples`. A NaN is a value nobody knows: it gives no line."""
    # All values in one go: a call and a line for each would cost twice as much. It has to be a list: of any other
    # collection msgspec 0.22 never frees the iterator (findings/msgspec-encode-lines-iterator.sh).
    values = _json_lines(list(samples.values())).decode()
    # JSON knows no NaN and no infinity, and writes signs, exponents and very small numbers in its own way.
    if "n" in values or "-" in values or "e" in values or "0.0000" in values:
        samples = {labels: value for labels, value in samples.items() if value == value}
        values = "".join([f"{number(value)}\n" for value in samples.values()])
    parts = [_head(family, family.name, prefix)] * (3 * len(samples))
    parts[1::3] = _tails(family.labels).row(family.name, samples)
    parts[2::3] = values.replace(".0\n", "\n").splitlines(keepends=True)
    text = encode(parts)
    return Chunk(text, text, len(samples))


def render_counts(family: Family, prefix: str, counts: Counts, now: float, hold: float) -> Chunk:
    """The family's counters or histograms. `now` and `hold` (seconds) decide which are still exposed as 0.

    Exemplars of what is exposed as 0 are not shown; `_created` is the true birth.
    """
    text: list[str] = []
    openmetrics: list[str] = []
    series = 0
    if family.kind == "counter":
        tails = _tails(family.labels)
        head = _head(family, family.name, prefix)
        created = _head(family, family.name.removesuffix("_total") + "_created", prefix)
        for labels, count in counts.counters.get(family.name, {}).items():
            tail = tails[labels]
            hidden = held(count.shown, now, hold)
            line = f"{head}{tail}{0 if hidden else number(count.value)}"
            text.append(f"{line}\n")
            openmetrics.append(
                f"{line}{'' if hidden else _exemplar(count.exemplar)}\n{created}{tail}{number(count.born)}\n"
            )
            series += 1
    else:
        for labels, distribution in counts.histograms.get(family.name, {}).items():
            own = _join(prefix, label_text(family.labels, labels))
            for line, exemplar in _histogram(family.name, own, distribution, held(distribution.shown, now, hold)):
                text.append(f"{line}\n")
                openmetrics.append(f"{line}{exemplar}\n")
                series += 1
            openmetrics.append(f"{family.name}_created{_braced(own)} {number(distribution.born)}\n")
    return Chunk(encode(text), encode(openmetrics), series)


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


def number(value: float) -> str:
    """The shortest text that every parser reads back as the same float; whole numbers have no fraction."""
    if -1e16 < value < 1e16:
        whole = int(value)
        return str(whole) if whole == value else repr(value)
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def _histogram(name: str, own: str, distribution: Distribution, hidden: bool) -> Iterator[tuple[str, str]]:
    """Its lines without line end, each with the exemplar that OpenMetrics adds."""
    counts = (0,) * len(distribution.counts) if hidden else distribution.counts
    exemplars = (None,) * len(distribution.counts) if hidden else distribution.exemplars
    les = (*(repr(float(bound)) for bound in distribution.bounds), "+Inf")
    for le, count, exemplar in zip(les, accumulate(counts), exemplars, strict=True):
        label = _join(own, f'le="{le}"')
        yield f"{name}_bucket{{{label}}} {count}", _exemplar(exemplar)
    braces = _braced(own)
    yield f"{name}_sum{braces} {'0' if hidden else number(distribution.sum)}", ""
    yield f"{name}_count{braces} {sum(counts)}", ""


def _exemplar(exemplar: Exemplar | None) -> str:
    if exemplar is None:
        return ""
    return f' # {{job_instance_id="{exemplar.job_instance_id}"}} {number(exemplar.value)} {number(exemplar.timestamp)}'


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


def encode(lines: Iterable[str]) -> bytes:
    """Lines as they are sent."""
    # Labels are cleaned at the border; should a lone surrogate slip through, one "?" is better than no page at all.
    return "".join(lines).encode("utf-8", "replace")
