"""Milvus' own partitions, or the values of a field, as the cells of a plan."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from amips_plugins.adapters.given import GivenLayouts
from amips_plugins.adapters.milvus.cells import DEFAULT_PARTITION
from amips_plugins.adapters.milvus.recent import Recent
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.collection import Cursor, KeyBatch
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions, column

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["InPartitions", "scan_given"]

_TELLING = ("VARCHAR", "INT8", "INT16", "INT32", "INT64")


class InPartitions:
    """The part of ``MilvusCollection`` that sees it in its users' own partitions."""

    _given: Partitions | None = None
    _table: Table | None
    _recent: Recent

    def table(self) -> Table:
        """Return the physical collection."""
        raise NotImplementedError

    @property
    def partitions(self) -> Partitions | None:
        """The users' own partitions that it takes for cells, or None."""
        return self._given

    def partitioned(self, partitions: Partitions | None) -> Self:
        """Return an object of the same collection in its users' own partitions."""
        if partitions is not None:
            check_given(self.table(), partitions)
        view = copy.copy(self)
        view._given, view._recent = partitions, Recent()
        view._table = replace(self.table(), given=partitions)
        return view

    def given_layouts(self, given: Partitions) -> GivenLayouts:
        """Return what says how many keys each of the partitions has."""
        table = self.table()
        return GivenLayouts(table, given, lambda: count_given(table, given))


def check_given(table: Table, given: Partitions) -> None:
    """Raise ``InvalidInput`` where a collection cannot be told apart by these partitions."""
    fields, name = table.raw["fields"], table.name
    if given.field is None:
        if table.has_partition_key:
            key = next(field["name"] for field in fields if field.get("is_partition_key"))
            raise InvalidInput(
                f"Milvus itself assigns the partitions of {name!r} by a hash of its partition key; "
                f"name that field, {key!r}."
            )
        if table.in_partitions or not table.own_partitions():
            raise InvalidInput(f"{name!r} has no partitions of its users'; name a field.")
        return
    kind = table.info.schema.get(given.field)
    dynamic = kind is None and table.raw.get("enable_dynamic_field") and given.field.isidentifier()
    if not dynamic and kind not in _TELLING:
        known = [one for one, kind in table.info.schema.items() if kind in _TELLING]
        raise InvalidInput(
            f"{name!r} has no field {given.field!r} of texts or whole numbers; name one of: "
            f"{', '.join(known)}."
        )


def scan_given(
    table: Table, given: Partitions, limit: int, max_bytes: int, after: Cursor | None
) -> Iterator[KeyBatch]:
    """Read every row with a vector, and where it belongs; partition by partition, if it is these.

    The cursor of those is the partition and the id behind which to go on, as JSON.
    """
    fields = [table.key, table.info.field]
    if given.field is not None:
        for rows in table.pages(limit, max_bytes, [*fields, given.field], after):
            keys = [row for row in rows if table.has_vector(row)]
            if keys:
                ids, vectors = [row[table.key] for row in keys], table.vectors(keys)
                values = column(given.field, keys)
                yield KeyBatch(ids, vectors, rows[-1][table.key], values)
        return
    first, behind = ("", None) if after is None else json.loads(str(after))
    for partition in sorted(table.partitions()):
        if partition < first:
            continue
        begin = behind if partition == first else None
        for rows in table.pages(limit, max_bytes, fields, begin, partitions=[partition]):
            keys = [row for row in rows if table.has_vector(row)]
            if keys:
                ids, cursor = [row[table.key] for row in keys], rows[-1][table.key]
                value = None if partition == DEFAULT_PARTITION else partition
                yield KeyBatch(
                    ids,
                    table.vectors(keys),
                    json.dumps([partition, cursor]),
                    [value] * len(ids),
                )


def count_given(table: Table, given: Partitions) -> Sequence[int]:
    """Count the rows of every value; of a partition that is gone there are none."""
    if given.field is not None:
        return [table.count(table.has_values([value])) for value in given.values]
    there = set(table.partitions())
    return [table.count(partitions=[str(value)]) if value in there else 0 for value in given.values]
