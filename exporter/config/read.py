"""Nodes to typed values, as the keys of schema.py say; every problem is kept and reading goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping as Map
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from exporter.config.schema import Items, Key, default, keys
from exporter.config.values import Boolean, Kind, SecretFile, SecretText, Wrong, did_you_mean
from exporter.config.yaml import Mapping, Node, Place, Scalar, Sequence, clean, join
from exporter.errors import Problem

T = TypeVar("T", bound=msgspec.Struct)

_VARIABLE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


class Reader:
    """Reads one file.

    `places`: where each dotted path stands; `problems`: what was wrong; `secret_files`: the secrets that it names.
    """

    def __init__(self, environ: Map[str, str]) -> None:
        self.environ = environ
        self.places: dict[str, Place] = {}
        self.problems: list[Problem] = []
        self.secret_files: list[Path] = []

    def problem(self, path: str, message: str) -> None:
        """Add a problem about `path`, shown where it is written or, if it is not, where its nearest parent is."""
        self.problems.append(self.place(path).problem(path, message))

    def place(self, path: str) -> Place:
        """Where `path` or its nearest parent is written."""
        while path and path not in self.places:
            path = re.sub(r"(?:^|\.)[^.\[]*$|\[[0-9]+\]$", "", path)
        return self.places[path]

    def sound(self, path: str) -> bool:
        """Whether nothing at or below `path` was wrong, so that a rule about it would not repeat a problem."""
        return not any(p.path == path or p.path.startswith((f"{path}.", f"{path}[")) for p in self.problems)

    def struct(self, node: Node, type_: type[T], path: str, base: T | None = None) -> T | None:
        """The value of a mapping; None when a required key is absent or wrong.

        Other keys that are absent or wrong take their value from `base`, else from the defaults.
        """
        self.places[path] = node.place
        if not isinstance(node, Mapping):
            hint = " (leave the key out to take the defaults)" if _null(node) and path else ""
            # Where secrets live, the text may be one that lacks a space after its colon.
            what = "a single value" if path.split(".")[0] == "blueking" and not _null(node) else shown(node)
            self.wrong(node, path, f"want a mapping, not {what}{hint}")
            return None
        known = keys(type_)
        given: dict[str, str] = {}
        values: dict[str, Any] = {}
        for name, place, child in node.entries:
            if name not in known:
                near = did_you_mean(name, tuple(known))
                hint = f' (did you mean "{near}"?)' if near else ""
                self.problems.append(place.problem(join(path, _without_secret(name, known)), f"unknown key{hint}"))
                continue
            below = join(path, name)
            self.places[below] = child.place
            field, key = known[name]
            if key.null and _null(child):
                values.setdefault(field, None)  # as if it were absent: another key may give the field
                continue
            if field in given:
                self.problems.append(place.problem(below, f"given beside {given[field]}; want exactly one of them"))
                continue
            given[field] = name
            try:
                values[field] = self.value(child, key, below, getattr(base, field) if base else default(type_, field))
            except _Skip:
                continue
        complete = True
        for name, (field, _) in known.items():
            if field in values:
                continue
            inherited = default(type_, field)
            if inherited is msgspec.NODEFAULT:
                complete = False
                if field not in given:
                    self.problems.append(node.place.problem(join(path, name), "is required"))
            elif base:
                values[field] = getattr(base, field)
        return type_(**values) if complete else None

    def value(self, node: Node, key: Key, path: str, base: Any) -> Any:
        """The value of one key. Raises _Skip after adding a problem."""
        if isinstance(key.kind, Items):
            return self.items(node, key.kind, path)
        if isinstance(key.kind, Kind):
            return self.scalar(node, key.kind, path)
        start = base if isinstance(base, msgspec.Struct) else None
        value = self.struct(node, key.kind, path, start)
        if value is None:
            raise _Skip
        return value

    def items(self, node: Node, items: Items, path: str) -> tuple[Any, ...]:
        """The values of a list, without those that are wrong."""
        self.places[path] = node.place
        if not isinstance(node, Sequence):
            self.wrong(node, path, f"want a list, not {shown(node)}")
            raise _Skip
        if len(node.items) < items.least:
            self.wrong(node, path, "want at least one item")
            raise _Skip
        key = Key(items.kind, "")
        values: list[Any] = []
        seen: dict[Any, int] = {}
        for index, child in enumerate(node.items):
            below = f"{path}[{index}]"
            self.places[below] = child.place
            try:
                value = self.value(child, key, below, None)
            except _Skip:
                continue
            if items.rule == "unique" and seen.setdefault(value, index) != index:
                self.wrong(child, below, f"given twice, first as item {seen[value]}")
            elif items.rule == "increasing" and values and value <= values[-1]:
                self.wrong(child, below, "must be greater than the one before it")
            else:
                values.append(value)
        return tuple(values)

    def scalar(self, node: Node, kind: Kind, path: str) -> Any:
        if not isinstance(node, Scalar):
            self.wrong(node, path, f"want one value, not {shown(node)}")
            raise _Skip
        value = node.value
        if isinstance(value, str) and not node.literal:
            value = self.expand(value, node, path)
        if isinstance(kind, SecretFile) and isinstance(value, str):
            # watched even while it cannot be read
            self.secret_files.append(node.place.directory / value)
        if isinstance(kind, Boolean) and node.literal:
            value = {"true": True, "false": False}.get(str(value).lower(), value)
        try:
            return kind.parse(value, node.place.directory)
        except Wrong as wrong:
            message = wrong.message
            if wrong.shown and not kind.private:
                message += f", not {shown(node)}"
            elif wrong.shown and not isinstance(node.value, str):
                message += ", not null" if node.value is None else ", not a number or boolean"
            if wrong.suggestion:
                message += f' (did you mean "{wrong.suggestion}"?)'
            self.wrong(node, path, message)
            raise _Skip from None

    def expand(self, text: str, node: Node, path: str) -> str:
        """`text` with its variables replaced; `$$` is a dollar sign, any other lone `$` stays."""
        faults: list[str] = []

        def replace(match: re.Match[str]) -> str:
            if match[0] == "$$":
                return "$"
            if match[1] is None:
                faults.append("want ${VAR} or ${VAR:-default} after ${; a dollar sign is written $$")
            elif match[2] is not None:
                return self.environ.get(match[1]) or match[2]
            elif match[1] in self.environ:
                return self.environ[match[1]]
            else:
                faults.append(f"environment variable {clean(match[1])} is not set")
            return ""

        expanded = _VARIABLE.sub(replace, text)
        for fault in faults:
            self.wrong(node, path, fault)
        if faults:
            raise _Skip
        return expanded

    def wrong(self, node: Node, path: str, message: str) -> None:
        self.problems.append(node.place.problem(path, message))


class _Skip(Exception):
    """The value is wrong; the problem is noted."""


def _without_secret(name: str, known: Map[str, tuple[str, Key]]) -> str:
    """The name of an unknown key, without a secret that was written into it, as in `app_secretXYZ`."""
    for key, (_, what) in known.items():
        if isinstance(what.kind, SecretText) and name.startswith(key):
            return f"{key}…"
    return name


def _null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None


def shown(node: Node) -> str:
    """What is written, for a message: before variables are replaced."""
    if isinstance(node, Mapping):
        return "a mapping"
    if isinstance(node, Sequence):
        return "a list"
    if isinstance(node.value, str):
        return f'"{clean(node.value)}"'
    return clean(json.dumps(node.value))
