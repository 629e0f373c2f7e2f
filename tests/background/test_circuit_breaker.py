from __future__ import annotations

import threading

import pytest

from amips_plugins.background import circuit_breaker as breaker
from amips_plugins.background.circuit_breaker import Breaker


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(breaker, "time", clock)
    return clock


def opened(failures: int = 3) -> Breaker:
    made = Breaker(failures, rest=1.0, longest=6.0)
    for _ in range(failures):
        made.fail()
    return made


@pytest.mark.usefixtures("clock")
def test_it_opens_after_failures_in_a_row_only() -> None:
    made = Breaker(3)
    for _ in range(10):
        assert not made.fail()
        assert not made.fail()
        assert not made.succeed()  # it was not open, so nothing closes
        assert made.closed
    assert [made.fail() for _ in range(3)] == [False, False, True]
    assert not made.closed
    assert not made.allows()


def test_one_trial_in_every_rest(clock: Clock) -> None:
    made = opened()
    clock.now += 0.99
    assert not made.allows()
    clock.now += 0.02
    assert [made.allows() for _ in range(5)] == [True, False, False, False, False]
    clock.now += 1.01  # the trial never came back
    assert [made.allows() for _ in range(2)] == [True, False]


def test_failed_trials_lengthen_the_rest(clock: Clock) -> None:
    made = opened()
    for rest in (1.0, 2.0, 4.0, 6.0, 6.0):
        clock.now += rest - 0.01
        assert not made.allows()
        clock.now += 0.02
        assert made.allows()
        assert not made.fail()  # it was open already
    assert not made.closed


def test_a_success_closes_it_and_forgets(clock: Clock) -> None:
    made = opened()
    clock.now += 1.01
    assert made.allows()
    assert made.succeed()
    assert made.closed
    assert all(made.allows() for _ in range(3))
    assert not made.fail()
    assert not made.fail()
    assert made.fail()
    clock.now += 1.01  # the first rest again
    assert made.allows()


def test_a_clock_that_jumps_back_is_waited_for_no_longer_than_it_jumped(clock: Clock) -> None:
    made = opened()
    clock.now -= 1.0
    assert not made.allows()
    clock.now += 2.01
    assert made.allows()


def test_many_threads_get_one_trial(clock: Clock) -> None:
    made = opened()
    clock.now += 1.01
    barrier, allowed = threading.Barrier(16), []

    def ask() -> None:
        barrier.wait()
        allowed.append(made.allows())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(allowed) == 1
