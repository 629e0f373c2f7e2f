from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.export.measure import (
    TARGETS,
    Curve,
    betting_bound,
    calibrate,
    curve,
    figures,
    probe_grid,
)
from amips_plugins.vectors import IntArray

N_CELLS, K = 12, 5


def a_curve(n: int, seed: int, n_cells: int = N_CELLS, max_k: int = K) -> Curve:
    rng = np.random.default_rng(seed)
    priority = rng.standard_normal((n, n_cells)).astype(np.float32)
    # Hits prefer cells of high priority, as they do with any router worth the name.
    hits = np.stack(
        [rng.choice(n_cells, max_k, p=np.exp(2 * row) / np.exp(2 * row).sum()) for row in priority]
    )
    return curve(priority, hits, rng.integers(1, 100, size=n_cells), 3.0)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), n_cells=st.integers(1, 9), seed=st.integers(0, 999))
def test_curve_equals_brute_force(n: int, n_cells: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    priority = rng.standard_normal((n, n_cells)).astype(np.float32)
    hits = rng.integers(n_cells, size=(n, K))
    sizes = rng.integers(1, 50, size=n_cells)
    measured = curve(priority, hits, sizes, 7.0)
    assert measured.n_cells == n_cells
    assert measured.model == pytest.approx(7.0 / sizes.sum())
    for k in range(1, K + 1):
        recalls = measured.recall(k)
        scans = np.zeros((n, n_cells))
        wanted = np.zeros((n, n_cells))
        for query in range(n):
            order = sorted(range(n_cells), key=lambda cell: -priority[query, cell])
            for probes in range(1, n_cells + 1):
                searched = set(order[:probes])
                found = [cell in searched for cell in hits[query, :k].tolist()]
                wanted[query, probes - 1] = sum(found) / k
                scans[query, probes - 1] = sizes[list(searched)].sum() / sizes.sum()
        np.testing.assert_allclose(recalls, wanted, atol=1e-8)
        np.testing.assert_allclose(measured.scanned, scans, rtol=1e-5)
        np.testing.assert_array_equal(recalls[:, -1], 1.0)  # every cell is every key
        for target in (0.3, 0.77, 1.0):
            probes = int((wanted.mean(axis=0) >= target - 1e-9).argmax())
            cost = scans[:, probes].mean() + 7.0 / sizes.sum()
            assert measured.cost(k, target) == pytest.approx(cost, rel=1e-5)


def never_found(measured: Curve, share: float, seed: int = 0) -> Curve:
    """A rewriter's curve: some keys are not found by any number of probes."""
    lost = np.random.default_rng(seed).random(measured.ranks.shape) < share
    return Curve(np.where(lost, measured.n_cells, measured.ranks), measured.scanned, measured.model)


def test_a_key_never_found_counts_as_lost_at_every_number_of_probes() -> None:
    measured = never_found(a_curve(300, 0), 0.2)
    lost = measured.ranks[:, :K] == N_CELLS
    np.testing.assert_allclose(measured.recall(K)[:, -1], 1 - lost.mean(axis=1), atol=1e-8)
    assert measured.cost(K, 0.95) == math.inf
    assert measured.cost(K, 0.5) < math.inf


def test_figures_tell_the_curve_at_every_target() -> None:
    measured = a_curve(500, 0)
    told = figures("linear", measured, (1, K))
    assert [(f.k, f.recall) for f in told] == [(k, t) for k in (1, K) for t in TARGETS]
    for figure in told:
        mean = measured.recall(figure.k).mean(axis=0)
        assert figure.candidate == "linear"
        assert figure.n_probes is not None
        assert figure.total is not None
        assert figure.scanned is not None
        assert figure.low is not None
        assert figure.high is not None
        assert mean[figure.n_probes - 1] >= figure.recall
        assert figure.n_probes == 1 or mean[figure.n_probes - 2] < figure.recall
        assert figure.total == pytest.approx(figure.scanned + figure.model)
        assert figure.total == pytest.approx(measured.cost(figure.k, figure.recall), rel=1e-5)
        assert 0 < figure.low <= figure.total + 1e-9
        assert figure.total - 1e-9 <= figure.high < 1 + figure.model + 1e-9
    assert told == figures("linear", measured, (1, K))


def test_figures_grow_with_the_target_and_narrow_with_the_queries() -> None:
    widths = []
    for n in (100, 4000):
        told = figures("native", a_curve(n, 1, n_cells=40), (1,))
        totals = [f.total for f in told if f.total is not None]
        assert totals == sorted(totals)
        widths.append(np.mean([f.high - f.low for f in told if f.high and f.low]))
    assert widths[1] < widths[0] / 2


def test_out_of_reach_is_none() -> None:
    told = figures("keynet", never_found(a_curve(500, 0), 0.15), (K,))
    reach = {f.recall: f for f in told}
    assert reach[0.80].total is not None
    for target in (0.90, 0.95, 0.99):
        figure = reach[target]
        assert (figure.n_probes, figure.scanned, figure.total) == (None, None, None)
        assert (figure.low, figure.high) == (None, None)
        assert figure.model > 0


def test_resamples_that_miss_the_target_do_not_look_cheap() -> None:
    """A target just within reach: half of the resamples never reach it, at any cost."""
    measured = a_curve(400, 0)
    ranks = np.zeros_like(measured.ranks)
    ranks[:, 0] = 8  # nothing at few probes for k=1
    ranks[: len(ranks) // 10 - 1, 0] = N_CELLS
    told = figures("keynet", Curve(ranks, measured.scanned, measured.model), (1,))
    (figure,) = [f for f in told if f.recall == 0.90]
    assert figure.n_probes == 9
    assert figure.low is not None
    assert figure.high is not None
    assert figure.total is not None
    assert figure.low > 0.8 * figure.total, "no resample reaches the target with one probe"
    assert figure.high >= figure.total


def unlikely_above(trials: int, share: float) -> int:
    """Return the 99.9 % quantile of a binomial count."""
    total = 0.0
    for count in range(trials + 1):
        total += math.comb(trials, count) * share**count * (1 - share) ** (trials - count)
        if total >= 0.999:
            return count
    return trials


Draw = Callable[[np.random.Generator, tuple[int, int]], npt.NDArray[np.float64]]
SOURCES: dict[str, tuple[Draw, float]] = {
    "rare misses": (lambda rng, shape: (rng.random(shape) < 0.97).astype(float), 0.97),
    "coin": (lambda rng, shape: (rng.random(shape) < 0.5).astype(float), 0.5),
    "tenths": (lambda rng, shape: rng.binomial(10, 0.9, shape) / 10, 0.9),
    "skewed": (lambda rng, shape: rng.beta(8, 0.5, shape), 8 / 8.5),
    "mostly zero": (lambda rng, shape: (rng.random(shape) < 0.02).astype(float), 0.02),
}


@pytest.mark.parametrize("n", [30, 400])
@pytest.mark.parametrize("delta", [0.05, 0.2])
@pytest.mark.parametrize("source", list(SOURCES))
def test_betting_bound_covers(source: str, delta: float, n: int) -> None:
    draw, mean = SOURCES[source]
    trials = 400
    bounds = betting_bound(draw(np.random.default_rng(7), (n, trials)), delta)
    misses = int((bounds > mean).sum())
    assert misses <= unlikely_above(trials, delta)
    assert (bounds >= 0).all()
    assert (bounds <= 1).all()


def test_betting_bound_is_not_vacuous() -> None:
    n, delta = 2000, 0.05
    hoeffding = math.sqrt(math.log(1 / delta) / (2 * n))
    for source in ("tenths", "rare misses", "skewed"):
        draw, mean = SOURCES[source]
        bounds = betting_bound(draw(np.random.default_rng(3), (n, 200)), delta)
        assert mean - hoeffding < np.median(bounds) < mean
    coins = betting_bound(SOURCES["coin"][0](np.random.default_rng(3), (n, 200)), delta)
    assert 0.5 - 1.5 * hoeffding < np.median(coins) < 0.5
    assert betting_bound(np.ones((2000, 1)), delta)[0] > 0.99
    assert betting_bound(np.zeros((2000, 1)), delta)[0] < 0.01


def test_betting_bound_asks_more_of_fewer_queries_and_of_more_confidence() -> None:
    values = np.random.default_rng(0).binomial(10, 0.9, (1000, 50)) / 10
    middle = np.median(betting_bound(values, 0.05))
    assert np.median(betting_bound(values[:100], 0.05)) < middle
    assert np.median(betting_bound(values, 0.001)) < middle


@pytest.mark.parametrize("n_cells", [1, 2, 5, 64, 1000])
def test_probe_grid_holds_both_ends_and_is_dense_at_the_start(n_cells: int) -> None:
    grid = probe_grid(n_cells)
    assert grid[0] == 0
    assert grid[-1] == n_cells - 1
    assert (np.diff(grid) > 0).all()
    np.testing.assert_array_equal(grid[: min(n_cells, 17)], np.arange(min(n_cells, 17)))


@pytest.mark.parametrize("n_cells", [1, 2, 12, 100])
def test_calibration_is_monotone_and_below_what_was_seen(n_cells: int) -> None:
    measured = a_curve(300, 2, n_cells)
    calibration = calibrate(measured, K)
    assert calibration.max_k == K
    assert calibration.n_cells == n_cells
    assert calibration.confidence == 0.95
    for array in (calibration.recall, calibration.guaranteed):
        assert array.shape == (K, n_cells)
        assert array.dtype == np.float32
        assert (np.diff(array, axis=1) >= 0).all()
        np.testing.assert_array_equal(array[:, -1], 1.0)
    assert (calibration.guaranteed <= calibration.recall + 1e-6).all()
    assert (np.diff(calibration.scanned) >= 0).all()
    for k in range(1, K + 1):
        np.testing.assert_allclose(
            calibration.recall[k - 1], measured.recall(k).mean(axis=0), atol=1e-6
        )
        for target in (0.5, 0.9, 1.0):
            probes = calibration.probes(k, target)
            assert calibration.guaranteed[k - 1, probes - 1] >= np.float32(target)
            assert probes == 1 or calibration.guaranteed[k - 1, probes - 2] < target


def test_between_tested_probes_the_promise_is_that_of_fewer() -> None:
    calibration = calibrate(a_curve(2000, 2, 100), K)
    grid = probe_grid(100)
    assert len(grid) < 100
    for place in range(100):
        below = grid[grid <= place][-1]
        np.testing.assert_array_equal(
            calibration.guaranteed[:, place], calibration.guaranteed[:, below]
        )
    assert (np.diff(calibration.guaranteed[:, grid], axis=1) > 0).any()


def test_more_confidence_takes_more_probes() -> None:
    measured = a_curve(400, 2, 60)
    bold, careful = (calibrate(measured, K, c).guaranteed for c in (0.8, 0.999))
    assert (careful <= bold + 1e-6).all()
    assert (careful < bold).any()


def synthetic_ranks(n: int, rng: np.random.Generator) -> IntArray:
    """Places of two keys of queries that are easy or hard; both keys suffer together."""
    ease = rng.choice([0.9, 0.35, 0.05], size=n, p=[0.6, 0.3, 0.1])
    ranks = rng.geometric(ease[:, None], size=(n, 2)) - 1
    return np.minimum(ranks, 39)


def ranks_to_curve(ranks: IntArray) -> Curve:
    scanned = np.tile(np.linspace(1 / 40, 1, 40, dtype=np.float32), (len(ranks), 1))
    return Curve(ranks, scanned, 0.0)


@pytest.mark.parametrize("recall", [0.8, 0.95])
def test_the_promise_holds_for_fresh_queries(recall: float) -> None:
    rng = np.random.default_rng(11)
    truth = ranks_to_curve(synthetic_ranks(400_000, rng)).recall(2).mean(axis=0)
    resamples, confidence = 200, 0.95
    chosen, naive = [], []
    for _ in range(resamples):
        calibration = calibrate(ranks_to_curve(synthetic_ranks(400, rng)), 2, confidence)
        chosen.append(calibration.default_probes(2, recall))
        naive.append(int((calibration.recall[1] >= recall).argmax()) + 1)
    allowed = unlikely_above(resamples, 1 - confidence)
    assert failures(chosen, truth, recall) <= allowed
    # The test can fail, and the promise costs something sensible.
    assert failures(naive, truth, recall) > allowed
    assert truth[int(np.median(chosen)) - 1] < recall + 0.25 * (1 - recall) + 0.03


def failures(probes: list[int], truth: npt.NDArray[np.float64], recall: float) -> int:
    return int((truth[np.array(probes) - 1] < recall).sum())
