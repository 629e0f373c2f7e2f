"""Milvus: Milvus Lite and the server, both through ``pymilvus.MilvusClient``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.describe import with_cells
from amips_plugins.adapters.milvus.cells import BUILDING, is_ours
from amips_plugins.adapters.milvus.describe import describe_milvus
from amips_plugins.adapters.milvus.failures import failure_of_search
from amips_plugins.adapters.milvus.given import scan_given
from amips_plugins.adapters.milvus.layouts import MilvusLayouts
from amips_plugins.adapters.milvus.opening import (
    draining_source,
    looks_at_all,
    open_client,
    open_table,
)
from amips_plugins.adapters.milvus.recent import Recent
from amips_plugins.adapters.milvus.search import (
    MAX_CANDIDATES,
    changed_meaning,
)
from amips_plugins.adapters.milvus.searched_table import SearchedTable
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.adapters.milvus.writing import write_rows
from amips_plugins.adapters.plain_ids import plain_ids
from amips_plugins.collection import (
    CollectionInfo,
    Cursor,
    Failure,
    Id,
    KeyBatch,
    SearchRequest,
    check_keys,
)
from amips_plugins.collection.construction import Construction
from amips_plugins.errors import CollectionNotFound
from amips_plugins.vectors import FloatArray, IntArray

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["MilvusCollection"]

_PAGE_BYTES = 32 << 20  # well under the 100 MB of one answer


class MilvusCollection(SearchedTable):
    """A vector field of a Milvus collection. Constructing it asks the database nothing.

    An alias is followed once, at the first use: the object then stays on that collection, so that
    a moved alias never mixes two generations. ``info.name`` is the collection's own name.
    Make the client, and this object, in the process that uses them: gRPC may fail in a fork.

    Parameters
    ----------
    client
        An open client; it stays the caller's to close.
    name
        Name or alias of the collection.
    field
        The vector field; may be left out where there is only one.

    Examples
    --------
    >>> from pymilvus import MilvusClient  # doctest: +SKIP
    >>> collection = MilvusCollection(MilvusClient("docs.db"), "docs")  # doctest: +SKIP
    >>> collection.info.metric  # doctest: +SKIP
    <Metric.COSINE: 'cosine'>
    """

    def __init__(self, client: MilvusClient, name: str, field: str | None = None) -> None:
        self.client = client
        self._name = name
        self._field = field
        self._own: tuple[str, str | None, str] | None = None
        self._table: Table | None = None
        self._recent = Recent()

    @classmethod
    def connect(
        cls,
        address: str,
        name: str,
        field: str | None = None,
        token: str | None = None,
        database: str = "",
    ) -> MilvusCollection:
        """Open a client for one collection; ``close`` closes it.

        Parameters
        ----------
        address
            Path of a Milvus Lite database, ending in ``.db``, or ``http(s)://host:port``.
        name
            Name or alias of the collection.
        field
            The vector field; may be left out where there is only one.
        token
            ``"user:password"`` or an API key; None where the server asks for none.
        database
            A database of the server or the file; empty for the default one.

        Raises
        ------
        MissingExtra
            pymilvus, or milvus-lite for a path, is not installed.
        CollectionNotFound
            The path does not exist (no empty file is created), or there is no such database in it.
        DatabaseUnreachable
            No server answers, or the file cannot be opened.
        InvalidInput
            The address is neither a path nor a URL.
        """
        collection = cls(open_client(address, token, database), name, field)
        collection._own = (address, token, database)
        return collection

    @property
    def info(self) -> CollectionInfo:
        """What the collection is; the first use asks the database.

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
        return self.table().info

    def table(self) -> Table:
        """Return the physical collection, found out at the first use."""
        if self._table is None:
            found = open_table(self.client, self._name, self._field)
            self._table = replace(found, given=self._given)
        return self._table

    @property
    def break_even(self) -> float:
        """Share of the keys above which a full scan is cheaper (docs/performance.md)."""
        table = self.table()
        if table.is_lite:  # it loops over the rows in scope, so fewer are always cheaper
            return 1.0
        if table.given is not None:  # the native search goes through all of the partitions, too
            return 1.0 if table.by_partitions or table.has_partition_key else 0.1
        return 0.1 if table.cells is not None and table.cells.storage == "field" else 0.5

    @property
    def exhaustive(self) -> bool:
        """Whether ``exact`` looks at every key: with FLAT and IVF_FLAT."""
        return looks_at_all(self.recent_index())

    @property
    def alias(self) -> str | None:
        """The alias by which the collection was opened, or None."""
        return None if self._name == self.table().name else self._name

    def path(self) -> Path | None:
        """Return the folder of a Milvus Lite file, or None where that is not known."""
        return Path(self._own[0]).parent if self._own and self.table().is_lite else None

    @property
    def timeout(self) -> float | None:
        """None: a Milvus client gives a call all the time, unless the call names a timeout."""
        return None

    @property
    def max_candidates(self) -> int | None:
        """How many candidates a rewritten query may fetch, an offset included."""
        return None if self.table().is_lite else MAX_CANDIDATES

    def describe(self) -> Construction:
        """Say how the collection is built; nothing is changed."""
        return with_cells(self, describe_milvus(self.table()))

    def failure(self, exc: BaseException) -> Failure:
        """Say what an error of a search, through either client, means."""
        return failure_of_search(exc)

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:  # noqa: ARG002 - the same for both
        """Name the parameter that asks for more than the k best hits behind an offset, or None."""
        return changed_meaning(request.params)

    def current(self) -> MilvusCollection:
        """Return this object, or one for the collection that the alias names now."""
        if not self.client.has_collection(self._name):
            raise CollectionNotFound(f"Milvus has no collection {self._name!r} any more.")
        found = self.client.describe_collection(self._name)
        table = self.table()
        # There may be another collection under the old name. Milvus Lite numbers none: there it
        # shows only where the fields are others.
        same = ("collection_name", "collection_id", "fields")
        if all(found[what] == table.raw[what] for what in same):
            return self
        other = type(self)(self.client, self._name, self.info.field)
        other._given = self._given
        return other

    def sibling(self, name: str) -> MilvusCollection:
        """Return another collection of this database."""
        if self._own is None:
            return type(self)(self.client, name, self.info.field)
        # pymilvus shares the connection; each object closes its own.
        address, token, database = self._own
        return type(self).connect(address, name, self.info.field, token, database)

    def count(self) -> int:
        """Return the number of keys, with every write acknowledged before this call."""
        return self.table().count_keys()

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every row with a vector once, in the order of the ids, behind the id ``after``.

        A batch may be smaller than ``batch_size``, so that one answer stays within what Milvus
        sends. It is not a snapshot: a key written meanwhile may appear, a deleted one vanish.

        Raises
        ------
        InvalidInput
            ``batch_size`` is under 1, or ``after`` is not an id of this collection's kind.
        """
        table = self.table()
        if table.given is not None:
            yield from scan_given(table, table.given, batch_size, _PAGE_BYTES, after)
            return
        for rows in table.pages(batch_size, _PAGE_BYTES, [table.key, table.info.field], after):
            keys = [row for row in rows if table.has_vector(row)]
            if keys:
                yield KeyBatch(
                    [row[table.key] for row in keys], table.vectors(keys), rows[-1][table.key]
                )

    def fetch(self, ids: Sequence[Id]) -> KeyBatch:
        """Read those of the keys that are there, with every write acknowledged before."""
        table = self.table()
        found = table.read(self._plain(ids), [table.key, table.info.field]).values()
        rows = [row for row in found if table.has_vector(row)]
        return KeyBatch([row[table.key] for row in rows], table.vectors(rows))

    def upsert(
        self,
        ids: Sequence[Id],
        vectors: FloatArray,
        fields: Sequence[Mapping[str, Any]] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        """Write keys into their cells, in place of those with the same ids wherever they lie.

        Without ``cells`` they are overflow. ``fields`` has to bring every field of the schema that
        has no default. An old row goes when the new one has been accepted; on Milvus Lite, for a
        moment, neither is in a search.
        """
        table = self.table()
        ids = self._plain(ids)
        shared = table.shares_keys
        check_keys(table.info.dim, self.layout(), ids, vectors, fields, cells, shared=shared)
        stored = fields if fields is not None else [{}] * len(ids)
        rows = [
            {
                **{name: value for name, value in more.items() if not is_ours(name)},
                table.key: key,
                table.info.field: vector,
            }
            for key, vector, more in zip(ids, vectors, stored, strict=True)
        ]
        source = draining_source(table)
        if source is not None:
            write_rows(source, rows, None if source.cells is None else np.full(len(rows), OVERFLOW))
        write_rows(table, rows, cells)

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete keys; ids that are not there are none of its business."""
        table = self.table()
        ids = self._plain(ids)
        source = draining_source(table)
        if source is not None:
            source.delete(ids)
        table.delete(ids)

    def _plain(self, ids: Sequence[Id]) -> list[Id]:
        return plain_ids(ids, [""] if self.table().string_keys else [0])

    def overflow(self) -> int:
        """Return the number of keys without a cell; 0 without a layout."""
        return self.table().overflow() if self.layout() else 0

    def layout(self) -> str | None:
        """Return the identifier of the cells, or None."""
        if self._given is not None:
            return self._given.layout
        cells = self.table().cells
        return None if cells is None or BUILDING in self.table().name else cells.layout

    @property
    def layouts(self) -> MilvusLayouts:
        """Builds, shows, mends and takes back the cells."""
        if self._given is not None:
            return self.given_layouts(self._given)  # type: ignore[return-value]  # has all of it
        return MilvusLayouts(self)

    def __enter__(self) -> MilvusCollection:
        """Return the collection itself; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the client if ``connect`` opened it; safe to call twice."""
        if self._own is not None:
            self.client.close()
