"""One physical collection of Milvus: what it is, its rows, and where they lie."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.copies.row_changes import encoded
from amips_plugins.adapters.milvus.cells import (
    CELL_FIELD,
    CELLS_FIELD,
    COPY_FIELD,
    DEFAULT_PARTITION,
    SKETCH_FIELD,
    STAMP_FIELD,
    CellProperties,
)
from amips_plugins.collection import CollectionInfo, Cursor, Id
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.partitions import Partitions, Value
from amips_plugins.vectors import FloatArray

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["Table"]

_MAX_PAGE = 16_384  # rows Milvus returns for one query
_FIRST_PAGE = 256
_ANSWER_BYTES = 16 << 20  # of the 64 MiB that a server sends at most; rows differ
_MAX_IDS = 5_000  # in one expression
_OURS = (CELL_FIELD, SKETCH_FIELD, COPY_FIELD, CELLS_FIELD, STAMP_FIELD)
_LITE_ESCAPES = str.maketrans({'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


@dataclass(frozen=True, slots=True)
class Table:
    """One physical collection; every answer includes what was acknowledged before the call.

    ``raw`` is Milvus' own description of it, ``key`` the primary key's name, ``is_lite`` whether
    it lies in a file, ``cells`` its cells, complete or being built, ``given`` what is taken for
    cells in place of them.
    """

    client: MilvusClient
    info: CollectionInfo
    raw: Mapping[str, Any]
    key: str
    string_keys: bool
    is_lite: bool
    cells: CellProperties | None
    given: Partitions | None = None

    @property
    def name(self) -> str:
        """The collection's own name, never an alias."""
        return self.info.name

    def partitions(self) -> list[str]:
        """Return the names of its partitions."""
        return [str(name) for name in self.client.list_partitions(self.name)]

    def overflow_partitions(self, there: Sequence[str] | None = None) -> list[str]:
        """Return those of the partitions that hold no cell: Milvus' default, and others' own."""
        if self.given is not None:
            known = {DEFAULT_PARTITION, *self.given.values}
            found = self.partitions() if there is None else there
            return [DEFAULT_PARTITION, *sorted(set(found) - known)]
        if self.cells is None:
            return [DEFAULT_PARTITION]
        return list(
            _without_cells(self.cells, tuple(self.partitions() if there is None else there))
        )

    def cell_partitions(self) -> list[str]:
        """Return those of the partitions that hold a cell."""
        others = self.overflow_partitions(there := self.partitions())
        return [name for name in there if name not in others]

    def overflow_last(self) -> list[str]:
        """Return all partitions in the order in which older rows of a key are to go."""
        return [*self.cell_partitions(), *self.overflow_partitions()]

    def own_partitions(self) -> list[str]:
        """Return the partitions that are neither Milvus' default nor cells, sorted."""
        ours = re.compile(r"cell_[a-z0-9]{1,16}_\d{4}")
        return sorted(
            p for p in self.partitions() if p != DEFAULT_PARTITION and not ours.fullmatch(p)
        )

    @property
    def any_id(self) -> str:
        """A filter that every id passes."""
        return f'{self.key} >= ""' if self.string_keys else f"{self.key} < 0 or {self.key} >= 0"

    def count(
        self,
        where: str = "",
        partitions: Sequence[str] | None = None,
        consistency: str = "Strong",
    ) -> int:
        """Count rows; one that lies in two partitions counts twice (Milvus Lite: once)."""
        rows = self._query(
            # Without a filter Milvus Lite would count the whole collection.
            filter=where or ("" if partitions is None else self.any_id),
            output_fields=["count(*)"],
            partition_names=partitions,
            consistency_level=consistency,
        )
        return int(rows[0]["count(*)"])

    def count_keys(self) -> int:
        """Count rows, of a key in several cells only the one in its own."""
        return self.count(self.no_copies)

    def _query(self, **arguments: Any) -> list[dict[str, Any]]:
        try:
            return [dict(row) for row in self.client.query(self.name, **arguments)]
        except ValueError as exc:  # a JSON field whose text is no JSON; no error of Milvus is one
            raise CollectionError(
                f"pymilvus cannot read back a row of {self.name!r} ({exc}); the text in one of its "
                f"JSON fields is no JSON: change that row."
            ) from exc

    def overflow(self) -> int:
        """Count the rows without a cell."""
        return self.count(*self.overflow_scope()) if self.given or self.cells else 0

    def overflow_scope(self) -> tuple[str, list[str] | None]:
        """Return the filter and the partitions that hold the overflow, and nothing else."""
        if self.given is not None and self.given.field is not None:
            return self.has_others(self.given.values), None
        if self.given or self.cells is None or self.cells.storage == "partitions":
            return "", self.overflow_partitions()
        return f"{CELL_FIELD} == {OVERFLOW}", None

    def has_values(self, values: Sequence[Value]) -> str:
        """Write a filter for rows with one of these values of the field that is given."""
        assert self.given is not None  # noqa: S101 - for the type checker
        return f"{self.given.key} in [{', '.join(map(self.literal, values))}]"

    def has_others(self, values: Sequence[Value]) -> str:
        """Write a filter for rows with none of these values, also without any."""
        assert self.given is not None  # noqa: S101 - for the type checker
        name = self.given.key
        others = f"{name} not in [{', '.join(map(self.literal, values))}]"
        field = next((one for one in self.raw["fields"] if one["name"] == name), None)
        if field is None:  # a dynamic one, which a row need not have
            return f"{others} or not exists {name}"
        return f"{others} or {name} is null" if field.get("nullable") else others

    def where_ids(self, ids: Sequence[Id]) -> str:
        """Write a filter for ids."""
        return f"{self.key} in [{', '.join(map(self.literal, ids))}]"

    def literal(self, key: Cursor) -> str:
        """Write an id as it stands in a filter."""
        if isinstance(key, str) and self.is_lite:
            return f'"{key.translate(_LITE_ESCAPES)}"'
        # A server reads JSON's escapes, but not its \uXXXX for what can stand for itself.
        return json.dumps(key, ensure_ascii=False)

    @staticmethod
    def all_of(*conditions: str) -> str:
        """Write a filter of several; an empty one asks for nothing."""
        return " and ".join(f"({condition})" for condition in conditions if condition)

    def behind(self, after: Cursor | None) -> str:
        """Write a filter for the ids behind a cursor."""
        return "" if after is None else f"{self.key} > {self.literal(after)}"

    def pages(
        self,
        limit: int,
        max_bytes: int,
        fields: Sequence[str],
        after: Cursor | None = None,
        where: str = "",
        partitions: Sequence[str] | None = None,
    ) -> Iterator[list[dict[str, Any]]]:
        """Read rows in the order of their ids, behind the id ``after``, each id once."""
        if limit < 1:
            raise InvalidInput(f"batch_size is {limit}; pass at least 1.")
        if after is not None and isinstance(after, str) is not self.string_keys:
            kind = "strings" if self.string_keys else "integers"
            raise InvalidInput(
                f"The cursor {after!r} does not fit collection {self.name!r}, "
                f"whose ids are {kind}; start without a cursor."
            )
        limit = min(limit, _MAX_PAGE, max(64, max_bytes // (4 * self.info.dim)))
        asked = min(limit, _FIRST_PAGE)
        mixed = partitions is None and self.in_partitions
        widest = 1.0
        if not self.is_lite:
            # With the flag of an iterator, pymilvus drops the consistency level asked for, and the
            # collection's own may be seconds behind: have the server catch up first.
            self.count()
        while True:
            behind = self.behind(after)
            # These are the requests of pymilvus' QueryIterator, whose flag makes Milvus order the
            # rows by id (a plain query of Milvus Lite does not); its own cursor quotes no strings.
            rows = self._query(
                filter=self.all_of(behind, where),
                output_fields=list(fields),
                limit=asked,
                partition_names=partitions,
                iterator="True",
                reduce_stop_for_best="True",
                collection_id=self.raw["collection_id"],
                consistency_level="Strong",
            )
            if not rows:
                return
            before, after = after, rows[-1][self.key]
            for row in range(0, len(rows), limit):
                some = rows[row : row + limit]
                yield self._newest(some, before, fields, where) if mixed else some
                before = some[-1][self.key]
            if len(rows) < asked:
                left = self._left(after, where, partitions)
                if left is not None:
                    size = max(1, min(limit, _MAX_IDS, _ANSWER_BYTES // self._row_bytes(rows)))
                    for ids in _chunks(left, size):
                        found = self._read(ids, fields, where, partitions)
                        if mixed:
                            found |= self._read(ids, fields, where, self.overflow_partitions())
                        if found:
                            yield [found[key] for key in ids if key in found]
                    return
            # A server answers with up to ``asked`` rows of every segment, so ask for fewer where
            # there are many, and find that out with a small page.
            widest = max(widest, len(rows) / asked)
            fitting = min(limit, _ANSWER_BYTES // self._row_bytes(rows))
            asked = min(2 * asked, max(1, int(fitting / widest)))

    def _row_bytes(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Estimate what one of these rows takes in an answer, its texts and other fields too."""
        some = rows[:: max(1, len(rows) // 32)]
        size = sum(len(encoded(row)) for row in some) // len(some)
        return max(size - 5 * self.info.dim, 1)  # vectors travel as 4 bytes a number, not 9

    @property
    def has_partition_key(self) -> bool:
        """Whether Milvus itself assigns the partitions, by a field."""
        return any(field.get("is_partition_key") for field in self.raw["fields"])

    @property
    def by_partitions(self) -> bool:
        """Whether a search of cells names partitions."""
        if self.given is not None:
            return self.given.field is None
        return self.in_partitions

    @property
    def in_partitions(self) -> bool:
        """Whether its cells are partitions."""
        return self.cells is not None and self.cells.storage == "partitions"

    @property
    def shares_keys(self) -> bool:
        """Whether a key may lie in several cells, a row in each."""
        return self.cells is not None and self.cells.shared

    @property
    def no_copies(self) -> str:
        """A filter that keeps one row of every key."""
        return f"not exists {COPY_FIELD}" if self.shares_keys else ""

    def _newest(
        self,
        rows: list[dict[str, Any]],
        after: Cursor | None,
        fields: Sequence[str],
        where: str,
    ) -> list[dict[str, Any]]:
        """Put the overflow's rows in the place of others with their ids.

        Others upsert into the overflow and leave the row from before in its cell; the database
        answers with either.
        """
        until = f"{self.key} <= {self.literal(rows[-1][self.key])}"
        newer = self._query(
            filter=self.all_of(self.behind(after), until, where),
            output_fields=list(fields),
            limit=len(rows),
            partition_names=self.overflow_partitions(),
            consistency_level="Strong",
        )
        by_id = {row[self.key]: row for row in newer}
        return [by_id.get(row[self.key], row) for row in rows]

    def _left(
        self, after: Cursor, where: str, partitions: Sequence[str] | None
    ) -> list[Any] | None:
        """Return the ids that are left where they are few, in their order; else None.

        The last pages are small, because a server ends each where one segment ends: with many
        partitions it takes a hundred of them. And behind a busy writer reading might never end.
        """
        rows = self._query(
            filter=self.all_of(self.behind(after), where),
            output_fields=[self.key],
            limit=_MAX_PAGE,
            partition_names=partitions,
            consistency_level="Strong",
        )
        return sorted({row[self.key] for row in rows}) if len(rows) < _MAX_PAGE else None

    def read(self, ids: Sequence[Id], fields: Sequence[str] = ("*",)) -> dict[Id, dict[str, Any]]:
        """Read rows by their ids."""
        found = self._read(ids, fields, "", None)
        if self.in_partitions:  # others may have upserted beside a row in a cell
            found |= self._read(ids, fields, "", self.overflow_partitions())
        return found

    def read_overflow(self, ids: Sequence[Id]) -> dict[Id, dict[str, Any]]:
        """Read those of the rows that are overflow."""
        where, partitions = self.overflow_scope()
        return self._read(ids, ["*"], where, partitions)

    def which(self, ids: Sequence[Id]) -> set[Id]:
        """Return those of the ids that are there."""
        return set(self._read(ids, [self.key], "", None))

    def read_in(
        self, partition: str, ids: Sequence[Id], fields: Sequence[str]
    ) -> dict[Id, dict[str, Any]]:
        """Read those of the rows that lie in a partition."""
        return self._read(ids, fields, "", [partition])

    def _read(
        self,
        ids: Sequence[Id],
        fields: Sequence[str],
        where: str,
        partitions: Sequence[str] | None,
    ) -> dict[Id, dict[str, Any]]:
        found: dict[Id, dict[str, Any]] = {}
        for some in _chunks(ids, _MAX_IDS):
            rows = self._query(
                filter=self.all_of(self.where_ids(some), where),
                output_fields=list(fields),
                partition_names=partitions,
                consistency_level="Strong",
            )
            found |= {row[self.key]: row for row in rows}
        return found

    def count_twins(self) -> int:
        """Count the rows whose id another row has too, each but once; rows of ours are none."""
        twice = 0
        for page in self.pages(_MAX_IDS, 1 << 30, [self.key]):
            ids = [row[self.key] for row in page]
            keys = self.count(self.all_of(self.where_ids(ids), self.no_copies))
            twice += max(0, keys - len(ids))
        return twice

    def vectors(self, rows: Sequence[Mapping[str, Any]]) -> FloatArray:
        """Return the vectors of rows, ``(n, dim)``."""
        found = [row[self.info.field] for row in rows]
        return np.asarray(found, dtype=np.float32).reshape(len(found), self.info.dim)

    @property
    def vector_is_nullable(self) -> bool:
        """Whether there may be rows without a vector."""
        fields = {field["name"]: field for field in self.raw["fields"]}
        return bool(fields[self.info.field].get("nullable"))

    def has_vector(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row is a key: newer servers have rows whose vector is null.

        Milvus Lite hands such a vector out as zeros, as it stores it.
        """
        vector = row[self.info.field]
        if vector is None or not (self.is_lite and self.vector_is_nullable):
            return vector is not None
        return any(vector)

    @property
    def has_sketches(self) -> bool:
        """Whether a sketch of its vector lies beside a key's cell."""
        return any(field["name"] == SKETCH_FIELD for field in self.raw["fields"])

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete ids wherever they lie."""
        if not ids:
            return
        for some in _chunks(ids, _MAX_IDS):
            # pymilvus would put string ids between quotes as they are, quotes and backslashes too.
            self.client.delete(self.name, filter=self.where_ids(some))
        if self.is_lite:
            self.client.flush(self.name)

    def delete_in(self, partition: str, ids: Sequence[Id]) -> None:
        """Delete ids in one partition; a server's other rows of them stay."""
        for some in _chunks(ids, _MAX_IDS):
            self.client.delete(self.name, filter=self.where_ids(some), partition_name=partition)

    def bare(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row as its writer knows it: without its cell and what Milvus computes."""
        computed = {f["name"] for f in self.raw["fields"] if f.get("is_function_output")}
        left_out = {*_OURS, *computed}
        return {name: row[name] for name in row if name not in left_out}


@lru_cache(maxsize=64)
def _without_cells(cells: CellProperties, there: tuple[str, ...]) -> tuple[str, ...]:
    named = {cells.partition(cell) for cell in range(cells.n_cells)}
    return (DEFAULT_PARTITION, *sorted(set(there) - named - {DEFAULT_PARTITION}))


def _chunks(ids: Sequence[Id], size: int) -> Iterator[Sequence[Id]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
