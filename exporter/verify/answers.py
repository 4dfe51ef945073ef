"""Every answer of the platform: the members that the exporter does not read, and a copy for a bug report.

A copy shows the shape of an answer: the paths of its members and the types of their values. Values that identify the
site are replaced: texts by `text-1`, ids by 1, 2, 3, addresses by addresses of documentation and test networks. The
same value always gets the same replacement. All times are moved by the same amount. Member names, words of the
platform (statuses, job types, codes), counts, durations, true, false and null are kept.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.blueking.envelope import SUCCESS, Reply
from exporter.blueking.transport import OnHeaders, Request, Transport
from exporter.errors import ExporterError, Problem
from exporter.log import redact
from exporter.verify.members import Members, is_documented, names, read_members, vocabulary

LARGE = 256 * 1024
"""Bytes: a larger answer is checked in a thread."""

_WORDS = names(
    "status task_status job_type action actions step_type op_type err_code code code_name os_type node_type step_code "
    "bk_scope_type type launch_mode task_type"
)
"""Members whose values are words of the platform."""
_WORD = re.compile(r"[A-Za-z_]{1,40}|[0-9]{1,7}")
_CAPITALS = re.compile(r"[A-Z_]{1,40}")
"""Words of the platform in unknown objects."""
_COUNTS = names(
    "status task_status type task_type launch_mode error_code exit_code execute_count total total_time cost_time start "
    "length index code node_id"
)
"""Members whose numbers are counts, durations, codes."""
_COUNTED_BY_NAME = frozenset({"status_counter", "status_count", "os_count", "statistics"})
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_BEGIN = 1_577_836_800
"""Unix seconds, the beginning of 2020: the first time in the copies becomes this time."""


class Answers:
    """A transport that checks each answer of another transport.

    `unread`: members that the exporter does not read, by API. `unchecked`: APIs whose members are not known. `files`:
    how many copies were written. `problem`: why no more copies are written, "" if they are.

    `record`: a folder for copies, which is empty or does not exist yet. Raises ExporterError when it cannot be used.
    """

    def __init__(self, transport: Transport, record: Path | None = None) -> None:
        self.unread: dict[str, set[str]] = {}
        self.unchecked: set[str] = set()
        self.files = 0
        self.problem = ""
        self._transport = transport
        self._record = record
        self._redactor = Redactor()
        self._shapes: dict[str, set[object]] = {}
        if record is not None:
            try:
                record.mkdir(mode=0o700, parents=True, exist_ok=True)
                if any(record.iterdir()):
                    raise ExporterError(f"{record} is not empty")
            except OSError as error:
                raise ExporterError(f"cannot record into {record}: {error.strerror}") from error

    @property
    def undocumented(self) -> list[tuple[str, str]]:
        """(API, path) of unread members that no document names."""
        return [(api, path) for api, path in self._unread() if not is_documented(api, path)]

    @property
    def documented(self) -> list[tuple[str, str]]:
        """(API, path) of unread members that a document names."""
        return [(api, path) for api, path in self._unread() if is_documented(api, path)]

    def _unread(self) -> Iterator[tuple[str, str]]:
        for api, paths in sorted(self.unread.items()):
            yield from ((api, path) for path in sorted(paths))

    async def open(self) -> None:
        await self._transport.open()

    async def close(self) -> None:
        await self._transport.close()

    async def refresh_tls(self) -> list[Problem]:
        return await self._transport.refresh_tls()

    async def send(self, request: Request, seconds: float, on_headers: OnHeaders) -> Reply:
        reply = await self._transport.send(request, seconds, on_headers)
        if len(reply.body) > LARGE:
            await asyncio.to_thread(self._check, request, reply)
        else:
            self._check(request, reply)
        return reply

    def _check(self, request: Request, reply: Reply) -> None:
        api = api_of(request.url)
        try:
            body = json.loads(bytes(reply.body).decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            body = None
        try:
            members = read_members(api)
            if members is None:
                self.unchecked.add(api)
            elif 200 <= reply.status < 300 and _is_success(body):
                self.unread.setdefault(api, set()).update(members.unread(body))
            if self._record is not None:
                self._keep(self._record, api, request.method, reply, body)
        except RecursionError:
            pass  # BlueKing sends nothing that is nested so deeply

    def _keep(self, folder: Path, api: str, method: str, reply: Reply, body: object) -> None:
        shape = (reply.status, frozenset(_shape(body)))
        shapes = self._shapes.setdefault(api, set())
        if shape in shapes:
            return
        shapes.add(shape)
        copy: dict[str, object] = {
            "api": api,
            "method": method,
            "status": reply.status,
            "body": f"{len(reply.body)} bytes that are no JSON"
            if body is None
            else self._redactor.copy(body, read_members(api)),
        }
        file = folder / f"{api}-{len(shapes)}.json"
        try:
            file.write_text(json.dumps(copy, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            self.problem, self._record = f"cannot write {file}: {error.strerror}", None
        else:
            self.files += 1


def api_of(url: str) -> str:
    """The vendor's name of the operation at this URL."""
    words = [part for part in url.split("?")[0].split("/") if re.fullmatch(r"[a-z_]+", part)]
    last = words[-1] if words else "unknown"
    if last == "list" and "workflow" in words:
        # NodeMan V3: …/node/workflow/list, …/node/workflow/operation/list
        return f"{words[words.index('workflow') - 1]}_{words[-2]}_list"
    return "job_details" if last == "details" else last


def _is_success(body: object) -> bool:
    if not isinstance(body, dict) or body.get("result") is False or body.get("error") is not None:
        return False
    code = body.get("code")
    return ("" if code is None else str(code)) in SUCCESS


def _shape(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """The path of each member in `value` with the type of its value."""
    yield path, "number" if type(value) in (int, float) else type(value).__name__
    if isinstance(value, dict):
        for name, member in value.items():
            yield from _shape(member, f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _shape(item, f"{path}[]")


class Redactor:
    """Copies JSON values without values that identify the site; see above."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, int]] = {}
        self._moved: int | None = None

    def copy(
        self, value: Any, members: Members | None = None, name: str = "", parent: str = "", *, known: bool = True
    ) -> Any:
        """The copy of `value`, which is the member `name` of `parent`. `members`: the members of `value` that the
        exporter reads; `known`: whether the members of `parent` are known. Of a list only the items that have another
        shape than those before them are copied."""
        match value:
            case None | bool():
                return value
            case dict():
                read = members.by_name if members is not None and not members.everything else None
                return {
                    self._name(key, name, known=read is not None): self.copy(
                        member, read.get(key) if read else None, key, name, known=read is not None
                    )
                    for key, member in value.items()
                }
            case list():
                return [self.copy(item, members, name, parent, known=known) for item in _different(value)]
            case str():
                return self._text(value, name, known=known)
            case _:
                return self._number(value, name, parent)

    def _name(self, name: str, parent: str, *, known: bool) -> str:
        """The copy of a member name. In an unknown object a name may be data."""
        if name in vocabulary():
            return name
        if (known and _NAME.fullmatch(name)) or (parent in _COUNTED_BY_NAME and _WORD.fullmatch(name)):
            return name if redact(name) == name else f"member-{self._number_of('name', name)}"
        return f"member-{self._number_of('name', name)}"

    def _text(self, text: str, name: str, *, known: bool) -> str:
        if not text:
            return text
        word = _WORD if known or name == "code" else _CAPITALS
        if name in _WORDS and word.fullmatch(text) and redact(text) == text:
            return text
        if (moved := self._moved_time(text)) is not None:
            return moved
        if text.isascii() and text.isdecimal():
            return text if text == "0" else str(self._number_of("id", text))
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return f"text-{self._number_of('text', text)}"
        number = self._number_of("address", text)
        if address.version == 6:
            return str(ipaddress.IPv6Address("2001:db8::") + number)
        return str(ipaddress.IPv4Address("198.18.0.0") + number % 2**17)

    def _number(self, number: int | float, name: str, parent: str) -> int | float:
        if name in _COUNTS or name.endswith("_count") or parent in _COUNTED_BY_NAME or number in (0, -1):
            return number
        if name.endswith("_time") and number > 10**9:
            scale = 1000 if number > 10**11 else 1
            return number - self._move(int(number // scale)) * scale
        return self._number_of("id", str(number))

    def _moved_time(self, text: str) -> str | None:
        if len(text) < 19:
            return None
        try:
            time = datetime.datetime.fromisoformat(text[:19])
            seconds = int(time.replace(tzinfo=datetime.UTC).timestamp())
            moved = time - datetime.timedelta(seconds=self._move(seconds))
        except (ValueError, OverflowError):
            return None
        if not re.fullmatch(r"[.\d]*(Z|[+-]\d\d:?\d\d)?", text[19:]):
            return None
        return f"{moved:%Y-%m-%d}{text[10]}{moved:%H:%M:%S}{text[19:]}"

    def _move(self, seconds: int) -> int:
        """Seconds by which all times are moved back. The first call sets them: `seconds` becomes `_BEGIN`."""
        if self._moved is None:
            self._moved = seconds - _BEGIN
        return self._moved

    def _number_of(self, kind: str, value: str) -> int:
        known = self._known.setdefault(kind, {})
        return known.setdefault(value, len(known) + 1)


def _different(items: list[Any]) -> Iterator[Any]:
    """The first item, and each item with a member or type that no item before it has."""
    seen: set[tuple[str, str]] = set()
    for number, item in enumerate(items):
        shape = set(_shape(item))
        if not number or not shape <= seen:
            yield item
        seen |= shape
