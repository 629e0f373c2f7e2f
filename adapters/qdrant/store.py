"""Cells on a Qdrant server: what the steps of a layout ask of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cells import CelledKeys, LayoutRecord
from amips_plugins.adapters.qdrant.failures import patiently, translated_errors
from amips_plugins.adapters.qdrant.points import celled_keys, key_batch, plain_id
from amips_plugins.adapters.qdrant.search import (
    all_of,
    among,
    empty,
    has_cell,
    has_value,
    has_vector,
    index_of_cells,
    others_than,
    unplaced,
    without_cell,
)
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.collection import Cursor, Id, KeyBatch
from amips_plugins.errors import CollectionError, require
from amips_plugins.partitions import Value

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["ServerStore"]

T = TypeVar("T")

_READ_BATCH = 1000  # keys with their vectors
_READ_NUMBERS = 1_000_000  # of their vectors: an answer of some 12 MB
_PLACE_BATCH = 1000  # writes, one a key
_WRITE_BATCH = 20_000  # ids in one condition
_PATIENCE = 600  # seconds for one call; the client's default is 5
_METADATA_SINCE = (1, 16)
_CPU_PER_KEY = 2.8e-3  # seconds, measured (docs/operations.md)


class ServerStore:
    """The points of one vector on a server (see ``CellStore``).

    Whatever looks at a point before it writes does so in a filter, which the server applies in the
    same step. Every call may be done again, so a server that is busy is waited for.
    """

    seconds_per_write = 1e-4

    def __init__(
        self, client: QdrantClient, name: str, field: str, server: str, shard_key: Any = None
    ) -> None:
        self._client = client
        self._name = name
        self._field = field
        self._server = server
        self._shard_key = shard_key
        found = self._describe()
        params = found.config.params
        self._limits = Limits(found.config.strict_mode_config)
        self._custom = params.sharding_method is models.ShardingMethod.CUSTOM
        named = params.vectors if isinstance(params.vectors, dict) else {"": params.vectors}
        self._dim = next((one.size for key, one in named.items() if one and key == field), 1)
        # Beside other vectors, also sparse ones, a point may lack this one.
        self._alone = "" in named and len(named) == 1 and not params.sparse_vectors

    def _ask(self, call: Callable[[], T], to: Literal["read", "write to"] = "read") -> T:
        with translated_errors(self._server, to):
            return patiently(call)

    def _describe(self) -> models.CollectionInfo:
        return self._ask(lambda: self._client.get_collection(self._name))

    @property
    def _patience(self) -> int:
        return self._limits.seconds(_PATIENCE)

    def parts(self) -> list[ServerStore]:
        """Return the store of each custom shard key: writes must name it, and it owns its ids."""
        if self._shard_key is not None or not self._custom:
            return [self]
        found = self._ask(lambda: self._client.list_shard_keys(self._name))
        parts = []
        for one in found.shard_keys or ():
            part = copy.copy(self)
            part._shard_key = one.key
            parts.append(part)
        return parts

    def metadata(self) -> Mapping[str, Any]:
        """Read the collection's metadata."""
        return self._describe().config.metadata or {}

    def write_metadata(self, changes: Mapping[str, Any]) -> None:
        """Replace these entries; the database keeps the others."""
        self._ask(
            lambda: self._client.update_collection(
                self._name, metadata=dict(changes), timeout=self._patience
            ),
            "write to",
        )

    def check(self, record: LayoutRecord) -> None:
        """Refuse an old server, strict mode, a key that may not write, and another's index."""
        version = self._ask(self._client.info).version
        number = re.match(r"v?(\d+)\.(\d+)", version)
        if number and (int(number[1]), int(number[2])) < _METADATA_SINCE:
            raise CollectionError(
                f"{self._server} is Qdrant {version}, which keeps no metadata of a collection, and "
                "cells need it; use Qdrant 1.16 or newer."
            )
        schema = self._describe().payload_schema
        key = record.key
        if key in schema and schema[key].data_type is not models.PayloadSchemaType.INTEGER:
            raise CollectionError(
                f"Collection {self._name!r} has an index of {key!r} as {schema[key].data_type}; "
                "drop that index, or use cells with another identifier."
            )
        reason = self._limits.refusal(record.n_cells, len({*schema, key}))
        if reason is not None:
            raise CollectionError(reason)
        self.write_metadata({})

    def notes(self) -> tuple[str, ...]:
        """Say what an operator should know before."""
        return (
            "Writing cells moves every point out of its segment, and the server builds segments "
            "and graph again. Measured on 100,000 keys of dimension 384 in use: 281 CPU seconds "
            "(3 times the first load), 2.7 times the disk meanwhile, and until the collection is "
            "green others' searches at a p95 of 628 in place of 23 ms; CPU and disk go by size.",
            "Qdrant puts the points of a cell next to each other only when it rebuilds a segment: "
            "searches get faster while it optimises.",
            *self._limits.notes(),
        )

    def free_bytes(self) -> int | None:
        """Return None: a server does not tell."""
        return None

    def taken(self, key: str) -> bool | None:
        """Look for one point with something under the key."""
        if self._lacks_index(key):
            return None
        condition = models.Filter(must=[has_vector(self._field)], must_not=[empty(key)])
        records, _ = self._scroll(condition, None, 1)
        return bool(records)

    def overflow(self, record: LayoutRecord) -> int:
        """Count the points without a cell."""
        return self.count(without_cell(record))

    def count_values(self, key: str, values: Sequence[Value], *, others: bool = False) -> int:
        """Count the points with one of these values under a payload key; or all ``others``."""
        return self.count(others_than(key, values) if others else has_value(key, values))

    def count(self, *conditions: models.Condition) -> int:
        """Count exactly; where strict mode refuses that, by going through the points."""
        if not self._alone:
            conditions = (has_vector(self._field), *conditions)
        condition = all_of(*conditions) if conditions else None
        if not self._limits.allows_exact:
            return sum(map(len, self._pages(condition)))
        return self._ask(
            lambda: self._client.count(
                self._name,
                condition,
                exact=True,
                shard_key_selector=self._shard_key,
                timeout=self._patience,
            )
        ).count

    def create_index(self, key: str) -> None:
        """Create the index; before the cells, for segments are built by the cells after it."""
        self._ask(
            lambda: self._client.create_payload_index(
                self._name, key, index_of_cells(), wait=True, timeout=self._patience
            ),
            "write to",
        )

    def drop_index(self, key: str) -> None:
        """Drop the index, if there is one."""
        if key in self._describe().payload_schema:
            self._ask(
                lambda: self._client.delete_payload_index(
                    self._name, key, wait=True, timeout=self._patience
                ),
                "write to",
            )

    def remove_cells(self, record: LayoutRecord) -> None:
        """Remove both keys from every point that has one."""
        if self._lacks_index(record.key):
            return  # without an index no cell was ever written
        for part in self.parts():
            for ids in part._pages(models.Filter(must_not=[empty(record.key)])):
                gone = models.DeletePayload(
                    keys=record.keys, filter=all_of(among(ids)), shard_key=part._shard_key
                )
                self._write([models.DeletePayloadOperation(delete_payload=gone)])

    def without_cell(self, record: LayoutRecord) -> Iterator[Sequence[Id]]:
        """Go once through the points without a cell."""
        return self._pages(all_of(has_vector(self._field), unplaced(record)))

    def claim(self, record: LayoutRecord, ids: Sequence[Id], claim: int) -> None:
        """Write the claim over whatever is no cell."""
        condition = all_of(among(ids), has_vector(self._field), unplaced(record))
        self._set([(record.beside(claim, 0), condition)])

    def claimed(self, record: LayoutRecord, ids: Sequence[Id], claim: int) -> Iterator[KeyBatch]:
        """Read the points that have the claim."""
        for start in range(0, len(ids), self._read_batch):
            some = list(ids[start : start + self._read_batch])
            condition = all_of(among(some), has_cell(record.key, [claim]))
            records, _ = self._scroll(condition, None, len(some), [record.key], vectors=True)
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
        """Write the cells where the claim still stands."""
        standing = has_cell(record.key, [claim])
        writes = [
            (record.beside(cell, one), all_of(among([key]), standing))
            for key, cell, one in zip(ids, cells, sketches, strict=True)
        ]
        for start in range(0, len(writes), _PLACE_BATCH):
            self._set(writes[start : start + _PLACE_BATCH])

    def sample(self, record: LayoutRecord, n: int) -> CelledKeys | None:
        """Let the server draw points; one that is drawn twice counts once."""
        found: dict[Any, models.ScoredPoint] = {}
        limit = self._limits.points(min(n, self._read_batch))
        for _ in range(-(-n // limit)):
            answer = self._ask(
                lambda: self._client.query_points(
                    self._name,
                    models.SampleQuery(sample=models.Sample.RANDOM),
                    limit=limit,
                    with_payload=record.keys,
                    with_vectors=[self._field],
                    shard_key_selector=self._shard_key,
                    timeout=self._patience,
                )
            )
            found |= {point.id: point for point in answer.points}
        return celled_keys(list(found.values())[:n], self._field, record)

    def celled(self, record: LayoutRecord, after: Cursor | None) -> Iterator[CelledKeys]:
        """Read all points in the order of their ids, behind a cursor."""
        offset: Any = after
        while True:
            records, offset = self._scroll(
                None, offset, self._read_batch, record.keys, vectors=True
            )
            found = celled_keys([one for one in records if one.id != after], self._field, record)
            if found is not None:
                yield found
            if offset is None:
                return

    def displace(self, record: LayoutRecord, ids: Sequence[Id]) -> None:
        """Write that these points have no cell."""
        for start in range(0, len(ids), self._limits.points(_WRITE_BATCH)):
            some = ids[start : start + self._limits.points(_WRITE_BATCH)]
            self._set([(record.beside(OVERFLOW, 0), all_of(among(some)))])

    def _set(self, writes: Sequence[tuple[dict[str, int | list[int]], models.Filter]]) -> None:
        self._write(
            [
                models.SetPayloadOperation(
                    set_payload=models.SetPayload(
                        payload=payload, filter=condition, shard_key=self._shard_key
                    )
                )
                for payload, condition in writes
            ]
        )

    def _write(self, operations: Sequence[models.UpdateOperation]) -> None:
        self._ask(
            lambda: self._client.batch_update_points(
                self._name, operations, wait=True, timeout=self._patience
            ),
            "write to",
        )

    @property
    def _read_batch(self) -> int:
        return self._limits.points(min(_READ_BATCH, max(1, _READ_NUMBERS // self._dim)))

    def _pages(self, condition: models.Filter | None) -> Iterator[Sequence[Id]]:
        offset: Any = None
        while True:
            limit = self._limits.points(_WRITE_BATCH)
            records, offset = self._scroll(condition, offset, limit)
            if records:
                yield [plain_id(record.id) for record in records]
            if offset is None:
                return

    def _scroll(
        self,
        condition: models.Filter | None,
        offset: Any,
        limit: int,
        payload: Sequence[str] = (),
        *,
        vectors: bool = False,
    ) -> tuple[list[models.Record], Any]:
        return self._ask(
            lambda: self._client.scroll(
                self._name,
                condition,
                limit=limit,
                offset=offset,
                with_payload=list(payload) or False,
                with_vectors=[self._field] if vectors else False,
                shard_key_selector=self._shard_key,
                timeout=self._patience,
            )
        )

    def _lacks_index(self, key: str) -> bool:
        """Tell whether strict mode refuses a filter by this key for want of an index."""
        return self._limits.needs_index and key not in self._describe().payload_schema
