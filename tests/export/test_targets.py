from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.export import targets
from amips_plugins.export.targets import best_per_cell, cell_order, top_keys
from tests.support.progress_recorder import Recorder
from tests.support.training_data import gaussian

CPU = torch.device("cpu")


@pytest.fixture(params=[(1, 1), (7, 3), (13, 1000), (1000, 1000)], ids=str)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and queries a block: small ones put many borders inside of small arrays."""
    sizes: tuple[int, int] = request.param
    monkeypatch.setattr(targets, "_KEYS", sizes[0])
    monkeypatch.setattr(targets, "_QUERIES", sizes[1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("k", [1, 10, 50])
def test_top_keys_equal_brute_force(k: int) -> None:
    queries, keys = gaussian(11, 5), gaussian(50, 5, 1)
    rows, values = top_keys(queries, keys, k, CPU)
    scores = queries @ keys.T
    assert rows.dtype == np.int64
    assert values.dtype == np.float32
    np.testing.assert_array_equal(rows, np.argsort(-scores, axis=1)[:, :k])
    np.testing.assert_allclose(values, -np.sort(-scores, axis=1)[:, :k], rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    block=st.integers(1, 12),
    seed=st.integers(0, 999),
)
def test_ties_give_different_keys_of_the_right_value(n: int, k: int, block: int, seed: int) -> None:
    k = min(k, n)
    rng = np.random.default_rng(seed)
    queries = rng.integers(-1, 2, size=(6, 3)).astype(np.float32)
    keys = rng.integers(-1, 2, size=(n, 3)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "_KEYS", block)
        patch.setattr(targets, "_QUERIES", 4)
        rows, values = top_keys(queries, keys, k, CPU)
    scores = queries @ keys.T
    np.testing.assert_array_equal(values, -np.sort(-scores, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(scores, rows, axis=1), values)
    assert all(len(set(row)) == k for row in rows.tolist())


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("n_cells", [1, 6, 50])
def test_best_per_cell_equals_brute_force(n_cells: int) -> None:
    queries, keys = gaussian(11, 5), gaussian(50, 5, 1)
    assignment = np.random.default_rng(0).permutation(np.arange(50) % n_cells)
    values, rows = best_per_cell(queries, keys, assignment, n_cells, CPU)
    assert rows.dtype == np.int64
    assert values.dtype == np.float32
    scores = queries @ keys.T
    for cell in range(n_cells):
        masked = np.where(assignment == cell, scores, -np.inf)
        np.testing.assert_array_equal(rows[:, cell], masked.argmax(axis=1))
        np.testing.assert_allclose(values[:, cell], masked.max(axis=1), rtol=1e-5, atol=1e-6)


def test_a_memory_map_is_read_as_an_array_is(tmp_path: Path) -> None:
    keys = gaussian(50, 5, 1)
    keys.tofile(tmp_path / "keys")
    mapped = np.memmap(tmp_path / "keys", dtype="<f4", mode="r", shape=(50, 5))
    queries = gaussian(11, 5)
    np.testing.assert_array_equal(
        top_keys(queries, mapped, 10, CPU)[0], top_keys(queries, keys, 10, CPU)[0]
    )


def test_cell_order_lists_the_keys_of_each_cell() -> None:
    assignment = np.array([2, 0, 2, 1, 0])
    order, starts = cell_order(assignment, 3)
    members = [order[starts[cell] : starts[cell + 1]].tolist() for cell in range(3)]
    assert members == [[1, 4], [3], [0, 2]]


@pytest.mark.usefixtures("blocks")
def test_progress_ends_at_its_total() -> None:
    queries, keys = gaussian(11, 5), gaussian(50, 5, 1)
    recorder = Recorder()
    top_keys(queries, keys, 3, CPU, recorder)
    assert recorder.totals == [recorder.done] == [50]
    recorder = Recorder()
    best_per_cell(queries, keys, np.arange(50) % 6, 6, CPU, recorder)
    assert recorder.totals == [recorder.done] == [50]
