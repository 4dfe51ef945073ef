"""The typed configuration. One line per key: its type, what it means and costs, its default (see keys.py).

Values are ready for use: durations in seconds, sizes in bytes, paths absolute. `ConfigFile` and `ScopeEntry` have the
shape of the file, `Config` is what the program uses.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from exporter.config import keys
from exporter.config.keys import NO_NULL, Named, Rule
from exporter.config.secret import Secret
from exporter.config.state_url import RedisUrl, StateUrl
from exporter.config.values import (
    Address,
    Duration,
    HostName,
    KeyFile,
    Number,
    ProxyUrl,
    ScopeId,
    ScopePattern,
    Share,
    Size,
    TelemetryPath,
    Text,
    Url,
)
from exporter.model import Scope, ScopeType

Seconds = Annotated[float, Duration()]
Count = Annotated[int, Number(whole=True, least=1)]
Limit = Annotated[int, Number(whole=True, least=0)]
Positive = Annotated[float, Number(above=0)]


class Server(msgspec.Struct, frozen=True):
    """The HTTP server of the exporter."""

    listen_address: Annotated[
        tuple[Annotated[str, Address()], ...],
        "HOST:PORT to listen on, several allowed; loopback, so that opening it is a decision.",
        Rule.NOT_EMPTY,
    ] = ("127.0.0.1:10071",)
    web_config_file: Annotated[
        Path | None, "Web configuration file of Prometheus' exporter-toolkit: TLS, users, headers."
    ] = None
    telemetry_path: Annotated[str, TelemetryPath(), "Path of the metrics page."] = "/metrics"
    enable_lifecycle: Annotated[bool, "Allow POST /-/reload; off, because any client could use it."] = False
    allowed_hosts: Annotated[
        tuple[Annotated[str, HostName()], ...],
        "Names and addresses that requests for the pages may use, without ports; empty: any. Other names are "
        "refused, which protects a port without users from DNS rebinding.",
        Rule.UNIQUE,
    ] = ()
    health_without_auth: Annotated[
        bool, "Answer /-/healthy and /-/ready without user and password, for probes of an orchestrator."
    ] = False


class Log(msgspec.Struct, frozen=True):
    """The log on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], "Least severity that is written."] = "info"
    format: Annotated[Literal["logfmt", "json", "console"], "Form of a line; console is for people."] = "logfmt"
    executions: Annotated[
        Literal["none", "failed", "all"],
        "Which counted ends of JOB executions, NodeMan jobs and V3 workflows are logged, as events "
        "execution_finished of level info.",
    ] = "none"


AppType = Annotated[
    bool,
    "true: the application acts, with app_code and app_secret; false: a real user does, with access_token or bk_token.",
]

WebUrl = Annotated[
    str | None, Url(), "Address of the web pages, with their path, for links to executions; no request is sent there."
]


class JobPlatform(msgspec.Struct, frozen=True):
    """The JOB platform; absent: not watched."""

    url: Annotated[str, Url(), "Base URL of the bk-job gateway stage, or of the ESB; no credentials in it."]
    api: Annotated[Literal["v4", "v3", "esb"], "Dialect: gateway v4, gateway v3, or v3 behind the ESB."] = "v4"
    app_type: AppType = True
    web_url: WebUrl = None


class NodemanPlatform(msgspec.Struct, frozen=True):
    """NodeMan 2.x; absent: not watched."""

    url: Annotated[str, Url(), "Base URL of the bk-nodeman gateway stage, or of the ESB; no credentials in it."]
    api: Annotated[Literal["gateway", "esb"], "Dialect; the ESB publishes no list of jobs."] = "gateway"
    app_type: AppType = True
    web_url: WebUrl = None


class LegacyPlatform(msgspec.Struct, frozen=True):
    """NodeMan 1.x behind the ESB; absent: not watched."""

    url: Annotated[str, Url(), "Base URL of the ESB; no credentials in it."]


class NodemgrPlatform(msgspec.Struct, frozen=True):
    """NodeMan V3 (bk-nodemgr), beside 2.x; absent: not watched."""

    url: Annotated[str, Url(), "Base URL of the bk-nodemgr gateway stage; no credentials in it."]
    web_url: WebUrl = None


class CmdbPlatform(msgspec.Struct, frozen=True):
    """The CMDB; asked for discovery only."""

    url: Annotated[str, Url(), "Base URL of the bk-cmdb gateway stage, or of the ESB; no credentials in it."]
    api: Annotated[Literal["gateway", "esb"], "Dialect."] = "gateway"


class Auth(msgspec.Struct, frozen=True):
    """Who asks BlueKing. Each secret is given in exactly one way: by value (best as ${ENV}) or as *_file."""

    app_code: Annotated[str, "Code of the application registered in BlueKing."] = ""
    app_secret: Annotated[Secret | None, "Secret of the application, best as ${ENV}."] = None
    username: Annotated[str, "User the application acts for; needs view permission on every scope."] = "admin"
    access_token: Annotated[Secret | None, "Access token of a user, for app_type: false."] = None
    bk_token: Annotated[Secret | None, "Login token of a user, for app_type: false."] = None
    tenant_id: Annotated[str | None, "Tenant, on multi-tenant platforms: sent as X-Bk-Tenant-Id."] = None


class Tls(msgspec.Struct, frozen=True):
    """TLS towards another server."""

    ca_file: Annotated[Path | None, "PEM file of the authorities to trust instead of the system's."] = None
    cert_file: Annotated[Path | None, "PEM file of the client certificate."] = None
    key_file: Annotated[Path | None, KeyFile(), "PEM file of the client key, unless cert_file holds it."] = None
    server_name: Annotated[str | None, "Name to expect in the certificate instead of the URL's."] = None
    insecure_skip_verify: Annotated[
        bool, "Accept any certificate; anybody on the network path can read the app secret."
    ] = False


class State(msgspec.Struct, frozen=True):
    """Where counters and watermarks are kept. All keys but `url` and `accept_reshard` are for Redis and Valkey only."""

    url: Annotated[
        str | RedisUrl,
        StateUrl(),
        "sqlite:PATH; memory: which forgets all counts at the end of the process; for several replicas redis://, "
        "rediss://, unix:// or redis+sentinel://H1:P,H2:P/NAME/DB.",
    ] = "sqlite:state.db"
    lease_ttl: Annotated[
        Seconds,
        "Duration after which the scopes of a lost replica are taken over, 3s to 5m; longer than the scrape timeout "
        "and than a failover of the server.",
    ] = 15.0
    wait_replicas: Annotated[
        Annotated[int, Number(whole=True, least=0)] | None,
        "Replicas of the server that must have a write before it counts; not set: 1 with redis+sentinel, else 0.",
    ] = None
    key_prefix: Annotated[
        str, Text("letters, digits and :._{}-", r"[A-Za-z0-9:._{}-]{1,64}"), "Prefix of all keys; one per platform."
    ] = "blueking:"
    username: Annotated[str | None, "User of the server, instead of one in the address."] = None
    password: Annotated[Secret | None, "Password of the server, instead of one in the address."] = None
    sentinel_password: Annotated[Secret | None, "Password of the sentinels."] = None
    tls: Annotated[Tls, "TLS towards the server, with rediss:// and redis+sentinel://."] = Tls()
    accept_reshard: Annotated[
        bool, "Take over a state that was written for another shard; scopes that have moved begin anew."
    ] = False


class BlueKing(msgspec.Struct, frozen=True):
    """Platform endpoints, credentials and rate limits."""

    job: JobPlatform | None = None
    nodeman: NodemanPlatform | None = None
    nodeman_legacy: LegacyPlatform | None = None
    nodemgr: NodemgrPlatform | None = None
    cmdb: CmdbPlatform | None = None
    auth: Auth = Auth()
    request_timeout: Annotated[Seconds, "Duration of one whole request, body included."] = 30.0
    requests_per_second: Annotated[
        Positive, "Requests per second, one budget for everything this process asks of BlueKing."
    ] = 10.0
    retry_budget: Annotated[
        float,
        Share(),
        "Share of the calls of the last ten minutes that may be retries; ten retries are always allowed.",
    ] = 0.2
    max_concurrency: Annotated[Count, "Requests under way at once."] = 8
    max_response_bytes: Annotated[
        int, Size(), "Size of the largest answer accepted, after decompression; bounds the memory of a request."
    ] = 64 * 2**20
    timezone: Annotated[datetime.timezone, "Distance from UTC of time texts that carry no zone."] = datetime.timezone(
        datetime.timedelta(hours=8)
    )
    tls: Tls = Tls()
    proxy_url: Annotated[
        Secret | None, ProxyUrl(), "HTTP proxy towards BlueKing; proxy variables of the environment are ignored."
    ] = None


class Watch(msgspec.Struct, frozen=True):
    """Executions that get series of their own, chosen by exactly one of plan and name."""

    job_name: Annotated[str, "Value of the label job_name; else the plan id or the pattern.", Named("as")] = ""
    job_plan_id: Annotated[Count | None, "Execution plan whose executions match.", NO_NULL] = None
    name: Annotated[
        str | None,
        "Pattern for the name of the execution; only * (any text) and ? (one character) are special.",
        NO_NULL,
    ] = None
    max_age: Annotated[Seconds | None, "Duration; how old the newest success may be before it is overdue."] = None


Interval = Annotated[Seconds, "Duration between two polls of one scope."]
Lookback = Annotated[Seconds, "Duration that each poll reads again before the watermark, to see late rows and changes."]
MaxCatchup = Annotated[Seconds, "Duration; how far back history is still counted after the exporter was down."]
MaxFailingHosts = Annotated[Limit, "Hosts per scope with series of their own; the counts beside them stay exact."]
FailingHostTtl = Annotated[
    Seconds, "Duration after its newest failure until a host is forgotten; longer than two rounds of a daily job."
]


class CollectorConfig(msgspec.Struct, frozen=True):
    """Settings of a collector. `platform`: the key of `blueking` that it asks."""

    platform: ClassVar[str]


class JobConfig(CollectorConfig, frozen=True):
    """Executions of JOB."""

    platform: ClassVar = "job"
    enabled: Annotated[bool, "Watch executions of JOB."] = True
    interval: Interval = 30.0
    lookback: Lookback = 600.0
    max_catchup: MaxCatchup = 7 * 86400.0
    reopen_window: Annotated[Seconds, "Duration for which a failed or stopped execution is watched for a retry."] = (
        86400.0
    )
    max_unfinished_age: Annotated[
        Seconds, "Duration after which an unfinished execution is counted as lost and forgotten."
    ] = 7 * 86400.0
    host_results: Annotated[
        Literal["failed", "all", "none"], "Which finished executions are asked for per-host results, one call each."
    ] = "failed"
    watch: Annotated[tuple[Watch, ...], "Executions that get series of their own."] = ()
    max_failing_hosts: MaxFailingHosts = 500
    failing_host_ttl: FailingHostTtl = 49 * 3600.0
    duration_buckets: Annotated[
        tuple[Positive, ...],
        "Seconds; bounds of the duration histogram. A change restarts that histogram.",
        Rule.NOT_EMPTY,
        Rule.INCREASING,
    ] = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)


class NodemanJobConfig(CollectorConfig, frozen=True):
    """Jobs of NodeMan 2.x."""

    platform: ClassVar = "nodeman"
    enabled: Annotated[bool, "Watch jobs of NodeMan 2.x; biz scopes only."] = False
    interval: Interval = 60.0
    discover: Annotated[bool, "Find jobs with job_list; false: only job_ids."] = True
    job_ids: Annotated[tuple[Count, ...], "Jobs that also get series of their own.", Rule.UNIQUE] = ()
    max_finished_age: Annotated[Seconds, "Duration for which a finished job is watched for a retry."] = 86400.0
    max_failing_hosts: MaxFailingHosts = 500
    failing_host_ttl: FailingHostTtl = 49 * 3600.0


class NodemanSubscriptionConfig(CollectorConfig, frozen=True):
    """Subscriptions of NodeMan 2.x."""

    platform: ClassVar = "nodeman"
    enabled: Annotated[bool, "Watch subscriptions of NodeMan 2.x; biz scopes only."] = False
    interval: Interval = 60.0
    subscription_ids: Annotated[
        tuple[Count, ...], "Subscriptions to watch; the platform cannot list them.", Rule.UNIQUE
    ] = ()
    max_failing_hosts: MaxFailingHosts = 500
    failing_host_ttl: FailingHostTtl = 49 * 3600.0


class NodemanTaskConfig(CollectorConfig, frozen=True):
    """Tasks of NodeMan 1.x."""

    platform: ClassVar = "nodeman_legacy"
    enabled: Annotated[bool, "Watch tasks of NodeMan 1.x; biz scopes only."] = False
    interval: Interval = 60.0
    job_ids: Annotated[tuple[Count, ...], "Tasks to watch; the platform cannot list them.", Rule.UNIQUE] = ()
    max_failing_hosts: MaxFailingHosts = 500
    failing_host_ttl: FailingHostTtl = 49 * 3600.0


class NodemgrConfig(CollectorConfig, frozen=True):
    """Node and plugin workflows of NodeMan V3."""

    platform: ClassVar = "nodemgr"
    enabled: Annotated[bool, "Watch workflows of NodeMan V3; biz scopes only."] = False
    node_roles: Annotated[
        tuple[Literal["agent", "proxy", "blank"], ...],
        "Roles of nodes whose workflows are listed; [agent, blank] for an account with rights on agents only, which "
        "would see less without an error. Empty: all.",
        Rule.UNIQUE,
    ] = ()
    interval: Interval = 60.0
    lookback: Lookback = 600.0
    max_catchup: MaxCatchup = 7 * 86400.0
    reopen_window: Annotated[Seconds, "Duration for which a failed workflow is watched for a retry."] = 86400.0
    max_unfinished_age: Annotated[
        Seconds, "Duration after which an unfinished workflow is counted as lost and forgotten."
    ] = 7 * 86400.0
    max_failing_hosts: MaxFailingHosts = 500
    failing_host_ttl: FailingHostTtl = 49 * 3600.0


class Collectors(msgspec.Struct, frozen=True):
    """What is watched in a scope."""

    job: JobConfig = JobConfig()
    nodeman_job: NodemanJobConfig = NodemanJobConfig()
    nodeman_subscription: NodemanSubscriptionConfig = NodemanSubscriptionConfig()
    nodeman_task: NodemanTaskConfig = NodemanTaskConfig()
    nodemgr: NodemgrConfig = NodemgrConfig()


class ScopeAuth(msgspec.Struct, frozen=True):
    """Who asks for one scope, where this differs from blueking.auth. Null keys are inherited."""

    username: Annotated[str | None, "User the application acts for in this scope; null: as in blueking.auth."] = None
    tenant_id: Annotated[str | None, "Tenant of this scope, sent as X-Bk-Tenant-Id; null: as in blueking.auth."] = None


class ScopeEntry(msgspec.Struct, frozen=True):
    """A scope as it is written."""

    bk_scope_type: Annotated[ScopeType, "A business, or a set of businesses as JOB knows them."]
    bk_scope_id: Annotated[str, ScopeId(), "Its number in the CMDB, as number or text."]
    name: Annotated[str, Text("text", r".*"), "For people; shown in blueking_scope_info only."] = ""
    collectors: Annotated[Collectors, "What differs from the defaults in this scope."] = Collectors()
    auth: Annotated[ScopeAuth, "What differs from blueking.auth in this scope."] = ScopeAuth()


Patterns = Annotated[
    tuple[Annotated[str, ScopePattern()], ...],
    "Ids, or patterns for names, in which only * (any text) and ? (one character) are special.",
    Rule.UNIQUE,
]


class ScopeChoice(msgspec.Struct, frozen=True):
    """Which businesses or business sets are taken: those that include names and exclude does not."""

    include: Patterns = ()
    exclude: Patterns = ()


class Discovery(msgspec.Struct, frozen=True):
    """Scopes found in CMDB, beside those of scopes and scope_files, which win."""

    enabled: Annotated[bool, "Watch the businesses and business sets that CMDB lists; needs blueking.cmdb."] = False
    interval: Annotated[Seconds, "Duration between two queries of CMDB."] = 600.0
    biz: Annotated[ScopeChoice, "Businesses; those that the user may not see are never found."] = ScopeChoice(("*",))
    biz_set: Annotated[ScopeChoice, "Business sets."] = ScopeChoice()
    retire_after: Annotated[
        Count, "Complete lists in a row without a scope after which it is no longer watched; empty lists do not count."
    ] = 3
    collectors: Annotated[Collectors, "What differs from the defaults in the scopes that are found."] = Collectors()


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says of the whole process."""

    server: Server = Server()
    state: State = State()
    log: Log = Log()
    blueking: BlueKing
    discovery: Discovery = Discovery()
    counter_birth_hold: Annotated[
        float,
        Duration(zero=True),
        "Duration a new counter shows 0, so that increase() sees its first event; above the scrape interval.",
    ] = 90.0
    stale_after: Annotated[Count, "Intervals without a complete poll after which the gauges of a scope vanish."] = 5
    max_series: Annotated[
        Count,
        "Series of the whole page. Past it detail series are cut and counted, then new label values become other.",
    ] = 200_000


class ConfigFile(ProcessConfig, frozen=True, kw_only=True):
    """Configuration of blueking-exporter."""

    collectors: Annotated[Collectors, "Defaults of every scope."] = Collectors()
    scopes: Annotated[tuple[ScopeEntry, ...], "Scopes to watch."] = ()
    scope_files: Annotated[
        tuple[str, ...], "Globs of files that each hold a list like scopes; followed when they change.", Rule.UNIQUE
    ] = ()


class ScopeConfig(msgspec.Struct, frozen=True):
    """One scope to watch, with the defaults filled in."""

    scope: Scope
    name: str
    collectors: Collectors
    auth: ScopeAuth = ScopeAuth()


class Config(ProcessConfig, frozen=True, kw_only=True):
    """Everything the program may know before it starts. `sha256`: over the contents of the files with configuration."""

    scopes: tuple[ScopeConfig, ...]
    sha256: str


def json_schema() -> dict[str, Any]:
    """JSON Schema of the configuration file."""
    return keys.json_schema(ConfigFile, "blueking-exporter configuration")
