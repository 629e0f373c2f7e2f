"""Qdrant: the embedded local mode, or a server.

Qdrant has no inverted lists. A cell is a payload value with an integer index, and a filtered exact
search scans only the points that pass the filter, so its cost is the size of the cells searched.
The payload key carries the layout's identifier (``amips_cell_<layout>``): the cells of two layouts
live side by side and never mix, and a point that another writer stores has no such key, which is
what makes it overflow. The collection's metadata name the layout that is complete.

Importing this module needs the extra ``qdrant``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
    require,
)
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import IntArray, Metric

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
else:
    models = require("qdrant_client.models", "qdrant")
    QdrantClient = require("qdrant_client", "qdrant").QdrantClient
    _exceptions = require("qdrant_client.http.exceptions", "qdrant")
    ResponseHandlingException = _exceptions.ResponseHandlingException
    UnexpectedResponse = _exceptions.UnexpectedResponse
grpc = require("grpc", "qdrant")

__all__ = ["QdrantCollection"]

_METRICS = {
    models.Distance.COSINE: Metric.COSINE,
    models.Distance.DOT: Metric.IP,
    models.Distance.EUCLID: Metric.L2,
}
# Half floats come back as floats and compare as they do; the other types round the query as well.
_DATATYPES = (None, models.Datatype.FLOAT32, models.Datatype.FLOAT16)

_CELL = "amips_cell_"  # payload key, completed by the layout
_POINTER = "amips_layout"  # metadata keys, completed by the vector's name
_STARTED = "amips_laying_out"
_LAYOUT = re.compile(r"[a-z0-9]{1,16}")

_READ_BATCH = 1000  # keys with their vectors
_WRITE_BATCH = 20_000  # ids: each call has one write a cell, so few calls are cheaper
_PATIENCE = 600  # seconds for one step of laying out; the client's default is 5
_MISSED = 0.01  # share of the keys written meanwhile that may have lost their cell again


class QdrantCollection:
    """One dense vector of a Qdrant collection.

    Nothing is asked of the database until ``info`` is first used, here or by another method.

    Parameters
    ----------
    client
        A client for local mode or a server. Close it yourself, after this object's last use.
    name
        The collection, or an alias of it.
    field
        Name of the vector, empty for the unnamed one; may be left out where there is only one.

    Raises
    ------
    CollectionNotFound, FieldNotFound, MetricNotSupported, CollectionError, DatabaseUnreachable
        On the first use: no such collection or vector, or one that cannot be served.

    Examples
    --------
    >>> import numpy as np
    >>> from qdrant_client import QdrantClient, models
    >>> from amips_plugins.adapters.base import SearchRequest
    >>> client = QdrantClient(":memory:")
    >>> vectors = models.VectorParams(size=2, distance=models.Distance.DOT)
    >>> client.create_collection("docs", vectors_config=vectors)
    True
    >>> points = [models.PointStruct(id=i, vector=[float(i), 1.0]) for i in range(3)]
    >>> _ = client.upsert("docs", points)
    >>> collection = QdrantCollection(client, "docs")
    >>> query = np.array([[1.0, 0.0]], dtype=np.float32)
    >>> [hit.id for hit in collection.search(SearchRequest(query, k=2))[0]]
    [2, 1]
    """

    def __init__(self, client: QdrantClient, name: str, field: str | None = None) -> None:
        options = client.init_options
        self._client = client
        self._name = name
        self._field = field
        # Local mode is always exact, has no indexes and warns about both.
        self._local = options.get("location") == ":memory:" or options.get("path") is not None
        self._owns_client = False
        self._server = "The Qdrant server"
        self._info: CollectionInfo | None = None
        self._layout: str | None = None

    @classmethod
    def connect(
        cls, address: str, name: str, field: str | None = None, token: str | None = None
    ) -> QdrantCollection:
        """Open a client for this collection, which ``close`` closes, and check that it is there.

        Parameters
        ----------
        address
            The folder of a local database, or ``http(s)://host:port`` of a server.
        name, field
            As for the class.
        token
            API key of the server.

        Raises
        ------
        CollectionNotFound
            There is no database in the folder, or no such collection in the database.
        DatabaseUnreachable
            No server answers at the address, or another process holds the folder.
        """
        if address.startswith(("http://", "https://")):
            # The client's version check warns from a thread of its own: leave it to the operator.
            client = QdrantClient(url=address, api_key=token, check_compatibility=False)
        else:
            client = _open_folder(address)
        collection = cls(client, name, field)
        collection._owns_client = True
        if not collection._local:
            parts = urlsplit(address)
            server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
            collection._server = f"The Qdrant server at {server}"
        try:
            _ = collection.info
        except BaseException:
            collection.close()  # or the folder would stay locked
            raise
        return collection

    @property
    def info(self) -> CollectionInfo:
        """What the collection is; the first use asks the database.

        The schema lists the payload keys that have an index, the only ones Qdrant knows of; local
        mode knows none.
        """
        if self._info is None:
            self._info = self._read_info()
        return self._info

    def _read_info(self) -> CollectionInfo:
        with _answering(self._server):
            if not self._name or not self._client.collection_exists(self._name):
                names = sorted(found.name for found in self._client.get_collections().collections)
                raise CollectionNotFound(
                    f"Qdrant has no collection {self._name!r}; it has {_listed(names)}."
                )
            found = self._client.get_collection(self._name)
        field, vector = _choose_vector(found.config.params.vectors, self._field, self._name)
        schema = {
            key: index.data_type.value
            for key, index in sorted(found.payload_schema.items())
            if not key.startswith(_CELL)
        }
        return CollectionInfo(
            "qdrant", self._name, field, _METRICS[vector.distance], vector.size, schema
        )

    def count(self) -> int:
        """Return the exact number of points that have this vector."""
        return self._count()

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every point that has this vector once, in the order of the ids.

        Integer ids come first, then UUIDs. A cursor is the last id read; it stays good when that
        point is deleted. A batch may hold fewer keys than ``batch_size`` before the end.
        """
        field = self.info.field
        offset = after
        while True:
            records, following = self._client.scroll(
                self._name,
                limit=batch_size,
                offset=offset,
                with_payload=False,
                with_vectors=[field],
            )
            ids: list[Id] = []
            vectors: list[Any] = []
            for record in records:
                vector: Any = record.vector
                if isinstance(vector, dict):
                    vector = vector.get(field)
                # The offset is inclusive: on going on, the first record is the cursor's own.
                if vector is not None and record.id != after:
                    ids.append(_plain_id(record.id))
                    vectors.append(vector)
            if ids:
                yield KeyBatch(ids, np.array(vectors, dtype=np.float32), ids[-1])
            if following is None:
                return
            offset = _plain_id(following)

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search by a plan, in one call for all queries.

        Rewritten queries choose the candidates with the caller's own parameters; the server then
        scores these exactly with the original queries. Cells are searched exactly and ANDed with
        the caller's filter; points without a cell are always searched.

        Raises
        ------
        InvalidInput
            The plan's cells are of another layout, the filter is not a ``models.Filter``, or a
            parameter is not one of ``models.SearchParams``.
        """
        if plan.cells is not None and plan.layout != self._layout:
            check_layout(plan, self.layout(), self._name)
        queries = _plan_queries(request, plan, self.info.field, exact=not self._local)
        # Qdrant counts whole seconds, and 0 would mean no time at all.
        timeout = None if request.timeout is None else max(1, math.ceil(request.timeout))
        if len(queries) == 1:
            # The client's batch call costs 200 us of Python more for a query than this one.
            query = queries[0]
            answers = [
                self._client.query_points(
                    self._name,
                    query=query.query,
                    using=query.using,
                    prefetch=query.prefetch,
                    query_filter=query.filter,
                    search_params=query.params,
                    limit=request.k,
                    with_payload=query.with_payload or False,
                    timeout=timeout,
                )
            ]
        else:
            answers = self._client.query_batch_points(self._name, queries, timeout=timeout)
        return [
            [Hit(_plain_id(point.id), point.score, point.payload or {}) for point in answer.points]
            for answer in answers
        ]

    def layout(self) -> str | None:
        """Return the identifier of the complete cells of this vector, or None."""
        found = self._read_metadata().get(self._metadata_key(_POINTER))
        self._layout = found if isinstance(found, str) else None
        return self._layout

    def lay_out(
        self, layout: str, n_cells: int, assign: AssignCells, progress: Progress = no_progress
    ) -> QdrantCollection:
        """Give every point its cell, in place, while others go on reading and writing.

        A layout that was there before stays in force until the new one is complete, and its
        payload stays too. After an interruption run it again: it writes every cell anew.

        Parameters
        ----------
        layout
            Identifies the cells; lower-case letters and digits, at most 16.
        n_cells
            Number of cells.
        assign
            Gives each key its cell in ``range(n_cells)``.
        progress
            Watches the work.

        Raises
        ------
        InvalidInput
            The identifier or a cell cannot be used.
        CollectionError
            The server keeps no metadata (it is older than 1.16), or at the end too many cells are
            not there; the layout in force is unchanged.
        """
        if not _LAYOUT.fullmatch(layout):
            raise InvalidInput(
                f"{layout!r} cannot identify a layout; use 1 to 16 lower-case letters and digits."
            )
        key = f"{_CELL}{layout}"
        started = self._metadata_key(_STARTED)
        self._write_metadata({started: layout})
        if self._read_metadata().get(started) != layout:  # an older server drops what it knows not
            raise CollectionError(
                f"{self._server} keeps no metadata of a collection, and cells need it; use Qdrant "
                "1.16 or newer."
            )
        if not self._local:
            # First the index: Qdrant builds segments by the cells written after it.
            self._client.create_payload_index(
                self._name,
                key,
                models.IntegerIndexParams(type=models.IntegerIndexType.INTEGER, is_principal=True),
                wait=True,
                timeout=_PATIENCE,
            )
        written = 0
        ids: list[Id] = []
        cells: list[int] = []
        with progress("cells", self.count(), 0, "keys") as step:
            for batch in self.scan(_READ_BATCH):
                chosen = _check_cells(assign(batch.ids, batch.vectors), len(batch.ids), n_cells)
                ids += batch.ids
                cells += chosen.tolist()
                if len(ids) >= _WRITE_BATCH:
                    written += self._write_cells(key, ids, cells)
                    ids, cells = [], []
                step.advance(len(batch.ids))
            written += self._write_cells(key, ids, cells)
        self._verify(key, n_cells, written)
        self._write_metadata({self._metadata_key(_POINTER): layout, started: None})
        self._layout = layout
        return self

    def close(self) -> None:
        """Close the client if ``connect`` opened it; safe to call twice."""
        if self._owns_client:
            self._owns_client = False
            self._client.close()

    def _write_cells(self, key: str, ids: Sequence[Id], cells: Sequence[int]) -> int:
        members: dict[int, list[Any]] = {}
        for one, cell in zip(ids, cells, strict=True):
            members.setdefault(cell, []).append(one)
        writes = []
        for cell, points in members.items():
            # A list of points fails when one was deleted meanwhile, a filter does not; local mode
            # has no such writers, and would try the filter on every point.
            where: dict[str, Any] = (
                {"points": points}
                if self._local
                else {"filter": models.Filter(must=[models.HasIdCondition(has_id=points)])}
            )
            write = models.SetPayload(payload={key: cell}, **where)
            writes.append(models.SetPayloadOperation(set_payload=write))
        if writes:
            self._client.batch_update_points(self._name, writes, timeout=_PATIENCE)
        return len(ids)

    def _verify(self, key: str, n_cells: int, written: int) -> None:
        in_cell = models.FieldCondition(key=key, range=models.Range(gte=0, lt=n_cells))
        hidden = self._count(models.Filter(must_not=[in_cell, _without(key)]))
        if hidden:
            raise CollectionError(
                f"{hidden} points of collection {self._name!r} hold something else than a cell in "
                f"{key!r}, and a search of cells would miss them; delete that payload key and lay "
                "out again."
            )
        placed = self._count(models.Filter(must=[in_cell]))
        if placed < written * (1 - _MISSED):
            raise CollectionError(
                f"Only {placed} of the {written} cells written to collection {self._name!r} are "
                "there; lay out again when others write less."
            )

    def _count(self, condition: models.Filter | None = None) -> int:
        # Without the vector a point is no key; the empty name is the unnamed vector's.
        must: list[models.Condition] = [models.HasVectorCondition(has_vector=self.info.field)]
        if condition is not None:
            must.append(condition)
        found = self._client.count(
            self._name, count_filter=models.Filter(must=must), exact=True, timeout=_PATIENCE
        )
        return found.count

    def _metadata_key(self, key: str) -> str:
        field = self.info.field
        return f"{key}_{field}" if field else key

    def _read_metadata(self) -> Mapping[str, Any]:
        return self._client.get_collection(self._name).config.metadata or {}

    def _write_metadata(self, changes: dict[str, Any]) -> None:
        # The database merges: what others keep there stays; None removes a key.
        self._client.update_collection(self._name, metadata=changes, timeout=_PATIENCE)


def _open_folder(folder: str) -> QdrantClient:
    # The client would make an empty database out of any folder.
    if not Path(folder, "meta.json").is_file():
        raise CollectionNotFound(
            f"There is no Qdrant database in folder {folder!r}; check the path, or write "
            "http://host:port for a server."
        )
    try:
        return QdrantClient(path=folder)
    except RuntimeError as exc:
        if "already accessed" not in str(exc):
            raise
        raise DatabaseUnreachable(
            f"The Qdrant database in folder {folder!r} is open elsewhere, and only one process can "
            "have it; close it there, or run a Qdrant server."
        ) from exc


@contextmanager
def _answering(server: str) -> Iterator[None]:
    """Turn "nobody is there", "not a Qdrant" and "you may not" into errors that say what to do."""
    absent = "check the address and that it is running"
    stranger = (
        f"{server} answers, but not as this version of the client expects; check that the address "
        "is Qdrant's and that qdrant-client and the server are of about the same version."
    )
    try:
        yield
    except ResponseHandlingException as exc:
        if isinstance(exc.source, ValueError):  # JSON of another form
            raise DatabaseUnreachable(stranger) from exc
        raise DatabaseUnreachable(f"{server} does not answer ({exc.source}); {absent}.") from exc
    except json.JSONDecodeError as exc:
        raise DatabaseUnreachable(stranger) from exc
    except grpc.RpcError as exc:
        code = exc.code() if isinstance(exc, grpc.Call) else None
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise
        raise DatabaseUnreachable(f"{server} does not answer; {absent}.") from exc
    except UnexpectedResponse as exc:
        if exc.status_code == 404:
            raise DatabaseUnreachable(stranger) from exc
        if exc.status_code not in (401, 403):
            raise
        raise DatabaseUnreachable(
            f"{server} refuses access; pass an API key that may read the collection."
        ) from exc


def _choose_vector(
    vectors: models.VectorParams | Mapping[str, models.VectorParams] | None,
    field: str | None,
    name: str,
) -> tuple[str, models.VectorParams]:
    if isinstance(vectors, models.VectorParams):
        named: dict[str, models.VectorParams] = {"": vectors}
    else:
        named = dict(vectors or {})
    dense = sorted(key for key, params in named.items() if params.multivector_config is None)
    if field is None and len(dense) == 1:
        field = dense[0]
    if field is None or field not in named:
        wanted = "no vector was named" if field is None else f"no dense vector {field!r}"
        raise FieldNotFound(
            f"Collection {name!r}: {wanted}; its dense vectors are {_listed(dense)}."
        )
    vector = named[field]
    if vector.multivector_config is not None:
        raise CollectionError(
            f"Vector {field!r} of collection {name!r} is a multivector; name a dense vector with "
            f"one embedding a point: {_listed(dense)}."
        )
    if vector.datatype not in _DATATYPES:
        raise CollectionError(
            f"Vector {field!r} of collection {name!r} is stored as {vector.datatype.value}; only "
            "float32 and float16 can be served."
        )
    if vector.distance not in _METRICS:
        raise MetricNotSupported(
            f"Collection {name!r} compares by {vector.distance.value}; only Cosine, Dot and Euclid "
            "can be served."
        )
    return field, vector


def _plan_queries(
    request: SearchRequest, plan: QueryPlan, field: str, exact: bool
) -> list[models.QueryRequest]:
    """Write the plan as queries, one for each row; ``exact=False`` where every search is exact."""
    if request.filter is not None and not isinstance(request.filter, models.Filter):
        raise InvalidInput(
            "A Qdrant filter is a qdrant_client.models.Filter, but got "
            f"{type(request.filter).__name__}."
        )
    unknown = sorted(set(request.params or {}) - set(models.SearchParams.model_fields))
    if unknown:
        raise InvalidInput(
            f"{unknown[0]!r} is not a search parameter of Qdrant; it has "
            f"{_listed(sorted(models.SearchParams.model_fields))}."
        )
    params = dict(request.params or {})
    if plan.cells is not None and exact:
        params["exact"] = True  # HNSW under the filter of a cell loses keys
    fixed: dict[str, Any] = {
        "using": field or None,
        "params": models.SearchParams(**params) if params else None,
    }
    queries = []
    for row in range(len(request.queries)):
        search: dict[str, Any] = {
            **fixed,
            "query": models.NearestQuery(nearest=request.queries[row].tolist()),
            "filter": request.filter,
            "limit": request.k,
        }
        if plan.cells is not None:
            search["filter"] = _in_cells(plan.cells[row], str(plan.layout), request.filter)
        if plan.rewritten is not None:
            # The filter stays inside: the server would merge an outer one into it clause by
            # clause, which turns two ``should`` into alternatives of each other.
            candidates = {
                **search,
                "query": models.NearestQuery(nearest=plan.rewritten[row].tolist()),
                "limit": max(plan.rescore, request.k),
            }
            search["prefetch"] = [models.Prefetch(**candidates)]
            search["filter"] = None
            # Exact also means unquantised, and only the candidates are scored.
            search["params"] = models.SearchParams(exact=True) if exact else None
        with_payload = list(request.fields) if request.fields else False
        queries.append(models.QueryRequest(**search, with_payload=with_payload))
    return queries


def _in_cells(cells: IntArray, layout: str, condition: models.Filter | None) -> models.Filter:
    key = f"{_CELL}{layout}"
    chosen = sorted({int(cell) for cell in cells if cell >= 0})
    should: list[models.Condition] = [_without(key)]
    if chosen:
        should.append(models.FieldCondition(key=key, match=models.MatchAny(any=chosen)))
    here = models.Filter(should=should)
    return here if condition is None else models.Filter(must=[condition, here])


def _without(key: str) -> models.IsEmptyCondition:
    return models.IsEmptyCondition(is_empty=models.PayloadField(key=key))


def _check_cells(cells: IntArray, count: int, n_cells: int) -> IntArray:
    array = np.asarray(cells)
    if (
        array.shape != (count,)
        or not np.issubdtype(array.dtype, np.integer)
        or array.min() < 0
        or array.max() >= n_cells
    ):
        raise InvalidInput(
            f"The cells of {count} keys must be as many integers from 0 to {n_cells - 1}; check "
            "the bundle that assigns them."
        )
    return array


def _plain_id(found: Any) -> Id:
    # The client's types allow uuid.UUID; answers hold int or str.
    return found if isinstance(found, int) else str(found)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:20])
    return (shown + (", ..." if len(names) > 20 else "")) or "none"
