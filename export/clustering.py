"""Cutting the keys into cells."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import faiss
import numpy as np
import torch

from amips_plugins.errors import TrainingError
from amips_plugins.models.cells import Cells, View, place_keys
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
_HEAT_RIDGE = 10.0


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
    keys: FloatArray, metric: Metric, n_cells: int, seed: int, iterations: int = _ITERATIONS
) -> tuple[Cells, IntArray]:
    """Cut the keys by where they lie, as an IVF index does.

    Raises
    ------
    TrainingError
        There are fewer keys than cells.
    """
    check_enough_keys(len(keys), n_cells)
    rows = sample_rows(len(keys), n_cells, seed)
    centre = centre_of(keys, metric)
    points = place_keys(np.asarray(keys[rows], dtype=np.float32), metric, centre)
    spherical = metric is not Metric.L2
    centroids = k_means(points, n_cells, seed, spherical=spherical, iterations=iterations)
    sizes = np.zeros(n_cells, dtype=np.int64)
    cells = Cells(centroids, nearest_offsets(centroids), sizes, centre=centre)
    return without_empty(cells, cells.assign(keys, metric))


@dataclass(frozen=True)
class QueryAware:
    """How query-aware cells are cut; ``docs/method.md`` has the evidence.

    Attributes
    ----------
    weight
        How far a key moves towards how queries see it.
    trust
        Share of the mean of its own queries, against the map, for a key that was hit.
    popularity
        Weight of how often a key is hit, as one more coordinate: keys that are hit often share
        cells with their like.
    new_popularity
        Standard deviations that a new key gets on top of what the map expects of it: it
        had no chance to be hit yet.
    power
        A key counts ``(hits + 1) ** power`` times in k-means.
    size_penalty
        k-means takes ``size_penalty * log(keys in the cell)`` off a cell's nearness.
    iterations
        Lloyd iterations.
    depth
        How many of a query's best keys say how it sees them.
    """

    weight: float = 2.0
    trust: float = 0.8
    popularity: float = 0.2
    new_popularity: float = 0.5
    power: float = 0.5
    size_penalty: float = 0.02
    iterations: int = 12
    depth: int = 30


def query_aware_cells(
    keys: FloatArray,
    metric: Metric,
    n_cells: int,
    seed: int,
    queries: FloatArray,
    hits: IntArray,
    recipe: QueryAware | None = None,
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
    seen = _Seen(keys, metric, queries, hits[:, : recipe.depth], recipe)
    sample = sample_rows(len(keys), n_cells, seed)
    weights = (seen.counts[sample] + 1) ** np.float32(recipe.power)
    centroids, offsets = weighted_k_means(seen.views(sample), weights, n_cells, seed, recipe)
    own_cells = np.concatenate(
        [
            (
                seen.views(np.arange(low, min(low + _BLOCK, len(keys)))) @ centroids.T + offsets
            ).argmax(axis=1)
            for low in range(0, len(keys), _BLOCK)
        ]
    )
    cells = Cells(centroids, offsets, np.zeros(n_cells, dtype=np.int64), seen.view, seen.centre)
    return without_empty(cells, own_cells[seen.first])  # equal keys share a cell, to the last bit


class _Seen:
    """The keys of a snapshot as training queries see them."""

    def __init__(
        self,
        keys: FloatArray,
        metric: Metric,
        queries: FloatArray,
        hits: IntArray,
        recipe: QueryAware,
    ) -> None:
        self._keys, self._metric, self.centre = keys, metric, centre_of(keys, metric)
        queries = normalise(queries if self.centre is None else queries - self.centre)
        # Which of equal keys is among a query's best is chance: they are seen as one key.
        self.first = first_equals(keys)
        copies = np.bincount(self.first, minlength=len(keys))[self.first]
        seen = np.bincount(self.first[hits].ravel(), minlength=len(keys))[self.first]
        self.counts = (seen / copies).astype(np.float32)
        self._hit_rows, means = mean_queries(queries, self.first[hits])
        places = self._places(self._hit_rows)
        length = float(np.linalg.norm(places, axis=1).mean()) or 1.0  # 1 unless the metric is L2
        matrix = ridge(places, means, length**2)
        self._popularity = np.log1p(self.counts)
        self._popularity -= self._popularity.mean()
        self._popularity *= recipe.popularity * length / max(float(self._popularity.std()), 1e-6)
        self.view = View(
            matrix,
            recipe.weight * length,
            self._popularity_map(length, recipe.new_popularity * recipe.popularity),
        )
        mixed = recipe.trust * means + (1 - recipe.trust) * (places @ matrix)
        moved = places + np.float32(self.view.weight) * normalise(mixed)
        self._own = moved if metric is Metric.L2 else normalise(moved)

    def _places(self, rows: IntArray) -> FloatArray:
        keys = np.asarray(self._keys[rows], dtype=np.float32)
        return place_keys(keys, self._metric, self.centre)

    def _popularity_map(self, length: float, boost: float) -> FloatArray:
        """Fit the popularity as an affine function of a key's place."""
        dim = self._keys.shape[1]
        gram = np.zeros((dim + 1, dim + 1), dtype=np.float32)
        moment = np.zeros(dim + 1, dtype=np.float32)
        for low in range(0, len(self._keys), _BLOCK):
            rows = np.arange(low, min(low + _BLOCK, len(self._keys)))
            affine = np.hstack([self._places(rows), np.ones((len(rows), 1), dtype=np.float32)])
            gram += affine.T @ affine
            moment += affine.T @ self._popularity[rows]
        penalty = np.float32(_HEAT_RIDGE * length**2)
        popularity: FloatArray = np.linalg.solve(gram + penalty * np.eye(dim + 1), moment)
        popularity[-1] += boost * length
        return popularity.astype(np.float32)

    def views(self, rows: IntArray) -> FloatArray:
        """Return ``(len(rows), dim + 1)`` views: a key's own queries count where it has some."""
        seen = self.view.see(self._places(rows), self._metric)
        first = self.first[rows]
        at = np.searchsorted(self._hit_rows, first).clip(max=len(self._hit_rows) - 1)
        hit = self._hit_rows[at] == first
        seen[hit, :-1] = self._own[at[hit]]
        seen[:, -1] = self._popularity[rows]
        return seen


def centre_of(keys: FloatArray, metric: Metric) -> FloatArray | None:
    """Return the mean key if the metric is L2, which has no origin of its own."""
    if metric is not Metric.L2:
        return None
    total = np.zeros(keys.shape[1])
    for low in range(0, len(keys), _BLOCK):
        total += np.asarray(keys[low : low + _BLOCK]).sum(axis=0, dtype=np.float64)
    return (total / len(keys)).astype(np.float32)


def first_equals(keys: FloatArray) -> IntArray:
    """Return for every key the row of the first key that has the very same vector."""
    hashes = np.empty(len(keys), dtype=np.uint64)
    for low in range(0, len(keys), _BLOCK):
        # Adding zero makes one number of the two zeros.
        block = np.asarray(keys[low : low + _BLOCK]) + np.float32(0.0)
        digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in block)
        hashes[low : low + _BLOCK] = np.frombuffer(digests, dtype="<u8")
    _, firsts, group = np.unique(hashes, return_index=True, return_inverse=True)
    first: IntArray = firsts[group.ravel()]
    return first


def ridge(inputs: FloatArray, outputs: FloatArray, penalty: float) -> FloatArray:
    """Return the ridge regression matrix from ``(n, dim)`` inputs to ``(n, d)`` outputs."""
    gram = inputs.T @ inputs + np.float32(penalty) * np.eye(inputs.shape[1], dtype=np.float32)
    return np.linalg.solve(gram, inputs.T @ outputs).astype(np.float32)


def weighted_k_means(
    points: FloatArray, weights: FloatArray, n_cells: int, seed: int, recipe: QueryAware
) -> tuple[FloatArray, FloatArray]:
    """Return centroids and offsets of Lloyd's algorithm, see ``Cells``."""
    rng = np.random.default_rng(seed)
    data, mass = torch.from_numpy(points), torch.from_numpy(weights)
    centroids = data[torch.from_numpy(rng.choice(len(points), n_cells, replace=False))].clone()
    sizes: torch.Tensor | None = None
    for _ in range(recipe.iterations):
        offsets = _offsets(centroids, sizes, recipe.size_penalty)
        chosen = torch.cat(
            [
                torch.addmm(offsets, block, centroids.T).argmax(1)
                for block in torch.split(data, _BLOCK)
            ]
        )
        counts = torch.bincount(chosen, minlength=n_cells).float()
        sizes = counts if sizes is None else (sizes + counts) / 2  # damped, or cells oscillate
        total = torch.zeros_like(centroids).index_add_(0, chosen, data * mass[:, None])
        share = torch.zeros(n_cells).index_add_(0, chosen, mass)
        centroids = total / share[:, None].clamp_min(1e-9)
        empty = (counts == 0).nonzero().ravel()
        centroids[empty] = data[torch.from_numpy(rng.choice(len(points), len(empty)))]
    return centroids.numpy(), _offsets(centroids, sizes, recipe.size_penalty).numpy()


def _offsets(centroids: torch.Tensor, sizes: torch.Tensor | None, penalty: float) -> torch.Tensor:
    half = -0.5 * centroids.square().sum(dim=1)
    return half if sizes is None else half - penalty * sizes.clamp_min(1).log()


def mean_queries(queries: FloatArray, hits: IntArray) -> tuple[IntArray, FloatArray]:
    """Return the sorted rows of keys that queries hit, and the unit mean query of each."""
    rows, places = np.unique(hits, return_inverse=True)
    places = places.reshape(hits.shape)
    sums = torch.zeros((len(rows), queries.shape[1]))
    for column in range(hits.shape[1]):
        sums.index_add_(0, torch.from_numpy(places[:, column].copy()), torch.from_numpy(queries))
    return rows, normalise(sums.numpy())


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
    keys: FloatArray,
    assignment: IntArray,
    cells: Cells,
    metric: Metric,
    centre: FloatArray | None = None,
) -> FloatArray:
    """Return ``(n_cells, lifted_dim)`` weights that compare a query with the centroids.

    Keys of inner product have lengths: a centroid is as long as its keys are on average.
    """
    means = cell_means(keys, assignment, cells.n_cells)
    if metric is Metric.L2:
        return lift_keys(means, metric, centre)
    unit = normalise(cells.centroids[:, : keys.shape[1]])
    if metric is Metric.COSINE:
        return unit
    lengths = np.zeros(cells.n_cells)
    for low in range(0, len(keys), _BLOCK):
        own = assignment[low : low + _BLOCK]
        block = np.linalg.norm(keys[low : low + _BLOCK], axis=1)[own >= 0]
        lengths += np.bincount(own[own >= 0], block, cells.n_cells)
    sizes = np.bincount(assignment[assignment >= 0], minlength=cells.n_cells)
    return unit * (lengths / np.maximum(sizes, 1)).astype(np.float32)[:, None]


def cell_means(keys: FloatArray, assignment: IntArray, n_cells: int) -> FloatArray:
    """Return the mean key of every cell, ``(n_cells, dim)`` float32; keys of none (-1) stay out."""
    sums = np.zeros((n_cells, keys.shape[1]), dtype=np.float64)
    for low in range(0, len(keys), _BLOCK):
        cells = assignment[low : low + _BLOCK]
        placed = np.flatnonzero(cells >= 0)
        np.add.at(sums, cells[placed], keys[low : low + _BLOCK][placed])
    sizes = np.bincount(assignment[assignment >= 0], minlength=n_cells)
    return (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
