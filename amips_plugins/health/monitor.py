"""Watching live searches: a few are repeated exactly, on a thread of its own."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from amips_plugins.background.forks import STEADY, renew_after_fork
from amips_plugins.background.process_end import is_ending
from amips_plugins.background.single_flight import SingleFlight
from amips_plugins.bundle.reference import Reference
from amips_plugins.collection import Collection, Hit, Incomplete, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.health.drift import WINDOW, compare, outputs_of
from amips_plugins.health.filters import FilterClasses, FilterTrial, narrows, shape_of
from amips_plugins.health.gate import NATIVE_FELL, Gate, Health
from amips_plugins.health.shadow_search import (
    ServedQuery,
    filter_trial,
    gate_of,
    shadow_search,
    widens,
)
from amips_plugins.plan import PreQueryHook, QueryPlan, Target
from amips_plugins.vectors import FloatArray

__all__ = ["HealthMonitor", "Watch"]

_log = logging.getLogger("amips_plugins")
_WAITING = 4  # samples; more would be stale, and memory
_KEEN = 10.0  # times the share that is sampled while something is to be decided

Listener = Callable[[Health], object]


class Watch:
    """How one model does over one generation of a collection, from when it begins to serve."""

    def __init__(
        self, collection: Collection, hook: PreQueryHook, reference: Reference | None = None
    ) -> None:
        self.collection = collection
        self.hook = hook
        self.reference = reference
        self.gate = gate_of(hook)
        self.filters = FilterClasses(widens=widens(hook))
        self.health = self.gate.health
        self.live: dict[bytes, FloatArray] = {}  # a repeated query says nothing new of all queries


class HealthMonitor:
    """Samples the searches of one router, and says which way to search.

    The caller's path pays for a random number; a chosen search also for a copy of its vector. The
    rest happens on a daemon thread that lives no longer than the work, one at a time.

    Parameters
    ----------
    share
        Share of the queries that are searched again to measure recall, each once exactly and up to
        twice in other ways; ten times as many while the router is not healthy, and of the filtered
        searches that are not routed.
    at_most_every
        Seconds from one of those to the next at the least, however many queries there are;
        filtered ones are counted by themselves.
    at_most_busy
        Share of the time that the database may be kept busy with those searches: after one that
        took a second there is a rest of 19 by default. An exact search of a large collection is
        dear.
    drift_share
        Share of the queries whose vectors are compared with the bundle's reference, 500 at a time;
        the database is not asked.
    timeout
        Seconds the database may take for each search.
    filters
        Filters whose classes (their fields and operators, whatever the values) are routed from the
        start, because ``amips evaluate --filter`` has shown that it holds and pays; they are
        watched as all others are, which are routed once live searches have shown it.
    on_change
        Called with the ``Health`` when the state has changed, on the thread that found out. What
        it raises is logged once.
    on_health
        The same whenever there is news, such as ``StatusFile``.

    Attributes
    ----------
    failures
        Searches of ours that failed, by the error's name. They count neither for nor against the
        router.

    Raises
    ------
    InvalidInput
        A share is none, or a time is not above 0.
    """

    def __init__(
        self,
        *,
        share: float = 1e-3,
        at_most_every: float = 1.0,
        at_most_busy: float = 0.05,
        drift_share: float = 0.05,
        timeout: float | None = 10.0,
        filters: Sequence[Any] = (),
        on_change: Listener | None = None,
        on_health: Listener | None = None,
    ) -> None:
        for name, value in (("share", share), ("drift_share", drift_share)):
            if not 0.0 <= value <= 1.0:
                raise InvalidInput(f"{name}={value!r} is no share from 0 to 1.")
        if not 0.0 < at_most_busy <= 1.0:
            raise InvalidInput(f"at_most_busy={at_most_busy!r} is no share above 0 and up to 1.")
        if not at_most_every >= 0:
            raise InvalidInput(f"at_most_every={at_most_every!r} is no time; pass 0 or more.")
        if timeout is not None and not timeout > 0:
            raise InvalidInput(f"timeout={timeout!r} is no time; pass seconds above 0, or None.")
        self.failures: Counter[str] = Counter()
        self._share = share
        self._every = at_most_every
        self._rest = 1.0 / at_most_busy - 1.0  # as many times as long as the work
        self._drift_share = drift_share
        self._timeout = timeout
        self._known_filters = tuple(filters)
        self._listeners = {"on_change": on_change, "on_health": on_health}
        self._failed: set[str] = set()
        self._watch: Watch | None = None
        self._rate = 0.0  # of the queries chosen, for either purpose
        self._due = {False: 0.0, True: 0.0}  # when a search may be sampled again, or a filtered one
        self._queue: deque[tuple[Watch, ServedQuery, float]] = deque()
        self._work = SingleFlight(self._look, "amips-watch", self._waits)
        renew_after_fork(self)

    @property
    def health(self) -> Health | None:
        """How the router does; None while there is nothing to watch."""
        return None if self._watch is None else self._watch.health

    def begin(self, watch: Watch | None) -> None:
        """Watch what serves from now on; None: nothing plans, so there is nothing to watch."""
        before, self._watch = self.health, watch
        drift_share = 0.0 if watch is None or watch.reference is None else self._drift_share
        keen = min(1.0, _KEEN * self._share)
        self._rate = 0.0 if watch is None else max(keen, drift_share)
        if watch is None:
            return
        watch.gate.measured = self._share > 0.0
        if self._known_filters:
            watch.filters = FilterClasses(self._known_filters, widens=widens(watch.hook))
        if before is not None and before.state != "healthy":
            self._announce(watch, before)
        self._tell("on_health", watch.health)

    def chosen(self, n_queries: int = 1) -> bool:
        """Flip the coin for a call of so many queries: whether to pass one of them to ``sample``.

        Ask it only of searches without ``n_probes``: of others nothing was promised.
        """
        return random.random() < self._rate * n_queries  # noqa: S311 - a sample, no secret

    def sample(self, watch: Watch, served: ServedQuery) -> None:
        """Take a chosen query over; its vector is copied, and the call does not wait.

        What comes faster than it can be looked at is left aside.
        """
        filtered = served.filter is not None
        if self._rate <= 0.0 or (filtered and served.widen == math.inf):
            return
        coin = random.random() * self._rate  # noqa: S311 - as above
        live = watch.live
        known = watch.reference is not None and not filtered
        if known and coin < self._drift_share and len(live) < WINDOW:
            query = np.array(served.query, dtype=np.float32)
            live[query.tobytes()] = query
        open_question = served.mode == "native" if filtered else watch.gate.in_doubt
        share = self._share * _KEEN if open_question else self._share
        if coin < share and len(self._queue) < _WAITING and time.monotonic() >= self._due[filtered]:
            widen = watch.filters.to_try(shape_of(served.filter)) if filtered else 1.0
            if widen is not None:
                self._due[filtered] = time.monotonic() + self._every
                query = np.array(served.query, dtype=np.float32)
                self._queue.append((watch, replace(served, query=query), widen))
        if self._queue or len(live) >= WINDOW:
            self._work.start()

    def offer(
        self,
        watch: Watch,
        widen: float,
        request: SearchRequest,
        target: Target,
        found: Sequence[Sequence[Hit]],
        plan: QueryPlan,
    ) -> None:
        """Take over one query of a ``chosen`` call that was answered by a plan."""
        row = random.randrange(len(request.queries))  # noqa: S311 - as above
        if isinstance(found[row], Incomplete):
            return  # a collection that failed is no fault of the plan
        served = ServedQuery(
            watch.collection,
            watch.hook,
            request.queries[row],
            target,
            found[row],
            plan.mode,
            widen,
            request.params,
            request.filter if narrows(request.filter) else None,
        )
        self.sample(watch, served)

    def add_overflow(self, share: float, break_even: float) -> None:
        """Say how many keys have no cell (see ``Gate.add_overflow``)."""
        if self._watch is not None:
            self._weigh(self._watch, lambda gate: gate.add_overflow(share, break_even))

    def idle(self, timeout: float) -> bool:
        """Wait until there is nothing left to look at; tell whether that came to pass."""
        deadline = time.monotonic() + timeout
        while self._queue or self._work.busy:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        return True

    def after_fork(self) -> None:
        """Leave to the parent process what it was at."""
        self._queue.clear()

    def _waits(self) -> bool:
        return bool(self._queue)

    def _look(self) -> None:
        while self._queue and not is_ending():
            self._examine(*self._queue.popleft())
        if self._watch is not None and not is_ending():
            self._compare(self._watch)

    def _examine(self, watch: Watch, served: ServedQuery, widen: float) -> None:
        if served.widen != watch.gate.widen:
            return
        started = time.monotonic()
        shadow = trial = None
        try:
            if served.filter is None:
                shadow = shadow_search(served, watch.gate.better, self._timeout)
            else:
                first = random.random() < 0.5  # noqa: S311 - no secret
                trial = filter_trial(served, widen, self._timeout, native_first=first)
        except Exception as exc:  # noqa: BLE001 - whatever a database raises, no caller waits for this
            self._fails(exc)
            return
        finally:
            now = time.monotonic()
            rest = self._rest * (now - started)
            self._due = {kind: max(due, now) + rest for kind, due in self._due.items()}
        if shadow is not None:
            self._weigh(watch, lambda gate: gate.add_shadow(shadow))
        if trial is not None:
            self._weigh_filter(watch, shape_of(served.filter), trial)

    def _weigh_filter(self, watch: Watch, shape: str, trial: FilterTrial) -> None:
        """Show what is known of filters a sample, and say what follows from it."""
        changed = watch.filters.add(shape, trial)
        self._weigh(watch, lambda _: None)
        if not changed or watch is not self._watch:
            return
        (known,) = (one for one in watch.health.filters if one.shape == shape)
        name = watch.collection.info.name
        how = known.reason or f"routed, with {known.widen:g} times the share of the keys"
        _log.info(
            "Searches of %r under filters such as %s: %s, after %d samples.",
            name,
            shape,
            how,
            known.samples,
            extra={"amips_event": "filter", "amips_collection": name, "amips_reason": how},
        )

    def _compare(self, watch: Watch) -> None:
        if watch.reference is None or len(watch.live) < WINDOW:
            return
        live, watch.live = watch.live, {}
        queries = np.stack(list(live.values())[:WINDOW])
        try:
            outputs = outputs_of(watch.hook, queries)
            drift = None if outputs is None else compare(watch.reference, outputs)
        except Exception as exc:  # noqa: BLE001 - as above
            self._fails(exc)
            return
        if drift is not None:
            self._weigh(watch, lambda gate: gate.add_drift(drift))

    def _weigh(self, watch: Watch, weigh: Callable[[Gate], None]) -> None:
        """Show the gate something, and say what follows from it."""
        with STEADY:
            before = watch.health
            weigh(watch.gate)
            watch.health = replace(watch.gate.health, filters=watch.filters.summary())
        if watch is not self._watch:
            return  # it has been replaced: what it shows is nobody's news
        fell = [NATIVE_FELL in health.reasons for health in (before, watch.health)]
        if watch.health.widen != before.widen or fell[0] != fell[1]:
            self._announce(watch, before)
        self._tell("on_health", watch.health)

    def _announce(self, watch: Watch, before: Health) -> None:
        """Log a change of state, with the recall that was measured in the state before."""
        name, health = watch.collection.info.name, watch.health
        times = f" {health.widening:g} times" if health.state == "widened" else ""
        seen = before.recall
        fell = NATIVE_FELL in health.reasons and seen is not None
        better = health.widen < before.widen or NATIVE_FELL in before.reasons
        _log.log(
            logging.INFO if better else logging.WARNING,
            "The router of %r is %s%s%s%s.",
            name,
            health.state,
            times,
            "".join(f"; {reason}" for reason in health.reasons),
            f": recall {seen.mean:.3f} of {seen.n} sampled searches" if fell and seen else "",
            extra={
                "amips_collection": name,
                "amips_state": health.state,
                "amips_reasons": health.reasons,
                "amips_recall": None if before.recall is None else before.recall.mean,
                "amips_drift_p": None if health.drift is None else health.drift.p_value,
                "amips_overflow": health.overflow,
            },
        )
        self._tell("on_change", health)

    def _tell(self, name: str, health: Health) -> None:
        listener = self._listeners[name]
        if listener is None:
            return
        try:
            listener(health)
        except Exception as exc:  # noqa: BLE001 - a listener's fault is not the searches'
            if name not in self._failed:
                self._failed.add(name)
                _log.warning("%s fails, and is called on all the same: %s", name, exc)

    def _fails(self, exc: Exception) -> None:
        name = type(exc).__name__
        self.failures[name] += 1
        if self.failures[name] == 1:
            _log.warning("A sampled search cannot be repeated: %s: %s", name, exc)
