"""Milvus: Milvus Lite and the server, both through ``pymilvus.MilvusClient``."""

from __future__ import annotations

import asyncio
import time
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
from amips_plugins.adapters.milvus.given import InPartitions, scan_given
from amips_plugins.adapters.milvus.layouts import MilvusLayouts
from amips_plugins.adapters.milvus.opening import (
    describe_index,
    draining_source,
    looks_at_all,
    open_client,
    open_table,
    widest_params,
)
from amips_plugins.adapters.milvus.recent import Recent
from amips_plugins.adapters.milvus.search import (
    MAX_CANDIDATES,
    Call,
    all_or_none,
    as_hits,
    changed_meaning,
    plan_calls,
    score_calls,
    scored_by_ids,
    time_left,
)
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.adapters.milvus.writing import write_rows
from amips_plugins.adapters.plain_ids import plain_ids
from amips_plugins.cell_layout import Construction
from amips_plugins.collection import (
    CollectionInfo,
    Cursor,
    Failure,
    Hit,
    Id,
    KeyBatch,
    SearchRequest,
    check_keys,
    check_layout,
)
from amips_plugins.errors import CollectionNotFound
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray, IntArray

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["MilvusCollection"]

_AT_ONCE = 8  # calls of one search: a batch is not to push everybody else aside
_PAGE_BYTES = 32 << 20  # well under the 100 MB of one answer


class MilvusCollection(InPartitions):
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
        return self.table().count()

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
        check_keys(table.info.dim, self.layout(), ids, vectors, fields, cells)
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

    def partition_names(self, name: str | None = None, timeout: float | None = None) -> list[str]:
        """Return the partitions, on a server as of a second ago; none where they do not matter.

        Milvus Lite is asked by the ``name`` to be searched: nothing else there sees an alias move.
        """
        table = self.table()
        return self._recent.partitions(table, name or table.name, timeout)

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

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search by a plan, in one call for all queries that search the same cells.

        ``request.filter`` is a Milvus expression; ``request.params`` are search parameters such
        as ``{"nprobe": 16}``. Milvus Lite ignores ``request.timeout``.

        Raises
        ------
        InvalidInput
            The filter is no expression, ``params`` name another metric than the index, or the
            plan counts the cells of another layout.
        CollectionError
            Milvus Lite has lost a cell's partition; a server says so by an error of its own.
        """
        table = self.table()
        check_layout(plan, self.layout(), table.name)
        started = time.monotonic()
        there = None
        if plan.cells is not None:
            there = self.partition_names(timeout=time_left(request.timeout, started))
        calls = plan_calls(request, plan, table, self.break_even, there)

        def ask(asked: Sequence[Call]) -> list[Any]:
            return [
                self.client.search(**call.arguments, timeout=time_left(request.timeout, started))
                for call in asked
            ]

        answers = ask(calls)
        if scored_by_ids(plan, table):
            calls = score_calls(request, plan, table, calls, answers, self.recent_index())
            answers = ask(calls)
        return as_hits(request, plan, table, calls, answers)

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search as widely as the index can, all partitions of a layout included.

        That is exact for FLAT and for IVF with whole vectors. Graphs (HNSW, DISKANN) and compressed
        vectors get the longest list of candidates that a server takes.
        """
        offset = {k: v for k, v in (request.params or {}).items() if k == "offset"}
        table = self.table()
        params = widest_params(describe_index(table), request.k, is_lite=table.is_lite)
        return self.search(replace(request, params={**offset, "params": params}))

    def recent_index(self) -> Mapping[str, Any]:
        """Return what Milvus says of the index, as of some seconds ago."""
        return self._recent.index(self.table())

    async def search_async(
        self, client: Any, request: SearchRequest, plan: QueryPlan = NATIVE
    ) -> list[list[Hit]]:
        """Search as ``search`` does, through a ``pymilvus.AsyncMilvusClient``.

        Calls for different cells are under way at the same time, up to eight of them.
        """
        if self._table is None:
            await asyncio.to_thread(self.table)
        table = self.table()
        check_layout(plan, self.layout(), table.name)
        started, turns = time.monotonic(), asyncio.Semaphore(_AT_ONCE)
        there = None
        if plan.cells is not None:
            left = time_left(request.timeout, started)
            if self._recent.asks(table):
                there = await asyncio.to_thread(self.partition_names, timeout=left)
            else:
                there = self.partition_names()
        calls = plan_calls(request, plan, table, self.break_even, there)

        async def ask_one(call: Call) -> Any:
            async with turns:
                left = time_left(request.timeout, started)
                return await client.search(**call.arguments, timeout=left)

        async def ask(asked: Sequence[Call]) -> list[Any]:
            if len(asked) == 1:
                return [await ask_one(asked[0])]
            return await all_or_none(ask_one(call) for call in asked)

        answers = await ask(calls)
        if scored_by_ids(plan, table):
            index = await asyncio.to_thread(self.recent_index)
            calls = score_calls(request, plan, table, calls, answers, index)
            answers = await ask(calls)
        return as_hits(request, plan, table, calls, answers)

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
