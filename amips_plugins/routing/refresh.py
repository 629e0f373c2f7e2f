"""What a router serves now, and the looking around that keeps it so."""

from __future__ import annotations

import logging
from dataclasses import replace

from amips_plugins.background.forks import ForkLock
from amips_plugins.bundle.registry import Registry
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.routing.serving import Serving, follow, serve_latest

__all__ = ["ServingFollower"]

_log = logging.getLogger("amips_plugins")


class ServingFollower:
    """Follows a collection and a registry.

    Parameters
    ----------
    serving
        What serves at first.
    registry
        Where newer bundles appear; None where the bundle or the hook was given.
    threads
        Threads of one model call.
    overflow_warning
        Share of keys without a cell past which a look logs a warning.
    monitor
        Watches what serves.

    Attributes
    ----------
    serving
        What serves now. A search takes it once, so that a look meanwhile is the next search's.
    overflow_share
        What ``count_overflow`` last found; None before the first.
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
        monitor.begin(serving.watch)
        serving, problem = self._load_latest(serving)
        self._adopt(serving)
        self._say(problem)

    def look(self) -> bool:
        """Look at the database and the registry; tell whether something else serves now."""
        with self._looking:
            before, problem = self.serving, None
            try:
                serving, problem = self._load_latest(follow(before))
                self._adopt(serving)
                self.count_overflow()
            except Exception as exc:  # noqa: BLE001 - whatever is out of reach, the router serves on
                problem = f"{before.collection.info.name!r} cannot be looked at again: {exc}"
            self._say(problem)
            return self.serving is not before

    def follow(self) -> None:
        """Follow the collection alone; whatever the database raises is raised."""
        self._adopt(follow(self.serving))

    def count_overflow(self) -> float:
        """Count the keys that have no cell; return their share of all keys."""
        collection, share = self.serving.collection, 0.0
        if collection.layout() is not None:
            share = collection.overflow() / max(1, collection.count())
        self.overflow_share = share
        crossed, self._overflows = not self._overflows, share > self._overflow_warning
        if self._overflows and crossed:
            _log.warning(
                "%.1f %% of the keys of %r have no cell and are searched by every query; to give "
                "them theirs: amips backfill.",
                100 * share,
                collection.info.name,
            )
        self._monitor.add_overflow(share, collection.break_even)
        return share

    def _adopt(self, serving: Serving) -> None:
        """Let the searches to come use another state."""
        if serving is self.serving:
            return
        self._monitor.begin(serving.watch)
        self.serving = serving
        _log.info(
            "%r is searched with bundle %s.",
            serving.collection.info.name,
            None if serving.manifest is None else serving.manifest.version,
        )

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
