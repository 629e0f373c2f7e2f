"""Vectors that routing pays for, and a short real training on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.train import Run, TrainOptions, train
from amips_plugins.vectors import FloatArray

DIM = 16
CENTRES = np.random.default_rng(0).standard_normal((40, DIM))
NAME = "docs <b>&\"'"  # as an owner might call it


def keys(count: int = 1_500) -> FloatArray:
    rng = np.random.default_rng(1)
    points = CENTRES[rng.integers(40, size=count)] + 0.35 * rng.standard_normal((count, DIM))
    return points.astype(np.float32)


def queries(count: int = 1_500, seed: int = 2) -> FloatArray:
    """Queries of a few of the clusters, to one side of them."""
    rng = np.random.default_rng(seed)
    points = CENTRES[rng.integers(8, size=count)] + 0.35 * rng.standard_normal((count, DIM))
    return (points + 0.8).astype(np.float32)


def collection() -> MemoryCollection:
    return MemoryCollection(keys(), name=NAME)


def short_run(folder: Path) -> Run:
    """Train on that collection; three candidates, two epochs."""
    snapshot = take_snapshot(collection(), folder / "snap")
    options = TrainOptions(n_cells=16, epochs=2)
    return train(snapshot, queries(), folder / "run", options)
