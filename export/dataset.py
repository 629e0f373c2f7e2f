"""What candidates are trained and measured on: keys, and queries with their exact answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from amips_plugins.export.executors import LOCAL, Executor
from amips_plugins.export.keys import Keys
from amips_plugins.export.queries import QuerySplits, augment
from amips_plugins.export.recipes import Preset
from amips_plugins.export.targets import Best, best_keys, top_keys
from amips_plugins.progress import Progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, as_good_as, lift_queries, normalise

__all__ = ["ENOUGH", "Split", "TrainingTask", "augmented", "choose_device", "pose"]

ENOUGH = 500
"""Calibration queries that promise enough by themselves; fewer are helped by cross-fitting."""

_DEPTH = 30  # of the exact answers that are learned from
_DEEP = 128  # of those that are measured on
_SPLITS = ("train", "validate", "calibrate", "test")


@dataclass(frozen=True)
class Split:
    """Queries of one split with their exact answers.

    Attributes
    ----------
    queries
        ``(n, dim)`` float32 as the user has them.
    unit
        ``(n, lifted_dim)`` float32: lifted, of unit length; what the nets see.
    hits
        ``(n, depth)`` int64 rows of the best keys, best first.
    as_good
        ``(n, depth)`` int64: how many keys are as good as each of them; None where nobody asks.
    asked
        ``(n,)`` how often each query was asked; None where nobody knows.
    """

    queries: FloatArray
    unit: FloatArray
    hits: IntArray
    as_good: IntArray | None = None
    asked: IntArray | None = None

    def take(self, rows: IntArray) -> Split:
        """Return some of the queries."""
        others = (None if a is None else a[rows] for a in (self.as_good, self.asked))
        return Split(self.queries[rows], self.unit[rows], self.hits[rows], *others)


@dataclass(frozen=True)
class TrainingTask:
    """Keys, splits and a target.

    Attributes
    ----------
    keys
        ``(n, dim)`` float32, as the collection stores them.
    lifted
        ``(n, lifted_dim)`` float32.
    centre
        Where L2 counts from; None for the origin.
    executor
        Does what is done key by key.
    metric
        Metric of the collection.
    train, validate, calibrate, test
        The splits.
    k, recall
        The target to be cheap at.
    seed
        Decides every random choice.
    device
        Where to train.
    work
        Folder for checkpoints.
    progress
        Watches the work.
    """

    keys: Keys
    lifted: Keys
    metric: Metric
    train: Split
    validate: Split
    calibrate: Split
    test: Split
    k: int
    recall: float
    seed: int
    device: torch.device
    work: Path
    progress: Progress
    centre: FloatArray | None = None
    executor: Executor = LOCAL


LookUp = Callable[[dict[str, FloatArray], dict[str, int]], dict[str, Best]]
"""Finds the best keys of sets of unit queries, as many as each wants, by name."""


def pose(
    keys: Keys,
    lifted: Keys,
    metric: Metric,
    splits: QuerySplits,
    *,
    k: int,
    recall: float,
    seed: int,
    device: torch.device,
    work: Path,
    progress: Progress,
    centre: FloatArray | None = None,
    executor: Executor = LOCAL,
    look_up: LookUp | None = None,
) -> TrainingTask:
    """Look the splits' exact answers up, all in one pass; ``look_up`` may remember them."""
    depth = _DEEP if len(splits.calibrate) < ENOUGH else _DEPTH  # few are measured on, too
    depth = min(max(depth, k), len(keys))
    deep = min(max(_DEEP, k), len(keys))
    lifted_queries = partial(lift_queries, metric=metric, centre=centre)
    depths = dict.fromkeys(_SPLITS, deep) | {"train": depth}

    def here(queries: dict[str, FloatArray], depths: dict[str, int]) -> dict[str, Best]:
        wanted = list(queries.values()), lifted, [depths[name] for name in queries]
        found = best_keys(*wanted, device, progress, "exact answers", executor)
        return dict(zip(queries, found, strict=True))

    units = {name: normalise(lifted_queries(getattr(splits, name))) for name in _SPLITS}
    found = (look_up or here)(units, depths)
    splitted = {
        name: Split(
            getattr(splits, name),
            units[name],
            best.rows,
            count_as_good(lifted_queries(getattr(splits, name)), best.scores, metric),
            splits.asked.get(name),
        )
        for name, best in found.items()
    }
    return TrainingTask(
        keys=keys,
        lifted=lifted,
        metric=metric,
        **splitted,
        k=k,
        recall=recall,
        seed=seed,
        device=device,
        work=work,
        progress=progress,
        centre=centre,
        executor=executor,
    )


def count_as_good(queries: FloatArray, scores: FloatArray, metric: Metric) -> IntArray:
    """Count the keys as good as each answer to lifted queries, given the unit queries' scores."""
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    scores = scores * lengths
    if metric is Metric.L2:  # what the database compares is the squared distance
        scores = 2.0 * scores - np.square(queries[:, :-1]).sum(axis=1, keepdims=True)
    enough = as_good_as(scores)
    counts = [(scores >= enough[:, place, None]).sum(axis=1) for place in range(scores.shape[1])]
    return np.stack(counts, axis=1)


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of this name, ``auto`` being a CUDA device where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def augmented(task: TrainingTask, preset: Preset) -> Split:
    """Return the training split with the recipe's noisy copies, and their own exact answers."""
    if preset.copies == 0:
        return task.train
    queries = augment(task.train.queries, preset.copies, preset.noise, task.seed)
    new = queries[len(task.train.queries) :]
    unit = normalise(lift_queries(new, task.metric, task.centre))
    depth = task.train.hits.shape[1]
    title = "targets (noisy copies)"
    hits, _ = top_keys(unit, task.lifted, depth, task.device, task.progress, title, task.executor)
    return Split(
        queries,
        np.concatenate([task.train.unit, unit]),
        np.concatenate([task.train.hits, hits]),
    )
