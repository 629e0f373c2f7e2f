"""An exact, in-memory collection: the reference every adapter is compared with."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from amips_plugins.adapters.base import (
    AssignCells,
    CollectionInfo,
    Cursor,
    Hit,
    Id,
    KeyBatch,
    SearchRequest,
    check_layout,
)
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, as_queries, native_scores

__all__ = ["MemoryCollection"]

_OVERFLOW = -1


class MemoryCollection:
    """Keys in a numpy array, searched exactly.

    Parameters
    ----------
    vectors
        ``(n, dim)`` float32.
    ids
        One unique id a key, all int or all str; the row numbers when left out.
    metric
        How to compare; L2 scores are squared distances.
    name
        Name of the collection.
    fields
        For each key the stored fields; empty when left out.

    Examples
    --------
    >>> import numpy as np
    >>> from amips_plugins.adapters.base import SearchRequest
    >>> collection = MemoryCollection(np.eye(3, dtype=np.float32), metric=Metric.IP)
    >>> query = np.array([[0.0, 1.0, 0.1]], dtype=np.float32)
    >>> [hit.id for hit in collection.search(SearchRequest(query, k=2))[0]]
    [1, 2]
    """

    def __init__(
        self,
        vectors: FloatArray,
        ids: Sequence[Id] | None = None,
        metric: Metric = Metric.COSINE,
        name: str = "memory",
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        array = np.asarray(vectors, dtype=np.float32)
        if array.ndim != 2 or array.shape[1] == 0:
            raise InvalidInput(f"Vectors have shape {array.shape}; pass (n, dim).")
        chosen = list(range(len(array))) if ids is None else list(ids)
        if len(chosen) != len(array) or len(set(chosen)) != len(chosen):
            raise InvalidInput(f"{len(array)} vectors need as many different ids.")
        order = sorted(range(len(chosen)), key=chosen.__getitem__)
        stored = fields if fields is not None else [{}] * len(chosen)
        self._vectors = array[order]
        self._ids = [chosen[row] for row in order]
        self._fields = [stored[row] for row in order]
        self._cells: IntArray = np.full(len(order), _OVERFLOW, dtype=np.int64)
        self._layout: str | None = None
        self._info = CollectionInfo("memory", name, "vector", metric, array.shape[1])

    @property
    def info(self) -> CollectionInfo:
        """What the collection is."""
        return self._info

    def count(self) -> int:
        """Return the number of keys."""
        return len(self._ids)

    def insert(self, ids: Sequence[Id], vectors: FloatArray) -> None:
        """Add keys without a cell, as a writer does who knows nothing of cells.

        Raises
        ------
        InvalidInput
            An id is there already, or a vector has another dimension.
        """
        added, _ = as_queries(vectors, self._info.dim)
        if len(ids) != len(added) or set(ids) & set(self._ids):
            raise InvalidInput("Every vector needs one new id.")
        for key, vector in zip(ids, added, strict=True):
            row = bisect.bisect(self._ids, key)
            self._ids.insert(row, key)
            self._fields.insert(row, {})
            self._vectors = np.insert(self._vectors, row, vector, axis=0)
            self._cells = np.insert(self._cells, row, _OVERFLOW)

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every key once, in the order of the ids, behind the id ``after``."""
        start = 0 if after is None else bisect.bisect(self._ids, after)
        for row in range(start, len(self._ids), batch_size):
            ids = self._ids[row : row + batch_size]
            yield KeyBatch(ids, self._vectors[row : row + batch_size].copy(), ids[-1])

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search exactly, in the cells of the plan where it names some.

        A rewritten query chooses the candidates; the original query scores them.
        """
        check_layout(plan, self._layout, self._info.name)
        allowed = np.ones(len(self._ids), dtype=bool)
        if request.filter is not None:
            allowed[:] = [
                bool(request.filter(key, fields))
                for key, fields in zip(self._ids, self._fields, strict=True)
            ]
        return [
            self._search_one(request, plan, row, allowed) for row in range(len(request.queries))
        ]

    def _search_one(
        self,
        request: SearchRequest,
        plan: QueryPlan,
        row: int,
        allowed: np.typing.NDArray[np.bool_],
    ) -> list[Hit]:
        if plan.cells is not None:
            allowed = allowed & np.isin(self._cells, [_OVERFLOW, *plan.cells[row]])
        rows = np.flatnonzero(allowed)
        if plan.rewritten is not None:
            found = self._best(plan.rewritten[row], rows, max(plan.rescore, request.k))
            rows = rows[found]
        scores = native_scores(request.queries[row], self._vectors[rows], self._info.metric)
        best = self._best(request.queries[row], rows, request.k)
        return [
            Hit(
                self._ids[rows[place]],
                float(scores[place]),
                {name: self._fields[rows[place]].get(name) for name in request.fields},
            )
            for place in best
        ]

    def _best(self, query: FloatArray, rows: IntArray, k: int) -> IntArray:
        scores = native_scores(query, self._vectors[rows], self._info.metric)
        ranked = scores if self._info.metric is Metric.L2 else -scores
        return np.argsort(ranked, kind="stable")[:k]

    def layout(self) -> str | None:
        """Return the identifier of the cells, or None."""
        return self._layout

    def lay_out(
        self,
        layout: str,
        n_cells: int,  # noqa: ARG002 - the protocol's signature
        assign: AssignCells,
        progress: Progress = no_progress,
    ) -> MemoryCollection:
        """Give every key its cell, in place."""
        with progress("cells", len(self._ids), 0, "keys") as step:
            self._cells = assign(self._ids, self._vectors)
            step.advance(len(self._ids))
        self._layout = layout
        return self

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
