"""Decode a response to a value, or to the `ApiError` that explains the failure.

BlueKing wraps its responses in several envelopes, and failures come under HTTP 200 as well as under 4xx and 5xx:

    JOB v3, ESB     {result, code, data, message, permission}
    JOB v4          {data}  or  {error: {code, message, details: [{code}], data}}
    NodeMan 2.x     {result, code, data, message, errors}
    NodeMan V3      {code, message, data}  or  {code, error: {message, details}}  or  {code, permission}
    gateway         {result: false, code, code_name, data: null, message}

A failure is classified by the code in the body, then by the HTTP status, never by a message: those are localized.
If a member is given twice, the last one wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from exporter.blueking.text import clean_text
from exporter.errors import ApiError, ApiReason
from exporter.log import redact

T = TypeVar("T")
W = TypeVar("W")

SUCCESS = frozenset({"", "0", "00", "OK"})
"""Codes of success as text; JOB and NodeMan send 0, the ESB sometimes text, NodeMan 1.x "OK", v4 none."""


class Codes(Struct, frozen=True):
    """What the error codes of a system mean. A prefix holds for numbers of seven digits; exact codes go first."""

    exact: dict[str, ApiReason]
    prefixes: dict[str, ApiReason]

    def reason(self, code: str) -> ApiReason | None:
        """The reason that a code stands for, None for an unknown code."""
        if code in self.exact:
            return self.exact[code]
        if len(code) == 7 and code.isdecimal():
            return next((reason for prefix, reason in self.prefixes.items() if code.startswith(prefix)), None)
        return None


_COMMON: dict[str, ApiReason] = {
    "1306000": "auth",  # ESB: every credential failure
    "1306201": "http_5xx",  # ESB: its backend failed in any way
    "1306203": "http_5xx",
    "1306429": "rate_limited",
    "1640001": "auth",  # gateway: every credential failure, under HTTP 400
    "9900403": "permission",  # IAM, as number (JOB) or text (NodeMan)
}
_COMMON_PREFIXES: dict[str, ApiReason] = {
    "16403": "permission",
    "16404": "not_found",
    "16429": "rate_limited",
    "165": "http_5xx",
}

CODES = Codes(
    _COMMON
    | {
        "NO_PERMISSION": "permission",
        "IAM_NO_PERMISSION": "permission",
        "RESOURCE_EXHAUSTED": "rate_limited",
        "NOT_FOUND": "not_found",
        "INTERNAL": "http_5xx",
        "1240002": "api_error",  # JOB v3 internal error: container targets among others, see JobApi.status
        "1243049": "not_found",  # scope unknown or archived
        "1244006": "not_found",  # execution
        "1244007": "not_found",  # step
        "1247002": "auth",  # no user in the gateway's token
        "1247004": "auth",  # no app in it
        "3800003": "not_found",
        "3800015": "not_ready",
        "3800018": "auth",  # no token of the gateway arrived at NodeMan
        "3801012": "not_found",
    },
    _COMMON_PREFIXES | {"38004": "auth"},  # NodeMan folds the framework's 4xx into its codes
)
"""The codes of JOB, of NodeMan 1.x and 2.x, and of the gateway and ESB before them: no number has two meanings."""

NODEMGR_CODES = Codes(
    _COMMON
    | {
        "3800002": "rate_limited",
        "3800003": "not_found",
        "3800007": "auth",  # no user in the gateway's token
        "3830403": "permission",
    },
    _COMMON_PREFIXES,
)
"""The codes of NodeMan V3, whose numbers have other meanings in 2.x. The HTTP status tells the rest."""

_BY_STATUS: dict[int, ApiReason] = {401: "auth", 403: "permission", 404: "not_found", 429: "rate_limited"}


class Reply(Struct, frozen=True):
    """A response; the body is inflated. Header names are found in any case."""

    status: int
    body: bytes | bytearray
    headers: Mapping[str, str]


class WrongShape(ValueError):
    """The JSON is not what the API promises. The message names the path, as `data.data[3].create_time is missing`."""


Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer that a state can keep."""


class Empty(Struct, forbid_unknown_fields=True, gc=False):
    """`{}`, which some APIs of BlueKing send for an empty list."""


def listed(given: list[T] | Empty | None) -> list[T]:
    """The rows; an empty list may also be written as `{}` or null."""
    return given if isinstance(given, list) else []


class _Answer(Struct, Generic[W]):
    """An envelope whose data has the right shape."""

    data: W | UnsetType = UNSET
    result: bool | None = None
    code: int | str | None = None
    error: Raw | None = None


class ResponseDecoder(Generic[W, T]):
    """One form of an API's `data`: the wire type, and how a value is built from it.

    `strict` False accepts numbers written as text, and whole floats for integers.
    """

    def __init__(self, wire: type[W], build: Callable[[W], T], *, strict: bool = True) -> None:
        self.wire = wire
        self._decoder: msgspec.json.Decoder[_Answer[W]] = msgspec.json.Decoder(_Answer[wire], strict=strict)  # type: ignore[valid-type]
        self._build = build

    def read(self, body: bytes | bytearray) -> T:
        """The value. Raises WrongShape, also for the envelope of a failure, and the errors of msgspec."""
        answer = self._decoder.decode(body)
        if answer.data is UNSET:
            raise WrongShape("data is missing")
        if answer.result is False or answer.error is not None or _text_of(answer.code) not in SUCCESS:
            raise WrongShape("not a success")
        return self._build(answer.data)


def read(reply: Reply, decoders: Sequence[ResponseDecoder[Any, T]], codes: Codes = CODES) -> T:
    """The value of a response, by the first of `decoders` that fits. Raises ApiError only."""
    if not 200 <= reply.status < 300:
        raise failure(reply, codes)
    body = reply.body
    for decoder in decoders:
        try:
            return decoder.read(body)
        except (msgspec.ValidationError, WrongShape) as error:
            cause: Exception = error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            cause = error
            repaired = _repair(body)
            if repaired != body:
                return read(msgspec.structs.replace(reply, body=repaired), decoders, codes)
            break
    # Without its traceback, which leads to this frame: a cycle would keep the body until a full collection.
    raise failure(reply, codes, cause.with_traceback(None))


def failure(reply: Reply, codes: Codes = CODES, cause: Exception | None = None) -> ApiError:
    """Build the ApiError for a failed response; `cause` explains a 2xx that cannot be decoded."""
    error_body = _error_body(reply.body)
    found = list(error_body.codes()) if error_body else []
    code = found[0] if found else ""
    known = [reason for reason in map(codes.reason, found) if reason]
    reason: ApiReason | None = known[0] if known else _reason_of_status(reply)
    text = error_body.text() if error_body else ""
    if reason is None and error_body and error_body.failed and (reply.status < 300 or code not in SUCCESS):
        reason = "api_error"
    if reason is None and reply.status >= 400:
        reason = "http_4xx"
    if reason is None:
        reason, text = "decode", _undecodable(reply, cause)
    actions = tuple(error_body.actions()) if error_body and reason == "permission" else ()
    if reason == "permission" and not code.startswith("1640"):
        text = ""  # IAM's text names the user; the missing action is what helps
    code = clean_text(code, 64)
    parts = [f"HTTP {reply.status}", *([f"code {'/'.join([code, *found[1:2]])}"] if code else [])]
    parts += [f"missing permission {', '.join(actions)}"] if actions else []
    head = ", ".join(clean_text(part, 200) for part in parts)
    tail = clean_text(text)
    return ApiError(
        reason,
        f"{head}: {tail}" if tail else head,
        status=reply.status,
        code=code,
        actions=actions,
        request_id=request_ids(reply.headers, error_body.request_ids() if error_body else ()),
    )


def request_ids(headers: Mapping[str, str], others: Iterable[str] = ()) -> str:
    """The ids under which the platform logged a request, separated by commas; "" if it gave none.

    The gateway's id is in a header, the system behind it puts its own into the body.
    """
    found = [headers.get("X-Bkapi-Request-Id") or "", *others]
    return ",".join(dict.fromkeys(filter(None, (clean_text(id, 64) for id in found))))


def _reason_of_status(reply: Reply) -> ApiReason | None:
    if 300 <= reply.status < 400:
        return "auth" if _is_login(reply.headers.get("Location", "")) else "redirect"
    return "http_5xx" if reply.status >= 500 else _BY_STATUS.get(reply.status)


def _is_login(location: str) -> bool:
    try:
        target = urlsplit(location)
        return (target.hostname or "").startswith("login") or "login" in target.path.lower()
    except ValueError:
        return False


class _ErrorBody(Struct):
    """The envelope of a failure, decoded whatever `data` is."""

    result: Raw = Raw(b"")
    code: Raw = Raw(b"")
    error: Raw = Raw(b"")
    message: Raw = Raw(b"")
    permission: Raw = Raw(b"")
    data: Raw = Raw(b"")
    job_request_id: Raw = Raw(b"")
    request_id: Raw = Raw(b"")

    @property
    def failed(self) -> bool:
        return (
            bytes(self.result) not in {b"", b"true", b'"true"', b"1", b"null"}
            or bytes(self.error) not in {b"", b"null"}
            or next(self.codes(), "") not in SUCCESS
        )

    def codes(self) -> Iterator[str]:
        """The codes from the outermost to the innermost, as text."""
        error = _plain(self.error)
        if isinstance(error, dict):
            yield from filter(None, [_text_of(error.get("code"))])
            details = error.get("details")
            for detail in details[:16] if isinstance(details, list) else ():
                if isinstance(detail, dict):
                    yield from filter(None, [_text_of(detail.get("code"))])
        code = _plain(self.code)
        if code is None and bytes(self.code) not in {b"", b"null"}:
            code = bytes(self.code)[:64].decode("utf-8", "replace")  # a number too long to be read
        yield from filter(None, [_text_of(code)])

    def text(self) -> str:
        error = _plain(self.error)
        message = error.get("message") if isinstance(error, dict) else error or _plain(self.message)
        return message if isinstance(message, str) else ""

    def actions(self) -> Iterator[str]:
        """The IAM actions that are missing: beside data (v3), in error.data (v4), in data.permission (NodeMan)."""
        error, data = _plain(self.error), _plain(self.data)
        for place in (
            _plain(self.permission),
            error.get("data") if isinstance(error, dict) else None,
            data.get("permission") if isinstance(data, dict) else None,
        ):
            found = place.get("actions") if isinstance(place, dict) else None
            for action in found[:16] if isinstance(found, list) else ():
                name = action.get("id") if isinstance(action, dict) else None
                if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,64}", redact(name), re.ASCII):
                    yield name

    def request_ids(self) -> Iterator[str]:
        """JOB's id, then that of the ESB or of NodeMan."""
        for member in (self.job_request_id, self.request_id):
            if isinstance(id := _plain(member), str):
                yield id


def _error_body(body: bytes | bytearray) -> _ErrorBody | None:
    """The envelope in a body, None unless it is a JSON object."""
    for text in (body, _repair(body)):
        try:
            return msgspec.json.decode(text, type=_ErrorBody)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
    return None


_SMALL = 64 * 1024
_SHOWN = 120


def _plain(raw: Raw) -> Any:
    """A JSON value as plain Python; None if it is absent, larger than `_SMALL` or broken."""
    if not 0 < len(memoryview(raw)) <= _SMALL:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return None


def _text_of(code: object) -> str:
    """A code as text: 0, 0.0 and "0" are the same."""
    if isinstance(code, float) and code.is_integer():
        code = int(code)
    return "" if code is None else str(code).strip()


def _undecodable(reply: Reply, cause: Exception | None) -> str:
    if isinstance(cause, WrongShape):
        return str(cause)
    if isinstance(cause, msgspec.ValidationError):
        return str(cause).replace("`$.", "`").replace("`$`", "the body")
    start = redact(bytes(reply.body[:4096]).decode("utf-8", "replace"))[:_SHOWN]
    return f"not JSON ({reply.headers.get('Content-Type', 'no content type')}): {start}"


_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)


def text_in(raw: Raw) -> str:
    """The cleaned text in a member that was decoded as Raw; "" if it is no text. Never raises."""
    try:
        return clean_text(_text.decode(raw))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    try:
        return clean_text(_text.decode(_repair(bytes(raw))))
    except msgspec.MsgspecError:
        return ""


_LONE_SURROGATE = re.compile(
    rb"(?<!\\)((?:\\\\)*)\\u(?:"
    rb"d[89ab][0-9a-f]{2}(?!\\ud[c-f][0-9a-f]{2})"  # a high one that no low one follows
    rb"|(?<!\\ud[89ab][0-9a-f]{2}\\u)d[c-f][0-9a-f]{2})",  # a low one after no high one
    re.IGNORECASE,
)


def _repair(body: bytes | bytearray) -> bytes:
    """The body with U+FFFD for invalid UTF-8 and for escaped lone surrogates, so that one bad name fails no page."""
    text = bytes(body).decode("utf-8", "replace").encode()
    return _LONE_SURROGATE.sub(rb"\1\\ufffd", text)
