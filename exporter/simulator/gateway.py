"""What the API gateway and the ESB add to the systems behind them: authentication, rate limits, error envelopes.

Facts: bk-apigateway plugins bk-auth-verify and bk-core/errorx; paas-ce esb common/errors.py, channel/base.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from exporter.simulator.platform import Answer, Call, Platform

CREDENTIALS = frozenset({
    "bk_app_code", "bk_app_secret", "app_code", "app_secret", "bk_username", "username",
    "bk_token", "access_token", "bk_access_token", "bk_ticket",
})  # fmt: skip


def gateway_error(platform: Platform, status: int, code: int, code_name: str, message: str) -> Answer:
    """An answer of the gateway itself, not of the system behind it."""
    request_id = f"{platform.random.getrandbits(128):032x}"
    headers = {
        "X-Bkapi-Error-Code": str(code),
        "X-Bkapi-Error-Message": message,
        "X-Bkapi-Request-ID": request_id,
        "X-Request-ID": request_id,
    }
    body = {"code": code, "code_name": code_name, "message": message, "result": False, "data": None}
    return Answer(body, status, headers, "application/json; charset=utf-8")


def esb_error(platform: Platform, code: int, message: str) -> Answer:
    """An error of the ESB: always HTTP 200."""
    return Answer({
        "result": False, "code": code, "data": None, "message": message,
        "request_id": f"{platform.random.getrandbits(128):032x}",
    })  # fmt: skip


def esb_wrap(platform: Platform, call: Call, answer: Answer) -> Answer:
    """Pass an answer of the backend through the ESB."""
    where = f"Component request third-party system [{call.path.split('/')[5].upper()}] interface [{call.api}] error: "
    if answer.status != 200:
        return esb_error(
            platform, 1306201, f"{where}Status Code: {answer.status}, Error Message: Third-party system internal error"
        )
    if not isinstance(answer.body, dict):
        return esb_error(platform, 1306201, f"{where}interface response is not the JSON format")
    body = dict(answer.body)
    body["request_id"] = f"{platform.random.getrandbits(128):032x}"
    body.setdefault("message", "")
    body.setdefault("data", None)
    return Answer(body, 200, answer.headers, answer.content_type)


def authenticate(
    platform: Platform, call: Call, headers: Mapping[str, str], cookies: Mapping[str, str], given: Mapping[str, object]
) -> Answer | None:
    """Set `call.user`, or return the refusal. `given`: the credentials among the parameters."""
    if call.dialect == "esb":
        return _esb_credentials(platform, call, headers, cookies, given)
    return _gateway_credentials(platform, call, headers, cookies)


def limit(platform: Platform, call: Call) -> tuple[Answer | None, dict[str, str]]:
    """Count the call for the rate limit. Returns the refusal, if any, and the headers of every answer."""
    remaining = platform.take_quota()
    if remaining is None:
        return None, {}
    quota = {
        "X-Bkapi-RateLimit-Limit": str(platform.rate_limit),
        "X-Bkapi-RateLimit-Remaining": str(max(remaining, 0)),
        "X-Bkapi-RateLimit-Reset": "1",
        "X-Bkapi-RateLimit-Plugin": "bk-stage-rate-limit",
    }
    if not platform.quota_headers or call.dialect == "esb":
        quota = {}
    if remaining >= 0:
        return None, quota
    if call.dialect == "esb":
        return esb_error(platform, 1306429, f"Access frequency of APP [{platform.app_code}] exceeds the limit"), quota
    return rate_limited(platform), quota


def rate_limited(platform: Platform) -> Answer:
    message = "API rate limit exceeded by stage global limit"
    return gateway_error(platform, 429, 1642901, "RATE_LIMIT_RESTRICTION", message)


def _invalid(platform: Platform, reason: str) -> Answer:
    # Every failure to identify the app or the user is a 400 here; 401 belongs to the OAuth2 flow.
    return gateway_error(platform, 400, 1640001, "INVALID_ARGS", f'Parameters error [reason="{reason}"]')


def _credentials_in_header(headers: Mapping[str, str]) -> dict[str, object] | None:
    """The members of X-Bkapi-Authorization with the aliases resolved, None if it is no JSON object, {} if absent."""
    text = headers.get("X-Bkapi-Authorization")
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return _resolve(value) if isinstance(value, dict) else None


def _resolve(value: Mapping[str, object]) -> dict[str, object]:
    alias = {
        "app_code": "bk_app_code", "app_secret": "bk_app_secret", "username": "bk_username",
        "bk_access_token": "access_token",
    }  # fmt: skip
    return {alias.get(name, name): member for name, member in value.items()}


def _gateway_credentials(
    platform: Platform, call: Call, headers: Mapping[str, str], cookies: Mapping[str, str]
) -> Answer | None:
    given = _credentials_in_header(headers)
    if given is None:
        return _invalid(platform, "request header X-Bkapi-Authorization is not a valid JSON")
    user = ""
    if token := given.get("access_token"):
        if token not in platform.access_tokens:
            return _invalid(
                platform, "access_token is invalid, url: http://bkauth.example.com/api/v1/token/verify, code: 403"
            )
        user = platform.access_tokens[str(token)]
    else:
        code, secret = str(given.get("bk_app_code") or ""), str(given.get("bk_app_secret") or "")
        if not code:
            return _invalid(platform, "app code cannot be empty")
        if len(code) > 32 or len(secret) > 128:
            return _invalid(platform, "app code or app secret is too long")
        if (code, secret) != (platform.app_code, platform.app_secret):
            return _invalid(platform, "bk_app_code or bk_app_secret is incorrect")
        user = _named_user(platform, call, given, cookies)
    tenant_id = platform.tenants.get(call.scope, platform.tenant_id) if call.scope else platform.tenant_id
    if tenant_id is not None and call.tenant_id != tenant_id:
        message = (
            'Cross tenant forbidden [reason="Cross-tenant calls are not allowed: header X-Bk-Tenant-Id is required and '
            f'should not be empty. the app {platform.app_code} tenant_mode=global. [AH1]"]'
        )
        return gateway_error(platform, 403, 1640302, "CROSS_TENANT_FORBIDDEN", message)
    if call.app_type:
        # The gateway passes the header on untouched; JOB alone looks at it.
        named = headers.get("X-Bk-Username", "") if call.dialect in ("v4", "v3") and platform.job_reads_header else ""
        call.user = named or user
        return None
    if not user:
        if given.get("bk_username"):
            reason = "user authentication failed, the user indicated by bk_username is not verified"
        else:
            reason = "user authentication failed, please provide a valid user identity, such as bk_username, bk_token"
        return _invalid(platform, reason)
    call.user = user
    return None


def _named_user(platform: Platform, call: Call, given: Mapping[str, object], cookies: Mapping[str, str]) -> str:
    """The user that the gateway writes into its token for the backend, "" for none."""
    if call.app_type and platform.skips_user_verification:
        return ""
    if login := given.get("bk_token") or cookies.get("bk_token"):
        return platform.bk_tokens.get(str(login), "")  # beside a token bk_username does not count, not even a bad one
    if platform.takes_bk_username and (call.app_type or platform.trusts_usernames):
        return str(given.get("bk_username") or "")
    return ""


def _esb_credentials(
    platform: Platform,
    call: Call,
    headers: Mapping[str, str],
    cookies: Mapping[str, str],
    parameters: Mapping[str, object],
) -> Answer | None:
    given = {**(_credentials_in_header(headers) or {}), **_resolve(parameters)}
    token = given.get("access_token")
    if token is not None and token in platform.access_tokens:
        call.user = platform.access_tokens[str(token)]
        return None
    app = (given.get("bk_app_code"), given.get("bk_app_secret"))
    if app != (platform.app_code, platform.app_secret):
        return esb_error(platform, 1306000, "APP authentication failed, app_code or app_secret is incorrect")
    login = given.get("bk_token") or cookies.get("bk_token")
    # The exporter's app stands on the ESB's list of apps whose bare bk_username is believed.
    user = platform.bk_tokens.get(str(login)) or given.get("bk_username")
    if not user:
        message = "User authentication failed, please provide a valid user identity, such as bk_token, bk_username"
        return esb_error(platform, 1306000, message)
    call.user = str(user)
    return None
