"""Nodes to typed values. Every problem is kept with its place, and reading goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping as Map
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from exporter.config.files import open_to_others
from exporter.config.keys import Items, Key, Rule, keys
from exporter.config.values import Boolean, InvalidValue, KeyFile, Kind, SecretFile, SecretText, did_you_mean
from exporter.config.yaml import Mapping, Node, Place, Scalar, Sequence, clean, find, join
from exporter.errors import Problem

T = TypeVar("T", bound=msgspec.Struct)

_VARIABLE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


class Reader:
    """Reads one file.

    `problems`: what is wrong; `warnings`: what is allowed and probably wrong; `secret_files`: the files of secrets that
    it names. `null_is_absent`: also for keys that say otherwise.
    """

    def __init__(
        self, root: Node, environ: Map[str, str], problems: list[Problem], *, null_is_absent: bool = False
    ) -> None:
        self.root = root
        self._null_is_absent = null_is_absent
        self.environ = environ
        self.problems = problems
        self.warnings: list[Problem] = []
        self.secret_files: list[Path] = []

    def problem(self, path: str, message: str) -> None:
        """Add a problem about the value at `path`."""
        self.problems.append(self.place(path).problem(path, message))

    def warn(self, path: str, message: str) -> None:
        """Add a warning about the value at `path`."""
        self.warnings.append(self.place(path).problem(path, message))

    def place(self, path: str) -> Place:
        """Where the value at `path` is written or, if it is not, the nearest one around it."""
        return find(self.root, path)[0].place

    def written(self, path: str) -> bool:
        """Whether the file has a value at `path`."""
        return find(self.root, path)[1]

    def has_no_problem(self, path: str) -> bool:
        """Whether nothing at or below `path` was wrong, so that a rule about it would not repeat a problem."""
        return not any(p.path == path or p.path.startswith((f"{path}.", f"{path}[")) for p in self.problems)

    def struct(self, node: Node, type_: type[T], path: str, base: T | None = None) -> T | None:
        """The value of a mapping; None when a required key is absent or wrong.

        Other keys that are absent or wrong take their value from `base`, else from the defaults.
        """
        if not isinstance(node, Mapping):
            hint = " (leave the key out to take the defaults)" if _null(node) and path else ""
            # Below `blueking` the text may hold a secret: `app_secret:XYZ` without a space is one text.
            what = "a single value" if path.split(".")[0] == "blueking" and not _null(node) else shown(node)
            self.problem(path, f"want a mapping, not {what}{hint}")
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
            below, key = join(path, name), known[name]
            if (key.null or self._null_is_absent) and _null(child):
                continue
            if key.field in given:
                message = f"given beside {given[key.field]}; want exactly one of them"
                self.problems.append(place.problem(below, message))
                continue
            given[key.field] = name
            try:
                values[key.field] = self.value(
                    child, key.kind, below, getattr(base, key.field) if base else key.default
                )
            except _Skip:
                continue
        complete = True
        for name, key in known.items():
            if key.field in values:
                continue
            if key.default is not msgspec.NODEFAULT:
                values[key.field] = getattr(base, key.field) if base else key.default
                continue
            complete = False
            if key.field not in given:
                self.problems.append(node.place.problem(join(path, name), "is required"))
        return type_(**values) if complete else None

    def value(self, node: Node, kind: Kind | Items | type[msgspec.Struct], path: str, base: Any = None) -> Any:
        """The value of one key. Raises _Skip after adding a problem."""
        if isinstance(kind, Items):
            return self.items(node, kind, path)
        if isinstance(kind, Kind):
            return self.scalar(node, kind, path)
        value = self.struct(node, kind, path, base if isinstance(base, msgspec.Struct) else None)
        if value is None:
            raise _Skip
        return value

    def items(self, node: Node, items: Items, path: str) -> tuple[Any, ...]:
        """The values of a list, without those that are wrong."""
        if not isinstance(node, Sequence):
            self.problem(path, f"want a list, not {shown(node)}")
            raise _Skip
        if Rule.NOT_EMPTY in items.rules and not node.items:
            self.problem(path, "want at least one item")
            raise _Skip
        values: list[Any] = []
        seen: dict[Any, int] = {}
        for index, child in enumerate(node.items):
            below = f"{path}[{index}]"
            try:
                value = self.value(child, items.kind, below)
            except _Skip:
                continue
            if Rule.UNIQUE in items.rules and seen.setdefault(value, index) != index:
                self.problem(below, f"given twice, first as item {seen[value]}")
            elif Rule.INCREASING in items.rules and values and value <= values[-1]:
                self.problem(below, "must be greater than the one before it")
            else:
                values.append(value)
        return tuple(values)

    def scalar(self, node: Node, kind: Kind, path: str) -> Any:
        if not isinstance(node, Scalar):
            self.problem(path, f"want one value, not {shown(node)}")
            raise _Skip
        value = node.value
        if isinstance(value, str) and not node.literal:
            value = self.expand(value, path)
        if isinstance(kind, SecretFile | KeyFile) and isinstance(value, str):
            file = node.place.directory / value
            if isinstance(kind, SecretFile):
                self.secret_files.append(file)  # followed even while it cannot be read
            if open_to_others(file):
                self.warn(path, "others can read the file: chmod o-r")
        if isinstance(kind, Boolean) and node.literal:
            value = {"true": True, "false": False}.get(str(value).lower(), value)
        try:
            return kind.parse(value, node.place.directory)
        except InvalidValue as wrong:
            message = wrong.message
            if wrong.shown and not kind.private:
                message += f", not {shown(node)}"
            elif wrong.shown and not isinstance(node.value, str):
                message += ", not null" if node.value is None else ", not a number or boolean"
            if wrong.suggestion:
                message += f' (did you mean "{wrong.suggestion}"?)'
            self.problem(path, message)
            raise _Skip from None

    def expand(self, text: str, path: str) -> str:
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
            self.problem(path, fault)
        if faults:
            raise _Skip
        return expanded


class _Skip(Exception):
    """The value is wrong; the problem is noted."""


def _without_secret(name: str, known: Map[str, Key]) -> str:
    """The name of an unknown key, without a secret that was written into it, as in `app_secretXYZ`."""
    for key, what in known.items():
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
