"""Cells in a Qdrant Edge shard: what the steps of a layout ask of it."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cells import CelledKeys, LayoutRecord
from amips_plugins.adapters.qdrant.points import celled_keys, key_batch, plain_id
from amips_plugins.adapters.qdrant_edge.filters import (
    Outside,
    among,
    empty,
    exactly,
    no_cell,
    unplaced,
    without_cell,
)
from amips_plugins.adapters.qdrant_edge.shard import OpenShard
from amips_plugins.collection import Cursor, Id, KeyBatch
from amips_plugins.errors import require
from amips_plugins.partitions import Partitions, Value

if TYPE_CHECKING:
    import qdrant_edge as edge
else:
    edge = require("qdrant_edge", "qdrant-edge")

__all__ = ["EdgeStore"]

_READ_BATCH = 1000  # keys with their vectors
_WRITE_BATCH = 20_000  # ids


class EdgeStore:
    """The points of one vector of a shard (see ``CellStore``)."""

    seconds_per_write = 2e-4  # with the rebuild of the segments

    def __init__(self, shard: OpenShard, field: str) -> None:
        self._shard = shard
        self._field = field
        self._has_vector = edge.HasVectorCondition(field)
        self._scattered = False

    def parts(self) -> list[EdgeStore]:
        """Return itself: a shard owns its ids."""
        return [self]

    def metadata(self) -> Mapping[str, Any]:
        """Read the file beside the shard."""
        return self._shard.metadata()

    def write_metadata(self, changes: Mapping[str, Any]) -> None:
        """Replace these entries, on the disk and in one step.

        First the segments are rebuilt: writing cells has moved all points into one that has
        neither HNSW nor the points of a cell together.
        """
        if self._scattered:
            self._shard.optimize()
            self._scattered = False
        self._shard.write_metadata(changes)

    def check(self, record: LayoutRecord) -> None:
        """Do nothing: the engine refuses no cells."""

    def notes(self) -> tuple[str, ...]:
        """Say that the process stands still at the end."""
        return (
            "at the end the engine rebuilds its segments, about 15 seconds for 100,000 keys of "
            "dimension 128; all Python threads of this process wait meanwhile",
        )

    def free_bytes(self) -> int:
        """Return how many bytes the folder's disk has left."""
        return shutil.disk_usage(self._shard.folder).free

    def count(self, *conditions: edge.ConditionType) -> int:
        """Count exactly the points that have the vector and meet the conditions."""
        whole = edge.Filter(must=[self._has_vector, *conditions])
        return self._shard.engine.count(edge.CountRequest(exact=True, filter=whole))

    def count_values(self, key: str, values: Sequence[Value], *, others: bool = False) -> int:
        """Count the points with one of these values under a payload key; or all ``others``."""
        here = exactly(key, values)
        return self.count(edge.Filter(must_not=[here]) if others else here)

    def scroll(
        self, batch_size: int, after: Cursor | None = None, payload: Sequence[str] = ()
    ) -> Iterator[tuple[KeyBatch, Sequence[edge.Record]]]:
        """Read the points that have the vector, in the order of the ids."""
        for records in self._pages(batch_size, after=after, payload=payload):
            batch = key_batch(records, self._field)
            if batch is not None:
                yield batch, records

    def retrieve(self, ids: Sequence[Id]) -> KeyBatch | None:
        """Read those of the points that are there."""
        records = self._shard.engine.retrieve(list(ids), False, [self._field])
        return key_batch(records, self._field)

    def taken(self, key: str) -> bool:
        """Tell whether a point has anything under the key."""
        return self.count(edge.Filter(must_not=[edge.IsEmptyCondition(key)])) > 0

    def overflow(self, record: LayoutRecord) -> int:
        """Count the points without a cell."""
        return self.count(without_cell(record))

    def create_index(self, key: str) -> None:
        """Index the integers under the key; points of one cell will lie together."""
        params = edge.IntegerIndexParams(
            lookup=True, range=True, is_principal=True, enable_hnsw=False
        )
        self._shard.update(edge.UpdateOperation.create_field_index(key, params))
        self._scattered = True  # by this build, or by one that was killed

    def drop_index(self, key: str) -> None:
        """Drop the index of the key, if there is one."""
        self._shard.update(edge.UpdateOperation.delete_field_index(key))

    def remove_cells(self, record: LayoutRecord) -> None:
        """Remove both keys from every point, and the shards of the cells."""
        there = edge.Filter(must_not=[edge.IsEmptyCondition(record.key)])
        self._shard.update(edge.UpdateOperation.delete_payload_by_filter(there, record.keys))
        if record.places:
            self._shard.drop_graphs(record)
        self._scattered = True

    def without_cell(self, record: LayoutRecord) -> Iterator[Sequence[Id]]:
        """Go once through the points without a cell."""
        for records in self._pages(_WRITE_BATCH, unplaced(record), vectors=False):
            yield [plain_id(one.id) for one in records]

    def claim(self, record: LayoutRecord, ids: Sequence[Id], claim: int) -> None:
        """Write the claim over whatever is no cell."""
        self._set(record.beside(claim, 0), ids, unplaced(record))

    def claimed(self, record: LayoutRecord, ids: Sequence[Id], claim: int) -> Iterator[KeyBatch]:
        """Read those of the points that have the claim."""
        for start in range(0, len(ids), _READ_BATCH):
            some = ids[start : start + _READ_BATCH]
            standing = exactly(record.key, [claim])
            for records in self._pages(_READ_BATCH, among(some), standing):
                batch = key_batch(records, self._field)
                if batch is not None:
                    yield batch

    def place(
        self,
        record: LayoutRecord,
        ids: Sequence[Id],
        cells: Sequence[int | list[int]],
        sketches: Sequence[int],
        claim: int,
    ) -> None:
        """Write the cells of those of the points that still have the claim."""
        with self._shard.writing:
            if record.places:
                stored = dict(zip(ids, zip(cells, sketches, strict=True), strict=True))
                homes = self._copy(record, stored, claim)
                names = self._shard.graphs(record, self._field).names()
                self._leave(record, dict.fromkeys(homes, names), homes)
            standing = exactly(record.key, [claim])
            for key, cell, one in zip(ids, cells, sketches, strict=True):
                self._set(record.beside(cell, one), [key], standing)

    def begin(
        self, record: LayoutRecord | None, ids: Sequence[Id], written: Sequence[dict[str, Any]]
    ) -> Callable[[], None]:
        """Prepare to write points, or to delete those of which nothing is ``written``.

        Where cells have shards, what is written are points without a cell first; what is returned
        is to be called afterwards, puts them into the shards and gives them their cells.
        """
        if record is None or not record.places:
            return lambda: None
        before, claim = self._homes(record, ids), -2 - secrets.randbelow(2**31 - 2)
        stored: dict[Id, tuple[int | list[int], int]] = {}
        for key, payload in zip(ids, written, strict=False):
            if payload[record.key] != OVERFLOW:
                stored[key] = payload[record.key], payload[record.sketch_key]
                payload[record.key] = claim

        def placing() -> None:
            homes = self._copy(record, stored, claim) if stored else {}
            self._leave(record, before, homes)
            standing = exactly(record.key, [claim])
            for key, (cell, one) in stored.items():
                self._set(record.beside(cell, one), [key], standing)

        return placing

    def _copy(
        self,
        record: LayoutRecord,
        stored: Mapping[Id, tuple[int | list[int], int]],
        claim: int,
    ) -> dict[Id, list[str]]:
        """Write claimed points into the shards of their cells, and return these."""
        graphs = self._shard.graphs(record, self._field)
        found: dict[Id, list[str]] = {}
        for batch in self.claimed(record, list(stored), claim):
            homes = [record.homes(stored[key][0]) for key in batch.ids]
            sketches = [stored[key][1] for key in batch.ids]
            graphs.put(batch.ids, batch.vectors.tolist(), sketches, homes)
            found.update(zip(batch.ids, homes, strict=True))
        return found

    def _homes(self, record: LayoutRecord, ids: Sequence[Id]) -> dict[Id, list[str]]:
        """Return the shards of the cells that points have."""
        records = self._shard.engine.retrieve(list(ids), [record.key], False)
        cells: dict[Id, Any] = {
            plain_id(one.id): (one.payload or {}).get(record.key) for one in records
        }
        return {
            key: record.homes(cell)
            for key, cell in cells.items()
            if record.own_cell(cell) is not None
        }

    def _leave(
        self,
        record: LayoutRecord,
        before: Mapping[Id, Sequence[str]],
        homes: Mapping[Id, Sequence[str]],
    ) -> None:
        """Take points out of the shards where they were, but for their homes now."""
        gone: dict[str, list[Id]] = {}
        for key, names in before.items():
            for name in {*names} - {*homes.get(key, ())}:
                gone.setdefault(name, []).append(key)
        graphs = self._shard.graphs(record, self._field)
        for name, ids in gone.items():
            graphs.remove(ids, [name])

    def mend(self, record: LayoutRecord) -> None:
        """Compare the shards of cells with the points that are to be in them.

        Points that a power failure has left out lose their cells, so that a backfill writes them
        again; what belongs to no point is removed.
        """
        if not record.places:
            return
        graphs = self._shard.graphs(record, self._field)
        for name in record.shard_keys:
            there = graphs.sketches(name)
            missing: list[Id] = []
            with self._shard.writing:
                here = exactly(record.key, record.cells_of(name))
                for records in self._pages(
                    _WRITE_BATCH, here, payload=[record.sketch_key], vectors=False
                ):
                    for one in records:
                        key = plain_id(one.id)
                        # A sketch of None is none that we have written.
                        known = (one.payload or {}).get(record.sketch_key)
                        if key not in there or there.pop(key) != known:
                            missing.append(key)
                if missing:
                    self.displace(record, missing)
                graphs.remove(list(there), [name])

    def sample(self, record: LayoutRecord, n: int) -> CelledKeys | None:
        """Let the engine draw points."""
        drawn = self._shard.engine.query(
            edge.QueryRequest(
                n,
                query=edge.Sample.Random,
                with_payload=record.keys,
                with_vector=[self._field],
            )
        )
        return celled_keys(drawn, self._field, record)

    def celled(self, record: LayoutRecord, after: Cursor | None) -> Iterator[CelledKeys]:
        """Read all points in the order of their ids, behind a cursor."""
        for records in self._pages(_READ_BATCH, after=after, payload=record.keys):
            found = celled_keys(records, self._field, record)
            if found is not None:
                yield found

    def displace(self, record: LayoutRecord, ids: Sequence[Id]) -> None:
        """Write that these points have no cell."""
        with self._shard.writing:
            before = self._homes(record, ids) if record.places else {}
            self._set(record.beside(OVERFLOW, 0), ids, self._has_vector)
            if before:
                self._leave(record, before, {})

    def _set(
        self, payload: dict[str, int | list[int]], ids: Sequence[Id], where: edge.ConditionType
    ) -> None:
        whole = edge.Filter(must=[among(ids), where])
        write = edge.UpdateOperation.set_payload_by_filter(whole, payload)
        self._shard.update(write, len(ids))

    def _pages(
        self,
        batch_size: int,
        *conditions: edge.ConditionType,
        after: Cursor | None = None,
        payload: Sequence[str] = (),
        vectors: bool = True,
    ) -> Iterator[list[edge.Record]]:
        offset: Any = after
        while True:
            request = edge.ScrollRequest(
                offset=offset,
                limit=batch_size,
                filter=edge.Filter(must=[self._has_vector, *conditions]),
                with_payload=list(payload) or False,
                with_vector=[self._field] if vectors else False,
            )
            records, offset = self._shard.engine.scroll(request)
            # The offset is inclusive: on going on, the first record is the cursor's own.
            records = [one for one in records if plain_id(one.id) != after]
            if records:
                yield records
            if offset is None:
                return

    def outside(self, record: LayoutRecord | Partitions) -> Outside:
        """Tell what the points that are in no cell may be, by what the index knows.

        To count them takes a look at every point, as long as scanning a tenth of the vectors.
        """
        info = self._shard.engine.info()
        index = info.payload_schema.get(record.key)
        if index is None:
            return Outside.ANYTHING
        here = index.points == info.points_count
        if isinstance(record, Partitions):
            return Outside.NOBODY if here and self._only(record) else Outside.ANYTHING
        if index.data_type != edge.PayloadSchemaType.Integer:
            return Outside.ANYTHING  # one that somebody has made lists other things
        if here and not self._number(*no_cell(record)):
            return Outside.NOBODY
        listed = here or index.points + self._number(empty(record.key)) == info.points_count
        return Outside.LISTED if listed else Outside.ANYTHING

    def _number(self, *alternatives: edge.ConditionType) -> int:
        """Count the points, keys or not, that meet one of these conditions."""
        either = edge.Filter(should=[*alternatives])
        return self._shard.engine.count(edge.CountRequest(exact=True, filter=either))

    def _only(self, given: Partitions) -> bool:
        """Tell whether the index knows of no other values."""
        values = edge.FacetRequest(given.key, limit=len(given.values) + 1)
        try:
            found = self._shard.engine.facet(values)
        except Exception:  # noqa: BLE001 - the engine knows no other class; an index without lookup
            return False
        return {one.value for one in found} <= {*given.values}
