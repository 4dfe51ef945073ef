"""One simulated BlueKing platform: its worlds, settings, faults, and the log of the calls."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from exporter.model import Scope
from exporter.simulator.answer import Answer as Answer
from exporter.simulator.faults import Fault, Faults
from exporter.simulator.world import JobWorld

Dialect = Literal["v4", "v3", "gateway", "esb"]
"""`gateway`: NodeMan behind the API gateway. `esb`: anything under /api/c/compapi."""

DEFAULT_APP_CODE = "blueking-exporter"
DEFAULT_APP_SECRET = "simulated"


@dataclass
class Call:
    """One request, parsed and authenticated. `params` are the query and the JSON body, without credentials."""

    api: str
    dialect: Dialect
    app_type: bool
    method: str
    path: str
    path_args: Mapping[str, str]
    params: dict[str, object]
    language: Literal["zh", "en"]
    at: float
    """Unix seconds on the platform's clock."""
    user: str = ""
    """The user that the backend sees, "" for none."""
    tenant_id: str = ""
    faults: tuple[Fault, ...] = ()

    def fault(self, name: str) -> Fault | None:
        """The active fault with this name, for faults that a handler implements."""
        return next((fault for fault in self.faults if fault.name == name), None)

    @property
    def scope(self) -> Scope | None:
        """The scope named in the parameters, None where there is none."""
        kind, key, biz = (self.params.get(name) for name in ("bk_scope_type", "bk_scope_id", "bk_biz_id"))
        if kind in ("biz", "biz_set", "tenant_set") and key is not None:
            return Scope(kind, str(key))
        return Scope("biz", str(biz)) if isinstance(biz, int | str) else None


@dataclass(frozen=True)
class Endpoint:
    """One route. `path` in aiohttp's notation; a trailing slash in it is optional for clients."""

    methods: tuple[str, ...]
    path: str
    api: str
    dialect: Dialect
    app_type: bool
    handler: Callable[[Call], Answer | Awaitable[Answer]]


@dataclass
class LoggedCall:
    """One line of the log of calls; served by `/-/requests`."""

    at: float
    api: str
    dialect: str
    app_type: bool
    method: str
    path: str
    scope: str
    params: dict[str, object]
    faults: tuple[str, ...]
    status: int | None = None
    """None when no answer was finished."""
    nbytes: int = 0
    """Size of the response body."""
    user: str = ""
    tenant_id: str = ""


class Platform:
    """A platform and its settings. Changed attributes take effect with the next request.

    `now`: unix seconds, virtual in tests. `speed`: see JobWorld. `skew`: seconds by which the platform's Date header
    is ahead of the clock that its data uses. The worlds of NodeMan, NodeMan V3 and CMDB are `nodeman`, `nodemgr` and
    `cmdb`, set by nodeman_api, nodemgr_api and cmdb_api.
    """

    def __init__(
        self,
        *,
        seed: int = 1,
        now: Callable[[], float] = time.time,
        scopes: Iterable[Scope] = (Scope("biz", "2"),),
        speed: float = 1.0,
    ) -> None:
        self.seed = seed
        self.now = now
        self.speed = speed
        self.random = random.Random(f"{seed} platform")
        self.job = JobWorld(seed, now, scopes=scopes, speed=speed)
        self.nodeman: object | None = None
        self.nodemgr: object | None = None
        self.cmdb: object | None = None
        self.faults = Faults(seed)
        self.calls: deque[LoggedCall] = deque(maxlen=200_000)

        self.app_code = DEFAULT_APP_CODE
        self.app_secret = DEFAULT_APP_SECRET
        self.access_tokens = {"simulated-access-token": "admin"}
        self.bk_tokens = {"simulated-bk-token": "admin"}
        self.trusts_usernames = False
        """Whether the app is exempt from user verification: then user-type resources accept a bare bk_username."""
        self.takes_bk_username = True
        """False: the gateway is configured to drop bk_username (`from_username: false`)."""
        self.skips_user_verification = False
        """True: app-type resources have `skip_user_verification`, which leaves the backend without a user."""
        self.job_reads_header = True
        """Whether JOB takes the user from X-Bk-Username first, as from 3.12.1 on."""
        self.tenant_id: str | None = None
        """Set: every gateway call must carry it in X-Bk-Tenant-Id."""
        self.tenants: dict[Scope, str] = {}
        """Tenants of single scopes: a call for one of them must carry its tenant."""
        self.rate_limit: int | None = None
        """Requests per second and app at the gateway and the ESB; None: unlimited, and no quota headers."""
        self.quota_headers = True
        self.denied: set[Scope] = set()
        """Scopes whose access_business is missing."""
        self.denied_history: set[Scope] = set()
        """Scopes in which executions may be listed, but view_history is missing."""
        self.v3_start_limit: int | None = None
        """The operator's optional limit on `start` of the v3 list."""
        self.fills_bk_biz_id = True
        """The server's compatibility toggle for the deprecated bk_biz_id."""
        self.skew = 0.0
        self._window = (0, 0)

    @property
    def scopes(self) -> list[Scope]:
        return self.job.scopes

    def take_quota(self) -> int | None:
        """Count one request in the present second. Returns how many remain: negative if it is refused, None without a
        limit."""
        if self.rate_limit is None:
            return None
        second, used = int(self.now()), self._window[1] if self._window[0] == int(self.now()) else 0
        self._window = (second, used + 1)
        return self.rate_limit - used - 1

    def log(self, call: Call) -> LoggedCall:
        """Log a call when it arrives. Its status is set when it has been answered."""
        scope = call.scope
        logged = LoggedCall(
            call.at, call.api, call.dialect, call.app_type, call.method, call.path,
            str(scope) if scope else "", call.params, tuple(fault.name for fault in call.faults),
        )  # fmt: skip
        self.calls.append(logged)
        return logged
