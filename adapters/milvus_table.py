"""One physical collection of Milvus: what it is, its rows, and where they lie.

A laid-out collection says so in the properties it was created with (a server forgets properties
altered later when it restarts). Its cells are partitions, with the overflow in Milvus' own
``_default``, or values of the field ``amips_cell``, where the overflow is -1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.base import CollectionInfo, Cursor, Id
from amips_plugins.adapters.grouping import OVERFLOW
from amips_plugins.adapters.layouts import Storage
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
)
from amips_plugins.vectors import FloatArray, IntArray, Metric

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["BUILDING", "CELL_FIELD", "Cells", "Table", "draining", "generation_of", "open_table"]

CELL_FIELD = "amips_cell"
BUILDING = "__building_"  # in the name of a copy that is not complete

_METRICS = {"IP": Metric.IP, "COSINE": Metric.COSINE, "L2": Metric.L2}
_DEFAULT = "_default"  # where Milvus puts a row that names no partition
_GENERATION = re.compile(r"(.*)__g(\d+)")
_PROPERTY = "amips."
_MAX_PAGE = 16_384  # rows Milvus returns for one query
_FIRST_PAGE = 256
_WRITE_BYTES = 8 << 20  # the fields beside the vector come on top
_MAX_IDS = 5_000  # in one expression


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of a laid-out table, as its properties name them.

    Attributes
    ----------
    layout, n_cells, version, storage
        As in ``LayoutSpec``.
    source
        The collection it was copied from.
    index
        As in ``LayoutSpec``.
    """

    layout: str
    n_cells: int
    version: str
    storage: Storage
    source: str
    index: str

    def properties(self) -> dict[str, str]:
        """Write them as properties of a collection."""
        return {f"{_PROPERTY}{name}": str(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def read(cls, properties: Mapping[str, str]) -> Cells | None:
        """Read what ``properties`` wrote, or None."""
        found = {name: properties.get(f"{_PROPERTY}{name}") for name in cls.__slots__}
        storage = found["storage"]
        if storage not in ("partitions", "field") or not str(found["n_cells"]).isdigit():
            return None
        return cls(
            layout=str(found["layout"]),
            n_cells=int(str(found["n_cells"])),
            version=found["version"] or "",
            storage="partitions" if storage == "partitions" else "field",
            source=found["source"] or "",
            index=found["index"] or "FLAT",
        )

    def partition(self, cell: int) -> str:
        """Return the partition of a cell, the overflow's too."""
        return _DEFAULT if cell == OVERFLOW else f"cell_{self.layout}_{cell:04d}"


@dataclass(frozen=True, slots=True)
class Table:
    """One physical collection; every answer includes what was acknowledged before the call.

    Attributes
    ----------
    client
        An open client.
    info
        What the collection is.
    raw
        Milvus' own description of it.
    key
        Name of the primary key.
    string_keys
        Whether the ids are strings.
    is_lite
        Whether it lies in a file of Milvus Lite.
    cells
        Its cells, complete or being built; None without.
    """

    client: MilvusClient
    info: CollectionInfo
    raw: Mapping[str, Any]
    key: str
    string_keys: bool
    is_lite: bool
    cells: Cells | None

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
        return sorted(p for p in self.partitions() if p != _DEFAULT and not ours.fullmatch(p))

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
            return "", [_DEFAULT]
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
        widest = 1.0
        end: Cursor | None = None
        while end is None or after != end:
            behind = "" if after is None else f"{self.key} > {_literal(after)}"
            until = "" if end is None else f"{self.key} <= {_literal(end)}"
            # These are the requests of pymilvus' QueryIterator, whose flag makes Milvus order the
            # rows by id (a plain query of Milvus Lite does not); its own cursor quotes no strings.
            rows = self.client.query(
                self.name,
                filter=_all_of(behind, until, where),
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
            after = rows[-1][self.key]
            yield from (list(rows[row : row + limit]) for row in range(0, len(rows), limit))
            if end is None and len(rows) < asked:
                end = self._end(after, where, partitions)
            # A server answers with up to ``asked`` rows of every segment, so ask for fewer where
            # there are many, and find that out with a small page.
            widest = max(widest, len(rows) / asked)
            asked = min(2 * asked, max(1, int(limit / widest)))

    def _end(self, after: Cursor, where: str, partitions: Sequence[str] | None) -> Cursor | None:
        """Return the last id where few are left, or reading might follow a busy writer for ever.

        A page that is not full does not say so: a server ends it where one segment ends.
        """
        rows = self.client.query(
            self.name,
            filter=_all_of(f"{self.key} > {_literal(after)}", where),
            output_fields=[self.key],
            limit=_MAX_PAGE,
            partition_names=partitions,
            consistency_level="Strong",
        )
        left = [row[self.key] for row in rows]
        return max(left, default=after) if len(left) < _MAX_PAGE else None

    def read(
        self, ids: Sequence[Id], fields: Sequence[str] = ("*",), where: str = ""
    ) -> dict[Id, dict[str, Any]]:
        """Read rows by their ids."""
        return self._read(ids, fields, where, None)

    def read_overflow(self, ids: Sequence[Id]) -> dict[Id, dict[str, Any]]:
        """Read those of the rows that are overflow."""
        where, partitions = self.overflow_scope()
        return self._read(ids, ["*"], where, partitions)

    def which(self, ids: Sequence[Id]) -> set[Id]:
        """Return those of the ids that are there."""
        return set(self._read(ids, [self.key], "", None))

    def _read(
        self, ids: Sequence[Id], fields: Sequence[str], where: str, partitions: list[str] | None
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
        dynamic fields, and a copy in another partition with it.

        Parameters
        ----------
        rows
            Whole rows, each id once.
        cells
            Their cells; None for rows of a table without.
        new
            No row of these ids is there, in no partition.
        moved
            The rows are in the overflow now.
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
        put = self.client.insert if new or self.is_lite else self.client.upsert
        if self.is_lite and not new and self.count(self.where_ids(ids)):
            self.delete(ids)
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
        if moved and not self.is_lite:
            self.delete_in(OVERFLOW, ids)
        if not new and not self.is_lite and self.count(self.where_ids(ids)) > len(ids):
            self._delete_elsewhere(ids, cells)

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
        self.client.delete(self.name, ids=list(ids), partition_name=self.cells.partition(cell))

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete ids wherever they lie."""
        if not ids:
            return
        for some in _chunks(ids, _MAX_IDS):
            self.client.delete(self.name, ids=list(some))
        if self.is_lite:
            self.client.flush(self.name)

    def bare(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row as its writer knows it: without its cell and what Milvus computes."""
        computed = {f["name"] for f in self.raw["fields"] if f.get("is_function_output")}
        return {name: row[name] for name in row if name != CELL_FIELD and name not in computed}


def open_table(client: MilvusClient, name: str, field: str | None = None) -> Table:
    """Find out what a collection, or an alias of one, is.

    Raises
    ------
    CollectionNotFound
        There is no such collection or alias.
    FieldNotFound
        There is no such vector field, or several and none was named.
    MetricNotSupported
        The index compares otherwise than by IP, COSINE or L2.
    CollectionError
        The field has no index, or a server has not loaded the collection.
    """
    if not client.has_collection(name):
        names = ", ".join(sorted(client.list_collections())) or "none"
        raise CollectionNotFound(
            f"Milvus has no collection {name!r}; it has: {names}. Correct the name."
        )
    raw = client.describe_collection(name)
    name = raw["collection_name"]
    vector = _vector_field(raw["fields"], name, field)
    metric = _metric(client, name, vector["name"])
    key = next(entry for entry in raw["fields"] if entry.get("is_primary"))
    is_lite = str(client.get_server_version()).startswith("milvus_lite")
    if client.get_load_state(name)["state"].name == "NotLoad":
        if not is_lite:  # how much memory a server spends is its operator's to decide
            raise CollectionError(
                f"Collection {name!r} is not loaded; call client.load_collection({name!r})."
            )
        client.load_collection(name)
    schema = {
        entry["name"]: entry["type"].name for entry in raw["fields"] if entry["name"] != CELL_FIELD
    }
    dim = int(vector["params"]["dim"])
    info = CollectionInfo("milvus", name, vector["name"], metric, dim, schema)
    cells = Cells.read(raw.get("properties") or {})
    return Table(client, info, raw, key["name"], key["type"].name == "VARCHAR", is_lite, cells)


def draining(target: str) -> str:
    """Return the alias that names the source of a switch while late writes are copied from it."""
    return f"{target}__draining"


def generation_of(name: str) -> tuple[str, int]:
    """Split the name of a generation: ``docs__g3`` is number 3 of ``docs``, itself number 1."""
    match = _GENERATION.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 1)


def _vector_field(
    fields: Sequence[Mapping[str, Any]], name: str, wanted: str | None
) -> Mapping[str, Any]:
    vectors = {field["name"]: field for field in fields if field["type"].name == "FLOAT_VECTOR"}
    if wanted is None and len(vectors) == 1:
        return next(iter(vectors.values()))
    if wanted is not None and wanted in vectors:
        return vectors[wanted]
    names = ", ".join(sorted(vectors)) or "none"
    if wanted is None:
        raise FieldNotFound(
            f"Collection {name!r} has {len(vectors)} float vector fields ({names}); "
            f"name the one to search."
        )
    raise FieldNotFound(
        f"Collection {name!r} has no float vector field {wanted!r}; it has: {names}."
    )


def _metric(client: MilvusClient, name: str, field: str) -> Metric:
    indexes = client.list_indexes(name, field_name=field)
    if not indexes:
        raise CollectionError(
            f"Field {field!r} of collection {name!r} has no index, which is where Milvus keeps "
            f"the metric; create one with client.create_index."
        )
    metric = str(client.describe_index(name, indexes[0]).get("metric_type")).upper()
    if metric not in _METRICS:
        raise MetricNotSupported(
            f"Field {field!r} of collection {name!r} compares by {metric}; "
            f"use an index with one of {', '.join(_METRICS)}."
        )
    return _METRICS[metric]


def _all_of(*conditions: str) -> str:
    return " and ".join(f"({condition})" for condition in conditions if condition)


def _literal(key: Cursor) -> str:
    return json.dumps(key, ensure_ascii=False)


def _chunks(ids: Sequence[Id], size: int) -> Iterator[Sequence[Id]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
