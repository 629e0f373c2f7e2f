"""Cells in shard keys: what the steps of a layout ask of a server where a cell is a place.

To give a key a cell is to move its point. It is read, written where it belongs and then deleted
where it was, unless somebody has written it meanwhile: then what was moved is taken back.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cell_shards import CellShards, ShardKey
from amips_plugins.adapters.qdrant.cells import CelledKeys, LayoutRecord
from amips_plugins.adapters.qdrant.new_shards import create_shard_keys
from amips_plugins.adapters.qdrant.points import plain_id
from amips_plugins.adapters.qdrant.search import (
    all_of,
    among,
    empty,
    has_cell,
    has_vector,
    without_cell,
)
from amips_plugins.adapters.qdrant.sharded_points import TICKS, ShardedPoints, stamp_now
from amips_plugins.adapters.qdrant.store import ServerStore
from amips_plugins.collection import Cursor, Id
from amips_plugins.errors import require

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
    from typing_extensions import Self
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["ShardedStore"]

_MOVE_BATCH = 500  # points with all that they have
_TRIES = 3  # of a move that somebody's change of the point comes between
_UNDER_WAY = 120  # seconds that a write of somebody else may take
_UNSTAMPED = 1  # the stamp of what was moved and had none: every write of ours is newer


class ShardedStore(ServerStore):
    """The points of one vector in the shard keys of its cells (see ``CellStore``)."""

    def __init__(
        self, client: QdrantClient, name: str, field: str, server: str, shards: CellShards
    ) -> None:
        super().__init__(client, name, field, server)
        self._shards = shards

    @property
    def _points(self) -> ShardedPoints:
        return ShardedPoints(
            self._client,
            self._name,
            self._shards,
            lambda call: self._ask(call, "write to"),
            self._patience,
        )

    def parts(self) -> list[ServerStore]:
        """Return the store of the overflow's shard key, and of each of the cells'."""
        ours = [self._shards.record.overflow_shard, *self._shards.record.shard_keys]
        there = {*self._shards.there}
        return [self._within([key]) for key in ours if key in there]

    def _within(self, keys: Sequence[ShardKey]) -> Self:
        part = copy.copy(self)
        part._shard_key = keys[0] if len(keys) == 1 else list(keys)
        return part

    def mend(self) -> bool:
        """Make shard keys again that somebody has dropped; tell whether there were any.

        Also the indexes that writes take where strict mode was set later.
        """
        record, missing = self._shards.record, self._shards.missing
        if missing:
            create_shard_keys(self._client, self._name, record)
        for key in filter(None, (record.stamp_key, record.copies_key)):
            if self._lacks_index(key):
                self._index_integers(key)
        return bool(missing)

    def _index_integers(self, key: str) -> None:
        kind = models.PayloadSchemaType.INTEGER
        self._ask(
            lambda: self._client.create_payload_index(
                self._name, key, kind, wait=True, timeout=self._patience
            ),
            "write to",
        )

    def overflow(self, record: LayoutRecord) -> int:
        """Count the points without a cell, and those that are in no cell's shard key."""
        others = self._shards.others
        cells = [key for key in self._shards.there if key not in others]
        outside = self._within(others).count() if others else 0
        return outside + (self._within(cells).count(without_cell(record)) if cells else 0)

    def count(self, *conditions: models.Condition) -> int:
        """Count exactly, each key once."""
        key = self._shards.record.copies_key
        return super().count(*([empty(key)] if key else []), *conditions)

    def without_cell(self, record: LayoutRecord) -> Iterator[Sequence[Id]]:
        """Go once through the points that are not in the shard key of their cell."""
        return self._pages(all_of(has_vector(self._field), *self._misplaced(record)))

    def _misplaced(self, record: LayoutRecord) -> list[models.Condition]:
        if self._shard_key == record.overflow_shard:
            return []
        return [models.Filter(must_not=[has_cell(record.key, record.cells_of(self._shard_key))])]

    def claim(self, record: LayoutRecord, ids: Sequence[Id], claim: int) -> None:
        """Write the claim over whatever is no cell of this shard key."""
        condition = all_of(among(ids), has_vector(self._field), *self._misplaced(record))
        self._set([(record.beside(claim, 0), condition)])

    def place(
        self,
        record: LayoutRecord,
        ids: Sequence[Id],
        cells: Sequence[int | list[int]],
        sketches: Sequence[int],
        claim: int,
    ) -> None:
        """Move the points whose claim still stands into the shard keys of their cells."""
        beside = {
            one: (cell, sketch) for one, cell, sketch in zip(ids, cells, sketches, strict=True)
        }
        size = self._limits.points(_MOVE_BATCH)
        for start in range(0, len(ids), size):
            left = ids[start : start + size]
            for _ in range(_TRIES):
                left = self._move(record, left, beside, claim)
                if not left:
                    break

    def _move(
        self,
        record: LayoutRecord,
        ids: Sequence[Id],
        beside: Mapping[Id, tuple[int | list[int], int]],
        claim: int,
    ) -> Sequence[Id]:
        """Move them but for those that somebody changes meanwhile, which are returned."""
        points, here, began = self._points, [self._shard_key], stamp_now()
        twins = points.elsewhere(ids, here)
        if twins:
            points.unite(twins)
        standing = has_cell(record.key, [claim])
        claimed = all_of(among(ids), standing)
        moved: dict[Id, int] = {}
        rows, cells = [], []
        before = self._whole(points, claimed, len(ids))
        for key, one in before.items():
            payload = {**(one.payload or {})}
            moved[key] = payload.setdefault(record.stamp_key, _UNSTAMPED)
            cell, sketch = beside[key]
            payload |= record.beside(cell, sketch)
            rows.append(
                models.PointStruct.model_construct(id=one.id, vector=one.vector, payload=payload)
            )
            cells.append(cell)
        if not moved:
            return ()
        points.write(points.puts(rows, cells, None, but=self._shard_key))
        after = self._whole(points, claimed, len(ids))
        kept = {key for key, one in after.items() if _same(one, before.get(key))}
        undone = []
        for key, stamp in moved.items():
            homes = record.homes(beside[key][0]) if key in kept else []
            # A copy may be in a cell where the key belongs no longer.
            if key not in kept or record.shared:
                others = [one for one in self._shards.ours if one not in (*here, *homes)]
                undone.append(points.deletion([key], others, _stamped(record.stamp_key, stamp)))
        points.write(undone)
        stay = [key for key in kept if self._shard_key in record.homes(beside[key][0])]
        super().place(
            record, stay, [beside[key][0] for key in stay], [beside[key][1] for key in stay], claim
        )
        points.write([points.deletion(kept, here, standing)])
        # Whoever wrote meanwhile has the last word.
        gone = [key for key in moved if key not in stay]
        rewritten = points.read(all_of(among(gone)), here, len(gone), ()) if gone else []
        recent = points.written_since(list(moved), began - _UNDER_WAY * TICKS)
        points.unite([*{*(plain_id(one.id) for one in rewritten), *recent}])
        return [key for key in after if key in before and key not in kept]

    def _whole(
        self, points: ShardedPoints, condition: models.Filter, limit: int
    ) -> dict[Id, models.Record]:
        found = points.read(condition, [self._shard_key], limit, payload=True, vectors=True)
        return {plain_id(one.id): one for one in found}

    def displace(self, record: LayoutRecord, ids: Sequence[Id]) -> None:
        """Move these points into the overflow's shard key."""
        if self._shard_key == record.overflow_shard or not ids:
            return
        claim = -2 - secrets.randbelow(2**31 - 2)
        self._set([(record.beside(claim, 0), all_of(among(ids)))])
        self.place(record, ids, [OVERFLOW] * len(ids), [0] * len(ids), claim)

    def displace_all(self, record: LayoutRecord, ids: Sequence[Id]) -> None:
        """Move these points there, wherever they are."""
        points = self._points
        points.unite(points.elsewhere(ids, [record.overflow_shard]))
        for key, there in points.places(ids).items():
            if key in self._shards.ours:
                self._within([key]).displace(record, there)

    def celled(self, record: LayoutRecord, after: Cursor | None) -> Iterator[CelledKeys]:
        """Read all points in the order of their ids; of ids in several shards the last write."""
        for found in super().celled(record, after):
            twins = self._points.elsewhere(found.keys.ids, [self._shard_key])
            if twins:
                self._points.unite(twins)
            yield found


def _same(one: models.Record, other: models.Record | None) -> bool:
    return other is not None and (one.payload, one.vector) == (other.payload, other.vector)


def _stamped(key: str, stamp: int) -> models.Condition:
    return models.FieldCondition(key=key, match=models.MatchValue(value=stamp))
