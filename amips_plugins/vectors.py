"""Vectors and metrics: the one place that checks query arrays and says what a metric means.

Training and routing think in maximum inner products only. ``lift_queries`` and ``lift_keys`` map
every metric to that problem, so that for all of them the best key is the one with the largest
inner product in lifted space:

========  ==================  ========================
metric    lifted query        lifted key
========  ==================  ========================
ip        x                   y
cosine    x / ||x||           y / ||y||
l2        (x, 1)              (y, -||y||^2 / 2)
========  ==================  ========================
"""

from __future__ import annotations

from array import array
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.errors import InvalidInput

__all__ = [
    "BoolArray",
    "FloatArray",
    "IntArray",
    "Metric",
    "all_finite",
    "as_good_as",
    "as_queries",
    "lift_keys",
    "lift_queries",
    "lifted_dim",
    "native_scores",
    "normalise",
]

_SAME = 1e-5

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Metric(str, Enum):
    """How a collection compares a query with a key."""

    IP = "ip"
    COSINE = "cosine"
    L2 = "l2"

    def __str__(self) -> str:
        return self.value

    @property
    def larger_is_better(self) -> bool:
        """Whether the database's own score grows with similarity (a distance does not)."""
        return self is not Metric.L2


def as_queries(
    queries: Any, dim: int, noun: tuple[str, str] = ("Query", "Queries")
) -> tuple[FloatArray, bool]:
    """Check vectors, ``(dim,)`` or ``(n, dim)`` of any numbers, and bring them into one form.

    Returns ``(n, dim)`` C-contiguous float32, and whether a single vector came in. Raises
    ``InvalidInput``, by the ``noun`` for one and for several, where they are not numeric, of
    another dimension, empty, or not finite.
    """
    if type(queries) is list and len(queries) == dim:
        read = _row(queries)
        if read is not None:
            return read, True
    one, many = noun
    try:
        given = np.asarray(queries)
        if given.dtype.kind in "SUMmc":  # numpy would make numbers of text, dates and complex
            raise TypeError(f"dtype {given.dtype}")
        if given.dtype == np.float32:  # without the context, which takes as long as all the rest
            rows = np.ascontiguousarray(given)
        else:
            with np.errstate(over="ignore"):  # too large is infinite, and refused below
                rows = np.ascontiguousarray(given, dtype=np.float32)
    except RuntimeError as exc:  # torch: the tensor is on a device, or wants a gradient
        raise InvalidInput(f"{many} cannot be read ({exc}); pass a numpy array.") from exc
    except (TypeError, ValueError) as exc:
        raise InvalidInput(
            f"{many} must be numbers of shape ({dim},) or (n, {dim}), "
            f"but got {type(queries).__name__}."
        ) from exc
    single = given.ndim == 1
    if given.ndim not in (1, 2) or given.shape[-1] != dim:
        raise InvalidInput(
            f"{many} have shape {given.shape}, but the collection holds vectors of "
            f"dimension {dim}; pass ({dim},) or (n, {dim})."
        )
    rows = rows.reshape(-1, dim)
    if len(rows) == 0:
        raise InvalidInput(f"{many} are empty; pass at least one vector.")
    if not all_finite(rows):
        row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise InvalidInput(f"{one} {row} holds a NaN or infinite number; remove or re-embed it.")
    return rows, single


def _row(queries: list[Any]) -> FloatArray | None:
    """Read a list of finite floats as ``(1, n)``, several times as fast as numpy; others are None.

    It is what an application hands a client.
    """
    if {*map(type, queries)} != {float}:
        return None
    row = np.frombuffer(array("f", queries), dtype=np.float32)
    return row[None, :] if all_finite(row) else None


def all_finite(numbers: FloatArray) -> bool:
    """Tell whether there is neither NaN nor infinity; ``all`` would take three times as long."""
    return b"\0" not in np.isfinite(numbers).tobytes()


def as_good_as(score: Any) -> Any:
    """Return the least score that is as good as this one, where larger scores are better.

    Among equals the order is chance, and so are a score's last bits: they depend on the order that
    it is computed in.
    """
    return score - _SAME * np.maximum(np.abs(score), 1e-3)


def normalise(vectors: FloatArray) -> FloatArray:
    """Scale rows, ``(n, dim)`` float32, to unit length; rows of zeros stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: FloatArray = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return unit


def lifted_dim(dim: int, metric: Metric) -> int:
    """Dimension of the lifted space."""
    return dim + 1 if metric is Metric.L2 else dim


def lift_queries(
    queries: FloatArray, metric: Metric, centre: FloatArray | None = None
) -> FloatArray:
    """Map queries to the inner-product problem of this metric (see the module's table).

    The result is ``(n, lifted_dim)``. L2 counts from ``centre``, ``(dim,)``, for keys too, or the
    origin. It changes no distance, but far from the keys 32 bits cannot tell distances apart.
    """
    if metric is Metric.COSINE:
        return normalise(queries)
    if metric is Metric.L2:
        queries = queries if centre is None else queries - centre
        return np.hstack([queries, np.ones((len(queries), 1), dtype=np.float32)])
    return queries


def lift_keys(keys: FloatArray, metric: Metric, centre: FloatArray | None = None) -> FloatArray:
    """Map keys to the inner-product problem, ``(n, lifted_dim)``; as ``lift_queries``."""
    if metric is Metric.COSINE:
        return normalise(keys)
    if metric is Metric.L2:
        keys = keys if centre is None else keys - centre
        half = -0.5 * np.einsum("ij,ij->i", keys, keys)[:, None]
        return np.hstack([keys, half.astype(np.float32)])
    return keys


def native_scores(query: FloatArray, keys: FloatArray, metric: Metric) -> FloatArray:
    """Score keys, ``(n, dim)``, as a database does: inner product, cosine, or *squared* distance.

    For ``Metric.L2`` smaller is better.
    """
    if metric is Metric.L2:
        difference = keys - query
        scores: FloatArray = np.einsum("ij,ij->i", difference, difference)
    elif metric is Metric.COSINE:
        scores = normalise(keys) @ normalise(query[None, :])[0]
    else:
        scores = keys @ query
    return scores
