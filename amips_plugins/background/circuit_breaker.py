"""A circuit breaker: what keeps failing is left alone for a while (Nygard, *Release It!*, 2007)."""

from __future__ import annotations

import time

from amips_plugins.background.forks import ForkLock

__all__ = ["Breaker"]


class Breaker:
    """Opens after some failures in a row, and lets one trial through when its rest is over.

    Every failed trial doubles the rest. Any number of threads may share it; what was under way
    when it opened, and fails later, is no trial.
    """

    def __init__(self, failures: int = 5, rest: float = 1.0, longest: float = 60.0) -> None:
        self._most = failures
        self._first = rest
        self._longest = longest
        self._lock = ForkLock()
        self._failed = 0
        self.troubled = False  # whether a success would say anything new
        self._rest = rest
        self._until: float | None = None  # when the next trial is due; None while closed
        self._tried = False  # since it opened, or since the last trial failed

    @property
    def closed(self) -> bool:
        """Whether everything passes."""
        return self._until is None

    def allows(self) -> bool:
        """Tell whether to try; while it is open one call in every rest is told so."""
        if self._until is None:
            return True
        with self._lock:
            now = time.monotonic()
            if self._until is None or now < self._until:
                return self._until is None
            self._until = now + self._rest  # a trial that never ends is followed by another
            self._tried = True
            return True

    def succeed(self) -> bool:
        """Note a success; return whether it closed the breaker."""
        if self._failed == 0:
            return False
        with self._lock:
            closes = self._until is not None
            self.troubled = False
            self._failed, self._until, self._rest, self._tried = 0, None, self._first, False
            return closes

    def fail(self) -> bool:
        """Note a failure; return whether it opened the breaker."""
        with self._lock:
            self._failed += 1
            self.troubled = True
            if self._failed < self._most:
                return False
            opens = self._until is None
            if opens:
                self._rest = self._first
            elif self._tried:
                self._rest = min(2 * self._rest, self._longest)
            else:
                return False
            self._tried = False
            self._until = time.monotonic() + self._rest
            return opens
