from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from amips_plugins.export import dataset as module
from amips_plugins.export.candidates import score
from amips_plugins.export.clustering import native_cells
from amips_plugins.export.cost_curves import Curve
from amips_plugins.export.dataset import augmented
from amips_plugins.export.keynet import train_keynet
from amips_plugins.export.queries import augment
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import train_router
from amips_plugins.vectors import FloatArray, Metric, lift_queries, normalise
from tests.support.training_tasks import CELLS, make_task, short


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.slow
def test_augmentation_only_ever_sees_training_queries(
    metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, metric)
    before = {
        name: getattr(task, name).queries.copy()
        for name in ("train", "validate", "calibrate", "test")
    }
    seen: list[FloatArray] = []

    def spy(queries: FloatArray, copies: int, std: float, seed: int) -> FloatArray:
        seen.append(queries.copy())
        return augment(queries, copies, std, seed)

    monkeypatch.setattr(module, "augment", spy)
    native, assignment = native_cells(task.keys, metric, CELLS, 0)
    for kind in ("linear", "supportnet"):
        preset = short(PRESETS["paper"][kind], copies=2, noise=0.02)
        train_router(kind, preset, task, native, assignment)
    keynet = short(PRESETS["paper"]["keynet"], copies=2, noise=0.02, width=8)
    train_keynet(keynet, task, native, assignment, 30)
    assert len(seen) == 3
    train = {tuple(row) for row in before["train"].tolist()}
    for queries in seen:
        assert {tuple(row) for row in queries.tolist()} <= train
    for name, queries in before.items():
        np.testing.assert_array_equal(getattr(task, name).queries, queries)


@pytest.mark.parametrize("metric", list(Metric))
def test_noisy_copies_have_their_own_exact_answers(metric: Metric, tmp_path: Path) -> None:
    task = make_task(tmp_path, metric)
    preset = dataclasses.replace(PRESETS["default"]["linear"], copies=2, noise=0.5)
    many = augmented(task, preset)
    n = len(task.train.queries)
    assert len(many.queries) == len(many.unit) == len(many.hits) == 3 * n
    np.testing.assert_array_equal(many.queries[:n], task.train.queries)
    np.testing.assert_array_equal(many.hits[:n], task.train.hits)
    np.testing.assert_allclose(many.unit, normalise(lift_queries(many.queries, metric)), atol=1e-6)
    best = (many.unit @ np.asarray(task.lifted).T).argmax(axis=1)
    np.testing.assert_array_equal(many.hits[:, 0], best)
    assert (many.hits[n:, 0] != np.tile(many.hits[:n, 0], 2)).any()


def test_without_copies_the_training_split_is_itself(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    preset = dataclasses.replace(PRESETS["default"]["linear"], copies=0)
    assert augmented(task, preset) is task.train


def test_score_prefers_the_cheaper_router(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    scanned = np.tile(np.linspace(0.1, 1, CELLS, dtype=np.float32), (20, 1))
    found, probes = np.zeros((20, 10), dtype=np.int64), np.arange(1.0, CELLS + 1)
    good, poor = Curve(found, scanned, probes, 0.01), Curve(found + 4, scanned, probes, 0.01)
    heavy, lost = Curve(found, scanned, probes, 0.3), Curve(found + CELLS, scanned, probes, 0.0)
    values = [score(curve, task).value for curve in (good, heavy, poor, lost)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4
    assert np.isfinite(values).all()
    assert "match rate 1.000" in score(good, task).note


def test_score_tells_apart_what_costs_the_same_at_the_target(tmp_path: Path) -> None:
    """The cost at one recall moves in steps; between them epochs still differ."""
    task = make_task(tmp_path)
    scanned = np.tile(np.linspace(0.1, 1, CELLS, dtype=np.float32), (100, 1))
    probes = np.arange(1.0, CELLS + 1)
    better = np.zeros((100, 10), dtype=np.int64)
    better[85:] = 3  # 85 % in the first cell, the rest in the fourth
    worse = better.copy()
    worse[82:85] = 3
    curves = [Curve(found, scanned, probes, 0.01) for found in (better, worse)]
    assert curves[0].cost(task.k, 0.9) == curves[1].cost(task.k, 0.9)
    assert score(curves[0], task).value > score(curves[1], task).value


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_a_recipe_for_every_net(name: str) -> None:
    assert set(PRESETS[name]) == {"linear", "supportnet", "keynet", "heads"}
    assert all(any((p.routing, p.scores, p.keys)) for p in PRESETS[name].values())
