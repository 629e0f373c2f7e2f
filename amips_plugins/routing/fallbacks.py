"""Why the native search answered in place of the model: counted, and logged once."""

from __future__ import annotations

import logging
from collections import Counter

from amips_plugins.background.forks import ForkLock

__all__ = ["Fallbacks"]

_log = logging.getLogger("amips_plugins")


class Fallbacks:
    """Counts reasons, for any number of threads."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: set[str] = set()
        self._lock = ForkLock()

    def note(
        self, name: str, reason: str, cause: object = None, logged: set[str] | None = None
    ) -> str:
        """Count a reason for the collection of this name, log it the first time, and return it."""
        logged = self._logged if logged is None else logged
        with self._lock:
            self.counts[reason] += 1
            new = reason not in logged
            logged.add(reason)
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
