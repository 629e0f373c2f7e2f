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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW, group_by_cells, merge_hits
from amips_plugins.adapters.describe import with_cells
from amips_plugins.adapters.qdrant.cells import CELL_PREFIX, Record, cell_key, serving
from amips_plugins.adapters.qdrant.layouts import QdrantLayouts
from amips_plugins.adapters.qdrant_edge.shard import (
    EdgeCells,
    OpenShard,
    both,
    edge_ids,
    in_cells,
    plain_id,
)
from amips_plugins.cell_layout import AssignCells, Construction
from amips_plugins.collection import (
    BoolArray,
    CollectionInfo,
    Cursor,
    Failure,
    Hit,
    Id,
    KeyBatch,
    SearchRequest,
    check_keys,
    check_layout,
    searches_everything,
)
from amips_plugins.errors import (
    CollectionError,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
    require,
)
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray, Metric

if TYPE_CHECKING:
    import qdrant_edge as edge
else:
    edge = require("qdrant_edge", "qdrant-edge")

__all__ = ["QdrantEdgeCollection"]

_METRICS = {"Cosine": Metric.COSINE, "Dot": Metric.IP, "Euclid": Metric.L2}
# Half floats come back as floats and compare as they do; the other types round the query as well.
_DATATYPES = (None, "float32", "float16")
_SECONDS_PER_WRITE = 2e-4  # with the rebuild of the segments
_QUERIES = 256  # in one call, during which all other threads wait


@dataclass(frozen=True, slots=True)
class _Found:
    """What one look at the shard found: the object stays on it."""

    info: CollectionInfo
    cells: Record | None
    vectors: tuple[str, ...]


class QdrantEdgeCollection:
    """One dense vector of a Qdrant Edge shard.

    Parameters
    ----------
    shard
        The open shard. Close it yourself, after this object's last use.
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

    def __init__(self, shard: edge.EdgeShard, folder: str | Path, field: str | None = None) -> None:
        self._shard = OpenShard(shard, Path(folder))
        self._field = field
        self._kept: _Found | None = None

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

    @property
    def info(self) -> CollectionInfo:
        """What the collection is; the schema lists the payload keys that have an index."""
        return self._found.info

    @property
    def _found(self) -> _Found:
        if self._kept is None:
            self._kept = self._look()
        return self._kept

    def _look(self) -> _Found:
        config, name = self._shard.config(), self._shard.folder.resolve().name
        field, vector = _choose_vector(config, self._field, name)
        schema = {
            key: str(index.data_type).rpartition(".")[2].lower()
            for key, index in sorted(self._shard.engine.info().payload_schema.items())
            if not key.startswith(CELL_PREFIX)
        }
        info = CollectionInfo(
            "qdrant-edge", name, field, _METRICS[vector["distance"]], vector["size"], schema
        )
        try:
            cells = serving(self._shard.metadata(), field)
        except CollectionError:  # a damaged file is no cells here; ``layouts`` tells of it
            cells = None
        return _Found(info, cells, (*config["vectors"], *(config.get("sparse_vectors") or {})))

    @property
    def _cells(self) -> EdgeCells:
        return EdgeCells(self._shard, self.info.field)

    def count(self) -> int:
        """Return the exact number of points that have this vector."""
        return self._cells.count()

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every point that has this vector once, in the order of the ids.

        Integer ids come first, then UUIDs. A cursor is the last id read; it stays good when that
        point is deleted. A batch may hold fewer keys than ``batch_size`` before the end.
        """
        return self._cells.scroll(batch_size, after=after)

    def fetch(self, ids: Sequence[Id]) -> KeyBatch:
        """Read those of the points that are there with this vector."""
        batches = list(self._cells.among(edge_ids(ids)))
        none = np.zeros((0, self.info.dim), np.float32)
        found = [key for batch in batches for key in batch.ids]
        return KeyBatch(found, np.concatenate([none, *(batch.vectors for batch in batches)]))

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
        if request.filter is not None and not isinstance(request.filter, edge.Filter):
            raise InvalidInput(
                f"A Qdrant Edge filter is a qdrant_edge.Filter, but got "
                f"{type(request.filter).__name__}."
            )
        search = _Search(request, plan, self.info.field, searches_everything(plan, self.break_even))
        found: list[list[Hit]] = []
        for start in range(0, len(request.queries), _QUERIES):
            rows = range(start, min(start + _QUERIES, len(request.queries)))
            found += self._run(search, rows)
        return found

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search by comparing with every point, unquantised."""
        return self.search(replace(request, params={"exact": True}))

    def _run(self, search: _Search, rows: range) -> list[list[Hit]]:
        # One call for all rows: no write comes between the searches of one query's cells.
        writes, placed = self._shard.writes, self._placed(search.key)
        asked = search.requests(rows, everything_placed=placed)
        answers = self._answers([request for _, request in asked])
        if placed and not (self._shard.writes == writes and self._placed(search.key)):
            # A key may have lost its cell since we looked: look for those without one, too.
            asked = search.requests(rows, everything_placed=False)
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

    def _placed(self, key: str | None) -> bool:
        return key is not None and self._cells.everything_placed(key)

    def _answers(self, requests: list[edge.QueryRequest]) -> list[list[edge.ScoredPoint]]:
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
        found, names = self._found, edge_ids(ids)
        info, here = found.info, found.cells
        check_keys(info.dim, self.layout(), names, vectors, fields, cells)
        if len(found.vectors) > 1:
            raise InvalidInput(
                f"Points of collection {info.name!r} have the vectors {_listed(found.vectors)}, "
                "and writing one would lose the others; write them with the engine itself, and "
                "let backfill give them cells."
            )
        payloads = [
            {key: value for key, value in one.items() if not key.startswith(CELL_PREFIX)}
            for one in fields or [{}] * len(names)
        ]
        if cells is not None and here is not None:
            if len(cells) and not (cells.min() >= OVERFLOW and cells.max() < here.n_cells):
                raise InvalidInput(  # nobody would find them
                    f"The cells are from {cells.min()} to {cells.max()}; the collection has 0 to "
                    f"{here.n_cells - 1}, and -1 for none."
                )
            for payload, cell in zip(payloads, cells.tolist(), strict=True):
                payload[cell_key(here.layout)] = cell
        points = [
            edge.Point(name, {info.field: key} if info.field else key, payload)
            for name, key, payload in zip(names, vectors.tolist(), payloads, strict=True)
        ]
        self._shard.update(edge.UpdateOperation.upsert_points(points), len(points))

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete points; ids that are not there are none of its business."""
        names = edge_ids(ids)
        self._shard.update(edge.UpdateOperation.delete_points(names), len(names))

    def look(self) -> tuple[dict[str, Any], edge.ShardInfo]:
        """Return how the shard was created, and what the engine says of it now."""
        return self._shard.config(), self._shard.engine.info()

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
        from amips_plugins.adapters.qdrant_edge.describe import describe_edge

        return with_cells(self, describe_edge(self))

    def failure(self, exc: BaseException) -> Failure:  # noqa: ARG002 - nothing is known of it here
        """Say what an error of a search means."""
        return Failure.OTHER

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:  # noqa: ARG002 - a plan changes no meaning here
        """Say why a plan would change what a request means, or None."""
        return None

    def current(self) -> QdrantEdgeCollection:
        """Look at the shard again: another object of the same shard where its cells changed."""
        again = type(self)._of(self._shard, self._field)
        return self if again._found == self._found else again

    def layout(self) -> str | None:
        """Return the identifier of the complete cells of this vector, or None."""
        here = self._found.cells
        return None if here is None else here.layout

    def overflow(self) -> int:
        """Return the number of points without a cell; 0 without a layout."""
        layout = self.layout()
        return 0 if layout is None else self._cells.overflow(cell_key(layout))

    @property
    def layouts(self) -> QdrantEdgeLayouts:
        """Builds, shows, mends and takes back the cells."""
        return QdrantEdgeLayouts(self, self._cells)

    def optimize(self) -> None:
        """Let the engine rebuild its segments: points of a cell together, HNSW where it is wanted.

        Writes move points into a segment that has neither, and the engine never moves them back
        of its own accord; ``layouts`` does it after writing cells. All Python threads of the
        process wait meanwhile: about 15 seconds for 100,000 keys of dimension 128.
        """
        self._shard.optimize()

    def __enter__(self) -> QdrantEdgeCollection:
        """Return the collection itself; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the shard if ``connect`` opened it, for all objects of it; safe to call twice."""
        self._shard.close()


class QdrantEdgeLayouts(QdrantLayouts):
    """The cells of a ``QdrantEdgeCollection``: Qdrant's, with a rebuild after a backfill."""

    def __init__(self, collection: QdrantEdgeCollection, cells: EdgeCells) -> None:
        super().__init__(collection, cells, _SECONDS_PER_WRITE)
        self._optimize = collection.optimize

    def backfill(
        self, assign: AssignCells, progress: Progress = no_progress, *, verify: bool = False
    ) -> int:
        """Give the overflow its cells, and return how many keys got one."""
        given = super().backfill(assign, progress, verify=verify)
        if given:
            self._optimize()
        return given


class _Search:
    """A request and a plan as the engine's own requests."""

    def __init__(
        self, request: SearchRequest, plan: QueryPlan, field: str, everything: BoolArray
    ) -> None:
        self.request = request
        self.key = None if plan.cells is None else cell_key(str(plan.layout))
        self._plan = plan
        self._everything = everything
        self._using = field or None
        asked = dict(request.params or {})
        self._params = _search_params(asked)
        # HNSW under the filter of a cell loses keys.
        self._exact = _search_params({**asked, "exact": True})

    def requests(
        self, rows: range, *, everything_placed: bool
    ) -> list[tuple[int, edge.QueryRequest]]:
        """Write the searches that answer some rows, those with the same filter together."""
        plan = self._plan
        if plan.cells is None:
            return [(row, self._one(row, self._params, self.request.filter)) for row in rows]
        full = [row for row in rows if self._everything[row]]
        routed = [row for row in rows if not self._everything[row]]
        asked = [(row, self._one(row, self._exact, self.request.filter)) for row in full]
        if plan.rewritten is None:
            groups = group_by_cells(plan.cells[routed])
        else:  # the candidates are the best of all cells, so no search may be cut into several
            groups = [
                ([OVERFLOW, *sorted({c for c in plan.cells[row].tolist() if c >= 0})], [place])
                for place, row in enumerate(routed)
            ]
        for cells, places in groups:
            here = in_cells(str(self.key), cells, everything_placed=everything_placed)
            condition = both(self.request.filter, here)
            asked += [
                (routed[place], self._one(routed[place], self._exact, condition))
                for place in places
            ]
        return asked

    def _one(
        self, row: int, params: edge.SearchParams | None, condition: edge.Filter | None
    ) -> edge.QueryRequest:
        request, rewritten = self.request, self._plan.rewritten
        original = self._nearest(request.queries[row])
        fields = list(request.fields) or False
        if rewritten is None:
            return edge.QueryRequest(
                request.k, query=original, filter=condition, params=params, with_payload=fields
            )
        candidates = edge.Prefetch(
            max(self._plan.rescore, request.k),
            query=self._nearest(rewritten[row]),
            params=params,
            filter=condition,
        )
        return edge.QueryRequest(
            request.k,
            query=original,
            prefetches=[candidates],
            params=edge.SearchParams(exact=True),  # also means unquantised
            with_payload=fields,
        )

    def _nearest(self, vector: FloatArray) -> edge.Query:
        return edge.Query.Nearest(vector.tolist(), using=self._using)


def _search_params(asked: Mapping[str, Any]) -> edge.SearchParams | None:
    known = [name for name in dir(edge.SearchParams) if not name.startswith("_")]
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise InvalidInput(
            f"{unknown[0]!r} is not a search parameter of Qdrant Edge; it has {_listed(known)}."
        )
    try:
        return edge.SearchParams(**asked) if asked else None
    except (TypeError, OverflowError) as exc:
        raise InvalidInput(f"Qdrant Edge cannot use the search parameters ({exc}).") from exc


def _choose_vector(
    config: Mapping[str, Any], field: str | None, name: str
) -> tuple[str, Mapping[str, Any]]:
    vectors = config.get("vectors") or {}
    dense = sorted(key for key, one in vectors.items() if not one.get("multivector_config"))
    if field is None and len(dense) == 1:
        field = dense[0]
    if field is None or field not in vectors:
        wanted = "no vector was named" if field is None else f"no dense vector {field!r}"
        raise FieldNotFound(
            f"Collection {name!r}: {wanted}; its dense vectors are {_listed(dense)}."
        )
    vector = vectors[field]
    if field not in dense:
        raise CollectionError(
            f"Vector {field!r} of collection {name!r} is a multivector; name a dense vector with "
            f"one embedding a point: {_listed(dense)}."
        )
    if vector.get("datatype") not in _DATATYPES:
        raise CollectionError(
            f"Vector {field!r} of collection {name!r} is stored as {vector['datatype']}; only "
            "float32 and float16 can be served."
        )
    if vector["distance"] not in _METRICS:
        raise MetricNotSupported(
            f"Collection {name!r} compares by {vector['distance']}; only Cosine, Dot and Euclid "
            "can be served."
        )
    return field, vector


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
