"""Cutting the keys into cells."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import numpy as np
import numpy.typing as npt
import torch

from amips_plugins.errors import TrainingError
from amips_plugins.export.balance import capped_offsets
from amips_plugins.export.executors import LOCAL, Executor
from amips_plugins.export.keys import Keys, Shard, blocks, shards
from amips_plugins.export.views import QueryAware, SeenKeys
from amips_plugins.models.cells import Cells, place_keys
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_keys, normalise

__all__ = [
    "QueryAware",
    "cell_means",
    "centroid_weights",
    "k_means",
    "native_cells",
    "query_aware_cells",
]

_SAMPLE_PER_CELL = 256
_SAMPLE_AT_LEAST = 100_000  # few cells of many keys come out better, and cost seconds
_ITERATIONS = 25
_BLOCK = 16_384
_NEARNESSES = 1 << 24  # of keys to cells, worked out at once


def k_means(
    points: FloatArray, n_cells: int, seed: int, *, spherical: bool, iterations: int = _ITERATIONS
) -> FloatArray:
    """Return centroids of k-means (faiss) on a sample as large as that of ``sample_rows``."""
    clustering = faiss.Kmeans(
        points.shape[1],
        n_cells,
        niter=iterations,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=math.ceil(sample_size(n_cells) / n_cells),
    )
    clustering.train(np.ascontiguousarray(points, dtype=np.float32))
    return np.array(clustering.centroids, dtype=np.float32).reshape(n_cells, points.shape[1])


def native_cells(
    keys: Keys,
    metric: Metric,
    n_cells: int,
    seed: int,
    iterations: int = _ITERATIONS,
    executor: Executor = LOCAL,
) -> tuple[Cells, IntArray]:
    """Cut the keys by where they lie, as an IVF index does.

    Raises
    ------
    TrainingError
        There are fewer keys than cells.
    """
    check_enough_keys(len(keys), n_cells)
    rows = sample_rows(len(keys), n_cells, seed)
    centre = centre_of(keys, metric, executor)
    spherical = metric is not Metric.L2
    with _scratch((len(rows), keys.shape[1])) as points:
        for low in range(0, len(rows), _BLOCK):
            block = slice(low, low + _BLOCK)
            points[block] = place_keys(np.asarray(keys[rows[block]], np.float32), metric, centre)
        centroids = k_means(points, n_cells, seed, spherical=spherical, iterations=iterations)
    sizes = np.zeros(n_cells, dtype=np.int64)
    cells = Cells(centroids, nearest_offsets(centroids), sizes, centre=centre)
    parts = executor.map(_assigned, (keys, metric, cells), shards(len(keys)))
    return without_empty(cells, np.concatenate(list(parts)))


def _assigned(rule: tuple[Keys, Metric, Cells], shard: Shard) -> IntArray:
    keys, metric, cells = rule
    size = min(_BLOCK, max(256, _NEARNESSES // cells.n_cells))
    return np.concatenate([cells.assign(block, metric) for _, block in blocks(keys, shard, size)])


@contextmanager
def _scratch(shape: tuple[int, int]) -> Iterator[FloatArray]:
    """Give an array in a file, whose pages the system may put away; it goes with the block."""
    with tempfile.TemporaryFile() as file:
        yield np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


def query_aware_cells(
    keys: Keys,
    metric: Metric,
    n_cells: int,
    seed: int,
    queries: FloatArray,
    hits: IntArray,
    recipe: QueryAware | None = None,
    executor: Executor = LOCAL,
) -> tuple[Cells, IntArray]:
    """Cut the keys by how queries see them, not only by where they lie.

    A key that queries hit is seen as the mean of those queries; a ridge map from such keys to
    those means tells how queries would see any other key. k-means then cuts the keys moved
    towards how they are seen.

    Raises
    ------
    TrainingError
        There are fewer keys than cells.
    """
    check_enough_keys(len(keys), n_cells)
    recipe = recipe or QueryAware()
    centre, hits = centre_of(keys, metric, executor), hits[:, : recipe.depth]
    seen = SeenKeys(keys, metric, centre, queries, hits, recipe, executor)
    sample = sample_rows(len(keys), n_cells, seed)
    weights = (seen.counts[sample] + 1) ** np.float32(recipe.power)
    with _scratch((len(sample), keys.shape[1] + 1)) as points:
        for block, views in seen.views(sample):
            points[block] = views
        centroids, offsets = weighted_k_means(points, weights, n_cells, seed, recipe)
        if recipe.max_cell is not None:
            offsets = _capped(points, centroids, offsets, recipe.max_cell)
    sizes = np.zeros(n_cells, dtype=np.int64)
    cells = Cells(centroids, offsets, sizes, seen.view, centre)
    return without_empty(cells, seen.nearest(centroids, offsets))


def _capped(
    points: FloatArray, centroids: FloatArray, offsets: FloatArray, max_cell: float
) -> FloatArray:
    """Return offsets with which no cell holds more than ``max_cell`` times the mean."""
    step = min(_BLOCK, max(256, _NEARNESSES // len(centroids)))
    matrix = torch.from_numpy(centroids.T.copy())

    def choose(added: FloatArray) -> tuple[IntArray, FloatArray]:
        cells, margins = [], []
        for low in range(0, len(points), step):
            block = torch.from_numpy(points[low : low + step])
            two = torch.addmm(torch.from_numpy(added), block, matrix).topk(2, dim=1)
            cells.append(two.indices[:, 0].numpy())
            margins.append((two.values[:, 0] - two.values[:, 1]).numpy())
        return np.concatenate(cells), np.concatenate(margins)

    if len(centroids) == 1:
        return offsets
    return capped_offsets(choose, offsets, int(max_cell * len(points) / len(centroids)))


def centre_of(keys: Keys, metric: Metric, executor: Executor = LOCAL) -> FloatArray | None:
    """Return the mean key if the metric is L2, which has no origin of its own."""
    if metric is not Metric.L2:
        return None
    total = np.zeros(keys.shape[1])
    for part in executor.map(_sum, keys, shards(len(keys))):
        total += part
    return (total / len(keys)).astype(np.float32)


def _sum(keys: Keys, shard: Shard) -> npt.NDArray[np.float64]:
    total = np.zeros(keys.shape[1])
    for _, block in blocks(keys, shard):
        total += block.sum(axis=0, dtype=np.float64)
    return total


def weighted_k_means(
    points: FloatArray, weights: FloatArray, n_cells: int, seed: int, recipe: QueryAware
) -> tuple[FloatArray, FloatArray]:
    """Return centroids and offsets of Lloyd's algorithm, see ``Cells``."""
    rng = np.random.default_rng(seed)
    mass = torch.from_numpy(weights)
    centroids = torch.from_numpy(points[rng.choice(len(points), n_cells, replace=False)])
    step = min(_BLOCK, max(256, _NEARNESSES // n_cells))
    sizes: torch.Tensor | None = None
    for _ in range(recipe.iterations):
        offsets = _offsets(centroids, sizes, recipe.size_penalty)
        counts = torch.zeros(n_cells)
        total, share = torch.zeros_like(centroids), torch.zeros(n_cells)
        for low in range(0, len(points), step):
            block, weight = torch.from_numpy(points[low : low + step]), mass[low : low + step]
            chosen = torch.addmm(offsets, block, centroids.T).argmax(1)
            counts += torch.bincount(chosen, minlength=n_cells)
            total.index_add_(0, chosen, block * weight[:, None])
            share.index_add_(0, chosen, weight)
        sizes = counts if sizes is None else (sizes + counts) / 2  # damped, or cells oscillate
        centroids = total / share[:, None].clamp_min(1e-9)
        empty = (counts == 0).nonzero().ravel()
        centroids[empty] = torch.from_numpy(points[rng.choice(len(points), len(empty))])
    return centroids.numpy(), _offsets(centroids, sizes, recipe.size_penalty).numpy()


def _offsets(centroids: torch.Tensor, sizes: torch.Tensor | None, penalty: float) -> torch.Tensor:
    half = -0.5 * centroids.square().sum(dim=1)
    return half if sizes is None else half - penalty * sizes.clamp_min(1).log()


def nearest_offsets(centroids: FloatArray) -> FloatArray:
    """Return the offsets that make the largest inner product the nearest centroid."""
    offsets: FloatArray = -0.5 * np.einsum("ij,ij->i", centroids, centroids)
    return offsets


def check_enough_keys(count: int, n_cells: int) -> None:
    """Refuse more cells than keys.

    Raises
    ------
    TrainingError
        There are fewer keys than cells, or less than one cell.
    """
    if n_cells < 1:
        raise TrainingError(f"{n_cells} cells cut nothing; ask for 1 or more.")
    if count < n_cells:
        raise TrainingError(
            f"{count} keys cannot fill {n_cells} cells; ask for fewer cells, about the square root "
            f"of the number of keys."
        )


def sample_size(n_cells: int) -> int:
    """Return how many points k-means sees, at most."""
    return max(n_cells * _SAMPLE_PER_CELL, _SAMPLE_AT_LEAST)


def sample_rows(count: int, n_cells: int, seed: int) -> IntArray:
    """Choose the rows that k-means sees, in order, so that a memory map is read forwards."""
    wanted = sample_size(n_cells)
    if count <= wanted:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


def without_empty(cells: Cells, assignment: IntArray) -> tuple[Cells, IntArray]:
    """Count the keys of every cell, and leave out the cells that have none."""
    sizes = np.bincount(assignment, minlength=cells.n_cells)
    used = np.flatnonzero(sizes)
    number = np.full(cells.n_cells, -1, dtype=np.int64)
    number[used] = np.arange(len(used))
    kept = Cells(cells.centroids[used], cells.offsets[used], sizes[used], cells.view, cells.centre)
    return kept, number[assignment]


def centroid_weights(
    keys: Keys,
    assignment: IntArray,
    cells: Cells,
    metric: Metric,
    centre: FloatArray | None = None,
    executor: Executor = LOCAL,
) -> FloatArray:
    """Return ``(n_cells, lifted_dim)`` weights that compare a query with the centroids.

    Keys of inner product have lengths: a centroid is as long as its keys are on average.
    """
    if metric is Metric.L2:
        return lift_keys(cell_means(keys, assignment, cells.n_cells, executor), metric, centre)
    unit = normalise(cells.centroids[:, : keys.shape[1]])
    if metric is Metric.COSINE:
        return unit
    lengths = np.zeros(cells.n_cells)
    tasks = ((part, assignment[part.rows]) for part in shards(len(keys)))
    for part in executor.map(_lengths, (keys, cells.n_cells), tasks):
        lengths += part
    sizes = np.bincount(assignment[assignment >= 0], minlength=cells.n_cells)
    return unit * (lengths / np.maximum(sizes, 1)).astype(np.float32)[:, None]


def _lengths(shared: tuple[Keys, int], task: tuple[Shard, IntArray]) -> npt.NDArray[np.float64]:
    (keys, n_cells), (shard, assignment) = shared, task
    lengths = np.zeros(n_cells)
    for rows, block in blocks(keys, shard):
        own = assignment[rows.first - shard.first : rows.end - shard.first]
        lengths += np.bincount(own[own >= 0], np.linalg.norm(block, axis=1)[own >= 0], n_cells)
    return lengths


def cell_means(
    keys: Keys, assignment: IntArray, n_cells: int, executor: Executor = LOCAL
) -> FloatArray:
    """Return the mean key of every cell, ``(n_cells, dim)`` float32; keys of none (-1) stay out."""
    sums = np.zeros((n_cells, keys.shape[1]), dtype=np.float64)
    tasks = ((part, assignment[part.rows]) for part in shards(len(keys)))
    for part in executor.map(_cell_sums, (keys, n_cells), tasks):
        sums += part
    sizes = np.bincount(assignment[assignment >= 0], minlength=n_cells)
    return (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)


def _cell_sums(shared: tuple[Keys, int], task: tuple[Shard, IntArray]) -> npt.NDArray[np.float64]:
    (keys, n_cells), (shard, assignment) = shared, task
    sums = np.zeros((n_cells, keys.shape[1]), dtype=np.float64)
    for rows, block in blocks(keys, shard):
        cells = assignment[rows.first - shard.first : rows.end - shard.first]
        placed = np.flatnonzero(cells >= 0)
        np.add.at(sums, cells[placed], block[placed])
    return sums
