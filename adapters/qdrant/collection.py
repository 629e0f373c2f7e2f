"""Qdrant: the embedded local mode, or a server.

Qdrant has no inverted lists. A cell is a payload value with an integer index, and a filtered exact
search scans only the points that pass the filter, so its cost is the size of the cells searched.
``cells`` says how cells are kept, ``layouts`` how they get there.

Importing this module needs the extra ``qdrant``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from amips_plugins.adapters.describe import with_cells
from amips_plugins.adapters.qdrant.cell_shards import CellShards
from amips_plugins.adapters.qdrant.cells import LayoutRecord, serving
from amips_plugins.adapters.qdrant.copied_layouts import CopiedLayouts
from amips_plugins.adapters.qdrant.describe import describe_qdrant
from amips_plugins.adapters.qdrant.failures import failure_of, translated_errors
from amips_plugins.adapters.qdrant.generations import generation_of
from amips_plugins.adapters.qdrant.hardware import ScoredBytes, scored_bytes
from amips_plugins.adapters.qdrant.layouts import QdrantLayouts
from amips_plugins.adapters.qdrant.local_store import LocalStore
from amips_plugins.adapters.qdrant.opening import is_local, open_folder, open_server
from amips_plugins.adapters.qdrant.point_collection import ServerFound
from amips_plugins.adapters.qdrant.points import (
    RESERVED,
    as_ids,
    choose_vector,
    key_batch,
    listed,
)
from amips_plugins.adapters.qdrant.server_layouts import ServerLayouts
from amips_plugins.adapters.qdrant.sharded_store import ShardedStore
from amips_plugins.adapters.qdrant.store import ServerStore
from amips_plugins.adapters.qdrant.strays import may_have_strays
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.adapters.qdrant.tenants import tenant_keys
from amips_plugins.adapters.qdrant.vector_config import (
    codes_in,
    described,
    graph_of,
    has_graph,
    params_of,
)
from amips_plugins.adapters.qdrant.written_points import WrittenPoints
from amips_plugins.collection import (
    CollectionInfo,
    Cursor,
    Failure,
    Hit,
    Id,
    KeyBatch,
    SearchRequest,
)
from amips_plugins.collection.construction import Construction
from amips_plugins.errors import CollectionNotFound, require
from amips_plugins.partitions import Partitions

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["QdrantCollection"]

_FETCH_BATCH = 500  # points
_TIMEOUT = 5.0  # the client's default


class QdrantCollection(WrittenPoints):
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
        Name of the vector, empty for the unnamed one; left out, the unnamed or only one.
    shard_key
        With custom sharding: the shard key whose points this object is about. Left out, it is
        about all of them, and writes nothing, since an id is unique only within its shard key.

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

    def __init__(
        self,
        client: QdrantClient,
        name: str,
        field: str | None = None,
        *,
        shard_key: int | str | None = None,
    ) -> None:
        self._client = client
        self._name = name
        self._field = field
        self._shard_key = shard_key
        # Local mode is always exact, has no indexes and warns about both.
        self._local = is_local(client)
        self._indexed_only = not self._local
        self._owns_client = False
        self._server = "The Qdrant server"
        self._kept = None

    @classmethod
    def connect(
        cls,
        address: str,
        name: str,
        field: str | None = None,
        token: str | None = None,
        shard_key: int | str | None = None,
    ) -> QdrantCollection:
        """Open a client for this collection, which ``close`` closes, and check that it is there.

        Parameters
        ----------
        address
            The folder of a local database, or ``http(s)://host:port`` of a server.
        name, field, shard_key
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
        on_server = address.startswith(("http://", "https://"))
        client = open_server(address, token) if on_server else open_folder(address)
        collection = cls(client, name, field, shard_key=shard_key)
        collection._owns_client = True
        if on_server:
            parts = urlsplit(address)
            server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
            collection._server = f"The Qdrant server at {server}"
        try:
            _ = collection.info
        except BaseException:
            collection.close()  # or the folder would stay locked
            raise
        return collection

    def _look(self, *, strays: bool = True) -> ServerFound:
        with translated_errors(self._server):
            if not self._name or not self._client.collection_exists(self._name):
                names = sorted(found.name for found in self._client.get_collections().collections)
                raise CollectionNotFound(
                    f"Qdrant has no collection {self._name!r}; it has {listed(names)}."
                )
            found = self._client.get_collection(self._name)
        params = found.config.params
        named = params.vectors if isinstance(params.vectors, dict) else {"": params.vectors}
        # Once open it stays with its vector, whichever others are added.
        wanted = self._field if self._kept is None else self._kept.info.field
        field, vector = choose_vector(
            {name: described(one) for name, one in named.items() if one}, wanted, self._name
        )
        metadata = found.config.metadata or {}
        own = generation_of(self._own_name(), metadata)
        schema = {
            key: index.data_type.value
            for key, index in sorted(found.payload_schema.items())
            if not key.startswith(RESERVED)
        }
        info = CollectionInfo(
            "qdrant",
            self._name,
            field,
            vector.metric,
            vector.size,
            schema,
            namespace="" if self._shard_key is None else str(self._shard_key),
            family=own.family,
        )
        record = serving(metadata, info)
        return ServerFound(
            info,
            record,
            (*named, *(params.sparse_vectors or {})),
            Limits(found.config.strict_mode_config),
            params.sharding_method is models.ShardingMethod.CUSTOM,
            None if self._local else tenant_keys(found, field),
            has_graph(found, field) and not self._local,
            None if self._local else codes_in(found, field),
            bool(params_of(found, field).on_disk) and not self._local,
            self._cell_shards(record),
            not strays or may_have_strays(self._client, self._name, self._shard_key, found, record),
        )

    def _cell_shards(self, record: LayoutRecord | None) -> CellShards | None:
        if record is None or not record.places:
            return None
        with translated_errors(self._server):
            found = self._client.list_shard_keys(self._name).shard_keys or ()
        return CellShards(record, tuple(sorted((one.key for one in found), key=str)))

    def _own_name(self) -> str:
        """Resolve an alias; who may not list aliases has its own name for the collection."""
        try:
            found = self._client.get_aliases().aliases
        except Exception:  # noqa: BLE001 - such as a key for one collection, which has been read
            return self._name
        return next(
            (one.collection_name for one in found if one.alias_name == self._name), self._name
        )

    @property
    def timeout(self) -> float | None:
        """Seconds that the client gives a call."""
        if self._local:
            return None
        given = self._client.init_options.get("timeout")
        return _TIMEOUT if given is None else float(given)

    @property
    def max_candidates(self) -> int | None:
        """How many candidates a rewritten query may fetch: strict mode's limit."""
        return self._found.limits.max_candidates

    def failure(self, exc: BaseException) -> Failure:
        """Say what an error of a search means."""
        return failure_of(exc)

    def describe(self) -> Construction:
        """Look at graph, quantisation, storage, payload index, strict mode and segments."""
        with translated_errors(self._server):
            found = self._client.get_collection(self._name)
        return with_cells(self, describe_qdrant(found, self.info.field, local=self._local))

    def current(self) -> QdrantCollection:
        """Look at the database again: another object where the cells or the collection changed.

        Both have the same connection. An alias is the database's to follow: its cells and what
        they belong to are looked up here, every search goes to where it points at the time.
        """
        found = self._look()
        kept = self._kept
        if kept is None or kept == found:
            self._kept = found
            return self
        other = QdrantCollection(
            self._client, self._name, found.info.field, shard_key=self._shard_key
        )
        other._kept, other._server, other._local = found, self._server, self._local
        other._given = self._given
        other._owns_client = self._owns_client
        return other

    def count(self) -> int:
        """Return the exact number of points that have this vector."""
        return self._store.count()

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every point that has this vector once, in the order of the ids.

        Integer ids come first, then UUIDs. A cursor is the last id read; it stays good when that
        point is deleted. A batch may hold fewer keys than ``batch_size`` before the end.
        """
        return self._with_values(self._scanned(batch_size, after))

    def _scanned(
        self, batch_size: int, after: Cursor | None
    ) -> Iterator[tuple[KeyBatch, Sequence[models.Record]]]:
        field, given = self.info.field, self._given
        limit = self._found.limits.points(batch_size)
        offset: Any = after
        while True:
            with translated_errors(self._server):
                records, offset = self._client.scroll(
                    self._name,
                    limit=limit,
                    offset=offset,
                    with_payload=False if given is None else [given.key],
                    with_vectors=[field],
                    shard_key_selector=self._shard_key,
                )
            # The offset is inclusive: on going on, the first record is the cursor's own.
            batch = key_batch([record for record in records if record.id != after], field)
            if batch is not None:
                yield batch, records
            if offset is None:
                return

    def fetch(self, ids: Sequence[Id]) -> KeyBatch:
        """Read those of the keys that are there."""
        records: list[models.Record] = []
        keys, limit = as_ids(ids), self._found.limits.points(_FETCH_BATCH)
        for start in range(0, len(keys), limit):
            with translated_errors(self._server):
                records += self._client.retrieve(
                    self._name,
                    keys[start : start + limit],
                    with_payload=False,
                    with_vectors=[self.info.field],
                    shard_key_selector=self._shard_key,
                )
        none = np.empty((0, self.info.dim), dtype=np.float32)
        return key_batch(records, self.info.field) or KeyBatch((), none)

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search by comparing with every point, unquantised; strict mode may refuse it."""
        if self._local:  # always exact, and warns of search parameters
            return self.search(replace(request, params=None))
        return super().exact(request)

    @property
    def layouts(self) -> QdrantLayouts:
        """Builds, shows, mends and takes back the cells."""
        if self._given is not None:
            return self._given_layouts(self._given)  # type: ignore[return-value]  # has all of it
        if self._local:
            return QdrantLayouts(self, self._store)
        copied = CopiedLayouts(self._client, self._name, self.info, self._server)
        return ServerLayouts(self, self._store, copied)

    def sibling(self, name: str) -> QdrantCollection:
        """Return another collection, or alias, of this server."""
        other = QdrantCollection(self._client, name, self.info.field)
        other._server, other._local = self._server, self._local
        other._owns_client = self._owns_client
        return other

    def partitioned(self, partitions: Partitions | None) -> QdrantCollection:
        """Return an object of the same points in the values of a payload key, or in shard keys."""
        own = partitions is not None and partitions.field is None
        if partitions is None or not own or not self.custom_shards or self._shard_key is not None:
            return super().partitioned(partitions)
        from amips_plugins.adapters.qdrant.shard_keys import InShardKeys  # which is one of these

        return InShardKeys.of(self, partitions)

    def beside(self, name: str, field: str | None) -> QdrantCollection:
        """Return another collection, read and searched through the client of this one."""
        other = QdrantCollection(self._client, name, field)
        other._server = self._server
        return other

    @property
    def _store(self) -> ServerStore:
        if self._local:
            return LocalStore(self._client, self._name, self.info.field)
        shards = self._found.shards
        if shards is not None:
            return ShardedStore(self._client, self._name, self.info.field, self._server, shards)
        return ServerStore(self._client, self._name, self.info.field, self._server, self._shard_key)

    @property
    def client(self) -> QdrantClient:
        """The client that it is asked through."""
        return self._client

    @property
    def custom_shards(self) -> bool:
        """Whether its points lie in custom shard keys of their owner's."""
        return self._found.custom_shards and self._found.shards is None

    @property
    def cell_shards(self) -> CellShards | None:
        """The shard keys of its cells, where these have some."""
        return self._found.shards

    @property
    def local(self) -> bool:
        """Whether this is the client's local mode, and no server."""
        return self._local

    def metered(self) -> AbstractContextManager[ScoredBytes]:
        """Count the bytes of vectors that searches in the block score, where the server tells."""
        return scored_bytes(self._client)

    def is_built(self) -> bool:
        """Tell whether the server has built graphs, or codes, of some of its vectors."""
        with translated_errors(self._server):
            found = self._client.get_collection(self._name)
        graph = graph_of(found, self.info.field)
        built = graph["m"] or graph.get("payload_m") or codes_in(found, self.info.field)
        return bool(found.indexed_vectors_count) and bool(built)

    def close(self) -> None:
        """Close the client if ``connect`` opened it; safe to call twice."""
        if self._owns_client:
            self._owns_client = False
            self._client.close()
