"""What may be promised about the router that is published, and from which queries.

Many queries are split: what calibrates has trained nothing, and the promise is about the very model
that serves. Few queries cannot spare enough for that, so they are cross-fitted, too: every fold of
the training queries is measured by a router that is cut and trained on the other folds. The router
that serves has learned from all of them; it is taken to be as good as those that have learned from
fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from amips_plugins.bundle.manifest import ModelKind
from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cost_curves import (
    Curve,
    calibrate,
    curve,
    joined,
    levels_by_threshold,
    thresholds_for,
)
from amips_plugins.export.dataset import ENOUGH, Split, TrainingTask
from amips_plugins.export.efforts import InCells, effort_levels
from amips_plugins.models.calibration import Calibration
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Promise", "Refit", "promise"]

MAX_K = 100
_FOLDS = 5

Refit = Callable[[ModelKind, TrainingTask], Candidate]
"""Trains a kind of router anew on another task."""


@dataclass(frozen=True)
class Promise:
    """A calibration, and what it was measured on.

    Attributes
    ----------
    calibration
        What the bundle gets.
    learned, native
        The router at the thresholds of the calibration, and native search at its numbers of probes,
        on the same queries, which neither has seen.
    """

    calibration: Calibration
    learned: Curve
    native: Curve


def promise(
    published: Candidate,
    native: Candidate,
    task: TrainingTask,
    priorities: Callable[[Split], FloatArray],
    refit: Refit,
    *,
    index: InCells | None = None,
    two_efforts: bool = False,
    visit: float = 0.0,
) -> Promise:
    """Calibrate the router that serves, whose ``priorities`` are the served model's own.

    The validation split chooses the thresholds. With an ``index`` in the cells every threshold has
    an effort, and what it misses counts; few queries then promise little, for nothing is
    cross-fitted. Efforts are ``two`` by priority or one, and to search a cell costs a ``visit``
    beside its distances (see ``effort_levels``).
    """
    validated = published.assignment[task.validate.hits[:, : task.k]]
    thresholds = thresholds_for(priorities(task.validate), validated)
    depth = min(max(MAX_K, task.k), task.calibrate.hits.shape[1])
    if index is not None:
        levels = effort_levels(
            published, task, priorities, thresholds, index, two=two_efforts, visit=visit
        )
        found = levels.measure(task.calibrate, task)
        calibration = calibrate(found, levels.thresholds, depth, asked=task.calibrate.asked)
        calibration = replace(
            calibration,
            efforts=levels.efforts,
            lists=levels.lists,
            near=levels.near_thresholds,
            far_efforts=levels.far_efforts,
        )
        return Promise(calibration, found, native.measure(task.calibrate))
    measured = [(replace(published, priority=priorities), task.calibrate)]
    if len(task.calibrate.queries) < ENOUGH:
        if published.kind == "native":
            measured.append((measured[0][0], task.train))  # centroids have learned from no query
        else:
            measured += _folds(task, partial(refit, published.kind))
    curves = [_at_thresholds(candidate, split, thresholds) for candidate, split in measured]
    natives = [native.measure(split) for _, split in measured]
    learned = joined(curves)
    asked = [split.asked for _, split in measured if split.asked is not None]
    times = np.concatenate(asked) if len(asked) == len(measured) else None
    calibration = calibrate(learned, thresholds, depth, asked=times)
    return Promise(calibration, learned, joined(natives))


def _folds(
    task: TrainingTask, refit: Callable[[TrainingTask], Candidate]
) -> Iterator[tuple[Candidate, Split]]:
    train = task.train
    # Queries lie in the order of their hashes, so every fifth is a random fifth.
    number = np.arange(len(train.queries)) % _FOLDS
    for fold in range(_FOLDS):
        work = task.work / f"fold-{fold}"
        work.mkdir(exist_ok=True)
        learned_from: IntArray = np.flatnonzero(number != fold)
        part = replace(task, train=train.take(learned_from), work=work)
        yield refit(part), train.take(np.flatnonzero(number == fold))


def _at_thresholds(candidate: Candidate, split: Split, thresholds: FloatArray) -> Curve:
    if candidate.priority is None:
        raise ValueError("a KeyNet has no thresholds")
    levels = levels_by_threshold(candidate.priority(split), thresholds)
    sizes, hit_cells = candidate.cells.sizes, candidate.assignment[split.hits]
    model_keys = candidate.parameters / split.unit.shape[1]
    n_keys, always = len(candidate.assignment), int((candidate.assignment < 0).sum())
    n_levels, as_good = len(thresholds), split.as_good
    return curve(levels, n_levels, hit_cells, sizes, model_keys, as_good, n_keys, always)
