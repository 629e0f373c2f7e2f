"""Batches of routed queries: which searches of which cells answer them in the fewest calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from amips_plugins.vectors import IntArray

__all__ = ["OVERFLOW", "group_by_cells", "merge_hits"]

OVERFLOW = -1
"""The cell of the keys that have none."""


def group_by_cells(cells: IntArray) -> list[tuple[list[int], list[int]]]:
    """Cover cells, ``(n_queries, n_probes)`` with -1 for none, and the overflow, by few calls.

    Queries with the same set of cells share a call. Where the sets differ so much that this takes
    more calls than there are cells, each cell is one call for all queries that want it.
    """
    by_set: dict[tuple[int, ...], list[int]] = {}
    by_cell: dict[int, list[int]] = {OVERFLOW: list(range(len(cells)))}
    for row, chosen in enumerate(cells.tolist()):
        wanted = tuple(sorted({cell for cell in chosen if cell >= 0}))
        by_set.setdefault((OVERFLOW, *wanted), []).append(row)
        for cell in wanted:
            by_cell.setdefault(cell, []).append(row)
    if len(by_set) <= len(by_cell):
        return [(list(wanted), rows) for wanted, rows in by_set.items()]
    return [([cell], rows) for cell, rows in sorted(by_cell.items())]


def merge_hits(answers: Iterable[Sequence[Any]], k: int, *, larger_is_better: bool) -> list[Any]:
    """Merge one query's answers from several calls into its k best hits, each id once."""
    sign = -1.0 if larger_is_better else 1.0
    best = sorted((hit for hits in answers for hit in hits), key=lambda hit: sign * hit.score)
    merged = {hit.id: hit for hit in reversed(best)}
    return sorted(merged.values(), key=lambda hit: sign * hit.score)[:k]
