from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from amips_plugins.health.drift import Drift
from amips_plugins.health.gate import (
    NATIVE_FELL,
    SLACK,
    WIDENINGS,
    Gate,
    RecallAgainstTarget,
    Shadow,
    State,
    state_of,
)

NO_DRIFT, DRIFT = Drift(0.5, 500), Drift(1e-6, 500)


def clock() -> Iterable[datetime]:
    start = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return (start + timedelta(seconds=second) for second in itertools.count())


def gate(*, widens: bool = True, native: bool = False) -> Gate:
    times = iter(clock())
    return Gate(widens=widens, native=native, now=lambda: next(times))


def state(watched: Gate) -> str:
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
            widen, better = self.gate.widen, self.gate.better
            found = self.recall(mean[state_of(widen)])
            served = RecallAgainstTarget(found, self.target, widen != 1.0)
            tried = None
            if better is not None:
                relative = self.relative or better != 1.0
                found = self.recall(mean[state_of(better)])
                tried = RecallAgainstTarget(found, self.target, relative)
            self.gate.add_shadow(Shadow(widen, served, tried))
            if self.gate.state == until:
                return at
        assert until is None, self.gate.state
        return n


GOOD: dict[State, float] = {"healthy": 0.95, "widened": 0.99, "native": 1.0}
WORSE: dict[State, float] = {"healthy": 0.75, "widened": 0.97, "native": 1.0}
BAD: dict[State, float] = {"healthy": 0.3, "widened": 0.5, "native": 1.0}


def test_a_native_plan_is_widened_as_far_as_there_is_and_then_an_alarm() -> None:
    watched = gate(native=True)
    traffic = Traffic(watched)
    traffic.run(50, BAD, "widened")
    traffic.run(400, BAD)
    before = watched.health
    assert (before.state, before.widening) == ("widened", WIDENINGS[-1])
    assert before.reasons == (NATIVE_FELL,)
    traffic.run(600, {**GOOD, "healthy": 0.5})  # only as far as this it holds again
    assert NATIVE_FELL not in watched.health.reasons
    assert state(watched) == "widened"
    traffic.run(3000, GOOD, "healthy")
    assert watched.health.reasons == ()


def test_overflow_is_none_of_a_native_plans_business() -> None:
    watched = gate(native=True)
    watched.add_overflow(0.9, 0.3)
    assert (watched.state, watched.health.overflow) == ("healthy", 0.9)


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
    assert (health.widen, health.since) == (2.5, "2026-01-01T00:00:01+00:00")
    assert health.recall is None  # nothing has been answered in this state yet
    traffic.run(3000, WORSE)
    assert state(watched) == "widened"


@pytest.mark.parametrize(("recall", "widen"), [(0.87, 1.5), (0.8, 2.5), (0.5, 4.0)])
def test_it_widens_by_what_is_missed(recall: float, widen: float) -> None:
    for seed in range(5):
        watched = gate()
        traffic = Traffic(watched, seed=seed)
        traffic.run(500, GOOD)
        traffic.run(2000, {**GOOD, "healthy": recall}, "widened")
        near = WIDENINGS.index(watched.widen) - WIDENINGS.index(widen)
        assert abs(near) <= 1  # so few answers say no more
        assert watched.health.widening == watched.widen


def test_it_narrows_step_by_step_to_what_is_wide_enough() -> None:
    """As planned it misses; 1.5 times as wide it does not."""
    watched, rng = gate(), np.random.default_rng(0)

    def found(widen: float) -> RecallAgainstTarget:
        mean = 0.5 if widen == 1.0 else 0.97
        return RecallAgainstTarget(float(rng.binomial(10, mean) / 10), 0.9, widen != 1.0)

    seen = []
    for _ in range(3000):
        better = None if watched.better is None else found(watched.better)
        watched.add_shadow(Shadow(watched.widen, found(watched.widen), better))
        if watched.widen not in seen:
            seen.append(watched.widen)
    assert seen == [1.0, 4.0, 2.5, 1.5]
    assert watched.widen == 1.5


def test_where_widening_does_not_help_the_native_search_takes_over() -> None:
    watched = gate()
    traffic = Traffic(watched)
    traffic.run(50, BAD, "widened")
    traffic.run(100, BAD, "native")
    assert watched.health.widen == math.inf
    traffic.run(3000, BAD)
    assert state(watched) == "native"
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
                Shadow(watched.widen, RecallAgainstTarget(1.0, 0.9, relative=True), better)
            )
            if state(watched) == "healthy":
                break
        assert (state(watched) == "healthy") is comes_back


def test_what_was_answered_in_another_state_does_not_count() -> None:
    watched = gate()
    for _ in range(100):
        watched.add_shadow(Shadow(4.0, RecallAgainstTarget(0.0, 0.9)))
    assert state(watched) == "healthy"
    assert watched.health.recall is None


def test_false_alarms_at_the_target_are_rare() -> None:
    samples, alarms = 0, 0
    for seed in range(6):
        watched = gate()
        at_target: dict[State, float] = {"healthy": 0.9, "widened": 0.99, "native": 1.0}
        traffic = Traffic(watched, seed=seed)
        for _ in range(5000):
            traffic.run(1, at_target)
            if state(watched) != "healthy":
                alarms += 1
                break
            samples += 1
    assert alarms <= max(1.0, 3 * samples * 1e-4)


def test_a_keynet_has_nothing_to_widen() -> None:
    watched = gate(widens=False)
    traffic = Traffic(watched, relative=True)
    traffic.run(100, {"healthy": 0.5, "native": 1.0}, "native")
    assert watched.better == 1.0
    traffic.run(500, {"healthy": 0.97, "native": 1.0}, "healthy")
    watched.measured = False
    watched.add_drift(DRIFT)
    assert state(watched) == "native"
    watched.add_drift(NO_DRIFT)
    assert state(watched) == "healthy"


def test_drift_alone_costs_nothing() -> None:
    watched = gate()
    watched.add_drift(DRIFT)
    assert (watched.health.reasons, watched.in_doubt) == ((), True)
    for _ in range(20):
        Traffic(watched).run(50, GOOD)
        watched.add_drift(DRIFT)
    assert state(watched) == "healthy"
    assert not watched.in_doubt  # recall has proven good all the same
    watched.add_drift(NO_DRIFT)
    assert (watched.in_doubt, watched.health.drift) == (False, NO_DRIFT)
    watched.add_drift(DRIFT)  # another one
    assert watched.in_doubt


def test_recall_decides_sooner_where_queries_drift() -> None:
    took = {}
    for drift in (NO_DRIFT, DRIFT):
        took[drift] = 0
        for seed in range(20):
            watched = gate()
            watched.add_drift(drift)
            took[drift] += Traffic(watched, seed=seed).run(3000, WORSE, "widened")
            assert len(watched.health.reasons) == (2 if drift is DRIFT else 1)
    assert took[DRIFT] < 0.9 * took[NO_DRIFT]


def test_where_recall_is_not_measured_drift_widens_by_the_least() -> None:
    watched = gate()
    watched.measured = False
    watched.add_drift(DRIFT)
    assert watched.health.reasons == ("queries differ from those trained on",)
    assert (state(watched), watched.widen) == ("widened", WIDENINGS[0])
    watched.add_drift(NO_DRIFT)
    assert (state(watched), watched.health.drift) == ("healthy", NO_DRIFT)


def test_drift_does_not_make_the_native_search_worse() -> None:
    watched = gate()
    traffic = Traffic(watched)
    traffic.run(300, BAD, "native")
    watched.add_drift(DRIFT)
    assert state(watched) == "native"
    traffic.run(500, GOOD, "widened")
    assert len(watched.health.reasons) == 2  # that it is good as planned has yet to be shown


def test_overflow_above_the_break_even_is_native() -> None:
    watched = gate()
    watched.add_overflow(0.4, 0.4)
    assert state(watched) == "healthy"
    watched.add_overflow(0.41, 0.4)
    assert (state(watched), watched.better) == ("native", None)
    assert watched.health.overflow == 0.41
    (reason,) = watched.health.reasons
    assert "dearer" in reason
    Traffic(watched).run(500, GOOD)
    watched.add_overflow(0.37, 0.4)  # around the break-even it does not switch to and fro
    assert state(watched) == "native"
    watched.add_overflow(0.35, 0.4)
    assert state(watched) == "healthy"


def test_after_the_overflow_is_gone_it_is_as_bad_as_before() -> None:
    watched = gate()
    Traffic(watched).run(100, WORSE, "widened")
    watched.add_overflow(0.9, 0.4)
    assert state(watched) == "native"
    assert len(watched.health.reasons) == 2
    watched.add_overflow(0.0, 0.4)
    assert state(watched) == "widened"


def test_a_target_of_one_does_not_divide_by_zero() -> None:
    watched = gate()
    for _ in range(100):
        watched.add_shadow(Shadow(1.0, RecallAgainstTarget(1.0, 1.0)))
    assert state(watched) == "healthy"
    for _ in range(10):
        watched.add_shadow(Shadow(1.0, RecallAgainstTarget(0.9, 1.0)))
    assert state(watched) == "widened"


@pytest.mark.parametrize("target", [0.0, 0.005, 0.5, 1.0])
def test_any_evidence_can_be_weighed(target: float) -> None:
    rng = np.random.default_rng(0)
    watched = gate()
    for _ in range(500):
        served, better = (
            RecallAgainstTarget(float(rng.random()), target, bool(rng.random() < 0.5))
            for _ in range(2)
        )
        watched.add_shadow(Shadow(watched.widen, served, better))
    assert state(watched) in ("healthy", "widened", "native")
