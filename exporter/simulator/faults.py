"""Faults between a platform and its client, by name.

A fault is added to `Faults` for an API, a scope, every n-th matching call, a number of times or a probability. The
catalogue `FAULTS` says what each fault does. Those in `ACTED_BY_HANDLERS` need knowledge of the API: the module of
that API implements them. All others work for any API.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import functools
import gzip
import json
import random
import re
import socket
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web

from exporter.model import Scope
from exporter.simulator.answer import Answer

FAULTS: Mapping[str, str] = {
    "latency": "answers after `value` seconds (1)",
    "drip": "sends the body byte by byte, one every `value` seconds (1)",
    "blackhole": "accepts the request and never answers",
    "reset_before": "resets the connection before the answer",
    "reset_headers": "resets the connection inside the headers",
    "reset_body": "resets the connection after the headers",
    "truncated": "closes after half of the body",
    "wrong_length": "promises more bytes than it sends",
    "broken_chunk": "sends a chunk whose size is no number",
    "garbage": "200 with random bytes",
    "html_200": "200 with the HTML page of a captive portal",
    "gzip_bomb": "a small gzip body that inflates to `value` MiB (200)",
    "gzip_nested": "a body that is compressed twice",
    "deflate_raw": "deflate without the zlib header",
    "endless": "a body without length and without end",
    "redirect": "302 to the URL `value` (http://elsewhere.invalid/)",
    "redirect_loop": "302 to the same URL",
    "login_redirect": "302 to a login page",
    "deep_json": "a body nested 100000 deep",
    "huge_int": "times of 5000 digits",
    "nan": "NaN where a time should be",
    "infinity": "1e400 where a time should be",
    "huge_id": "the first job_instance_id is 2^63",
    "huge_end_time": "every end_time is 1e30",
    "other_scope": "the first bk_scope_id is that of another business",
    "other_id": "the first job_instance_id is another one",
    "duplicate_keys": "every create_time twice, with different values",
    "null_data": "data is null",
    "invalid_utf8": "names that are no UTF-8",
    "lone_surrogate": "names with half a surrogate pair",
    "http_500": "raw HTML of a proxy",
    "http_502": "raw HTML of a proxy",
    "http_503": "raw HTML of a proxy",
    "http_504": "raw HTML of a proxy",
    "rate_limited": "429 of the gateway, X-Bkapi-RateLimit-Reset is `value` (1); code 1306429 from the ESB",
    "rate_limited_no_reset": "429 of the gateway without any header about it",
    "rate_limited_200": "429 of the gateway rewritten to HTTP 200",
    "unauthorized_empty": "401 without a body",
    "bad_credentials": "400 with code 1640001",
    "clock_skew": "the Date header is `value` seconds ahead (3600)",
    "refused": "JOB refuses the call with the code of a bad request",
    "permission": "the permission for the scope is missing",
    "wrong_total": "the total counts 1000 rows too many",
    "repeated_page": "every page is the first page",
    "ignored_time_filter": "the list ignores its time window",
}

UNANSWERED = 499
"""Status of a response that stands for a broken connection and is never sent."""

ACTED_BY_HANDLERS = frozenset({"refused", "permission", "wrong_total", "repeated_page", "ignored_time_filter"})


@dataclass(frozen=True)
class Fault:
    """One fault, and the calls that it affects. `execution`: calls that name this job_instance_id. `having`: calls
    with this parameter. `every`: each n-th matching call. `times`: after so many calls the fault ends."""

    name: str
    probability: float = 1.0
    api: str | None = None
    scope: Scope | None = None
    execution: int | None = None
    having: str | None = None
    every: int = 1
    times: int | None = None
    value: float | str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers that are added to the answer, for example Retry-After."""

    def __post_init__(self) -> None:
        if self.name not in FAULTS:
            near = difflib.get_close_matches(self.name, FAULTS, 1)
            raise ValueError(f'unknown fault "{self.name}"' + (f' (did you mean "{near[0]}"?)' if near else ""))
        if not 0 <= self.probability <= 1:
            raise ValueError(f"the probability of {self.name} must be between 0 and 1")

    def seconds(self, default: float) -> float:
        return default if self.value is None else float(self.value)


def parse_faults(text: str) -> list[Fault]:
    """Read `name[=value][:probability][@api]`, comma-separated. Raises ValueError."""
    faults = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(?P<name>[^=:@]*)(=(?P<value>[^:@]*))?(:(?P<probability>[^@]*))?(@(?P<api>\w+))?", part)
        if not found:
            raise ValueError(f'"{part}" is not name[=value][:probability][@api]')
        try:
            probability = float(found["probability"] or 1)
        except ValueError:
            raise ValueError(f'"{found["probability"]}" in "{part}" is not a probability') from None
        faults.append(Fault(found["name"], probability, found["api"], value=found["value"]))
    return faults


class Faults:
    """The faults that are switched on."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"{seed} faults")
        self._active: list[tuple[Fault, list[int]]] = []

    def add(self, *faults: Fault) -> None:
        self._active.extend((fault, [0, 0]) for fault in faults)

    def clear(self, name: str | None = None) -> None:
        """Switch off all faults, or those of one name."""
        self._active = [entry for entry in self._active if name is not None and entry[0].name != name]

    def choose(self, api: str, scope: Scope | None, params: Mapping[str, object]) -> tuple[Fault, ...]:
        """The faults that affect this call."""
        chosen = []
        for fault, counts in self._active:
            if fault.api not in (None, api) or fault.scope not in (None, scope):
                continue
            if fault.having is not None and fault.having not in params:
                continue
            if fault.execution is not None and str(fault.execution) != str(params.get("job_instance_id")):
                continue
            counts[0] += 1
            if counts[0] % fault.every or (fault.times is not None and counts[1] >= fault.times):
                continue
            if fault.probability < 1 and self._random.random() >= fault.probability:
                continue
            counts[1] += 1
            chosen.append(fault)
        return tuple(chosen)

    def garbage(self) -> bytes:
        return self._random.randbytes(2000)


HTML_ERROR = "<html><head><title>{0}</title></head><body><center><h1>{0}</h1></center><hr>nginx</body></html>"
HTML_LOGIN = "<!DOCTYPE html><html><head><title>登录</title></head><body><form action='/login/'></form></body></html>"
PHRASES = {500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Time-out"}


def replace(fault: Fault, url: str, garbage: bytes) -> Answer | None:
    """The answer that a fault returns instead of the real one; None if the fault does not replace the answer."""
    headers = dict(fault.headers)
    match fault.name:
        case "http_500" | "http_502" | "http_503" | "http_504":
            status = int(fault.name[5:])
            return Answer(HTML_ERROR.format(f"{status} {PHRASES[status]}").encode(), status, headers, "text/html")
        case "garbage":
            return Answer(garbage, 200, headers)
        case "html_200":
            return Answer(HTML_LOGIN.encode(), 200, headers, "text/html")
        case "redirect":
            return Answer(b"", 302, {"Location": str(fault.value or "http://elsewhere.invalid/"), **headers}, None)
        case "redirect_loop":
            return Answer(b"", 302, {"Location": url, **headers}, None)
        case "login_redirect":
            return Answer(b"", 302, {"Location": "/login/?c_url=/", **headers}, None)
        case "unauthorized_empty":
            return Answer(b"", 401, headers, None)
        case "deep_json":
            return Answer(b"[" * 100_000 + b"]" * 100_000, 200, headers)
        case "gzip_bomb":
            return Answer(_bomb(int(fault.seconds(200))), 200, {"Content-Encoding": "gzip", **headers})
        case _:
            return None


def rewrite(fault: Fault, answer: Answer) -> Answer:
    """The real answer, changed by the fault. `answer.body` is bytes."""
    assert isinstance(answer.body, bytes)
    body, headers = answer.body, {**answer.headers, **fault.headers}

    def times(becomes: bytes) -> bytes:
        spoilt, found = re.subn(rb'"create_time":\s*\d+', b'"create_time":' + becomes, body)
        return spoilt if found else re.sub(rb"\{", b'{"create_time":' + becomes + b",", body, count=1)

    def first(member: bytes, becomes: bytes) -> bytes:
        return re.sub(rb'("%b":\s*)("[^"]*"|\d+)' % member, rb"\g<1>" + becomes, body, count=1)

    match fault.name:
        case "huge_id":
            body = first(b"job_instance_id", b"%d" % 2**63)
        case "huge_end_time":
            body = re.sub(rb'"end_time":\s*\d+', b'"end_time":1e30', body)
        case "other_scope":
            body = first(b"bk_scope_id", b'"999999"')
        case "other_id":
            body = first(b"job_instance_id", b"1")
        case "huge_int":
            body = times(b"9" * 5000)
        case "nan":
            body = times(b"NaN")
        case "infinity":
            body = times(b"1e400")
        case "duplicate_keys":
            body = times(b'1,"create_time":2')
        case "invalid_utf8":
            body = re.sub(rb'"name":\s*"', b'"name":"\xff\xfe', body)
        case "lone_surrogate":
            body = re.sub(rb'"name":\s*"', rb'"name":"\\ud800', body)
        case "null_data":
            with contextlib.suppress(ValueError):
                body = json.dumps({**json.loads(body), "data": None}).encode()
        case "gzip_nested":
            body, headers["Content-Encoding"] = gzip.compress(gzip.compress(body)), "gzip, gzip"
        case "deflate_raw":
            packer = zlib.compressobj(wbits=-15)
            body, headers["Content-Encoding"] = packer.compress(body) + packer.flush(), "deflate"
    return Answer(body, answer.status, headers, answer.content_type)


async def break_off(fault: Fault, request: web.Request, answer: Answer) -> web.StreamResponse | None:
    """Send a broken HTTP response; None if the fault does not break the connection."""
    assert isinstance(answer.body, bytes)
    body, half = answer.body, len(answer.body) // 2
    head = (
        f"HTTP/1.1 {answer.status} OK\r\nContent-Type: application/json\r\nDate: {answer.headers.get('Date', '')}\r\n"
    ).encode()
    length = f"Content-Length: {len(body)}\r\n\r\n".encode()
    match fault.name:
        case "blackhole":
            await asyncio.Event().wait()  # the server cancels it when the client gives up
        case "reset_before":
            return await _raw(request, b"", reset=True)
        case "reset_headers":
            return await _raw(request, head[: len(head) // 2], reset=True)
        case "reset_body":
            return await _raw(request, head + length + body[:half], reset=True)
        case "truncated":
            return await _raw(request, head + length + body[:half])
        case "wrong_length":
            return await _raw(request, head + f"Content-Length: {len(body) + 100}\r\n\r\n".encode() + body)
        case "broken_chunk":
            return await _raw(request, head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body)
        case "drip":
            response = await _start(request, answer, {"Content-Length": str(len(body))})
            with contextlib.suppress(ConnectionError):
                for byte in body:
                    await response.write(bytes([byte]))
                    await asyncio.sleep(fault.seconds(1))
            return response
        case "endless":
            response = await _start(request, answer, {})
            with contextlib.suppress(ConnectionError):
                await response.write(b'{"data":[0')
                while True:
                    await response.write(b",0" * 32_768)
                    await asyncio.sleep(0)
            return response
    return None


async def _start(request: web.Request, answer: Answer, headers: Mapping[str, str]) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers={**answer.headers, **headers})
    response.content_type = "application/json"
    await response.prepare(request)
    return response


async def _raw(request: web.Request, sent: bytes, *, reset: bool = False) -> web.StreamResponse:
    """Send exactly these bytes and close the connection. They bypass aiohttp, which would refuse to send them."""
    transport = request.transport
    if transport is not None:
        transport.write(sent)
        if sent:
            await asyncio.sleep(0.02)  # a reset throws away what has not left yet
        if reset and (raw := transport.get_extra_info("socket")) is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()
    # aiohttp wants a response; the connection is gone, so nobody gets it.
    return web.Response(status=UNANSWERED)


@functools.cache
def _bomb(mebibytes: int) -> bytes:
    packer = zlib.compressobj(1, wbits=31)
    chunks = [packer.compress(b'{"x":"')]
    chunks += [packer.compress(b"a" * 2**20) for _ in range(mebibytes)]
    chunks += [packer.compress(b'"}'), packer.flush()]
    return b"".join(chunks)
