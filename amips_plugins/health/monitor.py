"""Watching live searches: a few are repeated exactly, on a thread of its own."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from amips_plugins.background.process_end import at_work, is_ending
from amips_plugins.bundle.reference import Reference
from amips_plugins.collection import Collection
from amips_plugins.errors import InvalidInput
from amips_plugins.health.drift import WINDOW, compare, outputs_of
from amips_plugins.health.gate import Gate, Health
from amips_plugins.health.recall import Recall
from amips_plugins.health.shadow_search import Sample, examine, widens
from amips_plugins.plan import PreQueryHook
from amips_plugins.vectors import FloatArray

__all__ = ["HealthMonitor"]

_log = logging.getLogger("amips_plugins")
_WAITING = 4  # samples; more would be stale, and memory
_WEIGHING = threading.Lock()  # one for all, held for moments: a fork waits until nobody has it

Listener = Callable[[Health], object]


@dataclass(frozen=True)
class _Watched:
    """What is watched from one start to the next."""

    collection: Collection
    hook: PreQueryHook
    reference: Reference | None
    gate: Gate
    live: deque[FloatArray] = field(default_factory=lambda: deque(maxlen=WINDOW))


class HealthMonitor:
    """Samples the searches of one router, and says which way to search.

    The caller's path pays for a random number; a chosen search also for a copy of its vector. The
    rest happens on a daemon thread that lives no longer than the work, one at a time.

    Parameters
    ----------
    share
        Share of the queries that are searched again to measure recall, each once exactly and up to
        twice in other ways.
    at_most_every
        Seconds from one of those to the next at the least, however many queries there are.
    at_most_busy
        Share of the time that the database may be kept busy with those searches: after one that
        took a second there is a rest of 19 by default. An exact search of a large collection is
        dear.
    drift_share
        Share of the queries whose vectors are compared with the bundle's reference, 500 at a time;
        the database is not asked.
    timeout
        Seconds the database may take for each search.
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
        self._listeners = {"on_change": on_change, "on_health": on_health}
        self._failed: set[str] = set()
        self._watched: _Watched | None = None
        self._health: Health | None = None
        self._rate = 0.0  # of the queries chosen, for either purpose
        self._due = 0.0
        self._begin_threads()
        _LIVE.add(self)

    @property
    def health(self) -> Health | None:
        """How the router does; None while there is nothing to watch."""
        return self._health

    def start_over(
        self,
        collection: Collection,
        hook: PreQueryHook | None,
        reference: Reference | None = None,
    ) -> None:
        """Watch another generation or model, healthy until shown otherwise.

        Parameters
        ----------
        collection, hook
            What searches from now on; samples of anything else are left aside. None: nothing
            plans, so there is nothing to watch.
        reference
            The bundle's; None leaves drift unknown.
        """
        watched = None
        if hook is not None:
            gate = Gate(widens=widens(hook))
            watched = _Watched(collection, hook, reference, gate)
        health = None if watched is None else watched.gate.health
        with _WEIGHING:
            before, self._watched, self._health = self._health, watched, health
            drift_share = self._drift_share if reference is not None else 0.0
            self._rate = 0.0 if watched is None else max(self._share, drift_share)
        if watched is None or health is None:
            return
        if before is not None and before.state != "healthy":
            self._announce(watched, health, before.recall)
        self._tell("on_health", health)

    def chosen(self, n_queries: int = 1) -> bool:
        """Flip the coin for a call of so many queries: whether to pass one of them to ``sample``.

        Ask it only of searches without a filter and without ``n_probes``: of others nothing was
        promised.
        """
        return random.random() < self._rate * n_queries  # noqa: S311 - a sample, no secret

    def sample(self, sample: Sample) -> None:
        """Take a chosen query over; its vector is copied, and the call does not wait.

        What comes faster than it can be looked at is left aside.
        """
        watched = self._of(sample)
        if watched is None or self._rate <= 0.0:
            return
        coin = random.random() * self._rate  # noqa: S311 - as above
        if watched.reference is not None and coin < self._drift_share:
            watched.live.append(np.array(sample.query, dtype=np.float32))
        if coin < self._share and len(self._queue) < _WAITING:
            now = time.monotonic()
            if now >= self._due:
                self._due = now + self._every
                query = np.array(sample.query, dtype=np.float32)
                self._queue.append(replace(sample, query=query))
        self._look()

    def add_overflow(self, share: float, break_even: float) -> None:
        """Say how many keys have no cell (see ``Gate.add_overflow``)."""
        watched = self._watched
        if watched is not None:
            self._weigh(watched, lambda gate: gate.add_overflow(share, break_even))

    def idle(self, timeout: float) -> bool:
        """Wait until there is nothing left to look at; tell whether that came to pass."""
        deadline = time.monotonic() + timeout
        while self._queue or self._busy.locked():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        return True

    def _of(self, sample: Sample) -> _Watched | None:
        """Return what is watched, if the sample is of it."""
        watched = self._watched
        if watched is None:
            return None
        same = sample.hook is watched.hook and sample.collection is watched.collection
        return watched if same else None

    def _look(self) -> None:
        """Start the thread if there is work and it is not at it."""
        watched = self._watched
        full = watched is not None and len(watched.live) >= WINDOW
        work = (self._queue or full) and not is_ending()
        if not work or not self._busy.acquire(blocking=False):
            return
        try:
            threading.Thread(target=self._run, name="amips-watch", daemon=True).start()
        except RuntimeError:  # no thread to be had, or the interpreter is ending: another time
            self._busy.release()

    def _run(self) -> None:
        with at_work():
            try:
                while self._queue and not is_ending():
                    self._examine(self._queue.popleft())
                if not is_ending():
                    self._compare()
            finally:
                self._busy.release()
        if self._queue:  # it came between the last look and the release
            self._look()

    def _examine(self, sample: Sample) -> None:
        watched = self._of(sample)
        if watched is None or sample.state != watched.gate.state:
            return
        started = time.monotonic()
        try:
            shadow = examine(sample, watched.gate.better, self._timeout)
        except Exception as exc:  # noqa: BLE001 - whatever a database raises, no caller waits for this
            self._fails(exc)
            return
        finally:
            now = time.monotonic()
            self._due = max(self._due, now) + self._rest * (now - started)
        if shadow is not None:
            self._weigh(watched, lambda gate: gate.add_shadow(shadow))

    def _compare(self) -> None:
        watched = self._watched
        if watched is None or watched.reference is None or len(watched.live) < WINDOW:
            return
        queries = np.stack([watched.live.popleft() for _ in range(WINDOW)])
        try:
            outputs = outputs_of(watched.hook, queries)
            drift = None if outputs is None else compare(watched.reference, outputs)
        except Exception as exc:  # noqa: BLE001 - as above
            self._fails(exc)
            return
        if drift is not None:
            self._weigh(watched, lambda gate: gate.add_drift(drift))

    def _weigh(self, watched: _Watched, weigh: Callable[[Gate], None]) -> None:
        """Show the gate something, and say what follows from it."""
        with _WEIGHING:
            if watched is not self._watched:
                return
            before = self._health
            weigh(watched.gate)
            self._health = health = watched.gate.health
        if before is None or health.state != before.state:
            self._announce(watched, health, None if before is None else before.recall)
        self._tell("on_health", health)

    def _announce(self, watched: _Watched, health: Health, recall: Recall | None) -> None:
        """Log a change of state, with the recall that was measured in the state before."""
        name, drift = watched.collection.info.name, health.drift
        _log.log(
            logging.INFO if health.state == "healthy" else logging.WARNING,
            "The router of %r is %s%s.",
            name,
            health.state,
            "".join(f"; {reason}" for reason in health.reasons),
            extra={
                "amips_collection": name,
                "amips_state": health.state,
                "amips_reasons": health.reasons,
                "amips_recall": None if recall is None else recall.mean,
                "amips_drift_p": None if drift is None else drift.p_value,
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

    def _begin_threads(self) -> None:
        self._busy = threading.Lock()
        self._queue: deque[Sample] = deque()


_LIVE: weakref.WeakSet[HealthMonitor] = weakref.WeakSet()


def _in_child() -> None:
    """Give a forked process threads of its own; the state of its parent goes with it."""
    _WEIGHING.release()
    for watch in list(_LIVE):
        watch._begin_threads()


os.register_at_fork(
    before=_WEIGHING.acquire,
    after_in_parent=_WEIGHING.release,
    after_in_child=_in_child,
)
