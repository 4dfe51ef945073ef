"""The command line: one table of flags, one table of commands, exit codes.

Exit codes: 0 asked to stop, 1 failed, 2 bad arguments or configuration. A command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from exporter import __version__

if TYPE_CHECKING:
    from exporter.config.load import Loaded, Override
    from exporter.shard import Shard

ENVIRONMENT = "BLUEKING_EXPORTER_"

Environ = Mapping[str, str]


class Flag(NamedTuple):
    """One flag and its environment variable. `key`: the key of the configuration file that it overrides.

    Without `metavar` it is a switch. `read` turns the text into a value; its ValueError is the message for the user.
    """

    name: str
    metavar: str
    help: str
    key: str = ""
    read: Callable[[str], Any] = str
    default: Any = None
    repeatable: bool = False

    @property
    def attribute(self) -> str:
        return self.name.replace(".", "_").replace("-", "_")

    @property
    def variable(self) -> str:
        return ENVIRONMENT + self.attribute.upper()

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Declare the flag, without a default: so a flag that was given differs from one that was not."""
        kind: dict[str, Any] = {"action": "store_true", "default": None}
        if self.metavar:
            kind = {"action": "append" if self.repeatable else "store", "metavar": self.metavar, "type": self.argument}
        parser.add_argument(f"--{self.name}", dest=self.attribute, help=self.help, **kind)

    def argument(self, text: str) -> Any:
        """The value of the flag on the command line."""
        try:
            return self.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def from_variable(self, text: str) -> Any:
        """The value of the variable; that of a repeatable flag is separated by commas. Raises ConfigError."""
        from exporter.errors import ConfigError, Problem

        try:
            if self.repeatable:
                return [self.read(part.strip()) for part in text.split(",") if part.strip()]
            return self.read(text) if self.metavar else _boolean(text)
        except ValueError as error:
            raise ConfigError([Problem(self.variable, 0, 0, "", str(error))]) from None


class Given:
    """The values of a command's flags: from the command line, else from the environment, else the default.

    `action`: the word after the command, for commands that have several.
    """

    def __init__(self, flags: Sequence[Flag], parsed: argparse.Namespace, environ: Environ) -> None:
        self.environ = environ
        self.action: str = getattr(parsed, "action", "")
        self._overrides: dict[str, tuple[Any, str]] = {}
        self._values: dict[str, Any] = {}
        for flag in flags:
            value, source = getattr(parsed, flag.attribute), f"--{flag.name}"
            text = environ.get(flag.variable, "").strip()
            if value is None and text:
                value, source = flag.from_variable(text), flag.variable
            if value is not None and flag.key:
                self._overrides[flag.key] = (tuple(value) if flag.repeatable else value, source)
            self._values[flag.name] = flag.default if value is None else value

    def __getitem__(self, name: str) -> Any:
        """The value of a flag; None for one that the command does not have."""
        return self._values.get(name)

    def overrides(self) -> dict[str, Override]:
        """What replaces keys of the configuration file."""
        from exporter.config.load import Override

        return {key: Override(value, source) for key, (value, source) in self._overrides.items()}


# How the text of a flag is read


def _boolean(text: str) -> bool:
    try:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    except KeyError:
        raise ValueError(f'want true or false, not "{text}"') from None


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f'want HOST:PORT, not "{text}"')
    return text


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f'want a whole number, not "{text}"') from None


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise ValueError(f'want a number from 1 to 100000, not "{text}"')
    return int(text)


def _speed(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.001 <= float(text) <= 1000:
            return float(text)
    raise ValueError(f'want a number from 0.001 to 1000, not "{text}"')


def _duration(text: str) -> float:
    from exporter.config.values import Duration, InvalidValue

    try:
        return Duration().parse(text, Path())
    except InvalidValue as error:
        raise ValueError(f'{error}, not "{text}"') from None


def _language(text: str) -> str:
    if text not in ("en", "zh"):
        raise ValueError(f'want en or zh, not "{text}"')
    return text


def _scope(text: str) -> str:
    if not re.fullmatch(r"(?:biz|biz_set|tenant_set)/[1-9][0-9]{0,18}", text):
        raise ValueError(f'want TYPE/ID like biz/2, not "{text}"')
    return text


def _faults(text: str) -> str:
    from exporter.simulator.faults import parse_faults

    parse_faults(text)
    return text


# Flags

CONFIG = (
    Flag("config.file", "FILE", "configuration file (default: config.yaml)", read=Path, default=Path("config.yaml")),
)
WEB = (
    Flag("web.listen-address", "HOST:PORT", "may be repeated", "server.listen_address", repeatable=True),
    Flag("web.config.file", "FILE", "web configuration file of exporter-toolkit", "server.web_config_file"),
    Flag("web.telemetry-path", "PATH", "path of the metrics (default: /metrics)", "server.telemetry_path"),
    Flag("web.enable-lifecycle", "", "allow POST /-/reload", "server.enable_lifecycle"),
)
SYSTEMD = (Flag("web.systemd-socket", "", "use the sockets that systemd has opened"),)
STATE = (
    Flag("state.url", "URL", "sqlite:PATH, memory:, or an address of Redis or Valkey", "state.url"),
    Flag("shard", "N", "which of the shards this process is, from 0", read=_number),
    Flag("total-shards", "M", "processes that share the scopes, each with its own state", read=_number),
)
LOG = (
    Flag("log.level", "LEVEL", "debug, info, warning or error", "log.level"),
    Flag("log.format", "FORMAT", "logfmt, json or console", "log.format"),
)
SEED = (Flag("seed", "N", "the same seed gives the same world (default: 1)", read=_number, default=1),)
SIMULATOR = (
    Flag("listen-address", "HOST:PORT", "default: 127.0.0.1:10072", read=_address, default="127.0.0.1:10072"),
    *SEED,
    Flag("scopes", "N", "number of businesses (default: 3)", read=_count, default=3),
    Flag("speed", "X", "how much faster than real time (default: 1)", read=_speed, default=1.0),
    Flag("faults", "LIST", "name[:probability][@api], separated by commas", read=_faults, default=""),
)
OUTPUT = (
    Flag("output", "FILE.prom", "file to replace atomically (default: standard output)", read=Path),
    Flag("no-constants", "", "leave out what the files of all exporters repeat, for several in one folder"),
)
WINDOW = (
    Flag("for", "DURATION", "how long to poll before everything is read again (default: 10m)", read=_duration,
         default=600.0),
    Flag("record", "DIR", "write each answer once per shape, without names, addresses, ids and secrets", read=Path),
)  # fmt: skip
KEY = (
    Flag("collector", "NAME", "only the states of this collector"),
    Flag("scope", "TYPE/ID", "only the states of this scope, such as biz/2", read=_scope),
)
HEALTH = (
    Flag("url", "URL", "address or page; default: the first listen address of the environment"),
    Flag("web.config.file", "FILE", "tells whether the port speaks TLS", read=Path),
)
LANGUAGE = (Flag("lang", "en|zh", "language of the reference (default: en)", read=_language, default="en"),)


def main() -> NoReturn:
    """Run one command and end the process with its exit code."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller
            setattr(sys, stream, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    # As standard error does: a terminal that cannot show a character gets its code.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = execute(sys.argv[1:], os.environ)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        code = 0
    sys.exit(code)


def execute(arguments: list[str], environ: Environ) -> int:
    """Run one command and return its exit code."""
    from exporter.errors import ConfigError, ExporterError

    # Prometheus takes its flags with one dash too.
    arguments = [f"-{one}" if one[:1] == "-" and one[1:3].isalpha() and len(one) > 2 else one for one in arguments]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["run", *arguments]
    parsed = _parser().parse_args(arguments)
    command: Command = parsed.command
    try:
        return command.run(Given(command.flags, parsed, environ))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ExporterError as error:
        print(f"blueking-exporter: {error}", file=sys.stderr)
        return 1


# Commands


def _run(given: Given) -> int:
    import gc

    # A start makes objects that live as long as the process: scanning them would delay it. The daemon enables this.
    gc.disable()
    from exporter.app import run
    from exporter.reload import Options

    loaded = _load(given)
    _configure_log(loaded)
    options = Options(
        given["config.file"], given.overrides(), _shard(given), systemd_socket=bool(given["web.systemd-socket"])
    )
    _start(run(options, loaded))
    return 0


def _check(given: Given) -> int:
    loaded = _load(given)
    warnings = loaded.warnings
    if loaded.config.server.web_config_file:
        from exporter.web.security import WebConfig

        warnings += WebConfig(loaded.config.server.web_config_file).warnings
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{given['config.file']}: valid, {len(loaded.config.scopes)} scopes")
    return 0


def _probe(given: Given) -> int:
    import asyncio

    from exporter import log
    from exporter.probe import report

    loaded = _load(given)
    log.configure("error", loaded.config.log.format)

    return 0 if asyncio.run(_print(report(loaded.config))) else 1


def _verify(given: Given) -> int:
    import asyncio

    from exporter import log
    from exporter.verify.command import verify

    loaded = _load(given)
    log.configure(loaded.config.log.level if given["log.level"] else "error", loaded.config.log.format)
    try:
        equal = asyncio.run(_print(verify(loaded.config, given["for"], given["record"])))
    except KeyboardInterrupt:
        print("blueking-exporter: interrupted, nothing is verified", file=sys.stderr)
        return 1
    print("equal" if equal else "different")
    return 0 if equal else 1


def _once(given: Given) -> int:
    import asyncio

    from exporter.errors import ExporterError
    from exporter.once import once, write_atomically

    loaded = _load(given)
    _configure_log(loaded)
    body, complete = asyncio.run(once(loaded.config, _shard(given), constants=not given["no-constants"]))
    if given["output"] is None:
        sys.stdout.buffer.write(body)
    else:
        try:
            write_atomically(given["output"], body)
        except OSError as error:
            raise ExporterError(f"cannot write {given['output']}: {error.strerror}") from error
    return 0 if complete else 1


def _state(given: Given) -> int:
    import asyncio

    from exporter.state_command import Selection, run

    selection = Selection(given["collector"] or "", given["scope"] or "")
    if given.action == "reset" and not (selection.collector and selection.scope):
        print("blueking-exporter: state reset needs --collector and --scope", file=sys.stderr)
        return 2
    loaded = _load(given)
    _configure_log(loaded)
    asyncio.run(run(given.action, loaded.config, selection, sys.stdin.buffer, print))
    return 0


def _simulate(given: Given) -> int:
    from exporter.simulator.server import run

    work = run(
        given["listen-address"],
        seed=given["seed"],
        scopes=given["scopes"],
        speed=given["speed"],
        fault_list=given["faults"],
        say=_say,
    )
    return _simulated(work)


def _demo(given: Given) -> int:
    from exporter.demo import demo

    return _simulated(demo(given.overrides(), seed=given["seed"], say=_say))


def _healthcheck(given: Given) -> int:
    from exporter.healthcheck import healthcheck

    addresses = given.environ.get(f"{ENVIRONMENT}WEB_LISTEN_ADDRESS", "").split(",")
    url = given["url"] or addresses[0].strip() or "127.0.0.1:10071"
    url = f"127.0.0.1{url}" if url.startswith(":") else url
    problem = healthcheck(url, given["web.config.file"], given.environ)
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


def _schema(given: Given) -> int:
    import json

    from exporter.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _metrics(given: Given) -> int:
    from exporter.reference import reference

    sys.stdout.write(reference(given["lang"]))
    return 0


class Command(NamedTuple):
    """One sub-command: `run` gets the values of `flags` and returns the exit code. `actions`: what follows its name."""

    name: str
    help: str
    run: Callable[[Given], int]
    flags: tuple[Flag, ...] = ()
    actions: tuple[str, ...] = ()


COMMANDS = (
    Command("run", "run the daemon (the default)", _run, (*CONFIG, *WEB, *SYSTEMD, *STATE, *LOG)),
    Command("check", "validate the configuration, without any network", _check, (*CONFIG, *WEB, *STATE, *LOG)),
    Command("probe", "ask each scope and collector once: reachable, permitted, cost", _probe, (*CONFIG, *LOG)),
    Command(
        "verify", "poll for a time, read the same again, and name every difference", _verify,
        (*CONFIG, *WINDOW, *LOG),
    ),
    Command(
        "once", "one complete poll of everything, as text exposition", _once, (*CONFIG, *OUTPUT, *STATE, *LOG),
    ),
    Command(
        "state", "list, show, export, import or reset what has been counted", _state,
        (*CONFIG, *KEY, *STATE, *LOG), ("list", "show", "export", "import", "reset"),
    ),
    Command("simulate", "run a simulated BlueKing platform", _simulate, SIMULATOR),
    Command("demo", "simulator and daemon in one command, over real HTTP", _demo, (*SEED, *WEB, *LOG)),
    Command("healthcheck", "exit 0 if /-/ready answers 200", _healthcheck, HEALTH),
    Command("schema", "JSON Schema of the configuration", _schema),
    Command("metrics", "the metric reference as Markdown", _metrics, LANGUAGE),
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    version = f"blueking-exporter {__version__}"
    parser = argparse.ArgumentParser(
        prog="blueking-exporter",
        usage="blueking-exporter [COMMAND] [FLAG ...]",
        description="Prometheus exporter for Tencent BlueKing: JOB and NodeMan, counted exactly once.",
        epilog="Every flag has an environment variable: --web.listen-address is BLUEKING_EXPORTER_WEB_LISTEN_ADDRESS.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(prog="blueking-exporter", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.help, description=command.help, allow_abbrev=False)
        sub.set_defaults(command=command)
        if command.name == "run":
            sub.add_argument("--version", action="version", version=version)
            # For the help: without a command, they are parsed as those of `run`.
            shown = parser.add_argument_group("flags of run")
            for flag in command.flags:
                flag.add_to(shown)
        if command.actions:
            sub.add_argument("action", choices=command.actions)
        for flag in command.flags:
            flag.add_to(sub)
    return parser


# Helpers of the commands


async def _print(lines: AsyncIterator[tuple[str, bool]]) -> bool:
    """Print each line as soon as it is known. Whether all of them report a success."""
    fine = True
    async for line, good in lines:
        _say(line)
        fine &= good
    return fine


def _say(line: str) -> None:
    print(line, flush=True)


def _load(given: Given) -> Loaded:
    from exporter.config.load import load
    from exporter.config.state_url import RedisUrl
    from exporter.errors import ConfigError, Problem

    problems: list[Problem] = []
    try:
        _shard(given)
    except ConfigError as error:
        problems += error.problems
    try:
        loaded = load(given["config.file"], given.overrides(), given.environ)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if isinstance(loaded.config.state.url, RedisUrl):
        problems += [
            Problem(f"--{name}", 0, 0, "", "replicas on Redis share the scopes by themselves: leave it out")
            for name in ("shard", "total-shards")
            if given[name] is not None
        ]
    if problems:
        raise ConfigError(problems)
    return loaded


def _shard(given: Given) -> Shard:
    from exporter.shard import Shard, read_shard

    return read_shard(given["shard"], given["total-shards"], given.environ) or Shard()


def _configure_log(loaded: Loaded) -> None:
    from exporter import log

    log.configure(loaded.config.log.level, loaded.config.log.format)


def _start(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end. An error that a task group has wrapped in a group is raised by itself."""
    import asyncio

    from exporter import log
    from exporter.errors import ExporterError

    sys.excepthook = log.on_exception
    try:
        asyncio.run(work)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, ExporterError):
            raise error from None
        log.get().error("stopped_by_error", exc_info=error)
        raise ExporterError(f"{type(error).__name__}: {error}") from error
    finally:
        log.flush()


def _simulated(work: Coroutine[Any, Any, None]) -> int:
    import asyncio
    import signal

    from exporter.errors import ExporterError

    async def until_signal() -> None:
        task = asyncio.ensure_future(work)
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    try:
        _start(until_signal())
    except OSError as error:
        raise ExporterError(str(error)) from error
    return 0
