"""Searching Qdrant's points through its client, blocking and awaited."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.cell_groups import merge_hits
from amips_plugins.adapters.qdrant.batches import (
    CellGroup,
    GrpcBatch,
    by_cell,
    by_shard,
    in_portions,
    one_by_one,
)
from amips_plugins.adapters.qdrant.cell_shards import CellShards, ShardKey
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.codes import Codes, break_even_of
from amips_plugins.adapters.qdrant.messages import (
    filter_message,
    params_message,
    prefers_grpc,
)
from amips_plugins.adapters.qdrant.point_collection import PointCollection, ServerFound
from amips_plugins.adapters.qdrant.read_budget import ReadBudget
from amips_plugins.adapters.qdrant.search import (
    as_arguments,
    as_hits,
    both,
    has_value,
    in_cells,
    others_than,
    plan_queries,
    search_params,
    widely,
)
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.adapters.qdrant.tenants import by_value
from amips_plugins.collection import Hit, SearchRequest, check_layout
from amips_plugins.errors import require
from amips_plugins.partitions import Partitions
from amips_plugins.plan import NATIVE, QueryPlan

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient, QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["SearchedPoints"]

_BATCH = 64  # queries from which on they share cells enough,
_NUMBERS = 1_000_000  # of vectors in one call: a server takes 32 MiB of JSON
_IN_PAYLOAD, _IN_SHARDS = 0.4, 0.8  # see break_even
_SEARCHES_EACH = 4.0  # and searches a query up to which sending them pays (docs/performance.md)
_SEARCHES_EACH_GRPC = 32.0


class SearchedPoints(PointCollection):
    """The part of ``QdrantCollection`` that searches."""

    _kept: ServerFound | None
    _client: QdrantClient
    _name: str
    _local: bool
    _shard_key: int | str | None
    _reads: ReadBudget | None = None

    def _look(self, *, strays: bool = True) -> ServerFound:
        raise NotImplementedError

    def _codes_on_disk(self) -> Codes | None:
        found = self._found
        return found.codes if found.on_disk else None

    @property
    def _found(self) -> ServerFound:
        if self._kept is None:
            self._kept = self._look()
        return self._kept

    @property
    def break_even(self) -> float:
        """Share of the keys above which a search of everything is cheaper than one of cells."""
        found, given = self._kept or self._found, self._given
        if given is not None and given.key in (found.tenant_keys or ()):
            return 1.0  # natively, every value is searched, too, or every point
        if given is None and found.shards is not None:
            return _IN_SHARDS
        if found.codes is None and not found.on_disk:
            return _IN_PAYLOAD
        return break_even_of(_IN_PAYLOAD, found.codes, on_disk=found.on_disk)

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:
        """Say why a plan would change what a request means, or what it may not ask for, or None."""
        found = self._kept or self._found
        if found.limits.strict is not None:
            n_cells = 0 if found.cells is None else found.cells.n_cells
            n_cells = n_cells if self._given is None else len(self._given.values)
            refused = found.limits.refused_search(n_cells)
            if refused is not None:
                return refused
        if not rewritten and (self._reads or self._budget).near():
            return "read_rate_limit: a search of cells takes two reads"
        return super().unroutable(request, rewritten=rewritten) if request.params else None

    @property
    def _budget(self) -> ReadBudget:
        if self._reads is None:
            self._reads = ReadBudget(self._found.limits, self._limits_now)
        return self._reads

    def _limits_now(self) -> Limits:
        if self._local:
            return Limits(None)
        return Limits(self._client.get_collection(self._name).config.strict_mode_config)

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search by a plan, in one call for all queries.

        Rewritten queries choose the candidates with the caller's own parameters; the server then
        scores these exactly with the original queries. Cells are searched exactly and ANDed with
        the caller's filter; points without a cell are always searched. Cells that hold more than
        ``break_even`` of the keys are left out of the filter.

        Raises
        ------
        InvalidInput
            The plan's cells are of another layout, the filter is not a ``models.Filter``, or a
            parameter is not one of ``models.SearchParams``.
        """
        started = time.perf_counter()
        batch = self._over_grpc(self._client, request, plan)
        if batch is not None:
            results: list[Any] = []
            parts = in_portions(batch.rows, self._portion)
            for part in parts:
                call, seconds = batch.call(part, _left(request, started), self._client)
                results += self._client.grpc_points.QueryBatch(call, timeout=seconds).result
            return batch.hits(parts, results, request, self.info.metric.larger_is_better)
        rows, queries, timeout = self._planned(request, plan, self._client)
        if len(queries) == 1:
            # The client's batch call costs 200 us of Python more for a query than this one.
            one = as_arguments(queries[0])
            answers = [self._client.query_points(self._name, **one, timeout=timeout)]
        else:
            answers, parts = [], in_portions(rows, self._portion)
            for some in parts:
                asked, timeout = [queries[one] for one in some], _left(request, started)
                answers += self._client.query_batch_points(self._name, asked, timeout=timeout)
            rows = [rows[one] for some in parts for one in some]
        return self._merged(request, rows, as_hits(answers))

    async def search_async(
        self, client: AsyncQdrantClient, request: SearchRequest, plan: QueryPlan = NATIVE
    ) -> list[list[Hit]]:
        """Search as ``search`` does, through an ``AsyncQdrantClient``."""
        if self._kept is None:
            self._kept = await asyncio.to_thread(self._look)
        started = time.perf_counter()
        batch = self._over_grpc(client, request, plan)
        if batch is not None:
            results: list[Any] = []
            points: Any = client.grpc_points  # an asynchronous one
            parts = in_portions(batch.rows, self._portion)
            for part in parts:
                call, seconds = batch.call(part, _left(request, started), client)
                results += (await points.QueryBatch(call, timeout=seconds)).result
            return batch.hits(parts, results, request, self.info.metric.larger_is_better)
        rows, queries, timeout = self._planned(request, plan, client)
        if len(queries) == 1:
            one = as_arguments(queries[0])
            answers = [await client.query_points(self._name, **one, timeout=timeout)]
        else:
            answers, parts = [], in_portions(rows, self._portion)
            for some in parts:
                asked, timeout = [queries[one] for one in some], _left(request, started)
                answers += await client.query_batch_points(self._name, asked, timeout=timeout)
            rows = [rows[one] for some in parts for one in some]
        return self._merged(request, rows, as_hits(answers))

    @property
    def _portion(self) -> int:
        """Searches in one call that a server takes."""
        return max(1, _NUMBERS // self.info.dim)

    def _over_grpc(self, client: Any, request: SearchRequest, plan: QueryPlan) -> GrpcBatch | None:
        """Write a batch as messages, where that costs less than what the client's call makes."""
        if not prefers_grpc(client) or not self._groups(request, plan, over_grpc=True):
            return None
        queries = self.queries(request, plan)
        groups = self._grouped(request, plan)
        return GrpcBatch.of(self._name, queries, groups, self._shard_key)

    def _grouped(self, request: SearchRequest, plan: QueryPlan) -> list[CellGroup]:
        shards, record = self._shards, self._found.cells
        if shards is not None:
            return by_shard(request, plan, shards, self.break_even)
        assert record is not None  # noqa: S101 - for the type checker
        return by_cell(request, plan, record, self.break_even, strays=self._must_leave_out)

    def _merged(
        self, request: SearchRequest, rows: list[int], answers: list[list[Hit]]
    ) -> list[list[Hit]]:
        if rows == [*range(len(request.queries))] and self._found.shards is None:
            return answers
        by_row: list[list[list[Hit]]] = [[] for _ in request.queries]
        for row, hits in zip(rows, answers, strict=True):
            by_row[row].append(hits)
        larger = self.info.metric.larger_is_better
        return [merge_hits(parts, request.k, larger_is_better=larger) for parts in by_row]

    @property
    def finds_as_asked(self) -> bool:
        """Whether a native search finds the neighbours as it stands (see ``native_parts``)."""
        return self._found.tenant_keys is None

    def native_parts(
        self, condition: models.Filter | None, params: models.SearchParams | None
    ) -> list[tuple[models.Filter | None, models.SearchParams | None]] | None:
        """Say how a native search is asked where the server itself would lose neighbours.

        None nearly everywhere: it is asked as it stands. With graphs for the values of a payload
        key only (see ``tenants``) it is several searches, whose hits are merged, or an exact one.
        """
        found = self._found
        if found.tenant_keys is None or (params is not None and params.exact):
            return None
        parts = by_value(condition, found.tenant_keys)
        if parts is not None:
            return [(part, params) for part in parts] if len(parts) > 1 else None
        if not found.limits.allows_exact:
            return None  # as the bare client; ``describe`` says that nothing better is allowed
        changed = {**(dict(params) if params else {}), "exact": True}
        return [(condition, models.SearchParams(**changed))]

    def queries(
        self, request: SearchRequest, plan: QueryPlan, *, over_grpc: bool = False
    ) -> list[models.QueryRequest]:
        """Write a search as the client's own queries, one a row; raise as ``search`` does.

        Where the client asks ``over_grpc`` their filters may be messages.
        """
        check_layout(plan, self.layout(), self._name)
        found = self._found
        self._budget.spend(len(request.queries) * (1 if plan.cells is None else 2))
        return plan_queries(
            request,
            plan,
            found.info.field,
            self._named(request.filter, over_grpc=over_grpc),
            self.break_even,
            exact=not self._local,
            has_graph=found.has_graph,
            max_ef=found.limits.of("search_max_hnsw_ef"),
            codes=found.codes,
            shards=self._shards,
        )

    @property
    def _must_leave_out(self) -> bool:
        """Whether cells are named by all others: for strays, or since conditions are counted."""
        return (self._kept or self._found).strays or (self._reads or self._budget).limited

    def _named(
        self, condition: models.Filter | None, *, over_grpc: bool
    ) -> Callable[[list[int]], Any] | None:
        """Return what makes the filter of some cells, under a condition."""
        cells, strays = self._cells, self._must_leave_out
        if cells is None:
            return None
        if over_grpc and isinstance(cells, LayoutRecord) and not strays:
            return partial(filter_message, cells, condition)
        return partial(in_cells, cells, condition=condition, strays=strays)

    @property
    def _shards(self) -> CellShards | None:
        """Where the cells of plans have shard keys: these."""
        return None if self._given is not None else self._found.shards

    def asked_shards(self, plan: QueryPlan) -> list[ShardKey] | None:
        """Return the shard keys that a search of one query asks; None for all."""
        shards = None if self._given is not None else (self._kept or self._found).shards
        if shards is None or plan.cells is None or self._asks_everything(plan):
            return None
        return shards.asked(plan.cells[0].tolist())

    def _asks_everything(self, plan: QueryPlan) -> bool:
        return plan.shares is not None and bool(plan.shares[0] > self.break_even)

    def narrowed(
        self,
        request: SearchRequest,
        plan: QueryPlan,
        condition: models.Filter | None,
        *,
        over_grpc: bool = False,
    ) -> tuple[Any, Any]:
        """Return filter and parameters of a search of one query in cells, under a condition.

        They are the client's models, or where it asks ``over_grpc`` what costs it less. Raises
        ``InvalidInput`` as ``search`` does.
        """
        found, chosen = self._kept or self._found, plan.cells
        cells = self._given or found.cells
        graphs = self._given is None and found.shards is not None
        (self._reads or self._budget).spend(1 if chosen is None else 2)
        share = None if plan.shares is None else float(plan.shares[0])
        codes, whole = None if graphs else found.codes, False
        if chosen is not None:
            whole = self._asks_everything(plan)
            if cells is None or plan.layout != cells.layout:
                check_layout(plan, self.layout(), self._name)
            elif not graphs and not whole:
                named = self._named(condition, over_grpc=over_grpc)
                condition = None if named is None else named(chosen[0].tolist())
        params = search_params(request, plan, not self._local, codes, share, graphs=graphs)
        if whole and found.has_graph:
            most = found.limits.of("search_max_hnsw_ef")
            params = widely(params, request, plan, most, codes)
        return condition, params_message(params) if over_grpc else params

    def _planned(
        self, request: SearchRequest, plan: QueryPlan, client: Any
    ) -> tuple[list[int], list[models.QueryRequest], int | None]:
        """Return a search as queries, the row of each, and its timeout."""
        given, by_value = self._given, False
        if given is not None and plan.cells is not None and plan.rewritten is None:
            by_value = given.key in (self._found.tenant_keys or ())
        # Messages may stand in the arguments of a call, and not in the queries of a batch.
        over_grpc = len(request.queries) == 1 and plan.rewritten is None and prefers_grpc(client)
        queries = self.queries(request, NATIVE if by_value else plan, over_grpc=over_grpc)
        rows = list(range(len(queries)))
        if by_value and given is not None:
            rows, queries = self._value_by_value(request, plan, given, queries)
        elif self._groups(request, plan, over_grpc=False):
            rows, queries = one_by_one(queries, self._grouped(request, plan))
        if plan.cells is None and self._found.tenant_keys is not None:
            spread = [(row, one) for row in rows for one in self._spread(queries[row])]
            rows, queries = [row for row, _ in spread], [one for _, one in spread]
        if self._shard_key is not None:
            for query in queries:
                query.shard_key = self._shard_key
        return rows, queries, _whole_seconds(request.timeout)

    def _groups(self, request: SearchRequest, plan: QueryPlan, *, over_grpc: bool) -> bool:
        """Tell whether a batch costs less as a search for each query and cell.

        Every search that is sent takes the client's time and a read of strict mode's. Of shards a
        query names several in one search, which over REST costs less (docs/performance.md).
        """
        if self._shards is not None and not over_grpc:
            return False
        if plan.cells is None or plan.rewritten is not None or self._local:
            return False
        if self._given is not None or self._found.cells is None:
            return False
        searches = int((plan.cells >= 0).sum()) + len(request.queries)
        most = _SEARCHES_EACH_GRPC if over_grpc else _SEARCHES_EACH
        fits = searches <= most * len(request.queries)
        return len(request.queries) >= _BATCH and fits and not self._found.limits.counts_searches

    def _value_by_value(
        self,
        request: SearchRequest,
        plan: QueryPlan,
        given: Partitions,
        queries: list[models.QueryRequest],
    ) -> tuple[list[int], list[models.QueryRequest]]:
        """Ask the graph of each value by itself, and exactly for points in none of them."""
        check_layout(plan, self.layout(), self._name)
        assert plan.cells is not None  # noqa: S101 - for the type checker
        rows: list[int] = []
        parts: list[models.QueryRequest] = []
        exact = search_params(request, plan, exact=self._found.limits.allows_exact)
        elsewhere = both(request.filter, others_than(given.key, given.values))
        for row, cells in enumerate(plan.cells.tolist()):
            query = queries[row]
            for value in given.chosen(cells):
                here = models.Filter(must=[has_value(given.key, [value])])
                parts.append(_part(query, both(request.filter, here), query.params))
            parts.append(_part(query, elsewhere, exact))
            rows += [row] * (len(parts) - len(rows))
        self._budget.spend(len(parts) - len(queries))
        return rows, parts

    def _spread(self, query: models.QueryRequest) -> list[models.QueryRequest]:
        if query.prefetch is None:
            parts = self.native_parts(query.filter, query.params)
            return [query] if parts is None else [_part(query, *part) for part in parts]
        inner: Any = query.prefetch[0]  # type: ignore[index]  # candidates of a rewritten query
        parts = self.native_parts(inner.filter, inner.params)
        if parts is not None:
            query.prefetch = [_part(inner, *part) for part in parts]
        return [query]


def _whole_seconds(timeout: float | None) -> int | None:
    # Qdrant counts whole seconds, and 0 would mean no time at all.
    return None if timeout is None else max(1, math.ceil(timeout))


def _left(request: SearchRequest, started: float) -> int | None:
    """Return the seconds left of the caller's for the next call of a batch, at least one."""
    passed = time.perf_counter() - started
    return None if request.timeout is None else _whole_seconds(request.timeout - passed)


def _part(query: Any, condition: Any, params: Any) -> Any:
    return query.model_copy(update={"filter": condition, "params": params})
