"""Cells in the Qdrant client's local mode, which has one process and no indexes.

It tries a filter on every point in Python, so points are looked at by their ids. One thread may
use it at a time, so that nobody writes between a look and the write behind it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.points import key_batch, plain_id
from amips_plugins.adapters.qdrant.store import ServerStore
from amips_plugins.collection import Id, KeyBatch
from amips_plugins.errors import require
from amips_plugins.vectors import FloatArray

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["LocalStore"]

_PAGE = 1000  # points


class LocalStore(ServerStore):
    """The points of one vector in local mode (see ``CellStore``)."""

    def __init__(self, client: QdrantClient, name: str, field: str) -> None:
        super().__init__(client, name, field, "Qdrant")
        self._folder: str | None = client.init_options.get("path")
        self._read: dict[Id, FloatArray] = {}
        if self._folder is not None:
            self.seconds_per_write = 2e-3  # a commit

    def check(self, record: LayoutRecord) -> None:
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

    def remove_cells(self, record: LayoutRecord) -> None:
        """Remove both keys from every point that has one."""
        for records in self._records(record):
            ids: list[Any] = [r.id for r in records if record.key in (r.payload or {})]
            if ids:
                self._client.delete_payload(self._name, record.keys, ids)

    def without_cell(self, record: LayoutRecord) -> Iterator[Sequence[Id]]:
        """Go once through the points without a cell."""
        for records in self._records(record):
            ids = [plain_id(r.id) for r in records if _has_none(r, record)]
            if ids:
                yield ids

    def claim(self, record: LayoutRecord, ids: Sequence[Id], claim: int) -> None:
        """Write nothing: in a folder every point written is a commit, and ``place`` can look."""

    def claimed(self, record: LayoutRecord, ids: Sequence[Id], claim: int) -> Iterator[KeyBatch]:  # noqa: ARG002 - see ``claim``
        """Read the points without a cell, and remember their vectors."""
        batch = self._without_cell(record, ids)
        if batch is not None:
            self._read = dict(zip(batch.ids, batch.vectors, strict=True))
            yield batch

    def place(
        self,
        record: LayoutRecord,
        ids: Sequence[Id],
        cells: Sequence[int | list[int]],
        sketches: Sequence[int],
        claim: int,  # noqa: ARG002 - see ``claim``
    ) -> None:
        """Write the cells where none is still and the vector is the one that was read."""
        batch = self._without_cell(record, ids)
        if batch is None:
            return
        chosen = dict(zip(ids, zip(cells, sketches, strict=True), strict=True))
        same = [
            one
            for one, vector in zip(batch.ids, batch.vectors, strict=True)
            if np.array_equal(vector, self._read[one])
        ]
        self._write(
            [
                models.SetPayloadOperation(
                    set_payload=models.SetPayload(payload=record.beside(*chosen[one]), points=[one])
                )
                for one in same
            ]
        )

    def _without_cell(self, record: LayoutRecord, ids: Sequence[Id]) -> KeyBatch | None:
        records = self._client.retrieve(
            self._name, list(ids), [record.key], with_vectors=[self._field]
        )
        return key_batch([r for r in records if _has_none(r, record)], self._field)

    def _records(self, record: LayoutRecord) -> Iterator[list[models.Record]]:
        offset: Any = None
        while True:
            records, offset = self._client.scroll(
                self._name, limit=_PAGE, offset=offset, with_payload=[record.key]
            )
            yield records
            if offset is None:
                return


def _has_none(record: models.Record, of: LayoutRecord) -> bool:
    return of.own_cell((record.payload or {}).get(of.key)) is None
