"""The rate limit of the web configuration file."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """`burst` requests at once, and one more every `interval` seconds. An interval of 0.0 allows everything."""

    def __init__(self, interval: float, burst: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.rate = (interval, burst)
        self._monotonic = monotonic
        self._tokens = float(burst)
        self._at = monotonic()

    def allow(self) -> bool:
        """Take a token if there is one."""
        interval, burst = self.rate
        if not interval:
            return True
        now = self._monotonic()
        self._tokens = min(burst, self._tokens + (now - self._at) / interval)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
