from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from amips_plugins.export import candidates as module
from amips_plugins.export.candidates import (
    PRESETS,
    Preset,
    Problem,
    Split,
    SupportTargets,
    augmented,
    native_candidate,
    new_router,
    score,
    train_keynet,
    train_router,
)
from amips_plugins.export.clustering import centroid_weights, native_cells
from amips_plugins.export.measure import Curve
from amips_plugins.export.queries import augment, split_queries
from amips_plugins.export.targets import top_keys
from amips_plugins.progress import no_progress
from amips_plugins.vectors import FloatArray, Metric, lift_keys, lift_queries, normalise
from tests.export.data import clustered_keys, gaussian, narrow_queries

DIM, CELLS, K = 8, 10, 5
KINDS: list[Literal["linear", "supportnet"]] = ["linear", "supportnet"]


def make_problem(work: Path, metric: Metric = Metric.COSINE, n: int = 400) -> Problem:
    keys = clustered_keys(n, DIM)
    lifted = lift_keys(keys, metric)
    splits = split_queries(narrow_queries(500, DIM), 0)

    def split(queries: FloatArray) -> Split:
        unit = normalise(lift_queries(queries, metric))
        return Split(queries, unit, top_keys(unit, lifted, 10, torch.device("cpu"))[0])

    return Problem(
        keys=keys,
        lifted=lifted,
        metric=metric,
        train=split(splits.train),
        validate=split(splits.validate),
        calibrate=split(splits.calibrate),
        test=split(splits.test),
        k=K,
        recall=0.9,
        seed=0,
        device=torch.device("cpu"),
        work=work,
        progress=no_progress,
    )


def short(preset: Preset, **changes: float) -> Preset:
    schedule = dataclasses.replace(preset.schedule, epochs=3, batch_size=64)
    return dataclasses.replace(preset, schedule=schedule, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", list(Metric))
def test_augmentation_only_ever_sees_training_queries(
    metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(tmp_path, metric)
    before = {
        name: getattr(problem, name).queries.copy()
        for name in ("train", "validate", "calibrate", "test")
    }
    seen: list[FloatArray] = []

    def spy(queries: FloatArray, copies: int, std: float, seed: int) -> FloatArray:
        seen.append(queries.copy())
        return augment(queries, copies, std, seed)

    monkeypatch.setattr(module, "augment", spy)
    native, assignment = native_cells(problem.keys, metric, CELLS, 0)
    for kind in KINDS:
        preset = short(PRESETS["paper"][kind], copies=2, noise=0.02)
        train_router(kind, preset, problem, native, assignment)
    keynet = short(PRESETS["paper"]["keynet"], copies=2, noise=0.02, width=8)
    train_keynet(keynet, problem, native, assignment, 30)
    assert len(seen) == 3
    train = {tuple(row) for row in before["train"].tolist()}
    for queries in seen:
        assert {tuple(row) for row in queries.tolist()} <= train
    for name, queries in before.items():
        np.testing.assert_array_equal(getattr(problem, name).queries, queries)


@pytest.mark.parametrize("metric", list(Metric))
def test_noisy_copies_have_their_own_exact_answers(metric: Metric, tmp_path: Path) -> None:
    problem = make_problem(tmp_path, metric)
    preset = dataclasses.replace(PRESETS["default"]["linear"], copies=2, noise=0.5)
    many = augmented(problem, preset)
    n = len(problem.train.queries)
    assert len(many.queries) == len(many.unit) == len(many.hits) == 3 * n
    np.testing.assert_array_equal(many.queries[:n], problem.train.queries)
    np.testing.assert_array_equal(many.hits[:n], problem.train.hits)
    np.testing.assert_allclose(many.unit, normalise(lift_queries(many.queries, metric)), atol=1e-6)
    best = (many.unit @ problem.lifted.T).argmax(axis=1)
    np.testing.assert_array_equal(many.hits[:, 0], best)
    assert (many.hits[n:, 0] != np.tile(many.hits[:n, 0], 2)).any()


def test_without_copies_the_training_split_is_itself(tmp_path: Path) -> None:
    problem = make_problem(tmp_path)
    preset = dataclasses.replace(PRESETS["default"]["linear"], copies=0)
    assert augmented(problem, preset) is problem.train


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


@pytest.mark.parametrize("metric", list(Metric))
def test_native_probes_the_nearest_centroids_first(metric: Metric, tmp_path: Path) -> None:
    problem = make_problem(tmp_path, metric)
    cells, assignment = native_cells(problem.keys, metric, CELLS, 0)
    native = native_candidate(problem, cells, assignment)
    weights = centroid_weights(problem.keys, assignment, cells, metric)
    order = np.argsort(-(problem.test.unit @ weights.T), axis=1)
    measured = native.measure(problem.test)
    place = measured.ranks[:, 0]
    np.testing.assert_array_equal(
        order[np.arange(len(order)), place], assignment[problem.test.hits[:, 0]]
    )
    assert measured.model * len(problem.keys) == pytest.approx(cells.n_cells)
    with torch.no_grad():
        scores = native.net(torch.from_numpy(problem.test.unit)).numpy()
    np.testing.assert_array_equal(np.argsort(-scores, axis=1), order)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_router_is_measured_as_it_is_published(
    kind: Literal["linear", "supportnet"], metric: Metric, tmp_path: Path
) -> None:
    problem = make_problem(tmp_path, metric)
    cells, assignment = native_cells(problem.keys, metric, CELLS, 0)
    trained = train_router(kind, short(PRESETS["default"][kind]), problem, cells, assignment)
    assert trained.kind == kind
    assert len(trained.history) == 3
    assert all(np.isfinite([*row.values()]).all() for row in trained.history)
    assert trained.order is not None
    with torch.no_grad():
        scores = trained.net(torch.from_numpy(problem.test.unit)).numpy()
    priority = trained.order.scale * scores + trained.order.offset
    order = np.argsort(-priority, axis=1)
    measured = trained.measure(problem.test)
    place = measured.ranks[:, 0]
    np.testing.assert_array_equal(
        order[np.arange(len(order)), place], assignment[problem.test.hits[:, 0]]
    )
    assert measured.model == pytest.approx(trained.parameters / problem.lifted.shape[1] / 400)
    assert (tmp_path / f"{kind}.safetensors").exists()


def test_support_targets_are_the_best_keys_of_each_cell(tmp_path: Path) -> None:
    problem = make_problem(tmp_path)
    cells, assignment = native_cells(problem.keys, problem.metric, CELLS, 0)
    targets = SupportTargets(problem, problem.train.unit, assignment, cells)
    rows = torch.tensor([3, 0, 9])
    values = targets.values(rows).numpy()
    chosen = torch.tensor([1, 0, 4])
    keys = targets.keys(rows, chosen).numpy()
    for place, row in enumerate(rows.tolist()):
        scores = problem.lifted @ problem.train.unit[row]
        for cell in range(cells.n_cells):
            assert values[place, cell] == pytest.approx(scores[assignment == cell].max(), abs=1e-5)
        members = np.flatnonzero(assignment == int(chosen[place]))
        np.testing.assert_array_equal(
            keys[place], problem.lifted[members[scores[members].argmax()]]
        )


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
def test_keynet_loses_what_rescoring_does_not_see(
    metric: Metric, preset: str, tmp_path: Path
) -> None:
    problem = make_problem(tmp_path, metric)
    cells, assignment = native_cells(problem.keys, metric, CELLS, 1)
    recipe = short(PRESETS[preset]["keynet"])
    few = train_keynet(recipe, problem, cells, assignment, 1)
    many = train_keynet(recipe, problem, cells, assignment, len(problem.keys))
    assert few.order is None
    ranks = many.measure(problem.test).ranks
    assert (ranks < cells.n_cells).all(), "with every key rescored nothing is lost"
    lost = few.measure(problem.test).ranks == cells.n_cells
    assert lost[:, :K].any()
    np.testing.assert_array_equal(few.measure(problem.test).ranks[~lost], ranks[~lost])


def test_score_prefers_the_cheaper_router(tmp_path: Path) -> None:
    problem = make_problem(tmp_path)
    scanned = np.tile(np.linspace(0.1, 1, CELLS, dtype=np.float32), (20, 1))
    ranks = np.zeros((20, 10), dtype=np.int64)
    good, poor = Curve(ranks, scanned, 0.01), Curve(ranks + 4, scanned, 0.01)
    heavy, lost = Curve(ranks, scanned, 0.3), Curve(ranks + CELLS, scanned, 0.0)
    values = [score(curve, problem).value for curve in (good, heavy, poor, lost)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4
    assert np.isfinite(values).all()
    assert "match rate 1.000" in score(good, problem).note


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_a_recipe_for_every_net(name: str) -> None:
    assert set(PRESETS[name]) == {"linear", "supportnet", "keynet"}
    assert any((p.routing, p.scores, p.gradients) for p in PRESETS[name].values())
