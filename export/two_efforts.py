"""Two efforts by priority: the best cells' graphs searched far, those of the others less far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from amips_plugins.export.cell_graphs import Finds, joint_curves
from amips_plugins.export.cost_curves import Curve
from amips_plugins.vectors import IntArray

__all__ = ["Graded", "TwoEfforts", "cheapest_pair", "choose_two_efforts"]

_RECALLS = (*np.arange(0.5, 0.9, 0.05), *np.arange(0.9, 0.98, 0.01), 0.98, 0.985, 0.99, 0.995)
_NEAR = (0.6, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0)  # mean graphs


@dataclass(frozen=True)
class TwoEfforts:
    """How far graphs are searched: those up to a level far, the others less.

    Attributes
    ----------
    near, far
        Places of the two efforts among those that were tried, ``near`` that of the best cells.
    until
        The last level whose cells are searched with ``near``.
    """

    near: int
    far: int
    until: int


@dataclass(frozen=True)
class Graded:
    """Searches of graphs with several efforts, from which those with two at a time follow.

    Attributes
    ----------
    finds
        The searches.
    levels
        ``(n_queries, n_cells)`` int64: the level that first searches a cell.
    n_levels
        Number of levels.
    hit_cells
        ``(n_queries, depth, width)`` int64: all cells of the true top keys.
    model_keys
        What choosing the cells costs, in distances.
    n_keys
        Number of keys.
    """

    finds: Finds
    levels: IntArray
    n_levels: int
    hit_cells: IntArray
    model_keys: float
    n_keys: int

    def priced(self, visit: float) -> Graded:
        """Let every visit of a graph cost so many distances more, as it costs an engine."""
        visited = self.levels < self.n_levels
        distances = self.finds.distances + np.float32(visit) * visited
        return replace(self, finds=Finds(self.finds.found, distances))

    def single(self) -> list[Curve]:
        """Measure every effort by itself."""
        return self._curves(self.finds)

    def curve(self, pair: TwoEfforts) -> Curve:
        """Measure two efforts; each level searches what the one before does, and more."""
        flat = self.hit_cells.reshape(len(self.levels), -1)
        reached = np.take_along_axis(self.levels, flat, axis=1).reshape(self.hit_cells.shape)
        found, distances = self.finds.found, self.finds.distances
        return self._curves(
            Finds(
                np.where(reached <= pair.until, found[pair.near], found[pair.far])[None],
                np.where(self.levels <= pair.until, distances[pair.near], distances[pair.far])[
                    None
                ],
            )
        )[0]

    def _curves(self, finds: Finds) -> list[Curve]:
        return joint_curves(
            finds, self.levels, self.n_levels, self.hit_cells, self.model_keys, self.n_keys
        )


def cheapest_pair(
    graded: Graded, efforts: Sequence[int], wanted: Sequence[tuple[int, float]]
) -> list[TwoEfforts | None]:
    """Return the two efforts that reach each recall at the least cost; None where none do.

    Parameters
    ----------
    graded
        Searches of queries that nothing is reported on.
    efforts
        Those that were tried, rising.
    wanted
        Pairs of k and recall@k. An engine's effort is k at least.
    """
    best: list[tuple[float, TwoEfforts | None]] = [(np.inf, None) for _ in wanted]
    for pair in _pairs(graded, len(efforts)):
        curve = graded.curve(pair)
        for place, (k, recall) in enumerate(wanted):
            cost = curve.cost(k, recall) if efforts[pair.far] >= k else np.inf
            if cost < best[place][0]:
                best[place] = cost, pair
    return [pair for _, pair in best]


def choose_two_efforts(
    graded: Graded, efforts: Sequence[int], k: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Return for every level the last that is searched farther, and both efforts; all rise.

    So no cell is searched less far at a level than at one before.
    """
    wanted = [(k, float(recall)) for recall in _RECALLS]
    until, near, far = (np.zeros(graded.n_levels, dtype=np.int64) for _ in range(3))
    for (_, recall), pair in zip(wanted, cheapest_pair(graded, efforts, wanted), strict=True):
        if pair is None:
            continue
        level = int((graded.curve(pair).mean_recall(k) >= recall).argmax())
        for values, value in ((until, pair.until), (near, pair.near), (far, pair.far)):
            values[level] = max(int(values[level]), value)
    known = np.asarray(efforts, dtype=np.int64)
    until, near, far = (np.maximum.accumulate(values) for values in (until, near, far))
    return until, known[near], known[far]


def _pairs(graded: Graded, n_efforts: int) -> Iterator[TwoEfforts]:
    """Go through all pairs of two different efforts, with either for some of the cells."""
    probes = graded.single()[0].probes
    untils = np.unique(np.searchsorted(probes, _NEAR).clip(max=graded.n_levels - 1)).tolist()
    for far in range(n_efforts):
        for near in range(far + 1, n_efforts):
            for until in untils:
                yield TwoEfforts(near, far, until)
