"""Qdrant: the embedded local mode, or a server.

Qdrant has no inverted lists. A cell is a payload value with an integer index, and a filtered exact
search scans only the points that pass the filter, so its cost is the size of the cells searched.
``qdrant_cells`` says how cells are kept, ``qdrant_layouts`` how they get there.

Importing this module needs the extra ``qdrant``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.describe import with_cells
from amips_plugins.adapters.qdrant.cells import CELL_PREFIX, Record, cell_key, serving
from amips_plugins.adapters.qdrant.layouts import QdrantLayouts
from amips_plugins.adapters.qdrant.opening import (
    METRICS,
    answering,
    choose_vector,
    listed,
    open_folder,
)
from amips_plugins.adapters.qdrant.search import (
    all_of,
    as_arguments,
    as_batch,
    as_hits,
    as_ids,
    has_vector,
    plan_queries,
)
from amips_plugins.adapters.qdrant.store import LocalStore, ServerStore
from amips_plugins.adapters.qdrant.strict_mode import batch_limit, time_limit
from amips_plugins.cell_layout import Construction
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
from amips_plugins.errors import CollectionNotFound, InvalidInput, require
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray, IntArray

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient, QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")
    QdrantClient = require("qdrant_client", "qdrant").QdrantClient

__all__ = ["QdrantCollection"]

_UPSERT_BATCH = 500  # points: a server takes 32 MiB a call
_PATIENCE = 600  # seconds for one count or write; the client's default is 5


@dataclass(frozen=True, slots=True)
class _Found:
    """What one look at the database found: the object stays on it."""

    info: CollectionInfo
    cells: Record | None
    vectors: tuple[str, ...]
    strict: models.StrictModeConfigOutput | None


class QdrantCollection:
    """One dense vector of a Qdrant collection.

    Nothing is asked of the database until ``info`` is first used, here or by another method.
    Make the client, and this object, in the process that uses them: a fork would share its
    connections with its parent.

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
    >>> from amips_plugins.collection import SearchRequest
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

    break_even = 0.4

    def __init__(self, client: QdrantClient, name: str, field: str | None = None) -> None:
        options = client.init_options
        self._client = client
        self._name = name
        self._field = field
        # Local mode is always exact, has no indexes and warns about both.
        self._local = options.get("location") == ":memory:" or options.get("path") is not None
        self._owns_client = False
        self._server = "The Qdrant server"
        self._kept: _Found | None = None

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
            client = open_folder(address)
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
        return self._found.info

    @property
    def _found(self) -> _Found:
        if self._kept is None:
            self._kept = self._look()
        return self._kept

    def _look(self) -> _Found:
        with answering(self._server):
            if not self._name or not self._client.collection_exists(self._name):
                names = sorted(found.name for found in self._client.get_collections().collections)
                raise CollectionNotFound(
                    f"Qdrant has no collection {self._name!r}; it has {listed(names)}."
                )
            found = self._client.get_collection(self._name)
        params = found.config.params
        field, vector = choose_vector(params.vectors, self._field, self._name)
        schema = {
            key: index.data_type.value
            for key, index in sorted(found.payload_schema.items())
            if not key.startswith(CELL_PREFIX)
        }
        info = CollectionInfo(
            "qdrant", self._name, field, METRICS[vector.distance], vector.size, schema
        )
        named = list(params.vectors) if isinstance(params.vectors, dict) else [""]
        return _Found(
            info,
            serving(found.config.metadata or {}, field),
            (*named, *(params.sparse_vectors or {})),
            found.config.strict_mode_config,
        )

    def look(self) -> tuple[models.CollectionInfo, bool]:
        """Ask how the collection is configured, and say whether it is in local mode."""
        with answering(self._server):
            return self._client.get_collection(self._name), self._local

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
        from amips_plugins.adapters.qdrant.describe import describe_qdrant

        return with_cells(self, describe_qdrant(self))

    def failure(self, exc: BaseException) -> Failure:  # noqa: ARG002 - nothing is known of it here
        """Say what an error of a search means."""
        return Failure.OTHER

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:  # noqa: ARG002 - a plan changes no meaning here
        """Say why a plan would change what a request means, or None."""
        return None

    def current(self) -> QdrantCollection:
        """Look at the database again: another object where the cells or the collection changed.

        Both have the same connection. An alias is the database's to follow: its cells and what
        they belong to are looked up here, every search goes to where it points at the time.
        """
        found = self._look()
        if self._kept is None or self._kept == found:
            self._kept = found
            return self
        other = QdrantCollection(self._client, self._name, self._field)
        other._kept, other._server, other._local = found, self._server, self._local
        other._owns_client = self._owns_client
        return other

    def count(self) -> int:
        """Return the exact number of points that have this vector."""
        with answering(self._server):
            return self._client.count(
                self._name, all_of(has_vector(self.info.field)), exact=True, timeout=self._patience
            ).count

    @property
    def _patience(self) -> int:
        return time_limit(self._found.strict, _PATIENCE)

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every point that has this vector once, in the order of the ids.

        Integer ids come first, then UUIDs. A cursor is the last id read; it stays good when that
        point is deleted. A batch may hold fewer keys than ``batch_size`` before the end.
        """
        field = self.info.field
        limit = batch_limit(self._found.strict, batch_size)
        offset: Any = after
        while True:
            with answering(self._server):
                records, offset = self._client.scroll(
                    self._name,
                    limit=limit,
                    offset=offset,
                    with_payload=False,
                    with_vectors=[field],
                )
            # The offset is inclusive: on going on, the first record is the cursor's own.
            batch = as_batch([record for record in records if record.id != after], field)
            if batch is not None:
                yield batch
            if offset is None:
                return

    def fetch(self, ids: Sequence[Id]) -> KeyBatch:
        """Read those of the points that are there with this vector."""
        field = self.info.field
        with answering(self._server):
            records = self._client.retrieve(
                self._name, list(ids), with_payload=False, with_vectors=[field]
            )
        none = KeyBatch([], np.zeros((0, self.info.dim), np.float32))
        return as_batch(records, field) or none

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search by a plan, in one call for all queries.

        Rewritten queries choose the candidates with the caller's own parameters; the server then
        scores these exactly with the original queries. Cells are searched exactly and ANDed with
        the caller's filter; points without a cell are always searched. Cells that hold more than
        ``break_even`` of the keys are left out of the filter.

        Raises
        ------
        InvalidInput
            The plan's cells are of another layout, the filter is not a ``models.Filter``, or a
            parameter is not one of ``models.SearchParams``.
        """
        queries, timeout = self._planned(request, plan)
        if len(queries) == 1:
            # The client's batch call costs 200 us of Python more for a query than this one.
            one = as_arguments(queries[0])
            answers = [self._client.query_points(self._name, **one, timeout=timeout)]
        else:
            answers = self._client.query_batch_points(self._name, queries, timeout=timeout)
        return as_hits(answers)

    async def search_async(
        self, client: AsyncQdrantClient, request: SearchRequest, plan: QueryPlan = NATIVE
    ) -> list[list[Hit]]:
        """Search as ``search`` does, through an ``AsyncQdrantClient``."""
        if self._kept is None:
            self._kept = await asyncio.to_thread(self._look)
        queries, timeout = self._planned(request, plan)
        if len(queries) == 1:
            one = as_arguments(queries[0])
            answers = [await client.query_points(self._name, **one, timeout=timeout)]
        else:
            answers = await client.query_batch_points(self._name, queries, timeout=timeout)
        return as_hits(answers)

    def _planned(
        self, request: SearchRequest, plan: QueryPlan
    ) -> tuple[list[models.QueryRequest], int | None]:
        """Return a search as queries, and its timeout."""
        check_layout(plan, self.layout(), self._name)
        queries = plan_queries(
            request, plan, self.info.field, self.break_even, exact=not self._local
        )
        # Qdrant counts whole seconds, and 0 would mean no time at all.
        return queries, None if request.timeout is None else max(1, math.ceil(request.timeout))

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search by comparing with every point, unquantised; strict mode may refuse it."""
        # Local mode is always exact, and warns of search parameters.
        params = None if self._local else {"exact": True}
        return self.search(replace(request, params=params))

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
        found = self._found
        check_keys(found.info.dim, self.layout(), ids, vectors, fields, cells)
        if len(found.vectors) > 1:
            raise InvalidInput(
                f"Points of collection {self._name!r} have the vectors {listed(found.vectors)}, "
                "and writing one would lose the others; write them with the Qdrant client, and "
                "let backfill give them cells."
            )
        payloads = [
            {key: value for key, value in one.items() if not key.startswith(CELL_PREFIX)}
            for one in fields or [{}] * len(ids)
        ]
        if cells is not None and found.cells is not None:
            if len(cells) and not (cells.min() >= OVERFLOW and cells.max() < found.cells.n_cells):
                raise InvalidInput(
                    f"The cells are from {cells.min()} to {cells.max()}; the collection has 0 to "
                    f"{found.cells.n_cells - 1}, and -1 for none."
                )
            for payload, cell in zip(payloads, cells.tolist(), strict=True):
                if cell != OVERFLOW:
                    payload[cell_key(found.cells.layout)] = cell
        name, keys = found.info.field, as_ids(ids)
        for start in range(0, len(keys), self._upsert_batch):
            points = [
                models.PointStruct(
                    id=keys[row],
                    vector={name: vectors[row].tolist()} if name else vectors[row].tolist(),
                    payload=payloads[row],
                )
                for row in range(start, min(start + self._upsert_batch, len(keys)))
            ]
            with answering(self._server, "write to"):
                self._client.upsert(self._name, points, wait=True, timeout=self._patience)

    @property
    def _upsert_batch(self) -> int:
        strict = self._found.strict
        limit = None if strict is None else strict.upsert_max_batchsize
        return min(_UPSERT_BATCH, limit or _UPSERT_BATCH)

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete points, with all their vectors; an id that is not there is no error."""
        keys = as_ids(ids)
        if keys:
            with answering(self._server, "write to"):
                self._client.delete(
                    self._name,
                    models.PointIdsList(points=keys),
                    wait=True,
                    timeout=self._patience,
                )

    def layout(self) -> str | None:
        """Return the identifier of the complete cells of this vector, or None."""
        cells = self._found.cells
        return None if cells is None else cells.layout

    def overflow(self) -> int:
        """Return the number of points without a cell; 0 without a layout."""
        layout = self.layout()
        return 0 if layout is None else self._store.overflow(cell_key(layout))

    @property
    def layouts(self) -> QdrantLayouts:
        """Builds, shows, mends and takes back the cells."""
        store = self._store
        return QdrantLayouts(self, store, store.seconds_per_write)

    @property
    def _store(self) -> ServerStore:
        if self._local:
            return LocalStore(self._client, self._name, self.info.field)
        return ServerStore(self._client, self._name, self.info.field, self._server)

    def __enter__(self) -> QdrantCollection:
        """Return the collection itself; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the client if ``connect`` opened it; safe to call twice."""
        if self._owns_client:
            self._owns_client = False
            self._client.close()
