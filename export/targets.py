"""Exact training targets, shard by shard: memory does not grow with keys x queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from amips_plugins.export.executors import LOCAL, Executor
from amips_plugins.export.keys import Keys, Shard, blocks, shards
from amips_plugins.export.near_pairs import Block, inner_products
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Best", "best_keys", "best_per_cell", "cell_order", "top_keys"]

_KEYS = 16_384
_QUERIES = 512
_SUPPORT = 1 << 22  # support values computed at once


@dataclass(frozen=True)
class Best:
    """The best keys of some queries: ``(n, k)`` rows and scores, best first."""

    rows: IntArray
    scores: FloatArray

    @classmethod
    def none(cls, n_queries: int, k: int) -> Best:
        """Return no keys at all, which every key is better than."""
        scores = np.full((n_queries, k), -np.inf, dtype=np.float32)
        return cls(np.zeros((n_queries, k), dtype=np.int64), scores)

    @classmethod
    def of_pairs(
        cls, n_queries: int, k: int, queries: IntArray, rows: IntArray, scores: FloatArray
    ) -> Best:
        """Return the best of some pairs; those of a query come by row."""
        order = np.lexsort((-scores, queries))
        queries, rows, scores = queries[order], rows[order], scores[order]
        place = np.arange(len(queries)) - np.searchsorted(queries, queries)
        first = place < k
        best = cls.none(n_queries, k)
        best.rows[queries[first], place[first]] = rows[first]
        best.scores[queries[first], place[first]] = scores[first]
        return best

    def join(self, other: Best) -> Best:
        """Keep the best of both; among equals those of the first, in the order that they have."""
        scores = np.concatenate([self.scores, other.scores], axis=1)
        kept = np.argsort(-scores, axis=1, kind="stable")[:, : self.rows.shape[1]]
        rows = np.concatenate([self.rows, other.rows], axis=1)
        return Best(np.take_along_axis(rows, kept, 1), np.take_along_axis(scores, kept, 1))


@dataclass(frozen=True)
class _Wanted:
    queries: list[FloatArray]
    depths: list[int]
    keys: Keys
    device: torch.device


def top_keys(
    queries: FloatArray,
    keys: Keys,
    k: int,
    device: torch.device,
    progress: Progress = no_progress,
    title: str = "targets",
    executor: Executor = LOCAL,
) -> tuple[IntArray, FloatArray]:
    """Find the k keys of largest inner product for every query; among equals the first ones."""
    (best,) = best_keys([queries], keys, [k], device, progress, title, executor)
    return best.rows, best.scores


def best_keys(
    queries: Sequence[FloatArray],
    keys: Keys,
    depths: Sequence[int],
    device: torch.device,
    progress: Progress = no_progress,
    title: str = "targets",
    executor: Executor = LOCAL,
    begun: tuple[int, list[Best]] | None = None,
    keep: Callable[[int, list[Best]], None] = lambda done, best: None,  # noqa: ARG005
) -> list[Best]:
    """Find the best keys of several sets of queries, reading the keys once.

    ``keep`` is told after every shard how many are done and what was found so far; ``begun`` is
    the same from an earlier run, to go on from. What was found when a shard is begun says which of
    its keys need no look; what is found in the end is the same without it.
    """
    wanted = _Wanted(list(queries), list(depths), keys, device)
    parts = shards(len(keys))
    none = [Best.none(len(each), k) for each, k in zip(queries, depths, strict=True)]
    done, best = begun or (0, none)
    there = sum(len(part) for part in parts[:done])

    def tasks() -> Iterator[tuple[Shard, list[FloatArray]]]:
        for part in parts[done:]:
            yield part, [one.scores[:, -1].copy() for one in best]

    with progress(title, len(keys), there, "keys") as step:
        for found in executor.map(_best_of_shard, wanted, tasks()):
            best = [one.join(other) for one, other in zip(best, found, strict=True)]
            step.advance(len(parts[done]))
            done += 1
            keep(done, best)
    return best


def _best_of_shard(wanted: _Wanted, task: tuple[Shard, list[FloatArray]]) -> list[Best]:
    """Find the best keys of a shard, of those that are better than the worst found before."""
    shard, worst = task
    best = [
        Best.none(len(queries), k) for queries, k in zip(wanted.queries, wanted.depths, strict=True)
    ]
    device = _here(wanted.device)
    for rows, block in blocks(wanted.keys, shard, _KEYS):
        there = Block(block, device)
        for place, (queries, k) in enumerate(zip(wanted.queries, wanted.depths, strict=True)):
            kept = best[place]
            for chunk in _chunks(len(queries), _QUERIES):
                here = np.ascontiguousarray(queries[chunk], dtype=np.float32)
                least = np.maximum(worst[place][chunk], kept.scores[chunk, -1])
                pairs = there.near(here, least, k)
                scores = inner_products(here, block, *pairs)
                better = scores > least[pairs[0]]
                which, column = pairs[0][better], pairs[1][better]
                touched, which = np.unique(which, return_inverse=True)
                numbers = column + rows.first
                found = Best.of_pairs(len(touched), k, which.ravel(), numbers, scores[better])
                at = touched + chunk.start
                joined = Best(kept.rows[at], kept.scores[at]).join(found)
                kept.rows[at], kept.scores[at] = joined.rows, joined.scores
    return best


def cell_order(assignment: IntArray, n_cells: int) -> tuple[IntArray, IntArray]:
    """Return the rows of keys sorted by cell, and where each cell begins among them."""
    order = np.argsort(assignment, kind="stable")
    return order, np.searchsorted(assignment[order], np.arange(n_cells + 1))


@dataclass(frozen=True)
class _Supported:
    queries: FloatArray
    keys: Keys
    n_cells: int
    device: torch.device


def best_per_cell(
    queries: FloatArray,
    keys: Keys,
    assignment: IntArray,
    n_cells: int,
    device: torch.device,
    progress: Progress = no_progress,
    executor: Executor = LOCAL,
    values: FloatArray | None = None,
    *,
    want_rows: bool = True,
) -> tuple[FloatArray, IntArray]:
    """Return every cell's support value for every query, and the row of the key that attains it.

    ``values`` is where the former go, if they are to lie elsewhere than in memory; of rows that
    nobody wants none come back. The keys are read once for every ``_SUPPORT`` values.
    """
    if values is None:
        values = np.empty((len(queries), n_cells), dtype=np.float32)
    rows = np.zeros((len(queries) if want_rows else 0, n_cells), dtype=np.int64)
    parts = shards(len(keys))
    chunks = list(_chunks(len(queries), max(256, _SUPPORT // n_cells)))
    with progress("support values", len(chunks) * len(keys), 0, "keys") as step:
        for chunk in chunks:
            wanted = _Supported(queries[chunk], keys, n_cells, device)
            best = np.full((n_cells, len(wanted.queries)), -np.inf, dtype=np.float32)
            at = np.zeros(best.shape, dtype=np.int64)
            tasks = ((part, assignment[part.rows]) for part in parts)
            found = executor.map(_best_of_cells, wanted, tasks)
            for part, (cells, scores, places) in zip(parts, found, strict=True):
                better = scores > best[cells]
                best[cells] = np.where(better, scores, best[cells])
                at[cells] = np.where(better, places, at[cells])
                step.advance(len(part))
            values[chunk] = best.T
            if want_rows:
                rows[chunk] = at.T
    return values, rows


def _best_of_cells(
    wanted: _Supported, task: tuple[Shard, IntArray]
) -> tuple[IntArray, FloatArray, IntArray]:
    """Return the cells of a shard, and for each of them every query's best score and its row."""
    shard, assignment = task
    here = np.unique(assignment[assignment >= 0])
    device = _here(wanted.device)
    best = torch.full((len(here), len(wanted.queries)), -torch.inf, device=device)
    at = torch.zeros(best.shape, dtype=torch.int64, device=device)
    for rows, block in blocks(wanted.keys, shard, _KEYS):
        cells = assignment[rows.first - shard.first : rows.end - shard.first]
        order, starts = cell_order(cells, wanted.n_cells)
        keys = _tensor(block[order], device)
        numbers = torch.from_numpy(order + rows.first).to(device)
        for chunk in _chunks(len(wanted.queries), _QUERIES):
            scores = keys @ _tensor(wanted.queries[chunk], device).T
            for place, cell in enumerate(here.tolist()):
                low, high = int(starts[cell]), int(starts[cell + 1])
                if low == high:
                    continue
                found = scores[low:high].max(dim=0)
                better = found.values > best[place, chunk]
                best[place, chunk] = torch.where(better, found.values, best[place, chunk])
                found_rows = numbers[low:high][found.indices]
                at[place, chunk] = torch.where(better, found_rows, at[place, chunk])
    return here, best.cpu().numpy(), at.cpu().numpy()


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(low, min(low + size, count)) for low in range(0, count, size))


def _here(device: torch.device) -> torch.device:
    """Return the device, or the processor where a worker has no such device."""
    lost = device.type == "cuda" and not torch.cuda.is_available()
    return torch.device("cpu") if lost else device


def _tensor(array: FloatArray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C")).to(device)
