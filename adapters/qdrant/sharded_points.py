"""Points of a layout in shard keys, written so that an id is in the shards of its last write only.

An id is unique within a shard key alone, and no write reaches two of them at once. So every point
carries the stamp of its write, and whoever has written takes away what is older, and itself where
it meets something newer: whatever the order in which two writers come through, the newer write is
left, and it alone. A point without a stamp was written by somebody else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from amips_plugins.adapters.qdrant.cell_shards import CellShards, ShardKey
from amips_plugins.adapters.qdrant.points import as_ids, plain_id
from amips_plugins.adapters.qdrant.search import all_of, among
from amips_plugins.collection import Id
from amips_plugins.errors import require

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["TICKS", "ShardedPoints", "older_than", "stamp_now"]

T = TypeVar("T")

TICKS = 2**18
"""Stamps a second: few enough that a server, which reads ranges as decimal fractions and rounds
those of more than 53 bits, does not mistake one for its neighbour."""


_APART = TICKS // 64


def stamp_now() -> int:
    """Return a stamp for a write that begins now."""
    return int(time.time() * TICKS)


def older_than(stamp_key: str, stamp: int) -> models.Filter:
    """Points of an earlier write, or of somebody who writes no stamps."""
    newer = models.FieldCondition(key=stamp_key, range=models.Range(gte=stamp - 0.5))
    return models.Filter(must_not=[newer])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a point of an id is, and what its payload says of it."""

    stamp: float
    inside: bool  # of a cell's shard key
    shard: ShardKey
    cells: Any


@dataclass(frozen=True)
class ShardedPoints:
    """Writes points of one collection; ``ask`` makes the calls."""

    client: QdrantClient
    name: str
    shards: CellShards
    ask: Callable[[Callable[[], Any]], Any]
    patience: int

    @property
    def keys(self) -> list[ShardKey]:
        """All shard keys that there are."""
        return list(self.shards.there)

    def stamp(self, ids: Sequence[Id]) -> int:
        """Return a stamp that is newer than all that these ids have."""
        stamp = stamp_now()
        while found := self._newer(ids, stamp):
            # Of two who look at once neither may take the other's.
            stamp = max(found.values()) + 1 + secrets.randbelow(_APART)
        return stamp

    def upsert(
        self, points: Sequence[models.PointStruct], stored: Sequence[int | list[int]]
    ) -> None:
        """Write points into the shards of their cells, in place of what is there of their ids."""
        ids = as_ids([plain_id(point.id) for point in points])
        stamp = self.stamp(ids)
        gone = self.deletion(ids, self.keys, self._older(stamp))
        self.write([*self.puts(points, stored, stamp), gone])
        self.yield_to_newer(ids, stamp)

    def tidy(self, ids: Sequence[Id], stamp: int) -> None:
        """Do what ``upsert`` does behind its writing, for who has written himself."""
        self.write([self.deletion(ids, self.keys, self._older(stamp))])
        self.yield_to_newer(ids, stamp)

    def puts(
        self,
        points: Sequence[models.PointStruct],
        stored: Sequence[int | list[int]],
        stamp: int | None,
        but: ShardKey | None = None,
    ) -> list[models.UpdateOperation]:
        """Return what puts points into the shards of their cells, ``but`` one.

        Without a ``stamp`` they keep those that they have.
        """
        record = self.shards.record
        by_shard: dict[str, list[models.PointStruct]] = {}
        for point, cells in zip(points, stored, strict=True):
            payload = {**(point.payload or {})}
            payload.pop(record.copy_key, None)
            if stamp is not None:
                payload[record.stamp_key] = stamp
            for number, home in enumerate(record.homes(cells)):
                more = {record.copy_key: 1} if number else {}
                by_shard.setdefault(home, []).append(
                    models.PointStruct.model_construct(
                        id=point.id, vector=point.vector, payload={**payload, **more}
                    )
                )
        return [
            models.UpsertOperation(upsert=models.PointsList(points=some, shard_key=home))
            for home, some in by_shard.items()
            if home != but
        ]

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete ids wherever they are.

        Twice: a move that has read a point before it went, and written it behind the first round,
        is met by the second, or sees that the point it came from is gone.
        """
        gone = self.deletion(ids, self.keys)
        self.write([gone])
        self.write([gone])

    def deletion(
        self, ids: Iterable[Id], keys: Sequence[ShardKey], *conditions: models.Condition
    ) -> models.UpdateOperation:
        """Return what deletes those of the ids in these shard keys that meet the conditions."""
        where = models.FilterSelector(filter=all_of(among([*ids]), *conditions), shard_key=[*keys])
        return models.DeleteOperation(delete=where)

    def yield_to_newer(self, ids: Sequence[Id], stamp: int) -> None:
        """Take away what was written with this stamp where a newer write of the id is there."""
        found = self._newer(ids, stamp + 1)
        self.write(
            [self.deletion([one], self.keys, self._older(newest)) for one, newest in found.items()]
        )

    def unite(self, ids: Sequence[Id]) -> None:
        """Of ids that are in several shards of the layout keep the last write.

        A point without a stamp counts as newer than one with: somebody else wrote it last.
        """
        record, inside = self.shards.record, {*self.shards.record.shard_keys}
        found: dict[Id, list[_Place]] = {}
        for key in self.shards.ours if ids else ():
            for one in self.read(all_of(among(ids)), [key], len(ids), [*record.keys]):
                payload = one.payload or {}
                stamp = payload.get(record.stamp_key)
                when = float(stamp) if isinstance(stamp, int) else float("inf")
                place = _Place(when, key in inside, key, payload.get(record.key))
                found.setdefault(plain_id(one.id), []).append(place)
        operations = []
        for one_id, places in found.items():
            last = max(places, key=lambda place: (place.stamp, place.inside))
            kept: set[ShardKey] = {last.shard}
            if isinstance(last.cells, list) and record.own_cell(last.cells) is not None:
                kept = {*record.homes(last.cells)}  # the further cells of the same write
            gone = [
                place.shard
                for place in places
                if place.shard not in kept or place.stamp < last.stamp
            ]
            if gone:
                operations.append(self.deletion([one_id], gone))
        self.write(operations)

    def unite_all(self, page: int) -> None:
        """Look for ids in several shards, which a write of a process that was killed may leave."""
        seen: set[Id] = set()
        twins: set[Id] = set()
        for key in self.shards.ours:
            offset: Any = None
            while True:
                records, offset = self.ask(
                    lambda key=key, offset=offset: self.client.scroll(  # type: ignore[misc]
                        self.name,
                        limit=page,
                        offset=offset,
                        with_payload=False,
                        shard_key_selector=key,
                        timeout=self.patience,
                    )
                )
                ids = {plain_id(record.id) for record in records}
                twins |= seen & ids
                seen |= ids
                if offset is None:
                    break
        found = list(twins)
        for start in range(0, len(found), page):
            self.unite(found[start : start + page])

    def elsewhere(self, ids: Sequence[Id], keys: Sequence[ShardKey]) -> list[Id]:
        """Return those of the ids that are in other shard keys of the layout than these."""
        others = [key for key in self.shards.ours if key not in keys]
        if not others or not ids:
            return []
        found = self.read(all_of(among(ids)), others, len(ids), ())
        return [plain_id(one.id) for one in found]

    def places(self, ids: Sequence[Id]) -> dict[ShardKey, list[Id]]:
        """Return the shard keys in which these ids are; of one in several, one."""
        found: dict[ShardKey, list[Id]] = {}
        for one in self.read(all_of(among(ids)), self.keys, len(ids), ()) if ids else ():
            found.setdefault(one.shard_key, []).append(plain_id(one.id))  # type: ignore[arg-type]
        return found

    def read(
        self,
        condition: models.Filter,
        keys: Sequence[ShardKey],
        limit: int,
        payload: Sequence[str] | bool,
        *,
        vectors: bool = False,
    ) -> list[models.Record]:
        """Read points that meet a condition, each id once, in the order of the ids."""
        records, _ = self.ask(
            lambda: self.client.scroll(
                self.name,
                condition,
                limit=limit,
                with_payload=payload if isinstance(payload, bool) else list(payload) or False,
                with_vectors=vectors,
                shard_key_selector=[*keys],
                timeout=self.patience,
            )
        )
        found: list[models.Record] = records
        return found

    def write(self, operations: Sequence[models.UpdateOperation]) -> None:
        """Do these one after the other."""
        if operations:
            self.ask(
                lambda: self.client.batch_update_points(
                    self.name, operations, wait=True, timeout=self.patience
                )
            )

    def written_since(self, ids: Sequence[Id], stamp: int) -> list[Id]:
        """Return those of the ids that a write with at least this stamp is there of."""
        return list(self._newer(ids, stamp))

    def _newer(self, ids: Sequence[Id], stamp: int) -> Mapping[Id, int]:
        """Return the stamps of those of the ids that have one of at least this."""
        key, found = self.shards.record.stamp_key, {}
        newer = models.FieldCondition(key=key, range=models.Range(gte=stamp - 0.5))
        for one in self.read(all_of(among(ids), newer), self.keys, max(1, len(ids)), [key]):
            found[plain_id(one.id)] = int((one.payload or {})[key])
        return found

    def _older(self, stamp: int) -> models.Filter:
        return older_than(self.shards.record.stamp_key, stamp)
