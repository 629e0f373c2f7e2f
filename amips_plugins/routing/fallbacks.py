"""Why the native search answered in place of the model: counted, and logged once."""

from __future__ import annotations

import logging
import threading
from collections import Counter

__all__ = ["Fallbacks"]

_log = logging.getLogger("amips_plugins")


class Fallbacks:
    """Reasons and how often they came, for any number of threads.

    Attributes
    ----------
    counts
        How often each reason came.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: set[str] = set()
        self.after_fork()

    def after_fork(self) -> None:
        """Let go of a lock that a thread of the parent process may have held."""
        self._lock = threading.Lock()

    def note(self, name: str, reason: str, cause: object = None) -> str:
        """Count a reason for the collection of this name, log it the first time, and return it."""
        with self._lock:
            self.counts[reason] += 1
            new = reason not in self._logged
            self._logged.add(reason)
        if new:
            more = "" if cause is None else f" ({cause})"
            _log.warning(
                "The native search answers for %r: %s%s",
                name,
                reason,
                more,
                extra={"amips_event": "fallback", "amips_collection": name, "amips_reason": reason},
            )
        return reason

    def start_over(self, *known: str) -> None:
        """Log what comes from now on as news, but for what is known."""
        with self._lock:
            self._logged = set(known)
