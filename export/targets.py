"""Exact training targets, blockwise: memory does not grow with keys x queries."""

from __future__ import annotations

import numpy as np
import torch

from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["best_per_cell", "cell_order", "top_keys"]

_KEYS = 32_768
_QUERIES = 1_024


def top_keys(
    queries: FloatArray,
    keys: FloatArray,
    k: int,
    device: torch.device,
    progress: Progress = no_progress,
    title: str = "targets",
) -> tuple[IntArray, FloatArray]:
    """Find the k keys of largest inner product for every query."""
    best = torch.full((len(queries), k), -torch.inf)
    rows = torch.zeros((len(queries), k), dtype=torch.int64)
    with progress(title, len(keys), 0, "keys") as step:
        for low in range(0, len(keys), _KEYS):
            block = _tensor(keys[low : low + _KEYS], device)
            for first in range(0, len(queries), _QUERIES):
                chunk = slice(first, first + _QUERIES)
                scores = _tensor(queries[chunk], device) @ block.T
                here = scores.topk(min(k, len(block)), dim=1)
                merged = torch.cat([best[chunk], here.values.cpu()], dim=1)
                places = torch.cat([rows[chunk], here.indices.cpu() + low], dim=1)
                kept = merged.topk(k, dim=1)
                best[chunk] = kept.values
                rows[chunk] = places.gather(1, kept.indices)
            step.advance(len(block))
    return rows.numpy(), best.numpy()


def cell_order(assignment: IntArray, n_cells: int) -> tuple[IntArray, IntArray]:
    """Return the rows of keys sorted by cell, and where each cell begins among them."""
    order = np.argsort(assignment, kind="stable")
    return order, np.searchsorted(assignment[order], np.arange(n_cells + 1))


def best_per_cell(
    queries: FloatArray,
    keys: FloatArray,
    assignment: IntArray,
    n_cells: int,
    device: torch.device,
    progress: Progress = no_progress,
) -> tuple[FloatArray, IntArray]:
    """Return every cell's support value for every query, and the row of the key that attains it."""
    order, starts = cell_order(assignment, n_cells)
    values = np.empty((len(queries), n_cells), dtype=np.float32)
    rows = np.empty((len(queries), n_cells), dtype=np.int64)
    with progress("support values", n_cells, 0, "cells") as step:
        for cell in range(n_cells):
            members = order[starts[cell] : starts[cell + 1]]
            block = _tensor(keys[members], device)
            for first in range(0, len(queries), _QUERIES):
                chunk = slice(first, first + _QUERIES)
                best = (_tensor(queries[chunk], device) @ block.T).max(dim=1)
                values[chunk, cell] = best.values.cpu().numpy()
                rows[chunk, cell] = members[best.indices.cpu().numpy()]
            step.advance()
    return values, rows


def _tensor(array: FloatArray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C")).to(device)
