"""The configuration: accepted files, the messages for refused ones, and secrets that are never shown."""

from __future__ import annotations

import copy
import datetime
import json
import os
import pickle
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jsonschema
import msgspec
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.config.load import Loaded, Override, json_schema, load
from exporter.config.schema import ScopeAuth
from exporter.config.secret import Secret
from exporter.config.values import Duration, Share, Size
from exporter.config.web_file import load_web
from exporter.config.yaml import MAX_BYTES, Node, Scalar, parse
from exporter.config.yaml import Mapping as MappingNode
from exporter.config.yaml import Sequence as SequenceNode
from exporter.errors import ConfigError
from exporter.model import Scope
from tests.support.certificates import Authority
from tests.support.paths import ROOT

NOT_PEM = "not PEM, or without its key, or a key that needs a password"
BROKEN = Path(__file__).parent / "broken"
CANARY = "hunter2canary"

MINIMAL = """
blueking:
  job: {url: "http://127.0.0.1:1/"}
  auth: {app_code: a, app_secret: hunter2canary}
scopes: [{bk_scope_type: biz, bk_scope_id: 2}]
"""

CONTRACT = """
server:
  listen_address: ["127.0.0.1:10071"]
  web_config_file: null
  telemetry_path: /metrics
  enable_lifecycle: false
state:
  url: sqlite:state.db
  lease_ttl: 15s
log: {level: info, format: logfmt}
blueking:
  job:
    url: https://bkapi.example.com/api/bk-job/prod
    api: v4
    app_type: true
  nodeman:
    url: https://bkapi.example.com/api/bk-nodeman/prod
    api: gateway
    app_type: true
  nodeman_legacy:
    url: https://paas.example.com
  auth:
    app_code: blueking-exporter
    app_secret_file: app_secret
    username: admin
  request_timeout: 30s
  requests_per_second: 10
  retry_budget: 20%
  max_concurrency: 8
  max_response_bytes: 64MiB
  timezone: "+08:00"
  tls: {ca_file: null, cert_file: null, key_file: null, server_name: null, insecure_skip_verify: false}
  proxy_url: null
collectors:
  job:
    enabled: true
    interval: 30s
    lookback: 10m
    max_catchup: 7d
    reopen_window: 24h
    max_unfinished_age: 7d
    host_results: failed
    watch: []
    max_failing_hosts: 500
    failing_host_ttl: 49h
    duration_buckets: [1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400]
  nodeman_job:
    enabled: false
    interval: 60s
    discover: true
    job_ids: []
    max_finished_age: 24h
    max_failing_hosts: 500
    failing_host_ttl: 49h
  nodeman_subscription:
    enabled: false
    interval: 60s
    subscription_ids: []
    max_failing_hosts: 500
    failing_host_ttl: 49h
  nodeman_task:
    enabled: false
    interval: 60s
    job_ids: []
    max_failing_hosts: 500
    failing_host_ttl: 49h
counter_birth_hold: 90s
stale_after: 5
max_series: 200000
scopes:
  - bk_scope_type: biz
    bk_scope_id: "2"
    name: Demo business
    collectors: {nodeman_job: {enabled: true}}
    auth: {username: null, tenant_id: null}
scope_files: []
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the test's own directory and returns its path."""

    def write(text: str | bytes, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refused(
    path: Path, overrides: Mapping[str, Override] | None = None, environ: Mapping[str, str] | None = None
) -> list[str]:
    """The lines that the configuration is refused with, without the directory."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, environ or {})
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def warned(loaded: Loaded, path: Path) -> list[str]:
    return [str(problem).replace(f"{path.parent}/", "") for problem in loaded.warnings]


@pytest.mark.parametrize("path", sorted(BROKEN.glob("*.yaml")), ids=lambda path: path.stem)
def test_F37_broken_file(path: Path) -> None:
    """Each broken file is refused with exactly the lines beside it: all of them, in order, without any secret."""
    lines = refused(path, environ={"CANARY": CANARY})
    assert lines == path.with_suffix(".txt").read_text().splitlines()
    assert all(re.match(r"^[\w./]+:[1-9]\d*:[1-9]\d*: ", line) for line in lines)
    assert CANARY not in "".join(lines)


def test_contract_example(write: Write) -> None:
    """The documented example loads without warnings, with every value typed."""
    secret = write("s3cret\n", "app_secret")
    secret.chmod(0o600)
    path = write(CONTRACT)
    loaded = load(path, environ={})
    config = loaded.config
    assert warned(loaded, path) == []
    assert loaded.files == (path, secret)
    assert config.blueking.auth.app_secret is not None
    assert config.blueking.auth.app_secret.reveal() == "s3cret"
    assert config.state.url == f"sqlite:{path.parent}/state.db"
    assert config.blueking.max_response_bytes == 64 * 1024 * 1024
    assert config.blueking.timezone == datetime.timezone(datetime.timedelta(hours=8))
    assert config.counter_birth_hold == 90.0
    (scope,) = config.scopes
    assert (scope.scope, scope.name) == (Scope("biz", "2"), "Demo business")
    assert scope.collectors.nodeman_job.enabled
    assert scope.collectors.nodeman_job.failing_host_ttl == 49 * 3600
    assert not scope.collectors.nodeman_task.enabled


def test_defaults_are_those_of_the_contract(write: Write) -> None:
    """Leaving a key out is the same as writing its documented default."""
    write(CANARY, "app_secret")
    documented = load(write(CONTRACT), environ={}).config
    minimal = load(write(MINIMAL), environ={}).config
    for name in ("server", "state", "log", "counter_birth_hold", "stale_after", "max_series"):
        assert getattr(minimal, name) == getattr(documented, name)
    for name in (
        "request_timeout",
        "requests_per_second",
        "retry_budget",
        "max_concurrency",
        "max_response_bytes",
        "timezone",
        "tls",
    ):
        assert getattr(minimal.blueking, name) == getattr(documented.blueking, name)
    theirs, ours = documented.scopes[0].collectors, minimal.scopes[0].collectors
    assert (ours.job, ours.nodeman_task) == (theirs.job, theirs.nodeman_task)
    assert ours.nodeman_job == msgspec.structs.replace(theirs.nodeman_job, enabled=False)


def test_shipped_example_loads() -> None:
    """config.example.yaml loads on a fresh machine: no environment, no other files, no warnings."""
    loaded = load(ROOT / "config.example.yaml", environ={})
    assert loaded.warnings == ()
    assert loaded.files == (ROOT / "config.example.yaml",)


def test_shipped_example_fits_the_schema() -> None:
    """The JSON Schema is one, and takes the shipped example."""
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((ROOT / "config.example.yaml").read_text()), schema)
    assert schema == json.loads(json.dumps(schema))


def test_shipped_example_has_every_key() -> None:
    """Every key of the schema has a sentence and stands in the example, commented out or not, with its default."""
    text = (ROOT / "config.example.yaml").read_text()
    # "#key" without a space is a key that is not set
    root, problems = parse(re.sub(r"^( *)#(?=\w)", r"\1", text, flags=re.M).encode(), "example", ROOT)
    assert problems == []
    example = json.loads(json.dumps(_plain(root)))
    schema = json_schema()
    missing: list[str] = []
    wrong: list[str] = []

    def walk(definition: dict[str, object], value: object, path: str) -> None:
        options = [definition, *definition.get("anyOf", [])]  # type: ignore[misc]
        reference = next((option["$ref"] for option in options if "$ref" in option), None)
        if isinstance(reference, str):
            definition = schema["$defs"][reference.rpartition("/")[2]]
        properties = definition.get("properties")
        if isinstance(properties, dict):
            assert definition["additionalProperties"] is False
            assert isinstance(value, dict), path
            for name, child in properties.items():
                assert child["description"].endswith("."), f"{path}.{name}"
                if name not in value:
                    missing.append(f"{path}.{name}")
                    continue
                if "default" in child and child["default"] != value[name]:
                    wrong.append(f"{path}.{name}: {child['default']!r} != {value[name]!r}")
                walk(child, value[name], f"{path}.{name}")

    # what scopes override is the same shape as the defaults, so it is looked at there only
    scope = example["scopes"][0]
    scope["collectors"] = example["discovery"]["collectors"] = example["collectors"]
    walk(schema, example, "")
    walk({"$ref": "#/$defs/ScopeEntry"}, scope, ".scopes[0]")
    assert missing == []
    unset = {".blueking.auth.app_secret", ".blueking.auth.app_secret_file"}
    unset |= {".blueking.nodeman_legacy", ".blueking.nodemgr", ".blueking.cmdb"}
    unset.add(".discovery.biz.include")  # businesses and sets have one shape and different defaults
    assert {line.partition(":")[0] for line in wrong} <= unset | {".blueking.job", ".blueking.nodeman", ".scopes"}
    for key in schema["$defs"]["Watch"]["properties"]:
        assert f"{key}: " in text


def _plain(node: Node | None) -> object:
    if isinstance(node, MappingNode):
        return {name: _plain(child) for name, _, child in node.entries}
    if isinstance(node, SequenceNode):
        return [_plain(child) for child in node.items]
    return node.value if isinstance(node, Scalar) else None


def test_schema_takes_variables_and_refuses_typing_errors() -> None:
    """Editors accept `${VAR}` for any text, and mark unknown keys and malformed durations."""
    validator = jsonschema.Draft202012Validator(json_schema())
    document = yaml.safe_load(MINIMAL)
    document["blueking"] |= {"request_timeout": "${TIMEOUT:-5s}", "job": {"url": "${URL}", "api": "${API}"}}
    assert list(validator.iter_errors(document)) == []
    for broken in ({"log": {"levl": "info"}}, {"counter_birth_hold": 90}, {"counter_birth_hold": "90"}):
        assert len(list(validator.iter_errors(document | broken))) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("012", 12),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("yes", "yes"),
        ("True", True),
        ("~", None),
        ("1_000", "1_000"),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("=", "="),
        ("+08:00", "+08:00"),
    ],
)
def test_F37_scalars_follow_yaml_12(text: str, value: object) -> None:
    """Plain scalars are what the YAML 1.2 core schema says, not what YAML 1.1 did."""
    root, problems = parse(f"a: {text}\n".encode(), "f", ROOT)
    assert problems == []
    plain = _plain(root)
    assert plain == {"a": value}
    assert isinstance(plain, dict)
    assert type(plain["a"]) is type(value)


def test_F37_alias_bomb_is_bounded() -> None:
    """A few hundred bytes that would unfold to 10^30 values are refused at once."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    start = time.perf_counter()
    root, problems = parse("\n".join(lines).encode(), "f", ROOT)
    assert root is None
    assert [problem.message for problem in problems] == ["more than 300000 values"]
    assert time.perf_counter() - start < 5


def test_F37_values_are_bounded() -> None:
    """A file that has too many values is refused at the first of them that is too many."""
    root, problems = parse(b"[" + b"a," * 1_000_001 + b"]", "f", ROOT)
    assert root is None
    assert [(problem.column, problem.message) for problem in problems] == [(2_000_000, "more than 1000000 values")]


def test_thirty_thousand_scopes_are_read_and_share_what_is_equal(write: Write) -> None:
    """A scope file for the largest sites: settings that are equal are in memory once."""
    intervals = ("5m", "10m", "15m")
    lines = (
        f"- {{bk_scope_type: biz, bk_scope_id: {number}, name: Business number {number}, auth: {{tenant_id: t1}},"
        f" collectors: {{job: {{interval: {intervals[number % 3]}, watch: [{{name: 'nightly-*'}}]}},"
        f" nodeman_job: {{enabled: true, interval: 10m}}}}}}\n"
        for number in range(1, 30_001)
    )
    write("".join(lines), "scopes.yaml")
    text = MINIMAL.replace("  auth:", "  nodeman: {url: 'http://b'}\n  requests_per_second: 200\n  auth:")
    loaded = load(
        write(text.replace("bk_scope_id: 2", "bk_scope_id: 99999") + "scope_files: [scopes.yaml]\n"), environ={}
    )
    scopes = loaded.config.scopes
    assert loaded.warnings == ()
    assert len(scopes) == 30_001
    assert scopes[30_000].scope == Scope("biz", "30000")
    assert scopes[30_000].collectors.job.interval == 300.0
    assert len({id(scope.collectors) for scope in scopes}) == 1 + len(intervals)


def test_aliases_are_allowed(write: Write) -> None:
    """Anchors save repetition as long as they are bounded."""
    text = MINIMAL + "collectors: {job: {interval: &i 45s, lookback: *i}}\n"
    job = load(write(text), environ={}).config.scopes[0].collectors.job
    assert (job.interval, job.lookback) == (45.0, 45.0)


def test_F37_the_largest_file(write: Write) -> None:
    """A file of 16 MiB is read, one byte more is refused."""
    padding = MAX_BYTES - len(MINIMAL)
    assert load(write(MINIMAL + "#" * padding), environ={}).config.stale_after == 5
    assert refused(write(MINIMAL + "#" * (padding + 1))) == ["config.yaml:1:1: larger than 16 MiB"]


def test_F37_bom_and_crlf_are_read(write: Write) -> None:
    """A file saved on Windows means the same."""
    plain = load(write(MINIMAL), environ={}).config
    windows = load(write(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()), environ={}).config
    assert msgspec.structs.replace(windows, sha256="") == msgspec.structs.replace(plain, sha256="")


def test_unreadable_file(tmp_path: Path) -> None:
    """A missing file and a directory are configuration errors."""
    assert refused(tmp_path / "no.yaml") == ["no.yaml:1:1: cannot be read: No such file or directory"]
    with pytest.raises(ConfigError, match=r":1:1: cannot be read: Is a directory$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("30s", 30), ("5m", 300), ("2h", 7200), ("7d", 604800), ("1h30m", 5400), ("250ms", 0.25)],
)
def test_durations(text: str, seconds: float) -> None:
    """Durations are numbers with units, the larger unit first."""
    assert Duration(zero=True).parse(text, ROOT) == seconds


@given(st.integers(0, 3650 * 86400))
def test_durations_read_back(seconds: int) -> None:
    """What is written for a default reads back as the same duration."""
    kind = Duration(zero=True)
    assert kind.parse(kind.write(float(seconds)), ROOT) == seconds


@given(st.integers(1024, 2**40))
def test_sizes_read_back(size: int) -> None:
    """What is written for a default reads back as the same size."""
    assert Size().parse(Size().write(size), ROOT) == size


@pytest.mark.parametrize(("text", "share"), [("20%", 0.2), ("0%", 0.0), ("12.5%", 0.125), ("200%", 2.0)])
def test_shares(text: str, share: float) -> None:
    """A share is written with a percent sign, and a default reads back as the same share."""
    assert Share().parse(text, ROOT) == share
    assert Share().parse(Share().write(share), ROOT) == share


def test_a_scope_may_have_its_own_user_and_tenant(write: Write) -> None:
    """Keys that a scope leaves out, or sets to null, are inherited."""
    scopes = """
scopes:
  - {bk_scope_type: biz, bk_scope_id: 2, auth: {username: ops02, tenant_id: t2}}
  - {bk_scope_type: biz, bk_scope_id: 3, auth: {tenant_id: t3, username: null}}
  - {bk_scope_type: biz, bk_scope_id: 4}
"""
    loaded = load(write(MINIMAL.partition("scopes:")[0] + scopes), environ={})
    assert [one.auth for one in loaded.config.scopes] == [
        ScopeAuth("ops02", "t2"),
        ScopeAuth(None, "t3"),
        ScopeAuth(),
    ]


@pytest.mark.parametrize("address", [":0", "127.0.0.1:10071", "[::1]:10071", "exporter.example:80", "[::]:1"])
def test_listen_addresses(write: Write, address: str) -> None:
    """Names, IPv4, bracketed IPv6 and every address are taken as written."""
    server = load(write(f"{MINIMAL}server: {{listen_address: ['{address}']}}\n"), environ={}).config.server
    assert server.listen_address == (address,)


@pytest.mark.parametrize(
    "address", ["10071", "::1:80", "a:65536", "[::g]:1", "[1.2.3.4]:1", "a:-1", "http://a:1", "a b:1"]
)
def test_bad_listen_addresses(write: Write, address: str) -> None:
    """Anything else is refused before a socket sees it."""
    (line,) = refused(write(f"{MINIMAL}server: {{listen_address: ['{address}']}}\n"))
    assert line.startswith("config.yaml:6:27: server.listen_address[0]: want ")


@pytest.mark.parametrize(
    "path", ["/", "metrics", "/-/ready", "/-", "/api/v1", "/api", "/a?b", "/{x}", "/../x", "/a//b", "/failures"]
)
def test_bad_telemetry_paths(write: Write, path: str) -> None:
    """The metrics page hides none of the exporter's own pages."""
    (line,) = refused(write(f"{MINIMAL}server: {{telemetry_path: '{path}'}}\n"))
    assert line.startswith("config.yaml:6:26: server.telemetry_path: want a path like /metrics")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x",
        "http:///x",
        "http://u@x",
        "https://u:p@x/y",
        "http://x?a=b",
        "http://x#f",
        "http://[::1",
        "http://x:99999",
    ],
)
def test_F24_bad_platform_urls(write: Write, url: str) -> None:
    """Platform URLs are http(s), without credentials; a refused one is not printed, for it may hold some."""
    (line,) = refused(write(MINIMAL.replace("http://127.0.0.1:1/", url)))
    assert line.startswith("config.yaml:3:14: blueking.job.url: ")
    assert url not in line


def test_F24_proxy_is_a_secret(write: Write) -> None:
    """A proxy may need a password, so its URL prints nowhere."""
    text = MINIMAL.replace("  auth:", f"  proxy_url: http://u:{CANARY}@proxy:3128\n  auth:")
    config = load(write(text), environ={}).config
    assert config.blueking.proxy_url is not None
    assert config.blueking.proxy_url.reveal() == f"http://u:{CANARY}@proxy:3128"
    assert CANARY not in repr(config)


def test_variables(write: Write) -> None:
    """`${VAR}`, `${VAR:-default}` and `$$` are replaced in values, keys and lone dollar signs are left alone."""
    text = """
blueking:
  job: {url: "${SCHEME:-http}://${HOST}:1"}
  auth: {app_code: "$$a$b${EMPTY:-c}", app_secret: "${SECRET}"}
  request_timeout: ${TIMEOUT:-5s}
scopes: [{bk_scope_type: biz, bk_scope_id: "${BIZ}"}]
"""
    config = load(write(text), environ={"HOST": "h", "SECRET": "a$$b", "BIZ": "7", "EMPTY": ""}).config
    assert config.blueking.job is not None
    assert config.blueking.auth.app_secret is not None
    assert config.blueking.job.url == "http://h:1"
    assert config.blueking.auth.app_code == "$a$bc"
    assert config.blueking.auth.app_secret.reveal() == "a$$b"
    assert config.blueking.request_timeout == 5.0
    assert config.scopes[0].scope == Scope("biz", "7")


def test_paths_start_at_their_file(write: Write, tmp_path: Path) -> None:
    """Relative paths are relative to the file they stand in, whatever the current directory."""
    path = write(MINIMAL + "state: {url: 'sqlite:../x/state.db'}\n", "conf/c.yaml")
    Authority(tmp_path / "conf")
    path.write_text(path.read_text().replace("  auth:", "  tls: {ca_file: ca.pem}\n  auth:"))
    config = load(path, environ={}).config
    assert config.blueking.tls.ca_file == tmp_path / "conf/ca.pem"
    assert config.state.url == f"sqlite:{tmp_path}/conf/../x/state.db"


def test_overrides(write: Write) -> None:
    """Flags win over the file; their paths start at the current directory and dollar signs in them are plain."""
    path = write(MINIMAL + "server: {listen_address: [':1'], telemetry_path: /m}\n")
    overrides = {
        "server.listen_address": Override((":2", ":3"), "--web.listen-address"),
        "server.enable_lifecycle": Override("true", "BLUEKING_EXPORTER_WEB_ENABLE_LIFECYCLE"),
        "log.level": Override("debug", "--log.level"),
        "state.url": Override("sqlite:${x}.db", "--state.url"),
    }
    config = load(path, overrides, {}).config
    assert config.server.listen_address == (":2", ":3")
    assert config.server.telemetry_path == "/m"
    assert config.server.enable_lifecycle
    assert config.log.level == "debug"
    assert config.state.url == f"sqlite:{Path.cwd()}/${{x}}.db"


def test_bad_overrides(write: Write) -> None:
    """What a flag says is checked like the file, and the message names the flag."""
    overrides = {
        "server.listen_address": Override((":2", "x"), "--web.listen-address"),
        "log.level": Override("loud", "BLUEKING_EXPORTER_LOG_LEVEL"),
        "state.url": Override(f"redis://:{CANARY}@h/0/1", "--state.url"),
        "server.web_config_file": Override("/no/such", "--web.config.file"),
        "server.enable_lifecycle": Override("maybe", "--web.enable-lifecycle"),
    }
    lines = refused(write(MINIMAL + "zzz: 1\n"), overrides)
    assert sorted(lines) == [
        "--state.url: state.url: nothing may follow the number of the database",
        "--web.config.file: server.web_config_file: cannot be read: No such file or directory",
        '--web.enable-lifecycle: server.enable_lifecycle: want true or false, not "maybe"',
        '--web.listen-address: server.listen_address[1]: want HOST:PORT, [IPV6]:PORT or :PORT, not "x"',
        'BLUEKING_EXPORTER_LOG_LEVEL: log.level: want debug, info, warning or error, not "loud"',
        "config.yaml:6:1: zzz: unknown key",
    ]


def test_scope_files(write: Write, tmp_path: Path) -> None:
    """Scopes of files join those of the configuration and share its defaults; the hash covers them all."""
    path = write(
        f"{MINIMAL}collectors: {{job: {{interval: 45s, watch: [{{job_plan_id: 7}}]}}}}\n"
        "scope_files: ['d/*.yaml', 'd/b.yaml', 'x/*']\n"
    )
    write("- {bk_scope_type: biz, bk_scope_id: 3, collectors: {job: {lookback: 1m}}}\n", "d/a.yaml")
    other = write("- {bk_scope_type: biz_set, bk_scope_id: 4, collectors: {job: {watch: [{name: x}]}}}\n", "d/b.yaml")
    loaded = load(path, environ={})
    assert warned(loaded, path) == ["config.yaml:7:39: scope_files[2]: matches no file"]
    assert [str(scope.scope) for scope in loaded.config.scopes] == ["biz/2", "biz/3", "biz_set/4"]
    jobs = [scope.collectors.job for scope in loaded.config.scopes]
    assert [job.interval for job in jobs] == [45.0] * 3
    assert [job.lookback for job in jobs] == [600.0, 60.0, 600.0]
    assert [[watch.job_name for watch in job.watch] for job in jobs] == [["7"], ["7"], ["x"]]
    assert loaded.files == (path, tmp_path / "d/a.yaml", tmp_path / "d/b.yaml")
    other.write_text(other.read_text() + "# changed\n")
    assert load(path, environ={}).config.sha256 != loaded.config.sha256


def test_scope_stamp(write: Write) -> None:
    """The stamp changes when a scope file comes, changes or goes, and only then."""
    loaded = load(write(MINIMAL + "scope_files: ['d/*']\n"), environ={})
    stamps = [loaded.scope_stamp(), loaded.scope_stamp()]
    added = write("- {bk_scope_type: biz, bk_scope_id: 3}\n", "d/a")
    stamps.append(loaded.scope_stamp())
    added.write_text("[]\n")
    stamps.append(loaded.scope_stamp())
    added.unlink()
    stamps.append(loaded.scope_stamp())
    assert stamps[0] == stamps[1] == stamps[4]
    assert len(set(stamps)) == 3


def test_watch_names(write: Write) -> None:
    """job_name is `as`, else the plan id, else the pattern."""
    text = (
        MINIMAL + "collectors: {job: {watch: [{job_plan_id: 1001}, {name: 'n-*'}, {name: x, as: y, max_age: 26h}]}}\n"
    )
    watch = load(write(text), environ={}).config.scopes[0].collectors.job.watch
    assert [(w.job_name, w.job_plan_id, w.name, w.max_age) for w in watch] == [
        ("1001", 1001, None, None),
        ("n-*", None, "n-*", None),
        ("y", None, "x", 26 * 3600.0),
    ]


def test_job_without_platform_is_off_unless_asked_for(write: Write) -> None:
    """NodeMan alone needs no word about JOB, but JOB enabled without a platform is an error."""
    text = MINIMAL.replace("job: {url", "nodeman: {url") + "collectors: {nodeman_job: {enabled: true}}\n"
    collectors = load(write(text), environ={}).config.scopes[0].collectors
    assert not collectors.job.enabled
    assert collectors.nodeman_job.enabled
    text = text.replace("bk_scope_id: 2", "bk_scope_id: 2, collectors: {job: {enabled: true}}")
    assert refused(write(text)) == [
        "config.yaml:5:75: scopes[0].collectors.job.enabled: collector job is enabled, but there is no blueking.job"
    ]


def test_warnings(write: Write) -> None:
    """What is allowed but probably wrong is reported with its place."""
    path = write("""
blueking:
  job: {url: "http://127.0.0.1:1", app_type: false}
  auth: {app_code: a, app_secret: s}
  requests_per_second: 0.01
  tls: {insecure_skip_verify: true}
scopes: [{bk_scope_type: biz, bk_scope_id: 2}, {bk_scope_type: biz, bk_scope_id: 3}]
""")
    assert warned(load(path, environ={}), path) == [
        "config.yaml:6:31: blueking.tls.insecure_skip_verify: certificates are not verified; "
        "the app secret can be read on the way",
        "config.yaml:3:46: blueking.job.app_type: the gateway answers 400 to a bare username: "
        "app_type: false needs access_token or bk_token",
        "config.yaml:5:24: blueking.requests_per_second: 0.067 polls per second are more than 0.01 requests per "
        "second; raise it or the intervals",
    ]


def test_a_token_beside_app_type_is_warned_about(write: Write) -> None:
    """It is never sent there: beside a token the gateway takes no user from bk_username."""
    text = MINIMAL.replace("app_secret: hunter2canary", "app_secret: s, access_token: t")
    path = write(text)
    assert warned(load(path, environ={}), path) == [
        "config.yaml:4:52: blueking.auth.access_token: not used: with app_type: true the application asks in the name "
        "of username"
    ]
    for used in ('"http://127.0.0.1:1/", app_type: false', '"http://127.0.0.1:1/", api: esb'):
        path = write(text.replace('"http://127.0.0.1:1/"', used))
        assert warned(load(path, environ={}), path) == []


@pytest.mark.parametrize(
    ("defaults", "scope", "place"),
    [
        ("{enabled: true, discover: false, job_ids: [181]}", "{}", "4:92: collectors.nodeman_job.job_ids"),
        (
            "{enabled: false}",
            "{nodeman_job: {enabled: true, discover: false, job_ids: [181]}}",
            "5:115: scopes[0].collectors.nodeman_job.job_ids",
        ),
    ],
)
def test_job_ids_over_the_esb_are_warned_about(write: Write, defaults: str, scope: str, place: str) -> None:
    """4.3: over the ESB the details of a job are the only look at it, and reading them too early damages it."""
    path = write(f"""blueking:
  nodeman: {{url: "http://127.0.0.1:1", api: esb}}
  auth: {{app_code: a, app_secret: s}}
collectors: {{job: {{enabled: false}}, nodeman_job: {defaults}}}
scopes: [{{bk_scope_type: biz, bk_scope_id: 2, collectors: {scope}}}, {{bk_scope_type: biz, bk_scope_id: 3}}]
""")
    (warning,) = warned(load(path, environ={}), path)
    assert warning.startswith(f"config.yaml:{place}: over the ESB")
    assert "store the job as successful" in warning
    gateway = path.read_text().replace("api: esb", "api: gateway")
    assert load(write(gateway), environ={}).warnings == ()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o604])
@pytest.mark.parametrize("key", ["app_secret_file", "key_file"])
def test_F65_a_secret_that_others_can_read_is_warned_about(write: Write, tmp_path: Path, key: str, mode: int) -> None:
    """The file of a secret or private key is for its owner, and a group of readers at most."""
    if key == "app_secret_file":
        write("x", "key").chmod(mode)
        text, place = MINIMAL.replace("app_secret: hunter2canary", "app_secret_file: key"), "4:40: blueking.auth." + key
    else:
        Authority(tmp_path).issue("a")[1].chmod(mode)
        text, place = (
            MINIMAL.replace("  auth:", "  tls: {cert_file: a.crt, key_file: a.key}\n  auth:"),
            "4:37: blueking.tls." + key,
        )
    path = write(text)
    expected = [f"config.yaml:{place}: others can read the file: chmod o-r"] if mode & 0o004 else []
    assert warned(load(path, environ={}), path) == expected


@pytest.mark.parametrize("auth", ["access_token: t", "app_code: a, app_secret: s, bk_token: t"])
def test_user_type_auth(write: Write, auth: str) -> None:
    """With a user's token, app_type: false is neither an error nor warned about."""
    text = MINIMAL.replace('1/"', '1", app_type: false').replace("app_code: a, app_secret: hunter2canary", auth)
    assert load(write(text), environ={}).warnings == ()


def test_F27_secret_never_prints(write: Write) -> None:
    """Neither printing, formatting, encoding nor copying a configuration shows the secret or lets it out."""
    secret = write(CANARY + "\n", "token")
    config = load(write(MINIMAL.replace("}\nscopes", f", bk_token_file: {secret}}}\nscopes")), environ={}).config
    auth = config.blueking.auth
    assert auth.app_secret is not None
    assert auth.bk_token is not None
    assert auth.app_secret.reveal() == auth.bk_token.reveal() == CANARY
    for text in (repr(config), str(auth), f"{auth.app_secret}", f"{auth.bk_token:>20}", "%s" % auth.app_secret):  # noqa: UP031
        assert CANARY not in text
    assert str(auth.app_secret) == "***"
    for leak in (msgspec.json.encode, msgspec.msgpack.encode, pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError) as caught:
            leak(auth)
        assert CANARY not in str(caught.value)


def test_secret_equality() -> None:
    """Secrets are equal by source, so that a reload sees a changed value but not a rotated file."""
    assert Secret("a") == Secret("a")
    assert hash(Secret("a")) == hash(Secret("a"))
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"


def test_secret_file_is_followed(tmp_path: Path) -> None:
    """A rotated file gives the new value at once; one that is missing, empty or broken leaves the last good value."""
    file = tmp_path / "token"
    file.write_text("one\r\n")
    secret = Secret.from_file(file)
    assert secret == Secret.from_file(file)
    assert secret != Secret("one")
    assert secret.reveal() == "one"
    replacement = tmp_path / "new"
    replacement.write_text("two\n\n")
    os.replace(replacement, file)
    assert secret.reveal() == "two"
    for broken in (b"", b"\n", b"\xff", b"a\nb", b"x" * 70_000):
        file.write_bytes(broken)
        assert secret.reveal() == "two"
    file.unlink()
    assert secret.reveal() == "two"
    file.write_text("three")
    assert secret.reveal() == "three"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "the file is empty"),
        (b"\xff\xfe", "the file is not UTF-8 text"),
        (b"a\nb", "the file holds control characters"),
        (b"x" * 70_000, "the file is larger than 64 KiB"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_unusable_secret_file(write: Write, content: bytes | None, message: str) -> None:
    """A secret file that holds no secret stops the start; the message has no byte of it."""
    if content is not None:
        write(content, "token")
    lines = refused(write(MINIMAL.replace("app_secret: hunter2canary", "app_secret_file: token")))
    assert lines == [f"config.yaml:4:40: blueking.auth.app_secret_file: {message}"]


def plant(path: Path, kind: str) -> str:
    """Put something that is no regular file at `path`; the words it is refused with."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "directory":
        path.mkdir()
        return "Is a directory"
    else:
        path.symlink_to("/dev/zero")
    return "is no regular file"


NOT_REGULAR = ("pipe", "socket", "directory", "device")


@pytest.mark.parametrize("kind", NOT_REGULAR)
@pytest.mark.parametrize("secret", [True, False], ids=["secret", "certificate"])
def test_F56_only_regular_files_are_read(write: Write, tmp_path: Path, kind: str, secret: bool) -> None:
    """Anything else as a file of a secret or certificate is an error at its key; a pipe is not waited for."""
    words = plant(tmp_path / "odd", kind)
    text = MINIMAL.replace("app_secret: hunter2canary", "app_secret_file: odd")
    if not secret:
        text = MINIMAL.replace("  auth:", "  tls: {ca_file: odd}\n  auth:")
    place = "4:40: blueking.auth.app_secret_file" if secret else "4:18: blueking.tls.ca_file"
    verb = "the file" if secret and kind != "directory" else "cannot be read:"
    assert refused(write(text)) == [f"config.yaml:{place}: {verb} {words}"]


@pytest.mark.parametrize(
    ("files", "key", "words"),
    [
        ("ca_file: text", "ca_file", "no certificate or crl found"),
        ("ca_file: a.key", "ca_file", "no certificate or crl found"),
        ("cert_file: text, key_file: a.key", "cert_file", NOT_PEM),
        ("cert_file: a.crt, key_file: b.key", "cert_file", "key values mismatch"),
        ("cert_file: a.crt", "cert_file", NOT_PEM),
        ("ca_file: ca.pem, cert_file: a.crt, key_file: locked.key", "cert_file", NOT_PEM),
    ],
)
@pytest.mark.parametrize("section", ["blueking", "state"])
def test_F55_tls_files_that_cannot_be_used(
    write: Write, tmp_path: Path, section: str, files: str, key: str, words: str
) -> None:
    """An invalid certificate, a key of another one, a key with a password: an error at its key, without a network."""
    ca = Authority(tmp_path)
    ca.issue("a"), ca.issue("b")
    write("no certificate", "text")
    locked = serialization.load_pem_private_key((tmp_path / "a.key").read_bytes(), None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    )
    (tmp_path / "locked.key").write_bytes(locked)
    line = f"tls: {{{files}}}"
    if section == "blueking":
        text, at = MINIMAL.replace("  auth:", f"  {line}\n  auth:"), 4
    else:
        text, at = f"{MINIMAL}state:\n  url: rediss://store\n  {line}\n", 8
    column = f"  {line}".index(f"{key}: ") + len(f"{key}: ") + 1
    assert refused(write(text)) == [f"config.yaml:{at}:{column}: {section}.tls.{key}: cannot be used: {words}"]


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_F56_configuration_and_scope_files_are_regular_files(write: Write, tmp_path: Path, kind: str) -> None:
    """Anything else in their place is an error at its place, at once."""
    words = plant(tmp_path / "odd", kind)
    path = write(MINIMAL + "scope_files: [ok, odd]\n")
    write("[]\n", "ok")
    assert refused(path) == [f"config.yaml:6:19: scope_files[1]: odd cannot be read: {words}"]
    assert refused(tmp_path / "odd") == [f"odd:1:1: cannot be read: {words}"]


def test_null_secret_is_absent(write: Write) -> None:
    """`app_secret: null` beside `app_secret_file` is one way, not two."""
    write("x", "token")
    text = MINIMAL.replace("app_secret: hunter2canary", "app_secret_file: token, app_secret: null")
    secret = load(write(text), environ={}).config.blueking.auth.app_secret
    assert secret is not None
    assert secret.reveal() == "x"


def test_memory_state(write: Write) -> None:
    """`memory:` keeps nothing and has no path."""
    assert load(write(MINIMAL + "state: {url: 'memory:'}\n"), environ={}).config.state.url == "memory:"


def attempt(path: Path) -> Loaded | ConfigError:
    try:
        return load(path, environ={})
    except ConfigError as error:
        return error


WORDS = st.sampled_from(
    [
        *re.findall(r"[\w.]+:? ?|\n *|[\[\]{},\"']", CONTRACT),
        *(
            "&a ",
            "*a",
            "!x ",
            "? ",
            "- ",
            "\t",
            "---\n",
            "%YAML 1.2\n",
            "<<: ",
            "|\n",
            ">\n",
            "${",
            "}",
            "#",
            "\ufeff",
            "\x00",
        ),
    ]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.text(), st.binary(), st.lists(WORDS, max_size=60).map("".join)))
def test_F50_any_text_gives_a_configuration_or_its_errors(write: Write, text: str | bytes) -> None:
    """Whatever stands in the file: a value or ConfigError, never another exception."""
    data = text.encode(errors="replace") if isinstance(text, str) else text
    outcome = attempt(write(data))
    if isinstance(outcome, ConfigError):
        assert outcome.problems
        for line in str(outcome).splitlines():
            assert re.search(r"config\.yaml:[1-9]\d*:[1-9]\d*: .", line), line


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_F50_one_changed_line_never_leaks(write: Write, data: st.DataObject) -> None:
    """A file with a secret, mutilated anywhere: the errors do not contain the secret."""
    write("x", "app_secret")
    text = CONTRACT.replace("app_secret_file: app_secret", f"app_secret: {CANARY}")
    start = data.draw(st.integers(0, len(text)))
    text = (
        text[:start]
        + data.draw(st.lists(WORDS, max_size=4).map("".join))
        + text[start + data.draw(st.integers(0, 12)) :]
    )
    # a canary that was cut or written into a key of its own is no secret any more
    if f"app_secret: {CANARY}\n" not in text:
        return
    assert CANARY not in str(attempt(write(text.encode())))


@pytest.mark.parametrize(
    "auth",
    [f"\n    app_secret:{CANARY}", f" {CANARY}", f" {{app_code: a, app_secret{CANARY}: x}}"],
    ids=["no space", "scalar", "in the key"],
)
def test_F27_a_secret_in_the_wrong_place_is_not_printed(write: Write, auth: str) -> None:
    """A forgotten space makes a text of the key and its secret; the message names the place, not the text."""
    text = MINIMAL.replace(" {app_code: a, app_secret: hunter2canary}", auth)
    assert text != MINIMAL
    lines = refused(write(text))
    assert lines
    assert CANARY not in "".join(lines)


def test_F65_a_web_key_that_others_can_read_is_warned_about(write: Write) -> None:
    """The private key of the web configuration file too; the file is valid nevertheless."""
    write("x", "server.crt")
    write("x", "server.key").chmod(0o644)
    text = "tls_server_config: {cert_file: server.crt, key_file: server.key}\n"
    path = write(text, "web.yml")
    (warning,) = load_web(path).warnings
    place = f"{path}:1:{text.index('server.key') + 1}"
    assert str(warning) == f"{place}: tls_server_config.key_file: others can read the file: chmod o-r"
