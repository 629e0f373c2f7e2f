"""Keeping what a training measured (see ``amips_plugins.report.training_record``)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cost_curves import curve, levels_by_threshold
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.spilling import first_cells
from amips_plugins.models.calibration import Calibration
from amips_plugins.report.training_record import Curves, Epochs, FlatMap, Line, Promises
from amips_plugins.vectors import FloatArray, Metric, normalise

__all__ = ["flat_map", "record_curves"]

_POINTS = 200  # of one line
_KEYS = 2_000  # on the map
_QUERIES = 500


def record_curves(
    version: str,
    task: TrainingTask,
    candidates: list[Candidate],
    published: Candidate,
    calibration: Calibration | None,
    priorities: FloatArray | None,
    recall: float,
) -> Curves:
    """Measure on the test split what a report shows."""
    probes: list[int] = []
    promises = None
    if calibration is not None and priorities is not None:
        threshold = calibration.default_threshold(task.k, recall)
        searched = np.maximum((priorities >= threshold).sum(axis=1), 1)
        probes = np.bincount(searched, minlength=published.cells.n_cells + 1).tolist()
        promises = _promises(task, published, calibration, priorities)
    hit_cells = first_cells(published.assignment)[task.test.hits[:, : task.k]]
    return Curves(
        version=version,
        lines=[
            line
            for candidate in candidates
            for line in _lines(candidate, task, sorted({1, task.k}))
        ],
        epochs=[
            Epochs(
                candidate=candidate.kind,
                loss=[row["loss"] for row in candidate.history],
                cost=[-row["score"] for row in candidate.history],
            )
            for candidate in candidates
            if candidate.history
        ],
        probes=probes,
        demand=np.bincount(hit_cells[hit_cells >= 0], minlength=published.cells.n_cells).tolist(),
        promises=promises,
        flat=flat_map(task, published),
    )


def _lines(candidate: Candidate, task: TrainingTask, ks: list[int]) -> list[Line]:
    measured = candidate.measure(task.test)
    total = measured.scanned.mean(axis=0, dtype=np.float64) + measured.model
    chosen = np.unique(np.linspace(0, len(total) - 1, _POINTS).round().astype(np.int64))
    return [
        Line(
            candidate=candidate.kind,
            k=k,
            total=_short(total[chosen]),
            recall=_short(measured.mean_recall(k)[chosen]),
        )
        for k in ks
    ]


def _promises(
    task: TrainingTask, published: Candidate, calibration: Calibration, priorities: FloatArray
) -> Promises:
    levels = levels_by_threshold(priorities, calibration.thresholds)
    hit_cells = published.assignment[task.test.hits]
    n_levels, sizes = len(calibration.thresholds), published.cells.sizes
    n_keys, always = len(published.assignment), int((published.assignment < 0).sum())
    measured = curve(levels, n_levels, hit_cells, sizes, 0.0, task.test.as_good, n_keys, always)
    return Promises(
        k=task.k,
        promised=_short(calibration.guaranteed[task.k - 1]),
        measured=_short(measured.mean_recall(task.k)),
        scanned=_short(measured.scanned.mean(axis=0, dtype=np.float64)),
    )


def flat_map(task: TrainingTask, published: Candidate) -> FlatMap:
    """Lay keys and queries flat: principal axes of as many of one as of the other.

    Unless the metric is L2, only directions count.
    """
    rng = np.random.default_rng(task.seed)
    rows = np.sort(rng.permutation(len(task.keys))[:_KEYS])
    keys = np.asarray(task.keys[rows], dtype=np.float32)
    queries = task.test.queries[:_QUERIES]
    if task.metric is not Metric.L2:
        keys, queries = normalise(keys), normalise(queries)
    shift = np.linalg.norm(queries.mean(axis=0) - keys.mean(axis=0))
    spread = np.sqrt(np.square(keys - keys.mean(axis=0)).sum(axis=1).mean())
    both = np.concatenate([keys[: len(queries)], queries])
    middle = both.mean(axis=0)
    _, strength, axes = np.linalg.svd(both - middle, full_matrices=False)
    flat = axes[:2]
    # An axis has no direction of its own: the largest coordinate decides.
    flat = flat * np.sign(flat[np.arange(len(flat)), np.abs(flat).argmax(axis=1)])[:, None]
    return FlatMap(
        keys=_pairs((keys - middle) @ flat.T),
        queries=_pairs((queries - middle) @ flat.T),
        cells=first_cells(published.assignment)[rows].tolist(),
        variance=float(np.square(strength[:2]).sum() / max(np.square(strength).sum(), 1e-12)),
        shift=float(shift / max(spread, 1e-12)),
    )


def _pairs(points: FloatArray) -> list[tuple[float, float]]:
    both = np.zeros((len(points), 2))  # one dimension is a map, too
    both[:, : points.shape[1]] = points
    return [(x, y) for x, y in both.round(4).tolist()]


def _short(values: npt.NDArray[np.floating]) -> list[float]:
    shortened: list[float] = np.asarray(values, dtype=np.float64).round(5).tolist()
    return shortened
