"""From bytes to a value or a reason: the table of the contract, and that nothing but these two ever comes out."""

from __future__ import annotations

import json
import traceback
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Struct

from exporter.blueking.envelope import NODEMGR_CODES, Reply, ResponseDecoder, WrongShape, read
from exporter.blueking.steps import step_slug
from exporter.blueking.text import clean_text
from exporter.blueking.values import host, status_slug, word
from exporter.errors import API_REASONS, ApiError
from exporter.log import redact_values
from exporter.model import Host
from tests.support.upstream import CANARY


class Page(Struct):
    rows: list[int]


DECODERS = [
    ResponseDecoder(Page, lambda page: tuple(page.rows)),
    ResponseDecoder(Page, lambda page: tuple(page.rows), strict=False),
]


def answer(body: object, status: int = 200, **headers: str) -> tuple[int, ...]:
    """Read `body`, given as bytes or as what is to be JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    return read(Reply(status, raw, {name.replace("_", "-"): value for name, value in headers.items()}), DECODERS)


def refusal(body: object, status: int = 200, **headers: str) -> ApiError:
    """The error that reading `body` gives."""
    with pytest.raises(ApiError) as caught:
        answer(body, status, **headers)
    return caught.value


@pytest.mark.parametrize(
    "envelope",
    [
        {},
        {"code": 0, "result": True},
        {"code": "0", "result": True, "message": ""},
        {"code": "00", "result": True},
        {"code": "OK", "result": True},
        {"code": 0},
        {"result": True},
        {"result": "true", "code": 0.0},
        {"result": None, "code": None, "error": None, "errors": None, "permission": None},
    ],
)
def test_F11_every_form_of_success_is_read(envelope: dict[str, Any]) -> None:
    """JOB v3 and v4, NodeMan, ESB and NodeMan 1.x say success in different words."""
    assert answer({"data": {"rows": [1, 2]}, **envelope}) == (1, 2)


FAILED = {"result": False, "data": None, "message": "text"}

CONTRACT = [
    # auth
    (400, {**FAILED, "code": 1640001, "code_name": "INVALID_ARGS"}, "auth"),
    (200, {**FAILED, "code": 1640001}, "auth"),
    (401, b"", "auth"),
    (401, {**FAILED, "code": 1247002}, "auth"),
    (401, {**FAILED, "code": 99}, "auth"),
    (200, {**FAILED, "code": 1306000}, "auth"),
    (200, {**FAILED, "code": 3800401}, "auth"),
    (200, {**FAILED, "code": 3800018}, "auth"),
    (401, b"<html>login</html>", "auth"),
    # permission
    (200, {**FAILED, "code": 9900403}, "permission"),
    (200, {**FAILED, "code": "9900403"}, "permission"),
    (403, {"error": {"code": "NO_PERMISSION", "message": "m"}}, "permission"),
    (403, {"error": {"code": "IAM_NO_PERMISSION", "message": "m"}}, "permission"),
    (403, {**FAILED, "code": 1640301}, "permission"),
    (200, {**FAILED, "code": 1640302}, "permission"),
    (403, b"<html>", "permission"),
    # rate_limited
    (429, b"", "rate_limited"),
    (429, {**FAILED, "code": 1642901}, "rate_limited"),
    (200, {**FAILED, "code": 1642903}, "rate_limited"),
    (200, {**FAILED, "code": 1306429}, "rate_limited"),
    (429, {"error": {"code": "RESOURCE_EXHAUSTED"}}, "rate_limited"),
    # not_found
    (200, {**FAILED, "code": 1243049}, "not_found"),
    (200, {**FAILED, "code": 1244006}, "not_found"),
    (200, {**FAILED, "code": "1244007"}, "not_found"),
    (404, {"error": {"code": "NOT_FOUND", "details": [{"code": "1244006"}]}}, "not_found"),
    (400, {"error": {"code": "INVALID_ARGUMENT", "details": [{"code": "1243049"}]}}, "not_found"),
    (200, {**FAILED, "code": 3801012}, "not_found"),
    (200, {**FAILED, "code": 3800003}, "not_found"),
    (404, {**FAILED, "code": 1640401}, "not_found"),
    (404, b"<html><h1>Not Found</h1></html>", "not_found"),
    (404, {"result": False, "data": None, "message": "no code"}, "not_found"),
    # not_ready
    (200, {**FAILED, "code": 3800015}, "not_ready"),
    # http_5xx
    (502, b"<html>bad gateway</html>", "http_5xx"),
    (500, {**FAILED, "code": 1650001}, "http_5xx"),
    (200, {**FAILED, "code": 1650401}, "http_5xx"),
    (500, {"error": {"code": "INTERNAL", "details": [{"code": "1240002"}]}}, "http_5xx"),
    (200, {**FAILED, "code": 1306201}, "http_5xx"),
    (200, {**FAILED, "code": 1306203}, "http_5xx"),
    (503, {"data": {"rows": []}, "code": 0, "result": True}, "http_5xx"),
    # http_4xx
    (413, b"<html>too large</html>", "http_4xx"),
    (400, b"", "http_4xx"),
    (405, {"message": "no code here"}, "http_4xx"),
    # api_error
    (200, {**FAILED, "code": 1240002}, "api_error"),
    (500, {**FAILED, "code": 1240002}, "api_error"),
    (200, {**FAILED, "code": 1241007}, "api_error"),
    (200, {**FAILED, "code": "OBJECT_NOT_EXIST"}, "api_error"),
    (200, FAILED, "api_error"),
    (200, {"result": True, "code": 3600001, "data": {"rows": []}}, "api_error"),
    (200, {"result": False, "code": 0, "data": {"rows": []}}, "api_error"),
    (200, {"error": {"code": "SOMETHING", "message": "new"}}, "api_error"),
    (200, {"error": {"message": "no code"}, "data": {"rows": []}}, "api_error"),
    (400, {"error": {"code": "INVALID_ARGUMENT", "details": [{"code": "1241025"}]}}, "api_error"),
    (413, {**FAILED, "code": 1641301}, "api_error"),
    # decode
    (200, b"", "decode"),
    (204, b"", "decode"),
    (200, b"<!DOCTYPE html><title>Login</title>", "decode"),
    (200, b'{"data": {"rows": [1', "decode"),
    (200, [1, 2], "decode"),
    (200, {}, "decode"),
    (200, {"code": 0, "result": True}, "decode"),
    (200, {"code": 0, "result": True, "data": None}, "decode"),
    (200, {"code": 0, "result": True, "data": []}, "decode"),
    (200, {"data": {"rows": {"a": 1}}}, "decode"),
    (200, {"data": {"rows": [None]}}, "decode"),
    (200, {"data": {"rows": [True]}}, "decode"),
    # redirect
    (304, b"", "redirect"),
]


@pytest.mark.parametrize(("status", "body", "reason"), CONTRACT)
def test_F11_answers_map_to_one_reason(status: int, body: object, reason: str) -> None:
    """The reason table of the contract: the body's code first, then the HTTP status, never the text."""
    error = refusal(body, status)
    assert error.reason == reason
    assert error.status == status


V3 = [
    (
        401,
        {"code": 3800007, "request_id": "rid:1", "error": {"system": "nodemgr", "message": "username is required"}},
        "auth",
    ),
    (
        403,
        {"code": 3830403, "request_id": "rid:1", "permission": {"actions": [{"id": "agent_history_view"}]}},
        "permission",
    ),
    (429, {"code": 3800002, "error": {"message": "m"}}, "rate_limited"),
    (200, {"code": 3800002, "error": {"message": "m"}}, "rate_limited"),
    (404, {"code": 3800003, "error": {"message": "m"}}, "not_found"),
    (400, {"code": 3800001, "error": {"message": "m", "details": [{"code": "", "message": "x"}]}}, "api_error"),
    (500, {"code": 3800009, "error": {"message": "m"}}, "http_5xx"),
    (500, {"code": 3800000, "error": {"message": "m"}}, "http_5xx"),
    (503, {"code": 3800005, "error": {"message": "m"}}, "http_5xx"),
    (500, {"code": 3800015, "error": {"message": "no 2.x number"}}, "http_5xx"),
    (200, {"code": 3800015, "error": {"message": "no 2.x number"}}, "api_error"),
    (200, {"code": 3800018, "error": {"message": "no 2.x number"}}, "api_error"),
    (200, {"code": 3800401, "error": {"message": "no 2.x number"}}, "api_error"),
    (400, {**FAILED, "code": 1640001}, "auth"),
    (429, {**FAILED, "code": 1642901}, "rate_limited"),
    (200, {"code": 0, "message": "OK", "request_id": "rid:1", "data": None}, "decode"),
]


@pytest.mark.parametrize(("status", "body", "reason"), V3)
def test_4_4_numbers_of_nodeman_v3_are_classified_as_such(status: int, body: object, reason: str) -> None:
    """They overlap with those of 2.x; what has no entry is reported by the HTTP status."""
    with pytest.raises(ApiError) as caught:
        read(Reply(status, json.dumps(body).encode(), {}), DECODERS, NODEMGR_CODES)
    assert caught.value.reason == reason


@pytest.mark.parametrize("code", [3800007, 3830403, 3800002])
def test_4_4_numbers_of_nodeman_v3_mean_nothing_in_2x(code: int) -> None:
    """A 2.x that sends one has failed in a way that is not known."""
    assert refusal({**FAILED, "code": code}).reason == "api_error"


def test_4_4_a_success_of_nodeman_v3_is_read() -> None:
    """It has no `result`."""
    body = {"code": 0, "message": "OK", "request_id": "rid:1", "data": {"rows": [1]}}
    assert read(Reply(200, json.dumps(body).encode(), {}), DECODERS, NODEMGR_CODES) == (1,)


@pytest.mark.parametrize(
    ("body", "headers", "ids"),
    [
        ({**FAILED, "code": 1640301}, {"X-Bkapi-Request-Id": "gateway1"}, "gateway1"),
        ({**FAILED, "code": 1240002, "job_request_id": "job1"}, {"X-Bkapi-Request-Id": "gateway1"}, "gateway1,job1"),
        ({**FAILED, "code": 1306201, "request_id": "esb1"}, {}, "esb1"),
        ({"code": 3800003, "request_id": "rid:1", "error": {}}, {"X-Bkapi-Request-Id": "rid:1"}, "rid:1"),
        ({"error": {"code": "NOT_FOUND"}, "job_request_id": "job1"}, {}, "job1"),
        ({"data": {"rows": "odd"}, "job_request_id": "job1"}, {}, "job1"),
        (b"<html>", {"X-Bkapi-Request-Id": "gateway1"}, "gateway1"),
        ({**FAILED, "request_id": 5, "job_request_id": None}, {}, ""),
        ({**FAILED, "request_id": "line\nfeed" + "x" * 100}, {}, "line\ufffdfeed" + "x" * 55),
        (b"", {}, ""),
    ],
)
def test_4_4_the_platforms_request_ids_are_kept(body: object, headers: dict[str, str], ids: str) -> None:
    """Of the gateway, and of the system behind it; each once, cleaned and cut."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        read(Reply(200, raw, headers), DECODERS)
    assert caught.value.request_id == ids


@pytest.mark.parametrize(
    ("status", "location", "reason"),
    [
        (302, "http://paas.example.com/login/?c_url=/", "auth"),
        (302, "/o/login/plain/", "auth"),
        (302, "https://login.example.com/", "auth"),
        (302, "https://elsewhere.example.com/api?next=login", "redirect"),
        (301, "https://other.example.com/api/", "redirect"),
        (307, "file:///etc/passwd", "redirect"),
        (302, "http://[broken", "redirect"),
    ],
)
def test_F07_redirects_are_distinguished_by_their_target(status: int, location: str, reason: str) -> None:
    """A redirect to a login page means that the credentials were not accepted; any other one is a wrong URL."""
    assert refusal(b"", status, Location=location).reason == reason


@pytest.mark.parametrize(
    ("body", "actions"),
    [
        ({**FAILED, "code": 9900403, "permission": {"actions": [{"id": "access_business"}]}}, ("access_business",)),
        (
            {
                "error": {
                    "code": "NO_PERMISSION",
                    "message": "User (ops01)",
                    "data": {"actions": [{"id": "view_history"}]},
                }
            },
            ("view_history",),
        ),
        (
            {**FAILED, "code": "9900403", "data": {"permission": {"actions": [{"id": "task_history_view"}]}}},
            ("task_history_view",),
        ),
        ({**FAILED, "code": 9900403, "permission": {"actions": [{"id": "bad\nid"}, 1, {"id": 2}, None]}}, ()),
        ({**FAILED, "code": 9900403, "permission": "odd"}, ()),
    ],
)
def test_F11_permission_errors_name_the_action_not_the_user(body: dict[str, Any], actions: tuple[str, ...]) -> None:
    """Who reads the log learns which permission to apply for, and no user name."""
    error = refusal({**body, "message": "User (ops01) permission not allowed"}, 200)
    assert (error.reason, error.actions) == ("permission", actions)
    assert all(action in str(error) for action in actions)
    assert "ops01" not in str(error)


def test_v4_error_keeps_both_codes() -> None:
    """The text code is the code, the number behind it stands in the message."""
    error = refusal({"error": {"code": "NOT_FOUND", "message": "gone", "details": [{"code": "1244006"}]}}, 404)
    assert error.code == "NOT_FOUND"
    assert str(error) == "HTTP 404, code NOT_FOUND/1244006: gone"


def test_F27_secrets_are_redacted_before_the_text_is_cut() -> None:
    """A secret that an error text repeats across the cut is not shown half."""
    redact_values([CANARY])
    for echo in (CANARY, json.dumps(CANARY)[1:-1]):
        for padding in range(230, 257, 3):
            error = refusal({**FAILED, "code": 1306000, "message": "x" * padding + echo}, 200)
            assert CANARY[:7] not in str(error)
        page = refusal(b"<html>" + b"x" * 100 + echo.encode())
        assert "canary" not in "".join(traceback.format_exception(page))


def test_F04_a_page_of_html_is_shown_in_a_few_cleaned_characters() -> None:
    """A login page or a captive portal under 200 is a decode error whose text is short and one line."""
    error = refusal(b"<html>\r\n\x1b[31m\x00<body>" + b"x" * 10_000, Content_Type="text/html")
    assert error.reason == "decode"
    assert "text/html" in str(error)
    assert len(str(error)) <= 256
    assert str(error).isprintable()


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        b'{"data":{"rows":' + DEEP + b"]" * 100_000 + b"}}",
        b'{"data":{"rows":[1]},"x":' + DEEP + b"]" * 100_000 + b"}",
        b'{"data":{"rows":[' + b"7" * 5000 + b"]}}",
        b'{"data":{"rows":[NaN]}}',
        b'{"data":{"rows":[Infinity]}}',
        b'{"data":{"rows":[1e400]}}',
        b'{"data":{"rows":[1]},"x":NaN}',
        b'{"code":' + b"7" * 5000 + b"}",
        b'{"error":{"code":' + DEEP + b"}}",
    ],
)
def test_F08_monstrous_json_is_an_error_and_no_crash(body: bytes) -> None:
    """Depth, digits and numbers that are none end as a typed error."""
    assert refusal(body).reason in {"decode", "api_error"}


def test_F08_of_a_member_that_stands_twice_the_last_one_wins() -> None:
    """The documented policy, in the envelope and in the data."""
    assert answer(b'{"code":7,"code":0,"data":{"rows":[1]},"data":{"rows":[2],"rows":[3]}}') == (3,)
    assert refusal(b'{"code":0,"code":1244006,"data":{"rows":[1]}}').reason == "not_found"


class Names(Struct):
    names: list[str]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a\xffb", "a\ufffdb"),
        (b"a\\ud800b", "a\ufffdb"),
        (b"a\\udfffb", "a\ufffdb"),
        (b"\\ud800\\ud800\\udc00", "\ufffd\U00010000"),
        (b"\\\\ud800\\ud83d\\ude00\xff", "\\ud800\U0001f600\ufffd"),
        ("é备份".encode(), "é备份"),
    ],
)
def test_F09_what_is_no_unicode_is_replaced(text: bytes, expected: str) -> None:
    """Invalid UTF-8 and lone surrogates cost one character, not the page."""
    body = b'{"data":{"names":["' + text + b'"]}}'
    assert read(Reply(200, body, {}), [ResponseDecoder(Names, lambda data: data.names)]) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nightly-备份 \"x\" \\ 'y'", "nightly-备份 \"x\" \\ 'y'"),
        ("a\nb\r\tc\x00\x1b[31m\x7f\x85", "a\ufffdb\ufffd\ufffdc\ufffd\ufffd[31m\ufffd\ufffd"),
        ("\u202eevil\u2066\u2028\u2029\ud800\ufeff", "\ufffdevil\ufffd\ufffd\ufffd\ufffd\ufffd"),
        ("x" * 1_000_000, "x" * 256),
    ],
)
def test_F10_texts_keep_what_is_harmless(text: str, expected: str) -> None:
    """Quotes and other scripts stay; controls become U+FFFD; 256 characters are kept."""
    assert clean_text(text) == expected


def test_F12_the_error_names_the_path() -> None:
    """A wrong type is found in the log by its path in the answer."""
    assert "`data.rows[2]`" in str(refusal({"data": {"rows": [1, 2, []]}}))

    def build(_: Page) -> tuple[int, ...]:
        raise WrongShape("data.rows[0] is odd")

    with pytest.raises(ApiError, match=r"data\.rows\[0\] is odd"):
        read(Reply(200, b'{"data":{"rows":[1]}}', {}), [ResponseDecoder(Page, build)])


@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(["data", "code", "result", "error", "details", "permission", "rows"]), inner
                )
            ),
        ).map(lambda value: json.dumps(value).encode()),
    ),
    st.integers(200, 599),
)
@example(b"\xef\xbb\xbf{}", 200)
@example(b'{"error":0}', 200)
@example(b'{"code":{}}', 200)
def test_F50_any_body_is_a_value_or_an_api_error(body: bytes, status: int) -> None:
    """No bytes and no status make anything else happen."""
    try:
        rows = answer(body, status)
    except ApiError as error:
        refused = error
    else:
        assert 200 <= status < 300
        assert all(isinstance(row, int) for row in rows)
        return
    assert refused.reason in API_REASONS
    assert not any(character < " " for character in str(refused))
    assert str(refused).encode()


def test_F72_texts_are_redacted_before_they_are_cut_and_kept() -> None:
    """Names, addresses, statuses, types and steps: half a secret would be no match, and a label would show it."""
    secret = "r3dacted_secret_value"
    redact_values([secret])
    assert clean_text("n" * 250 + secret) == "n" * 250 + "***"
    assert clean_text("x" * 60 + secret, 64) == "x" * 60 + "***"
    assert (word(secret), word(f"A{secret}"), word("INSTALL_AGENT")) == ("other", "other", "INSTALL_AGENT")
    assert step_slug(secret, None, plugin=False) == "other"
    assert status_slug(secret) == "***"
    assert host(secret, None, secret) == Host("***", "", "***")
