"""Text to nodes: strict YAML, every node with its place.

Scalars follow the YAML 1.2 core schema, not YAML 1.1 as the library does: `no` is text, `012` is 12, `1:30` is text.
Duplicate keys, tags, merge keys, a second document and aliases that repeat too much are problems.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import yaml

from exporter.config.files import read_file, reason
from exporter.errors import ConfigError, Problem

MAX_BYTES = 16 * 2**20
"""Size of a file: that of 30,000 scopes with several overrides each."""
MAX_DEPTH = 24
MAX_VALUES = 1_000_000
"""Values that are written in a file."""
MAX_REPEATED = 300_000
"""Values that aliases may repeat."""

_LOADER: type[yaml.CSafeLoader | yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")
_INT = re.compile(r"[-+]?[0-9]{1,64}|0o[0-7]{1,64}|0x[0-9a-fA-F]{1,64}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where a value stands. Line and column count from 1; line 0: given by the flag or variable `file`.

    `directory` is what relative paths start at.
    """

    file: str
    line: int
    column: int
    directory: Path

    def problem(self, path: str, message: str) -> Problem:
        return Problem(self.file, self.line, self.column, path, message)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Scalar(msgspec.Struct, frozen=True, gc=False):
    """One value. `literal`: it does not come from a file, so `${VAR}` in it means nothing."""

    place: Place
    value: str | int | float | bool | None
    literal: bool = False


class Sequence(msgspec.Struct, frozen=True, gc=False):
    place: Place
    items: tuple[Node, ...]


class Mapping(msgspec.Struct, frozen=True, gc=False):
    place: Place
    entries: tuple[tuple[str, Place, Node], ...]

    def get(self, key: str) -> Node | None:
        return next((node for name, _, node in self.entries if name == key), None)

    def replace(self, key: str, node: Node) -> Mapping:
        """The same mapping with `key` given once, as `node`."""
        others = tuple(entry for entry in self.entries if entry[0] != key)
        return Mapping(self.place, (*others, (key, node.place, node)))


Node = Scalar | Sequence | Mapping


def read(path: Path) -> tuple[Node, list[Problem], bytes]:
    """The root of a file, the problems found, and what was read. Raises ConfigError for a file that cannot be read or
    is no YAML."""
    directory = Path(os.path.abspath(path.parent))
    try:
        data = read_file(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        here = Place(str(path), 1, 1, directory)
        raise ConfigError([here.problem("", f"cannot be read: {reason(error)}")]) from None
    root, problems = parse(data, str(path), directory)
    if root is None:
        raise ConfigError(problems)
    return root, problems, data


def parse(data: bytes, file: str, directory: Path) -> tuple[Node | None, list[Problem]]:
    """The root of a YAML document and every problem found; no root when the text is no YAML. Never raises."""
    reader = _Composer(file, directory)
    try:
        return reader.document(data), reader.problems
    except _Broken as broken:
        return None, [*reader.problems, broken.problem]


def find(root: Node, path: str) -> tuple[Node, bool]:
    """The node at a dotted path and True, or the nearest one around it and False."""
    node = root
    for part in re.findall(r"[^.\[\]]+", path):
        child: Node | None = None
        if isinstance(node, Mapping):
            child = node.get(part)
        elif isinstance(node, Sequence) and part.isdecimal() and int(part) < len(node.items):
            child = node.items[int(part)]
        if child is None:
            return node, False
        node = child
    return node, True


def clean(text: str, limit: int = 40) -> str:
    """Foreign text for a message: one line, at most `limit` characters."""
    if text.isprintable() and len(text) <= limit:
        return text
    text = "".join(character if character.isprintable() else "?" for character in text[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def join(path: str, key: str) -> str:
    """The dotted path of a key below `path`."""
    return f"{path}.{clean(key)}" if path else clean(key)


class _Broken(Exception):
    """The document cannot be read past this point."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem


class _Composer:
    """Builds nodes from the events of the YAML parser, so that depth, size and references are bounded on the way."""

    def __init__(self, file: str, directory: Path) -> None:
        self.file, self.directory = file, directory
        self.problems: list[Problem] = []
        self.anchors: dict[str, tuple[Node, int] | None] = {}
        self.size = self.repeated = 0

    def document(self, data: bytes) -> Node:
        if len(data) > MAX_BYTES:
            raise self.broken(1, 1, f"larger than {MAX_BYTES // 2**20} MiB")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            before = data[: error.start]
            column = len(before.rpartition(b"\n")[2].decode(errors="replace")) + 1
            raise self.broken(before.count(b"\n") + 1, column, "not UTF-8 text") from None
        if found := _FORBIDDEN.search(text):
            before_text = text[: found.start()]
            line, column = before_text.count("\n") + 1, found.start() - before_text.rfind("\n")
            raise self.broken(line, column, f"character U+{ord(found[0]):04X} is not allowed in YAML")
        events = yaml.parse(text, Loader=_LOADER)
        try:
            return self.root(events)
        except yaml.YAMLError as error:
            raise self.syntax(error, text) from None

    def root(self, events: Iterator[yaml.Event]) -> Node:
        node: Node | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if node is not None:
                    raise _Broken(self.place(event).problem("", "a second document; only one is allowed"))
                self.anchors.clear()
            elif not isinstance(event, yaml.StreamStartEvent | yaml.StreamEndEvent | yaml.DocumentEndEvent):
                node = self.node(event, events, "", 0)
        return node if node is not None else Scalar(Place(self.file, 1, 1, self.directory), None)

    def node(self, event: yaml.Event, events: Iterator[yaml.Event], path: str, depth: int) -> Node:
        place = self.place(event)
        self.size += 1
        if depth > MAX_DEPTH:
            raise _Broken(place.problem("", f"nested deeper than {MAX_DEPTH} levels"))
        if isinstance(event, yaml.AliasEvent) and event.anchor:
            node, size = self.alias(event.anchor, place, path)
            self.size += size
            self.repeated += size
        else:
            assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
            before = self.size
            if event.anchor:
                self.anchors[event.anchor] = None
            node = self.content(event, place, events, path, depth)
            if event.anchor:
                self.anchors[event.anchor] = node, self.size - before
        if self.repeated > MAX_REPEATED or self.size - self.repeated > MAX_VALUES:
            limit = MAX_REPEATED if self.repeated > MAX_REPEATED else MAX_VALUES
            raise _Broken(place.problem("", f"more than {limit} values"))
        return node

    def alias(self, anchor: str, place: Place, path: str) -> tuple[Node, int]:
        # An unquoted secret that starts with * is read as an alias, so its name is not shown.
        if anchor not in self.anchors:
            raise _Broken(place.problem(path, "an alias without its anchor; quote text that starts with *"))
        found = self.anchors[anchor]
        if found is None:
            raise _Broken(place.problem(path, "an alias inside its own anchor"))
        return found

    def content(self, event: yaml.Event, place: Place, events: Iterator[yaml.Event], path: str, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            if not event.tag:
                return Scalar(place, resolve(event.value) if event.implicit[0] else event.value)
            self.tag(event.tag, "str", place, path)
            return Scalar(place, event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            self.tag(event.tag, "seq", place, path)
            items: list[Node] = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(self.node(event, events, f"{path}[{len(items)}]", depth + 1))
            return Sequence(place, tuple(items))
        assert isinstance(event, yaml.MappingStartEvent)
        self.tag(event.tag, "map", place, path)
        entries: dict[str, tuple[str, Place, Node]] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            at = self.place(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise _Broken(at.problem(path, "want plain text as a key"))
            key = event.value
            below = join(path, key)
            value = self.node(next(events), events, below, depth + 1)
            if key in entries:
                self.problems.append(at.problem(below, f"given twice, first at {entries[key][1]}"))
            elif key == "<<":
                self.problems.append(at.problem(below, "merge keys are not part of YAML 1.2"))
            else:
                entries[key] = key, at, value
        return Mapping(place, tuple(entries.values()))

    def tag(self, tag: str | None, allowed: str, place: Place, path: str) -> None:
        if tag and tag not in ("!", f"tag:yaml.org,2002:{allowed}"):
            self.problems.append(place.problem(path, "tags are not allowed; quote text that starts with !"))

    def place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        assert mark is not None
        return Place(self.file, mark.line + 1, mark.column + 1, self.directory)

    def broken(self, line: int, column: int, message: str) -> _Broken:
        return _Broken(Problem(self.file, line, column, "", message))

    def syntax(self, error: yaml.YAMLError, text: str) -> _Broken:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        lines = text.split("\n")
        source = lines[line - 1] if line <= len(lines) else ""
        if "\t" in source[: len(source) - len(source.lstrip())]:
            return self.broken(line, 1, "a tab indents this line; YAML wants spaces")
        # The library quotes names of tags and anchors, which may be an unquoted secret.
        problem = re.sub(r" ['\"][^'\"<]{2,}['\"]", "", getattr(error, "problem", None) or "not YAML")
        hint = "; inside { } and [ ] quote text that holds ${...}" if "${" in source else ""
        return self.broken(line, column, f"YAML syntax: {clean(problem, 120)}{hint}")


def resolve(text: str) -> str | int | float | bool | None:
    """A plain scalar in the YAML 1.2 core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
