"""A small task to train on, which several tests share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from amips_plugins.export.dataset import TrainingTask, pose
from amips_plugins.export.queries import split_queries
from amips_plugins.export.recipes import Preset
from amips_plugins.progress import no_progress
from amips_plugins.vectors import Metric, lift_keys
from tests.support.training_data import clustered_keys, narrow_queries

DIM, CELLS, K = 8, 10, 5


def make_task(work: Path, metric: Metric = Metric.COSINE, n: int = 400) -> TrainingTask:
    keys = clustered_keys(n, DIM)
    return pose(
        keys,
        lift_keys(keys, metric),
        metric,
        split_queries(narrow_queries(500, DIM), 0),
        k=K,
        recall=0.9,
        seed=0,
        device=torch.device("cpu"),
        work=work,
        progress=no_progress,
    )


def short(preset: Preset, **changes: float) -> Preset:
    """The recipe with a few small epochs."""
    schedule = dataclasses.replace(preset.schedule, epochs=3, batch_size=64)
    return dataclasses.replace(preset, schedule=schedule, **changes)  # type: ignore[arg-type]
