from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from amips_plugins.health.drift import Drift
from amips_plugins.health.gate import SLACK, WIDEN, Gate, RecallAgainstTarget, Shadow, State

NO_DRIFT, DRIFT = Drift(0.5, 500), Drift(1e-6, 500)


def clock() -> Iterable[datetime]:
    start = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return (start + timedelta(seconds=second) for second in itertools.count())


def gate(*, widens: bool = True) -> Gate:
    times = iter(clock())
    return Gate(widens=widens, now=lambda: next(times))


def state_of(watched: Gate) -> str:
    return watched.state


class Traffic:
    """Queries whose recall is so on average in each state; tells a gate of samples of them."""

    def __init__(self, of: Gate, *, target: float = 0.9, relative: bool = False, seed: int = 0):
        self.gate = of
        self.target = target
        self.relative = relative
        self.rng = np.random.default_rng(seed)

    def recall(self, mean: float) -> float:
        return float(self.rng.binomial(10, mean) / 10)

    def run(self, n: int, mean: Mapping[State, float], until: State | None = None) -> int:
        """Pass up to so many samples, and return how many it took to reach a state."""
        for at in range(1, n + 1):
            state = self.gate.state
            served = RecallAgainstTarget(self.recall(mean[state]), self.target, state != "healthy")
            better = self.gate.better
            tried = None
            if better is not None:
                relative = self.relative or better != "healthy"
                tried = RecallAgainstTarget(self.recall(mean[better]), self.target, relative)
            self.gate.add_shadow(Shadow(state, served, tried))
            if self.gate.state == until:
                return at
        assert until is None, self.gate.state
        return n


GOOD: dict[State, float] = {"healthy": 0.95, "widened": 0.99, "native": 1.0}
WORSE: dict[State, float] = {"healthy": 0.75, "widened": 0.97, "native": 1.0}
BAD: dict[State, float] = {"healthy": 0.3, "widened": 0.5, "native": 1.0}


def test_a_good_router_stays_healthy() -> None:
    watched = gate()
    Traffic(watched).run(5000, GOOD)
    health = watched.health
    assert (health.state, health.reasons, health.widen) == ("healthy", (), 1.0)
    assert health.since == "2026-01-01T00:00:00+00:00"
    assert health.recall is not None
    assert health.recall.n == 1000
    assert health.recall.low <= 0.95 <= health.recall.high


def test_a_router_that_falls_below_its_target_is_widened() -> None:
    watched = gate()
    traffic = Traffic(watched)
    traffic.run(1000, GOOD)
    assert traffic.run(100, WORSE, "widened") < 100
    health = watched.health
    assert health.reasons == ("recall is below its target",)
    assert (health.widen, health.since) == (WIDEN, "2026-01-01T00:00:01+00:00")
    assert health.recall is None  # nothing has been answered in this state yet
    traffic.run(3000, WORSE)
    assert state_of(watched) == "widened"


def test_where_widening_does_not_help_the_native_search_takes_over() -> None:
    watched = gate()
    traffic = Traffic(watched)
    traffic.run(50, BAD, "widened")
    traffic.run(100, BAD, "native")
    assert watched.health.widen == math.inf
    traffic.run(3000, BAD)
    assert state_of(watched) == "native"
    traffic.run(300, GOOD, "widened")  # mended: tried off the path, and better again
    traffic.run(500, GOOD, "healthy")
    assert watched.health.reasons == ()


def test_coming_back_asks_for_the_target_less_the_slack() -> None:
    for mean, comes_back in ((0.9, True), (0.9 - 3 * SLACK, False)):
        watched = gate()
        traffic = Traffic(watched)
        traffic.run(100, WORSE, "widened")
        steps = 3000
        for _ in range(steps):
            better = RecallAgainstTarget(traffic.recall(mean), 0.9)
            watched.add_shadow(
                Shadow("widened", RecallAgainstTarget(1.0, 0.9, relative=True), better)
            )
            if state_of(watched) == "healthy":
                break
        assert (state_of(watched) == "healthy") is comes_back


def test_what_was_answered_in_another_state_does_not_count() -> None:
    watched = gate()
    for _ in range(100):
        watched.add_shadow(Shadow("widened", RecallAgainstTarget(0.0, 0.9)))
    assert state_of(watched) == "healthy"
    assert watched.health.recall is None


def test_false_alarms_at_the_target_are_rare() -> None:
    samples, alarms = 0, 0
    for seed in range(6):
        watched = gate()
        at_target: dict[State, float] = {"healthy": 0.9, "widened": 0.99, "native": 1.0}
        traffic = Traffic(watched, seed=seed)
        for _ in range(5000):
            traffic.run(1, at_target)
            if state_of(watched) != "healthy":
                alarms += 1
                break
            samples += 1
    assert alarms <= max(1.0, 3 * samples * 1e-4)


def test_a_keynet_has_nothing_to_widen() -> None:
    watched = gate(widens=False)
    traffic = Traffic(watched, relative=True)
    traffic.run(100, {"healthy": 0.5, "native": 1.0}, "native")
    assert watched.better == "healthy"
    traffic.run(500, {"healthy": 0.97, "native": 1.0}, "healthy")
    watched.add_drift(DRIFT)
    assert state_of(watched) == "native"
    watched.add_drift(NO_DRIFT)
    assert state_of(watched) == "healthy"


def test_drift_widens_until_a_window_shows_none() -> None:
    watched = gate()
    watched.add_drift(DRIFT)
    assert watched.health.reasons == ("queries differ from those trained on",)
    assert state_of(watched) == "widened"
    Traffic(watched).run(20, GOOD)
    assert state_of(watched) == "widened"
    watched.add_drift(NO_DRIFT)
    assert (state_of(watched), watched.health.drift) == ("healthy", NO_DRIFT)


def test_drift_that_costs_no_recall_is_let_be() -> None:
    watched = gate()
    watched.add_drift(DRIFT)
    traffic = Traffic(watched)
    traffic.run(1000, GOOD, "healthy")
    watched.add_drift(DRIFT)  # still the same drift
    assert (state_of(watched), watched.health.reasons) == ("healthy", ())
    watched.add_drift(NO_DRIFT)
    watched.add_drift(DRIFT)  # another one
    assert state_of(watched) == "widened"


def test_drift_does_not_make_the_native_search_worse() -> None:
    watched = gate()
    traffic = Traffic(watched)
    traffic.run(300, BAD, "native")
    watched.add_drift(DRIFT)
    assert state_of(watched) == "native"
    traffic.run(500, GOOD, "widened")
    assert len(watched.health.reasons) == 2  # that it is good as planned has yet to be shown


def test_overflow_above_the_break_even_is_native() -> None:
    watched = gate()
    watched.add_overflow(0.4, 0.4)
    assert state_of(watched) == "healthy"
    watched.add_overflow(0.41, 0.4)
    assert (state_of(watched), watched.better) == ("native", None)
    assert watched.health.overflow == 0.41
    (reason,) = watched.health.reasons
    assert "dearer" in reason
    Traffic(watched).run(500, GOOD)
    watched.add_overflow(0.37, 0.4)  # around the break-even it does not switch to and fro
    assert state_of(watched) == "native"
    watched.add_overflow(0.35, 0.4)
    assert state_of(watched) == "healthy"


def test_after_the_overflow_is_gone_it_is_as_bad_as_before() -> None:
    watched = gate()
    Traffic(watched).run(100, WORSE, "widened")
    watched.add_overflow(0.9, 0.4)
    assert state_of(watched) == "native"
    assert len(watched.health.reasons) == 2
    watched.add_overflow(0.0, 0.4)
    assert state_of(watched) == "widened"


def test_a_target_of_one_does_not_divide_by_zero() -> None:
    watched = gate()
    for _ in range(100):
        watched.add_shadow(Shadow("healthy", RecallAgainstTarget(1.0, 1.0)))
    assert state_of(watched) == "healthy"
    for _ in range(10):
        watched.add_shadow(Shadow("healthy", RecallAgainstTarget(0.9, 1.0)))
    assert state_of(watched) == "widened"


@pytest.mark.parametrize("target", [0.0, 0.005, 0.5, 1.0])
def test_any_evidence_can_be_weighed(target: float) -> None:
    rng = np.random.default_rng(0)
    watched = gate()
    for _ in range(500):
        served, better = (
            RecallAgainstTarget(float(rng.random()), target, bool(rng.random() < 0.5))
            for _ in range(2)
        )
        watched.add_shadow(Shadow(watched.state, served, better))
    assert state_of(watched) in ("healthy", "widened", "native")
