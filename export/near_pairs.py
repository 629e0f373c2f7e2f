"""Pairs of queries and keys whose inner product may be large enough: nearly all others are not.

A product of rounded vectors is found in less time than the exact one, and how far it may be off is
known: it says which pairs are looked at again. What is found so is as exact as if all had been.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Block", "inner_products"]

_PAIRS = 4_096  # multiplied at once
_DIM = 8_192  # of longer vectors einsum cuts the sums wherever its buffer ends
_MOST = 1 / 16  # of all pairs: where more remain, they are rounded less
_TRIAL = 1_024, 256, 3  # vectors, their dimension, and how often two products are timed


@dataclass(frozen=True)
class _Rounded:
    """Vectors in another type, the largest length of them, and of what rounding took off."""

    vectors: torch.Tensor
    longest: float
    furthest: float


class Block:
    """Keys, compared with queries on a device.

    Parameters
    ----------
    keys
        ``(n, dim)`` float32.
    device
        Where the products are made.
    """

    def __init__(self, keys: FloatArray, device: torch.device) -> None:
        self._keys = torch.from_numpy(np.array(keys, dtype=np.float32, order="C")).to(device)
        self._rounded: dict[torch.dtype, _Rounded] = {}

    def near(self, queries: FloatArray, least: FloatArray, k: int) -> tuple[IntArray, IntArray]:
        """Return the pairs whose product may be at least what a query wants.

        Pairs that cannot be among the ``k`` best of a query and these keys are left out, too, the
        first of equal keys being better.

        Parameters
        ----------
        queries
            ``(n_queries, dim)`` float32.
        least
            ``(n_queries,)`` what each wants; minus infinity for anything.
        k
            How many each wants.

        Returns
        -------
        rows, columns
            Of queries and of keys, both int64: by query, and of each by key.
        """
        for dtype in _types(self._keys.device):
            mask = self._near(queries, least, k, dtype)
            if np.count_nonzero(mask) <= _MOST * mask.size:
                break
        else:
            mask[:, self._copies >= k] = False
        rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
        return rows, columns

    def _near(
        self, queries: FloatArray, least: FloatArray, k: int, dtype: torch.dtype
    ) -> FloatArray:
        keys = self._keys_in(dtype)
        there = torch.from_numpy(np.array(queries)).to(self._keys.device)  # theirs may be read-only
        rounded = there.to(dtype)
        products = rounded @ keys.vectors.T
        taken = torch.linalg.vector_norm(there - rounded.float(), dim=1, dtype=torch.float64)
        length = torch.linalg.vector_norm(there, dim=1, dtype=torch.float64)
        # q k - q' k' = (q - q') k + q' (k - k'), and the sums are of float32.
        sums = queries.shape[1] * torch.finfo(torch.float32).eps + _shortened()
        error = taken * keys.longest + (length + taken) * (keys.furthest + sums * keys.longest)
        # What is smaller than this, in vectors, products and sums, may have been taken for zero.
        tiny = 2 * queries.shape[1] * torch.finfo(torch.float32).tiny
        error += tiny * (2 + length + keys.longest)
        wanted = torch.from_numpy(np.array(least)).to(there.device, torch.float64)
        if k <= len(keys.vectors) and bool((wanted == -torch.inf).any()):
            last = products.topk(k, dim=1).values[:, -1].double()
            wanted = wanted.maximum(last - torch.finfo(dtype).eps * last.abs() - error)
        # Rounding keeps the order: what is not below the bound is not below the rounded one. Nor is
        # what is no number, where something is too large for the type.
        far = products < (wanted - error).to(dtype)[:, None]
        mask: FloatArray = torch.logical_not(far, out=far).cpu().numpy()
        return mask

    def _keys_in(self, dtype: torch.dtype) -> _Rounded:
        if dtype not in self._rounded:
            vectors = self._keys.to(dtype)
            longest, furthest = _longest(self._keys), _longest(self._keys - vectors.float())
            self._rounded[dtype] = _Rounded(vectors, longest, furthest)
        return self._rounded[dtype]

    @cached_property
    def _copies(self) -> IntArray:
        """Count for every key how many before it are its equals."""
        keys = np.ascontiguousarray(self._keys.cpu().numpy() + np.float32(0.0))  # of two zeros one
        _, group = np.unique(keys.view(f"V{keys[0].nbytes}"), return_inverse=True)
        order = np.argsort(group.ravel(), kind="stable")
        ordered = group.ravel()[order]
        copies = np.empty(len(keys), dtype=np.int64)
        copies[order] = np.arange(len(keys)) - np.searchsorted(ordered, ordered)
        return copies


def _longest(vectors: torch.Tensor) -> float:
    """Return the largest length, by squares that are neither too large nor too small to add."""
    scale = float(torch.stack(vectors.aminmax()).abs().max())
    if scale == 0.0:
        return 0.0
    return scale * float(torch.linalg.vector_norm(vectors / scale, dim=1).max())


def inner_products(
    queries: FloatArray, keys: FloatArray, rows: IntArray, columns: IntArray
) -> FloatArray:
    """Return the products of pairs; that of a pair has the same bits among any others."""
    products = np.zeros(len(rows), dtype=np.float32)
    for first in range(0, queries.shape[1], _DIM):
        part = slice(first, first + _DIM)
        some, others = queries[:, part], keys[:, part]
        for low in range(0, len(rows), _PAIRS):
            pairs = slice(low, low + _PAIRS)
            here = some[rows[pairs]], others[columns[pairs]]
            products[pairs] += np.einsum("ij,ij->i", *here)
    return products


def _shortened() -> float:
    """Return what a product may be off where torch is told to shorten float32 before it multiplies.

    An environment variable that some containers set says so, too.
    """
    return 0.0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-7


@cache
def _types(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return what to round to, one after the other: which is faster depends on the processor."""
    if device.type != "cpu":
        return (torch.float32,)
    seconds = {dtype: _seconds(dtype) for dtype in (torch.bfloat16, torch.float32)}
    coarse = 1.5 * seconds[torch.bfloat16] < seconds[torch.float32]
    return (torch.bfloat16, torch.float32) if coarse else (torch.float32,)


def _seconds(dtype: torch.dtype) -> float:
    count, dim, runs = _TRIAL
    vectors = torch.ones((count, dim), dtype=dtype)
    best = np.inf
    for _ in range(runs):
        begun = time.perf_counter()
        vectors @ vectors.T
        best = min(best, time.perf_counter() - begun)
    return best
