"""Writes through a Qdrant client where cells have shard keys, without which a server refuses them.

What is written goes to the overflow's shard key, and then older points of the ids go everywhere
else; what changes or deletes points is told to all shard keys, twice, since a point may be moving
from one to another. A write on a condition needs the points themselves where it goes, so these are
moved there before. Whoever names a shard key himself is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.cell_shards import CellShards, ShardKey
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.sharded_points import stamp_now
from amips_plugins.errors import require
from amips_plugins.routing.router import LearnedRouter

if TYPE_CHECKING:
    from qdrant_client import models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["Beside", "InShards", "ShardedWrite", "conditional", "everywhere", "in_shards"]

_AHEAD = 64  # points that an upload on a condition looks ahead: the client's own portion

_CHANGES = (
    "delete",
    "set_payload",
    "overwrite_payload",
    "delete_payload",
    "clear_payload",
    "delete_vectors",
)


class Beside(dict[str, int]):
    """What every point gets beside its payload."""


@dataclass(frozen=True, slots=True)
class InShards:
    """A router's collection whose cells have shard keys, and these."""

    collection: QdrantCollection
    shards: CellShards


def in_shards(router: LearnedRouter | None) -> InShards | None:
    """Return the collection of a router if its cells have shard keys."""
    collection = None if router is None else router.collection
    if not isinstance(collection, QdrantCollection) or collection.partitions is not None:
        return None
    return None if collection.cell_shards is None else InShards(collection, collection.cell_shards)


@dataclass
class ShardedWrite:
    """One write of points: its stamp, and the ids that it has written so far.

    Of one on a condition only the server knows what it has written.
    """

    found: InShards
    conditional: bool = False
    stamp: int = field(default_factory=stamp_now)
    ids: list[Any] = field(default_factory=list)

    @property
    def beside(self) -> Beside:
        """What lies beside a point that is written without a cell."""
        record = self.found.shards.record
        return Beside({record.key: -1, record.stamp_key: self.stamp})

    @property
    def selector(self) -> ShardKey:
        """Where it is written."""
        return self.found.shards.record.overflow_shard

    def look(self, points: Any) -> None:
        """Prepare for points that are there already, not lazy ones."""
        ids = _named_in(points)
        if self.conditional:
            self.found.collection.displace(ids)
        if ids:
            self.newer_than(ids)

    def newer_than(self, ids: Sequence[Any]) -> None:
        """Take a stamp that is newer than these ids have, whatever the clock of their writer."""
        with suppress(Exception):  # what is wrong the client's own call says
            self.stamp = self.found.collection.stamp_for(ids)

    def noting(self, points: Any) -> Any:
        """Return points as they were given, and note their ids, of lazy ones as they come."""
        if isinstance(points, list | models.Batch | models.PointsList):
            self.ids += _named_in(points)
        elif isinstance(points, Iterable) and not isinstance(points, str):
            return self._each(points, _ids)
        return points

    def noting_ids(self, ids: Iterable[Any]) -> Iterator[Any]:
        """Pass ids on, and note them."""
        return self._each(ids, list)

    def _each(self, given: Iterable[Any], ids: Callable[[list[Any]], list[Any]]) -> Iterator[Any]:
        left = iter(given)
        while some := list(islice(left, _AHEAD if self.conditional else 1)):
            if self.conditional:
                self.found.collection.displace(ids(some))
            self.ids += ids(some)
            yield from some

    def displaced(self, operations: Sequence[Any]) -> list[Any]:
        """Return the ids whose points a batch of operations needs where it writes."""
        found = []
        for one in operations:
            asked = getattr(one, "update_vectors", None)
            if asked is not None and asked.shard_key is None:
                found += [point.id for point in asked.points]
            asked = _upsert(one)
            if asked is not None and conditional(asked.__dict__):
                found += _named_in(getattr(asked, "batch", asked))
        return found

    def upserted(self, operations: Sequence[Any]) -> list[Any]:
        """Return the ids that a batch of operations writes whatever is there."""
        asked = [one for one in map(_upsert, operations) if one is not None]
        plain = [one for one in asked if not conditional(one.__dict__)]
        return [key for one in plain for key in _named_in(getattr(one, "batch", one))]

    def told(self, operation: Any) -> Any:
        """Return one operation of a batch with the shard keys it has to do with."""
        for name in ("upsert", "update_vectors"):
            asked = getattr(operation, name, None)
            if asked is not None and asked.shard_key is None:
                if name == "upsert" and not conditional(asked.__dict__):
                    self.noting(getattr(asked, "batch", asked))
                changed = asked.model_copy(update={"shard_key": self.selector})
                return operation.model_copy(update={name: changed})
        return _told_to_all(operation, self.found.shards)

    def finish(self) -> None:
        """Delete what older writes have left of the ids."""
        if self.ids:
            self.found.collection.tidy_shards(self.ids, self.stamp, check=self.conditional)


def conditional(given: Mapping[str, Any]) -> bool:
    """Tell whether a write goes by what is there of its points."""
    mode = given.get("update_mode")
    return given.get("update_filter") is not None or mode not in (None, models.UpdateMode.UPSERT)


def everywhere(given: dict[str, Any], shards: CellShards) -> dict[str, Any]:
    """Return arguments that tell all shard keys; ids become a filter, which misses none."""
    changed = {**given, "shard_key_selector": list(shards.there)}
    for name in ("points", "points_selector"):
        found = changed.get(name)
        if isinstance(found, (list, tuple, models.PointIdsList)):
            ids = found.points if isinstance(found, models.PointIdsList) else found
            changed[name] = models.FilterSelector(filter=_among(ids))
    return changed


def _told_to_all(operation: Any, shards: CellShards) -> Any:
    keys: Any = list(shards.there)
    for name in _CHANGES:
        asked = getattr(operation, name, None)
        if asked is None or asked.shard_key is not None:
            continue
        ids = getattr(asked, "points", None)
        if isinstance(asked, models.PointIdsList):
            changed: Any = models.FilterSelector(filter=_among(asked.points), shard_key=keys)
        elif ids is not None:
            update = {"points": None, "filter": _among(ids), "shard_key": keys}
            changed = asked.model_copy(update=update)
        else:
            changed = asked.model_copy(update={"shard_key": keys})
        return operation.model_copy(update={name: changed})
    return operation


def _among(ids: Iterable[Any]) -> models.Filter:
    return models.Filter(must=[models.HasIdCondition(has_id=list(ids))])


def _upsert(operation: Any) -> Any:
    asked = getattr(operation, "upsert", None)
    return None if asked is None or asked.shard_key is not None else asked


def _named_in(points: Any) -> list[Any]:
    if isinstance(points, models.Batch):
        return list(points.ids)
    points = points.points if isinstance(points, models.PointsList) else points
    return _ids(points) if isinstance(points, list) else []


def _ids(points: Iterable[Any]) -> list[Any]:
    found = []
    for point in points:
        named: Any = getattr(point, "id", None)
        if hasattr(named, "uuid"):  # a message of gRPC
            named = named.uuid or named.num
        if named is not None:
            found.append(named)
    return found
