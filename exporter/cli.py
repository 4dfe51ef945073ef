"""The command line: sub-commands, flags, exit codes.

Exit codes: 0 asked to stop, 1 failed, 2 bad arguments or configuration. What a sub-command does not need is not
imported.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from exporter import __version__

if TYPE_CHECKING:
    from exporter.config.load import Loaded, Override

ENVIRONMENT = "BLUEKING_EXPORTER_"

OVERRIDES = {
    "web.listen-address": "server.listen_address",
    "web.config.file": "server.web_config_file",
    "web.telemetry-path": "server.telemetry_path",
    "web.enable-lifecycle": "server.enable_lifecycle",
    "state.url": "state.url",
    "log.level": "log.level",
    "log.format": "log.format",
}
"""Flags that say the same as a key of the configuration file, and win over it."""

SWITCHES = ("web.enable-lifecycle", "web.systemd-socket")
"""Flags without a value; their variables say true or false."""

RESERVED = ("shard", "total-shards")
"""Flags of the scale-out step; until it is there they are refused rather than ignored."""

Environ = Mapping[str, str]


def main(arguments: Sequence[str] | None = None, environ: Environ = os.environ) -> NoReturn:
    """Run one command and end the process with its exit code."""
    try:
        code = execute(list(sys.argv[1:] if arguments is None else arguments), environ)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        code = 0
    sys.exit(code)


def execute(arguments: list[str], environ: Environ) -> int:
    """Run one command and return its exit code."""
    # Prometheus takes its flags with one dash too.
    arguments = [f"-{one}" if one[:1] == "-" and one[1:3].isalpha() and len(one) > 2 else one for one in arguments]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["run", *arguments]
    parser, commands = _parser()
    if arguments[0] in commands:
        arguments[1:1] = _given_by_environment(commands[arguments[0]], environ)
    flags = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace, Environ], int] = flags.command
    from exporter.errors import ConfigError, ExporterError

    try:
        return command(flags, environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ExporterError as error:
        print(f"blueking-exporter: {error}", file=sys.stderr)
        return 1


# Sub-commands


def _run(flags: argparse.Namespace, environ: Environ) -> int:
    # What is imported stays: looking for garbage in it would delay the start, and later every full collection.
    gc.disable()
    from exporter import log
    from exporter.app import run
    from exporter.reload import Options

    overrides = _overrides(flags, environ)
    loaded = _load(flags, environ, overrides)
    gc.freeze()
    gc.enable()
    log.configure(loaded.config.log.level, loaded.config.log.format)  # type: ignore[arg-type]
    _warn(loaded)
    socket = bool(_value(flags, environ, "web.systemd-socket"))
    _start(run(Options(_config_file(flags, environ), overrides, systemd_socket=socket), loaded))
    return 0


def _check(flags: argparse.Namespace, environ: Environ) -> int:
    loaded = _load(flags, environ, _overrides(flags, environ))
    if loaded.config.server.web_config_file:
        from exporter.web.security import WebConfig

        WebConfig(loaded.config.server.web_config_file)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{_config_file(flags, environ)}: valid, {len(loaded.config.scopes)} scopes")
    return 0


def _probe(flags: argparse.Namespace, environ: Environ) -> int:
    from exporter import log
    from exporter.probe import report

    loaded = _load(flags, environ, _overrides(flags, environ))
    log.configure("error", loaded.config.log.format)  # type: ignore[arg-type]

    async def probe() -> bool:
        fine = True
        async for line, good in report(loaded.config):
            print(line, flush=True)
            fine &= good
        return fine

    return 0 if asyncio.run(probe()) else 1


def _once(flags: argparse.Namespace, environ: Environ) -> int:
    from exporter import log
    from exporter.errors import ExporterError
    from exporter.once import once, write_atomically

    loaded = _load(flags, environ, _overrides(flags, environ))
    log.configure(loaded.config.log.level, loaded.config.log.format)  # type: ignore[arg-type]
    body, complete = asyncio.run(once(loaded.config))
    if flags.output is None:
        sys.stdout.buffer.write(body)
    else:
        try:
            write_atomically(flags.output, body)
        except OSError as error:
            raise ExporterError(f"cannot write {flags.output}: {error.strerror}") from error
    return 0 if complete else 1


def _simulate(flags: argparse.Namespace, environ: Environ) -> int:
    from exporter.simulator.server import run

    work = run(
        flags.listen_address,
        seed=flags.seed,
        scopes=flags.scopes,
        speed=flags.speed,
        fault_list=flags.faults,
        say=lambda line: print(line, flush=True),
    )
    return _simulated(work)


def _demo(flags: argparse.Namespace, environ: Environ) -> int:
    from exporter.demo import demo

    overrides = _overrides(flags, environ)
    return _simulated(demo(overrides, seed=flags.seed, say=lambda line: print(line, flush=True)))


def _healthcheck(flags: argparse.Namespace, environ: Environ) -> int:
    from exporter.healthcheck import healthcheck

    file = _value(flags, environ, "web.config.file")
    addresses = environ.get(f"{ENVIRONMENT}WEB_LISTEN_ADDRESS", "").split(",")
    url = flags.url or addresses[0].strip() or "127.0.0.1:10071"
    problem = healthcheck(f"127.0.0.1{url}" if url.startswith(":") else url, Path(file) if file else None, environ)
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


def _schema(flags: argparse.Namespace, environ: Environ) -> int:
    import json

    from exporter.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0


def _metrics(flags: argparse.Namespace, environ: Environ) -> int:
    from exporter.reference import reference

    sys.stdout.write(reference(flags.lang))
    return 0


# Helpers of the sub-commands


def _start(work) -> None:  # type: ignore[no-untyped-def]
    """Run to the end; an error that a task group has wrapped comes out as itself."""
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


def _simulated(work) -> int:  # type: ignore[no-untyped-def]
    from exporter.errors import ExporterError

    async def until_signal() -> None:
        task = asyncio.ensure_future(work)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    try:
        _start(until_signal())
    except OSError as error:
        raise ExporterError(str(error)) from error
    return 0


def _load(flags: argparse.Namespace, environ: Environ, overrides: Mapping[str, Override]) -> Loaded:
    from exporter.config.load import load
    from exporter.errors import ConfigError, Problem

    reserved = [
        Problem(_flag(name), 0, 0, "", "is reserved for the scale-out step and has no effect yet: leave it out")
        for name in RESERVED
        if _value(flags, environ, name) is not None
    ]
    try:
        loaded = load(_config_file(flags, environ), overrides, environ)
    except ConfigError as error:
        raise ConfigError([*reserved, *error.problems]) from None
    if reserved:
        raise ConfigError(reserved)
    return loaded


def _config_file(flags: argparse.Namespace, environ: Environ) -> Path:
    return Path(str(_value(flags, environ, "config.file") or "config.yaml"))


def _overrides(flags: argparse.Namespace, environ: Environ) -> dict[str, Override]:
    from exporter.config.load import Override

    found: dict[str, Override] = {}
    for name, path in OVERRIDES.items():
        value = _value(flags, environ, name)
        if value is not None:
            given = getattr(flags, _attribute(name), None) is not None
            found[path] = Override(value, _flag(name) if given else _variable(name))
    return found


def _value(flags: argparse.Namespace, environ: Environ, name: str):  # type: ignore[no-untyped-def]
    """What the flag says, else the environment, else None; an empty variable counts as not set. A repeatable flag is a
    tuple, comma-separated in a variable."""
    value = getattr(flags, _attribute(name), None)
    if value is not None:
        return tuple(value) if isinstance(value, list) else value
    text = environ.get(_variable(name), "").strip()
    if not text:
        return None
    if name == "web.listen-address":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name in SWITCHES:
        return _switch(name, text)
    return text


def _switch(name: str, text: str) -> bool:
    from exporter.errors import ConfigError, Problem

    try:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    except KeyError:
        raise ConfigError([Problem(_variable(name), 0, 0, "", f'want true or false, not "{text}"')]) from None


def _warn(loaded: Loaded) -> None:
    from exporter import log

    for warning in loaded.warnings:
        log.get().warning("config_warning", field=warning.path, message=str(warning))


def _flag(name: str) -> str:
    return f"--{name}"


def _attribute(name: str) -> str:
    return name.replace(".", "_").replace("-", "_")


def _variable(name: str) -> str:
    return ENVIRONMENT + _attribute(name).upper()


# Flags


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="blueking-exporter",
        description="Prometheus exporter for Tencent BlueKing: JOB and NodeMan, counted exactly once.",
        epilog="Every flag has an environment variable: --web.listen-address is BLUEKING_EXPORTER_WEB_LISTEN_ADDRESS.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"blueking-exporter {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace, Environ], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=run)
        return sub

    run = command("run", _run, "run the daemon (the default)")
    run.add_argument("--version", action="version", version=f"blueking-exporter {__version__}")
    _config_flags(run)
    _web_flags(run)
    run.add_argument(
        "--web.systemd-socket", action="store_true", default=None, help="take the sockets that systemd opened"
    )
    _state_flags(run)
    _log_flags(run)

    check = command("check", _check, "validate the configuration, without any network")
    _config_flags(check)
    _web_flags(check)
    _state_flags(check)
    _log_flags(check)

    probe = command("probe", _probe, "ask each scope and collector once: reachable, permitted, cost")
    _config_flags(probe)
    _log_flags(probe)

    once = command("once", _once, "one complete poll of everything, as text exposition")
    _config_flags(once)
    once.add_argument(
        "--output", type=Path, metavar="FILE.prom", help="file to replace atomically; default: standard output"
    )
    _state_flags(once)
    _log_flags(once)

    simulate = command("simulate", _simulate, "a BlueKing platform made of thin air")
    simulate.add_argument("--listen-address", type=_address, default="127.0.0.1:10072", metavar="HOST:PORT")
    simulate.add_argument("--seed", type=int, default=1, metavar="N", help="the same seed gives the same world")
    simulate.add_argument("--scopes", type=_count, default=3, metavar="N")
    simulate.add_argument(
        "--speed", type=_speed, default=1.0, metavar="X", help="how much faster than life things happen"
    )
    simulate.add_argument(
        "--faults", type=_faults, default="", metavar="LIST", help="name[:probability][@api], comma-separated"
    )

    demo = command("demo", _demo, "simulator and daemon in one command, over real HTTP")
    demo.add_argument("--seed", type=int, default=1, metavar="N")
    _web_flags(demo)
    _log_flags(demo)

    healthcheck = command("healthcheck", _healthcheck, "exit 0 if /-/ready answers 200")
    healthcheck.add_argument(
        "--url", metavar="URL", help="address or page; default: the first listen address of the environment"
    )
    healthcheck.add_argument("--web.config.file", metavar="FILE", help="tells whether the port speaks TLS")

    command("schema", _schema, "JSON Schema of the configuration")
    metrics = command("metrics", _metrics, "the metric reference as Markdown")
    metrics.add_argument("--lang", choices=("en", "zh"), default="en")
    for sub in commands.choices.values():
        _accept_dotted(sub)
    return parser, commands.choices


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f'want HOST:PORT, not "{text}"')
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f'want a number from 1 to 100000, not "{text}"')
    return int(text)


def _speed(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.001 <= float(text) <= 1000:
            return float(text)
    raise argparse.ArgumentTypeError(f'want a number from 0.001 to 1000, not "{text}"')


def _faults(text: str) -> str:
    from exporter.simulator.faults import parse_faults

    try:
        parse_faults(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _given_by_environment(parser: argparse.ArgumentParser, environ: Environ) -> list[str]:
    """The flags of a sub-command that its own options take from the environment; those with a dot are `_value`'s."""
    given = []
    for action in parser._actions:
        name = action.option_strings[-1].removeprefix("--") if action.option_strings else ""
        if action.nargs is None and "." not in name and environ.get(_variable(name)):
            given.append(f"--{name}={environ[_variable(name)]}")
    return given


def _accept_dotted(parser: argparse.ArgumentParser) -> None:
    """Dotted flags become attributes that Python can name."""
    for action in parser._actions:
        action.dest = _attribute(action.dest)


def _config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config.file", metavar="FILE", help="configuration file (default: config.yaml)")


def _web_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--web.listen-address", action="append", metavar="HOST:PORT", help="may be repeated")
    parser.add_argument("--web.config.file", metavar="FILE", help="web configuration file of exporter-toolkit")
    parser.add_argument("--web.telemetry-path", metavar="PATH", help="path of the metrics (default: /metrics)")
    parser.add_argument("--web.enable-lifecycle", action="store_true", default=None, help="allow POST /-/reload")


def _state_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state.url", metavar="URL", help="sqlite:PATH or memory:")
    parser.add_argument("--shard", metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--total-shards", metavar="M", help=argparse.SUPPRESS)


def _log_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log.level", metavar="LEVEL", help="debug, info, warning or error")
    parser.add_argument("--log.format", metavar="FORMAT", help="logfmt, json or console")
