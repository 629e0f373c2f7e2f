"""Asking several sources at once: some at a time, until a deadline, and without those that fail."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from time import monotonic
from typing import Any

from amips_plugins.background.abandonable import run_abandonable
from amips_plugins.background.circuit_breaker import Breaker
from amips_plugins.background.forks import ForkLock

__all__ = ["Answers", "FanOut", "Refused", "SourceRests"]

_log = logging.getLogger("amips_plugins")
_FAILURES = 3  # in a row, after which a source is left alone for a while

Answers = tuple[dict[str, Any], dict[str, Exception]]
"""What sources answered, and the errors of those that did not, by their names."""


class SourceRests(RuntimeError):
    """A source was not asked, since it failed time and again a moment ago."""


class Refused(Exception):
    """Carries an error that is the caller's own: no other source would say otherwise."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class FanOut:
    """Asks sources at once, and remembers which of them fail.

    Parameters
    ----------
    name
        What they are together, for the log.
    sources
        Their names.
    at_once
        Most calls of one search that are under way together.

    Attributes
    ----------
    left_out
        How many queries each source was left out of.
    """

    def __init__(self, name: str, sources: Iterable[str], at_once: int) -> None:
        self.left_out: Counter[str] = Counter()
        self._name = name
        self._at_once = at_once
        self._breakers = {source: Breaker(_FAILURES) for source in sources}
        self._failing: set[str] = set()
        self._lock = ForkLock()

    def ask(self, jobs: Mapping[str, Callable[[float], Any]], seconds: float) -> Answers:
        """Do a job for each source on threads; each gets the seconds that are left for it.

        What takes longer is abandoned: it goes on in vain, and keeps nothing from ending.
        """
        deadline = monotonic() + seconds
        allowed, errors = self._allowed(jobs)
        waiting, found = deque(allowed), dict[str, Any]()
        running: dict[Future[Any], str] = {}
        while waiting or running:
            while waiting and len(running) < self._at_once:
                name = waiting.popleft()
                running[run_abandonable(partial(jobs[name], deadline - monotonic()))] = name
            left = deadline - monotonic()
            done, _ = wait(running, left, FIRST_COMPLETED) if left > 0 else (set(), None)
            if not done:
                break
            for future in done:
                _sort(running.pop(future), future, found, errors)
        late = [*running.values(), *waiting]
        self._learn(found, {**errors, **_too_late(running.values(), seconds)})
        return found, {**errors, **_too_late(late, seconds)}

    async def ask_async(
        self, jobs: Mapping[str, Callable[[float], Awaitable[Any]]], seconds: float
    ) -> Answers:
        """Do the same in tasks; those that take longer, and all if this one is, are cancelled."""
        deadline, gate, begun = monotonic() + seconds, asyncio.Semaphore(self._at_once), set[str]()
        allowed, errors = self._allowed(jobs)

        async def one(name: str) -> Any:
            async with gate:
                begun.add(name)
                return await jobs[name](deadline - monotonic())

        tasks = {asyncio.ensure_future(one(name)): name for name in allowed}
        found: dict[str, Any] = {}
        try:
            done, _ = await asyncio.wait(tasks, timeout=seconds) if tasks else (set(), None)
        finally:
            for task in tasks:
                task.cancel()
        for task in done:
            _sort(tasks[task], task, found, errors)
        late = [name for task, name in tasks.items() if task not in done]
        self._learn(found, {**errors, **_too_late(begun.intersection(late), seconds)})
        return found, {**errors, **_too_late(late, seconds)}

    def count(self, names: Iterable[str]) -> None:
        """Count sources that a query was answered without."""
        with self._lock:
            self.left_out.update(names)

    def _allowed(self, jobs: Iterable[str]) -> tuple[list[str], dict[str, Exception]]:
        allowed, errors = [], dict[str, Exception]()
        for name in jobs:
            if self._breakers[name].allows():
                allowed.append(name)
            else:
                errors[name] = SourceRests(f"{name!r} failed time and again a moment ago")
        return allowed, errors

    def _learn(self, found: Iterable[str], errors: Mapping[str, Exception]) -> None:
        """Leave sources alone that fail, and log what changes."""
        for name in found:
            self._breakers[name].succeed()
            if name in self._failing:
                self._failing.discard(name)
                _log.warning(
                    "%r answers again, in searches of %r.", name, self._name, extra=_extra(name)
                )
        for name, error in errors.items():
            if isinstance(error, SourceRests):
                continue
            self._breakers[name].fail()
            if name not in self._failing:
                self._failing.add(name)
                _log.warning(
                    "%r is left out of searches of %r: %s: %s",
                    name,
                    self._name,
                    type(error).__name__,
                    error,
                    extra=_extra(name),
                )


def _sort(
    name: str,
    ended: Future[Any] | asyncio.Future[Any],
    found: dict[str, Any],
    errors: dict[str, Exception],
) -> None:
    """Put what a source's job came to where it belongs; what is no source's failure is raised."""
    error = ended.exception()
    if error is None:
        found[name] = ended.result()
    elif isinstance(error, Refused):
        raise error.error
    elif isinstance(error, Exception):
        errors[name] = error
    else:
        raise error


def _too_late(names: Iterable[str], seconds: float) -> dict[str, Exception]:
    return {name: TimeoutError(f"{name!r} gave no answer within {seconds:.3g} s") for name in names}


def _extra(name: str) -> dict[str, str]:
    return {"amips_event": "source", "amips_collection": name}
