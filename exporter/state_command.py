"""The command `state`: list, show, export, import or reset what has been counted.

`list`, `show` and `export` only read, so they also work beside a running daemon. `import` and `reset` need the store
for themselves.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import msgspec

from exporter.collectors import COLLECTORS
from exporter.collectors.base import CollectorState
from exporter.collectors.calls import gather_bounded
from exporter.collectors.failing_hosts import Streak
from exporter.config.schema import Config
from exporter.config.yaml import clean
from exporter.discovery import STATE as DISCOVERED
from exporter.discovery import DiscoveryState
from exporter.errors import ExporterError
from exporter.metrics.family import Labels
from exporter.metrics.render import label_text, number
from exporter.model import Key, Scope, ScopeType
from exporter.state.base import Store, open_store

Say = Callable[[str], None]

TOGETHER = 100
"""States that are committed at once."""
_TYPES = {collector.name: collector.state_type for collector in COLLECTORS} | {DISCOVERED.collector: DiscoveryState}
_LABELS = {family.name: family.labels for collector in COLLECTORS for family in collector.families}
_COLUMNS = ("collector", "scope", "last success", "watermark", "series", "tracked", "failing hosts", "bytes")


class Selection(msgspec.Struct, frozen=True):
    """The keys of `collector` and `scope` ("biz/2"); an empty one selects all."""

    collector: str = ""
    scope: str = ""

    def __contains__(self, key: Key) -> bool:
        return self.collector in ("", key.collector) and self.scope in ("", str(key.scope))


class Exported(msgspec.Struct, forbid_unknown_fields=True):
    """One line of an export. `updated`: the last commit, unix seconds; `payload`: the state as the store has it."""

    collector: str
    bk_scope_type: str
    bk_scope_id: str
    updated: float
    payload: bytes

    @property
    def key(self) -> Key:
        return Key(self.collector, Scope(cast(ScopeType, self.bk_scope_type), self.bk_scope_id))


async def run(action: str, config: Config, selection: Selection, lines: Iterable[bytes], say: Say) -> None:
    """Carry out `list`, `show`, `export`, `import` or `reset` on the configured store. Raises ExporterError.

    `lines`: what an import reads.
    """
    if action == "import":
        await _import(config, selection, lines, say)
    else:
        work = {"list": _list, "show": _show, "export": _export, "reset": _reset}[action]
        await work(config, selection, say)


async def _list(config: Config, selection: Selection, say: Say) -> None:
    rows = [_COLUMNS]
    async with _opened(config, read_only=True) as store:
        for key, _ in await _selected(store, selection):
            payload = await _payload(store, key)
            rows.append((key.collector, str(key.scope), *_summary(_decoded(key, payload)), str(len(payload))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _summary(state: CollectorState | DiscoveryState | str) -> tuple[str, str, str, str, str]:
    """The columns between the key and the bytes."""
    if isinstance(state, str):
        return state, "", "", "", ""
    if isinstance(state, DiscoveryState):
        return _time(state.last_success), "", "", str(len(state.found)), ""
    series = (state.counts.counters | state.counts.histograms).values()
    tracked = _tracked(state).values()
    return (
        _time(state.last_success),
        _time(state.watermark),
        str(sum(map(len, series))),
        str(sum(map(len, tracked))),
        str(len(_failing(state))),
    )


async def _show(config: Config, selection: Selection, say: Say) -> None:
    async with _opened(config, read_only=True) as store:
        for key, updated in await _selected(store, selection):
            payload = await _payload(store, key)
            say(f"{key}")
            say(f"  committed     {_time(updated)}, {len(payload)} bytes")
            for line in _described(_decoded(key, payload)):
                say(f"  {line}")


async def _export(config: Config, selection: Selection, say: Say) -> None:
    async with _opened(config, read_only=True) as store:
        for key, updated in await _selected(store, selection):
            scope = key.scope
            payload = await _payload(store, key)
            line = Exported(key.collector, scope.bk_scope_type, scope.bk_scope_id, updated, payload)
            say(msgspec.json.encode(line).decode())


async def _import(config: Config, selection: Selection, lines: Iterable[bytes], say: Say) -> None:
    """Nothing is committed unless every line can be read."""
    read = list(_read(lines))
    async with _opened(config) as store:
        before = await store.keys()
        states = [one for one in read if one.key in selection]
        await gather_bounded((store.commit(one.key, one.payload) for one in states), TOGETHER)
        replaced = sum(one.key in before for one in states)
        say(f"imported {len(states)} states, {replaced} of them in the place of one that was there")


def _read(lines: Iterable[bytes]) -> Iterator[Exported]:
    seen: dict[Key, int] = {}
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = msgspec.json.decode(line, type=Exported)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ExporterError(f"line {place}: {error}; nothing was imported") from None
        state = _decoded(one.key, one.payload)
        if isinstance(state, str) and one.collector in _TYPES:
            raise ExporterError(f"line {place}: {one.key}: {state}; nothing was imported")
        first = seen.setdefault(one.key, place)
        if first != place:
            raise ExporterError(f"line {place}: {one.key} is also in line {first}; nothing was imported")
        yield one


async def _reset(config: Config, selection: Selection, say: Say) -> None:
    async with _opened(config) as store:
        ((key, _),) = await _selected(store, selection)
        await store.forget([key])
        say(f"forgot {key}: its next poll begins with a new baseline")


@contextlib.asynccontextmanager
async def _opened(config: Config, *, read_only: bool = False) -> AsyncIterator[Store]:
    if config.state.url == "memory:":
        raise ExporterError("state.url is memory: a daemon keeps that state to itself")
    store = open_store(config.state)
    try:
        await store.open(read_only=read_only)
        yield store
    finally:
        await store.close()


async def _selected(store: Store, selection: Selection) -> list[tuple[Key, float]]:
    """The selected keys of the store with their last commits. Raises ExporterError when there is none."""
    found = sorted((key, updated) for key, updated in (await store.keys()).items() if key in selection)
    if not found and selection != Selection():
        raise ExporterError(f"no state of {' '.join(filter(None, (selection.collector, selection.scope)))}")
    return found


async def _payload(store: Store, key: Key) -> bytes:
    stored = await store.load(key)
    if stored is None:
        raise ExporterError(f"the state of {key} has just been removed")
    return stored.payload


def _decoded(key: Key, payload: bytes) -> CollectorState | DiscoveryState | str:
    """The state, or why it cannot be read."""
    type_ = _TYPES.get(key.collector)
    if type_ is None:
        return "of a collector that this version does not know"
    try:
        return cast(CollectorState | DiscoveryState, msgspec.msgpack.decode(payload, type=type_))
    except msgspec.DecodeError as error:
        return f"cannot be read: {error}"


def _described(state: CollectorState | DiscoveryState | str) -> Iterator[str]:
    if isinstance(state, str):
        yield state
        return
    if isinstance(state, DiscoveryState):
        yield f"last success  {_time(state.last_success)}"
        for found in state.found:
            yield f"found {found.scope} {clean(found.name, 200)}, missing in {found.missing} lists in a row"
        return
    yield f"last success  {_time(state.last_success)}"
    yield f"watermark     {_time(state.watermark)}"
    for name, counters in sorted(state.counts.counters.items()):
        for labels, count in sorted(counters.items()):
            yield _series(name, labels, count.value)
    for name, histograms in sorted(state.counts.histograms.items()):
        for labels, distribution in sorted(histograms.items()):
            yield _series(f"{name}_count", labels, sum(distribution.counts), name)
            yield _series(f"{name}_sum", labels, distribution.sum, name)
    for what, tracked in _tracked(state).items():
        for id, one in sorted(tracked.items()):
            yield f"{what} {id}: {_fields(one)}"
    for streak in sorted(_failing(state), key=lambda streak: streak.since):
        host = streak.host
        yield (
            f"failing host bk_cloud_id={host.bk_cloud_id} bk_host_id={host.bk_host_id} ip={host.ip}: "
            f"since {_time(streak.since)}, {streak.count} in a row, last {_time(streak.last)} in {streak.run}, "
            f"{' '.join(filter(None, streak.labels))}"
        )


def _tracked(state: CollectorState) -> Mapping[str, Mapping[int, msgspec.Struct]]:
    """What the state follows by its id on the platform: executions, jobs, subscriptions, tasks."""
    values = {name: getattr(state, name) for name in state.__struct_fields__}
    return {
        name.removesuffix("s").replace("_", " "): value
        for name, value in values.items()
        if value and _is_tracked(value)
    }


def _is_tracked(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(id, int) and isinstance(one, msgspec.Struct) for id, one in value.items()
    )


def _failing(state: Any) -> list[Streak]:
    return list(state.hosts.streaks.values())


def _fields(one: msgspec.Struct) -> str:
    """The plain values of a struct."""
    values = {name: getattr(one, name) for name in one.__struct_fields__}
    shown = {name: value for name, value in values.items() if isinstance(value, str | int | float) and value != ""}
    return " ".join(f"{name}={clean(str(value), 200)}" for name, value in shown.items())


def _series(name: str, labels: Labels, value: float, family: str = "") -> str:
    names = _LABELS.get(family or name, ())
    if len(names) != len(labels):  # of another version
        names = tuple(f"label_{index}" for index in range(len(labels)))
    return f"{name}{{{label_text(names, labels)}}} {number(value)}" if labels else f"{name} {number(value)}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
