"""The typed configuration. One sentence per key: unit, why, and what it costs to change it.

Values are ready for use: durations in seconds, sizes in bytes, paths absolute. How each is written in YAML is its kind
(kinds.py); the key's own name and default are the field's. `ConfigFile` and `ScopeEntry` have the shape of the file,
`Config` is what the program uses.
"""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from exporter.config.secret import Secret
from exporter.config.values import (
    Address,
    Boolean,
    Choice,
    Duration,
    File,
    HostName,
    Kind,
    Number,
    ProxyUrl,
    ScopeId,
    SecretFile,
    SecretText,
    Share,
    Size,
    StateUrl,
    TelemetryPath,
    Text,
    Timezone,
    Url,
)
from exporter.model import Scope, ScopeType


class Items(msgspec.Struct, frozen=True):
    """A list of values of one kind. `least`: how many at least; `rule`: what each item is beside those before it."""

    kind: Kind | type[msgspec.Struct]
    least: int = 0
    rule: Literal["", "unique", "increasing"] = ""


class Key(msgspec.Struct, frozen=True):
    """What the file says under one key. `null`: may be null, which means that it is absent."""

    kind: Kind | Items | type[msgspec.Struct]
    doc: str
    null: bool = False
    name: str = ""


@functools.cache
def keys(struct: type[msgspec.Struct]) -> dict[str, tuple[str, Key]]:
    """Every key that a file may hold for `struct`: its name there, the field it fills and what it takes."""
    found: dict[str, tuple[str, Key]] = {}
    for field, hint in get_type_hints(struct, include_extras=True).items():
        key = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Key)), None)
        if key is None:
            continue
        found[key.name or field] = field, key
        if isinstance(key.kind, SecretText):
            doc = f"File that holds {field}, instead of {field}; read again whenever it changes."
            found[f"{field}_file"] = field, Key(_SECRET_FILE, doc, key.null)
    return found


@functools.cache
def default(struct: type[msgspec.Struct], field: str) -> Any:
    """The default of a field, msgspec.NODEFAULT when it is required."""
    info = next(info for info in msgspec.structs.fields(struct) if info.name == field)
    return info.default_factory() if info.default_factory is not msgspec.NODEFAULT else info.default


_BOOLEAN = Boolean()
_COUNT = Number(whole=True, least=1)
_LIMIT = Number(whole=True, least=0)
_DURATION = Duration()
_FILE = File()
_SECRET = SecretText()
_SECRET_FILE = SecretFile()
_TEXT = Text()
_IDS = Items(_COUNT, rule="unique")


class Server(msgspec.Struct, frozen=True):
    """The HTTP server of the exporter."""

    listen_address: Annotated[
        tuple[str, ...],
        Key(
            Items(Address(), least=1),
            "HOST:PORT to listen on, several allowed; loopback, so that opening it is a decision.",
        ),
    ] = ("127.0.0.1:10071",)
    web_config_file: Annotated[
        Path | None,
        Key(_FILE, "Web configuration file of Prometheus' exporter-toolkit: TLS, users, headers.", null=True),
    ] = None
    telemetry_path: Annotated[str, Key(TelemetryPath(), "Path of the metrics page.")] = "/metrics"
    enable_lifecycle: Annotated[
        bool, Key(_BOOLEAN, "Allow POST /-/reload; off, because whoever reaches the port could use it.")
    ] = False
    allowed_hosts: Annotated[
        tuple[str, ...],
        Key(
            Items(HostName(), rule="unique"),
            "Names and addresses under which the pages may be asked for, without ports; empty: any. Other names are "
            "refused, which protects a port without users from DNS rebinding.",
        ),
    ] = ()
    health_without_auth: Annotated[
        bool, Key(_BOOLEAN, "Answer /-/healthy and /-/ready without user and password, for probes of an orchestrator.")
    ] = False


class State(msgspec.Struct, frozen=True):
    """Where counters and watermarks are kept."""

    url: Annotated[
        str, Key(StateUrl(), "sqlite:PATH, or memory: which forgets all counts at the end of the process.")
    ] = "sqlite:state.db"
    lease_ttl: Annotated[float, Key(_DURATION, "Duration; reserved for redis, only the default is accepted.")] = 15.0


class Log(msgspec.Struct, frozen=True):
    """The log on standard error."""

    level: Annotated[str, Key(Choice("debug", "info", "warning", "error"), "Least severity that is written.")] = "info"
    format: Annotated[str, Key(Choice("logfmt", "json", "console"), "Form of a line; console is for people.")] = (
        "logfmt"
    )


_WEB_URL = Key(
    Url(), "Address of the web pages, with their path, for links to executions; nothing is asked there.", null=True
)
_APP_TYPE = Key(
    _BOOLEAN,
    "true: the application acts, with app_code and app_secret; false: a real user does, with access_token or bk_token.",
)


class JobPlatform(msgspec.Struct, frozen=True):
    """The JOB platform."""

    url: Annotated[str, Key(Url(), "Base URL of the bk-job gateway stage, or of the ESB; no credentials in it.")]
    api: Annotated[
        Literal["v4", "v3", "esb"],
        Key(Choice("v4", "v3", "esb"), "Dialect: gateway v4, gateway v3, or v3 behind the ESB."),
    ] = "v4"
    app_type: Annotated[bool, _APP_TYPE] = True
    web_url: Annotated[str | None, _WEB_URL] = None


class NodemanPlatform(msgspec.Struct, frozen=True):
    """NodeMan 2.x."""

    url: Annotated[str, Key(Url(), "Base URL of the bk-nodeman gateway stage, or of the ESB; no credentials in it.")]
    api: Annotated[
        Literal["gateway", "esb"], Key(Choice("gateway", "esb"), "Dialect; the ESB publishes no list of jobs.")
    ] = "gateway"
    app_type: Annotated[bool, _APP_TYPE] = True
    web_url: Annotated[str | None, _WEB_URL] = None


class LegacyPlatform(msgspec.Struct, frozen=True):
    """NodeMan 1.x behind the ESB."""

    url: Annotated[str, Key(Url(), "Base URL of the ESB; no credentials in it.")]


class Auth(msgspec.Struct, frozen=True):
    """Who asks BlueKing. Each secret is given in exactly one way: by value (best as ${ENV}) or as *_file."""

    app_code: Annotated[str, Key(_TEXT, "Code of the application registered in BlueKing.")] = ""
    app_secret: Annotated[Secret | None, Key(_SECRET, "Secret of the application, best as ${ENV}.", null=True)] = None
    username: Annotated[str, Key(_TEXT, "User the application acts for; needs view permission on every scope.")] = (
        "admin"
    )
    access_token: Annotated[Secret | None, Key(_SECRET, "Access token of a user, for app_type: false.", null=True)] = (
        None
    )
    bk_token: Annotated[Secret | None, Key(_SECRET, "Login token of a user, for app_type: false.", null=True)] = None
    tenant_id: Annotated[
        str | None, Key(_TEXT, "Tenant, on multi-tenant platforms: sent as X-Bk-Tenant-Id.", null=True)
    ] = None


class Tls(msgspec.Struct, frozen=True):
    """TLS towards BlueKing."""

    ca_file: Annotated[
        Path | None, Key(_FILE, "PEM file of the authorities to trust instead of the system's.", null=True)
    ] = None
    cert_file: Annotated[Path | None, Key(_FILE, "PEM file of the client certificate.", null=True)] = None
    key_file: Annotated[
        Path | None, Key(_FILE, "PEM file of the client key, unless cert_file holds it.", null=True)
    ] = None
    server_name: Annotated[
        str | None, Key(_TEXT, "Name to expect in the certificate instead of the URL's.", null=True)
    ] = None
    insecure_skip_verify: Annotated[
        bool, Key(_BOOLEAN, "Accept any certificate; whoever is on the way can then read the app secret.")
    ] = False


class BlueKing(msgspec.Struct, frozen=True):
    """Platform endpoints, credentials and rate limits."""

    job: Annotated[JobPlatform | None, Key(JobPlatform, "The JOB platform; absent: not watched.", null=True)] = None
    nodeman: Annotated[NodemanPlatform | None, Key(NodemanPlatform, "NodeMan 2.x; absent: not watched.", null=True)] = (
        None
    )
    nodeman_legacy: Annotated[
        LegacyPlatform | None, Key(LegacyPlatform, "NodeMan 1.x behind the ESB; absent: not watched.", null=True)
    ] = None
    auth: Annotated[Auth, Key(Auth, "Who asks BlueKing.")] = Auth()
    request_timeout: Annotated[float, Key(_DURATION, "Duration of one whole request, body included.")] = 30.0
    requests_per_second: Annotated[
        float, Key(Number(above=0), "Requests per second, one budget for everything this process asks of BlueKing.")
    ] = 10.0
    retry_budget: Annotated[
        float,
        Key(Share(), "Share of the calls of the last ten minutes that may be retries; ten retries are always allowed."),
    ] = 0.2
    max_concurrency: Annotated[int, Key(_COUNT, "Requests under way at once.")] = 8
    max_response_bytes: Annotated[
        int, Key(Size(), "Size of the largest answer accepted, after decompression; bounds the memory of a request.")
    ] = 64 * 2**20
    timezone: Annotated[datetime.timezone, Key(Timezone(), "Distance from UTC of time texts that carry no zone.")] = (
        datetime.timezone(datetime.timedelta(hours=8))
    )
    tls: Annotated[Tls, Key(Tls, "TLS towards BlueKing.")] = Tls()
    proxy_url: Annotated[
        Secret | None,
        Key(ProxyUrl(), "HTTP proxy towards BlueKing; proxy variables of the environment are ignored.", null=True),
    ] = None


class Watch(msgspec.Struct, frozen=True):
    """Executions that get series of their own, chosen by exactly one of plan and name."""

    job_name: Annotated[str, Key(_TEXT, "Value of the label job_name; else the plan id or the pattern.", name="as")] = (
        ""
    )
    job_plan_id: Annotated[int | None, Key(_COUNT, "Execution plan whose executions match.")] = None
    name: Annotated[
        str | None,
        Key(_TEXT, "Pattern for the name of the execution; only * (any text) and ? (one character) are special."),
    ] = None
    max_age: Annotated[
        float | None, Key(_DURATION, "Duration; how old the newest success may be before it is overdue.", null=True)
    ] = None


def _enabled(what: str) -> Key:
    return Key(_BOOLEAN, f"Watch {what}.")


_INTERVAL = Key(_DURATION, "Duration between two polls of one scope.")
_MAX_FAILING_HOSTS = Key(_LIMIT, "Hosts per scope with series of their own; the counts beside them stay exact.")
_FAILING_HOST_TTL = Key(
    _DURATION, "Duration after its newest failure until a host is forgotten; longer than two rounds of a daily job."
)


class JobConfig(msgspec.Struct, frozen=True):
    """Collector `job`: executions of the JOB platform."""

    enabled: Annotated[bool, _enabled("executions of JOB")] = True
    interval: Annotated[float, _INTERVAL] = 30.0
    lookback: Annotated[
        float, Key(_DURATION, "Duration that each poll reads again before the watermark, to see late rows and changes.")
    ] = 600.0
    max_catchup: Annotated[
        float, Key(_DURATION, "Duration; how far back history is still counted after the exporter was down.")
    ] = 7 * 86400.0
    reopen_window: Annotated[
        float, Key(_DURATION, "Duration for which a failed or stopped execution is watched for a retry.")
    ] = 86400.0
    max_unfinished_age: Annotated[
        float, Key(_DURATION, "Duration after which an unfinished execution is counted as lost and forgotten.")
    ] = 7 * 86400.0
    host_results: Annotated[
        Literal["failed", "all", "none"],
        Key(
            Choice("failed", "all", "none"), "Which finished executions are asked for per-host results, one call each."
        ),
    ] = "failed"
    watch: Annotated[tuple[Watch, ...], Key(Items(Watch), "Executions that get series of their own.")] = ()
    max_failing_hosts: Annotated[int, _MAX_FAILING_HOSTS] = 500
    failing_host_ttl: Annotated[float, _FAILING_HOST_TTL] = 49 * 3600.0
    duration_buckets: Annotated[
        tuple[float, ...],
        Key(
            Items(Number(above=0), least=1, rule="increasing"),
            "Seconds; bounds of the duration histogram. A change restarts that histogram.",
        ),
    ] = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)


class NodemanJobConfig(msgspec.Struct, frozen=True):
    """Collector `nodeman_job`: jobs of NodeMan 2.x."""

    enabled: Annotated[bool, _enabled("jobs of NodeMan 2.x; biz scopes only")] = False
    interval: Annotated[float, _INTERVAL] = 60.0
    discover: Annotated[bool, Key(_BOOLEAN, "Find jobs with job_list; false: only job_ids.")] = True
    job_ids: Annotated[tuple[int, ...], Key(_IDS, "Jobs that also get series of their own.")] = ()
    max_finished_age: Annotated[float, Key(_DURATION, "Duration for which a finished job is watched for a retry.")] = (
        86400.0
    )
    max_failing_hosts: Annotated[int, _MAX_FAILING_HOSTS] = 500
    failing_host_ttl: Annotated[float, _FAILING_HOST_TTL] = 49 * 3600.0


class NodemanSubscriptionConfig(msgspec.Struct, frozen=True):
    """Collector `nodeman_subscription`: subscriptions of NodeMan 2.x."""

    enabled: Annotated[bool, _enabled("subscriptions of NodeMan 2.x; biz scopes only")] = False
    interval: Annotated[float, _INTERVAL] = 60.0
    subscription_ids: Annotated[
        tuple[int, ...], Key(_IDS, "Subscriptions to watch; the platform cannot list them.")
    ] = ()
    max_failing_hosts: Annotated[int, _MAX_FAILING_HOSTS] = 500
    failing_host_ttl: Annotated[float, _FAILING_HOST_TTL] = 49 * 3600.0


class NodemanTaskConfig(msgspec.Struct, frozen=True):
    """Collector `nodeman_task`: tasks of NodeMan 1.x."""

    enabled: Annotated[bool, _enabled("tasks of NodeMan 1.x; biz scopes only")] = False
    interval: Annotated[float, _INTERVAL] = 60.0
    job_ids: Annotated[tuple[int, ...], Key(_IDS, "Tasks to watch; the platform cannot list them.")] = ()
    max_failing_hosts: Annotated[int, _MAX_FAILING_HOSTS] = 500
    failing_host_ttl: Annotated[float, _FAILING_HOST_TTL] = 49 * 3600.0


class Collectors(msgspec.Struct, frozen=True):
    """What is watched in a scope."""

    job: Annotated[JobConfig, Key(JobConfig, "Executions of JOB.")] = JobConfig()
    nodeman_job: Annotated[NodemanJobConfig, Key(NodemanJobConfig, "Jobs of NodeMan 2.x.")] = NodemanJobConfig()
    nodeman_subscription: Annotated[
        NodemanSubscriptionConfig, Key(NodemanSubscriptionConfig, "Subscriptions of NodeMan 2.x.")
    ] = NodemanSubscriptionConfig()
    nodeman_task: Annotated[NodemanTaskConfig, Key(NodemanTaskConfig, "Tasks of NodeMan 1.x.")] = NodemanTaskConfig()


class ScopeAuth(msgspec.Struct, frozen=True):
    """Who asks for one scope, where this differs from blueking.auth. Null keys are inherited."""

    username: Annotated[
        str | None, Key(_TEXT, "User the application acts for in this scope; null: as in blueking.auth.", null=True)
    ] = None
    tenant_id: Annotated[
        str | None, Key(_TEXT, "Tenant of this scope, sent as X-Bk-Tenant-Id; null: as in blueking.auth.", null=True)
    ] = None


class ScopeEntry(msgspec.Struct, frozen=True):
    """A scope as it is written."""

    bk_scope_type: Annotated[
        ScopeType, Key(Choice("biz", "biz_set", "tenant_set"), "A business, or a set of businesses as JOB knows them.")
    ]
    bk_scope_id: Annotated[str, Key(ScopeId(), "Its number in the CMDB, as number or text.")]
    name: Annotated[str, Key(Text("text", r".*"), "For people; shown in blueking_scope_info only.")] = ""
    collectors: Annotated[Collectors, Key(Collectors, "What differs from the defaults in this scope.")] = Collectors()
    auth: Annotated[ScopeAuth, Key(ScopeAuth, "What differs from blueking.auth in this scope.")] = ScopeAuth()


class ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of blueking-exporter."""

    server: Annotated[Server, Key(Server, "The HTTP server of the exporter.")] = Server()
    state: Annotated[State, Key(State, "Where counters are kept.")] = State()
    log: Annotated[Log, Key(Log, "The log on standard error.")] = Log()
    blueking: Annotated[BlueKing, Key(BlueKing, "The platform that is watched.")]
    collectors: Annotated[Collectors, Key(Collectors, "Defaults of every scope.")] = Collectors()
    counter_birth_hold: Annotated[
        float,
        Key(
            Duration(zero=True),
            "Duration a new counter shows 0, so that increase() sees its first event; above the scrape interval.",
        ),
    ] = 90.0
    stale_after: Annotated[
        int, Key(_COUNT, "Intervals without a complete poll after which the gauges of a scope vanish.")
    ] = 5
    max_series: Annotated[
        int,
        Key(
            _COUNT,
            "Series of the whole page. Past it detail series are cut and counted, then new label values become other.",
        ),
    ] = 200_000
    scopes: Annotated[tuple[ScopeEntry, ...], Key(Items(ScopeEntry), "Scopes to watch.")] = ()
    scope_files: Annotated[
        tuple[str, ...],
        Key(
            Items(_TEXT, rule="unique"), "Globs of files that each hold a list like scopes; followed when they change."
        ),
    ] = ()


class ScopeConfig(msgspec.Struct, frozen=True):
    """One scope to watch, with the defaults filled in."""

    scope: Scope
    name: str
    collectors: Collectors
    auth: ScopeAuth = ScopeAuth()


class Config(msgspec.Struct, frozen=True):
    """Everything the program may know before it starts. `sha256`: over the contents of the files with configuration."""

    server: Server
    state: State
    log: Log
    blueking: BlueKing
    counter_birth_hold: float
    stale_after: int
    max_series: int
    scopes: tuple[ScopeConfig, ...]
    sha256: str


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the configuration file as users write it; `${VAR}` may stand for any text."""
    definitions: dict[str, Any] = {}
    root = _object(ConfigFile, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "blueking-exporter configuration",
        **root,
        "$defs": definitions,
    }


def _object(struct: type[msgspec.Struct], definitions: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, (field, key) in keys(struct).items():
        value = default(struct, field)
        schema = _value(key.kind, definitions)
        if key.null:
            schema = {"anyOf": [schema, {"type": "null"}]}
        properties[name] = {"description": key.doc, **schema}
        if value is msgspec.NODEFAULT:
            required.append(name)
        elif not isinstance(value, msgspec.Struct) and (value is not None or key.null) and value != "":
            properties[name]["default"] = write(key.kind, value)
    schema = {"type": "object", "description": struct.__doc__, "additionalProperties": False, "properties": properties}
    return {**schema, "required": required} if required else schema


def _value(kind: Kind | Items | type[msgspec.Struct], definitions: dict[str, Any]) -> dict[str, Any]:
    if isinstance(kind, Kind):
        return kind.schema()
    if isinstance(kind, Items):
        schema: dict[str, Any] = {"type": "array", "items": _value(kind.kind, definitions)}
        if kind.least:
            schema["minItems"] = kind.least
        if kind.rule:
            schema["uniqueItems"] = True
        return schema
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = _object(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def write(kind: Kind | Items | type[msgspec.Struct], value: Any) -> object:
    """A default as a user writes it."""
    if isinstance(kind, Items) and isinstance(kind.kind, Kind):
        return [kind.kind.write(item) for item in value]
    return kind.write(value) if isinstance(kind, Kind) and value is not None else value if value != () else []
