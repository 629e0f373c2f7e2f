"""The change detector keeps its word on simulated streams; seeds are fixed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from amips_plugins.errors import InvalidInput
from amips_plugins.health.change_detector import Detector

Draw = Callable[[np.random.Generator, int], npt.NDArray[np.float64]]
TARGET = 0.95


def recalls(mean: float, spread: float = 3.0) -> Draw:
    """Recall@10 of queries that differ in difficulty: beta-binomial."""

    def draw(rng: np.random.Generator, n: int) -> npt.NDArray[np.float64]:
        easy = rng.beta(mean * spread, (1.0 - mean) * spread, n)
        found: npt.NDArray[np.float64] = rng.binomial(10, easy) / 10
        return found

    return draw


def all_or_nothing(mean: float) -> Draw:
    return lambda rng, n: (rng.random(n) < mean).astype(np.float64)


def alarm_times(gain: npt.NDArray[np.float64], most_loss: float, alpha: float) -> list[int]:
    """When a new detector raises its alarm on each row; one past the end if it does not."""
    times = []
    for row in gain:
        detector = Detector(alpha)
        alarms = (at for at, value in enumerate(row, 1) if detector.add(float(value), most_loss))
        times.append(next(alarms, row.size + 1))
    return times


def falls(draw: Draw, alpha: float, n: int, streams: int) -> list[int]:
    values = draw(np.random.default_rng(0), n * streams).reshape(streams, n)
    return alarm_times(TARGET - values, 1.0 - TARGET, alpha)


@pytest.mark.parametrize(
    "draw", [recalls(TARGET), recalls(TARGET, 0.5), recalls(TARGET, 50.0), all_or_nothing(TARGET)]
)
def test_false_alarms_are_as_rare_as_promised(draw: Draw) -> None:
    alpha, n, streams = 0.01, 1000, 200
    times = np.array(falls(draw, alpha, n, streams))
    # Cut off at n the mean is an underestimate, and so errs against the detector.
    error = times.std() / np.sqrt(streams)
    assert times.mean() + 3 * error >= 1 / alpha
    # The mean alone would not do: most of the streams have to live long.
    assert np.median(times) >= 0.5 / alpha


def test_targets_may_differ_from_one_value_to_the_next() -> None:
    rng, alpha, streams, n = np.random.default_rng(1), 0.01, 200, 1000
    times = []
    for _ in range(streams):
        detector = Detector(alpha)
        targets = rng.choice([0.8, 0.9, 0.99], n)
        found = rng.random(n) < targets
        pairs = zip(targets.tolist(), found.tolist(), strict=True)
        alarms = (at for at, (t, hit) in enumerate(pairs, 1) if detector.add(t - hit, 1.0 - t))
        times.append(next(alarms, n + 1))
    assert np.mean(times) + 3 * np.std(times) / np.sqrt(streams) >= 1 / alpha


def test_a_recall_well_above_its_target_raises_no_alarm() -> None:
    assert min(falls(recalls(0.98), 1e-4, 20_000, 5)) > 20_000


@pytest.mark.parametrize(("mean", "median", "slowest"), [(0.90, 110, 400), (0.80, 25, 60)])
def test_a_fall_is_noticed(mean: float, median: float, slowest: int) -> None:
    times = falls(recalls(mean), 1e-4, 2000, 60)
    assert np.median(times) <= median
    assert max(times) <= slowest


def test_a_fall_is_noticed_as_soon_after_a_long_time_of_health() -> None:
    rng = np.random.default_rng(2)
    times = []
    for _ in range(20):
        detector = Detector(1e-4)
        for value in recalls(0.97)(rng, 3000):
            assert not detector.add(TARGET - float(value), 1.0 - TARGET)
        after = recalls(0.80)(rng, 500).tolist()
        alarms = (at for at, value in enumerate(after, 1) if detector.add(TARGET - value, 0.05))
        times.append(next(alarms))
    assert np.median(times) <= 30


def test_a_value_below_its_bound_counts_as_the_bound() -> None:
    one, other = Detector(0.01), Detector(0.01)
    for _ in range(3):
        one.add(-0.1000001, 0.1)
        other.add(-0.1, 0.1)
    assert [one.add(0.3, 0.1) for _ in range(5)] == [other.add(0.3, 0.1) for _ in range(5)]


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")])
def test_alpha_is_a_rate(alpha: float) -> None:
    with pytest.raises(InvalidInput, match="alpha"):
        Detector(alpha)
