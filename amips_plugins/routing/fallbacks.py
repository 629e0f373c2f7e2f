"""Why the native search answered in place of the model: counted, and logged once."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from amips_plugins.background.forks import renew_after_fork

__all__ = ["Fallbacks"]

_log = logging.getLogger("amips_plugins")


class Fallbacks:
    """Counts reasons, for any number of threads."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: set[str] = set()
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Let go of a lock that a thread of the parent process may have held."""
        self._lock = threading.Lock()  # a ForkLock, without what its calls take of every search

    def count(self, reason: str, logged: set[str]) -> bool:
        """Count a reason; tell whether it is new, and to be logged."""
        with self._lock:
            self.counts[reason] += 1
            if reason in logged:
                return False
            logged.add(reason)
            return True

    def note(self, name: str, reason: str, cause: object = None) -> str:
        """Count a reason for the collection of this name, log it the first time, and return it."""
        if self.count(reason, self._logged):
            self.log(name, reason, cause)
        return reason

    def log(self, name: str, reason: str, cause: object) -> None:
        """Say why the native search answers for the collection of this name."""
        more = "" if cause is None else f" ({cause})"
        _log.warning(
            "The native search answers for %r: %s%s",
            name,
            reason,
            more,
            extra={"amips_event": "fallback", "amips_collection": name, "amips_reason": reason},
        )
