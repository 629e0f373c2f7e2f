from __future__ import annotations

import warnings

import numpy as np
import pytest

from amips_plugins.errors import TrainingError
from amips_plugins.export import clustering
from amips_plugins.export.clustering import (
    QueryAware,
    centroid_weights,
    k_means,
    native_cells,
    nearest_offsets,
    query_aware_cells,
    sample_rows,
    weighted_k_means,
    without_empty,
)
from amips_plugins.models.cells import Cells, place_keys
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_keys, lift_queries
from tests.support.training_data import clustered_keys, gaussian, narrow_queries

N, DIM, CELLS = 900, 8, 20
LAYOUTS = ["native", "query-aware"]
METRICS = list(Metric)


def best_rows(queries: FloatArray, keys: FloatArray, metric: Metric, depth: int = 10) -> IntArray:
    scores = lift_queries(queries, metric) @ lift_keys(keys, metric).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :depth]


def cut(
    layout: str,
    keys: FloatArray,
    metric: Metric,
    n_cells: int = CELLS,
    seed: int = 0,
    recipe: QueryAware | None = None,
) -> tuple[Cells, IntArray, IntArray]:
    """Cells, the cell of each key, and the rows that queries hit."""
    if layout == "native":
        return (*native_cells(keys, metric, n_cells, seed), np.empty(0, dtype=np.int64))
    queries = narrow_queries(40, keys.shape[1])
    hits = best_rows(queries, keys, metric, min(10, len(keys)))
    return (
        *query_aware_cells(keys, metric, n_cells, seed, queries, hits, recipe),
        np.unique(hits),
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cells_are_a_partition(layout: str, metric: Metric) -> None:
    cells, assignment, _ = cut(layout, clustered_keys(N, DIM), metric)
    assert assignment.dtype == np.int64
    assert assignment.shape == (N,)
    np.testing.assert_array_equal(cells.sizes, np.bincount(assignment, minlength=cells.n_cells))
    assert cells.sizes.sum() == N
    assert cells.sizes.min() > 0
    columns = DIM + 1 if layout == "query-aware" else DIM  # one more is the popularity
    assert cells.centroids.shape == (cells.n_cells, columns)
    assert cells.offsets.shape == (cells.n_cells,)
    assert cells.offsets.dtype == np.float32
    assert cells.centroids.dtype == np.float32
    assert (cells.view is not None) == (layout == "query-aware")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_seed_same_cells(layout: str, metric: Metric) -> None:
    keys = clustered_keys(N, DIM)
    one, first, _ = cut(layout, keys, metric)
    two, second, _ = cut(layout, keys, metric)
    assert one.layout() == two.layout()
    assert one.to_bytes() == two.to_bytes()
    np.testing.assert_array_equal(first, second)
    other, _, _ = cut(layout, keys, metric, seed=1)
    assert other.layout() != one.layout()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_key_gets_the_cell_of_its_twin(layout: str, metric: Metric) -> None:
    """Where popularity does not count, a key that no query hit lies where a copy of it would."""
    keys = clustered_keys(N, DIM)
    cells, assignment, hit = cut(layout, keys, metric, recipe=QueryAware(popularity=0.0))
    others = np.setdiff1d(np.arange(N), hit)
    assert len(others) > N // 3
    np.testing.assert_array_equal(cells.assign(keys[others], metric), assignment[others])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rule_for_new_keys_is_deterministic_and_survives_the_bundle(
    layout: str, metric: Metric
) -> None:
    """Alone or among others, now or after a round trip through the bundle."""
    cells, _, _ = cut(layout, clustered_keys(N, DIM), metric)
    new = clustered_keys(200, DIM, seed=7)
    chosen = cells.assign(new, metric)
    assert chosen.min() >= 0
    assert chosen.max() < cells.n_cells
    assert len(np.unique(chosen)) > cells.n_cells // 3
    np.testing.assert_array_equal(cells.assign(new, metric), chosen)
    read_back = Cells.from_bytes(cells.to_bytes())
    np.testing.assert_array_equal(read_back.assign(new, metric), chosen)
    np.testing.assert_array_equal(read_back.assign(new[::-1].copy(), metric), chosen[::-1])
    for row in range(20):
        assert read_back.assign(new[row : row + 1], metric)[0] == chosen[row]


@pytest.mark.parametrize("metric", METRICS)
def test_a_snapshot_key_that_was_never_hit_is_cold_and_a_new_one_is_not_yet(
    metric: Metric,
) -> None:
    """The two differ in their popularity only; the recorded cell is the snapshot key's own."""
    keys, recipe = clustered_keys(N, DIM), QueryAware()
    cells, assignment, hit = cut("query-aware", keys, metric, recipe=recipe)
    assert cells.view is not None
    cold = np.setdiff1d(np.arange(N), hit)
    places = place_keys(keys, metric, cells.centre)
    length = float(np.linalg.norm(places[hit], axis=1).mean())
    queries = narrow_queries(40, DIM)
    counts = np.bincount(best_rows(queries, keys, metric).ravel(), minlength=N)
    popularity = np.log1p(counts) - np.log1p(counts).mean()
    popularity *= recipe.popularity * length / popularity.std()

    # Recorded: its popularity is what the log says, which is the least there is.
    views = cells.view.see(places, metric)
    views[:, -1] = popularity
    nearness = views[cold] @ cells.centroids.T + cells.offsets
    np.testing.assert_array_equal(nearness.argmax(axis=1), assignment[cold])
    np.testing.assert_allclose(popularity[cold], popularity.min())

    # The rule: what the map expects of such a place, and a little more, for want of a chance.
    new = cells.view.see(places, metric)[:, -1]
    boost = recipe.popularity * recipe.new_popularity * length
    assert new.mean() - boost == pytest.approx(
        popularity.mean(), abs=0.1 * recipe.popularity * length
    )
    assert np.corrcoef(new, popularity)[0, 1] > 0.15, "the map knows where hits are likely"
    assert (cells.assign(keys[cold], metric) != assignment[cold]).any()


@pytest.mark.parametrize("metric", METRICS)
def test_heat_gathers_the_keys_that_are_hit(metric: Metric) -> None:
    keys = gaussian(N, DIM)
    queries = narrow_queries(300, DIM)
    hits = best_rows(queries, keys, metric)
    counts = np.bincount(hits.ravel(), minlength=N)

    def concentration(popularity: float) -> float:
        recipe = QueryAware(popularity=popularity)
        cells, cell = query_aware_cells(keys, metric, CELLS, 0, queries, hits, recipe)
        share = np.bincount(cell, counts, cells.n_cells) / cells.sizes
        hottest = np.argsort(-share)
        needed = np.cumsum(cells.sizes[hottest])
        found = np.cumsum(np.bincount(cell, counts, cells.n_cells)[hottest]) / counts.sum()
        return float(needed[(found >= 0.8).argmax()]) / N

    assert concentration(1.0) < concentration(0.0)


def test_weighted_k_means_weighs_points_and_keeps_cells_from_growing() -> None:
    points = np.concatenate([gaussian(300, 2), np.float32(6.0) + gaussian(30, 2)])
    even = np.ones(len(points), dtype=np.float32)
    recipe = QueryAware(size_penalty=0.0)
    centroids, offsets = weighted_k_means(points, even, 4, 0, recipe)
    np.testing.assert_allclose(offsets, nearest_offsets(centroids), rtol=1e-5)
    again, _ = weighted_k_means(points, even, 4, 0, recipe)
    np.testing.assert_array_equal(again, centroids)

    # One cell: its centroid is the weighted mean.
    weights = np.where(np.arange(len(points)) < 300, 1.0, 10.0).astype(np.float32)
    (one,), _ = weighted_k_means(points, weights, 1, 0, recipe)
    np.testing.assert_allclose(one, np.average(points, axis=0, weights=weights), rtol=1e-4)

    def largest(penalty: float) -> int:
        found = weighted_k_means(points, even, 8, 0, QueryAware(size_penalty=penalty))
        return int(np.bincount((points @ found[0].T + found[1]).argmax(axis=1)).max())

    assert largest(0.5) < largest(0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_change_nothing(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = clustered_keys(N, DIM)
    cells, assignment, _ = cut(layout, keys, Metric.L2)
    weights = centroid_weights(keys, assignment, cells, Metric.IP)
    monkeypatch.setattr(clustering, "_BLOCK", 7)
    monkeypatch.setattr("amips_plugins.models.cells._BLOCK", 11)
    again, same, _ = cut(layout, keys, Metric.L2)
    np.testing.assert_array_equal(same, assignment)
    new = clustered_keys(100, DIM, seed=7)
    np.testing.assert_array_equal(again.assign(new, Metric.L2), cells.assign(new, Metric.L2))
    if layout == "native":
        assert again.layout() == cells.layout()
    else:  # the map from places to popularity is a sum over blocks, and rounds
        np.testing.assert_allclose(again.centroids, cells.centroids, rtol=1e-5, atol=1e-6)
        assert again.view is not None
        assert cells.view is not None
        np.testing.assert_allclose(
            again.view.popularity, cells.view.popularity, rtol=1e-3, atol=1e-5
        )
    np.testing.assert_allclose(centroid_weights(keys, same, again, Metric.IP), weights, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_cells", [0, -1, 31])
def test_cells_that_cannot_be_filled_are_refused(layout: str, metric: Metric, n_cells: int) -> None:
    with pytest.raises(TrainingError, match=f"{n_cells} cells.*ask for"):
        cut(layout, gaussian(30, DIM), metric, n_cells)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_cells", [1, 29, 30])
def test_as_many_cells_as_keys(layout: str, metric: Metric, n_cells: int) -> None:
    cells, assignment, _ = cut(layout, gaussian(30, DIM), metric, n_cells)
    assert 1 <= cells.n_cells <= n_cells
    assert cells.sizes.sum() == len(assignment) == 30
    assert cells.sizes.min() > 0


def one_giant_cluster() -> FloatArray:
    keys = np.ones((300, DIM), dtype=np.float32) + 1e-3 * gaussian(300, DIM)
    keys[:5] = 10 * gaussian(5, DIM, 3)
    return keys


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "keys",
    [
        np.ones((300, DIM), dtype=np.float32),
        np.zeros((300, DIM), dtype=np.float32),
        np.concatenate([np.zeros((200, DIM), dtype=np.float32), gaussian(100, DIM)]),
        one_giant_cluster(),
        1e-12 * gaussian(300, DIM),
    ],
    ids=["equal", "zero", "many zero", "giant", "tiny"],
)
def test_degenerate_keys_still_make_a_partition(
    keys: FloatArray, layout: str, metric: Metric
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells, assignment, _ = cut(layout, keys, metric, 16)
        weights = centroid_weights(keys, assignment, cells, metric)
    assert 1 <= cells.n_cells <= 16
    np.testing.assert_array_equal(cells.sizes, np.bincount(assignment, minlength=cells.n_cells))
    assert cells.sizes.min() > 0
    assert np.isfinite(cells.centroids).all()
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("metric", METRICS)
def test_query_aware_cells_gather_what_queries_want(metric: Metric) -> None:
    """The promise behind the layout: the keys of one query lie in fewer cells."""
    keys = gaussian(1500, 12)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    queries, unseen = narrow_queries(600, 12), narrow_queries(200, 12, seed=1)
    _, native = native_cells(keys, metric, 30, 0)
    _, aware = query_aware_cells(keys, metric, 30, 0, queries, best_rows(queries, keys, metric))
    hits = best_rows(unseen, keys, metric)

    def spread(assignment: IntArray) -> float:
        return float(np.mean([len(set(row)) for row in assignment[hits].tolist()]))

    assert spread(aware) < 0.8 * spread(native)


@pytest.mark.parametrize("metric", METRICS)
def test_a_keys_own_queries_count_for_its_cell(metric: Metric) -> None:
    """The same key, hit by queries of the other side, moves there; the rule for new keys stays."""
    keys = np.repeat(np.array([[1.0, 0.2], [1.0, -0.2]], dtype=np.float32), 100, axis=0)
    keys += 0.01 * gaussian(200, 2)
    queries = np.repeat(np.array([[1.0, 1.0], [1.0, -1.0]], dtype=np.float32), 50, axis=0)
    hits = np.concatenate([np.arange(50), np.arange(100, 150)])[:, None]
    hits[0], hits[50] = 120, 0  # one query of each side wants a key of the other
    recipe = QueryAware(trust=1.0, popularity=0.0)
    cells, assignment = query_aware_cells(keys, metric, 2, 0, queries, hits, recipe)
    rule = cells.assign(keys, metric)
    assert assignment[0] != assignment[1]
    assert rule[0] == rule[1]
    np.testing.assert_array_equal(assignment[150:], rule[150:])


def test_without_empty_renumbers() -> None:
    cells = Cells(gaussian(5, 3), gaussian(5, 1)[:, 0], np.zeros(5, dtype=np.int64))
    kept, assignment = without_empty(cells, np.array([4, 1, 4, 3]))
    np.testing.assert_array_equal(assignment, [2, 0, 2, 1])
    np.testing.assert_array_equal(kept.sizes, [1, 1, 2])
    np.testing.assert_array_equal(kept.centroids, cells.centroids[[1, 3, 4]])
    np.testing.assert_array_equal(kept.offsets, cells.offsets[[1, 3, 4]])


def test_sample_rows_are_distinct_and_in_order() -> None:
    np.testing.assert_array_equal(sample_rows(100, 1, 0), np.arange(100))
    rows = sample_rows(150_000, 2, 0)
    assert len(rows) == 100_000
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, sample_rows(150_000, 2, 0))
    assert not np.array_equal(rows, sample_rows(150_000, 2, 1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_keys_than_k_means_looks_at(
    layout: str, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "_SAMPLE_PER_CELL", 5)
    cells, assignment, _ = cut(layout, clustered_keys(N, DIM), metric)
    assert cells.sizes.sum() == len(assignment) == N
    assert cells.sizes.min() > 0


def test_k_means_is_spherical_when_asked() -> None:
    points = gaussian(200, 4) + 3
    np.testing.assert_allclose(
        np.linalg.norm(k_means(points, 5, 0, spherical=True), axis=1), 1.0, rtol=1e-5
    )
    assert np.linalg.norm(k_means(points, 5, 0, spherical=False), axis=1).min() > 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("metric", METRICS)
def test_centroid_weights_order_cells_as_their_centroids_do(metric: Metric, layout: str) -> None:
    keys = clustered_keys(N, DIM)
    cells, assignment, _ = cut(layout, keys, metric)
    queries = gaussian(50, DIM, 9)
    given = lift_queries(queries, metric) @ centroid_weights(keys, assignment, cells, metric).T
    means = np.stack([keys[assignment == cell].mean(axis=0) for cell in range(cells.n_cells)])
    if metric is Metric.L2:
        distances = np.square(queries[:, None] - means[None]).sum(axis=2)
        np.testing.assert_array_equal(given.argmax(axis=1), distances.argmin(axis=1))
        return
    centres = cells.centroids[:, :DIM]  # what a query is compared with: a key's popularity is not
    wanted = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    if metric is Metric.IP:
        lengths = np.linalg.norm(keys, axis=1)
        mean_lengths = [lengths[assignment == cell].mean() for cell in range(cells.n_cells)]
        wanted = wanted * np.array(mean_lengths)[:, None]
    scores = lift_queries(queries, metric) @ wanted.T
    np.testing.assert_allclose(given, scores, atol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_keys_share_a_cell(metric: Metric) -> None:
    """Which of them is among a query's best is chance, and must not part them."""
    rng = np.random.default_rng(3)
    keys = np.repeat(clustered_keys(N // 5, DIM), 5, axis=0)[rng.permutation(N // 5 * 5)]
    queries = narrow_queries(300, DIM)
    hits = best_rows(queries, keys, metric)
    _, assignment = query_aware_cells(keys, metric, CELLS, 0, queries, hits)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    for members in range(group.max() + 1):
        assert len(set(assignment[group.ravel() == members].tolist())) == 1
