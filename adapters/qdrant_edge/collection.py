"""Qdrant Edge: Qdrant's engine inside this process, on a folder of its own.

Cells are what they are on a Qdrant server (see ``qdrant``): payload values with an index, searched
exactly. The engine holds Python's lock during every call, so threads take turns, and writes and
searches of one process never overlap. What a call has written survives the death of the process;
``close``, and every 10,000 keys, bring it to the disk as well, where a power failure leaves it.
A shard is of use to the process that opened it only, not to its forks.

Importing this module needs the extra ``qdrant-edge``, and not Qdrant's client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import merge_hits
from amips_plugins.adapters.describe import with_cells
from amips_plugins.adapters.qdrant.cells import LayoutRecord, serving
from amips_plugins.adapters.qdrant.codes import Codes, break_even_of, codes_of
from amips_plugins.adapters.qdrant.point_collection import Found, PointCollection
from amips_plugins.adapters.qdrant.points import (
    RESERVED,
    DenseVector,
    as_ids,
    choose_vector,
    payloads,
    plain_id,
    refuse_other_vectors,
)
from amips_plugins.adapters.qdrant_edge.describe import describe_edge
from amips_plugins.adapters.qdrant_edge.filters import Outside, among
from amips_plugins.adapters.qdrant_edge.layouts import QdrantEdgeLayouts
from amips_plugins.adapters.qdrant_edge.search import EdgeSearch
from amips_plugins.adapters.qdrant_edge.shard import OpenShard
from amips_plugins.adapters.qdrant_edge.store import EdgeStore
from amips_plugins.collection import (
    CollectionInfo,
    Cursor,
    Hit,
    Id,
    KeyBatch,
    SearchRequest,
    check_layout,
)
from amips_plugins.collection.construction import Construction
from amips_plugins.errors import CollectionError, InvalidInput, require
from amips_plugins.partitions import Partitions
from amips_plugins.plan import NATIVE, QueryPlan, searches_everything
from amips_plugins.vectors import FloatArray, IntArray

if TYPE_CHECKING:
    import qdrant_edge as edge
else:
    edge = require("qdrant_edge", "qdrant-edge")

__all__ = ["QdrantEdgeCollection"]

_GRAPH = {"m": 16, "full_scan_threshold": 10_000}  # the engine's own
_TRIES = 3  # of a search through the graphs of cells, while others write
_QUERIES = 256  # in one call, during which all other threads wait


@dataclass(frozen=True, slots=True)
class EdgeFound(Found):
    """The same of a shard."""

    codes: Codes | None = field(default=None, compare=False)  # how it asks, not what it finds
    on_disk: bool = field(default=False, compare=False)
    has_graph: bool = field(default=False, compare=False)


class QdrantEdgeCollection(PointCollection):
    """One dense vector of a Qdrant Edge shard.

    Parameters
    ----------
    shard
        The open shard. Close it yourself, after this object, which may have shards of cells open.
    folder
        The shard's folder; the last part of it is the collection's name.
    field
        Name of the vector, empty for the unnamed one; may be left out where there is only one.

    Raises
    ------
    CollectionError, FieldNotFound, MetricNotSupported
        On the first use: no such vector, or one that cannot be served.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from qdrant_edge import Distance, EdgeConfig, EdgeShard, EdgeVectorParams
    >>> from qdrant_edge import Point, UpdateOperation
    >>> from amips_plugins.collection import SearchRequest
    >>> folder = tempfile.mkdtemp()
    >>> vectors = EdgeVectorParams(size=2, distance=Distance.Dot)
    >>> shard = EdgeShard.create(folder, EdgeConfig(vectors=vectors))
    >>> points = [Point(i, [float(i), 1.0]) for i in range(3)]
    >>> shard.update(UpdateOperation.upsert_points(points))
    >>> collection = QdrantEdgeCollection(shard, folder)
    >>> query = np.array([[1.0, 0.0]], dtype=np.float32)
    >>> [hit.id for hit in collection.search(SearchRequest(query, k=2))[0]]
    [2, 1]
    >>> shard.close()
    """

    # benchmarks/break_even.py: about .4 for a query alone, .25 for one of 64, whose full scans
    # share a pass over the vectors.
    break_even = 0.3
    _kept: EdgeFound | None = None

    def __init__(self, shard: edge.EdgeShard, folder: str | Path, field: str | None = None) -> None:
        self._shard = OpenShard.of(shard, Path(folder))
        self._field = field

    @classmethod
    def connect(
        cls, address: str, name: str, field: str | None = None, token: str | None = None
    ) -> QdrantEdgeCollection:
        """Open the shard ``name`` in a folder of shards; ``close`` closes it.

        Parameters
        ----------
        address
            The folder that holds the shards, each in a folder of its own.
        name
            The shard's folder in it.
        field
            As for the class.
        token
            Not used: the file system decides who may.

        Raises
        ------
        CollectionNotFound
            There is no such shard.
        DatabaseUnreachable
            The shard is open elsewhere; only one process can have it.
        CollectionError, FieldNotFound, MetricNotSupported
            As for the class.
        """
        del token
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise InvalidInput(
                f"The collection is called {name!r}; use the plain name of a shard's folder."
            )
        shard = OpenShard.load(Path(address, name))
        collection = cls._of(shard, field)
        try:
            _ = collection.info
        except BaseException:
            collection.close()  # or the folder would stay locked
            raise
        return collection

    @classmethod
    def _of(cls, shard: OpenShard, field: str | None) -> QdrantEdgeCollection:
        collection = cls(shard.engine, shard.folder, field)
        collection._shard = shard
        return collection

    def _look(self) -> EdgeFound:
        config, name = self._shard.config(), self._shard.folder.resolve().name
        vectors = config.get("vectors") or {}
        wanted = self._field if self._kept is None else self._kept.info.field
        field, vector = choose_vector(
            {key: _described(one) for key, one in vectors.items()}, wanted, name
        )
        schema = {
            key: str(index.data_type).rpartition(".")[2].lower()
            for key, index in sorted(self._shard.engine.info().payload_schema.items())
            if not key.startswith(RESERVED)
        }
        info = CollectionInfo("qdrant-edge", name, field, vector.metric, vector.size, schema)
        try:
            cells = serving(self._shard.metadata(), info)
        except CollectionError:  # a damaged file is no cells here; ``layouts`` tells of it
            cells = None
        chosen = vectors[field]
        graph = chosen.get("hnsw_config") or config.get("hnsw_config") or _GRAPH
        codes = codes_of(
            chosen.get("quantization_config") or config.get("quantization_config"),
            graph,
            info.dim,
            self._shard.engine.info().points_count,
        )
        named = (*vectors, *(config.get("sparse_vectors") or {}))
        on_disk = bool(chosen.get("on_disk"))
        self.break_even = break_even_of(type(self).break_even, codes, on_disk=on_disk)
        return EdgeFound(info, cells, named, codes, on_disk, bool(graph.get("m", _GRAPH["m"])))

    def _codes_on_disk(self) -> Codes | None:
        found = self._found
        return found.codes if found.on_disk else None

    @property
    def _found(self) -> EdgeFound:
        if self._kept is None:
            self._kept = self._look()
        return self._kept

    @property
    def _store(self) -> EdgeStore:
        return EdgeStore(self._shard, self.info.field)

    @property
    def shard(self) -> OpenShard:
        """The open shard."""
        return self._shard

    def count(self) -> int:
        """Return the exact number of points that have this vector."""
        return self._store.count()

    def fetch(self, ids: Sequence[Id]) -> KeyBatch:
        """Read those of the keys that are there."""
        none = np.empty((0, self.info.dim), dtype=np.float32)
        return self._store.retrieve(as_ids(ids)) or KeyBatch((), none)

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every point that has this vector once, in the order of the ids.

        Integer ids come first, then UUIDs. A cursor is the last id read; it stays good when that
        point is deleted. A batch may hold fewer keys than ``batch_size`` before the end.
        """
        payload = () if self._given is None else (self._given.key,)
        return self._with_values(self._store.scroll(batch_size, after, payload))

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search by a plan.

        Rewritten queries choose the candidates with the caller's own parameters; the engine then
        scores these exactly with the original queries. Cells are searched exactly and ANDed with
        the caller's filter; points without a cell are always searched. The engine knows no
        timeout, so ``request.timeout`` has no effect.

        Raises
        ------
        InvalidInput
            The plan's cells are of another layout, the filter is not a ``qdrant_edge.Filter``, or
            a parameter is not one of ``qdrant_edge.SearchParams``.
        """
        if plan.cells is not None:
            check_layout(plan, self.layout(), self.info.name)
        everything = searches_everything(plan, self.break_even)
        shard = self._found
        search = EdgeSearch(
            request,
            plan,
            shard.info.field,
            self._cells,
            everything,
            shard.codes,
            has_graph=shard.has_graph,
        )
        found: list[list[Hit]] = []
        for start in range(0, len(request.queries), _QUERIES):
            rows = range(start, min(start + _QUERIES, len(request.queries)))
            found += self._run(search, rows)
        if search.by_graphs:  # who asks for cells worth a full scan takes what is short for all
            short = [row for row in np.flatnonzero(everything) if len(found[row]) < request.k]
            whole = replace(request, queries=request.queries[short])
            for row, hits in zip(short, self.exact(whole) if short else [], strict=True):
                found[row] = hits
        return found

    def _run(self, search: EdgeSearch, rows: range) -> list[list[Hit]]:
        # One call for all rows: no write comes between the searches of one query's cells.
        for _ in range(_TRIES if search.by_graphs else 1):
            writes, outside = self._shard.writes, self._outside(search.record)
            candidates = self._candidates(search, rows)
            asked = search.requests(rows, outside=outside, candidates=candidates)
            answers = self._answers([request for _, request in asked])
            if outside is Outside.ANYTHING and not search.by_graphs:
                break
            if self._shard.writes == writes and self._outside(search.record) is outside:
                break
        else:
            # A key may have lost its cell since we looked: look for those without one, too.
            asked = search.requests(rows, outside=Outside.ANYTHING)
            answers = self._answers([request for _, request in asked])
        by_row: dict[int, list[list[Hit]]] = {row: [] for row in rows}
        for (row, _), points in zip(asked, answers, strict=True):
            by_row[row].append([Hit(plain_id(p.id), p.score, p.payload or {}) for p in points])
        larger = self.info.metric.larger_is_better
        return [
            parts[0]
            if len(parts) == 1
            else merge_hits(parts, search.request.k, larger_is_better=larger)
            for parts in by_row.values()
        ]

    def _candidates(self, search: EdgeSearch, rows: range) -> dict[int, set[Id]] | None:
        record = search.record
        if not (search.by_graphs and isinstance(record, LayoutRecord)):
            return None
        return search.candidates(rows, self._shard.graphs(record, self.info.field))

    def _outside(self, record: LayoutRecord | Partitions | None) -> Outside:
        return Outside.ANYTHING if record is None else self._store.outside(record)

    def _answers(self, requests: list[edge.QueryRequest]) -> list[list[edge.ScoredPoint]]:
        if not requests:
            return []
        if len(requests) == 1:
            return [self._shard.engine.query(requests[0])]
        return self._shard.engine.query_batch(edge.QueryBatchRequest(requests))

    def upsert(
        self,
        ids: Sequence[Id],
        vectors: FloatArray,
        fields: Sequence[Mapping[str, Any]] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        """Write points, in place of those with the same ids, whose payload is replaced too.

        Without ``fields`` a point has no payload beside its cell, and without ``cells`` it is
        overflow. Cells are those of the layout this object is pinned to.

        Raises
        ------
        InvalidInput
            As for every collection; an id or a cell cannot be; or the collection has other vectors
            beside this one, which the points would lose.
        """
        found, names = self._found, as_ids(ids)
        info = found.info
        written = payloads(info, found.cells, names, vectors, fields, cells)
        refuse_other_vectors(info, self._look().vectors)  # one may have been added
        with self._shard.writing:
            placing = self._store.begin(found.cells, names, written)
            points = [
                edge.Point(name, {info.field: key} if info.field else key, payload)
                for name, key, payload in zip(names, vectors.tolist(), written, strict=True)
            ]
            bare = [key for key, payload in zip(names, written, strict=True) if not payload]
            if bare:  # the engine keeps the payload of a point that is written without any
                self._shard.update(
                    edge.UpdateOperation.clear_payload_by_filter(edge.Filter(must=[among(bare)]))
                )
            self._shard.update(edge.UpdateOperation.upsert_points(points), len(points))
            placing()

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete points; ids that are not there are none of its business."""
        names = as_ids(ids)
        with self._shard.writing:
            placing = self._store.begin(self._found.cells, names, [])
            self._shard.update(edge.UpdateOperation.delete_points(names), len(names))
            placing()

    def describe(self) -> Construction:
        """Look at graph, storage and segments."""
        config, info = self._shard.config(), self._shard.engine.info()
        return with_cells(self, describe_edge(config, info, self.info.field))

    def current(self) -> QdrantEdgeCollection:
        """Look at the shard again: another object of the same shard where its cells changed."""
        again = type(self)._of(self._shard, self.info.field)
        again._given = self._given
        if again._found != self._found:
            return again
        self._kept = again._kept
        return self

    @property
    def layouts(self) -> QdrantEdgeLayouts:
        """Builds, shows, mends and takes back the cells."""
        if self._given is not None:
            return self._given_layouts(self._given)  # type: ignore[return-value]  # has all of it
        return QdrantEdgeLayouts(self, self._store, self.optimize)

    def optimize(self) -> None:
        """Let the engine rebuild its segments: points of a cell together, HNSW where it is wanted.

        Writes move points into a segment that has neither, and the engine never moves them back
        of its own accord; ``layouts`` does it after writing cells. All Python threads of the
        process wait meanwhile: about 15 seconds for 100,000 keys of dimension 128.
        """
        cells = self._found.cells
        if cells is not None and cells.places:
            self._shard.graphs(cells, self.info.field)  # or it would know of none yet
        self._shard.optimize()

    def close(self) -> None:
        """Close the shard if ``connect`` opened it, for all objects of it; safe to call twice."""
        self._shard.close()


def _described(vector: Mapping[str, Any]) -> DenseVector:
    return DenseVector(
        vector["size"],
        vector["distance"],
        vector.get("datatype"),
        bool(vector.get("multivector_config")),
    )
