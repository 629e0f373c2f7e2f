"""Ways to search many graphs: which keys each graph holds, and which graphs a query searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from amips_plugins.cli.progress import show_progress
from amips_plugins.export.clustering import QueryAware, native_cells, query_aware_cells
from amips_plugins.export.cost_curves import (
    Curve,
    levels_by_rank,
    levels_by_threshold,
    thresholds_for,
)
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import native_candidate, train_router
from amips_plugins.export.targets import top_keys
from amips_plugins.export.votes import members_by_votes, with_members
from amips_plugins.vectors import FloatArray, IntArray

__all__ = [
    "FAR_ENOUGH",
    "METHODS",
    "RECALLS",
    "FanoutRow",
    "Way",
    "chosen",
    "deepened",
    "efforts_for",
    "way",
]

METHODS = ("one-graph", "fan-out", "kmeans-nearest", "routed", "routed-spill")
RECALLS = (0.90, 0.95, 0.98)
_EFFORTS = (10, 16, 24, 32, 48, 64)
# Where there is nothing but ef to choose, steps as fine as those of a threshold.
_FINE = (10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 56, 64)
_ONE_GRAPH = (72, 80, 90, 100, 120, 140, 160, 180, 200, 250, 300, 400)
_MANY_KEYS = (100, 150, 200)
# Cells are looked into until this share of the k best could be found: beyond it no target lies.
FAR_ENOUGH = {10: 0.996, 100: 0.993}


class FanoutRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one way to search costs to reach one recall.

    Attributes
    ----------
    engine, data, seed
        What was searched, and the seed of split, cells and training.
    segments
        Number of graphs.
    method
        One of ``METHODS``, "two efforts" behind it where that is so.
    k, target
        The target: recall@k.
    recall
        Recall on the test queries at the setting that reaches the target on calibration queries;
        None where none does, and so are the following.
    distances
        Computed a query, the router's multiplications included; only where they are counted.
    cpu_s_per_1000
        CPU seconds of the engine for 1,000 queries; None where distances are counted.
    p50_ms
        Median of a call.
    batch
        Queries in a call.
    graphs
        Searched a query.
    effort
        HNSW's ef.
    near_graphs, far_effort
        With two efforts, how many graphs are searched with ``effort``, and the ef of the others.
    largest
        The largest graph, as a multiple of the mean.
    max_cell
        What it was to be at most.
    storage
        Keys stored, copies counted, as a multiple of the keys.
    """

    engine: str
    data: str
    seed: int
    segments: int
    method: str
    k: int = 0
    target: float = 0.0
    storage: float
    batch: int = 1
    recall: float | None = None
    distances: float | None = None
    cpu_s_per_1000: float | None = None
    p50_ms: float | None = None
    graphs: float | None = None
    effort: int | None = None
    near_graphs: float | None = None
    far_effort: int | None = None
    largest: float | None = None
    max_cell: float | None = None


Levels = Callable[[Split], tuple[IntArray, int]]
"""Says at which level a query searches each cell, and how many levels there are."""


@dataclass(frozen=True)
class Way:
    """A way to search: the cells of every key, and the order in which a query searches them."""

    members: IntArray
    n_cells: int
    model_keys: float
    levels: Levels
    efforts: tuple[int, ...] = _EFFORTS
    routed: bool = False  # by a threshold for all queries

    @property
    def largest(self) -> float:
        """The largest cell, copies counted, as a multiple of the mean."""
        sizes = [int((self.members == cell).any(axis=1).sum()) for cell in range(self.n_cells)]
        return max(sizes) * self.n_cells / sum(sizes)

    @property
    def storage(self) -> float:
        """Keys stored, copies counted, as a multiple of the keys."""
        copies = sum(int((column != self.members[:, 0]).sum()) for column in self.members.T)
        return 1.0 + copies / len(self.members)


def way(
    method: str, task: TrainingTask, segments: int, spill: float, max_cell: float | None = None
) -> Way:
    """Prepare a way to search; nothing of it sees the calibration or the test queries."""
    n_keys, train = len(task.keys), task.train
    if method in ("one-graph", "fan-out"):
        members = np.random.default_rng(task.seed).permutation(n_keys) % segments

        def all_at_once(split: Split) -> tuple[IntArray, int]:
            return np.zeros((len(split.queries), segments), dtype=np.int64), 1

        efforts = _FINE + (_ONE_GRAPH if segments == 1 else ())
        return Way(members[:, None], segments, 0.0, all_at_once, efforts)
    if method == "kmeans-nearest":
        cells, assignment = native_cells(task.keys, task.metric, segments, task.seed)
        candidate = native_candidate(task, cells, assignment)
    else:
        cells, assignment = query_aware_cells(
            task.keys,
            task.metric,
            segments,
            task.seed,
            train.queries,
            train.hits,
            QueryAware(max_cell=max_cell),
        )
        members = assignment[:, None]
        if method == "routed-spill":
            best = train.hits[:, : task.k]
            members = members_by_votes(assignment, best, cells.n_cells, spill, max_cell=max_cell)
            cells = with_members(cells, members)
        preset = PRESETS["default"]["linear"]
        candidate = train_router("linear", preset, task, cells, members, graphs=True)
    members = candidate.assignment.reshape(n_keys, -1)
    priority = candidate.priority
    assert priority is not None
    validated = priority(task.validate)
    if method == "kmeans-nearest":
        ranks = levels_by_rank(validated)
        most = 1 + max(
            int(np.quantile(np.take_along_axis(ranks, members[hits, 0], axis=1), share))
            for hits, share in _far(task.validate)
        )

        def by_rank(split: Split) -> tuple[IntArray, int]:
            return np.minimum(levels_by_rank(priority(split)), most), most

        return Way(members, cells.n_cells, float(cells.n_cells), by_rank)
    lowest = min(
        float(np.quantile(_best(validated, members[hits]), 1.0 - share))
        for hits, share in _far(task.validate)
    )
    thresholds = thresholds_for(validated, members[task.validate.hits[:, : task.k]])
    thresholds = thresholds[thresholds >= lowest]

    def by_threshold(split: Split) -> tuple[IntArray, int]:
        return levels_by_threshold(priority(split), thresholds), len(thresholds)

    model_keys = candidate.parameters / task.keys.shape[1]
    return Way(members, cells.n_cells, model_keys, by_threshold, routed=True)


def _far(split: Split) -> list[tuple[IntArray, float]]:
    """Return the hits that are to be reachable, and which share of them."""
    return [(split.hits[:, :k], share) for k, share in FAR_ENOUGH.items()]


def _best(priority: FloatArray, hit_cells: IntArray) -> FloatArray:
    flat = np.take_along_axis(priority, hit_cells.reshape(len(priority), -1), axis=1)
    best: FloatArray = flat.reshape(hit_cells.shape).max(axis=2)
    return best


def chosen(found: list[Curve], efforts: Sequence[int], k: int, target: float) -> int | None:
    """Return which effort reaches a recall at the least cost; an engine's ef is k at least."""
    costs = [
        curve.cost(k, target) if effort >= min(k, 100) else np.inf
        for curve, effort in zip(found, efforts, strict=True)
    ]
    return int(np.argmin(costs)) if np.isfinite(min(costs)) else None


def efforts_for(way: Way, ks: Sequence[int]) -> tuple[int, ...]:
    """Return the efforts to try, larger ones too where many keys are wanted."""
    many = way.n_cells > 1 and max(ks) > min(way.efforts)
    return way.efforts + (_MANY_KEYS if many else ())


def deepened(task: TrainingTask, queries: int, depth: int) -> TrainingTask:
    """Look up as many answers as the largest k needs, of some of the queries."""

    def deep(split: Split) -> Split:
        some = split.take(np.arange(min(queries, len(split.queries))))
        hits, _ = top_keys(some.unit, task.lifted, depth, task.device, show_progress)
        return replace(some, hits=hits)

    return replace(
        task,
        validate=deep(task.validate),
        calibrate=deep(task.calibrate),
        test=deep(task.test),
    )
