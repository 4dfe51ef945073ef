"""Rules between keys. Each adds its problem or warning to the reader, where the key that decides is written."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from exporter.config.read import Reader
from exporter.config.schema import Auth, BlueKing, Collectors, ConfigFile, ScopeEntry, State, Tls, Watch
from exporter.config.state_url import RedisUrl
from exporter.config.tls import TlsFileError, client_context
from exporter.model import Scope

SHORTEST_LEASE, LONGEST_LEASE = 3.0, 300.0
SCRAPE_TIMEOUT = 10.0
_REDIS_ONLY = ("lease_ttl", "wait_replicas", "key_prefix", "username", "password", "sentinel_password", "tls")
_PLATFORMS = tuple(dict.fromkeys(getattr(Collectors(), name).platform for name in Collectors.__struct_fields__))
_ESB_DETAILS = (
    "over the ESB a job is watched by reading its details only; while its task is not ready and a host is filtered, "
    "that makes the platform store the job as successful: give jobs that have begun, or use the gateway"
)


class Where(msgspec.Struct, frozen=True):
    """One entry of `scopes`: the reader of its file and its path there."""

    reader: Reader
    path: str
    entry: ScopeEntry


def check_file(reader: Reader, file: ConfigFile) -> None:
    """Rules within the configuration file itself."""
    if reader.has_no_problem("state.url"):
        _check_state(reader, file.state)
    if file.discovery.enabled and not file.blueking.cmdb and reader.has_no_problem("blueking.cmdb"):
        reader.problem("discovery.enabled", "discovery needs blueking.cmdb")
    if reader.has_no_problem("blueking"):
        _check_blueking(reader, file.blueking)


def _check_state(reader: Reader, state: State) -> None:
    url = state.url
    if not isinstance(url, RedisUrl):
        for key in _REDIS_ONLY:
            if getattr(state, key) != getattr(State(), key):
                reader.warn(f"state.{key}", "has no effect without Redis in state.url")
        return
    if importlib.util.find_spec("redis") is None:
        reader.problem("state.url", 'redis-py is not installed: pip install "blueking-exporter[redis]"')
    if not SHORTEST_LEASE <= state.lease_ttl <= LONGEST_LEASE:
        reader.problem("state.lease_ttl", "want a duration from 3s to 5m")
    if state.wait_replicas == 0 and url.sentinels:
        reader.problem(
            "state.wait_replicas",
            "0 loses counts with redis+sentinel: a deposed server takes writes that nobody keeps; want at least 1",
        )
    for key in ("username", "password"):
        if getattr(state, key) and getattr(url, key):
            written = next(p for p in (f"state.{key}", f"state.{key}_file") if reader.written(p))
            reader.problem(written, "given in state.url too; want one of them")
    if state.sentinel_password and not url.sentinels:
        reader.problem("state.sentinel_password", "has no effect without redis+sentinel in state.url")
    _check_tls(reader, state.tls, "state.tls")
    if state.tls != Tls() and url.scheme in ("redis", "unix"):
        reader.problem("state.tls", f"has no effect with {url.scheme}://; want rediss:// or redis+sentinel://")
    if state.accept_reshard:
        reader.problem("state.accept_reshard", "has no effect with Redis, which shares the scopes by itself")
    if (state.username or url.username) and not (state.password or url.password):
        reader.problem("state.username", "a user needs a password")
    if state.lease_ttl <= SCRAPE_TIMEOUT:
        reader.warn(
            "state.lease_ttl",
            f"not longer than Prometheus' default scrape_timeout of {SCRAPE_TIMEOUT:g}s: a page that is read slowly"
            " may outlive the lease",
        )
    if state.tls.insecure_skip_verify:
        reader.warn(
            "state.tls.insecure_skip_verify", "certificates are not verified; the password can be read on the way"
        )


def _check_tls(reader: Reader, tls: Tls, path: str) -> None:
    if tls.key_file and not tls.cert_file:
        reader.problem(f"{path}.key_file", "a client key needs cert_file")
    if tls == Tls() or not reader.has_no_problem(path):
        return
    try:
        client_context(tls)
    except TlsFileError as error:
        reader.problem(f"{path}.{error.key}", str(error))


def _check_blueking(reader: Reader, blueking: BlueKing) -> None:
    auth = blueking.auth
    if not any(getattr(blueking, name) for name in _PLATFORMS):
        some = f"{', '.join(_PLATFORMS[:-1])} and {_PLATFORMS[-1]}"
        reader.problem("blueking", f"no platform: give at least one of {some}")
    if auth.access_token and auth.bk_token:
        reader.warn("blueking.auth.bk_token", "not used beside access_token")
    gateways = [platform for platform in (blueking.job, blueking.nodeman) if platform]
    if not blueking.nodeman_legacy and all(platform.api != "esb" and platform.app_type for platform in gateways):
        for name in ("access_token", "bk_token"):
            if getattr(auth, name):
                reader.warn(
                    f"blueking.auth.{name}",
                    "not used: with app_type: true the application asks in the name of username",
                )
    _check_tls(reader, blueking.tls, "blueking.tls")
    if blueking.tls.insecure_skip_verify:
        reader.warn(
            "blueking.tls.insecure_skip_verify", "certificates are not verified; the app secret can be read on the way"
        )
    for name, platform in (("job", blueking.job), ("nodeman", blueking.nodeman)):
        if platform is None:
            continue
        if platform.api == "esb":
            _check_esb_auth(reader, auth, f"blueking.{name}")
        elif platform.app_type:
            if not (auth.app_code and auth.app_secret):
                reader.problem("blueking.auth", f"blueking.{name} with app_type: true needs app_code and app_secret")
        elif not (auth.access_token or auth.bk_token):
            reader.warn(
                f"blueking.{name}.app_type",
                "the gateway answers 400 to a bare username: app_type: false needs access_token or bk_token",
            )
        elif not auth.access_token and not (auth.app_code and auth.app_secret):
            reader.problem("blueking.auth", "bk_token needs app_code and app_secret beside it")
    if blueking.nodeman_legacy:
        _check_esb_auth(reader, auth, "blueking.nodeman_legacy")
    if blueking.cmdb and blueking.cmdb.api == "esb":
        _check_esb_auth(reader, auth, "blueking.cmdb")
    app_types = {"cmdb": blueking.cmdb and blueking.cmdb.api != "esb", "nodemgr": blueking.nodemgr}
    for name, asked in app_types.items():
        if asked and not (auth.app_code and auth.app_secret):
            reader.problem("blueking.auth", f"blueking.{name} needs app_code and app_secret")


def _check_esb_auth(reader: Reader, auth: Auth, platform: str) -> None:
    if not (auth.access_token or (auth.app_code and (auth.app_secret or auth.bk_token))):
        reader.problem("blueking.auth", f"{platform} behind the ESB needs app_code and app_secret, or a token")


def fill_watch(reader: Reader, collectors: Collectors, path: str) -> Collectors:
    """`collectors` with the job_name of every watch entry filled in. `path`: of the collectors that hold the list."""
    watch: list[Watch] = []
    seen: dict[str, int] = {}
    below = f"{path}.job.watch"
    for index, entry in enumerate(collectors.job.watch):
        at = f"{below}[{index}]"
        if (entry.job_plan_id is None) == (entry.name is None):
            reader.problem(at, "want exactly one of job_plan_id and name")
            continue
        name = entry.job_name or (str(entry.job_plan_id) if entry.job_plan_id is not None else entry.name or "")
        if name in seen:
            reader.problem(at, f'the same job_name as watch[{seen[name]}]; give one of them another name with "as"')
        seen.setdefault(name, index)
        watch.append(msgspec.structs.replace(entry, job_name=name))
    return msgspec.structs.replace(collectors, job=msgspec.structs.replace(collectors.job, watch=tuple(watch)))


def check_scopes(defaults: Reader, blueking: BlueKing, scopes: Sequence[Where]) -> list[ScopeEntry]:
    """Rules about each scope and between scopes. Returns the scopes, without collectors that have no platform."""
    known: dict[Scope, Where] = {}
    checked: list[ScopeEntry] = []
    reported: set[tuple[str, str]] = set()
    for where in scopes:
        scope = Scope(where.entry.bk_scope_type, where.entry.bk_scope_id)
        first = known.setdefault(scope, where)
        if first is not where:
            where.reader.problem(where.path, f"scope {scope} is given twice, first at {first.reader.place(first.path)}")
            continue
        checked.append(_check_collectors(defaults, blueking, where, scope, reported))
    return checked


def _check_collectors(
    defaults: Reader, blueking: BlueKing, where: Where, scope: Scope, reported: set[tuple[str, str]]
) -> ScopeEntry:
    """`reported`: problems of the defaults that have been reported for another scope."""
    entry = where.entry
    for name in Collectors.__struct_fields__:
        config = getattr(entry.collectors, name)
        if not config.enabled:
            continue

        def problem(key: str, message: str, name: str = name, *, warning: bool = False) -> None:
            reader, path = defaults, f"collectors.{name}.{key}"
            if where.reader.written(f"{where.path}.collectors.{name}"):
                reader, path = where.reader, f"{where.path}.{path}"
            elif (path, message) in reported:
                return
            reported.add((path, message))
            (reader.warn if warning else reader.problem)(path, message)

        if name != "job" and scope.bk_scope_type != "biz":
            path = f"{where.path}.collectors.{name}.enabled"
            where.reader.problem(path, f"collector {name} takes biz scopes only, not {scope}; set enabled: false here")
        if getattr(blueking, config.platform) is None:
            own = where.reader.written(f"{where.path}.collectors.{name}.enabled")
            explicit = own or defaults.written(f"collectors.{name}.enabled")
            if explicit and defaults.has_no_problem(f"blueking.{config.platform}"):
                problem("enabled", f"collector {name} is enabled, but there is no blueking.{config.platform}")
            off = msgspec.structs.replace(config, enabled=False)
            entry = msgspec.structs.replace(entry, collectors=msgspec.structs.replace(entry.collectors, **{name: off}))
            continue
        if name == "nodeman_job":
            assert blueking.nodeman is not None
            if config.discover and blueking.nodeman.api == "esb":
                problem("discover", "the ESB publishes no job_list: with api: esb give discover: false and job_ids")
            elif not config.discover and not config.job_ids:
                problem("job_ids", "discover: false needs job_ids")
            elif blueking.nodeman.api == "esb":
                problem("job_ids", _ESB_DETAILS, warning=True)
        elif name == "nodeman_subscription" and not config.subscription_ids:
            problem("subscription_ids", "an enabled nodeman_subscription needs subscription_ids")
        elif name == "nodeman_task" and not config.job_ids:
            problem("job_ids", "an enabled nodeman_task needs job_ids")
    return entry


def check_budget(reader: Reader, blueking: BlueKing, scopes: Sequence[ScopeEntry]) -> None:
    """Warn when polling alone needs more requests than are allowed, at one request per poll."""
    polls: dict[str, float] = defaultdict(float)
    for entry in scopes:
        for name in Collectors.__struct_fields__:
            config = getattr(entry.collectors, name)
            if config.enabled:
                polls[name] += 1 / config.interval
    total = sum(polls.values())
    if total > blueking.requests_per_second:
        shown = f"{total:.2g}" if total < 10 else f"{total:.0f}"
        reader.warn(
            "blueking.requests_per_second",
            f"{shown} polls per second are more than {blueking.requests_per_second:g} requests per second; "
            "raise it or the intervals",
        )
