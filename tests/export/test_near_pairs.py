from __future__ import annotations

import numpy as np
import pytest
import torch

from amips_plugins.export import near_pairs
from amips_plugins.export.near_pairs import Block, inner_products
from amips_plugins.export.targets import Best, best_keys, top_keys
from amips_plugins.vectors import FloatArray, normalise
from tests.support.training_data import gaussian

CPU = torch.device("cpu")
TYPES = {
    "coarse": (torch.bfloat16,),
    "fine": (torch.float32,),
    "both": (torch.bfloat16, torch.float32),
}

SIZES = [  # of queries and of keys, where a float32 holds the products
    (query, key)
    for query in (1e-40, 1e-20, 1.0, 1e20)
    for key in (1e-40, 1e-30, 1e-20, 1.0, 1e15, 1e18)
    if query * key < 1e36
]


@pytest.fixture(params=list(TYPES))
def types(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What products are rounded to, whichever is faster on this processor."""
    name: str = request.param
    monkeypatch.setattr(near_pairs, "_types", lambda _: TYPES[name])
    return name


def wide(n: int, seed: int) -> FloatArray:
    """Vectors of lengths from a hundredth to a hundred."""
    lengths = 10.0 ** np.random.default_rng(seed).uniform(-2, 2, (n, 1))
    vectors: FloatArray = (gaussian(n, 24, seed) * lengths).astype(np.float32)
    return vectors


@pytest.mark.usefixtures("types")
@pytest.mark.parametrize("seed", range(5))
def test_no_pair_that_is_good_enough_is_left_out(seed: int) -> None:
    queries, keys = normalise(gaussian(40, 24, seed)), wide(500, seed + 100)
    every = np.divmod(np.arange(40 * 500), 500)
    products = inner_products(queries, keys, *every).reshape(40, 500)
    # Each wants what some pair of its own just reaches.
    least = np.take_along_axis(products, np.arange(40)[:, None] * 12, axis=1)[:, 0]
    rows, columns = Block(keys, CPU).near(queries, least, 500)
    near = np.zeros(products.shape, dtype=bool)
    near[rows, columns] = True
    assert near[products >= least[:, None]].all()


@pytest.mark.usefixtures("types")
@pytest.mark.parametrize("seed", range(3))
def test_who_wants_anything_gets_its_best(seed: int) -> None:
    queries, keys = normalise(gaussian(40, 24, seed)), wide(500, seed + 100)
    rows, columns = Block(keys, CPU).near(queries, np.full(40, -np.inf, np.float32), 7)
    best = np.argsort(-(queries @ keys.T), axis=1)[:, :7]
    pairs = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert {(row, key) for row, keys in enumerate(best.tolist()) for key in keys} <= pairs
    assert len(pairs) < 40 * 500 / 2


def test_most_pairs_of_unit_vectors_are_left_out(types: str) -> None:
    queries, keys = normalise(gaussian(64, 128)), normalise(gaussian(2_000, 128, 1))
    exact = np.sort(queries @ keys.T, axis=1)
    rows, _ = Block(keys, CPU).near(queries, exact[:, -10].copy(), 10)
    assert 640 <= len(rows) <= (700 if types == "fine" else 1_000)


def test_where_rounding_says_nothing_it_rounds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = normalise(np.ones((1_000, 16), np.float32) + 1e-3 * gaussian(1_000, 16, 1))
    queries = normalise(np.ones((20, 16), np.float32) + 0.1 * gaussian(20, 16))
    least = np.sort(queries @ keys.T, axis=1)[:, -3].copy()
    found = {}
    for name, dtypes in TYPES.items():
        monkeypatch.setattr(near_pairs, "_types", lambda _, dtypes=dtypes: dtypes)
        found[name] = len(Block(keys, CPU).near(queries, least, 3)[0])
    assert found["both"] == found["fine"] < found["coarse"] / 10


def test_a_pair_has_the_same_product_among_any_others() -> None:
    queries, keys = gaussian(30, 384), gaussian(400, 384, 1)
    rows, columns = np.divmod(np.arange(30 * 400), 400)
    together = inner_products(queries, keys, rows, columns)
    some = np.random.default_rng(0).permutation(len(rows))[:777]
    alone = [inner_products(queries, keys, rows[[n]], columns[[n]])[0] for n in some]
    np.testing.assert_array_equal(together[some], alone)
    np.testing.assert_array_equal(
        together[some], inner_products(queries, keys, rows[some], columns[some])
    )


@pytest.mark.usefixtures("types")
def test_what_was_found_before_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amips_plugins.export.keys._SHARD", 100)
    queries, keys = normalise(gaussian(30, 24)), wide(950, 1)
    keys[500:600] = keys[300:400]  # equals, in other shards
    (whole,) = best_keys([queries], keys, [20], CPU)
    kept: list[tuple[int, list[Best]]] = []
    best_keys([queries], keys, [20], CPU, keep=lambda done, best: kept.append((done, best)))
    for begun in kept[:-1]:
        (resumed,) = best_keys([queries], keys, [20], CPU, begun=begun)
        np.testing.assert_array_equal(resumed.rows, whole.rows)
        np.testing.assert_array_equal(resumed.scores, whole.scores)


@pytest.mark.usefixtures("types")
def test_of_keys_that_are_equal_no_more_than_wanted_remain() -> None:
    keys = np.tile(normalise(gaussian(2, 24, 1)), (500, 1))
    keys[1, 0] = -0.0
    keys[3::2, 0] = 0.0  # equal all the same
    queries = normalise(gaussian(5, 24))
    for least in (np.full(5, -np.inf, np.float32), (queries @ keys.T).min(axis=1)):
        rows, columns = Block(keys, CPU).near(queries, least, 7)
        assert columns.max() < 2 * 7
        assert set(range(5)) == set(rows.tolist())


@pytest.mark.usefixtures("types")
def test_of_equal_keys_the_first_ones_are_found() -> None:
    keys = np.tile(normalise(gaussian(10, 24, 1)), (30, 1))
    rows, _ = top_keys(normalise(gaussian(5, 24)), keys, 40, CPU)
    for row in rows:
        assert row[:30].tolist() == list(range(row[0], 300, 10))
        assert row[30:].tolist() == list(range(row[30], 300, 10))[:10]
        assert row[0] < 10
        assert row[30] < 10


@pytest.mark.usefixtures("types")
@pytest.mark.parametrize(("of_queries", "of_keys"), SIZES)
def test_lengths_may_have_squares_that_no_float_holds(
    monkeypatch: pytest.MonkeyPatch, of_queries: float, of_keys: float
) -> None:
    monkeypatch.setattr("amips_plugins.export.keys._SHARD", 100)  # what was found tells the next
    queries = (normalise(gaussian(12, 24)) * of_queries).astype(np.float32)
    keys = (wide(300, 1) * of_keys).astype(np.float32)
    queries[3] = 0.0
    every = inner_products(queries, keys, *np.divmod(np.arange(12 * 300), 300)).reshape(12, 300)
    best = np.argsort(-every, axis=1, kind="stable")[:, :10]
    rows, scores = top_keys(queries, keys, 10, CPU)
    np.testing.assert_array_equal(rows, best)
    np.testing.assert_array_equal(scores, np.take_along_axis(every, best, axis=1))


@pytest.mark.usefixtures("types")
def test_keys_too_large_for_the_rounded_type_are_kept() -> None:
    keys = np.full((3, 1), np.finfo(np.float32).max)  # bfloat16 has no number that is near
    rows, _ = top_keys(np.array([[0.0], [1.0], [-1.0], [1e-3]], np.float32), keys, 2, CPU)
    np.testing.assert_array_equal(rows, np.tile([0, 1], (4, 1)))


def test_a_pair_of_long_vectors_has_the_same_product_among_any_others() -> None:
    queries, keys = gaussian(3, 20_000), gaussian(20, 20_000, 1)
    rows, columns = np.divmod(np.arange(3 * 20), 20)
    together = inner_products(queries, keys, rows, columns)
    alone = [inner_products(queries, keys, rows[[n]], columns[[n]])[0] for n in range(60)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(together, (queries @ keys.T).ravel(), rtol=1e-3, atol=1e-2)


def test_where_torch_shortens_float32_more_pairs_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_pairs, "_types", lambda _: TYPES["fine"])
    queries, keys = normalise(gaussian(40, 24)), normalise(gaussian(500, 24, 1))

    def shortened(*arrays: FloatArray) -> FloatArray:
        """Products as a processor gives them that keeps seven bits."""
        first, second = (torch.from_numpy(each).bfloat16().double().numpy() for each in arrays)
        products: FloatArray = first @ second.T
        return products

    exact = (queries @ keys.T).astype(np.float64)
    off = float(np.abs(shortened(queries, keys) - exact).max())
    least = np.sort(exact, axis=1)[:, -5].astype(np.float32)
    told = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rows, columns = Block(keys, CPU).near(queries, least, 5)
    finally:
        torch.set_float32_matmul_precision(told)
    near = np.zeros(exact.shape, dtype=bool)
    near[rows, columns] = True
    assert near[exact >= least[:, None] - off].all()
    assert near.mean() < 0.1
