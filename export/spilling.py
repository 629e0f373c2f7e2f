"""Whether keys in more than one cell pay, and how many of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cost_curves import Curve, curve, levels_by_threshold, thresholds_for
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.votes import members_by_votes, with_members
from amips_plugins.models.cells import Cells
from amips_plugins.vectors import IntArray

__all__ = ["first_cells", "share_of_copies", "spilled", "worthwhile_spill"]

_SHARES = (0.14, 0.27)
_SECOND_CONDITION = 1.15  # times the cost of a scan in cells: others' keys may lie in them, too
_WORTH = 0.98


def first_cells(assignment: IntArray) -> IntArray:
    """Return every key's own cell."""
    return assignment if assignment.ndim == 1 else assignment[:, 0]


def share_of_copies(assignment: IntArray) -> float:
    """Return how many further cells keys have, as a share of the keys."""
    if assignment.ndim == 1 or not len(assignment):
        return 0.0
    return float((assignment != assignment[:, :1]).sum() / len(assignment))


def spilled(
    task: TrainingTask,
    cells: Cells,
    assignment: IntArray,
    share: float,
    max_cell: float | None = None,
) -> tuple[Cells, IntArray]:
    """Give keys further cells by the votes of the training queries."""
    if not share:
        return cells, assignment
    hits = task.train.hits[:, : task.k]
    members = members_by_votes(assignment, hits, cells.n_cells, share, max_cell=max_cell)
    return (cells, assignment) if members.shape[1] == 1 else (with_members(cells, members), members)


def worthwhile_spill(
    task: TrainingTask,
    plain: Candidate,
    train: Callable[[Cells, IntArray], Candidate],
    max_cell: float | None = None,
) -> Candidate:
    """Return the candidate, or one that is trained for shared keys where that is cheaper.

    Both are judged on the validation queries at the target. What a router that was not trained
    for them makes of shared keys already says whether training one is worth it.
    """
    best, cost = plain, _cost(plain.measure(task.validate), task)
    shares = [
        spilled(task, plain.cells, plain.assignment, share, max_cell)
        for share in _SHARES
        if cost < np.inf and plain.assignment.ndim == 1
    ]
    for cells, members in shares:
        if members.ndim == 1:
            continue
        as_it_is = replace(plain, cells=cells, assignment=members)
        untrained = _SECOND_CONDITION * _cost(_measure(as_it_is, task), task)
        if untrained >= _WORTH * cost:
            continue
        trained = train(cells, members)
        now = _SECOND_CONDITION * _cost(trained.measure(task.validate), task)
        if now < _WORTH * cost:
            best, cost = trained, now
    return best


def _cost(measured: Curve, task: TrainingTask) -> float:
    return measured.cost(task.k, task.recall)


def _measure(candidate: Candidate, task: TrainingTask) -> Curve:
    assert candidate.priority is not None  # noqa: S101 - for the type checker
    split, members = task.validate, candidate.assignment
    priority = candidate.priority(split)
    thresholds = thresholds_for(priority, members[split.hits[:, : task.k]])
    return curve(
        levels_by_threshold(priority, thresholds),
        len(thresholds),
        members[split.hits],
        candidate.cells.sizes,
        candidate.parameters / split.unit.shape[1],
        split.as_good,
        len(members),
    )
