"""Searching a Milvus collection through its clients, blocking and awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.milvus.cell_index import SCANNED, IndexSearch, index_search
from amips_plugins.adapters.milvus.given import InPartitions
from amips_plugins.adapters.milvus.opening import describe_index, widest_params
from amips_plugins.adapters.milvus.overwritten import MOST_ROUNDS, around, overwritten
from amips_plugins.adapters.milvus.search import (
    Call,
    all_or_none,
    as_hits,
    id_of,
    plan_calls,
    score_calls,
    scored_by_ids,
    time_left,
)
from amips_plugins.collection import Hit, Id, SearchRequest, check_layout
from amips_plugins.plan import NATIVE, QueryPlan

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["SearchedTable"]

_AT_ONCE = 8  # calls of one search: a batch is not to push everybody else aside


class SearchedTable(InPartitions):
    """The part of ``MilvusCollection`` that searches."""

    client: MilvusClient

    @property
    def break_even(self) -> float:
        """Share of the keys above which cells cost more than a full scan."""
        raise NotImplementedError

    def layout(self) -> str | None:
        """Return the identifier of the cells, or None."""
        raise NotImplementedError

    def partition_names(self, name: str | None = None, timeout: float | None = None) -> list[str]:
        """Return the partitions, on a server as of a second ago; none where they do not matter.

        Milvus Lite is asked by the ``name`` to be searched: nothing else there sees an alias move.
        """
        table = self.table()
        return self._recent.partitions(table, name or table.name, timeout)

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
        return self._search(request, plan, None)

    def _search(
        self, request: SearchRequest, plan: QueryPlan, index: IndexSearch | None
    ) -> list[list[Hit]]:
        table = self.table()
        check_layout(plan, self.layout(), table.name)
        started = time.monotonic()
        there = None
        if plan.cells is not None:
            there = self.partition_names(timeout=time_left(request.timeout, started))
        if index is None:
            index = self.index_inside(plan, time_left(request.timeout, started))
        calls = plan_calls(request, plan, table, self.break_even, there, index)

        def ask(asked: Sequence[Call]) -> list[Any]:
            return [
                self.client.search(**call.arguments, timeout=time_left(request.timeout, started))
                for call in asked
            ]

        answers, first = ask(calls), calls
        if scored_by_ids(plan, table):
            calls = score_calls(request, plan, table, calls, answers, self.recent_index())
            answers = ask(calls)
        hidden: set[Id] = set()
        for _ in range(MOST_ROUNDS if there and table.shares_keys else 0):
            more = self.overwritten(
                calls, answers, there or (), time_left(request.timeout, started)
            )
            if more <= hidden:
                break
            hidden |= more
            calls = around(first, hidden, table, there or ())
            answers = ask(calls)
            if scored_by_ids(plan, table):
                calls = score_calls(request, plan, table, calls, answers, self.recent_index())
                answers = ask(calls)
        return as_hits(request, plan, table, calls, answers)

    def overwritten(
        self,
        calls: Sequence[Call],
        answers: Sequence[Any],
        there: Sequence[str],
        timeout: float | None,
    ) -> set[Id]:
        """Return the ids in these answers that somebody has written since to the overflow."""
        table = self.table()
        if not self._recent.has_overflow(table, there, timeout):
            return set()
        ids = {id_of(hit, table) for answer in answers for hits in answer for hit in hits}
        searched = [call.arguments["partition_names"] for call in calls]
        return overwritten(table, ids, searched, there, timeout)

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search as widely as the index can, all partitions of a layout included.

        That is exact for FLAT and for IVF with whole vectors. Graphs (HNSW, DISKANN) get the
        longest list of candidates that a server takes; of codes many candidates are scored by their
        vectors.
        """
        offset = {k: v for k, v in (request.params or {}).items() if k == "offset"}
        table = self.table()
        index = describe_index(table)
        params = widest_params(index, request.k, is_lite=table.is_lite)
        asked = replace(request, params={**offset, "params": params})
        return self._search(asked, NATIVE, index_search(index).thorough())

    def recent_index(self) -> Mapping[str, Any]:
        """Return what Milvus says of the index, as of some seconds ago."""
        return self._recent.index(self.table())

    def index_inside(self, plan: QueryPlan, timeout: float | None = None) -> IndexSearch:
        """Return how the cells of a plan are searched through their index."""
        cells = self.table().cells
        if plan.cells is None or cells is None or cells.index == "flat":
            return SCANNED
        return index_search(self._recent.index(self.table(), timeout))

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
        index = SCANNED
        if plan.cells is not None and table.cells is not None and table.cells.index != "flat":
            left = time_left(request.timeout, started)
            index = await asyncio.to_thread(self.index_inside, plan, left)
        calls = plan_calls(request, plan, table, self.break_even, there, index)

        async def ask_one(call: Call) -> Any:
            async with turns:
                left = time_left(request.timeout, started)
                return await client.search(**call.arguments, timeout=left)

        async def ask(asked: Sequence[Call]) -> list[Any]:
            if len(asked) == 1:
                return [await ask_one(asked[0])]
            return await all_or_none(ask_one(call) for call in asked)

        answers, first = await ask(calls), calls
        if scored_by_ids(plan, table):
            described = await asyncio.to_thread(self.recent_index)
            calls = score_calls(request, plan, table, calls, answers, described)
            answers = await ask(calls)
        hidden: set[Id] = set()
        for _ in range(MOST_ROUNDS if there and table.shares_keys else 0):
            if self._recent.no_overflow:
                break
            left = time_left(request.timeout, started)
            more = await asyncio.to_thread(self.overwritten, calls, answers, there or (), left)
            if more <= hidden:
                break
            hidden |= more
            calls = around(first, hidden, table, there or ())
            answers = await ask(calls)
            if scored_by_ids(plan, table):
                calls = score_calls(request, plan, table, calls, answers, described)
                answers = await ask(calls)
        return as_hits(request, plan, table, calls, answers)
