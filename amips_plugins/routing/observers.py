"""The one hook behind metrics, traces and the query log: what a search did, once it is answered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from amips_plugins.background.forks import ForkLock
from amips_plugins.collection import Collection, CollectionInfo, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan, searches_everything
from amips_plugins.routing.effects import Effects
from amips_plugins.routing.hits import Trace
from amips_plugins.vectors import FloatArray

if TYPE_CHECKING:
    from amips_plugins.routing.execution import Outcome
    from amips_plugins.routing.serving import Serving

__all__ = ["Observation", "Observer", "Observers"]

_T = TypeVar("_T")

_log = logging.getLogger("amips_plugins")


@dataclass(frozen=True, slots=True)
class Observation:
    """One answered call of ``LearnedRouter.search``.

    Attributes
    ----------
    collection
        What was searched.
    queries
        ``(n_queries, dim)`` float32. The array may be the caller's own: copy what you keep, and
        change nothing.
    k
        Hits asked for.
    modes
        Number of queries by ``Trace.mode``.
    fallbacks
        Number of queries that the native search answered in place of the model, by reason.
    routed
        Queries that the model chose cells for.
    probes
        Cells chosen, over all of those.
    scanned
        Sum over those of the share of the keys scanned, as ``Trace.scanned`` counts it; None where
        a hook does not say what its cells hold.
    plan_seconds, search_seconds
        Time spent on the plan of the whole batch, and in the database's client.
    version
        Version of the bundle in use, or None.
    left_out
        Where several collections are searched as one: number of queries that were answered without
        one of them, by its name.
    """

    collection: CollectionInfo
    queries: FloatArray
    k: int
    modes: Mapping[str, int]
    fallbacks: Mapping[str, int]
    routed: int
    probes: int
    scanned: float | None
    plan_seconds: float
    search_seconds: float
    version: str | None
    left_out: Mapping[str, int] = field(default_factory=dict)


Observer = Callable[[Observation], object]
"""Told of every answered search, on the caller's thread: be quick."""


class Observers:
    """The observers of one router; what they raise is logged once and never reaches a search."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        if callable(observers):
            raise InvalidInput("observers takes a list; pass observers=[your observer].")
        self._observers: tuple[Observer, ...] = ()
        self._around: tuple[Callable[[], AbstractContextManager[object]], ...] = ()
        self._failed: set[int] = set()
        self._lock = ForkLock()
        for observer in observers:
            self.add(observer)

    def __bool__(self) -> bool:
        return bool(self._observers)

    @property
    def surround(self) -> bool:
        """Whether one of them wants something around every search."""
        return bool(self._around)

    def around(self, effects: Effects[_T]) -> Effects[_T]:
        """Perform a search inside of what the observers' ``searching`` gives."""
        with ExitStack() as stack:
            for searching in self._around:
                try:
                    stack.enter_context(searching())
                except Exception as exc:  # noqa: BLE001, PERF203 - as in ``tell``
                    self._fails(searching, exc)
            return (yield from effects)

    def add(self, observer: Observer) -> None:
        """Tell another one from now on."""
        if not callable(observer):
            raise InvalidInput(
                f"{observer!r} is no observer; pass a callable that takes an Observation."
            )
        with self._lock:
            self._observers = (*self._observers, observer)
            searching = getattr(observer, "searching", None)
            if searching is not None:
                self._around = (*self._around, searching)

    def tell(
        self,
        serving: Serving,
        request: SearchRequest,
        answered: Outcome,
        traces: Sequence[Trace],
        times: tuple[float, float],
    ) -> None:
        """Say what one search did; ``times`` are the seconds of the plan and of the search."""
        try:
            observation = _observe(serving, request, answered, traces, times)
        except Exception as exc:  # noqa: BLE001 - the search has its answer, whoever watches
            self._fails(_observe, exc)
            return
        for observer in self._observers:
            self._call(observer, observation)

    def _call(self, observer: Observer, observation: Observation) -> None:
        try:
            observer(observation)
        except Exception as exc:  # noqa: BLE001 - as above
            self._fails(observer, exc)

    def _fails(self, who: Callable[..., object], exc: Exception) -> None:
        with self._lock:
            new = id(who) not in self._failed
            self._failed.add(id(who))
        if new:
            name = getattr(who, "__qualname__", type(who).__qualname__)
            _log.warning("The observer %s fails, and is called on all the same: %s", name, exc)


def _observe(
    serving: Serving,
    request: SearchRequest,
    answered: Outcome,
    traces: Sequence[Trace],
    times: tuple[float, float],
) -> Observation:
    """Add up the traces of one call."""
    modes: dict[str, int] = {}
    fallbacks: dict[str, int] = {}
    left_out: dict[str, int] = {}
    routed = probes = 0
    for trace in traces:
        for name in trace.left_out:
            left_out[name] = left_out.get(name, 0) + 1
        modes[trace.mode] = modes.get(trace.mode, 0) + 1
        if trace.fallback is not None:
            fallbacks[trace.fallback] = fallbacks.get(trace.fallback, 0) + 1
        if trace.n_probes is not None:
            routed += 1
            probes += trace.n_probes
    scanned = _scanned(serving.collection, answered.plan)
    if scanned is not None:
        scanned += len(answered.completed) + routed * serving.model_share
    return Observation(
        serving.collection.info,
        request.queries,
        request.k,
        modes,
        fallbacks,
        routed,
        probes,
        scanned,
        *times,
        traces[0].version,
        left_out,
    )


def _scanned(collection: Collection, plan: QueryPlan) -> float | None:
    """Sum the shares of the keys in a plan's cells; None where it does not say them."""
    if plan.cells is None or plan.shares is None:
        return None
    whole = searches_everything(plan, collection.break_even).tolist()
    pairs = zip(whole, plan.shares.tolist(), strict=True)  # for one query faster than numpy
    return sum(1.0 if everything else share for everything, share in pairs)
