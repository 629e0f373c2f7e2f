"""Searches of cells leave a limited number of reads to others."""

from __future__ import annotations

import threading

import pytest
from qdrant_client import models

from amips_plugins.adapters.qdrant import read_budget
from amips_plugins.adapters.qdrant.read_budget import ReadBudget
from amips_plugins.adapters.qdrant.strict_mode import Limits


def limited(reads: int | None) -> Limits:
    return Limits(models.StrictModeConfigOutput(enabled=True, read_rate_limit=reads))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(read_budget, "time", made)
    return made


def test_a_tenth_of_a_minute_is_for_cells(clock: Clock) -> None:
    budget = ReadBudget(limited(600), lambda: limited(600))
    for _ in range(30):
        assert not budget.near()
        budget.spend(2)
    budget.spend(1)
    assert budget.near()
    clock.now += 0.09  # not even a pause: .9 reads have come back
    assert budget.near()
    clock.now += 0.05
    assert not budget.near()


def test_without_a_limit_nothing_is_near(clock: Clock) -> None:
    for limits in (Limits(None), limited(None)):
        budget = ReadBudget(limits, lambda: limited(None))
        budget.spend(10**9)
        assert not budget.near()
    assert clock.now == 1000.0


def test_a_limit_that_is_set_later_is_found_after_a_pause(clock: Clock) -> None:
    looks, done = [0], threading.Event()

    def look() -> Limits:
        looks[0] += 1
        done.set()
        return limited(60)

    budget = ReadBudget(Limits(None), look)
    for _ in range(50):
        budget.spend(2)
        assert not budget.near()  # busy all the time: a router's own refresh will tell
    assert looks == [0]
    clock.now += 1.0
    budget.near()
    assert done.wait(10)
    for _ in range(1000):
        if not budget._looking.busy:
            break
        threading.Event().wait(0.01)
    budget.spend(100)
    assert budget.near()
    for _ in range(50):  # however many pauses there are, looks are few
        clock.now += 0.2
        budget.near()
        budget.spend(0)
    assert looks[0] <= 4
