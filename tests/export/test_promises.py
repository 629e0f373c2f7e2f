"""What is promised, and whether it holds for what comes later."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from amips_plugins.bundle.manifest import ModelKind
from amips_plugins.export.candidates import Candidate
from amips_plugins.export.clustering import centre_of, native_cells, query_aware_cells
from amips_plugins.export.cost_curves import curve, levels_by_threshold
from amips_plugins.export.dataset import TrainingTask, count_as_good, pose
from amips_plugins.export.promises import Promise, promise
from amips_plugins.export.queries import guess_queries, split_queries
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import native_candidate, train_router
from amips_plugins.export.targets import top_keys
from amips_plugins.progress import no_progress
from amips_plugins.vectors import FloatArray, Metric, lift_keys, lift_queries, normalise
from tests.support.training_data import clustered_keys, gaussian, narrow_queries
from tests.support.training_tasks import short

DIM, CELLS, K = 8, 8, 5
KEYS = clustered_keys(500, DIM)


def task_of(
    queries: FloatArray, work: Path, metric: Metric = Metric.COSINE, keys: FloatArray = KEYS
) -> TrainingTask:
    centre = centre_of(keys, metric)
    return pose(
        keys,
        lift_keys(keys, metric, centre),
        metric,
        split_queries(queries, 0),
        k=K,
        recall=0.9,
        seed=0,
        device=torch.device("cpu"),
        work=work,
        progress=no_progress,
        centre=centre,
    )


def fit(kind: ModelKind, task: TrainingTask) -> Candidate:
    cut = query_aware_cells(
        task.keys, task.metric, CELLS, task.seed, task.train.queries, task.train.hits
    )
    assert kind == "linear"
    return train_router("linear", short(PRESETS["default"]["linear"]), task, *cut)


def promised(task: TrainingTask) -> tuple[Candidate, Candidate, Promise]:
    native = native_candidate(task, *native_cells(task.keys, task.metric, CELLS, task.seed))
    router = fit("linear", task)
    assert router.priority is not None
    return router, native, promise(router, native, task, router.priority, fit)


def recall_served(
    router: Candidate, task: TrainingTask, threshold: float, fresh: FloatArray
) -> float:
    """Mean recall@k of fresh queries at a threshold, every key good enough being found."""
    lift = lift_queries(fresh, task.metric, task.centre)
    unit = normalise(lift)
    hits, scores = top_keys(unit, task.lifted, 60, task.device)
    assert router.priority is not None
    priority = router.priority(dataclasses.replace(task.test, unit=unit))
    levels = levels_by_threshold(priority, np.array([threshold, -np.inf], dtype=np.float32))
    as_good = count_as_good(lift, scores, task.metric)
    sizes = router.cells.sizes
    measured = curve(levels, 2, router.assignment[hits], sizes, 0.0, as_good)
    return float(measured.mean_recall(task.k)[0])


def at_most(trials: int) -> int:
    """How many of so many promises may be broken, at one in twenty each (99 %)."""
    chance, count = 0.95**trials, 0
    total = chance
    while total < 0.99:
        count += 1
        chance *= (trials - count + 1) / count * 0.05 / 0.95
        total += chance
    return count


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_promises_hold_over_populations(tmp_path: Path) -> None:
    """Metrics, shifts, repeats of keys and queries, few and more queries, any k: as they come.

    A target is kept for fresh queries, or nothing is promised and the native search answers.
    """
    trials = 200 if "AMIPS_NIGHTLY" in os.environ else 20
    rng, broken, answered = np.random.default_rng(12), [], 0
    for trial in range(trials):
        work = tmp_path / str(trial)
        work.mkdir()
        metric = Metric(rng.choice(["cosine", "ip", "l2"]))
        copies, count = int(rng.choice([1, 2, 5])), int(rng.integers(120, 700))
        k, target = int(rng.choice([1, 5, 10, 30])), float(rng.choice([0.8, 0.9]))
        exponent = float(rng.choice([0.0, 0.7, 1.0]))
        shift = np.float32(rng.choice([0.0, 100.0]) if metric is Metric.L2 else 0.0)
        keys = np.repeat(clustered_keys(600 // copies, DIM, trial), copies, axis=0)
        keys = keys[rng.permutation(len(keys))] + shift
        queries = narrow_queries(count + 1_500, DIM, trial) + shift
        often = np.maximum(1, (30.0 / (1.0 + rng.permutation(count)) ** exponent).astype(int))
        log = np.repeat(queries[:count], often if exponent else 1, axis=0)
        task = dataclasses.replace(task_of(log, work, metric, keys), k=k, recall=target)
        router, _, made = promised(task)
        threshold = made.calibration.default_threshold(k, target)
        if threshold == -np.inf:
            continue
        answered += 1
        recall = recall_served(router, task, threshold, queries[count:])
        if recall < target - 0.002:  # the chance of 1,500 fresh queries is about as much
            broken.append((trial, str(metric), copies, count, k, target, exponent, recall))
    assert answered > trials // 3
    assert len(broken) <= at_most(answered), broken


def test_few_queries_are_cross_fitted_and_promise_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(narrow_queries(300, DIM), tmp_path)
    router, native, cross_fitted = promised(task)
    assert router.priority is not None
    n = len(task.train.queries) + len(task.calibrate.queries)
    assert len(cross_fitted.learned.found) == len(cross_fitted.native.found) == n

    def refuse(_kind: ModelKind, _task: TrainingTask) -> Candidate:
        raise AssertionError("enough queries are not cross-fitted")

    monkeypatch.setattr("amips_plugins.export.promises.ENOUGH", 1)
    split = promise(router, native, task, router.priority, refuse)
    assert len(split.learned.found) == len(task.calibrate.queries)
    best = [made.calibration.guaranteed[K - 1, :-1].max() for made in (cross_fitted, split)]
    assert best[0] > best[1] + 0.05
    # No router is measured on queries that it has learned from.
    seen: list[set[bytes]] = []

    def watching(_kind: ModelKind, part: TrainingTask) -> Candidate:
        seen.append({row.tobytes() for row in part.train.queries})
        return router

    monkeypatch.setattr("amips_plugins.export.promises.ENOUGH", 1_000)
    promise(router, native, task, router.priority, watching)
    everything = {row.tobytes() for row in task.train.queries}
    left_out = [everything - learned for learned in seen]
    assert sum(map(len, left_out)) == len(everything) == len(set().union(*left_out))


def test_centroids_have_learned_from_no_query(tmp_path: Path) -> None:
    task = task_of(narrow_queries(300, DIM), tmp_path)
    native = native_candidate(task, *native_cells(task.keys, task.metric, CELLS, task.seed))
    assert native.priority is not None

    def refuse(_kind: ModelKind, _task: TrainingTask) -> Candidate:
        raise AssertionError("centroids are not trained")

    made = promise(native, native, task, native.priority, refuse)
    assert len(made.learned.found) == len(task.train.queries) + len(task.calibrate.queries)


@pytest.mark.slow
def test_queries_count_as_often_as_they_were_asked(tmp_path: Path) -> None:
    """Queries that are hard for the router are asked nine times: less can be promised."""
    distinct = narrow_queries(300, DIM)
    task = task_of(distinct, tmp_path)
    router, _, alike = promised(task)
    assert router.priority is not None
    hard = task.train.queries[: len(task.train.queries) // 2]
    log = np.concatenate([distinct, *[hard] * 8])
    again = task_of(log, tmp_path)
    np.testing.assert_array_equal(again.train.queries, task.train.queries)
    assert again.train.asked is not None
    assert again.train.asked.tolist() == [9] * len(hard) + [1] * (
        len(task.train.queries) - len(hard)
    )
    assert (promised(again)[2].calibration.guaranteed <= alike.calibration.guaranteed + 1e-6).all()


def test_promises_go_to_a_hundred_keys(tmp_path: Path) -> None:
    calibration = promised(task_of(narrow_queries(300, DIM), tmp_path))[2].calibration
    assert calibration.max_k == 100
    assert calibration.threshold(73, 0.8) <= calibration.threshold(75, 0.75)
    assert (np.diff(calibration.guaranteed, axis=1) >= -1e-6).all()
    assert (calibration.guaranteed <= calibration.recall + 1e-6).all()


@pytest.mark.slow
def test_equal_keys_cost_the_learned_search_no_more_than_the_native_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = np.repeat(KEYS[:100], 5, axis=0)[rng.permutation(500)]
    made = promised(task_of(narrow_queries(600, DIM), tmp_path, keys=keys))[2]
    for recall in (0.9, 0.99):
        assert made.learned.cost(K, recall) <= made.native.cost(K, recall) * 1.05


@pytest.mark.slow
def test_a_shift_that_changes_no_distance_changes_no_cost(tmp_path: Path) -> None:
    queries, costs, hits = narrow_queries(600, DIM), [], []
    for shift in (0.0, 1024.0):
        (tmp_path / str(shift)).mkdir()
        moved = np.float32(shift)
        task = task_of(queries + moved, tmp_path / str(shift), Metric.L2, KEYS + moved)
        # The splits go by the queries' bytes: only the whole of them is comparable.
        costs.append(promised(task)[2].learned.cost(K, 0.9))
        unit = normalise(lift_queries(queries + moved, Metric.L2, task.centre))
        hits.append(top_keys(unit, task.lifted, K, task.device)[0])
    assert costs[1] < 1.2 * costs[0]
    distances = np.square(queries[:, None].astype(np.float64) - KEYS[None]).sum(axis=2)
    exact = np.argsort(distances, axis=1)[:, :K]
    for found in hits:
        assert np.mean([len(set(a) & set(b)) / K for a, b in zip(found, exact, strict=True)]) > 0.99


def test_guesses_step_as_far_as_the_keys_are_from_their_middle() -> None:
    keys = gaussian(500, DIM) + np.float32(100.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guessed = guess_queries(keys, 200, 0, centre=centre_of(keys, Metric.L2))
    nearest = np.linalg.norm(guessed[:, None] - keys[None], axis=2).min(axis=1)
    assert nearest.max() < 5.0
