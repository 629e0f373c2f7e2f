"""Tuned bundles, calibrated on a collection in a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amips_plugins.collection import Collection
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.tuned import EffortParameter
from amips_plugins.tune.bundle import write_tuned_bundle
from amips_plugins.tune.measuring import effort_curve, exact_truth
from amips_plugins.tune.recalls import promise
from amips_plugins.vectors import FloatArray


def calibrated(
    collection: Collection, parameter: EffortParameter, efforts: Sequence[int], queries: FloatArray
) -> Calibration:
    truth = exact_truth(collection, queries, 100)
    return promise(effort_curve(collection, parameter, efforts, queries, truth))


def optimistic(efforts: Sequence[int], recall: float = 0.99) -> Calibration:
    """A calibration that promises as much of every effort."""
    levels, n = np.array([*efforts, efforts[-1]], dtype=np.int64), len(efforts) + 1
    same = np.full((100, n), recall, dtype=np.float32)
    same[:, -1] = 1.0
    thresholds = np.append(-levels[:-1], -np.inf).astype(np.float32)
    shares = np.append(levels[:-1] / (2 * levels[-1]), 1.0).astype(np.float32)
    return Calibration(thresholds, same, same, shares, 0.95, levels)


def write_bundle(
    collection: Collection,
    folder: Path,
    parameter: EffortParameter,
    calibration: Calibration,
    recall: float = 0.95,
) -> Path:
    write_tuned_bundle(
        folder,
        collection.info,
        collection.count(),
        next(collection.scan(64)),
        parameter,
        calibration,
        queries="log",
        k=10,
        recall=recall,
        reason="made by hand",
    )
    return folder
