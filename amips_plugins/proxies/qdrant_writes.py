"""Writes through a Qdrant client: a point that gets another vector is in no cell from then on.

What was read through another client brings its cell back with another vector, and servers before
1.19 keep the payload of a point that is upserted without one. ``amips backfill`` gives such points
a cell again; until then every search looks at them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cells import cell_key
from amips_plugins.errors import require
from amips_plugins.proxies.calls import Call, RoutedCollection
from amips_plugins.proxies.client import Change, Method, changing
from amips_plugins.proxies.qdrant_shards import (
    Beside,
    InShards,
    ShardedWrite,
    conditional,
    everywhere,
    in_shards,
)
from amips_plugins.proxies.records import of_others, of_ours
from amips_plugins.routing.effects import Effects, InThread

if TYPE_CHECKING:
    from qdrant_client import models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["writes"]

_NoCell = Mapping[str, int]
_WRITE = " amips"  # among a call's arguments: what is left to do after it,
_AGAIN = " amips again"  # and the arguments to call it with once more


def writes(routed: RoutedCollection) -> dict[str, Method]:
    """Return the proxy's methods that write points."""

    def no_cell(client: Any, plain: Call, name: Any) -> Effects[tuple[_NoCell, str | None]]:
        """Return what says that a point has no cell, and the vector that this is about."""
        # The uploads of an asynchronous client are no coroutines, and cannot wait for a look.
        can_wait = iscoroutinefunction(plain.method) or not iscoroutinefunction(client.get_aliases)
        look = can_wait and routed.router is not None
        router = yield from routed.of(str(name), look=look)
        layout = None if router is None else router.collection.layout()
        if router is None or layout is None or router.collection.partitions is not None:
            return {}, None
        return {cell_key(layout): OVERFLOW}, router.collection.info.field

    def sharded(client: Any, plain: Call, given: dict[str, Any]) -> Effects[InShards | None]:
        """Return where cells have shard keys, unless the caller names some himself."""
        if given.get("shard_key_selector") is not None:
            return None
        can_wait = iscoroutinefunction(plain.method) or not iscoroutinefunction(client.get_aliases)
        name = str(given["collection_name"])
        return in_shards((yield from routed.of(name, look=can_wait and routed.router is not None)))

    def points(client: Any, plain: Call, given: dict[str, Any]) -> Effects[dict[str, Any]]:
        found = yield from sharded(client, plain, given)
        if found is not None:
            write = given[_WRITE] = ShardedWrite(found, conditional(given))
            yield InThread(lambda: write.look(given["points"]))
            written = _points(write.noting(given["points"]), write.beside)
            return {**_asked(given), "points": written, "shard_key_selector": write.selector}
        empty, _field = yield from no_cell(client, plain, given["collection_name"])
        return {**given, "points": _points(given["points"], empty)}

    def rows(client: Any, plain: Call, given: dict[str, Any]) -> Effects[dict[str, Any] | None]:
        found = yield from sharded(client, plain, given)
        payload = given.get("payload")
        if found is not None:
            write = given[_WRITE] = ShardedWrite(found, conditional(given))
            ids = given.get("ids")
            bare: Iterator[dict[str, Any]] = ({} for _ in itertools.count())
            return {
                **_asked(given),
                "ids": None if ids is None else write.noting_ids(ids),
                "payload": (_payload(one, write.beside) for one in payload or bare),
                "shard_key_selector": write.selector,
            }
        empty, _field = yield from no_cell(client, plain, given["collection_name"])
        if payload is not None:
            return {**given, "payload": (_payload(one, empty) for one in payload)}
        if given.get("ids") is None or not empty:
            return None  # new points, or nothing to take away
        return {**given, "payload": (dict(empty) for _ in itertools.count())}

    def vectors(client: Any, plain: Call, given: dict[str, Any]) -> Effects[dict[str, Any] | None]:
        found = yield from sharded(client, plain, given)
        if found is not None:  # first out of their cells, then changed where they are
            changed = [one.id for one in given["points"]]
            yield InThread(lambda: found.collection.displace(changed))
            return {**given, "shard_key_selector": found.shards.record.overflow_shard}
        empty, field = yield from no_cell(client, plain, given["collection_name"])
        changed = [one.id for one in given["points"] if _has(one.vector, field)] if empty else []
        if changed:
            shared: dict[str, Any] = {
                name: given[name]
                for name in ("collection_name", "shard_key_selector", "ordering", "timeout")
                if name in given
            }
            where = {"payload": dict(empty), "points": _among(changed)}
            yield plain.other(client.set_payload, {**shared, **where})
        return None

    def payload(client: Any, plain: Call, given: dict[str, Any]) -> Effects[dict[str, Any]]:
        found = yield from sharded(client, plain, given)
        changed = {**given, "payload": of_others(given["payload"])}
        if found is not None:
            given[_AGAIN] = changed = everywhere(changed, found.shards)
        return changed

    def everything(
        client: Any, plain: Call, given: dict[str, Any]
    ) -> Effects[dict[str, Any] | None]:
        found = yield from sharded(client, plain, given)
        if found is None:
            return None
        changed = everywhere(given, found.shards)
        given[_AGAIN] = changed
        return changed

    def after(plain: Call, given: dict[str, Any]) -> Effects[None]:
        write, again = given.get(_WRITE), given.get(_AGAIN)
        if write is not None:
            yield InThread(write.finish)
        if again is not None:
            yield plain.instead(again)

    def operations(client: Any, plain: Call, given: dict[str, Any]) -> Effects[dict[str, Any]]:
        found = yield from sharded(client, plain, given)
        if found is not None:
            write = given[_WRITE] = ShardedWrite(found)
            displaced = write.displaced(given["update_operations"])
            if displaced:
                yield InThread(lambda: found.collection.displace(displaced))
            upserted = write.upserted(given["update_operations"])
            if upserted:
                yield InThread(lambda: write.newer_than(upserted))
            told = [write.told(_operation(one, write.beside)) for one in given["update_operations"]]
            return {**_asked(given), "update_operations": told}
        empty, _field = yield from no_cell(client, plain, given["collection_name"])
        changed = []
        for one in given["update_operations"]:
            if isinstance(one, models.UpdateVectorsOperation):
                asked = one.update_vectors
                named = {"points": asked.points, "shard_key_selector": asked.shard_key}
                yield from vectors(client, plain, {**given, **named})
            changed.append(_operation(one, empty))
        return {**given, "update_operations": changed}

    changes: dict[str, Change] = {
        "upsert": points,
        "upload_points": points,
        "upload_collection": rows,
        "update_vectors": vectors,
        "set_payload": payload,
        "overwrite_payload": payload,
        "batch_update_points": operations,
        "delete": everything,
        "delete_payload": everything,
        "clear_payload": everything,
        "delete_vectors": everything,
    }
    return {name: changing(routed, change, after) for name, change in changes.items()}


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != _WRITE}


def _payload(payload: Any, empty: _NoCell) -> Any:
    """Return a payload without what is ours; an empty one says that the point has no cell.

    Where cells have shard keys every one says so.
    """
    if isinstance(empty, Beside):
        return {**of_others(payload or {}), **empty}
    return (of_others(payload) if payload else payload) or dict(empty) or payload


def _points(points: Any, empty: _NoCell) -> Any:
    """Return points of any form that the client takes, each with its payload as ``_payload``."""
    if isinstance(points, models.Batch):
        payloads: Sequence[Any] = points.payloads or ([None] * len(points.ids) if empty else [])
        written = [_payload(one, empty) for one in payloads]
        return points.model_copy(update={"payloads": written or None})
    if isinstance(points, list):
        return [_point(one, empty) for one in points]
    lazy = isinstance(points, Iterable) and not isinstance(points, str)
    return _each(points, empty) if lazy else points  # or the client says what is wrong with it


def _each(points: Iterable[Any], empty: _NoCell) -> Iterator[Any]:
    return (_point(one, empty) for one in points)


def _point(point: Any, empty: _NoCell) -> Any:
    if isinstance(point, models.PointStruct):
        payload = _payload(point.payload, empty)
        same = payload == point.payload
        return point if same else point.model_copy(update={"payload": payload})
    if not hasattr(point, "CopyFrom"):
        return point  # the client says what is wrong with it
    written = type(point)()  # a message of gRPC
    written.CopyFrom(point)
    for key in of_ours(written.payload):
        del written.payload[key]
    if isinstance(empty, Beside) or not written.payload:
        for key, value in empty.items():
            written.payload[key].integer_value = value
    return written


def _operation(operation: Any, empty: _NoCell) -> Any:
    """Return one operation of a batch, as the method of its own would have to be called."""
    if isinstance(operation, models.UpsertOperation):
        asked = operation.upsert
        if isinstance(asked, models.PointsBatch):
            update = {"batch": _points(asked.batch, empty)}
        else:
            update = {"points": _points(asked.points, empty)}
        return operation.model_copy(update={"upsert": asked.model_copy(update=update)})
    for kind, name in (
        (models.SetPayloadOperation, "set_payload"),
        (models.OverwritePayloadOperation, "overwrite_payload"),
    ):
        if isinstance(operation, kind):
            asked = getattr(operation, name)
            written = asked.model_copy(update={"payload": of_others(asked.payload)})
            return operation.model_copy(update={name: written})
    return operation


def _has(vector: Any, field: str | None) -> bool:
    """Tell whether a written vector is the one that the cells are of."""
    return field in vector if isinstance(vector, Mapping) else not field


def _among(ids: list[Any]) -> models.Filter:
    return models.Filter(must=[models.HasIdCondition(has_id=ids)])
