"""`healthcheck`: exit 0 if /-/ready answers 200, whatever the port speaks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import bcrypt
import pytest
from cryptography import x509

from exporter.cli import execute
from tests.support.certificates import Authority
from tests.support.components import eventually, free_port
from tests.support.process import Daemon, Simulated, configuration

USER = "BLUEKING_EXPORTER_HEALTHCHECK_AUTH"


def check(*arguments: str, **environ: str) -> int:
    return execute(["healthcheck", *arguments], environ)


def test_ready_is_0_and_not_ready_is_1(
    tmp_path: Path, simulated: Simulated, capsys: pytest.CaptureFixture[str]
) -> None:
    """By address, by page and by the listen address of the environment; 503 and silence are 1 with a reason."""
    simulated.fault("blackhole", times=1)
    with Daemon(tmp_path, configuration(simulated.url)) as daemon:
        address = daemon.url.removeprefix("http://")
        assert check(f"--url={address}") == 1
        assert "answers 503" in capsys.readouterr().err
        daemon.wait_ready()
        port = address.rpartition(":")[2]
        assert check(f"--url={address}") == 0
        assert check(f"--url={daemon.url}") == 0
        assert check(f"--url={daemon.url}/-/healthy") == 0
        assert check(f"--url=:{port}") == 0
        assert check(BLUEKING_EXPORTER_WEB_LISTEN_ADDRESS=f"0.0.0.0:{port}, 127.0.0.1:1") == 0
        assert check(f"--url={daemon.url}/nothing") == 1
        assert "answers 404" in capsys.readouterr().err
    assert check(f"--url=127.0.0.1:{free_port()}") == 1
    assert "Connection refused" in capsys.readouterr().err


def test_F56_a_pipe_as_web_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not read, so the command ends."""
    web = tmp_path / "web.yaml"
    os.mkfifo(web)
    assert check(f"--url=127.0.0.1:{free_port()}", f"--web.config.file={web}") == 2
    assert "cannot be read: is no regular file" in capsys.readouterr().err


def test_tls_and_a_password(tmp_path: Path, simulated: Simulated, capsys: pytest.CaptureFixture[str]) -> None:
    """--web.config.file tells that the port speaks TLS; user and password come from the environment."""
    # Made for another name than the loopback address, as in production.
    Authority(tmp_path).issue("server", [x509.DNSName("exporter.example.com")])
    hashed = bcrypt.hashpw(b"secret-password", bcrypt.gensalt(4)).decode()
    web = tmp_path / "web.yaml"
    tls = {"cert_file": "server.crt", "key_file": "server.key"}
    web.write_text(json.dumps({"tls_server_config": tls, "basic_auth_users": {"ann": hashed}}))
    with Daemon(tmp_path, configuration(simulated.url), f"--web.config.file={web}") as daemon:
        assert daemon.url.startswith("https://")
        address = daemon.url.removeprefix("https://")
        file = f"--web.config.file={web}"
        good = {USER: "ann:secret-password"}
        eventually(lambda: check(f"--url={address}", file, **good) == 0, 10)
        assert check(f"--url={address}", BLUEKING_EXPORTER_WEB_CONFIG_FILE=str(web), **good) == 0
        assert check(f"--url={daemon.url}", **good) == 0
        capsys.readouterr()
        assert check(f"--url={address}", file) == 1
        assert "answers 401" in capsys.readouterr().err
        assert check(f"--url={address}", file, **{USER: "ann:wrong"}) == 1
        assert check(f"--url={address}", **good) == 1, "plain HTTP to a TLS port"
        assert "secret-password" not in capsys.readouterr().err
