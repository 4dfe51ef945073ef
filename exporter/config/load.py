"""Read the configuration: file, scope files and flags to one immutable value, or every problem at once."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping as Map
from pathlib import Path

import msgspec

from exporter.config.files import read_file, reason, stamp
from exporter.config.read import Reader, shown
from exporter.config.rules import Where, check_budget, check_file, check_scopes, fill_watch
from exporter.config.schema import Collectors, Config, ConfigFile, ScopeConfig, ScopeEntry, json_schema
from exporter.config.secret import Secret
from exporter.config.values import StateUrl
from exporter.config.yaml import MAX_BYTES, Mapping, Node, Place, Scalar, Sequence, clean, parse
from exporter.errors import ConfigError, Problem
from exporter.model import Scope

__all__ = ["Loaded", "Override", "json_schema", "load"]


class Override(msgspec.Struct, frozen=True):
    """A value that wins over the file. `source`: the flag or variable it comes from, shown instead of a place."""

    value: str | bool | tuple[str, ...]
    source: str


class Loaded(msgspec.Struct, frozen=True):
    """A valid configuration. `files`: absolute, everything that was read: configuration, scope files, secrets."""

    config: Config
    warnings: tuple[Problem, ...]
    files: tuple[Path, ...]
    scope_globs: tuple[str, ...]
    secret_files: tuple[Path, ...] = ()

    def unreadable_secrets(self) -> list[tuple[Path, str]]:
        """The secret files that cannot be read now, and why. Reads files: not for the event loop."""
        lost = []
        for file in self.secret_files:
            try:
                Secret.from_file(file)
            except (OSError, ValueError) as error:
                lost.append((file, reason(error)))
        return lost

    def secret_stamp(self) -> tuple[object, ...]:
        """The versions of the secret files: differs when one was changed. Not for the event loop."""
        return tuple((file, stamp(file)) for file in self.secret_files)

    def scope_stamp(self) -> tuple[object, ...]:
        """Names and versions of the scope files that match now: differs when one was added, removed or changed.

        Reads directories, so it is not for the event loop.
        """
        names = {name for pattern in self.scope_globs for name in glob.glob(pattern)}
        return tuple((name, stamp(name)) for name in sorted(names))


def load(path: Path, overrides: Map[str, Override] | None = None, environ: Map[str, str] = os.environ) -> Loaded:
    """Read and check the configuration file at `path`.

    `overrides`: by dotted path, such as `server.listen_address`; their relative paths start at the current directory.
    Raises ConfigError with every problem of every file. Messages hold no secret and no value of a variable.
    """
    directory = Path(os.path.abspath(path.parent))
    here = Place(str(path), 1, 1, directory)
    contents = hashlib.sha256()
    try:
        data = read_file(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError([here.problem("", f"cannot be read: {reason(error)}")]) from None
    _feed(contents, data)
    root, problems = parse(data, str(path), directory)
    if root is None:
        raise ConfigError(problems)
    if root == Scalar(root.place, None):
        raise ConfigError([here.problem("", "the file is empty")])
    for dotted, override in (overrides or {}).items():
        root = _override(root, dotted.split("."), override)
    reader = Reader(environ)
    reader.problems += problems
    file, written = _read_file(reader, root)
    empty = written is None or (isinstance(written, Sequence) and not written.items)
    if empty and file and not file.scope_files and reader.sound("scope_files"):
        reader.problem("scopes", "no scope: give scopes or scope_files")
    defaults = file.collectors if file else Collectors()

    scopes = _scopes(reader, written, "scopes", defaults)
    patterns = file.scope_files if file else ()
    parts, warnings = _scope_files(reader, path.parent, patterns)
    for part in parts.values():
        _feed(contents, part.data)
        scopes += _scopes(part.reader, part.root, "", defaults)

    if file:
        warnings = check_file(reader, file) + warnings
        entries, found = check_scopes(reader, file.blueking, scopes)
        warnings += found + check_budget(reader, file.blueking, entries)
    readers = [reader, *(part.reader for part in parts.values())]
    problems = [problem for each in readers for problem in sorted(each.problems, key=_position)]
    if problems or file is None:
        raise ConfigError(problems)
    state = file.state
    if "state.url" not in reader.places:
        state = msgspec.structs.replace(state, url=StateUrl().parse(state.url, directory))
    config = Config(
        server=file.server,
        state=state,
        log=file.log,
        blueking=file.blueking,
        counter_birth_hold=file.counter_birth_hold,
        stale_after=file.stale_after,
        max_series=file.max_series,
        scopes=tuple(ScopeConfig(Scope(e.bk_scope_type, e.bk_scope_id), e.name, e.collectors, e.auth) for e in entries),
        sha256=contents.hexdigest(),
    )
    secrets = [secret for each in readers for secret in each.secret_files]
    files = dict.fromkeys((directory / path.name, *parts, *secrets))
    globs = tuple(str(directory / pattern) for pattern in patterns)
    return Loaded(config, tuple(warnings), tuple(files), globs, tuple(secrets))


def _read_file(reader: Reader, root: Node) -> tuple[ConfigFile | None, Node | None]:
    """The file without its scopes, and the node of its scopes: they can only be read once the defaults are known."""
    written: Node | None = None
    if isinstance(root, Mapping):
        written = root.get("scopes")
        root = Mapping(root.place, tuple(entry for entry in root.entries if entry[0] != "scopes"))
    file = reader.struct(root, ConfigFile, "")
    if file is not None:
        file = msgspec.structs.replace(file, collectors=fill_watch(reader, file.collectors, "collectors"))
    return file, written


class _Part(msgspec.Struct, frozen=True):
    """One scope file; `root` is None when it is no YAML."""

    reader: Reader
    data: bytes
    root: Node | None


def _scope_files(reader: Reader, directory: Path, patterns: tuple[str, ...]) -> tuple[dict[Path, _Part], list[Problem]]:
    """Every file that matches, once, by its absolute path; and a warning for each pattern that matches none."""
    parts: dict[Path, _Part] = {}
    warnings: list[Problem] = []
    for index, pattern in enumerate(patterns):
        at = f"scope_files[{index}]"
        matches = sorted(glob.glob(str(directory / pattern)))
        if not matches:
            warnings.append(reader.place(at).problem(at, "matches no file"))
        for name in matches:
            absolute = Path(os.path.abspath(name))
            if absolute in parts:
                continue
            try:
                data = read_file(absolute, MAX_BYTES)
            except (OSError, ValueError) as error:
                reader.problem(at, f"{clean(name, 120)} cannot be read: {reason(error)}")
                continue
            part = Reader(reader.environ)
            root, part.problems = parse(data, clean(name, 4096), absolute.parent)
            parts[absolute] = _Part(part, data, root)
    return parts, warnings


def _scopes(reader: Reader, node: Node | None, path: str, defaults: Collectors) -> list[Where]:
    """The scopes of a list, each with `defaults` filled in; wrong ones are left out."""
    if node is None:
        return []
    reader.places[path] = node.place
    if not isinstance(node, Sequence):
        reader.problem(path, f"want a list of scopes, not {shown(node)}")
        return []
    base = ScopeEntry("biz", "", collectors=defaults)
    scopes: list[Where] = []
    for index, child in enumerate(node.items):
        at = f"{path}[{index}]"
        entry = reader.struct(child, ScopeEntry, at, base)
        if entry is None:
            continue
        if f"{at}.collectors.job.watch" in reader.places:
            entry = msgspec.structs.replace(entry, collectors=fill_watch(reader, entry.collectors, f"{at}.collectors"))
        scopes.append(Where(reader, at, entry))
    return scopes


def _override(root: Node, path: list[str], override: Override) -> Node:
    """`root` with the value at `path` replaced. What is no mapping stays, to be refused where it stands."""
    place = Place(override.source, 0, 0, Path.cwd())
    if not path:
        if isinstance(override.value, tuple):
            return Sequence(place, tuple(Scalar(place, value, literal=True) for value in override.value))
        return Scalar(place, override.value, literal=True)
    if not isinstance(root, Mapping):
        return root
    below = root.get(path[0]) or Mapping(place, ())
    return root.replace(path[0], _override(below, path[1:], override))


def _feed(digest: hashlib._Hash, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "big") + data)


def _position(problem: Problem) -> tuple[int, int]:
    return problem.line, problem.column
