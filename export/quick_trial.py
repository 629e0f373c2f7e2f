"""A quick training on a sample of the keys: what ``amips doctor`` measures.

It is the training of ``amips train`` with everything slow left out: fewer keys, queries and epochs,
no SupportNet, no calibration.
"""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from amips_plugins.errors import require

for _module in ("torch", "faiss", "safetensors", "onnx"):
    require(_module, "train")

import numpy as np

from amips_plugins.export.clustering import centre_of, native_cells, query_aware_cells
from amips_plugins.export.cost_curves import (
    Curve,
    curve,
    levels_by_threshold,
    resampled_costs,
)
from amips_plugins.export.dataset import TrainingTask, choose_device, pose
from amips_plugins.export.queries import QuerySplits, guess_queries, split_queries
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import native_candidate, train_router
from amips_plugins.export.targets import top_keys
from amips_plugins.export.trial_result import SearchCost, Trial
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_keys, normalise

__all__ = ["EPOCHS", "TrialOptions", "pose_trial", "run_trial"]

_MOST_QUERIES = 20_000
_GUESSES = 5_000
EPOCHS = 4
_PER_LIST = 16  # keys of the sample in one list of an index at least, or its lists mean nothing
_COMPARED = 1_000  # keys whose nearest neighbour is looked up

_Search = Literal["index", "centroids", "perfect", "linear"]


@dataclass(frozen=True)
class TrialOptions:
    """What to try.

    Attributes
    ----------
    n_cells
        Cells to route to.
    recalls
        Recalls to report, the last being the one that is judged.
    k
        Which recall@k.
    lists
        Lists of the collection's own index; None where it has none.
    count
        Keys of the whole collection, which the model's cost is shared among.
    read
        Keys that were read to draw the sample.
    seed
        Decides every random choice.
    """

    n_cells: int
    recalls: tuple[float, ...]
    k: int
    lists: int | None
    count: int
    read: int
    seed: int = 0


def run_trial(
    keys: FloatArray,
    metric: Metric,
    queries: FloatArray | None,
    wanted: TrialOptions,
    progress: Progress = no_progress,
) -> Trial:
    """Train a linear router quickly, and compare it with centroids and a perfect router.

    Raises ``TrainingError`` where there are too few keys or queries.
    """
    splits = _splits(keys, metric, queries, wanted.seed)
    with tempfile.TemporaryDirectory(prefix="amips-doctor-") as work:
        task = _pose(keys, metric, splits, wanted, Path(work), progress)
        return _measure(task, splits, wanted)


def pose_trial(
    keys: FloatArray,
    metric: Metric,
    queries: FloatArray | None,
    wanted: TrialOptions,
    work: Path,
    progress: Progress,
) -> tuple[TrainingTask, QuerySplits]:
    """Look up the exact answers that a trial learns from and is measured by.

    Raises
    ------
    TrainingError
        Too few queries.
    """
    splits = _splits(keys, metric, queries, wanted.seed)
    return _pose(keys, metric, splits, wanted, work, progress), splits


def _splits(keys: FloatArray, metric: Metric, queries: FloatArray | None, seed: int) -> QuerySplits:
    if queries is None:
        centre = centre_of(keys, metric)
        return split_queries(guess_queries(keys, _GUESSES, seed, centre=centre), seed, "guess")
    chosen = np.random.default_rng(seed).permutation(len(queries))[:_MOST_QUERIES]
    return split_queries(queries[np.sort(chosen)], seed)


def _pose(
    keys: FloatArray,
    metric: Metric,
    splits: QuerySplits,
    wanted: TrialOptions,
    work: Path,
    progress: Progress,
) -> TrainingTask:
    # Nothing is calibrated here: those queries make the test larger.
    test = np.concatenate([splits.calibrate, splits.test])
    centre = centre_of(keys, metric)
    return pose(
        keys,
        lift_keys(keys, metric, centre),
        metric,
        replace(splits, calibrate=splits.calibrate[:0], test=test),
        k=wanted.k,
        recall=wanted.recalls[-1],
        seed=wanted.seed,
        device=choose_device(),
        work=work,
        progress=progress,
        centre=centre,
    )


def _measure(task: TrainingTask, splits: QuerySplits, wanted: TrialOptions) -> Trial:
    keys, metric, train = task.keys, task.metric, task.train
    n_cells = min(wanted.n_cells, len(train.queries), len(keys))
    with task.progress("cells", 2 + (wanted.lists is not None), 0, "partitions") as step:
        plain, plain_cells = native_cells(keys, metric, n_cells, wanted.seed)
        step.advance()
        aware, aware_cells = query_aware_cells(
            keys, metric, n_cells, wanted.seed, train.queries, train.hits
        )
        step.advance()
        curves: dict[_Search, tuple[int, Curve]] = {}
        if wanted.lists is not None:
            n_lists = max(1, min(wanted.lists, len(keys) // _PER_LIST))
            lists = native_candidate(task, *native_cells(keys, metric, n_lists, wanted.seed))
            curves["index"] = n_lists, lists.measure(task.test)
            step.advance()
    preset = PRESETS["default"]["linear"]
    quick = replace(preset, schedule=replace(preset.schedule, epochs=EPOCHS))
    linear = train_router("linear", quick, task, aware, aware_cells)
    centroids = native_candidate(task, plain, plain_cells)
    curves["centroids"] = plain.n_cells, centroids.measure(task.test)
    curves["perfect"] = plain.n_cells, _perfect(task, plain_cells, plain.sizes)
    curves["linear"] = aware.n_cells, linear.measure(task.test)
    # A model costs what it costs, however few keys the sample has.
    smaller = len(keys) / max(wanted.count, 1)
    scaled = {
        name: (cells, replace(found, model=found.model * smaller))
        for name, (cells, found) in curves.items()
    }
    costs = tuple(
        cost
        for name, (cells, found) in scaled.items()
        for cost in _costs(name, cells, found, wanted)
    )
    last = {
        name: resampled_costs(found, wanted.k, wanted.recalls, wanted.seed)[-1]
        for name, (_, found) in scaled.items()
    }
    low, high = np.quantile(last["linear"] / last.get("index", 1.0), [0.025, 0.975])
    learned_low, learned_high = np.quantile(last["linear"] / last["centroids"], [0.025, 0.975])
    query_nearness, key_nearness = _nearness(task)
    return Trial(
        k=wanted.k,
        keys=len(keys),
        read=wanted.read,
        train_queries=len(train.queries),
        test_queries=len(task.test.queries),
        guessed=splits.source == "guess",
        costs=costs,
        ratio_low=float(low),
        ratio_high=float(high),
        learned_low=float(learned_low),
        learned_high=float(learned_high),
        query_nearness=query_nearness,
        key_nearness=key_nearness,
    )


def _perfect(task: TrainingTask, assignment: IntArray, sizes: IntArray) -> Curve:
    """Measure the best order of cells there is: by the hits that a cell holds for its keys.

    One threshold on hits per key scanned, for all queries, is the greedy solution of the knapsack
    that mean recall and mean cost pose.
    """
    hit_cells = assignment[task.test.hits]
    held = np.zeros((len(hit_cells), len(sizes)), dtype=np.float32)
    for column in hit_cells[:, : task.k].T:
        held[np.arange(len(held)), column] += 1
    worth: FloatArray = np.divide(held, sizes, dtype=np.float32)
    steps = np.quantile(worth[worth > 0], np.linspace(0.0, 1.0, 200)).astype(np.float32)
    thresholds: FloatArray = np.append(np.unique(steps)[::-1], np.float32(-np.inf))
    levels = levels_by_threshold(worth, thresholds)
    return curve(levels, len(thresholds), hit_cells, sizes, 0.0, task.test.as_good)


def _costs(name: _Search, n_cells: int, found: Curve, wanted: TrialOptions) -> list[SearchCost]:
    resampled = resampled_costs(found, wanted.k, wanted.recalls, wanted.seed)
    return [
        SearchCost(
            search=name,
            n_cells=n_cells,
            recall=recall,
            total=found.cost(wanted.k, recall),
            low=float(np.quantile(totals, 0.025)),
            high=float(np.quantile(totals, 0.975)),
        )
        for recall, totals in zip(wanted.recalls, resampled, strict=True)
    ]


def _nearness(task: TrainingTask) -> tuple[float, float]:
    """Return the median cosine of a query and its best key, and of a key and its nearest other."""
    keys = normalise(np.asarray(task.keys, dtype=np.float32))
    device = task.device
    queries = normalise(task.test.queries)
    _, to_queries = top_keys(queries, keys, 1, device)
    rows = np.random.default_rng(task.seed).permutation(len(keys))[:_COMPARED]
    # The nearest of all is the key itself.
    _, to_keys = top_keys(keys[np.sort(rows)], keys, min(2, len(keys)), device)
    return float(np.median(to_queries)), float(np.median(to_keys[:, -1]))
