from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from amips_plugins.export import routers as module
from amips_plugins.export.clustering import centroid_weights, native_cells
from amips_plugins.export.cost_curves import curve, levels_by_threshold, thresholds_for
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.nets import (
    LinearRouter,
    LowRankRouter,
    TwoLevelRouter,
    multiplications,
)
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import (
    SupportTargets,
    native_candidate,
    new_router,
    train_router,
)
from amips_plugins.export.to_onnx import to_onnx
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import Metric, normalise
from tests.support.training_data import gaussian
from tests.support.training_tasks import CELLS, DIM, K, make_task, short

KINDS: list[Literal["linear", "supportnet"]] = ["linear", "supportnet"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_router_orders_cells_as_their_centroids_do(
    kind: Literal["linear", "supportnet"],
) -> None:
    centroids = normalise(gaussian(CELLS, DIM))
    preset = dataclasses.replace(PRESETS["default"][kind], width=8, depth=2)
    net = new_router(kind, preset, centroids, 0)
    unit = normalise(gaussian(200, DIM, 1))
    with torch.no_grad():
        first = net(torch.from_numpy(unit)).argmax(dim=1).numpy()
    # A SupportNet starts with hidden units besides the centroids.
    agree = (first == (unit @ centroids.T).argmax(axis=1)).mean()
    assert agree == 1.0 if kind == "linear" else agree > 0.5


def test_the_real_constants_switch_at_more_than_1024_cells() -> None:
    preset = PRESETS["default"]["linear"]
    for dim, rank in ((200, 128), (64, 64)):
        assert isinstance(new_router("linear", preset, gaussian(1024, dim), 0), LinearRouter)
        net = new_router("linear", preset, gaussian(1025, dim), 0)
        assert isinstance(net, TwoLevelRouter)
        assert net.down.shape == (rank, dim)
        assert net.members.shape == (61, 17)


def visit_two(net: TwoLevelRouter, score: Callable[[], float]) -> float:  # noqa: ARG001
    net.visited = 2
    return 1.0


def visit_none(net: TwoLevelRouter, score: Callable[[], float]) -> float:  # noqa: ARG001
    return -np.inf


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("metric", list(Metric))
def test_a_router_of_two_levels_trains_and_serves_as_it_was_measured(
    metric: Metric, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MANY_CELLS", CELLS - 1)
    monkeypatch.setattr(module, "_RANK", 3)
    monkeypatch.setattr(module, "fewest_groups", visit_two if pays else visit_none)
    task = make_task(tmp_path, metric)
    cells, assignment = native_cells(task.keys, metric, CELLS, 0)
    preset = short(PRESETS["default"]["linear"])
    trained = train_router("linear", preset, task, cells, assignment)
    assert isinstance(trained.net, TwoLevelRouter if pays else LowRankRouter)
    assert trained.kind == "linear"
    assert trained.parameters == multiplications(trained.net)
    assert trained.priority is not None
    onnx = OnnxModel(to_onnx(trained.net, DIM, metric, trained.order))
    (priority,) = onnx.run(["priority"], {"queries": task.test.queries})
    np.testing.assert_allclose(priority, trained.priority(task.test), atol=2e-4, rtol=1e-4)
    # Most queries' best cell is the same: a tie or two may turn on rounding.
    measured = trained.measure(task.test)
    assert measured.model * len(task.keys) == pytest.approx(
        trained.parameters / task.lifted.shape[1]
    )


@pytest.mark.parametrize("metric", list(Metric))
def test_native_probes_the_nearest_centroids_first(metric: Metric, tmp_path: Path) -> None:
    task = make_task(tmp_path, metric)
    cells, assignment = native_cells(task.keys, metric, CELLS, 0)
    native = native_candidate(task, cells, assignment)
    weights = centroid_weights(task.keys, assignment, cells, metric)
    order = np.argsort(-(task.test.unit @ weights.T), axis=1)
    measured = native.measure(task.test)
    place = measured.found[:, 0]
    np.testing.assert_array_equal(
        order[np.arange(len(order)), place], assignment[task.test.hits[:, 0]]
    )
    np.testing.assert_array_equal(measured.probes, np.arange(1, cells.n_cells + 1))
    assert measured.model * len(task.keys) == pytest.approx(cells.n_cells)
    with torch.no_grad():
        scores = native.net(torch.from_numpy(task.test.unit)).numpy()
    np.testing.assert_array_equal(np.argsort(-scores, axis=1), order)
    assert native.order is not None
    assert native.priority is not None
    np.testing.assert_allclose(native.priority(task.test), scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(native.order.priority(scores), scores)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_router_is_measured_as_it_is_published(
    kind: Literal["linear", "supportnet"], metric: Metric, tmp_path: Path
) -> None:
    task = make_task(tmp_path, metric)
    cells, assignment = native_cells(task.keys, metric, CELLS, 0)
    trained = train_router(kind, short(PRESETS["default"][kind]), task, cells, assignment)
    assert trained.kind == kind
    assert len(trained.history) == 3
    assert all(np.isfinite([*row.values()]).all() for row in trained.history)
    assert trained.order is not None
    assert trained.priority is not None
    with torch.no_grad():
        scores = trained.net(torch.from_numpy(task.test.unit)).numpy()
    priority = trained.priority(task.test)
    np.testing.assert_allclose(priority, trained.order.priority(scores), atol=1e-5)
    # What is exported gives the same, from the queries as the user has them.
    onnx = OnnxModel(to_onnx(trained.net, DIM, metric, trained.order))
    (served,) = onnx.run(["priority"], {"queries": task.test.queries})
    np.testing.assert_allclose(served, priority, atol=2e-4, rtol=1e-4)
    # The validation split chooses the thresholds, whatever split is measured.
    hits = assignment[task.validate.hits[:, :K]]
    thresholds = thresholds_for(trained.priority(task.validate), hits)
    levels = levels_by_threshold(priority, thresholds)
    hit_cells = assignment[task.test.hits]
    model_keys = trained.parameters / task.lifted.shape[1]
    wanted = curve(levels, len(thresholds), hit_cells, cells.sizes, model_keys)
    measured = trained.measure(task.test)
    np.testing.assert_array_equal(measured.found, wanted.found)
    np.testing.assert_array_equal(measured.scanned, wanted.scanned)
    assert measured.model == pytest.approx(model_keys / 400)
    assert (tmp_path / f"{kind}.safetensors").exists()


def test_a_large_cell_pays_for_its_size(tmp_path: Path) -> None:
    """Of two cells with the same share of the top keys, the smaller one is searched first."""
    task: TrainingTask = make_task(tmp_path)
    cells, assignment = native_cells(task.keys, task.metric, CELLS, 0)
    preset = short(PRESETS["default"]["linear"])
    order = train_router("linear", preset, task, cells, assignment).order
    assert order is not None
    assert np.argsort(order.offset).tolist() == np.argsort(-cells.sizes, kind="stable").tolist()
    ratio = (order.offset[0] - order.offset[1]) / np.log(cells.sizes[1] / cells.sizes[0])
    assert ratio == pytest.approx(0.75, rel=1e-3)


def test_support_targets_are_the_best_keys_of_each_cell(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    cells, assignment = native_cells(task.keys, task.metric, CELLS, 0)
    targets = SupportTargets(task, task.train.unit, assignment, cells)
    rows = torch.tensor([3, 0, 9])
    values = targets.values(rows).numpy()
    chosen = torch.tensor([1, 0, 4])
    keys = targets.keys(rows, chosen).numpy()
    for place, row in enumerate(rows.tolist()):
        scores = task.lifted @ task.train.unit[row]
        for cell in range(cells.n_cells):
            assert values[place, cell] == pytest.approx(scores[assignment == cell].max(), abs=1e-5)
        members = np.flatnonzero(assignment == int(chosen[place]))
        np.testing.assert_array_equal(keys[place], task.lifted[members[scores[members].argmax()]])
