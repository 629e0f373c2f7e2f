"""An exact, in-memory collection: the reference every adapter is compared with."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.describe import with_cells
from amips_plugins.adapters.given import GivenLayouts
from amips_plugins.adapters.memory.layouts import MemoryLayouts, as_wide
from amips_plugins.adapters.plain_ids import plain_ids
from amips_plugins.collection import (
    CollectionInfo,
    Cursor,
    Failure,
    Hit,
    Id,
    KeyBatch,
    SearchRequest,
    check_keys,
    check_layout,
)
from amips_plugins.collection.construction import Construction
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions, Value, column
from amips_plugins.plan import NATIVE, QueryPlan, searches_everything
from amips_plugins.sketch import sketch
from amips_plugins.vectors import FloatArray, IntArray, Metric, native_scores

__all__ = ["MemoryCollection"]


class MemoryCollection:
    """Keys in a numpy array, searched exactly.

    Parameters
    ----------
    vectors
        ``(n, dim)`` float32.
    ids
        One unique id a key, all int or all str (also numpy's own, and ``uuid.UUID``); the row
        numbers when left out.
    metric
        How to compare, also by name; L2 scores are squared distances.
    name
        Name of the collection.
    fields
        For each key the stored fields; empty when left out.

    Examples
    --------
    >>> import numpy as np
    >>> from amips_plugins.collection import SearchRequest
    >>> collection = MemoryCollection(np.eye(3, dtype=np.float32), metric=Metric.IP)
    >>> query = np.array([[0.0, 1.0, 0.1]], dtype=np.float32)
    >>> [hit.id for hit in collection.search(SearchRequest(query, k=2))[0]]
    [1, 2]
    """

    break_even = 1.0
    exhaustive = True

    def __init__(
        self,
        vectors: FloatArray,
        ids: Sequence[Id] | None = None,
        metric: Metric | str = Metric.COSINE,
        name: str = "memory",
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        array = np.asarray(vectors, dtype=np.float32)
        if array.ndim != 2 or array.shape[1] == 0:
            raise InvalidInput(f"Vectors have shape {array.shape}; pass (n, dim).")
        if metric not in tuple(Metric):
            raise InvalidInput(f"{metric!r} is no metric; use 'ip', 'cosine' or 'l2'.")
        chosen = list(range(len(array))) if ids is None else plain_ids(ids)
        if len(chosen) != len(array) or len(set(chosen)) != len(chosen):
            raise InvalidInput(f"{len(array)} vectors need as many different ids.")
        order = sorted(range(len(chosen)), key=chosen.__getitem__)
        stored = fields if fields is not None else [{}] * len(chosen)
        self._vectors = array[order]
        self._ids = [chosen[row] for row in order]
        self._fields = [stored[row] for row in order]
        # All cells of every key, its own first, which fills unused places.
        self._cells: IntArray = np.full((len(order), 1), OVERFLOW, dtype=np.int64)
        self._sketches = np.zeros(len(order), dtype=np.int32)
        self._layout: str | None = None
        self._shared = False
        self._version = ""
        self._before: list[tuple[str | None, str, bool, dict[Id, tuple[IntArray, int]]]] = []
        self._info = CollectionInfo("memory", name, "vector", Metric(metric), array.shape[1])

    @property
    def info(self) -> CollectionInfo:
        """What the collection is."""
        return self._info

    def count(self) -> int:
        """Return the number of keys."""
        return len(self._ids)

    def upsert(
        self,
        ids: Sequence[Id],
        vectors: FloatArray,
        fields: Sequence[Mapping[str, Any]] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        """Write keys, in place of those with the same ids; without ``cells`` as overflow."""
        keys = plain_ids(ids, self._ids[:1])
        check_keys(self._info.dim, self._layout, keys, vectors, fields, cells, shared=self._shared)
        new = np.array(vectors, dtype=np.float32)
        placed = np.full(len(keys), OVERFLOW) if cells is None else np.array(cells, np.int64)
        stored = [{}] * len(keys) if fields is None else [dict(one) for one in fields]
        # Everything that can fail has been done before the old keys go.
        self.delete(keys)
        ids_then = [*self._ids, *keys]
        order = sorted(range(len(ids_then)), key=ids_then.__getitem__)
        self._ids = [ids_then[row] for row in order]
        self._fields = [[*self._fields, *stored][row] for row in order]
        self._vectors = np.concatenate([self._vectors, new])[order]
        self._cells = np.concatenate(as_wide(self._cells, placed))[order]
        sketches = sketch(new, self._info.metric)
        self._sketches = np.concatenate([self._sketches, sketches])[order]

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete keys; ids that are not there are none of its business."""
        gone = set(plain_ids(ids))
        kept = [row for row, key in enumerate(self._ids) if key not in gone]
        self._ids = [self._ids[row] for row in kept]
        self._fields = [self._fields[row] for row in kept]
        self._vectors, self._cells = self._vectors[kept], self._cells[kept]
        self._sketches = self._sketches[kept]

    @property
    def timeout(self) -> float | None:
        """Seconds that the client gives a call; None without an end."""
        return None

    @property
    def max_candidates(self) -> int | None:
        """How many candidates a rewritten query may fetch; None for any number."""
        return None

    def describe(self) -> Construction:
        """Say how the collection is built; nothing is changed."""
        return with_cells(self, Construction(()))

    def failure(self, exc: BaseException) -> Failure:  # noqa: ARG002 - nothing is known of it here
        """Say what an error of a search means."""
        return Failure.OTHER

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:  # noqa: ARG002 - a plan changes no meaning here
        """Say why a plan would change what a request means, or None."""
        return None

    def current(self) -> MemoryCollection:
        """Return this object: there is nothing behind it that could change."""
        return self

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every key once, in the order of the ids, behind the id ``after``."""
        start = 0 if after is None else bisect.bisect(self._ids, after)
        for row in range(start, len(self._ids), batch_size):
            ids = self._ids[row : row + batch_size]
            yield KeyBatch(ids, self._vectors[row : row + batch_size].copy(), ids[-1])

    def fetch(self, ids: Sequence[Id]) -> KeyBatch:
        """Read those of the keys that are there."""
        wanted = set(plain_ids(ids))
        rows = [row for row, key in enumerate(self._ids) if key in wanted]
        return KeyBatch([self._ids[row] for row in rows], self._vectors[rows])

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search exactly, in the cells of the plan where it names some.

        A rewritten query chooses the candidates; the original query scores them.
        """
        check_layout(plan, self._cells_here(), self._info.name)
        everything = searches_everything(plan, self.break_even)
        allowed = np.ones(len(self._ids), dtype=bool)
        if request.filter is not None:
            allowed[:] = [
                bool(request.filter(key, fields))
                for key, fields in zip(self._ids, self._fields, strict=True)
            ]
        return [
            self._search_one(
                request, NATIVE if everything[row : row + 1].any() else plan, row, allowed
            )
            for row in range(len(request.queries))
        ]

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search exactly, as every native search here."""
        return self.search(request)

    async def search_async(
        self,
        client: object,  # noqa: ARG002 - there is nothing to connect to
        request: SearchRequest,
        plan: QueryPlan = NATIVE,
    ) -> list[list[Hit]]:
        """Search as ``search`` does, once the tasks that are waiting have had their turn."""
        await asyncio.sleep(0)
        return self.search(request, plan)

    def _search_one(
        self,
        request: SearchRequest,
        plan: QueryPlan,
        row: int,
        allowed: np.typing.NDArray[np.bool_],
    ) -> list[Hit]:
        if plan.cells is not None:
            allowed = allowed & np.isin(self._row_cells(), [OVERFLOW, *plan.cells[row]]).any(axis=1)
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
                _shown(self._fields[rows[place]], request.fields),
            )
            for place in best
        ]

    def _best(self, query: FloatArray, rows: IntArray, k: int) -> IntArray:
        scores = native_scores(query, self._vectors[rows], self._info.metric)
        ranked = scores if self._info.metric is Metric.L2 else -scores
        return np.argsort(ranked, kind="stable")[:k]

    def layout(self) -> str | None:
        """Return the identifier of the cells, or None."""
        return self._cells_here()

    def _cells_here(self) -> str | None:
        return self._layout

    def _place(self, cells: Mapping[Id, tuple[IntArray, int]]) -> None:
        """Give keys their cells and their sketch; a key written since is overflow."""
        width = max((len(own) for own, _ in cells.values()), default=1)
        nowhere = np.full(width, OVERFLOW), 0
        found = [cells.get(key, nowhere) for key in self._ids]
        own = [own for own, _ in found]
        self._cells = np.array(own, dtype=np.int64).reshape(len(found), width)
        self._sketches = np.array([beside for _, beside in found], dtype=np.int32)

    def _placed(self) -> dict[Id, tuple[IntArray, int]]:
        pairs = zip(self._cells, self._sketches.tolist(), strict=True)
        return dict(zip(self._ids, pairs, strict=True))

    def overflow(self) -> int:
        """Return the number of keys without a cell; 0 without a layout."""
        return 0 if self._layout is None else int((self._cells[:, 0] == OVERFLOW).sum())

    def _row_cells(self) -> IntArray:
        return self._cells

    @property
    def partitions(self) -> Partitions | None:
        """The stored field that it takes for cells, or None."""
        return None

    def partitioned(self, partitions: Partitions | None) -> MemoryCollection:
        """Return an object of the same rows whose cells are the values of a stored field."""
        if partitions is None:
            return self
        field = partitions.field
        if field is None or not any(field in fields for fields in self._fields):
            raise InvalidInput(
                f"{self._info.name!r} has no {'partitions' if field is None else repr(field)}; "
                f"name a field that its keys have."
            )
        return _Partitioned(self, partitions)

    @property
    def layouts(self) -> MemoryLayouts:
        """Builds, shows, mends and takes back the cells."""
        return MemoryLayouts(self)

    def __enter__(self) -> MemoryCollection:
        """Return the collection itself; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class _Partitioned(MemoryCollection):
    """The same rows, whose cells are the values of a stored field."""

    __slots__ = ("_given", "_whole")

    def __init__(self, whole: MemoryCollection, given: Partitions) -> None:
        self.__dict__ = whole.__dict__  # what one of them writes, the other has
        self._whole, self._given = whole, given

    @property
    def partitions(self) -> Partitions | None:
        """What its cells are."""
        return self._given

    def partitioned(self, partitions: Partitions | None) -> MemoryCollection:
        """Return the same rows in other cells."""
        return self._whole.partitioned(partitions)

    def _cells_here(self) -> str | None:
        return self._given.layout

    def overflow(self) -> int:
        """Return the number of keys of other values, or of none."""
        return int((self._row_cells() == OVERFLOW).sum())

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every key once, and where it belongs."""
        for batch in super().scan(batch_size, after):
            first = self._ids.index(batch.ids[0])
            yield replace(batch, values=self._values()[first : first + len(batch.ids)])

    def _values(self) -> list[Value | None]:
        assert self._given.field is not None  # noqa: S101 - refused by ``partitioned``
        return column(self._given.field, self._fields)

    def _row_cells(self) -> IntArray:
        return self._given.cells_of(self._values())[:, None]

    @property
    def layouts(self) -> MemoryLayouts:
        """Says how many keys each value has."""
        given = self._given
        width = len(given.values) + 1
        return GivenLayouts(  # type: ignore[return-value]  # has all of it
            self,
            given,
            lambda: np.bincount(self._row_cells()[:, 0] + 1, minlength=width)[1:].tolist(),
        )


def _shown(stored: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Return those of the fields that the key has."""
    return {name: stored[name] for name in wanted if name in stored}
