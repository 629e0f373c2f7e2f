from __future__ import annotations

import numpy as np
import pytest

from amips_plugins.collection import Hit
from amips_plugins.health.recall import RecallWindow, recall_at_k


def hits(*pairs: tuple[int, float]) -> list[Hit]:
    return [Hit(key, score) for key, score in pairs]


EXACT = hits((1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6))


@pytest.mark.parametrize(
    ("found", "k", "expected"),
    [
        (EXACT, 4, 1.0),
        (EXACT[:3], 4, 0.75),
        (hits((1, 0.9), (9, 0.1)), 2, 0.5),
        ([], 2, 0.0),
        (hits((1, 0.9), (9, 0.8)), 2, 1.0),  # as good as the second best
        (hits((1, 0.9), (9, 0.8 - 1e-7)), 2, 1.0),  # as good, but for rounding
        (hits((1, 0.9), (9, 0.799)), 2, 0.5),
        (hits((8, 0.8), (9, 0.8), (1, 0.9)), 2, 1.0),  # no more than k of them count
    ],
)
def test_recall_of_one_answer(found: list[Hit], k: int, expected: float) -> None:
    assert recall_at_k(found, EXACT, k, larger_is_better=True) == expected


def test_smaller_distances_are_better() -> None:
    exact = hits((1, 0.1), (2, 0.2))
    assert recall_at_k(hits((1, 0.1), (9, 0.2)), exact, 2, larger_is_better=False) == 1.0
    assert recall_at_k(hits((1, 0.1), (9, 0.3)), exact, 2, larger_is_better=False) == 0.5


def test_fewer_keys_than_k() -> None:
    assert recall_at_k(EXACT, EXACT, 10, larger_is_better=True) == 1.0
    assert recall_at_k([], [], 10, larger_is_better=True) == 1.0


def test_a_window_keeps_the_latest() -> None:
    window = RecallWindow(100)
    assert window.summary() is None
    for value in [0.0] * 50 + [1.0] * 94 + [0.4] * 6:
        window.add(value)
    summary = window.summary()
    assert summary is not None
    assert (summary.n, summary.p5) == (100, 0.4)
    assert summary.mean == pytest.approx(0.964)
    assert summary.low <= summary.mean <= summary.high <= 1.0


@pytest.mark.parametrize("n", [20, 200, 1000])
def test_the_bounds_cover_the_mean_and_are_of_use(n: int) -> None:
    rng, misses, widths, bernstein = np.random.default_rng(3), 0, [], []
    for _ in range(200):
        window = RecallWindow()
        values = rng.binomial(10, rng.beta(2.7, 0.3, n)) / 10  # mean .9
        for value in values.tolist():
            window.add(value)
        summary = window.summary()
        assert summary is not None
        misses += not summary.low <= 0.9 <= summary.high
        widths.append(summary.high - summary.low)
        log = np.log(4 / 0.05)
        half = np.sqrt(2 * values.var(ddof=1) * log / n) + 7 * log / (3 * (n - 1))
        bernstein.append(2 * half)
    assert misses <= 20  # .05 of 200 is 10
    assert np.mean(widths) < np.mean(bernstein)
