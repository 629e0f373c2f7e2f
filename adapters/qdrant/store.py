"""Cells through the Qdrant client: on a server, and in its local mode."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.opening import answering
from amips_plugins.adapters.qdrant.search import (
    all_of,
    as_batch,
    cell_of,
    empty,
    has_cell,
    has_vector,
    overflow,
    plain_id,
)
from amips_plugins.adapters.qdrant.strict_mode import batch_limit, refusal, strict_notes, time_limit
from amips_plugins.collection import Id, KeyBatch
from amips_plugins.errors import CollectionError, require
from amips_plugins.vectors import FloatArray

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["LocalStore", "ServerStore"]

_READ_BATCH = 1000  # keys with their vectors
_WRITE_BATCH = 20_000  # ids: each call has one write a cell, so few calls are cheaper
_PATIENCE = 600  # seconds for one call; the client's default is 5
_METADATA_SINCE = (1, 16)
_NO_CELL = (None, OVERFLOW)


class ServerStore:
    """The points of one vector on a server (see ``qdrant_cells.CellStore``).

    Whatever looks at a point before it writes does so in a filter, which the server applies in the
    same step.

    Parameters
    ----------
    client, name, field
        As for ``QdrantCollection``; the field's name is known.
    server
        How to call the server in messages.
    """

    seconds_per_write = 5e-5

    def __init__(self, client: QdrantClient, name: str, field: str, server: str) -> None:
        self._client = client
        self._name = name
        self._field = field
        self._server = server
        found = self._describe()
        self._strict = found.config.strict_mode_config
        self._patience = time_limit(self._strict, _PATIENCE)

    def _describe(self) -> models.CollectionInfo:
        with answering(self._server):
            return self._client.get_collection(self._name)

    def metadata(self) -> Mapping[str, Any]:
        """Read the collection's metadata."""
        return self._describe().config.metadata or {}

    def write_metadata(self, changes: Mapping[str, Any]) -> None:
        """Replace these entries; the database keeps the others."""
        with answering(self._server, "write to"):
            self._client.update_collection(
                self._name, metadata=dict(changes), timeout=self._patience
            )

    def check(self, key: str, n_cells: int) -> None:
        """Refuse an old server, strict mode, and a key that is indexed as something else."""
        with answering(self._server):
            version = self._client.info().version
        number = re.match(r"v?(\d+)\.(\d+)", version)
        if number and (int(number[1]), int(number[2])) < _METADATA_SINCE:
            raise CollectionError(
                f"{self._server} is Qdrant {version}, which keeps no metadata of a collection, and "
                "cells need it; use Qdrant 1.16 or newer."
            )
        schema = self._describe().payload_schema
        if key in schema and schema[key].data_type is not models.PayloadSchemaType.INTEGER:
            raise CollectionError(
                f"Collection {self._name!r} has an index of {key!r} as {schema[key].data_type}; "
                "drop that index, or use cells with another identifier."
            )
        reason = refusal(self._strict, n_cells, len({*schema, key}))
        if reason is not None:
            raise CollectionError(reason)

    def notes(self) -> tuple[str, ...]:
        """Say what an operator should know before."""
        return (
            "Qdrant puts the points of a cell next to each other only when it rebuilds a segment: "
            "searches get faster while it optimises.",
            *strict_notes(self._strict),
        )

    def free_bytes(self) -> int | None:
        """Return None: a server does not tell."""
        return None

    def foreign(self, key: str, n_cells: int) -> int | None:
        """Count what a search of cells would never find; None where strict mode needs the index."""
        if self._lacks_index(key):
            return None
        ours: list[models.Condition] = [empty(key), has_cell(key, range(OVERFLOW, n_cells))]
        return self._count(models.Filter(must=[has_vector(self._field)], must_not=ours))

    def overflow(self, key: str) -> int:
        """Count the points without a cell."""
        return self._count(all_of(has_vector(self._field), overflow(key)))

    def create_index(self, key: str) -> None:
        """Create the index; before the cells, for segments are built by the cells after it."""
        with answering(self._server, "write to"):
            self._client.create_payload_index(
                self._name,
                key,
                models.IntegerIndexParams(type=models.IntegerIndexType.INTEGER, is_principal=True),
                wait=True,
                timeout=self._patience,
            )

    def drop_index(self, key: str) -> None:
        """Drop the index, if there is one."""
        if self._has_index(key):
            with answering(self._server, "write to"):
                self._client.delete_payload_index(
                    self._name, key, wait=True, timeout=self._patience
                )

    def remove_cells(self, key: str) -> None:
        """Remove the key from every point that has it."""
        if self._lacks_index(key):
            return  # without an index no cell was ever written
        for ids in self._pages(models.Filter(must_not=[empty(key)])):
            with answering(self._server, "write to"):
                self._client.delete_payload(
                    self._name,
                    [key],
                    all_of(models.HasIdCondition(has_id=list(ids))),
                    wait=True,
                    timeout=self._patience,
                )

    def without_cell(self, key: str) -> Iterator[Sequence[Id]]:
        """Go once through the points without a cell."""
        return self._pages(all_of(has_vector(self._field), overflow(key)))

    def claim(self, key: str, ids: Sequence[Id]) -> None:
        """Write -1 where nothing is."""
        mine = models.HasIdCondition(has_id=list(ids))
        condition = all_of(mine, has_vector(self._field), empty(key))
        self._write([models.SetPayload(payload={key: OVERFLOW}, filter=condition)])

    def claimed(self, key: str, ids: Sequence[Id]) -> Iterator[KeyBatch]:
        """Read the points that have -1."""
        for start in range(0, len(ids), _READ_BATCH):
            with answering(self._server):
                records = self._client.retrieve(
                    self._name,
                    list(ids[start : start + _READ_BATCH]),
                    with_payload=[key],
                    with_vectors=[self._field],
                    timeout=self._patience,
                )
            batch = as_batch([r for r in records if cell_of(r, key) == OVERFLOW], self._field)
            if batch is not None:
                yield batch

    def place(self, key: str, ids: Sequence[Id], cells: Sequence[int]) -> None:
        """Write the cells where -1 still is, one operation a cell."""
        self._write(
            [
                models.SetPayload(
                    payload={key: cell},
                    filter=all_of(models.HasIdCondition(has_id=points), has_cell(key, [OVERFLOW])),
                )
                for cell, points in _by_cell(ids, cells).items()
            ]
        )

    def _write(self, writes: Sequence[models.SetPayload]) -> None:
        if not writes:
            return
        operations = [models.SetPayloadOperation(set_payload=write) for write in writes]
        with answering(self._server, "write to"):
            self._client.batch_update_points(
                self._name, operations, wait=True, timeout=self._patience
            )

    def _pages(self, condition: models.Filter) -> Iterator[Sequence[Id]]:
        offset: Any = None
        while True:
            with answering(self._server):
                records, offset = self._client.scroll(
                    self._name,
                    condition,
                    limit=batch_limit(self._strict, _WRITE_BATCH),
                    offset=offset,
                    with_payload=False,
                    with_vectors=False,
                    timeout=self._patience,
                )
            if records:
                yield [plain_id(record.id) for record in records]
            if offset is None:
                return

    def _count(self, condition: models.Filter) -> int:
        with answering(self._server):
            return self._client.count(
                self._name, condition, exact=True, timeout=self._patience
            ).count

    def _has_index(self, key: str) -> bool:
        return key in self._describe().payload_schema

    def _lacks_index(self, key: str) -> bool:
        """Tell whether strict mode refuses a filter by this key for want of an index."""
        strict = self._strict
        if strict is None or not strict.enabled:
            return False
        return strict.unindexed_filtering_retrieve is False and not self._has_index(key)


class LocalStore(ServerStore):
    """The same in the client's local mode, which has one process and no indexes.

    It tries a filter on every point in Python, so points are looked at by their ids. One thread may
    use it at a time, so that nobody writes between a look and the write behind it.
    """

    def __init__(self, client: QdrantClient, name: str, field: str) -> None:
        super().__init__(client, name, field, "Qdrant")
        self._folder: str | None = client.init_options.get("path")
        self._read: dict[Id, FloatArray] = {}
        if self._folder is not None:
            self.seconds_per_write = 2e-3  # a commit

    def check(self, key: str, n_cells: int) -> None:
        """Accept: local mode has nothing that could refuse."""

    def notes(self) -> tuple[str, ...]:
        """Say what an operator should know before."""
        return (
            "Qdrant's local mode applies filters in Python: cells make no search faster there.",
        )

    def free_bytes(self) -> int | None:
        """Return what the folder's disk has left."""
        return None if self._folder is None else shutil.disk_usage(self._folder).free

    def create_index(self, key: str) -> None:
        """Do nothing: local mode has no indexes."""

    def drop_index(self, key: str) -> None:
        """Do nothing: local mode has no indexes."""

    def remove_cells(self, key: str) -> None:
        """Remove the key from every point that has it."""
        for records in self._records(key):
            ids: list[Any] = [r.id for r in records if key in (r.payload or {})]
            if ids:
                self._client.delete_payload(self._name, [key], ids)

    def without_cell(self, key: str) -> Iterator[Sequence[Id]]:
        """Go once through the points without a cell."""
        for records in self._records(key):
            ids = [plain_id(r.id) for r in records if cell_of(r, key) in _NO_CELL]
            if ids:
                yield ids

    def claim(self, key: str, ids: Sequence[Id]) -> None:
        """Write nothing: in a folder every point written is a commit, and ``place`` can look."""

    def claimed(self, key: str, ids: Sequence[Id]) -> Iterator[KeyBatch]:
        """Read the points without a cell, and remember their vectors."""
        self._read = {}
        for start in range(0, len(ids), _READ_BATCH):
            batch = self._without_cell(key, ids[start : start + _READ_BATCH])
            if batch is not None:
                self._read.update(zip(batch.ids, batch.vectors, strict=True))
                yield batch

    def place(self, key: str, ids: Sequence[Id], cells: Sequence[int]) -> None:
        """Write the cells where none is still and the vector is the one that was read."""
        batch = self._without_cell(key, ids)
        if batch is None:
            return
        chosen = dict(zip(ids, cells, strict=True))
        same = [
            one
            for one, vector in zip(batch.ids, batch.vectors, strict=True)
            if np.array_equal(vector, self._read[one])
        ]
        members = _by_cell(same, [chosen[one] for one in same])
        self._write(
            [models.SetPayload(payload={key: cell}, points=p) for cell, p in members.items()]
        )

    def _without_cell(self, key: str, ids: Sequence[Id]) -> KeyBatch | None:
        records = self._client.retrieve(self._name, list(ids), [key], with_vectors=[self._field])
        return as_batch([r for r in records if cell_of(r, key) in _NO_CELL], self._field)

    def _records(self, key: str) -> Iterator[list[models.Record]]:
        offset: Any = None
        while True:
            records, offset = self._client.scroll(
                self._name, limit=_WRITE_BATCH, offset=offset, with_payload=[key]
            )
            yield records
            if offset is None:
                return


def _by_cell(ids: Sequence[Id], cells: Sequence[int]) -> dict[int, list[Any]]:
    members: dict[int, list[Any]] = {}
    for one, cell in zip(ids, cells, strict=True):
        members.setdefault(cell, []).append(one)
    return members
