"""From the bytes of an answer to a value, or to the `ApiError` that says why not.

BlueKing wraps its answers in several envelopes, and failures come under HTTP 200 as well as under 4xx and 5xx:

    JOB v3, ESB     {result, code, data, message, permission}
    JOB v4          {data}  or  {error: {code, message, details: [{code}], data}}
    NodeMan         {result, code, data, message, errors}
    gateway         {result: false, code, code_name, data: null, message}

A failure is classified by the code in the body, then by the HTTP status, never by a message: those are localized.
Of a member that stands twice the last one wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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

_BY_CODE: dict[str, ApiReason] = {
    "9900403": "permission",  # IAM, as number (JOB) or text (NodeMan)
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
    "1306000": "auth",  # ESB: every credential failure
    "1306201": "http_5xx",  # ESB: its backend failed in any way
    "1306203": "http_5xx",
    "1306429": "rate_limited",
    "1640001": "auth",  # gateway: every credential failure, under HTTP 400
    "3800003": "not_found",
    "3800015": "not_ready",
    "3800018": "auth",  # NodeMan: the gateway's token has not arrived at it
    "3801012": "not_found",
}
_BY_PREFIX: tuple[tuple[str, ApiReason], ...] = (
    ("38004", "auth"),  # NodeMan folds the framework's 4xx into its codes
    ("16403", "permission"),
    ("16404", "not_found"),
    ("16429", "rate_limited"),
    ("165", "http_5xx"),
)
_BY_STATUS: dict[int, ApiReason] = {401: "auth", 403: "permission", 404: "not_found", 429: "rate_limited"}


class Reply(Struct, frozen=True):
    """What came over HTTP; the body is inflated."""

    status: int
    body: bytes | bytearray
    headers: Mapping[str, str]


class WrongShape(ValueError):
    """The JSON is not what the API promises. The message names the path, as `data.data[3].create_time is missing`."""


Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer that a state can keep."""


class Empty(Struct, forbid_unknown_fields=True, gc=False):
    """`{}`, which BlueKing sends here and there for an empty list."""


def listed(given: list[T] | Empty | None) -> list[T]:
    """The rows, whichever way an empty list was sent."""
    return given if isinstance(given, list) else []


class _Answer(Struct, Generic[W]):
    """An envelope whose data has the right shape."""

    data: W | UnsetType = UNSET
    result: bool | None = None
    code: int | str | None = None
    error: Raw | None = None


class ResponseDecoder(Generic[W, T]):
    """One form in which an API may answer: the wire type of `data`, and what is made of it.

    `strict` False takes numbers written as text and whole floats for integers.
    """

    def __init__(self, wire: type[W], build: Callable[[W], T], *, strict: bool = True) -> None:
        self._decoder: msgspec.json.Decoder[_Answer[W]] = msgspec.json.Decoder(_Answer[wire], strict=strict)  # type: ignore[valid-type]
        self._build = build

    def read(self, body: bytes | bytearray) -> T:
        """The value. Raises WrongShape also where the platform tells of a failure, and what msgspec raises."""
        answer = self._decoder.decode(body)
        if answer.data is UNSET:
            raise WrongShape("data is missing")
        if answer.result is False or answer.error is not None or _text_of(answer.code) not in SUCCESS:
            raise WrongShape("not a success")
        return self._build(answer.data)


def read(reply: Reply, decoders: Sequence[ResponseDecoder[Any, T]]) -> T:
    """The value of an answer, by the first of `decoders` that fits. Raises ApiError and nothing else."""
    if not 200 <= reply.status < 300:
        raise failure(reply)
    body = reply.body
    for decoder in decoders:
        try:
            return decoder.read(body)
        except (msgspec.ValidationError, WrongShape) as error:
            odd: Exception = error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            odd = error
            repaired = _repair(body)
            if repaired != body:
                return read(msgspec.structs.replace(reply, body=repaired), decoders)
            break
    raise failure(reply, odd)


def failure(reply: Reply, odd: Exception | None = None) -> ApiError:
    """Why an answer is none. `odd` is what was wrong with it, should it call itself a success."""
    error_body = _error_body(reply.body)
    codes = list(error_body.codes()) if error_body else []
    code = codes[0] if codes else ""
    known = [known for known in map(_reason_of_code, codes) if known]
    reason: ApiReason | None = known[0] if known else _reason_of_status(reply)
    text = error_body.text() if error_body else ""
    if reason is None and error_body and error_body.failed and (reply.status < 300 or code not in SUCCESS):
        reason = "api_error"
    if reason is None and reply.status >= 400:
        reason = "http_4xx"
    if reason is None:
        reason, text = "decode", _what_is_odd(reply, odd)
    actions = tuple(error_body.actions()) if error_body and reason == "permission" else ()
    if reason == "permission" and not code.startswith("1640"):
        text = ""  # IAM's text names the user; the missing action is what helps
    code = clean_text(redact(code), 64)
    parts = [f"HTTP {reply.status}", *([f"code {'/'.join([code, *codes[1:2]])}"] if code else [])]
    parts += [f"missing permission {', '.join(actions)}"] if actions else []
    head = ", ".join(clean_text(redact(part), 200) for part in parts)
    tail = clean_text(redact(text))
    return ApiError(reason, f"{head}: {tail}" if tail else head, status=reply.status, code=code, actions=actions)


def _reason_of_code(code: str) -> ApiReason | None:
    if code in _BY_CODE:
        return _BY_CODE[code]
    if len(code) == 7 and code.isdecimal():
        return next((reason for prefix, reason in _BY_PREFIX if code.startswith(prefix)), None)
    return None


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
    """What an envelope says of a failure, read without any expectation of `data`."""

    result: Raw = Raw(b"")
    code: Raw = Raw(b"")
    error: Raw = Raw(b"")
    message: Raw = Raw(b"")
    permission: Raw = Raw(b"")
    data: Raw = Raw(b"")

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
                if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
                    yield name


def _error_body(body: bytes | bytearray) -> _ErrorBody | None:
    """The envelope of a body, None unless it is a JSON object."""
    for text in (body, _repair(body)):
        try:
            return msgspec.json.decode(text, type=_ErrorBody)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
    return None


_SMALL = 64 * 1024
_SHOWN = 120


def _plain(raw: Raw) -> Any:
    """A small JSON value as plain Python, None for what is absent, large or broken: an error needs no megabytes."""
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


def _what_is_odd(reply: Reply, odd: Exception | None) -> str:
    if isinstance(odd, WrongShape):
        return str(odd)
    if isinstance(odd, msgspec.ValidationError):
        return str(odd).replace("`$.", "`").replace("`$`", "the body")
    start = redact(bytes(reply.body[:4096]).decode("utf-8", "replace"))[:_SHOWN]
    return f"not JSON ({reply.headers.get('Content-Type', 'no content type')}): {start}"


_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)


def text_in(raw: Raw) -> str:
    """The text, cleaned, that a member read as Raw spells; "" for anything else. Never raises."""
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
    """The body with U+FFFD for invalid UTF-8 and for escapes of lone surrogates: one odd name must not cost a page."""
    text = bytes(body).decode("utf-8", "replace").encode()
    return _LONE_SURROGATE.sub(rb"\1\\ufffd", text)
