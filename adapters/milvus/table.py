"""One physical collection of Milvus: what it is, its rows, and where they lie."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.milvus.cells import CELL_FIELD, DEFAULT_PARTITION, CellProperties
from amips_plugins.adapters.milvus.row_changes import encoded
from amips_plugins.collection import CollectionInfo, Cursor, Id
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.vectors import FloatArray, IntArray

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["Table"]

_MAX_PAGE = 16_384  # rows Milvus returns for one query
_FIRST_PAGE = 256
_ANSWER_BYTES = 16 << 20  # of the 64 MiB that a server sends at most; rows differ
_WRITE_BYTES = 8 << 20  # the fields beside the vector come on top
_MAX_IDS = 5_000  # in one expression
_CONTESTS = 10  # times that one key is fought for with other writers
_TICK_SECONDS = 0.2  # in which a server answers two strongly consistent readers at once


@dataclass(frozen=True, slots=True)
class Table:
    """One physical collection; every answer includes what was acknowledged before the call.

    ``raw`` is Milvus' own description of it, ``key`` the primary key's name, ``is_lite`` whether
    it lies in a file, ``cells`` its cells, complete or being built.
    """

    client: MilvusClient
    info: CollectionInfo
    raw: Mapping[str, Any]
    key: str
    string_keys: bool
    is_lite: bool
    cells: CellProperties | None

    @property
    def name(self) -> str:
        """The collection's own name, never an alias."""
        return self.info.name

    def partitions(self) -> list[str]:
        """Return the names of its partitions."""
        return [str(name) for name in self.client.list_partitions(self.name)]

    def own_partitions(self) -> list[str]:
        """Return the partitions that are neither Milvus' default nor cells, sorted."""
        ours = re.compile(r"cell_[a-z0-9]{1,16}_\d{4}")
        return sorted(
            p for p in self.partitions() if p != DEFAULT_PARTITION and not ours.fullmatch(p)
        )

    def count(self, where: str = "", partitions: Sequence[str] | None = None) -> int:
        """Count rows; one that lies in two partitions counts twice (Milvus Lite: once)."""
        if partitions is not None and not where:  # Milvus Lite would count the whole collection
            where = (
                f'{self.key} >= ""' if self.string_keys else f"{self.key} < 0 or {self.key} >= 0"
            )
        rows = self.client.query(
            self.name,
            filter=where,
            output_fields=["count(*)"],
            partition_names=partitions,
            consistency_level="Strong",
        )
        return int(rows[0]["count(*)"])

    def overflow(self) -> int:
        """Count the rows without a cell."""
        where, partitions = self.overflow_scope()
        return self.count(where, partitions) if self.cells else 0

    def overflow_scope(self) -> tuple[str, list[str] | None]:
        """Return the filter and the partitions that hold the overflow, and nothing else."""
        if self.cells is None or self.cells.storage == "partitions":
            return "", [DEFAULT_PARTITION]
        return f"{CELL_FIELD} == {OVERFLOW}", None

    def where_ids(self, ids: Sequence[Id]) -> str:
        """Write a filter for ids."""
        # Milvus reads JSON's escapes, but not its \uXXXX for what can stand for itself.
        return f"{self.key} in {json.dumps(list(ids), ensure_ascii=False)}"

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
        mixed = partitions is None and self._in_partitions
        widest = 1.0
        if not self.is_lite:
            # With the flag of an iterator, pymilvus drops the consistency level asked for, and the
            # collection's own may be seconds behind: have the server catch up first.
            self.count()
        while True:
            behind = "" if after is None else f"{self.key} > {_literal(after)}"
            # These are the requests of pymilvus' QueryIterator, whose flag makes Milvus order the
            # rows by id (a plain query of Milvus Lite does not); its own cursor quotes no strings.
            rows = self.client.query(
                self.name,
                filter=_all_of(behind, where),
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
                some = list(rows[row : row + limit])
                yield self._newest(some, before, fields, where) if mixed else some
                before = some[-1][self.key]
            if len(rows) < asked:
                left = self._left(after, where, partitions)
                if left is not None:
                    size = max(1, min(limit, _MAX_IDS, _ANSWER_BYTES // self._row_bytes(rows)))
                    for ids in _chunks(left, size):
                        found = self._read(ids, fields, where, partitions)
                        if mixed:
                            found |= self._read(ids, fields, where, [DEFAULT_PARTITION])
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
    def _in_partitions(self) -> bool:
        return self.cells is not None and self.cells.storage == "partitions"

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
        behind = "" if after is None else f"{self.key} > {_literal(after)}"
        until = f"{self.key} <= {_literal(rows[-1][self.key])}"
        newer = self.client.query(
            self.name,
            filter=_all_of(behind, until, where),
            output_fields=list(fields),
            limit=len(rows),
            partition_names=[DEFAULT_PARTITION],
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
        rows = self.client.query(
            self.name,
            filter=_all_of(f"{self.key} > {_literal(after)}", where),
            output_fields=[self.key],
            limit=_MAX_PAGE,
            partition_names=partitions,
            consistency_level="Strong",
        )
        return sorted({row[self.key] for row in rows}) if len(rows) < _MAX_PAGE else None

    def read(self, ids: Sequence[Id], fields: Sequence[str] = ("*",)) -> dict[Id, dict[str, Any]]:
        """Read rows by their ids."""
        found = self._read(ids, fields, "", None)
        if self._in_partitions:  # others may have upserted beside a row in a cell
            found |= self._read(ids, fields, "", [DEFAULT_PARTITION])
        return found

    def read_overflow(self, ids: Sequence[Id]) -> dict[Id, dict[str, Any]]:
        """Read those of the rows that are overflow."""
        where, partitions = self.overflow_scope()
        return self._read(ids, ["*"], where, partitions)

    def which(self, ids: Sequence[Id]) -> set[Id]:
        """Return those of the ids that are there."""
        return set(self._read(ids, [self.key], "", None))

    def _read(
        self,
        ids: Sequence[Id],
        fields: Sequence[str],
        where: str,
        partitions: Sequence[str] | None,
    ) -> dict[Id, dict[str, Any]]:
        found: dict[Id, dict[str, Any]] = {}
        for some in _chunks(ids, _MAX_IDS):
            rows = self.client.query(
                self.name,
                filter=_all_of(self.where_ids(some), where),
                output_fields=list(fields),
                partition_names=partitions,
                consistency_level="Strong",
            )
            found |= {row[self.key]: row for row in rows}
        return found

    def vectors(self, rows: Sequence[Mapping[str, Any]]) -> FloatArray:
        """Return the vectors of rows, ``(n, dim)``."""
        return np.asarray([row[self.info.field] for row in rows], dtype=np.float32)

    def write(
        self,
        rows: Sequence[dict[str, Any]],
        cells: IntArray | None,
        *,
        new: bool = False,
        moved: bool = False,
    ) -> None:
        """Put rows into their cells, in place of rows with the same ids wherever they lie.

        The new row is there before the old one goes, so that a writer that dies in between loses
        nothing. Milvus Lite does it the other way round: there an upsert keeps the old row's
        dynamic fields, and a copy in another partition with it. ``new`` says that no such row is
        there, ``moved`` that the rows are in the overflow now.
        """
        size = max(1, min(_MAX_IDS, _WRITE_BYTES // (4 * self.info.dim + 256)))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            chosen = np.full(len(some), OVERFLOW) if cells is None else cells[start : start + size]
            self._write(some, chosen, new=new, moved=moved)

    def _write(
        self, rows: Sequence[dict[str, Any]], cells: IntArray, *, new: bool, moved: bool
    ) -> None:
        ids = [row[self.key] for row in rows]
        if self.is_lite and not new and self.count(self.where_ids(ids)):
            self.delete(ids)
        self._put(rows, cells, new=new)
        if not self._in_partitions or self.is_lite:
            return
        if moved:
            self.delete_in(OVERFLOW, ids)
        if not new:
            self._keep_one(rows, cells)

    def _put(self, rows: Sequence[dict[str, Any]], cells: IntArray, *, new: bool = False) -> None:
        put = self.client.insert if new or self.is_lite else self.client.upsert
        if self.cells is None:
            put(self.name, list(rows))
            return
        if self.cells.storage == "field":
            pairs = zip(rows, cells.tolist(), strict=True)
            put(self.name, [{**row, CELL_FIELD: cell} for row, cell in pairs])
            return
        for cell in np.unique(cells).tolist():
            here = [rows[place] for place in np.flatnonzero(cells == cell).tolist()]
            put(self.name, here, partition_name=self.cells.partition(cell))

    def _keep_one(self, rows: Sequence[dict[str, Any]], cells: IntArray) -> None:
        """Delete the copies that rows just written have in other cells.

        Two writers who move one key at the same time take each the other's row for such a copy,
        and both rows are gone. So whoever has deleted looks again, and writes again if need be.
        """
        ids = [row[self.key] for row in rows]
        for attempt in range(_CONTESTS):
            if self.count(self.where_ids(ids)) <= len(ids):
                return
            self._delete_elsewhere(ids, cells)
            if len(self.which(ids)) == len(ids):
                return
            time.sleep(random.uniform(0.0, _TICK_SECONDS * 2**attempt))  # noqa: S311 - to take turns
            there = self.which(ids)
            gone = [place for place, key in enumerate(ids) if key not in there]
            self._put([rows[place] for place in gone], cells[gone])
        raise CollectionError(
            f"Others write some of these keys of {self.name!r} all the time; write them again."
        )

    def _delete_elsewhere(self, ids: Sequence[Id], cells: IntArray) -> None:
        # Nothing says where a row lies, so every partition is told which ids are not its own.
        assert self.cells is not None  # noqa: S101 - for the type checker
        for cell in range(OVERFLOW, self.cells.n_cells):
            strange = [ids[place] for place in np.flatnonzero(cells != cell).tolist()]
            if strange:
                self.delete_in(cell, strange)

    def delete_in(self, cell: int, ids: Sequence[Id]) -> None:
        """Delete ids in the partition of one cell; a server's other copies stay."""
        assert self.cells is not None  # noqa: S101 - for the type checker
        partition = self.cells.partition(cell)
        self.client.delete(self.name, filter=self.where_ids(ids), partition_name=partition)

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete ids wherever they lie."""
        if not ids:
            return
        for some in _chunks(ids, _MAX_IDS):
            # pymilvus would put string ids between quotes as they are, quotes and backslashes too.
            self.client.delete(self.name, filter=self.where_ids(some))
        if self.is_lite:
            self.client.flush(self.name)

    def bare(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row as its writer knows it: without its cell and what Milvus computes."""
        computed = {f["name"] for f in self.raw["fields"] if f.get("is_function_output")}
        return {name: row[name] for name in row if name != CELL_FIELD and name not in computed}


def _all_of(*conditions: str) -> str:
    return " and ".join(f"({condition})" for condition in conditions if condition)


def _literal(key: Cursor) -> str:
    return json.dumps(key, ensure_ascii=False)


def _chunks(ids: Sequence[Id], size: int) -> Iterator[Sequence[Id]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
