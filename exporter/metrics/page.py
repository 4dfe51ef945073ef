"""The page: the current series of every owner, ready to be sent.

    Page ── per family ──► _Shelf ── some 64 kB of lines each ──► Piece

Pollers put chunks; a scrape takes a `Snapshot`, a tuple of pieces, and sends it. A piece never changes: when one of its
chunks does, a new piece takes its place, and all others keep what they have compressed. A piece refers to the chunks,
and its lines are written and joined while it is sent.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from operator import attrgetter

from isal import isal_zlib

from exporter.metrics.family import NO_SERIES, Chunk, Family, GaugeChunk
from exporter.metrics.negotiate import Format
from exporter.metrics.render import header, sample_names
from exporter.model import Key

PIECE = 64 * 1024
"""Bytes of classic text that chunks are gathered to: enough to compress well, little enough to do it in one go."""
WRITE = 256 * 1024
"""Bytes that are handed to the socket at once; between two of them the event loop serves others."""
CHANGES = 64
"""Changes that are left for later at most; they take a millisecond together."""
KEPT = 32 * 1024 * 1024
"""Bytes of the largest page whose lines stay in memory after they were sent uncompressed."""

_GZIP_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"
_GZIP_END = b"\x03\x00"  # an empty final block: all blocks before it are not final
_TEXT: Callable[[Chunk], bytes] = attrgetter("text")
_OPENMETRICS: Callable[[Chunk], bytes] = attrgetter("openmetrics")


class Piece:
    """Some lines of one family, immutable. `size` is that of the lines."""

    __slots__ = ("_chunks", "_crc", "_deflated", "_kept", "_lines_of", "size")

    def __init__(self, chunks: tuple[Chunk, ...], size: int, lines_of: Callable[[Chunk], bytes] = _TEXT) -> None:
        self.size = size
        self._chunks = chunks
        self._lines_of = lines_of
        self._kept: bytes | None = None
        self._deflated: bytes | None = None
        self._crc = 0

    @property
    def lines(self) -> Sequence[bytes]:
        """The lines of each chunk, or of all of them."""
        return [self._kept] if self._kept is not None else [*map(self._lines_of, self._chunks)]

    def keep(self) -> None:
        """Write lines that have to be written for each scrape once and for all."""
        if self._kept is None and self._chunks and not isinstance(self._chunks[0], GaugeChunk):
            self._kept = b"".join(self.lines)

    def deflated(self) -> tuple[bytes, int]:
        """Raw deflate ended by a full flush, so that pieces can be put in any order, and the CRC-32 of the lines."""
        if self._deflated is None:
            plain = b"".join(self.lines)
            self._deflated, self._crc = _deflate(plain), isal_zlib.crc32(plain)
        return self._deflated, self._crc


class Snapshot:
    """All pieces of one moment in one format; scrapes that find nothing changed share it."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self.size = sum(piece.size for piece in self.pieces)
        self._crc: int | None = None

    def plain(self, extra: bytes) -> Iterator[bytes]:
        """The lines and `extra` after them. Chunks above `WRITE` bytes are shared by all scrapes; what is joined for
        one scrape is at most `WRITE` bytes and a piece long."""
        gathered: list[bytes] = []
        size = 0
        for piece in self.pieces:
            if self.size <= KEPT:
                piece.keep()
            if piece.size > WRITE:
                yield b"".join(gathered)
                yield from piece.lines
                gathered, size = [], 0
                continue
            gathered += piece.lines
            size += piece.size
            if size >= WRITE:
                yield b"".join(gathered)
                gathered, size = [], 0
        yield b"".join((*gathered, extra))

    def gzip(self, extra: bytes) -> Iterator[bytes]:
        """The same as one gzip member, compressing at most `WRITE` bytes and a piece between two writes."""
        crc, known = 0, self._crc is not None
        gathered = [_GZIP_HEAD]
        size = 0
        for piece in self.pieces:
            deflated, piece_crc = piece.deflated()
            if not known:
                crc = isal_zlib.crc32_combine(crc, piece_crc, piece.size)
            if len(deflated) > WRITE:
                yield b"".join(gathered)
                yield deflated
                gathered, size = [], 0
                continue
            gathered.append(deflated)
            size += len(deflated) if known else piece.size
            if size >= WRITE:
                yield b"".join(gathered)
                gathered, size = [], 0
        if self._crc is None:
            self._crc = crc
        trailer = struct.pack("<II", isal_zlib.crc32(extra, self._crc), (self.size + len(extra)) & 0xFFFFFFFF)
        yield b"".join((*gathered, _deflate(extra), _GZIP_END, trailer))


class Exposition:
    """One answer to a scrape: iterate once over the bytes to send, and let others run in between.

    `size` is the size of the page uncompressed; `length` that of what is sent, None when only sending it will tell.
    """

    def __init__(self, snapshot: Snapshot, extra: bytes, gzip: bool) -> None:
        self.size = snapshot.size + len(extra)
        self.length = None if gzip else self.size
        self._snapshot = snapshot
        self._extra = extra
        self._gzip = gzip

    def __iter__(self) -> Iterator[bytes]:
        return self._snapshot.gzip(self._extra) if self._gzip else self._snapshot.plain(self._extra)


class Page:
    """Chunks by owner and family. `max_series` bounds the page at the cost of detail families (contract 4.4).

    `on_cut(family, n)` is called with the number of series that `max_series` has newly cut. Families without series are
    left out, HELP and TYPE too. An owner is a (collector, scope), or None for series that belong to no scope.
    """

    def __init__(
        self,
        families: Sequence[Family],
        max_series: int = 200_000,
        on_cut: Callable[[str, int], None] = lambda family, n: None,
    ) -> None:
        self._shelves = {family.name: _Shelf(family) for family in families}
        if len(self._shelves) != len(families):
            raise ValueError("two families of the same name")
        self._names: dict[str, set[str]] = {}
        for family in families:
            for name in sample_names(family.name, family.kind):
                self._names.setdefault(name, set()).add(family.name)
        self._max_series = max_series
        self._on_cut = on_cut
        self._owners: dict[Key | None, _Owner] = {}
        self._reserved: dict[Key, int] = {}
        self._later: dict[Key, Callable[[], None]] = {}
        self._snapshots: dict[Format, Snapshot] = {}
        self._settled = True

    def put(self, key: Key | None, chunks: Mapping[str, Chunk]) -> None:
        """Show exactly these chunks (by family name) for this owner; what it showed before is replaced.

        ValueError, and nothing changed, for an unknown family and for one that would repeat another collector's series.
        """
        self.change(key, dict.fromkeys(self._shown(key)) | dict(chunks))

    def change(self, key: Key | None, chunks: Mapping[str, Chunk | None]) -> None:
        """Show these chunks for this owner, and not any more those families that are None; all others stay.

        Raises ValueError as `put` does.
        """
        try:
            shelves = [self._shelves[name] for name in chunks]
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is not a family of this page") from None
        collector = key.collector if key else ""
        for shelf in shelves:
            if collector != shelf.collector:
                shelf.claim(collector)
        owner = self._owners.get(key)
        if owner is None:
            owner = self._owners[key] = _Owner()
        changed = False
        for shelf, chunk in zip(shelves, chunks.values(), strict=True):
            changed |= shelf.put(owner, chunk or NO_SERIES)
        if changed:
            self._snapshots.clear()
            self._settled = False

    def change_later(self, key: Key, change: Callable[[], None]) -> None:
        """Call `change`, which changes what this owner shows, before the page is read the next time.

        Many changes in one go cost a fraction of what each of them costs alone, between other work.
        """
        self._later[key] = change
        if len(self._later) >= CHANGES:
            self._change_now()

    def _change_now(self) -> None:
        while self._later:
            self._later.popitem()[1]()

    def remove(self, key: Key | None) -> None:
        """Show nothing more for this owner."""
        if key is not None:
            self._later.pop(key, None)
        self.put(key, {})
        self._owners.pop(key, None)
        if key is not None:
            self.release(key)

    def series(self, key: Key | None) -> int:
        """How many series the owner shows, those that are cut included."""
        self._change_now()
        owner = self._owners.get(key)
        return sum(shelf.chunk(owner).series for shelf in self._shelves.values()) if owner else 0

    @property
    def _lasting(self) -> int:
        """Series that are never cut."""
        return sum(shelf.series for shelf in self._shelves.values() if not shelf.family.detail)

    def _shown(self, key: Key | None) -> list[str]:
        """The families that this owner shows."""
        owner = self._owners.get(key)
        return [name for name, shelf in self._shelves.items() if shelf.has(owner)] if owner else []

    def limit(self, max_series: int) -> None:
        """Bound the page by another number of series from now on."""
        if max_series != self._max_series:
            self._max_series = max_series
            self._snapshots.clear()
            self._settled = False

    def reserve(self, key: Key) -> int:
        """How many series with new label values the owner may add, until it calls `release`.

        It is half of what is free, so that all who ask at once fit in; it may be negative. A tenth of the page is left
        for series that no platform chooses.
        """
        self._reserved.pop(key, None)
        taken = self._lasting + sum(self._reserved.values())
        room = self._max_series - self._max_series // 10 - taken
        self._reserved[key] = max(0, room // 2)
        return room // 2

    def release(self, key: Key) -> None:
        """Give back what was reserved; what was added by then is on the page."""
        self._reserved.pop(key, None)

    def counts(self) -> dict[str, int]:
        """Series shown, by family; families without series are left out."""
        self._settle()
        return {name: shelf.shown for name, shelf in self._shelves.items() if shelf.shown}

    def snapshot(self, form: Format, names: Set[str] | None = None) -> Snapshot:
        """What is shown now. `names` selects families by any of their sample or family names; None selects all."""
        self._settle()
        if names is not None:
            wanted = {family for name in names for family in self._names.get(name, ())}
            return Snapshot([p for n, shelf in self._shelves.items() if n in wanted for p in shelf.pieces(form)])
        if form not in self._snapshots:
            self._snapshots[form] = Snapshot([p for shelf in self._shelves.values() for p in shelf.pieces(form)])
        return self._snapshots[form]

    def exposition(
        self, form: Format, names: Set[str] | None = None, extra: bytes = b"", gzip: bool = False
    ) -> Exposition:
        """A whole answer: the page, the families in `extra` (complete lines), and the end mark of OpenMetrics."""
        end = b"# EOF\n" if form.openmetrics else b""
        return Exposition(self.snapshot(form, names), extra + end, gzip)

    def _settle(self) -> None:
        """Make the changes that were left for later, and find the cut that `max_series` asks for: the same number of
        series for each owner and detail family."""
        self._change_now()
        if self._settled:
            return
        self._settled = True
        details = [shelf for shelf in self._shelves.values() if shelf.family.detail]
        budget = self._max_series - self._lasting
        limit = _water_level(sum((shelf.sizes for shelf in details), Counter()), budget)
        for shelf in details:
            if dropped := shelf.cut(limit):
                self._on_cut(shelf.family.name, dropped)


def _deflate(plain: bytes) -> bytes:
    # A third of the time that zlib takes at its fastest, and smaller.
    stream = isal_zlib.compressobj(1, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
    return stream.compress(plain) + stream.flush(isal_zlib.Z_FULL_FLUSH)


def _water_level(sizes: Mapping[int, int], budget: int) -> int | None:
    """The greatest number to cut chunks to so that all of them fit the budget; None when they fit uncut.

    `sizes`: how many chunks there are of each size.
    """
    level, chunks, budget = 0, sum(sizes.values()), max(budget, 0)
    for size in sorted(sizes):
        if (size - level) * chunks > budget:
            return level + budget // chunks
        budget -= (size - level) * chunks
        chunks -= sizes[size]
        level = size
    return None


class _Owner:
    """Stands for an owner on the shelves: it is found by identity, which is much faster than by its key."""

    __slots__ = ()


class _Group:
    """Neighbouring chunks of one family and the pieces made of them. `size` is that of their classic text."""

    __slots__ = ("chunks", "openmetrics_size", "pieces", "size")

    def __init__(self) -> None:
        self.chunks: dict[_Owner, Chunk] = {}
        self.size = 0
        self.openmetrics_size = 0
        self.pieces: dict[Format, Piece] = {}

    def add(self, owner: _Owner, chunk: Chunk) -> None:
        """Set the chunk of an owner that has none here. Pieces made before are discarded."""
        self.chunks[owner] = chunk
        self._grow(chunk, 1)

    def replace(self, owner: _Owner, chunk: Chunk) -> None:
        """Set the chunk of an owner that has one here."""
        self._grow(self.chunks[owner], -1)
        self.chunks[owner] = chunk
        self._grow(chunk, 1)

    def remove(self, owner: _Owner) -> None:
        """Take the chunk of an owner away."""
        self._grow(self.chunks.pop(owner), -1)

    def _grow(self, chunk: Chunk, sign: int) -> None:
        size, openmetrics_size = chunk.sizes
        self.size += sign * size
        self.openmetrics_size += sign * openmetrics_size
        self.pieces.clear()

    def piece(self, form: Format, limit: int | None) -> Piece:
        piece = self.pieces.get(form)
        if piece is None:
            chunks = tuple(self.chunks.values())
            if limit is not None:
                chunks = tuple(GaugeChunk(_first(chunk.text, limit), min(chunk.series, limit)) for chunk in chunks)
                piece = Piece(chunks, sum(len(chunk.text) for chunk in chunks))
            elif form.openmetrics:
                piece = Piece(chunks, self.openmetrics_size, _OPENMETRICS)
            else:
                piece = Piece(chunks, self.size)
            self.pieces[form] = piece
        return piece


def _piece_of(lines: bytes) -> Piece:
    return Piece((GaugeChunk(lines, 0),), len(lines))


def _first(text: bytes, count: int) -> bytes:
    """The first `count` lines, each ended."""
    lines = text.split(b"\n", count)
    return text if len(lines) <= count else text[: len(text) - len(lines[count])]


class _Shelf:
    """One family: its chunks, gathered in groups of neighbours, each group with the piece made of it."""

    def __init__(self, family: Family) -> None:
        if (family.kind == "counter") != family.name.endswith("_total"):
            raise ValueError(f"{family.name}: counters and only counters end in _total")
        self.family = family
        self.series = 0
        self.sizes: Counter[int] = Counter()
        """How many chunks there are of so many series; only of a detail family, which may be cut."""
        self._limit: int | None = None
        self._dropped: dict[_Owner, frozenset[int]] = {}
        self._cut_dirty: set[_Owner] = set()
        self._groups: list[_Group] = []
        self._group_of: dict[_Owner, _Group] = {}
        self.collector: str | None = None
        """The newest one that has shown this family, `""` for series of no collector."""
        self._headers = {
            form: _piece_of(header(family.name, family.kind, family.help, form.openmetrics).encode()) for form in Format
        }

    @property
    def shown(self) -> int:
        return self.series - sum(map(len, self._dropped.values()))

    def claim(self, collector: str) -> None:
        """Let a collector show this family. Without a label `collector`, two would write the same series of a scope."""
        if not self.family.per_collector and "collector" not in self.family.labels and self.collector is not None:
            raise ValueError(f"{self.family.name} of {collector!r} repeats the series of collector {self.collector!r}")
        self.collector = collector

    def has(self, owner: _Owner) -> bool:
        """Whether the owner shows series of this family."""
        return owner in self._group_of

    def chunk(self, owner: _Owner) -> Chunk:
        """The chunk of an owner, `NO_SERIES` if it has none."""
        group = self._group_of.get(owner)
        return group.chunks[owner] if group else NO_SERIES

    def put(self, owner: _Owner, chunk: Chunk) -> bool:
        """Show this chunk; one without series is no chunk. Whether it is another one than before."""
        group = self._group_of.get(owner)
        old = NO_SERIES if group is None else group.chunks[owner]
        series, before = chunk.series, old.series
        if chunk == old or not (series or before):
            return False
        if group is None:
            self._add(owner, chunk)
        elif series:
            group.replace(owner, chunk)
            if group.size > 2 * PIECE and len(group.chunks) > 1:
                # It is too large for a piece: the chunk that grew moves to the group for new chunks.
                self._remove(owner, group)
                self._add(owner, chunk)
        else:
            self._remove(owner, group)
        self.series += series - before
        if self.family.detail:
            if before:
                self.sizes[before] -= 1
            if series:
                self.sizes[series] += 1
            self._cut_dirty.add(owner)
        return True

    def _add(self, owner: _Owner, chunk: Chunk) -> None:
        if not self._groups or self._groups[-1].size >= PIECE:
            self._groups.append(_Group())
        group = self._group_of[owner] = self._groups[-1]
        group.add(owner, chunk)

    def _remove(self, owner: _Owner, group: _Group) -> None:
        group.remove(owner)
        del self._group_of[owner]
        if not group.chunks:
            self._groups.remove(group)

    def pieces(self, form: Format) -> list[Piece]:
        """Header and lines; nothing when there are no lines."""
        head = self._headers[form]
        if self.family.kind == "gauge":
            form = Format.TEXT  # a gauge's lines are the same in both: build and compress them once
        pieces = [group.piece(form, self._limit) for group in self._groups]
        pieces = [piece for piece in pieces if piece.size]
        return [head, *pieces] if pieces else []

    def cut(self, limit: int | None) -> int:
        """Keep the first `limit` series of each chunk; how many series are now cut that were not before."""
        owners: Set[_Owner] = self._cut_dirty
        if limit != self._limit:
            owners = self._group_of.keys() | self._dropped.keys() if limit is not None else set(self._dropped)
            for each in self._groups:
                each.pieces.clear()
        entered = 0
        for owner in owners:
            group = self._group_of.get(owner)
            before = self._dropped.pop(owner, frozenset())
            if group is not None and limit is not None and group.chunks[owner].series > limit:
                lines = group.chunks[owner].text.split(b"\n")[limit:-1]
                now = self._dropped[owner] = frozenset(hash(line.rpartition(b" ")[0]) for line in lines)
                entered += len(now - before)
        self._limit = limit
        self._cut_dirty = set()
        return entered
