from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from amips_plugins.export.clustering import centroid_weights, native_cells
from amips_plugins.export.keynet import as_query, cut_many_ways, train_keynet
from amips_plugins.export.recipes import PRESETS
from amips_plugins.vectors import Metric, lift_queries
from tests.support.training_data import gaussian
from tests.support.training_tasks import CELLS, DIM, K, make_task, short


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
def test_keynet_loses_what_rescoring_does_not_see(
    metric: Metric, preset: str, tmp_path: Path
) -> None:
    task = make_task(tmp_path, metric)
    cells, assignment = native_cells(task.keys, metric, CELLS, 1)
    recipe = short(PRESETS[preset]["keynet"], width=16)
    few = train_keynet(recipe, task, cells, assignment, 1)
    many = train_keynet(recipe, task, cells, assignment, len(task.keys))
    assert few.kind == "keynet"
    assert (few.order, few.priority) == (None, None)
    measured = many.measure(task.test)
    assert measured.n_levels == cells.n_cells
    assert (measured.found < cells.n_cells).all(), "with every key rescored nothing is lost"
    lost = few.measure(task.test).found == cells.n_cells
    assert lost[:, :K].any()
    np.testing.assert_array_equal(few.measure(task.test).found[~lost], measured.found[~lost])


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
def test_keynet_is_measured_by_the_lists_an_index_would_probe(
    metric: Metric, tmp_path: Path
) -> None:
    task = make_task(tmp_path, metric)
    cells, assignment = native_cells(task.keys, metric, CELLS, 1)
    recipe = short(PRESETS["default"]["keynet"], width=16)
    trained = train_keynet(recipe, task, cells, assignment, len(task.keys))
    with torch.no_grad():
        rewritten = trained.net(torch.from_numpy(task.test.unit)).numpy()
    rewritten = as_query(rewritten, metric)
    weights = centroid_weights(task.keys, assignment, cells, metric)
    order = np.argsort(-(rewritten @ weights.T), axis=1)
    measured = trained.measure(task.test)
    np.testing.assert_array_equal(
        order[np.arange(len(order)), measured.found[:, 0]], assignment[task.test.hits[:, 0]]
    )
    # It costs itself, the centroids that the index compares with in any case, and the rescoring.
    model = trained.parameters / task.lifted.shape[1] + cells.n_cells + len(task.keys)
    assert measured.model == pytest.approx(model / len(task.keys))


def test_a_rewritten_query_is_read_as_the_database_reads_it() -> None:
    rewritten = gaussian(5, DIM + 1)
    np.testing.assert_array_equal(as_query(rewritten, Metric.COSINE), rewritten)
    lifted = as_query(rewritten, Metric.L2)
    np.testing.assert_array_equal(lifted, lift_queries(rewritten[:, :DIM].copy(), Metric.L2))


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
def test_partitions_cut_the_keys_in_ways_that_differ(metric: Metric, tmp_path: Path) -> None:
    task = make_task(tmp_path, metric)
    partitions = cut_many_ways(task, task.train, CELLS)
    assert len({tuple(p.cells.ravel().tolist()) for p in partitions}) == len(partitions)
    sizes = {len(p.centroids) for p in partitions}
    assert min(sizes) < CELLS < max(sizes)
    for partition in partitions:
        n_cells, dim = partition.centroids.shape
        assert dim == task.lifted.shape[1]
        assert partition.log_sizes.shape == (n_cells,)
        assert float(partition.log_sizes.exp().sum()) == pytest.approx(len(task.keys), rel=1e-5)
        assert partition.cells.shape == (len(task.train.queries), K)
        assert 0 <= int(partition.cells.min()) <= int(partition.cells.max()) < n_cells
    # The cells it is measured on are none of them.
    _, measured_on = native_cells(task.keys, metric, CELLS, 1)
    cells = torch.from_numpy(measured_on[task.train.hits[:, :K]])
    assert not any(torch.equal(p.cells, cells) for p in partitions)


@pytest.mark.slow
def test_the_routing_loss_teaches_a_keynet_cells_it_has_not_seen(tmp_path: Path) -> None:
    task = make_task(tmp_path, n=1500)
    cells, assignment = native_cells(task.keys, task.metric, 30, 1)
    costs = {}
    for epochs in (1, 12):
        recipe = short(PRESETS["default"]["keynet"], width=32)
        schedule = type(recipe.schedule)(epochs=epochs, learning_rate=5e-3 if epochs > 1 else 0.0)
        recipe = type(recipe)(schedule, routing=1.0, width=32)
        problem_of = make_task(tmp_path / str(epochs), n=1500)
        trained = train_keynet(recipe, problem_of, cells, assignment, 1500)
        measured = trained.measure(problem_of.test)
        costs[epochs] = measured.cost(K, 0.9) - measured.model
    assert costs[12] < costs[1], "an untrained KeyNet is the native search"
