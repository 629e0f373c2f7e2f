"""A Qdrant Edge shard as a store of cells: its folder, its lock, and the writes.

The engine keeps no metadata of a shard, so they are a small JSON file in the shard's folder, which
goes where the folder goes. Every write goes through the engine's log before it returns.

Importing this module needs the extra ``qdrant-edge``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.collection import Id, KeyBatch
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    InvalidInput,
    require,
)
from amips_plugins.files import replace_file

if TYPE_CHECKING:
    import qdrant_edge as edge
else:
    edge = require("qdrant_edge", "qdrant-edge")

__all__ = ["EdgeCells", "OpenShard", "both", "edge_ids", "in_cells", "plain_id"]

_CONFIG = "edge_config.json"  # the engine's own
_METADATA = "amips.json"
_READ_BATCH = 1000  # keys with their vectors
_WRITE_BATCH = 20_000  # ids: each batch has one write a cell, so few batches are cheaper
_FLUSH_EVERY = 10_000  # keys: the log grows, and takes time to read again, until a flush


class OpenShard:
    """A shard that is open, shared by the collection objects of this process.

    Parameters
    ----------
    shard
        The engine's own object.
    folder
        Where it is; the engine does not say.

    Attributes
    ----------
    writes
        How many were begun, to tell whether one came between two calls.
    """

    def __init__(self, shard: edge.EdgeShard, folder: Path) -> None:
        self._engine = shard
        self._process = os.getpid()
        self.folder = folder
        self.writes = 0
        self._unflushed = 0
        self._owned = False

    @classmethod
    def load(cls, folder: Path) -> OpenShard:
        """Open a shard, which ``close`` closes.

        Raises
        ------
        CollectionNotFound
            There is no shard in the folder.
        CollectionError
            The shard has no write-ahead log.
        DatabaseUnreachable
            The shard is open elsewhere.
        """
        # The engine would make a shard's folders in whatever it is asked to load.
        if not (folder / _CONFIG).is_file():
            raise CollectionNotFound(
                f"There is no Qdrant Edge shard in {str(folder)!r}; check the path, or create one "
                "there with EdgeShard.create."
            )
        if _read_json(folder / _CONFIG).get("wal_enabled") is False:
            raise CollectionError(
                f"The Qdrant Edge shard in {str(folder)!r} has no write-ahead log, so nothing "
                "keeps other processes out or its last writes safe; create it with wal_enabled."
            )
        try:
            shard = edge.EdgeShard.load(str(folder))
        except Exception as exc:  # the engine knows no other class
            if "WouldBlock" not in str(exc):
                raise
            raise DatabaseUnreachable(
                f"The Qdrant Edge shard in {str(folder)!r} is open elsewhere, and only one process "
                "can have it, once; close it there."
            ) from exc
        opened = cls(shard, folder)
        opened._owned = True
        return opened

    @property
    def engine(self) -> edge.EdgeShard:
        """The engine's own object.

        Raises
        ------
        CollectionError
            This process is a fork of the one that opened the shard: it would hang, or write where
            the other one writes.
        """
        if os.getpid() != self._process:
            raise CollectionError(
                f"The Qdrant Edge shard in {str(self.folder)!r} was opened before this process was "
                "forked and cannot be used here; open shards after a fork, each in one process."
            )
        return self._engine

    def config(self) -> dict[str, Any]:
        """Read how the shard was created, as the engine writes it down."""
        return _read_json(self.folder / _CONFIG)

    def metadata(self) -> dict[str, Any]:
        """Read our file beside the engine's."""
        path = self.folder / _METADATA
        return _read_json(path) if path.is_file() else {}

    def write_metadata(self, changes: Mapping[str, Any]) -> None:
        """Replace these entries in one step; what they speak of is on the disk before them."""
        self.flush()
        content = {**self.metadata(), **changes}
        replace_file(self.folder / _METADATA, json.dumps(content, indent=1).encode())

    def update(self, operation: edge.UpdateOperation, keys: int = 1) -> None:
        """Write. The log holds it on return: the process may be killed then."""
        self.writes += 1
        self.engine.update(operation)
        self._unflushed += keys
        if self._unflushed >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Bring to the disk what only the log holds."""
        self._unflushed = 0
        self.engine.flush()

    def optimize(self) -> None:
        """Let the engine rebuild its segments (see ``QdrantEdgeCollection.optimize``)."""
        self.engine.optimize()
        self.flush()

    def close(self) -> None:
        """Close the shard if ``load`` opened it; safe to call twice, and in a fork."""
        if self._owned:
            self._owned = False
            if os.getpid() == self._process:  # else it is the other process's to close
                self._engine.close()


class EdgeCells:
    """What the steps of ``qdrant_layouts`` need of a shard (see ``qdrant_cells.CellStore``).

    Parameters
    ----------
    shard
        The shard.
    field
        Name of the vector, empty for the unnamed one.
    """

    def __init__(self, shard: OpenShard, field: str) -> None:
        self._shard = shard
        self._field = field
        self._has_vector = edge.HasVectorCondition(field)
        self._scattered = False

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

    def check(self, key: str, n_cells: int) -> None:
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

    def scroll(
        self, batch_size: int, *conditions: edge.ConditionType, after: Id | None = None
    ) -> Iterator[KeyBatch]:
        """Read the points that have the vector and meet the conditions, in the order of the ids."""
        whole = edge.Filter(must=[self._has_vector, *conditions])
        offset: Any = after
        while True:
            request = edge.ScrollRequest(
                offset=offset, limit=batch_size, filter=whole, with_vector=[self._field]
            )
            records, offset = self._shard.engine.scroll(request)
            # The offset is inclusive: on going on, the first record is the cursor's own.
            found = [(plain_id(one.id), one.vector) for one in records]
            found = [(one, vector) for one, vector in found if one != after]
            if found:
                vectors: list[Any] = [
                    vector[self._field] if isinstance(vector, dict) else vector
                    for _, vector in found
                ]
                ids = [one for one, _ in found]
                yield KeyBatch(ids, np.array(vectors, dtype=np.float32), ids[-1])
            if offset is None:
                return

    def among(self, ids: Sequence[Id]) -> Iterator[KeyBatch]:
        """Read those of the points that are there with the vector."""
        return self.scroll(_READ_BATCH, _among(ids))

    def foreign(self, key: str, n_cells: int) -> int:
        """Count the points with something under the key that is no cell and not -1."""
        ours = edge.FieldCondition(key, match=edge.MatchAny(list(range(OVERFLOW, n_cells))))
        return self.count(edge.Filter(must_not=[ours, edge.IsEmptyCondition(key)]))

    def overflow(self, key: str) -> int:
        """Count the points without a cell."""
        return self.count(in_cells(key, [OVERFLOW]))

    def create_index(self, key: str) -> None:
        """Index the integers under the key; points of one cell will lie together."""
        params = edge.IntegerIndexParams(lookup=True, range=True, is_principal=True)
        self._shard.update(edge.UpdateOperation.create_field_index(key, params))
        self._scattered = True  # by this build, or by one that was killed

    def drop_index(self, key: str) -> None:
        """Drop the index of the key, if there is one."""
        self._shard.update(edge.UpdateOperation.delete_field_index(key))

    def remove_cells(self, key: str) -> None:
        """Remove the key from every point."""
        there = edge.Filter(must_not=[edge.IsEmptyCondition(key)])
        self._shard.update(edge.UpdateOperation.delete_payload_by_filter(there, [key]))
        self._scattered = True

    def without_cell(self, key: str) -> Iterator[Sequence[Id]]:
        """Go once through the points without a cell."""
        whole = edge.Filter(must=[self._has_vector, in_cells(key, [OVERFLOW])])
        offset: Any = None
        while True:
            records, offset = self._shard.engine.scroll(
                edge.ScrollRequest(
                    offset=offset,
                    limit=_WRITE_BATCH,
                    filter=whole,
                    with_payload=False,
                    with_vector=False,
                )
            )
            if records:
                yield [plain_id(record.id) for record in records]
            if offset is None:
                return

    def claim(self, key: str, ids: Sequence[Id]) -> None:
        """Write -1 for those of the points that are there without a cell."""
        self._set(key, OVERFLOW, ids, in_cells(key, [OVERFLOW]))

    def claimed(self, key: str, ids: Sequence[Id]) -> Iterator[KeyBatch]:
        """Read those of the points that have -1."""
        for start in range(0, len(ids), _READ_BATCH):
            some = ids[start : start + _READ_BATCH]
            yield from self.scroll(_READ_BATCH, _among(some), _exactly(key, [OVERFLOW]))

    def place(self, key: str, ids: Sequence[Id], cells: Sequence[int]) -> None:
        """Write the cells of those of the points that still have -1."""
        members: dict[int, list[Id]] = {}
        for one, cell in zip(ids, cells, strict=True):
            members.setdefault(cell, []).append(one)
        for cell, points in members.items():
            self._set(key, cell, points, _exactly(key, [OVERFLOW]))

    def _set(self, key: str, cell: int, ids: Sequence[Id], where: edge.ConditionType) -> None:
        whole = edge.Filter(must=[_among(ids), where])
        write = edge.UpdateOperation.set_payload_by_filter(whole, {key: cell})
        self._shard.update(write, len(ids))

    def everything_placed(self, key: str) -> bool:
        """Tell in microseconds whether every point has a cell, or -1.

        False where the engine does not know. A filter that also looks for points without the key
        costs as much as scanning a tenth of the vectors.
        """
        info = self._shard.engine.info()
        index = info.payload_schema.get(key)
        return index is not None and index.points == info.points_count


def in_cells(key: str, cells: Sequence[int], *, everything_placed: bool = False) -> edge.Filter:
    """Write the filter for the points of some cells; ``OVERFLOW`` among them means both forms."""
    here = _exactly(key, cells)
    if everything_placed or OVERFLOW not in cells:
        return edge.Filter(must=[here])
    return edge.Filter(should=[edge.IsEmptyCondition(key), here])


def both(condition: edge.Filter | None, here: edge.Filter) -> edge.Filter:
    """Write "and"; merged clause by clause two ``should`` would become one."""
    return here if condition is None else edge.Filter(must=[condition, here])


def edge_ids(ids: Sequence[Id]) -> list[Any]:
    """Check ids and write them as the engine answers them.

    Raises
    ------
    InvalidInput
        One is neither a whole number from 0 to 2^64 - 1 nor a UUID.
    """
    return [_edge_id(one) for one in ids]


def _edge_id(one: Id) -> Id:
    if isinstance(one, (int, np.integer)) and not isinstance(one, bool) and 0 <= one < 2**64:
        return int(one)
    if isinstance(one, str):
        try:
            return str(UUID(one))
        except ValueError:
            pass  # refused below, with the others
    raise InvalidInput(
        f"{one!r} cannot be an id in Qdrant; use whole numbers from 0 to 2^64 - 1, or UUIDs."
    )


def plain_id(found: Any) -> Id:
    """Return an id of the engine as the rest of the package knows it."""
    return found if isinstance(found, int) else str(found)


def _among(ids: Sequence[Id]) -> edge.HasIdCondition:
    return edge.HasIdCondition(set(ids))


def _exactly(key: str, cells: Sequence[int]) -> edge.FieldCondition:
    return edge.FieldCondition(key, match=edge.MatchAny(list(cells)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CollectionError(f"The file {str(path)!r} is damaged; restore it from a backup.")
    return found
