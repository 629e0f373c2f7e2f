"""Threshold and effort together: how far to search the indexes of the cells that are chosen.

A graph misses keys that a scan of its cell finds, and so do lists of codes: thresholds that were
calibrated on cells promise too much of them. Every level of a router gets an effort (HNSW's ef,
or nprobe of an IVF index) beside its threshold, both chosen on validation queries to be cheap
together; what they find is then measured on the calibration queries in indexes like those that
will be laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cell_graphs import CellGraphs
from amips_plugins.export.cell_lists import CellLists
from amips_plugins.export.cost_curves import Curve, curve, levels_by_threshold
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.two_efforts import Graded, choose_two_efforts
from amips_plugins.tuning import list_efforts
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["VISITS", "EffortLevels", "InCells", "choose_efforts", "effort_levels"]

InCells = Literal["hnsw", "ivf_sq8"]
"""The kinds of index inside cells whose misses a promise may count."""

VISITS = {"milvus": 250.0, "qdrant": 250.0}
"""What a visit costs a database beside its distances, in distances (docs/performance.md)."""

EFFORTS = (16, 24, 32, 48, 64, 100, 128, 192)
_PROMISED = 100  # of the best keys
_VALIDATED = 500  # queries
_CALIBRATED = 2_000
# Cells are looked into until this share of the k best, and of all that are promised, lies in them.
_FAR_ENOUGH, _ALL_FAR_ENOUGH = 0.996, 0.985


@dataclass(frozen=True)
class EffortLevels:
    """The levels of a router over cells with an index each.

    Attributes
    ----------
    thresholds, efforts
        ``(n_levels,)``: what a cell has to reach, falling to minus infinity, and how far its index
        is searched, rising.
    indexes
        What will be laid out, as far as it is known.
    candidate
        The router.
    near, far_efforts
        ``(n_levels,)`` with two efforts: the last level whose cells are searched with ``efforts``,
        rising, and the effort of the others, rising. None with one.
    """

    thresholds: FloatArray
    efforts: IntArray
    indexes: CellGraphs | CellLists
    candidate: Candidate
    near: IntArray | None = None
    far_efforts: IntArray | None = None

    @property
    def near_thresholds(self) -> FloatArray | None:
        """What a cell has to reach for the larger effort; None with one."""
        return None if self.near is None else self.thresholds[self.near]

    @property
    def lists(self) -> int | None:
        """Lists of an IVF index; None of graphs."""
        return self.indexes.lists if isinstance(self.indexes, CellLists) else None

    def measure(self, split: Split, task: TrainingTask) -> Curve:
        """Measure on a split what is found, the indexes' own misses counted.

        ``scanned`` is still the share of the keys that lie in the cells.
        """
        assert self.candidate.priority is not None  # noqa: S101 - for the type checker
        split = split.take(np.arange(min(_CALIBRATED, len(split.queries))))
        n_levels, members = len(self.thresholds), _members(self.candidate)
        levels = levels_by_threshold(self.candidate.priority(split), self.thresholds)
        far = self.efforts if self.far_efforts is None else self.far_efforts
        used = np.union1d(self.efforts, far)
        visited = levels < n_levels - 1
        grid, lists = used, self.lists is not None
        if not lists:
            grid = np.union1d(used, [effort for effort in EFFORTS if effort <= _PROMISED])
        finds = self.indexes.search(split.unit, split.hits, visited, grid.tolist(), task.progress)
        # From which level on every effort that is still to come finds a key.
        misses = np.zeros(finds.found.shape[1:], dtype=np.int64)
        ranks = np.arange(1, split.hits.shape[1] + 1)
        hit_cells = members[split.hits]
        flat = np.take_along_axis(levels, hit_cells.reshape(len(levels), -1), axis=1)
        reached = flat.reshape(hit_cells.shape)
        # From which level on the cell of a hit is among those that are searched farther.
        near = np.zeros(n_levels + 1, dtype=np.int64)
        if self.near is not None:
            near = np.searchsorted(self.near, np.arange(n_levels + 1), side="left")
        turns = near[reached]
        for effort in used:
            # Who asks for k keys, the last of them of rank k, searches graphs at least so far.
            least = np.zeros_like(ranks) if lists else ranks
            wanted = np.minimum(np.maximum(effort, least), grid[-1])
            here = np.searchsorted(grid, wanted, side="left")
            found = finds.found[here, :, ranks - 1].swapaxes(0, 1)
            for own, begin, end in ((self.efforts, turns, n_levels), (far, 0, turns)):
                at = np.flatnonzero(own == effort)
                if not len(at):
                    continue
                last = np.minimum(at[-1], np.asarray(end) - 1)
                asked = (last >= at[0]) & (last >= begin)
                misses = np.maximum(misses, np.where(found | ~asked, 0, last + 1))
        found = np.maximum(reached, misses).min(axis=2)
        whole = curve(
            levels,
            n_levels,
            hit_cells,
            self.candidate.cells.sizes,
            self.candidate.parameters / split.unit.shape[1],
            split.as_good,
            len(members),
        )
        return replace(whole, found=np.minimum(found, n_levels - 1))


def effort_levels(
    published: Candidate,
    task: TrainingTask,
    priority: Callable[[Split], FloatArray],
    thresholds: FloatArray,
    index: InCells = "hnsw",
    *,
    two: bool = False,
    visit: float = 0.0,
) -> EffortLevels:
    """Build the indexes and choose the effort of every level on validation queries.

    ``two`` efforts, by priority, are for graphs of databases that search each cell by itself.
    ``visit`` is what searching one more cell costs beside its distances, in distances.
    """
    candidate = replace(published, priority=priority)
    split = task.validate.take(np.arange(min(_VALIDATED, len(task.validate.queries))))
    members, priorities = _members(candidate), priority(split)
    hit_cells = members[split.hits]
    flat = np.take_along_axis(priorities, hit_cells.reshape(len(priorities), -1), axis=1)
    best = flat.reshape(hit_cells.shape).max(axis=2)
    lowest = min(
        float(np.quantile(best[:, : task.k], 1.0 - _FAR_ENOUGH)),
        float(np.quantile(best[:, :_PROMISED], 1.0 - _ALL_FAR_ENOUGH)),
    )
    split = replace(split, hits=split.hits[:, : task.k])
    hit_cells = hit_cells[:, : task.k]
    kept = thresholds[thresholds >= lowest]
    kind = CellGraphs if index == "hnsw" else CellLists
    indexes = kind(task.lifted, members, candidate.cells.n_cells, progress=task.progress)
    efforts = EFFORTS if isinstance(indexes, CellGraphs) else list_efforts(indexes.lists)
    levels = levels_by_threshold(priorities, kept)
    finds = indexes.search(split.unit, split.hits, levels < len(kept), efforts, task.progress)
    graded = Graded(finds, levels, len(kept), hit_cells, 0.0, len(members)).priced(visit)
    if two and isinstance(indexes, CellGraphs):
        near, efforts_near, far = choose_two_efforts(graded, efforts, task.k)
        return EffortLevels(
            np.append(kept, np.float32(-np.inf)),
            np.append(efforts_near, max(efforts)),
            indexes,
            candidate,
            np.append(near, len(kept)),
            np.append(far, max(efforts)),
        )
    chosen = choose_efforts(graded.single(), efforts, task.k)
    return EffortLevels(
        np.append(kept, np.float32(-np.inf)), np.append(chosen, max(efforts)), indexes, candidate
    )


def choose_efforts(curves: Sequence[Curve], efforts: Sequence[int], k: int) -> IntArray:
    """Return an effort for every level, rising: the cheapest way to each recall.

    Parameters
    ----------
    curves
        The same levels with each effort; what they cost is ``scanned``.
    efforts
        Rising.
    k
        Which recall@k.
    """
    places = np.zeros(curves[0].n_levels, dtype=np.int64)
    for recall in np.linspace(0.5, 0.999, 200):
        costs = [one.cost(k, float(recall)) for one in curves]
        if not np.isfinite(min(costs)):
            break
        cheapest = int(np.argmin(costs))
        level = int((curves[cheapest].mean_recall(k) >= recall).argmax())
        places[level] = max(int(places[level]), cheapest)
    return np.asarray(efforts, dtype=np.int64)[np.maximum.accumulate(places)]


def _members(candidate: Candidate) -> IntArray:
    return candidate.assignment.reshape(len(candidate.assignment), -1)
