"""The configuration while the daemon runs: reload on request, follow scope files and secrets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from exporter import log, systemd
from exporter.clock import Clock
from exporter.config.load import Loaded, Override, load
from exporter.config.schema import Config
from exporter.errors import ConfigError, StateError
from exporter.fleet import Fleet
from exporter.shard import Shard
from exporter.telemetry import Telemetry
from exporter.web.security import WebConfig

CHECK_FILES = 3.0
"""Seconds between two checks of scope files, secrets and TLS files. A changed scope file is read when two checks in a
row find the same version."""
SETTLE = 1.0
"""Seconds between the two checks of a reload."""
SECRETS = "secret files"
TLS_FILES = "TLS files"


class Options(msgspec.Struct, frozen=True):
    """What the command line says beyond the configuration."""

    config_file: Path
    overrides: Mapping[str, Override] = {}
    shard: Shard = Shard()
    systemd_socket: bool = False


class Configuration:
    """The configuration in use. `requested` asks for a reload, as SIGHUP does; several requests are one."""

    def __init__(
        self, options: Options, loaded: Loaded, fleet: Fleet, web: WebConfig, telemetry: Telemetry, clock: Clock
    ) -> None:
        self.loaded = loaded
        self.requested = asyncio.Event()
        self._options = options
        self._fleet = fleet
        self._web = web
        self._telemetry = telemetry
        self._clock = clock
        self._lock = asyncio.Lock()
        self._broken: set[str] = set()
        telemetry.config_loaded(loaded.config.sha256, clock.wall())
        self._log_warnings()

    def note(self, what: str, *, broken: bool) -> None:
        """Set the metric of the last reload: 0 as long as anything that was read is broken."""
        (self._broken.add if broken else self._broken.discard)(what)
        if self._broken:
            self._telemetry.config_reload_failed()
        else:
            self._telemetry.config_loaded(self.loaded.config.sha256, self._clock.wall())

    async def reload(self) -> list[str]:
        """Read the files again and use them, or change nothing and return what is wrong with them."""
        async with self._lock:
            systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            problems = await self._reload()
            systemd.notify("READY=1")
            return problems

    async def _reload(self) -> list[str]:
        try:
            loaded = await asyncio.to_thread(load, self._options.config_file, self._options.overrides)
            if loaded.scope_versions != self.loaded.scope_versions:
                await asyncio.sleep(SETTLE)
                if half_written := await asyncio.to_thread(loaded.half_written):
                    raise ConfigError(half_written)
            if broken := await self._web.refresh():
                return [str(problem) for problem in broken]
            self._warn_of_restart(loaded.config)
            if not await self._fleet.apply(loaded.config):
                return ["not reloaded: the exporter is stopping"]
        except (ConfigError, StateError) as error:
            self.note("configuration", broken=True)
            problems = str(error).splitlines()
            log.get().error("reload_failed", problems=problems, always=True)
            return problems
        self.loaded = loaded
        self._log_warnings()
        self.note("configuration", broken=False)
        log.get().info("reloaded", pollers=len(self._fleet.pollers))
        return []

    async def serve_requests(self) -> None:
        """Reload whenever it is requested."""
        while True:
            await self.requested.wait()
            self.requested.clear()
            await self.reload()

    async def follow(self) -> None:
        """Look at the files from time to time.

        Request a reload when a scope file was added, removed or changed. Poll refused scopes when a secret was. Use TLS
        files of the client that were changed. What cannot be used is logged, and what was read before stays in use.
        """
        secrets = await asyncio.to_thread(self.loaded.secret_stamp)
        seen = tried = self.loaded.scope_versions
        while True:
            await asyncio.sleep(CHECK_FILES)
            if (stamp := await asyncio.to_thread(self.loaded.secret_stamp)) != secrets:
                secrets = stamp
                self._fleet.retry_refused()
            before, seen = seen, await asyncio.to_thread(self.loaded.scope_stamp)
            if seen == before and seen not in (self.loaded.scope_versions, tried):
                tried = seen
                self.requested.set()
            lost = await asyncio.to_thread(self.loaded.unreadable_secrets)
            if bool(lost) != (SECRETS in self._broken):
                self.note(SECRETS, broken=bool(lost))
            for file, why in lost:
                log.get().error("secret_file_unreadable", file=str(file), message=why, consequence="the last one stays")
            problems = await self._fleet.refresh_tls()
            if bool(problems) != (TLS_FILES in self._broken):
                self.note(TLS_FILES, broken=bool(problems))
            for problem in problems:
                log.get().error(
                    "tls_files_unusable", file=problem.file, message=problem.message, consequence="the old ones stay"
                )

    def _log_warnings(self) -> None:
        for warning in (*self.loaded.warnings, *self._web.warnings):
            log.get().warning("config_warning", field=warning.path, message=str(warning))

    def _warn_of_restart(self, new: Config) -> None:
        """Name the settings that are read at the start only."""
        old = self.loaded.config
        for path, before, after in (
            ("server", old.server, new.server),
            ("state.url" if old.state.url != new.state.url else "state", old.state, new.state),
            ("log.level", old.log.level, new.log.level),
            ("log.format", old.log.format, new.log.format),
        ):
            if before != after:
                log.get().warning("restart_needed", file=str(self._options.config_file), field=path)
