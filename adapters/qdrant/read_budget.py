"""Strict mode's ``read_rate_limit``: a search of cells takes two reads of it, a native one one.

So it does with one condition, the form of it where a limit is known of. The limit may be set while
a router serves, and no answer tells of it: after a pause in the searches the collection is looked
at again, off their path and seldom.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.background.single_flight import SingleFlight

__all__ = ["ReadBudget"]

_NEAR = 0.1  # share of a minute's reads that searches of cells may take here: others read, too
_PAUSE = 0.1  # seconds without a search
_LOOKS = 3.0  # at once,
_LOOK_EVERY = 10.0  # and seconds until there may be one more


class ReadBudget:
    """Counts the reads of this process in the last minute against the limit."""

    def __init__(self, limits: Limits, look: Callable[[], Limits]) -> None:
        self._limit: int | None = limits.of("read_rate_limit")
        self._look = look
        self._looking = SingleFlight(self._ask, "amips-limits")
        self._spent, self._since = 0.0, time.monotonic()
        self._looks, self._looked = _LOOKS, self._since

    def spend(self, reads: int) -> None:
        """Count what a search takes."""
        taken = 0.0 if self._limit is None else self._taken()
        self._spent, self._since = taken + reads, time.monotonic()

    def _taken(self) -> float:
        """Return the reads that have not come back yet."""
        back = (time.monotonic() - self._since) * (self._limit or 0) / 60
        return 0.0 if self._limit is None else max(0.0, self._spent - back)

    @property
    def limited(self) -> bool:
        """Whether a limit is known of."""
        return self._limit is not None

    def near(self) -> bool:
        """Tell whether searches of cells had better leave the reads to others."""
        now = time.monotonic()
        if now - self._since > _PAUSE:
            self._looks = min(_LOOKS, self._looks + (now - self._looked) / _LOOK_EVERY)
            self._looked = now
            if self._looks >= 1 and self._looking.start():
                self._looks -= 1
        return self._limit is not None and self._taken() > _NEAR * self._limit

    def _ask(self) -> None:
        with contextlib.suppress(Exception):  # the searches themselves will tell
            self._limit = self._look().of("read_rate_limit")
