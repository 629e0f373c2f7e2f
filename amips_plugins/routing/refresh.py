"""What a router serves now, and the looking around that keeps it so."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from amips_plugins.background.forks import ForkLock
from amips_plugins.bundle.registry import Registry
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.routing.serving import Serving, follow, serve_latest

__all__ = ["STALE", "ServingFollower"]

STALE = "cells: stale"
"""The obstacle where too many keys lie in the cells of vectors that they had before."""

_log = logging.getLogger("amips_plugins")
_AUDITED = 300  # keys that one look at the cells reads with their vectors
_AUDIT_EVERY = 600.0  # seconds from one such look to the next, and while cells are stale:
_AUDIT_AGAIN = 60.0
_AT_MOST_BUSY = 0.01  # of the time, with counting and with looking at cells


class ServingFollower:
    """Follows a collection and a registry.

    A search takes ``serving`` once, so that a look meanwhile is the next search's;
    ``overflow_share`` is what ``count_overflow`` last found.
    """

    def __init__(
        self,
        serving: Serving,
        registry: Registry | None,
        threads: int,
        overflow_warning: float,
        monitor: HealthMonitor,
    ) -> None:
        self.serving = serving
        self.overflow_share: float | None = None
        self._registry = registry
        self._threads = threads
        self._overflow_warning = overflow_warning
        self._overflows = False
        self._monitor = monitor
        self._problem: str | None = None
        self._looking = ForkLock()
        self._loaded = serving  # what serves where its cells are sound
        self._stale = False
        self._count_due = self._audit_due = 0.0
        monitor.begin(serving.watch)
        serving, problem = self._load_latest(serving)
        self._adopt(serving, audit=True)
        self._say(problem)

    def look(self, *, thoroughly: bool = False) -> bool:
        """Look at the database and the registry; tell whether something else serves now."""
        with self._looking:
            before, problem = self.serving, None
            try:
                serving, problem = self._load_latest(follow(self._loaded))
                self._adopt(serving, audit=thoroughly or time.monotonic() >= self._audit_due)
                if thoroughly or time.monotonic() >= self._count_due:
                    self.count_overflow()
            except Exception as exc:  # noqa: BLE001 - whatever is out of reach, the router serves on
                problem = f"{before.collection.info.name!r} cannot be looked at again: {exc}"
            self._say(problem)
            return self.serving is not before

    def follow(self) -> None:
        """Follow the collection alone; whatever the database raises is raised."""
        self._adopt(follow(self._loaded), audit=False)

    def count_overflow(self) -> float:
        """Count the keys that have no cell; return their share of all keys."""
        collection, share, started = self.serving.collection, 0.0, time.monotonic()
        if collection.layout() is not None:
            share = collection.overflow() / max(1, collection.count())
        self._count_due = _due(started, 0.0)
        self.overflow_share = share
        crossed, self._overflows = not self._overflows, share > self._overflow_warning
        if self._overflows and crossed:
            given = collection.partitions is not None
            _log.warning(
                "%.1f %% of the keys of %r have no cell and are searched by every query; %s.",
                100 * share,
                collection.info.name,
                "train again, on a new snapshot"
                if given
                else "to give them theirs: amips backfill",
            )
        self._monitor.add_overflow(share, collection.break_even)
        return share

    def _adopt(self, loaded: Serving, *, audit: bool) -> None:
        """Let the searches to come use another state, or the native search if its cells are bad."""
        if loaded.obstacle is not None or not loaded.layout:
            self._stale = False  # there are none to look at
        elif audit or loaded is not self._loaded:
            self._stale = self._has_stale_cells(loaded)
        if loaded is self._loaded and self._stale == (self.serving.obstacle == STALE):
            return
        self._loaded = loaded
        serving = replace(loaded, obstacle=STALE) if self._stale else loaded
        self._monitor.begin(serving.watch)
        self.serving = serving
        if not self._stale:
            _log.info(
                "%r is searched with bundle %s.",
                serving.collection.info.name,
                None if serving.manifest is None else serving.manifest.version,
            )

    def _has_stale_cells(self, loaded: Serving) -> bool:
        """Look at some keys' cells; where that cannot be done, what was known stays."""
        collection, started = loaded.collection, time.monotonic()
        name = collection.info.name
        try:
            audit = collection.layouts.audit(_AUDITED)
        except Exception as exc:  # noqa: BLE001 - a sample that is refused keeps nothing from serving
            _log.debug("The cells of %r cannot be looked at: %s", name, exc)
            return self._stale
        finally:
            self._audit_due = _due(started, _AUDIT_EVERY)
        if audit.too_stale:
            self._audit_due = _due(started, _AUDIT_AGAIN)
            if not self._stale:
                _log.warning(
                    "%d of %d keys of %r that were looked at lie in cells of other vectors; the "
                    "native search answers until they are mended: amips backfill --verify.",
                    audit.stale,
                    audit.sampled,
                    name,
                )
        return audit.too_stale

    def _load_latest(self, running: Serving) -> tuple[Serving, str | None]:
        """Return what the registry has for the collection, or what runs and why it still does."""
        if self._registry is None:
            return running, None
        name = running.collection.info.name
        try:
            return serve_latest(running, self._registry, self._threads), None
        except Exception as exc:  # noqa: BLE001 - whatever the registry's storage raises, native serves
            if running.hook is not None:
                return running, f"The bundle that runs serves {name!r} on: {exc}"
            obstacle = f"bundle: {type(exc).__name__}"
            if running.obstacle != obstacle:
                running = replace(running, obstacle=obstacle)
            return running, f"No bundle serves {name!r}: {exc}"

    def _say(self, problem: str | None) -> None:
        """Log what a look found wrong, once until it is another matter."""
        if problem is not None and problem != self._problem:
            _log.warning("%s", problem)
        self._problem = problem


def _due(started: float, every: float) -> float:
    """Return when to do next what has just been done: the dearer, the later."""
    now = time.monotonic()
    return now + max(every, (now - started) / _AT_MOST_BUSY)
