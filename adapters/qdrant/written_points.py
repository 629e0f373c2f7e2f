"""Writing Qdrant's points through its client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.cell_shards import CellShards
from amips_plugins.adapters.qdrant.failures import translated_errors
from amips_plugins.adapters.qdrant.generations import GENERATION_KEY, generation_of
from amips_plugins.adapters.qdrant.points import as_ids, payloads, refuse_other_vectors
from amips_plugins.adapters.qdrant.search import all_of, among
from amips_plugins.adapters.qdrant.searched_points import SearchedPoints
from amips_plugins.adapters.qdrant.sharded_points import ShardedPoints, stamp_now
from amips_plugins.adapters.qdrant.sharded_store import ShardedStore
from amips_plugins.collection import Id
from amips_plugins.errors import InvalidInput, require
from amips_plugins.vectors import FloatArray, IntArray

if TYPE_CHECKING:
    from qdrant_client import models
    from typing_extensions import Self
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["WrittenPoints"]

_UPSERT_BATCH = 500  # points at most,
_UPSERT_NUMBERS = 1_000_000  # of their vectors: a server takes 32 MiB of JSON a call
_PATIENCE = 600  # seconds for one write; the client's default is 5


class WrittenPoints(SearchedPoints):
    """The part of ``QdrantCollection`` that writes."""

    _server: str

    def sibling(self, name: str) -> Self:
        """Return another collection, or alias, of this server."""
        raise NotImplementedError

    def _own_name(self) -> str:
        raise NotImplementedError

    def upsert(
        self,
        ids: Sequence[Id],
        vectors: FloatArray,
        fields: Sequence[Mapping[str, Any]] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        """Write points, in place of those with the same ids, whose payload is replaced too.

        Without ``fields`` a point has no payload but ours, and without ``cells`` it is overflow.
        Cells are those of the layout this object is pinned to. Raises ``InvalidInput`` also where
        points have other vectors, which they would lose.
        """
        found, keys = self._found, as_ids(ids)
        written = payloads(found.info, found.cells, keys, vectors, fields, cells)
        now = self._look(strays=False)  # a vector may have been added
        refuse_other_vectors(found.info, now.vectors)
        self._refuse_all_shards()
        source = self._draining_source()
        if source is not None:
            source.upsert(ids, vectors, fields)
        name, shards = found.info.field, found.shards
        size = min(_UPSERT_BATCH, max(1, _UPSERT_NUMBERS // found.info.dim))
        size = found.limits.upserts(size if shards is None else found.limits.points(size))
        for start in range(0, len(keys), size):
            rows = range(start, min(start + size, len(keys)))
            points = [
                models.PointStruct(
                    id=keys[row],
                    vector={name: vectors[row].tolist()} if name else vectors[row].tolist(),
                    payload=written[row],
                )
                for row in rows
            ]
            if shards is not None:
                cells_of_rows = [written[row][shards.record.key] for row in rows]
                with translated_errors(self._server, "write to"):
                    self._sharded(shards).upsert(points, cells_of_rows)
                continue
            # A server before 1.19 keeps the payload of a point that is written without any.
            bare = [] if self._local else [keys[row] for row in rows if not written[row]]
            with translated_errors(self._server, "write to"):
                self._write(points, bare)

    def _write(self, points: list[models.PointStruct], bare: Sequence[Id]) -> None:
        patience = self._found.limits.seconds(_PATIENCE)
        if bare:
            gone = models.FilterSelector(filter=all_of(among(bare)), shard_key=self._shard_key)
            write = models.PointsList(points=points, shard_key=self._shard_key)
            self._client.batch_update_points(
                self._name,
                [
                    models.ClearPayloadOperation(clear_payload=gone),
                    models.UpsertOperation(upsert=write),
                ],
                wait=True,
                timeout=patience,
            )
        else:
            self._client.upsert(
                self._name,
                points,
                wait=True,
                shard_key_selector=self._shard_key,
                timeout=patience,
            )

    def _sharded(self, shards: CellShards) -> ShardedPoints:
        return ShardedPoints(
            self._client,
            self._name,
            shards,
            lambda call: call(),
            self._found.limits.seconds(_PATIENCE),
        )

    def stamp_for(self, ids: Sequence[Id]) -> int:
        """Return a stamp for a write of these ids, newer than all that they have."""
        shards, stamp = self._found.shards, stamp_now()
        if shards is not None:
            with translated_errors(self._server):
                for some in self._few(ids):
                    stamp = max(stamp, self._sharded(shards).stamp(some))
        return stamp

    def tidy_shards(self, ids: Sequence[Id], stamp: int, *, check: bool = False) -> None:
        """Delete what is older than a write of these ids in the overflow's shard key.

        With ``check`` only of those that it has written.
        """
        shards = self._found.shards
        if shards is not None:
            with translated_errors(self._server, "write to"):
                for some in self._few(ids):
                    points = self._sharded(shards)
                    written = points.written_since(some, stamp) if check else some
                    if written:
                        points.tidy(written, stamp)

    def displace(self, ids: Sequence[Id]) -> None:
        """Take these points out of the shard keys of their cells."""
        shards, store = self._found.shards, self._store
        if shards is not None and isinstance(store, ShardedStore):
            for some in self._few(ids):
                store.displace_all(shards.record, some)

    def _few(self, ids: Sequence[Id]) -> Iterator[list[Id]]:
        """Return checked ids in portions that a server takes in one condition."""
        keys, size = as_ids(ids), self._found.limits.points(_UPSERT_BATCH)
        return (keys[start : start + size] for start in range(0, len(keys), size))

    def _refuse_all_shards(self) -> None:
        custom = self._found.custom_shards and self._found.shards is None
        if custom and self._shard_key is None:
            raise InvalidInput(
                f"Collection {self._name!r} has custom shard keys, and an id is unique only within "
                "its shard key: open it with shard_key=... (in a URI &shard_key=...) to write."
            )

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete points, with all their vectors; an id that is not there is no error."""
        keys = as_ids(ids)
        self._refuse_all_shards()
        source = self._draining_source() if keys else None
        if source is not None:
            source.delete(ids)
        if keys and self._found.shards is not None:
            with translated_errors(self._server, "write to"):
                for some in self._few(keys):
                    self._sharded(self._found.shards).delete(some)
        elif keys:
            with translated_errors(self._server, "write to"):
                self._client.delete(
                    self._name,
                    models.PointIdsList(points=keys),
                    wait=True,
                    shard_key_selector=self._shard_key,
                    timeout=self._found.limits.seconds(_PATIENCE),
                )

    def _draining_source(self) -> Self | None:
        """Return what this is a copy of, while what was written there may still be on its way."""
        if self._local:
            return None
        with translated_errors(self._server):
            metadata = self._client.get_collection(self._name).config.metadata or {}
            if not metadata.get(GENERATION_KEY, {}).get("draining"):
                return None
            own = generation_of(self._own_name(), metadata)
            if not own.draining or not self._client.collection_exists(own.source):
                return None
        return self.sibling(own.source)
