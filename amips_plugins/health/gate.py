"""The never-worse gate: which way to search the evidence allows.

=========  =====================================================================
state      a search
=========  =====================================================================
healthy    as planned
widened    through the cells that hold 1.5, 2.5 or 4 times the share of the keys
native     as the database does by itself
=========  =====================================================================

Three things are looked at, and the worst of them decides:

- **Recall** of sampled answers against exact ones. Significantly below its target, the router
  searches wider by as much as what it misses exceeds what it may miss, and where that does not do,
  natively; meanwhile the next narrower search is tried off the callers' path, and when its recall
  is significantly good it takes over.
- **Drift** of the queries alone costs nothing: it has recall decide sooner, by more samples and a
  test that takes less to believe it. Only where recall is not measured it widens, by the least
  there is, until a later window shows none.
- **Overflow** above the collection's break-even: then every routed search costs more than a full
  one, and the native search answers until there is less.

A KeyNet has nothing to widen: with it the gate has two states, healthy and native. A tuned bundle
searches natively in every state: its widest search has nothing behind it, and where that misses the
target, the gate says so.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

from amips_plugins.health.change_detector import Detector
from amips_plugins.health.drift import Drift
from amips_plugins.health.filters import FilterClass
from amips_plugins.health.recall import Recall, RecallWindow

__all__ = [
    "FALSE_FALL",
    "FALSE_RISE",
    "NATIVE_FELL",
    "SLACK",
    "WIDENINGS",
    "Gate",
    "Health",
    "RecallAgainstTarget",
    "Shadow",
    "State",
    "state_of",
]

State = Literal["healthy", "widened", "native"]

WIDENINGS = (1.5, 2.5, 4.0)
"""How many times the planned share of the keys a widened search looks at."""

FALSE_FALL = 1e-4
"""While recall is on target or above, false alarms are at least 1 / this many samples apart."""

FALSE_RISE = 1e-3
"""The same of going back up while recall is ``SLACK`` below its target or worse; and of going down
while the queries differ from those trained on."""

SLACK = 0.01
"""Recall by which a better state may miss the target and still count as good: proving a recall to
be on a target that it just reaches would take for ever."""

NATIVE_FELL = "the database's own search misses the target, however far it is searched"
"""The reason of a tuned bundle's router at its widest, where not even that does."""

_LATEST, _SUDDEN = 50, 20  # answers that say how much is missed, also where it began just now
_LEAST_LOSS = 0.01  # for a target of 1, which nothing can exceed
_BACK = 0.9  # of the break-even: overflow around it must not switch to and fro


@dataclass(frozen=True, slots=True)
class RecallAgainstTarget:
    """Recall of one answer, and what it has to be on average.

    That is ``relative`` where it was taken from what the native search found for the same query.
    """

    recall: float
    target: float
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Shadow:
    """What one sampled query showed, searched so wide (infinity natively), and as served.

    ``better`` is what the next narrower search would have given; None where it was not tried.
    """

    widen: float
    served: RecallAgainstTarget
    better: RecallAgainstTarget | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """How a router does.

    Attributes
    ----------
    state
        Which way it searches.
    since
        UTC time when that began, ISO 8601.
    reasons
        Why it is not healthy; empty when it is.
    recall
        Recall of the latest answers given in this state; None before the first.
    drift
        The latest window of live queries; None before the first, or without a reference.
    overflow
        Share of the keys without a cell, when last counted.
    filters
        What is known of each class of filters (see ``health.filters``), the latest sampled last.
    widening
        How many times the planned share of the keys a widened search looks at.
    """

    state: State
    since: str
    reasons: tuple[str, ...] = ()
    recall: Recall | None = None
    drift: Drift | None = None
    overflow: float | None = None
    filters: tuple[FilterClass, ...] = ()
    widening: float = WIDENINGS[-1]

    @property
    def widen(self) -> float:
        """What ``Target.widen`` has to be: 1, ``widening``, or infinity for the native search.

        A search with ``n_probes`` of the caller's own is none of the gate's business.
        """
        return {"healthy": 1.0, "widened": self.widening, "native": math.inf}[self.state]


def state_of(widen: float) -> State:
    """Return what a router is called that searches so wide."""
    if widen <= 1.0:
        return "healthy"
    return "native" if widen == math.inf else "widened"


class Gate:
    """Takes evidence and says which way to search. It asks nobody and knows no time but a date.

    ``widen`` is 1 as planned, infinity natively, which is no way out where the plan is ``native``
    itself; drift waits for recall where that is ``measured``.
    """

    def __init__(
        self,
        *,
        widens: bool,
        native: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        last: tuple[float, ...] = () if native else (math.inf,)
        self._steps: tuple[float, ...] = (1.0, *(WIDENINGS if widens else ()), *last)
        self._now = now
        self._recall_asks = 1.0
        self._drifts = self._proven = self._overflows = self._fell = False
        self._drift: Drift | None = None
        self._overflow: float | None = None
        self.measured = True
        self.widen = 1.0
        self._begin()

    def _begin(self) -> None:
        """Start a state: what was seen in the one before says nothing of it."""
        self._since = self._now().isoformat(timespec="seconds")
        self._falls = Detector(FALSE_FALL)
        self._rises = Detector(FALSE_RISE)
        self._recovers = Detector(FALSE_RISE)
        self._fell = False
        self._window = RecallWindow()
        self._latest: deque[RecallAgainstTarget] = deque(maxlen=_LATEST)

    @property
    def state(self) -> State:
        """Which way to search now."""
        return state_of(self.widen)

    @property
    def better(self) -> float | None:
        """How wide to search off the callers' path; None if it is narrow, or could not help."""
        if self._overflows or self.widen == 1.0:
            return None
        return self._steps[self._steps.index(self.widen) - 1]

    @property
    def in_doubt(self) -> bool:
        """Whether more samples would tell something: it is not healthy, or may not be."""
        return self.widen > 1.0 or (self._drifts and not self._proven)

    @property
    def health(self) -> Health:
        """What there is to say now."""
        reasons = (
            ("recall is below its target", self._recall_asks > 1.0 and not self._fell),
            (NATIVE_FELL, self._fell),
            ("queries differ from those trained on", self._drifts and self.widen > 1.0),
            ("keys without a cell make routing dearer than a full scan", self._overflows),
        )
        return Health(
            state=self.state,
            since=self._since,
            reasons=tuple(text for text, true in reasons if true),
            recall=self._window.summary(),
            drift=self._drift,
            overflow=self._overflow,
            widening=self.widen if self.state == "widened" else WIDENINGS[-1],
        )

    def add_shadow(self, shadow: Shadow) -> None:
        """Weigh a sampled query; one that was answered otherwise says nothing of this."""
        if shadow.widen != self.widen:
            return
        served, better = shadow.served, shadow.better
        self._window.add(served.recall)
        self._latest.append(served)
        if self.widen < math.inf:
            # The bound of a bet has to be known before the value it is made on.
            most = 1.0 if served.relative else max(1.0 - served.target, _LEAST_LOSS)
            if self._falls.add(served.target - served.recall, most):
                if self.widen == self._steps[-1]:
                    self._fell = True
                    self._falls = Detector(FALSE_FALL)
                    self._recovers = Detector(FALSE_RISE)
                    return
                self._recall_asks = self._wide_enough()
                self._proven = False
                self._settle()
                return
        if self._fell and self._recovers.add(*_gain(served)):
            self._fell = False
        if self._drifts and not self._proven and self.widen == 1.0:
            self._proven = self._rises.add(*_gain(served))
        elif better is not None and self.better is not None and self._rises.add(*_gain(better)):
            self._recall_asks = self.better
            self._settle()

    def add_drift(self, drift: Drift) -> None:
        """Weigh a window of live queries."""
        news = drift.found and not self._drifts
        self._drift, self._drifts = drift, drift.found
        if not drift.found:
            self._proven = False
        elif news and self.widen == 1.0:
            # What was seen before the queries changed says nothing of them.
            self._falls, self._rises = Detector(FALSE_RISE), Detector(FALSE_RISE)
        self._settle()

    def add_overflow(self, share: float, break_even: float) -> None:
        """Weigh the share of keys without a cell."""
        self._overflow = share
        if self._steps[-1] == math.inf:  # else cells have no part in a search
            self._overflows = share > (_BACK * break_even if self._overflows else break_even)
        self._settle()

    def _wide_enough(self) -> float:
        """Return how wide to search, by how many times as much is missed as may be."""
        wanted = 0.0
        for latest in (list(self._latest)[-_LATEST:], list(self._latest)[-_SUDDEN:]):
            missed = sum(1.0 - one.recall for one in latest)
            allowed = sum(max(1.0 - one.target, _LEAST_LOSS) for one in latest)
            wanted = max(wanted, self.widen * missed / allowed)
        wider = self._steps[self._steps.index(self.widen) + 1 :]
        enough = [step for step in wider if step >= wanted]
        if self._steps[-1] < math.inf:
            return enough[0] if enough else wider[-1]
        # Natively only where nothing wider is left: how much wider helps has yet to be seen.
        return min(enough[0], wider[-2]) if len(wider) > 1 else wider[0]

    def _settle(self) -> None:
        """Take the widest that anything asks for."""
        asked = [self._recall_asks]
        if self._drifts and not self.measured:
            asked.append(self._steps[1])
        if self._overflows:
            asked.append(self._steps[-1])
        if max(asked) != self.widen:
            self.widen = max(asked)
            self._begin()


def _gain(of: RecallAgainstTarget) -> tuple[float, float]:
    """Return by how much a recall is good enough, and the most by which it might not be."""
    enough = max(of.target - SLACK, 0.0)
    return of.recall - enough, 1.0 if of.relative else max(enough, _LEAST_LOSS)
