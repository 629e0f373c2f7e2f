"""The keys of a snapshot as training queries see them, shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from amips_plugins.export.executors import LOCAL, Executor
from amips_plugins.export.keys import Keys, Shard, blocks, shards
from amips_plugins.models.cells import View, place_keys
from amips_plugins.vectors import FloatArray, IntArray, Metric, normalise

__all__ = ["QueryAware", "SeenKeys", "first_equals", "solve_ridge"]

_BLOCK = 16_384
_PAIRS = 16_384  # of a key and a query that hits it, looked at at once
_HEAT_RIDGE = 10.0
_NEARNESSES = 1 << 24  # of keys to cells, worked out at once


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
    max_cell
        Largest cell, as a multiple of the mean, as far as offsets can make it so; None for any.
    """

    weight: float = 2.0
    trust: float = 0.8
    popularity: float = 0.2
    new_popularity: float = 0.5
    power: float = 0.5
    size_penalty: float = 0.02
    iterations: int = 12
    depth: int = 30
    max_cell: float | None = None


@dataclass(frozen=True)
class Hits:
    """Which queries hit which keys: those of ``rows[i]`` are ``queries[starts[i]:starts[i + 1]]``.

    ``rows`` are sorted and distinct.
    """

    rows: IntArray
    starts: IntArray
    queries: IntArray

    @classmethod
    def of(cls, hits: IntArray) -> Hits:
        """Turn ``(n_queries, depth)`` rows of keys around."""
        flat = hits.ravel()
        order = np.argsort(flat, kind="stable")
        rows, starts = np.unique(flat[order], return_index=True)
        starts = np.append(starts, len(flat)).astype(np.int64)
        return cls(rows, starts, order // max(hits.shape[1], 1))

    def take(self, low: int, high: int) -> Hits:
        """Return those of the keys ``low`` to ``high``, counted in ``rows``."""
        starts = self.starts[low : high + 1]
        queries = self.queries[starts[0] : starts[-1]]
        return Hits(self.rows[low:high], starts - starts[0], queries)

    def within(self, shard: Shard) -> Hits:
        """Return those of a shard's keys."""
        low, high = np.searchsorted(self.rows, [shard.first, shard.end])
        return self.take(int(low), int(high))

    def means(self, queries: FloatArray) -> FloatArray:
        """Return the unit mean query of every key, ``(len(rows), dim)``."""
        sums = torch.zeros((len(self.rows), queries.shape[1]))
        owner = np.repeat(np.arange(len(self.rows)), np.diff(self.starts))
        for low in range(0, len(owner), _PAIRS):
            pairs = slice(low, low + _PAIRS)
            which = torch.from_numpy(queries[self.queries[pairs]])
            sums.index_add_(0, torch.from_numpy(owner[pairs]), which)
        return normalise(sums.numpy())


@dataclass(frozen=True)
class _Known:
    """What every shard has to know to see its keys."""

    keys: Keys
    metric: Metric
    centre: FloatArray | None
    queries: FloatArray
    trust: float
    view: View | None = None

    def places(self, rows: slice | IntArray) -> FloatArray:
        """Read keys as ``place_keys`` puts them."""
        return place_keys(np.asarray(self.keys[rows], np.float32), self.metric, self.centre)

    def see(self, places: FloatArray, hits: Hits, at: IntArray, heat: FloatArray) -> FloatArray:
        """Return the views of keys; those ``at`` these places have hits of their own."""
        assert self.view is not None  # noqa: S101 - for the type checker
        seen = self.view.see(places, self.metric)
        if len(at):
            own = places[at]
            mixed = self.trust * hits.means(self.queries)
            mixed += (1 - self.trust) * (own @ self.view.matrix)
            moved = own + np.float32(self.view.weight) * normalise(mixed)
            seen[at, :-1] = moved if self.metric is Metric.L2 else normalise(moved)
        seen[:, -1] = heat
        return seen


class SeenKeys:
    """The keys of a snapshot as training queries see them.

    Parameters
    ----------
    keys, metric, centre
        The keys.
    queries, hits
        Training queries as they are, and the ``(n_queries, depth)`` rows of their best keys.
    recipe
        How much the queries count.
    executor
        Does the work.
    """

    def __init__(
        self,
        keys: Keys,
        metric: Metric,
        centre: FloatArray | None,
        queries: FloatArray,
        hits: IntArray,
        recipe: QueryAware,
        executor: Executor = LOCAL,
    ) -> None:
        self._executor, self._parts = executor, shards(len(keys))
        queries = normalise(queries if centre is None else queries - centre)
        # Which of equal keys is among a query's best is chance: they are seen as one key.
        self.first = first_equals(keys, executor)
        hits = self.first[hits]
        copies = np.bincount(self.first, minlength=len(keys))[self.first]
        seen = np.bincount(hits.ravel(), minlength=len(keys))[self.first]
        self.counts = (seen / copies).astype(np.float32)
        del copies, seen
        self._hits = Hits.of(hits)
        self._known = _Known(keys, metric, centre, queries, recipe.trust)
        matrix, length = self._fit_map()
        self._heat = np.log1p(self.counts)
        self._heat -= self._heat.mean()
        self._heat *= recipe.popularity * length / max(float(self._heat.std()), 1e-6)
        expected = self._fit_heat(length, recipe.new_popularity * recipe.popularity)
        self.view = View(matrix, recipe.weight * length, expected)
        self._known = _Known(keys, metric, centre, queries, recipe.trust, self.view)

    def _fit_map(self) -> tuple[FloatArray, float]:
        """Fit the map from hit keys to their mean queries; return it and the keys' mean length."""
        dim = self._known.keys.shape[1]
        gram, moment = np.zeros((dim, dim)), np.zeros((dim, dim))
        length = 0.0
        tasks = (self._hits.within(part) for part in self._parts)
        for one, other, lengths in self._executor.map(_moments, self._known, tasks):
            gram, moment, length = gram + one, moment + other, length + lengths
        length = length / len(self._hits.rows) or 1.0  # 1 unless the metric is L2
        return solve_ridge(gram, moment, length**2), length

    def _fit_heat(self, length: float, boost: float) -> FloatArray:
        """Fit the popularity as an affine function of a key's place."""
        dim = self._known.keys.shape[1]
        gram, moment = np.zeros((dim + 1, dim + 1)), np.zeros(dim + 1)
        tasks = ((part, self._heat[part.rows]) for part in self._parts)
        for one, other in self._executor.map(_heat_moments, self._known, tasks):
            gram, moment = gram + one, moment + other
        heat = solve_ridge(gram, moment, _HEAT_RIDGE * length**2)
        heat[-1] += boost * length
        return heat

    def views(self, rows: IntArray) -> Iterator[tuple[slice, FloatArray]]:
        """Yield ``(n, dim + 1)`` views of rows in order, block by block, and which they are.

        A key's own queries count where it has some.
        """
        for low in range(0, len(rows), _BLOCK):
            block = slice(low, min(low + _BLOCK, len(rows)))
            there = rows[block]
            first, hit_rows = self.first[there], self._hits.rows
            found = np.searchsorted(hit_rows, first).clip(max=len(hit_rows) - 1)
            at = np.flatnonzero(hit_rows[found] == first)
            parts = [self._hits.take(row, row + 1).queries for row in found[at].tolist()]
            starts = np.cumsum([0, *map(len, parts)])
            queries = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
            hits = Hits(there[at], starts, queries)
            yield block, self._known.see(self._known.places(there), hits, at, self._heat[there])

    def nearest(self, centroids: FloatArray, offsets: FloatArray) -> IntArray:
        """Return for every key which centroid is nearest to its view."""
        rule = self._known, centroids, offsets
        tasks = ((part, self._hits.within(part), self._heat[part.rows]) for part in self._parts)
        chosen = np.concatenate(list(self._executor.map(_nearest, rule, tasks)))
        return chosen[self.first]  # equal keys share a cell, to the last bit


def _moments(known: _Known, hits: Hits) -> tuple[FloatArray, FloatArray, float]:
    dim = known.keys.shape[1]
    gram = np.zeros((dim, dim), dtype=np.float32)
    moment = np.zeros((dim, dim), dtype=np.float32)
    length = 0.0
    for low in range(0, len(hits.rows), _BLOCK):
        block = hits.take(low, min(low + _BLOCK, len(hits.rows)))
        places = known.places(block.rows)
        gram += places.T @ places
        moment += places.T @ block.means(known.queries)
        length += float(np.linalg.norm(places, axis=1).sum(dtype=np.float64))
    return gram, moment, length


def _heat_moments(known: _Known, task: tuple[Shard, FloatArray]) -> tuple[FloatArray, FloatArray]:
    shard, heat = task
    dim = known.keys.shape[1]
    gram = np.zeros((dim + 1, dim + 1), dtype=np.float32)
    moment = np.zeros(dim + 1, dtype=np.float32)
    for rows, block in blocks(known.keys, shard):
        places = place_keys(block, known.metric, known.centre)
        affine = np.hstack([places, np.ones((len(places), 1), dtype=np.float32)])
        gram += affine.T @ affine
        moment += affine.T @ heat[rows.first - shard.first : rows.end - shard.first]
    return gram, moment


def _nearest(
    rule: tuple[_Known, FloatArray, FloatArray], task: tuple[Shard, Hits, FloatArray]
) -> IntArray:
    (known, centroids, offsets), (shard, hits, heat) = rule, task
    chosen = np.empty(len(shard), dtype=np.int64)
    size = min(_BLOCK, max(256, _NEARNESSES // len(centroids)))
    for rows, block in blocks(known.keys, shard, size):
        places = place_keys(block, known.metric, known.centre)
        here = hits.within(rows)
        own = slice(rows.first - shard.first, rows.end - shard.first)
        seen = known.see(places, here, here.rows - rows.first, heat[own])
        chosen[own] = (seen @ centroids.T + offsets).argmax(axis=1)
    return chosen


def first_equals(keys: Keys, executor: Executor = LOCAL) -> IntArray:
    """Return for every key the row of the first key that has the very same vector."""
    hashes = np.concatenate(list(executor.map(_hashes, keys, shards(len(keys)))))
    _, firsts, group = np.unique(hashes, return_index=True, return_inverse=True)
    first: IntArray = firsts[group.ravel()]
    return first


def _hashes(keys: Keys, shard: Shard) -> npt.NDArray[np.uint64]:
    hashes = np.empty(len(shard), dtype=np.uint64)
    for rows, read in blocks(keys, shard):
        block = read + np.float32(0.0)  # which makes one number of the two zeros
        digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in block)
        hashes[rows.first - shard.first : rows.end - shard.first] = np.frombuffer(digests, "<u8")
    return hashes


def solve_ridge(
    gram: npt.NDArray[np.float64], moment: npt.NDArray[np.float64], penalty: float
) -> FloatArray:
    """Return the ridge regression from inputs to outputs by their second moments."""
    ridge = np.linalg.solve(gram + penalty * np.eye(len(gram)), moment)
    solved: FloatArray = ridge.astype(np.float32)
    return solved
