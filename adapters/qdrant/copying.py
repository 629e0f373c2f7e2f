"""A copy of a Qdrant collection in cells: how its points are read, written and compared."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.copies.replica import Replica, found_again, found_enough
from amips_plugins.adapters.copies.row_changes import Row, SourceBaseline, digest
from amips_plugins.adapters.qdrant.cell_shards import CellShards
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.failures import patiently
from amips_plugins.adapters.qdrant.points import as_ids, plain_id
from amips_plugins.adapters.qdrant.search import all_of, among, empty
from amips_plugins.adapters.qdrant.sharded_points import ShardedPoints, stamp_now
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.cell_layout import AssignCells, check_assigned
from amips_plugins.collection import CollectionInfo, Id
from amips_plugins.errors import require
from amips_plugins.progress import Progress
from amips_plugins.sketch import sketch

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["PointReplica"]

_PAGE = 1_000  # points with their vectors
_NUMBERS = 1_000_000  # of these: an answer, or a request, of some 12 MB
_PATIENCE = 600  # seconds for one call
_SAMPLE = 32  # keys whose neighbours are compared
# Qdrant leaves a vector as it is whose squared length is 1 up to 1e-6, and normalises others anew;
# how it rounds is its own matter, so nothing near that limit is handed to it.
_NORMAL = 5e-7


class PointReplica(Replica):
    """A copy of a collection, in the cells that ``assign`` gives; without it they are overflow.

    ``record`` names the cells of the copy, None where it has none, ``forgotten`` the payload
    keys that are no part of a point as its writer knows it, and ``served`` the cells that source
    and copy have now.
    """

    def __init__(
        self,
        client: QdrantClient,
        names: tuple[str, str],
        info: CollectionInfo,
        record: LayoutRecord | None,
        forgotten: Sequence[str],
        served: Sequence[LayoutRecord | None],
        assign: AssignCells | None,
        progress: Progress,
    ) -> None:
        super().__init__(progress)
        self._client = client
        self._names = names
        self._info = info
        self._record = record
        self._forgotten = frozenset(forgotten)
        self._served = dict(zip(names, served, strict=True))
        self._assign = assign
        params = client.get_collection(names[0]).config.params
        dense = params.vectors if isinstance(params.vectors, dict) else {"": params.vectors}
        self._vectors = (*dense, *(params.sparse_vectors or {}))
        self._normalised = {
            name for name, one in dense.items() if one and one.distance is models.Distance.COSINE
        }
        width = sum(one.size for one in dense.values() if one)
        page = max(1, min(_PAGE, _NUMBERS // max(1, width)))
        self._patience = _PATIENCE
        for name in names:  # strict mode limits what is read and what is written
            limits = Limits(client.get_collection(name).config.strict_mode_config)
            page = limits.upserts(limits.points(page))
            self._patience = limits.seconds(self._patience)
        self._page = page

    @property
    def names(self) -> tuple[str, str]:
        """The names of both collections."""
        return self._names

    def count(self) -> int:
        """Count the source."""
        return self._count(self._names[0])

    def _count(self, name: str) -> int:
        record = self._served[name]
        key = None if record is None else record.copies_key  # not the first point of its id
        first = None if key is None else all_of(empty(key))
        return patiently(
            lambda: self._client.count(name, first, exact=True, timeout=self._patience)
        ).count

    def rows(self, *, of_copy: bool = False) -> Iterator[Row]:
        """Read all points in the order of their ids; of ids in several shards the last write."""
        offset: Any = None
        record = self._served[self._names[0]]
        if record is not None and record.places and not of_copy:
            self._of_source(record).unite_all(self._page)
        while True:
            records, offset = self._scroll(self._names[of_copy], offset)
            yield from self._rows(records)
            if offset is None:
                return

    def _scroll(self, name: str, offset: Any) -> tuple[list[models.Record], Any]:
        return patiently(
            lambda: self._client.scroll(
                name, limit=self._page, offset=offset, with_payload=True, with_vectors=True
            )
        )

    def digests(self, ids: Sequence[Id]) -> Mapping[Id, int]:
        """Read points of the copy."""
        found: dict[Id, int] = {}
        for start in range(0, len(ids), self._page):
            records = self._retrieve(as_ids(ids[start : start + self._page]))
            found |= {row.id: row.digest for row in self._rows(records)}
        return found

    def _retrieve(self, ids: list[Any]) -> list[models.Record]:
        return patiently(
            lambda: self._client.retrieve(self._names[1], ids, with_payload=True, with_vectors=True)
        )

    def _rows(self, records: Sequence[models.Record]) -> Iterator[Row]:
        for record in records:
            payload = record.payload or {}
            kept = {key: value for key, value in payload.items() if key not in self._forgotten}
            values = {"payload": kept, "vectors": self._named(record.vector)}
            yield Row(plain_id(record.id), digest(values), values)

    def _named(self, found: Any) -> dict[str, Any]:
        """Return a point's vectors by their names, in the form in which the copy keeps them."""
        named = found if isinstance(found, dict) else {} if found is None else {"": found}
        return {
            name: one.model_dump() if hasattr(one, "model_dump") else self._settled(name, one)
            for name, one in sorted(named.items())
        }

    def _settled(self, name: str, vector: Any) -> Any:
        """Normalise once more what the database might, so that both sides round alike."""
        if name not in self._normalised:
            return vector
        exact = np.atleast_2d(np.asarray(vector, dtype=np.float64))
        squared = np.square(exact).sum(axis=1, keepdims=True)
        far = (np.abs(squared - 1.0) > _NORMAL) & (squared > 0.0)
        if not far.any():
            return vector
        whole = np.where(far, exact / np.sqrt(np.where(far, squared, 1.0)), exact)
        settled = whole.astype(np.float32).astype(np.float64)
        return (settled if np.ndim(vector) > 1 else settled[0]).tolist()

    def write(self, rows: Sequence[Row], *, new: bool) -> None:
        """Write whole points into their cells."""
        beside = self._beside(rows)
        for start in range(0, len(rows), self._page):
            some = rows[start : start + self._page]
            points: list[models.PointStruct] = []
            lacking: dict[str, list[Any]] = {}
            for row, cell in zip(some, beside[start : start + self._page], strict=True):
                vectors, payload = row.values["vectors"], {**row.values["payload"], **cell}
                for name in self._vectors if not new else ():
                    if name not in vectors:
                        lacking.setdefault(name, []).append(row.id)
                # What a database has handed out has the right types.
                points.append(
                    models.PointStruct.model_construct(
                        id=row.id, vector=_as_vector(vectors), payload=payload
                    )
                )
            bare = [] if new else [point.id for point in points if not point.payload]
            if self._record is not None and self._record.places:
                self._put_in_shards(points, lacking, self._record, new=new)
            else:
                self._put(points, bare, lacking)

    def _put_in_shards(
        self,
        points: list[models.PointStruct],
        lacking: Mapping[str, list[Any]],
        record: LayoutRecord,
        *,
        new: bool,
    ) -> None:
        written = self._sharded(record)
        stored = [(point.payload or {}).get(record.key, OVERFLOW) for point in points]
        if new:
            written.write(written.puts(points, stored, stamp_now()))
            return
        for name, ids in lacking.items():
            off = models.DeleteVectors(points=ids, vector=[name], shard_key=written.keys)
            written.write([models.DeleteVectorsOperation(delete_vectors=off)])
        written.upsert(points, stored)

    def _sharded(self, record: LayoutRecord) -> ShardedPoints:
        keys = (*record.shard_keys, record.overflow_shard)
        shards = CellShards(record, keys)
        return ShardedPoints(self._client, self._names[1], shards, patiently, self._patience)

    def _of_source(self, record: LayoutRecord) -> ShardedPoints:
        name = self._names[0]
        found = patiently(lambda: self._client.list_shard_keys(name)).shard_keys or ()
        shards = CellShards(record, tuple(one.key for one in found))
        return ShardedPoints(self._client, name, shards, patiently, self._patience)

    def _put(
        self,
        points: list[models.PointStruct],
        bare: Sequence[Any],
        lacking: Mapping[str, list[Any]],
    ) -> None:
        # An indexed segment of a server before 1.19 keeps what an upsert does not name.
        operations: list[models.UpdateOperation] = []
        if bare:
            gone = models.FilterSelector(filter=all_of(among(bare)))
            operations.append(models.ClearPayloadOperation(clear_payload=gone))
        for name, ids in lacking.items():
            off = models.DeleteVectors(points=ids, vector=[name])
            operations.append(models.DeleteVectorsOperation(delete_vectors=off))
        operations.append(models.UpsertOperation(upsert=models.PointsList(points=points)))
        patiently(
            lambda: self._client.batch_update_points(
                self._names[1], operations, wait=True, timeout=self._patience
            )
        )

    def _beside(self, rows: Sequence[Row]) -> list[dict[str, int | list[int]]]:
        """Return what lies beside the vectors: cells and sketches, of those that have one."""
        beside: list[dict[str, int | list[int]]] = [{} for _ in rows]
        if self._record is None:
            return beside
        field = self._info.field
        keys = [place for place, row in enumerate(rows) if field in row.values["vectors"]]
        if not keys:
            return beside
        found = [rows[place].values["vectors"][field] for place in keys]
        vectors = np.asarray(found, dtype=np.float32)
        chosen = np.full(len(keys), OVERFLOW)
        if self._assign is not None:
            ids = [rows[place].id for place in keys]
            chosen = check_assigned(
                self._assign(ids, vectors),
                len(keys),
                self._record.n_cells,
                shared=self._record.shared,
            )
        sketches = sketch(vectors, self._info.metric)
        cells = self._record.stored(chosen)
        for place, cell, one in zip(keys, cells, sketches.tolist(), strict=True):
            beside[place] = self._record.beside(cell, one)
        return beside

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete points of the copy."""
        if self._record is not None and self._record.places:
            written = self._sharded(self._record)
            for start in range(0, len(ids), self._page):
                written.delete(as_ids(ids[start : start + self._page]))
            return
        gone = models.PointIdsList(points=as_ids(ids))
        patiently(
            lambda: self._client.delete(self._names[1], gone, wait=True, timeout=self._patience)
        )

    def problem(self, base: SourceBaseline) -> str | None:
        """Compare numbers of points, and the neighbours of a sample."""
        source, copy = self._names
        more = self._count(copy) - len(base.ids)
        if more and self._record is not None and self._record.places:
            self._sharded(self._record).unite_all(self._page)
            more = self._count(copy) - len(base.ids)
        if more:
            return f"The copy {copy!r} has {more:+} points against {source!r}"
        rng = random.Random(0)  # noqa: S311 - a sample, no secret
        ids = as_ids(rng.sample(base.ids, min(_SAMPLE, len(base.ids))))
        records = self._client.retrieve(
            source, ids, with_payload=False, with_vectors=[self._info.field]
        )
        vectors = [self._named(record.vector).get(self._info.field) for record in records]
        queries = [vector for vector in vectors if vector is not None]
        pairs = [(self._nearest(source, one), self._nearest(copy, one)) for one in queries]
        if not pairs:
            return None
        found = float(np.mean([found_again(*pair) for pair in pairs]))
        if found_enough(found, self.changed, len(base.ids)):
            return None
        return (
            f"The copy {copy!r} finds only {found:.0%} of what {source!r} finds for "
            f"{len(pairs)} sampled points"
        )

    def _nearest(self, name: str, query: list[float]) -> dict[Id, float]:
        """Return ids and scores of which larger is better."""
        answer = self._client.query_points(
            name, query, using=self._info.field or None, limit=10, timeout=self._patience
        )
        sign = 1.0 if self._info.metric.larger_is_better else -1.0
        return {plain_id(point.id): sign * point.score for point in answer.points}


def _as_vector(named: Mapping[str, Any]) -> Any:
    vectors = {
        name: models.SparseVector(**one) if isinstance(one, dict) else one
        for name, one in named.items()
    }
    return vectors.get("", vectors)
