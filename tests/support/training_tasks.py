"""A small problem to train on, which several tests share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from amips_plugins.export.dataset import Problem, Split
from amips_plugins.export.queries import split_queries
from amips_plugins.export.recipes import Preset
from amips_plugins.export.targets import top_keys
from amips_plugins.progress import no_progress
from amips_plugins.vectors import FloatArray, Metric, lift_keys, lift_queries, normalise
from tests.support.training_data import clustered_keys, narrow_queries

DIM, CELLS, K = 8, 10, 5


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
    """The recipe with a few small epochs."""
    schedule = dataclasses.replace(preset.schedule, epochs=3, batch_size=64)
    return dataclasses.replace(preset, schedule=schedule, **changes)  # type: ignore[arg-type]
