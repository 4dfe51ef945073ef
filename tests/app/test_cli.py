"""The command line: flags, variables, exit codes, and what each command prints."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exporter import __version__
from exporter.cli import COMMANDS, execute
from tests.support.components import free_port
from tests.support.process import PROGRAM, Daemon, Simulated, command, configuration, environment

NAMES = [each.name for each in COMMANDS]
FLAGS = {flag.name: flag for each in COMMANDS for flag in each.flags}


def write(folder: Path, config: dict[str, Any]) -> Path:
    file = folder / "config.yaml"
    file.write_text(json.dumps(config, indent=1))
    return file


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    """A valid configuration; no server listens at its addresses."""
    return write(tmp_path, configuration("http://127.0.0.1:1"))


def outcome(arguments: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of one command in this process."""
    try:
        code = execute(arguments, environ)
    except SystemExit as ended:
        code = int(ended.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("name", ["", *NAMES])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help ends with 0 and says how the command is used."""
    code, out, err = outcome([*filter(None, [name]), "--help"], {}, capsys)
    assert (code, err) == (0, "")
    assert f"usage: blueking-exporter {name}".rstrip() in out
    if not name:
        assert [each for each in NAMES if not re.search(rf"^    {each}\b", out, re.M)] == []


@pytest.mark.parametrize("arguments", [["--version"], ["run", "--version"]])
def test_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints name and version, with and without the default sub-command."""
    assert outcome(arguments, {}, capsys) == (0, f"blueking-exporter {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-flag"],
        ["run", "--web.listen-adress=:1"],
        ["check", "--output=x"],
        ["run", "--web.listen=:1"],
        ["nonsense"],
        ["run", "nonsense"],
        ["metrics", "--lang=fr"],
        ["simulate", "--seed=x"],
        ["simulate", "--speed=0"],
        ["simulate", "--speed=nan"],
        ["simulate", "--scopes=0"],
        ["simulate", "--faults=blackhole:2"],
        ["simulate", "--faults=nonsense"],
        ["simulate", "--listen-address=nowhere"],
        ["simulate", "--listen-address=127.0.0.1:70000"],
        ["once", "--output"],
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown flags and commands, abbreviations and wrong values: usage on standard error, exit 2."""
    code, out, err = outcome(arguments, {}, capsys)
    assert (code, out) == (2, "")
    assert "usage: blueking-exporter" in err


def test_check_accepts(valid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A valid file: exit 0, without any network."""
    code, out, err = outcome(["check", f"--config.file={valid}"], {}, capsys)
    assert (code, err) == (0, "")
    assert "valid, 1 scopes" in out


def test_check_takes_the_file_from_the_environment(valid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BLUEKING_EXPORTER_CONFIG_FILE stands for --config.file."""
    assert outcome(["check"], {"BLUEKING_EXPORTER_CONFIG_FILE": str(valid)}, capsys)[0] == 0


def test_check_prints_every_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All problems of the file and of the flags, one line each with its place, exit 2."""
    config = configuration("http://127.0.0.1:1", stale_afterr=5, max_series="many", log={"level": "loud"})
    file = write(tmp_path, config)
    code, out, err = outcome(
        ["check", f"--config.file={file}", "--log.format=xml", "--state.url=redis://x:y", "--shard=0"], {}, capsys
    )
    lines = err.splitlines()
    assert (code, out) == (2, "")
    for place in ("stale_afterr", "max_series", "log.level"):
        assert [line for line in lines if re.fullmatch(rf"{re.escape(str(file))}:\d+:\d+: {place}: .+", line)], place
    assert any('did you mean "stale_after"?' in line for line in lines)
    for source in ("--log.format", "--state.url", "--shard"):
        assert [line for line in lines if line.startswith(f"{source}: ")], source
    assert len(lines) == 6


def test_check_warns_and_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More polls than the budget allows, and a glob without a file: warnings, exit 0."""
    config = configuration(
        "http://127.0.0.1:1", blueking={"requests_per_second": 1}, scope_files=["nothing-*.yaml"],
        collectors={"job": {"interval": "100ms"}},
    )  # fmt: skip
    code, _, err = outcome(["check", f"--config.file={write(tmp_path, config)}"], {}, capsys)
    assert code == 0
    assert re.search(r"warning: .*requests_per_second", err)
    assert re.search(r"warning: .*scope_files\[0\]: matches no file", err)


def test_check_reads_the_web_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad web configuration file is an error of the configuration."""
    web = tmp_path / "web.yaml"
    web.write_text("basic_auth_users: {ann: no-hash}\n")
    file = write(tmp_path, configuration("http://127.0.0.1:1"))
    code, _, err = outcome(["check", f"--config.file={file}", f"--web.config.file={web}"], {}, capsys)
    assert code == 2
    assert f"{web}:1:" in err


@pytest.mark.parametrize("command_name", ["run", "check", "probe", "once"])
def test_a_missing_file_ends_with_2(command_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No configuration file: one line that names it."""
    missing = tmp_path / "none.yaml"
    code, _, err = outcome([command_name, f"--config.file={missing}"], {}, capsys)
    assert code == 2
    assert err.startswith(f"{missing}:1:1: cannot be read")


WRONG = {
    "web.listen-address": "nowhere",
    "web.config.file": "/no/such/file",
    "web.telemetry-path": "metrics",
    "state.url": "postgres:x",
    "log.level": "loud",
    "log.format": "xml",
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_flag_and_a_wrong_variable_are_named(
    flag: str, valid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the flag or the variable, whichever was given; the flag wins over the variable."""
    variable = "BLUEKING_EXPORTER_" + flag.upper().replace(".", "_").replace("-", "_")
    check = ["check", f"--config.file={valid}"]
    code, _, err = outcome([*check, f"--{flag}={WRONG[flag]}"], {}, capsys)
    assert (code, err.startswith(f"--{flag}: ") or WRONG[flag] in err) == (2, True)
    code, _, err = outcome(check, {variable: WRONG[flag]}, capsys)
    assert (code, err.startswith(f"{variable}: ") or WRONG[flag] in err) == (2, True)
    fine = {"web.listen-address": ":0", "web.telemetry-path": "/m", "state.url": "memory:", "log.level": "info"}
    if flag in fine:
        assert outcome([*check, f"--{flag}={fine[flag]}"], {variable: WRONG[flag]}, capsys)[0] == 0


RUN_FLAGS = (
    "config.file", "web.listen-address", "web.config.file", "web.telemetry-path", "web.enable-lifecycle",
    "web.systemd-socket", "state.url", "log.level", "log.format", "version",
)  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["-h"]])
def test_the_help_lists_the_flags_of_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The flags of the reference, no fewer; without a command too, since `run` is the default."""
    _, out, _ = outcome(arguments, {}, capsys)
    for flag in RUN_FLAGS:
        assert re.search(rf"^  --{re.escape(flag)}\b", out, re.M), flag


@pytest.mark.parametrize("name", ["WEB_ENABLE_LIFECYCLE", "WEB_SYSTEMD_SOCKET"])
@pytest.mark.parametrize("value", ["yes please", "2"])
def test_a_wrong_switch_in_the_environment_is_refused(
    name: str, value: str, valid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is neither true nor false is an error, not silently off."""
    variable = f"BLUEKING_EXPORTER_{name}"
    code, _, err = outcome(["run", f"--config.file={valid}"], {variable: value}, capsys)
    assert (code, err) == (2, f'{variable}: want true or false, not "{value}"\n')


def test_an_empty_variable_is_not_set(valid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Compose and systemd pass on what nobody has set."""
    environ = {f"BLUEKING_EXPORTER_{name}": "" for name in ("STATE_URL", "WEB_LISTEN_ADDRESS", "WEB_ENABLE_LIFECYCLE")}
    assert outcome(["check", f"--config.file={valid}"], environ, capsys)[0] == 0


def test_schema_describes_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """`schema` prints a valid JSON Schema that knows wrong keys."""
    code, out, _ = outcome(["schema"], {}, capsys)
    assert code == 0
    schema = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(configuration("http://127.0.0.1:1")))
    assert list(validator.iter_errors(configuration("http://127.0.0.1:1", nonsense=1)))


def test_run_takes_flags_and_variables_before_the_file(tmp_path: Path, simulated: Simulated) -> None:
    """Flag over environment over file, `run` by default, several addresses by flag and by a variable with commas."""
    ports = [free_port() for _ in range(3)]
    config = configuration(
        simulated.url, server={"listen_address": [f"127.0.0.1:{free_port()}"], "telemetry_path": "/file"}
    )
    environ = {
        "BLUEKING_EXPORTER_WEB_LISTEN_ADDRESS": f"127.0.0.1:{ports[0]}, 127.0.0.1:{ports[1]}",
        "BLUEKING_EXPORTER_WEB_TELEMETRY_PATH": "/environment",
        "BLUEKING_EXPORTER_LOG_FORMAT": "console",
        "BLUEKING_EXPORTER_WEB_ENABLE_LIFECYCLE": "true",
        "BLUEKING_EXPORTER_STATE_URL": "memory:",
    }
    flags = ["--log.format=logfmt", "--web.telemetry-path=/flag"]
    daemon = Daemon(tmp_path, config, *flags, environ=environ)
    with daemon:
        for port in ports[:2]:
            daemon.url = f"http://127.0.0.1:{port}"
            assert daemon.get("/flag")[0] == 200
        assert daemon.get("/environment")[0] == daemon.get("/file")[0] == 404
        assert daemon.get("/-/reload", data=b"")[0] == 200
        assert f" addresses=http://127.0.0.1:{ports[0]},http://127.0.0.1:{ports[1]} " in daemon.log
        assert daemon.stop() == 0
    assert not (tmp_path / "state.db").exists()


def test_run_refuses_a_bad_web_configuration_before_anything_else(tmp_path: Path) -> None:
    """Exit 2 with the place of the mistake, and no state has been touched."""
    (tmp_path / "web.yaml").write_text("basic_auth_users: {ann: no-hash}\n")
    config = configuration("http://127.0.0.1:1", server={"web_config_file": "web.yaml"})
    done = command("run", f"--config.file={write(tmp_path, config)}")
    assert done.returncode == 2
    assert f"{tmp_path / 'web.yaml'}:1:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "state.db").exists()


def test_an_unreadable_secret_file_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A secret that cannot be read is an error of the configuration, at its place."""
    config = configuration("http://127.0.0.1:1")
    config["blueking"]["auth"] = {"app_code": "exporter", "app_secret_file": "/no/such/secret"}
    code, _, err = outcome(["run", f"--config.file={write(tmp_path, config)}"], {}, capsys)
    assert code == 2
    assert "blueking.auth.app_secret_file: " in err


def test_a_port_that_is_taken_ends_with_1(tmp_path: Path, simulated: Simulated) -> None:
    """Failed, not misconfigured: one line that names the address, no traceback."""
    port = simulated.url.rpartition(":")[2]
    file = write(tmp_path, configuration(simulated.url))
    done = command(f"--config.file={file}", f"--web.listen-address=127.0.0.1:{port}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"blueking-exporter: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`blueking-exporter metrics | head -1` ends quietly."""
    with subprocess.Popen([*PROGRAM, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as p:
        assert p.stdout is not None
        assert p.stderr is not None
        p.stdout.close()
        assert (p.wait(10), p.stderr.read()) == (0, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(valid: Path, closed: str) -> None:
    """A command whose standard streams are closed does its work and says nothing."""
    for arguments, code in (("metrics", 0), (f"check --config.file={valid}", 0), ("check --config.file=/none", 2)):
        program = " ".join(map(shlex.quote, PROGRAM))
        done = subprocess.run(
            ["sh", "-c", f"{program} {arguments} {closed}"], capture_output=True, env=environment(), check=False
        )
        assert (done.returncode, b"Traceback" in done.stdout + done.stderr) == (code, False), arguments


def test_flags_without_a_dot_have_variables_too(tmp_path: Path) -> None:
    """`once --output`, `metrics --lang`, `healthcheck --url`; what the flag says wins, and a bad value is refused."""
    chinese = command("metrics", environ={"BLUEKING_EXPORTER_LANG": "zh"})
    assert chinese.stdout.startswith("# blueking-exporter 指标参考")
    assert command("metrics", "--lang=en", environ={"BLUEKING_EXPORTER_LANG": "zh"}).stdout.startswith("# Metrics")
    refused = command("metrics", environ={"BLUEKING_EXPORTER_LANG": "xx"})
    assert refused.returncode == 2
    assert refused.stderr == 'BLUEKING_EXPORTER_LANG: want en or zh, not "xx"\n'
    unreachable = command("healthcheck", environ={"BLUEKING_EXPORTER_URL": "http://u:pass-word@127.0.0.1:9/"})
    assert unreachable.returncode == 1
    assert "127.0.0.1:9" in unreachable.stderr
    assert "pass-word" not in unreachable.stderr


def test_one_dash_is_enough() -> None:
    """As everywhere at Prometheus; `-h` is still the help."""
    assert command("-version").stdout == command("--version").stdout
    assert command("metrics", "-lang=zh").stdout == command("metrics", "--lang=zh").stdout
    assert command("-h").returncode == 0


ENCODINGS = ("latin-1", "ascii", "gbk", "utf-8")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("arguments", [["metrics", "--lang=zh"], ["schema"], ["--help"], ["metrics", "--lang=法"]])
def test_F75_documents_in_any_encoding(arguments: list[str], encoding: str) -> None:
    """Characters that the stream does not have are escaped; nothing fails, nothing is left out."""
    done, whole = encoded(encoding, *arguments), in_utf8(*arguments)
    assert done.returncode == whole.returncode == (2 if "--lang=法" in arguments else 0)
    for printed, wanted in ((done.stdout, whole.stdout), (done.stderr, whole.stderr)):
        assert escaped(printed.decode(encoding)) == escaped(wanted.decode())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_F75_reports_in_any_encoding(tmp_path: Path, simulated: Simulated, encoding: str) -> None:
    """`check`, `probe` and `once` with Chinese names, messages and paths: exit codes as before, no traceback."""
    folder = tmp_path / "配置é"
    folder.mkdir()
    config = configuration(simulated.url, collectors={"job": {"watch": [{"name": "每日备份-*"}]}})
    file = write(folder, config)
    for name, code in (("check", 0), ("probe", 0), ("once", 0)):
        done = encoded(encoding, name, f"--config.file={file}")
        assert (done.returncode, b"Traceback" in done.stderr) == (code, False), done.stderr
    simulated.fault("permission")
    file = write(folder, configuration(simulated.url) | {"出错": 1})
    for name in ("check", "probe", "once", "run"):
        done = encoded(encoding, name, f"--config.file={file}")
        assert (done.returncode, b"Traceback" in done.stderr) == (2, False)
        assert "\\u51fa\\u9519" in escaped(done.stderr.decode(encoding))
    file = write(folder, configuration(simulated.url))
    done = encoded(encoding, "probe", f"--config.file={file}")
    assert (done.returncode, done.stderr) == (1, b"")
    assert done.stdout.startswith(b"FAIL  ")


@pytest.mark.parametrize(
    ("form", "encoding"),
    [*(("json", encoding) for encoding in ENCODINGS), ("logfmt", "gbk"), ("logfmt", "ascii"), ("console", "latin-1")],
)
def test_F75_the_log_in_any_encoding(tmp_path: Path, simulated: Simulated, form: str, encoding: str) -> None:
    """Characters of any plane in a log line: the line is whole, and one in JSON is JSON."""
    folder = tmp_path / "配置é𝄞"
    folder.mkdir()
    taken = simulated.url.removeprefix("http://")  # so that it ends by itself
    config = configuration(simulated.url, scope_files=["none-*.yaml"], server={"listen_address": [taken]})
    done = encoded(encoding, "run", f"--config.file={write(folder, config)}", f"--log.format={form}")
    text = done.stderr.decode(encoding)
    assert (done.returncode, "Traceback" in text) == (1, False)
    (line,) = [line for line in text.splitlines() if "config_warning" in line]
    if form == "json":
        assert str(folder) in json.loads(line)["message"]
    else:
        assert escaped("配置") in escaped(line)


def encoded(encoding: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command whose standard streams have this encoding, as a locale gives it."""
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, timeout=60, check=False,
        env=environment() | {"PYTHONIOENCODING": encoding}, **options,
    )  # fmt: skip


@functools.cache
def in_utf8(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return encoded("utf-8", *arguments)


def escaped(text: str) -> str:
    """The text in ASCII, with the codes of all other characters."""
    return text.encode("ascii", "backslashreplace").decode()
