"""Cutting the keys into cells."""

from __future__ import annotations

import faiss
import numpy as np

from amips_plugins.cells import Cells, view_keys
from amips_plugins.errors import TrainingError
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_keys, normalise

__all__ = ["centroid_weights", "k_means", "native_cells", "query_aware_cells"]

_SAMPLE_PER_CELL = 256
_ITERATIONS = 25
_BLOCK = 16_384


def k_means(
    points: FloatArray, n_cells: int, seed: int, *, spherical: bool, iterations: int = _ITERATIONS
) -> FloatArray:
    """Run k-means (faiss) on a sample of at most 256 points per cell.

    Parameters
    ----------
    points
        ``(n, dim)`` float32.
    n_cells
        Number of centroids.
    seed
        Same seed, same centroids.
    spherical
        Keep the centroids at unit length.
    iterations
        Lloyd iterations.

    Returns
    -------
    numpy.ndarray
        ``(n_cells, dim)`` float32.
    """
    clustering = faiss.Kmeans(
        points.shape[1],
        n_cells,
        niter=iterations,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=_SAMPLE_PER_CELL,
    )
    clustering.train(np.ascontiguousarray(points, dtype=np.float32))
    return np.array(clustering.centroids, dtype=np.float32).reshape(n_cells, points.shape[1])


def native_cells(
    keys: FloatArray, metric: Metric, n_cells: int, seed: int
) -> tuple[Cells, IntArray]:
    """Cut the keys by where they lie, as an IVF index does.

    Parameters
    ----------
    keys
        ``(n, dim)`` float32, as the collection stores them.
    metric
        Metric of the collection; k-means is spherical unless it is L2.
    n_cells
        Number of cells wanted; cells that come out empty are left out.
    seed
        Same seed, same cells.

    Returns
    -------
    tuple
        The cells, and ``(n,)`` int64 the cell of each key.

    Raises
    ------
    TrainingError
        There are fewer keys than cells.
    """
    check_enough_keys(len(keys), n_cells)
    rows = sample_rows(len(keys), n_cells, seed)
    points = view_keys(np.asarray(keys[rows], dtype=np.float32), metric, None, 0.0)
    centroids = k_means(points, n_cells, seed, spherical=metric is not Metric.L2)
    cells = Cells(centroids, np.zeros(n_cells, dtype=np.int64))
    return without_empty(cells, cells.assign(keys, metric))


def query_aware_cells(
    keys: FloatArray,
    metric: Metric,
    n_cells: int,
    seed: int,
    queries: FloatArray,
    hits: IntArray,
    weight: float = 2.0,
    trust: float = 0.8,
) -> tuple[Cells, IntArray]:
    """Cut the keys by how queries see them, not only by where they lie.

    A key that queries hit is seen as the mean of those queries; a ridge map from such keys to
    those means tells how queries would see any other key. k-means then cuts the keys moved
    towards how they are seen. See ``docs/method.md``.

    Parameters
    ----------
    keys
        ``(n, dim)`` float32, as the collection stores them.
    metric
        Metric of the collection.
    n_cells
        Number of cells wanted; cells that come out empty are left out.
    seed
        Same seed, same cells.
    queries
        ``(n_queries, dim)`` float32 training queries.
    hits
        ``(n_queries, depth)`` int64 rows of each query's best keys.
    weight
        How far a key moves towards how it is seen.
    trust
        Share of the mean of its own queries, against the map, for a key that was hit.

    Returns
    -------
    tuple
        The cells, whose rule places any key by the map alone, and ``(n,)`` int64 the cell of each
        key, for which its own queries count too.

    Raises
    ------
    TrainingError
        There are fewer keys than cells.
    """
    check_enough_keys(len(keys), n_cells)
    rows, means = mean_queries(normalise(queries), hits)
    base = view_keys(np.asarray(keys[rows], dtype=np.float32), metric, None, 0.0)
    gram = base.T @ base + np.eye(keys.shape[1], dtype=np.float32)
    view = np.linalg.solve(gram, base.T @ means).astype(np.float32)
    length = float(np.linalg.norm(base, axis=1).mean())  # 1 unless the metric is L2
    moved = np.float32(weight * length)

    own = base + moved * normalise(trust * means + (1 - trust) * (base @ view))
    own = own if metric is Metric.L2 else normalise(own)
    chosen = sample_rows(len(keys), n_cells, seed)
    points = view_keys(np.asarray(keys[chosen], dtype=np.float32), metric, view, float(moved))
    places = np.searchsorted(rows, chosen)
    hit = places < len(rows)
    hit[hit] = rows[places[hit]] == chosen[hit]
    points[hit] = own[places[hit]]
    centroids = k_means(points, n_cells, seed, spherical=metric is not Metric.L2)

    cells = Cells(centroids, np.zeros(n_cells, dtype=np.int64), view, float(moved))
    assignment = cells.assign(keys, metric)
    assignment[rows] = nearest(own, centroids)
    return without_empty(cells, assignment)


def mean_queries(queries: FloatArray, hits: IntArray) -> tuple[IntArray, FloatArray]:
    """Return the keys that queries hit, and for each the direction of the mean query that hits it.

    Parameters
    ----------
    queries
        ``(n_queries, dim)`` float32 unit rows.
    hits
        ``(n_queries, depth)`` int64 rows of keys.

    Returns
    -------
    tuple
        ``(n_hit,)`` int64 sorted rows of keys, and ``(n_hit, dim)`` float32 unit rows.
    """
    rows, places = np.unique(hits, return_inverse=True)
    places = places.reshape(hits.shape)
    sums = np.zeros((len(rows), queries.shape[1]), dtype=np.float32)
    for column in range(hits.shape[1]):
        np.add.at(sums, places[:, column], queries)
    return rows, normalise(sums)


def nearest(points: FloatArray, centroids: FloatArray) -> IntArray:
    """Return the nearest centroid of every point, blockwise."""
    offsets = 0.5 * np.einsum("ij,ij->i", centroids, centroids)
    blocks = [
        (points[low : low + _BLOCK] @ centroids.T - offsets).argmax(axis=1)
        for low in range(0, len(points), _BLOCK)
    ]
    return np.concatenate(blocks)


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


def sample_rows(count: int, n_cells: int, seed: int) -> IntArray:
    """Choose the rows that k-means sees, in order, so that a memory map is read forwards."""
    wanted = n_cells * _SAMPLE_PER_CELL
    if count <= wanted:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


def without_empty(cells: Cells, assignment: IntArray) -> tuple[Cells, IntArray]:
    """Count the keys of every cell, and leave out the cells that have none."""
    sizes = np.bincount(assignment, minlength=cells.n_cells)
    used = np.flatnonzero(sizes)
    number = np.full(cells.n_cells, -1, dtype=np.int64)
    number[used] = np.arange(len(used))
    kept = Cells(cells.centroids[used], sizes[used], cells.view, cells.weight)
    return kept, number[assignment]


def centroid_weights(
    keys: FloatArray, assignment: IntArray, cells: Cells, metric: Metric
) -> FloatArray:
    """Return the router that compares the query with the centroids, in lifted space.

    Parameters
    ----------
    keys
        ``(n, dim)`` float32, as the collection stores them.
    assignment
        ``(n,)`` cell of each key.
    cells
        The cells.
    metric
        Metric of the collection. For inner product, where keys have lengths, a centroid is as long
        as the keys of its cell are on average.

    Returns
    -------
    numpy.ndarray
        ``(n_cells, lifted_dim)`` float32.
    """
    means = cell_means(keys, assignment, cells.n_cells)
    if metric is Metric.L2:
        return lift_keys(means, metric)
    unit = normalise(cells.centroids if cells.view is None else means)
    if metric is Metric.COSINE:
        return unit
    lengths = np.zeros(cells.n_cells)
    for low in range(0, len(keys), _BLOCK):
        block = np.linalg.norm(keys[low : low + _BLOCK], axis=1)
        lengths += np.bincount(assignment[low : low + _BLOCK], block, cells.n_cells)
    return unit * (lengths / np.maximum(cells.sizes, 1)).astype(np.float32)[:, None]


def cell_means(keys: FloatArray, assignment: IntArray, n_cells: int) -> FloatArray:
    """Return the mean key of every cell, ``(n_cells, dim)`` float32."""
    sums = np.zeros((n_cells, keys.shape[1]), dtype=np.float64)
    for low in range(0, len(keys), _BLOCK):
        np.add.at(sums, assignment[low : low + _BLOCK], keys[low : low + _BLOCK])
    sizes = np.bincount(assignment, minlength=n_cells)
    return (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
