"""A quick training over given partitions: what ``amips doctor --partitions`` measures."""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from amips_plugins.errors import require

for _module in ("torch", "faiss"):
    require(_module, "train")

import msgspec
import numpy as np

from amips_plugins.export.cell_graphs import CellGraphs
from amips_plugins.export.cost_curves import Curve, resampled_costs
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.given import Given, largest_first
from amips_plugins.export.quick_trial import EPOCHS, TrialOptions, pose_trial
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import train_router
from amips_plugins.export.targets import top_keys
from amips_plugins.partitions import Value
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, Metric

__all__ = ["PartitionCost", "PartitionTrial", "run_partition_trial"]

_EFFORTS = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
_GRAPH_KEYS, _GRAPH_QUERIES, _BUILD_EFFORT = 20_000, 300, 100


class PartitionCost(msgspec.Struct, frozen=True, kw_only=True):
    """What one order of partitions takes to reach a recall on held-out queries.

    Attributes
    ----------
    search
        ``largest first``, whatever is asked, or ``linear``: a quick router. ``one graph`` is what
        a single HNSW graph over all keys takes, where they can be had in one.
    recall
        The recall@k.
    searches, keys
        Mean number of partitions searched, and the share of the keys that they hold; of one graph
        the share of the keys that a query is compared with, at 20,000 keys or the sample's.
    """

    search: str
    recall: float
    searches: float
    keys: float


class PartitionTrial(msgspec.Struct, frozen=True, kw_only=True):
    """Given partitions, tried on a sample of the keys.

    Attributes
    ----------
    k, partitions, keys
        Which recall@k, how many partitions, and keys in the sample.
    overflow
        Share of the keys without a value, which every query searches.
    largest
        Share of the keys in the largest partition.
    test_queries, guessed
        Queries that were measured on, and whether they were made up from the keys.
    costs
        One graph, the largest first, and a quick router, at every recall; a graph that does not
        reach one has no figure.
    ratio_low, ratio_high
        95 % bootstrap interval of what the router costs over the largest first, in keys, at the
        highest recall.
    """

    k: int
    partitions: int
    keys: int
    overflow: float
    largest: float
    test_queries: int
    guessed: bool
    costs: tuple[PartitionCost, ...]
    ratio_low: float
    ratio_high: float


def run_partition_trial(
    keys: FloatArray,
    values: Sequence[Value | None],
    field: str | None,
    metric: Metric,
    queries: FloatArray | None,
    wanted: TrialOptions,
    progress: Progress = no_progress,
) -> PartitionTrial:
    """Train a linear router quickly, and compare it with searching the largest first.

    Raises
    ------
    TrainingError
        Too few keys or queries, or nothing to choose among.
    """
    given = Given.from_values(values, field)
    with tempfile.TemporaryDirectory(prefix="amips-doctor-") as work:
        task, splits = pose_trial(keys, metric, queries, wanted, Path(work), progress)
        preset = PRESETS["default"]["linear"]
        quick = replace(preset, schedule=replace(preset.schedule, epochs=EPOCHS))
        cells, assignment = given.as_cells(task), given.assignment
        linear = train_router("linear", quick, task, cells, assignment, size_power=0.0)
        curves = {
            "largest first": largest_first(task, given).measure(task.test),
            "linear": linear.measure(task.test),
        }
        last = {
            name: resampled_costs(curve, wanted.k, wanted.recalls, wanted.seed)[-1]
            for name, curve in curves.items()
        }
        low, high = np.quantile(last["linear"] / last["largest first"], [0.025, 0.975])
        return PartitionTrial(
            k=wanted.k,
            partitions=given.cells.n_cells,
            keys=len(keys),
            overflow=given.cells.overflow / len(keys),
            largest=float(given.cells.sizes.max() / len(keys)),
            test_queries=len(task.test.queries),
            guessed=splits.source == "guess",
            costs=(
                *_one_graph(task, wanted),
                *(
                    _cost(name, curve, wanted.k, recall)
                    for name, curve in curves.items()
                    for recall in wanted.recalls
                ),
            ),
            ratio_low=float(low),
            ratio_high=float(high),
        )


def _cost(name: str, curve: Curve, k: int, recall: float) -> PartitionCost:
    level = int((curve.mean_recall(k) >= recall - 1e-12).argmax())
    return PartitionCost(
        search=name,
        recall=recall,
        searches=float(curve.probes[level]),
        keys=float(curve.scanned[:, level].mean()),
    )


def _one_graph(task: TrainingTask, wanted: TrialOptions) -> Iterator[PartitionCost]:
    """Count what a graph over all keys, or some of them, takes to reach each recall."""
    rows = np.random.default_rng(wanted.seed).permutation(len(task.keys))[:_GRAPH_KEYS]
    keys = np.ascontiguousarray(task.lifted[np.sort(rows)], dtype=np.float32)
    unit = task.test.unit[:_GRAPH_QUERIES]
    hits, _ = top_keys(unit, keys, wanted.k, task.device)
    members = np.zeros((len(keys), 1), dtype=np.int64)
    graph = CellGraphs(keys, members, 1, build_effort=_BUILD_EFFORT)
    visited = np.ones((len(unit), 1), dtype=np.bool_)
    finds = graph.search(unit, hits, visited, _EFFORTS)
    found, compared = finds.found.mean(axis=(1, 2, 3)), finds.distances.mean(axis=(1, 2))
    for recall in wanted.recalls:
        if found[-1] >= recall:
            share = float(compared[int((found >= recall).argmax())] / len(keys))
            yield PartitionCost(search="one graph", recall=recall, searches=1.0, keys=share)
