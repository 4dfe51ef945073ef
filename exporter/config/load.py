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
from exporter.config.schema import (
    Collectors,
    Config,
    ConfigFile,
    Discovery,
    ProcessConfig,
    ScopeConfig,
    ScopeEntry,
    State,
    json_schema,
)
from exporter.config.secret import Secret
from exporter.config.state_url import StateUrl
from exporter.config.yaml import MAX_BYTES, Mapping, Node, Place, Scalar, Sequence, clean, find, parse, read
from exporter.errors import ConfigError, Problem
from exporter.model import Scope

__all__ = ["Loaded", "Override", "json_schema", "load"]

FileVersions = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and stamp of each file."""


class Override(msgspec.Struct, frozen=True):
    """A value that wins over the file. `source`: the flag or variable it comes from, shown instead of a place."""

    value: str | bool | tuple[str, ...]
    source: str


class Loaded(msgspec.Struct, frozen=True):
    """A valid configuration. `files`: absolute, everything that was read: configuration, scope files, secrets.

    `scope_versions`: the scope files as they were just before they were read. All methods read files and directories:
    they are not for the event loop.
    """

    config: Config
    warnings: tuple[Problem, ...]
    files: tuple[Path, ...]
    scope_globs: tuple[str, ...]
    scope_versions: FileVersions
    secret_files: tuple[Path, ...] = ()

    def unreadable_secrets(self) -> list[tuple[Path, str]]:
        """The secret files that cannot be read now, and why."""
        lost = []
        for file in self.secret_files:
            try:
                Secret.from_file(file)
            except (OSError, ValueError) as error:
                lost.append((file, reason(error)))
        return lost

    def secret_stamp(self) -> FileVersions:
        """The versions of the secret files: differs when one was changed."""
        return tuple((str(file), stamp(file)) for file in self.secret_files)

    def scope_stamp(self) -> FileVersions:
        """The versions of the scope files that match now: differs when one was added, removed or changed."""
        return _versions(self.scope_globs)

    def half_written(self) -> list[Problem]:
        """One problem for each scope file that has changed since it was read."""
        changed = {clean(name, 4096) for name, _ in {*self.scope_versions} ^ {*self.scope_stamp()}}
        return [
            Problem(name, 1, 1, "", "is being written: it has changed since it was read") for name in sorted(changed)
        ]


def load(path: Path, overrides: Map[str, Override] | None = None, environ: Map[str, str] = os.environ) -> Loaded:
    """Read and check the configuration file at `path`.

    `overrides`: by dotted path, such as `server.listen_address`; their relative paths start at the current directory.
    Raises ConfigError with every problem of every file. Messages hold no secret and no value of a variable.
    """
    root, problems, data = read(path)
    directory = root.place.directory
    contents = hashlib.sha256()
    _feed(contents, data)
    if root == Scalar(root.place, None):
        raise ConfigError([Place(str(path), 1, 1, directory).problem("", "the file is empty")])
    for dotted, override in (overrides or {}).items():
        root = _override(root, dotted.split("."), override)
    reader = Reader(root, environ, problems)
    file = _read_file(reader)
    defaults, patterns = (file.collectors, file.scope_files) if file else (Collectors(), ())
    scopes = _scopes(reader, "scopes", root.get("scopes") if isinstance(root, Mapping) else None, defaults)
    if file:
        check_file(reader, file)
    globs = tuple(str(directory / pattern) for pattern in patterns)
    versions = _versions(globs)
    parts = _scope_files(reader, path.parent, patterns)
    for part in parts.values():
        _feed(contents, part.data)
        scopes += _scopes(part.reader, "", part.root, defaults)
    if file:
        if file.discovery.enabled:
            scopes.append(Where(reader, "discovery", ScopeEntry("biz", "0", collectors=file.discovery.collectors)))
        entries = check_scopes(reader, file.blueking, scopes)
        if file.discovery.enabled:
            discovery = msgspec.structs.replace(file.discovery, collectors=entries.pop().collectors)
            file = msgspec.structs.replace(file, discovery=discovery)
        check_budget(reader, file.blueking, entries)

    readers = [reader, *(part.reader for part in parts.values())]
    problems = [problem for each in readers for problem in sorted(each.problems, key=_position)]
    if problems or file is None:
        raise ConfigError(problems)
    process = {name: getattr(file, name) for name in ProcessConfig.__struct_fields__}
    if not reader.written("state.url"):
        process["state"] = _absolute(file.state, directory)
    config = Config(**process, scopes=_scope_configs(entries), sha256=contents.hexdigest())
    warnings = tuple(warning for each in readers for warning in each.warnings)
    secrets = tuple(secret for each in readers for secret in each.secret_files)
    files = dict.fromkeys((directory / path.name, *parts, *secrets))
    return Loaded(config, warnings, tuple(files), globs, versions, secrets)


def _read_file(reader: Reader) -> ConfigFile | None:
    """The file without its scopes: these can only be read once the defaults are known."""
    root, written = reader.root, None
    if isinstance(root, Mapping):
        written = root.get("scopes")
        root = Mapping(root.place, tuple(entry for entry in root.entries if entry[0] != "scopes"))
    file = reader.struct(root, ConfigFile, "")
    if file is None:
        return None
    empty = written is None or (isinstance(written, Sequence) and not written.items)
    if empty and not file.scope_files and not file.discovery.enabled and reader.has_no_problem("scope_files"):
        reader.problem("scopes", "no scope: give scopes, scope_files or discovery")
    file = msgspec.structs.replace(file, collectors=fill_watch(reader, file.collectors, "collectors"))
    return msgspec.structs.replace(file, discovery=_discovery(reader, root, file))


def _discovery(reader: Reader, root: Node, file: ConfigFile) -> Discovery:
    """The discovery with the defaults of collectors filled in, which are known only now."""
    collectors: Collectors | None = file.collectors
    if reader.written("discovery.collectors") and reader.has_no_problem("discovery.collectors"):
        node, _ = find(root, "discovery.collectors")
        collectors = reader.struct(node, Collectors, "discovery.collectors", file.collectors)
        if collectors and reader.written("discovery.collectors.job.watch"):
            collectors = fill_watch(reader, collectors, "discovery.collectors")
    return msgspec.structs.replace(file.discovery, collectors=collectors or file.collectors)


def _absolute(state: State, directory: Path) -> State:
    return msgspec.structs.replace(state, url=StateUrl().parse(state.url, directory))


class _Part(msgspec.Struct, frozen=True):
    """One scope file; `root` is None when it is no YAML."""

    reader: Reader
    data: bytes
    root: Node | None


def _versions(globs: tuple[str, ...]) -> FileVersions:
    names = {name for pattern in globs for name in glob.glob(pattern)}
    return tuple((name, stamp(name)) for name in sorted(names))


def _scope_files(reader: Reader, directory: Path, patterns: tuple[str, ...]) -> dict[Path, _Part]:
    """Every file that matches, once, by its absolute path. Warns of each pattern that matches none."""
    parts: dict[Path, _Part] = {}
    for index, pattern in enumerate(patterns):
        at = f"scope_files[{index}]"
        matches = sorted(glob.glob(str(directory / pattern)))
        if not matches:
            reader.warn(at, "matches no file")
        for name in matches:
            absolute = Path(os.path.abspath(name))
            if absolute in parts:
                continue
            try:
                data = read_file(absolute, MAX_BYTES)
            except (OSError, ValueError) as error:
                reader.problem(at, f"{clean(name, 120)} cannot be read: {reason(error)}")
                continue
            root, problems = parse(data, clean(name, 4096), absolute.parent)
            empty = Scalar(Place(clean(name, 4096), 1, 1, absolute.parent), None)
            parts[absolute] = _Part(Reader(root or empty, reader.environ, problems), data, root)
    return parts


def _scopes(reader: Reader, path: str, node: Node | None, defaults: Collectors) -> list[Where]:
    """The scopes of a list, each with `defaults` filled in; wrong ones are left out."""
    if node is None:
        return []
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
        if find(child, "collectors.job.watch")[1]:
            entry = msgspec.structs.replace(entry, collectors=fill_watch(reader, entry.collectors, f"{at}.collectors"))
        scopes.append(Where(reader, at, entry))
    return scopes


def _scope_configs(entries: list[ScopeEntry]) -> tuple[ScopeConfig, ...]:
    """The scopes. Equal settings of thousands of scopes are one object."""
    shared: dict[Collectors, Collectors] = {}
    return tuple(
        ScopeConfig(
            Scope(entry.bk_scope_type, entry.bk_scope_id),
            entry.name,
            shared.setdefault(entry.collectors, entry.collectors),
            entry.auth,
        )
        for entry in entries
    )


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
