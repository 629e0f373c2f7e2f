"""The never-worse gate: which way to search the evidence allows.

=========  =====================================================================
state      a search
=========  =====================================================================
healthy    as planned
widened    through the cells that hold ``WIDEN`` times the share of the keys
native     as the database does by itself
=========  =====================================================================

Three things are looked at, and the worst of them decides:

- **Recall** of sampled answers against exact ones. Significantly below its target, the router goes
  one state down; while it is down, the next better state is tried off the callers' path, and when
  its recall is significantly good it goes back up.
- **Drift** of the queries keeps a router from being healthy until a later window shows none, or
  until the recall that searching as planned would have has proven good all the same.
- **Overflow** above the collection's break-even: then every routed search costs more than a full
  one, and the native search answers until there is less.

A KeyNet has nothing to widen: with it the gate has two states, healthy and native.
"""

from __future__ import annotations

import math
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
    "SLACK",
    "WIDEN",
    "Gate",
    "Health",
    "RecallAgainstTarget",
    "Shadow",
    "State",
    "factor",
]

State = Literal["healthy", "widened", "native"]

WIDEN = 4.0
"""How many times the share of the keys a widened search looks at."""

FALSE_FALL = 1e-4
"""While recall is on target or above, false alarms are at least 1 / this many samples apart."""

FALSE_RISE = 1e-3
"""The same of going back up while recall is ``SLACK`` below its target or worse."""

SLACK = 0.01
"""Recall by which a better state may miss the target and still count as good: proving a recall to
be on a target that it just reaches would take for ever."""

_LEAST_LOSS = 0.01  # for a target of 1, which nothing can exceed
_BACK = 0.9  # of the break-even: overflow around it must not switch to and fro


@dataclass(frozen=True, slots=True)
class RecallAgainstTarget:
    """Recall of one answer, and what it has to be on average.

    Attributes
    ----------
    recall
        What was found.
    target
        What has to be.
    relative
        Whether the target was taken from what the native search found for the same query.
    """

    recall: float
    target: float
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Shadow:
    """What one sampled query showed.

    Attributes
    ----------
    state
        The state in which it was answered.
    served
        The answer that the caller got.
    better
        What the next better state would have given; None where it was not tried.
    """

    state: State
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
    """

    state: State
    since: str
    reasons: tuple[str, ...] = ()
    recall: Recall | None = None
    drift: Drift | None = None
    overflow: float | None = None
    filters: tuple[FilterClass, ...] = ()

    @property
    def widen(self) -> float:
        """What ``Target.widen`` has to be: 1, ``WIDEN``, or infinity for the native search.

        A search with ``n_probes`` of the caller's own is none of the gate's business.
        """
        return factor(self.state)


def factor(state: State) -> float:
    """Return how many times the planned share of the keys a state searches."""
    return {"healthy": 1.0, "widened": WIDEN, "native": math.inf}[state]


class Gate:
    """Takes evidence and says which way to search. It asks nobody and knows no time but a date.

    Attributes
    ----------
    state
        Which way to search now.
    """

    def __init__(
        self,
        *,
        widens: bool,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self._states: tuple[State, ...] = (
            ("healthy", "widened", "native") if widens else ("healthy", "native")
        )
        self._now = now
        self._recall_asks: State = "healthy"
        self._drifts = self._excused = self._overflows = False
        self._drift: Drift | None = None
        self._overflow: float | None = None
        self.state: State = "healthy"
        self._begin()

    @property
    def better(self) -> State | None:
        """The state to try off the callers' path; None if there is none, or it could not help."""
        if self._overflows or self.state == "healthy":
            return None
        return self._states[self._states.index(self.state) - 1]

    @property
    def health(self) -> Health:
        """What there is to say now."""
        reasons = (
            ("recall is below its target", self._recall_asks != "healthy"),
            ("queries differ from those trained on", self._drifts and not self._excused),
            ("keys without a cell make routing dearer than a full scan", self._overflows),
        )
        return Health(
            state=self.state,
            since=self._since,
            reasons=tuple(text for text, true in reasons if true),
            recall=self._window.summary(),
            drift=self._drift,
            overflow=self._overflow,
        )

    def add_shadow(self, shadow: Shadow) -> None:
        """Weigh a sampled query; one that was answered in another state says nothing of this."""
        if shadow.state != self.state:
            return
        served, better = shadow.served, shadow.better
        self._window.add(served.recall)
        if self.state != "native":
            # The bound of a bet has to be known before the value it is made on.
            most = 1.0 if served.relative else max(1.0 - served.target, _LEAST_LOSS)
            if self._falls.add(served.target - served.recall, most):
                self._recall_asks = self._states[self._states.index(self.state) + 1]
                self._settle()
                return
        if better is not None and self.better is not None:
            enough = max(better.target - SLACK, 0.0)
            most = 1.0 if better.relative else max(enough, _LEAST_LOSS)
            if self._rises.add(better.recall - enough, most):
                self._recall_asks = self.better
                # Proven in spite of the drift: only another drift after this one counts again.
                self._excused = self._drifts and self.better == "healthy"
                self._settle()

    def add_drift(self, drift: Drift) -> None:
        """Weigh a window of live queries."""
        self._drift, self._drifts = drift, drift.found
        if not drift.found:
            self._excused = False
        self._settle()

    def add_overflow(self, share: float, break_even: float) -> None:
        """Weigh the share of keys without a cell."""
        self._overflow = share
        self._overflows = share > (_BACK * break_even if self._overflows else break_even)
        self._settle()

    def _settle(self) -> None:
        """Take the worst state that anything asks for."""
        asked: list[State] = [self._recall_asks]
        if self._drifts and not self._excused:
            asked.append(self._states[1])
        if self._overflows:
            asked.append("native")
        state = max(asked, key=self._states.index)
        if state != self.state:
            self.state = state
            self._begin()

    def _begin(self) -> None:
        """Start a state: what was seen in the one before says nothing of it."""
        self._since = self._now().isoformat(timespec="seconds")
        self._falls = Detector(FALSE_FALL)
        self._rises = Detector(FALSE_RISE)
        self._window = RecallWindow()
