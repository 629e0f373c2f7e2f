"""A router for a collection that may not be there yet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from amips_plugins.routing.router import LearnedRouter

__all__ = ["LateRouter"]

_log = logging.getLogger("amips_plugins")
_AGAIN = 5.0  # seconds between two attempts


class LateRouter:
    """Makes a router when it is first wanted, and tries again where that fails.

    Stores create their collection with the first write; until then there is nothing to route.
    """

    def __init__(self, name: str, make: Callable[[], LearnedRouter]) -> None:
        self.name = name
        self._make = make
        self._made: LearnedRouter | None = None
        self._making = threading.Lock()
        self._next = 0.0
        self._problem: str | None = None

    @property
    def made(self) -> LearnedRouter | None:
        """The router, or None until there is one."""
        return self._made

    def get(self) -> LearnedRouter | None:
        """Return the router, made now if need be; None where it cannot be made yet."""
        if self._made is not None or time.monotonic() < self._next:
            return self._made
        if not self._making.acquire(blocking=False):
            return None  # another thread is at it, and this search does not wait for that
        try:
            self._made = self._make()
        except Exception as exc:  # noqa: BLE001 - whatever the database raises, the client answers
            self._next = time.monotonic() + _AGAIN
            if str(exc) != self._problem:
                _log.warning("The native search answers for %r: no router (%s)", self.name, exc)
            self._problem = str(exc)
        finally:
            self._making.release()
        return self._made
