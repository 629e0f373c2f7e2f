from __future__ import annotations

import numpy as np
import pytest

from amips_plugins.collection import Hit, Id
from amips_plugins.health.recall import recall_at_k
from amips_plugins.tune.recalls import EffortCurve, Truth, promise, smallest_k
from amips_plugins.vectors import FloatArray


def truth_of(scores: FloatArray) -> Truth:
    """Of keys named by their ranks, from 0."""
    ranks: list[dict[Id, int]] = [{key: key + 1 for key in range(scores.shape[1])} for _ in scores]
    return Truth(ranks, scores, scores.shape[1])


def test_counts_are_those_of_recall_at_k_with_ties_gaps_and_short_answers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = -np.sort(-rng.integers(0, 6, 8).astype(np.float32))[None]
        exact = [Hit(key, float(score)) for key, score in enumerate(scores[0])]
        others = [Hit(100 + n, float(rng.integers(-2, 6))) for n in range(4)]
        picked = [[*exact, *others][i] for i in rng.permutation(12)[: rng.integers(0, 9)]]
        found = sorted(picked, key=lambda hit: -hit.score)
        first = smallest_k(truth_of(scores), [found], larger_is_better=True)
        for k in range(1, 9):
            counted = min(int((first[0] <= k).sum()), k) / k
            assert counted == recall_at_k(found, exact, k, larger_is_better=True)


def test_scores_of_codes_are_not_believed() -> None:
    scores = np.array([[3.0, 2.0]], dtype=np.float32)
    found = [[Hit(7, 9.0), Hit(0, 8.0)]]
    believed = Truth(truth_of(scores).ranks, None, 2)
    assert smallest_k(truth_of(scores), found, larger_is_better=True).tolist() == [[1, 2]]
    assert smallest_k(believed, found, larger_is_better=True).tolist() == [[3, 2]]


def curve(seed: int, n_queries: int, found: tuple[float, ...]) -> EffortCurve:
    """Each of ten keys is found with these chances, the levels' misses nested."""
    luck = np.random.default_rng(seed).random((n_queries, 10))
    places = np.arange(1, 11, dtype=np.int16)
    first = [np.where(luck < chance, places, np.int16(11)) for chance in found]
    return EffortCurve(2 ** np.arange(3, 3 + len(found)), np.stack(first))


@pytest.mark.slow
def test_what_is_promised_holds_for_other_queries_nineteen_times_in_twenty() -> None:
    chances = (0.7, 0.9, 0.94, 0.96, 0.99)
    broken = 0
    for seed in range(40):
        made = promise(curve(seed, 300, chances))
        effort = made.effort(made.threshold(10, 0.93))
        true = dict(zip((8, 16, 32, 64, 128), chances, strict=True))[effort or 0]
        broken += true < 0.93
    assert broken <= 5
    assert (made.efforts, made.max_k) is not None


def test_less_is_promised_than_was_seen() -> None:
    made = promise(curve(1, 500, (0.7, 0.95)))
    assert (made.guaranteed[:, :-1] < made.recall[:, :-1]).all()
    assert made.efforts is not None
    assert made.efforts.tolist() == [8, 16, 16]
    assert made.thresholds.tolist() == [-8.0, -16.0, -np.inf]
