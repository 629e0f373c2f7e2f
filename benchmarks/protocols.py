"""Which queries are learned from, and which are reported on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.queries import augment
from amips_plugins.export.targets import top_keys
from amips_plugins.progress import Progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_queries, normalise
from benchmarks.data import Dataset

__all__ = ["PROTOCOLS", "Protocol", "as_l2", "pose"]

Protocol = Literal["unseen", "noise-split", "zipf"]
"""
unseen
    Test queries come from a split by query, made before anything else. The honest one.
noise-split
    Noisy copies first, then a split at random, as in the reference code of the paper: most test
    queries have a near-twin among the training queries, which FLATTERS every learned router.
zipf
    Repeated traffic: the log and the test traffic are drawn from one Zipf law (exponent 1) over
    the training queries. The router learns from the distinct queries of the log.
"""
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

_DEPTH = 30
_K = 10
_RECALL = 0.95
_NOISE = 0.02
_HELD_OUT = 0.05  # of the training queries, once to stop early by and once to calibrate on


def pose(
    dataset: Dataset, protocol: Protocol, seed: int, work: Path, progress: Progress
) -> TrainingTask:
    """Split the queries and look up their exact answers.

    Only the splits named ``train``, ``validate`` and ``calibrate`` reach training, tuning and
    calibration; no protocol puts a query of ``dataset.test`` there.

    Parameters
    ----------
    dataset
        The data.
    protocol
        How to split.
    seed
        Decides the split, and every random choice of training.
    work
        Folder for checkpoints.
    progress
        Watches the work.
    """
    rng = np.random.default_rng(seed)
    pool = _answered(dataset, "train", dataset.train, progress)
    n_test = len(dataset.test)
    if protocol == "unseen":
        learn = pool
        test = _answered(dataset, "test", dataset.test, progress)
    elif protocol == "noise-split":
        copies = augment(dataset.train, 1, _NOISE, seed)[len(dataset.train) :]
        noisy = _answered(dataset, f"noise-{seed}", copies, progress)
        everything = _joined(pool, noisy)
        order = rng.permutation(len(everything.queries))
        learn, test = _rows(everything, order[n_test:]), _rows(everything, order[:n_test])
    else:
        shares = 1.0 / np.arange(1, len(pool.queries) + 1)
        traffic = rng.permutation(len(pool.queries))
        draws = rng.choice(traffic, len(pool.queries) + n_test, p=shares / shares.sum())
        learn = _rows(pool, np.unique(draws[n_test:]))
        test = _rows(pool, draws[:n_test])
    order = rng.permutation(len(learn.queries))
    held_out = max(1, int(len(order) * _HELD_OUT))
    return TrainingTask(
        keys=dataset.keys,
        lifted=dataset.keys,  # of unit length already
        metric=Metric.COSINE,
        train=_rows(learn, order[2 * held_out :]),
        validate=_rows(learn, order[:held_out]),
        calibrate=_rows(learn, order[held_out : 2 * held_out]),
        test=test,
        k=_K,
        recall=_RECALL,
        seed=seed,
        device=torch.device("cpu"),
        work=work,
        progress=progress,
    )


def as_l2(task: TrainingTask) -> TrainingTask:
    """Return the same task as an L2 index sees it, where unit vectors have the same answers."""

    def lifted(split: Split) -> Split:
        return replace(split, unit=normalise(lift_queries(split.queries, Metric.L2)))

    return replace(
        task,
        metric=Metric.L2,
        train=lifted(task.train),
        validate=lifted(task.validate),
        calibrate=lifted(task.calibrate),
        test=lifted(task.test),
    )


def _answered(dataset: Dataset, name: str, queries: FloatArray, progress: Progress) -> Split:
    """Find the exact answers of some queries, once."""
    path = dataset.cache / f"hits-{name}.npy"
    if path.exists():
        hits: IntArray = np.load(path, allow_pickle=False)
    else:
        device, depth = torch.device("cpu"), min(_DEPTH, len(dataset.keys))
        hits, _ = top_keys(queries, dataset.keys, depth, device, progress, f"exact hits ({name})")
        temporary = path.with_name(f"tmp-{path.name}")
        np.save(temporary, hits, allow_pickle=False)
        temporary.replace(path)
    return Split(queries, queries, hits)


def _rows(split: Split, rows: IntArray) -> Split:
    queries = split.queries[rows]
    return Split(queries, queries, split.hits[rows])


def _joined(one: Split, other: Split) -> Split:
    queries = np.concatenate([one.queries, other.queries])
    return Split(queries, queries, np.concatenate([one.hits, other.hits]))
