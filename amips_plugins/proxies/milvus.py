"""Milvus clients: ``search`` of one dense vector is routed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from amips_plugins.adapters.milvus.cell_index import SCANNED
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.opening import widest_params
from amips_plugins.adapters.milvus.overwritten import MOST_ROUNDS, without
from amips_plugins.adapters.milvus.search import (
    MAX_CANDIDATES,
    deep_enough,
    plan_calls,
    scored_by_ids,
    with_params,
)
from amips_plugins.adapters.milvus.search import Call as Searched
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.collection import (
    Collection,
    CollectionInfo,
    Hit,
    Id,
    SearchRequest,
    check_layout,
)
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.proxies.calls import Call, Found, RoutableCall, RoutedCollection
from amips_plugins.proxies.client import ClientProxy, reading, routing
from amips_plugins.proxies.late import LateRouter
from amips_plugins.proxies.milvus_writes import writes
from amips_plugins.proxies.records import hide
from amips_plugins.routing.effects import Effects, InThread
from amips_plugins.routing.router import LearnedRouter
from amips_plugins.vectors import as_queries, native_scores

__all__ = ["wrap"]

# What search may be given without becoming another kind of search.
_KEPT = frozenset(
    {
        "collection_name",
        "data",
        "filter",
        "limit",
        "output_fields",
        "search_params",
        "timeout",
        "anns_field",
        "consistency_level",
        "filter_params",
        "guarantee_timestamp",
        "offset",
    }
)


def wrap(
    kinds: Mapping[str, type],
    client: Any,
    router: LearnedRouter | LateRouter,
    recall: float | None,
) -> ClientProxy | None:
    """Return the proxy of a client of these classes, or None if it is of no kind known here."""

    def same(name: str, info: CollectionInfo) -> Effects[bool]:
        found = yield Call(client.describe_collection, (name,))
        return bool(found["collection_name"] == info.name)

    for name, proxy in (("MilvusClient", ClientProxy), ("AsyncMilvusClient", _AsyncMilvusProxy)):
        if name in kinds:
            routed = RoutedCollection(router, recall, same)
            methods = {
                "search": routing(_Milvus(), routed, _show_hits),
                "hybrid_search": reading(_show_hits),
                "search_iterator": reading(lambda pages: _Pages(pages, _show_page)),
                "get": reading(_show_rows),
                "query_iterator": reading(lambda pages: _Pages(pages, _show_rows)),
                **writes(routed, _show_rows),
            }
            return proxy(client, kinds[name], methods, routed)
    return None


class _AsyncMilvusProxy(ClientProxy):
    __slots__ = ()

    async def __aenter__(self) -> Any:
        await self._amips_client.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> Any:
        return await self._amips_client.__aexit__(*exc)


def _show_rows(rows: Any) -> Any:
    for row in rows:
        hide(row)
    return rows


def _show_hits(response: Any) -> Any:
    for hits in response:
        _show_page(hits)
    return response


def _show_page(hits: Any) -> Any:
    for hit in list.__iter__(hits):  # its own way would read vectors that nobody may look at
        hide(hit.get("entity"))
    return hits


class _Pages:
    """An iterator of Milvus, whose pages are shown."""

    def __init__(self, pages: Any, show: Callable[[Any], Any]) -> None:
        self._pages = pages
        self._show = show

    def next(self) -> Any:
        return self._show(self._pages.next())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pages, name)


@dataclass(frozen=True, slots=True)
class _Milvus:
    """How Milvus is asked."""

    def read(self, arguments: dict[str, Any]) -> RoutableCall | None:
        if any(arguments[name] is not None for name in arguments.keys() - _KEPT):
            return None
        data = arguments.get("data")
        if not isinstance(data, (list, tuple, np.ndarray)) or len(data) != 1:
            return None
        if not isinstance(arguments.get("filter"), str | None):
            return None
        if not isinstance(arguments.get("output_fields"), list | None):
            return None  # the client refuses it
        timeout = arguments.get("timeout")
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
            return None
        params = arguments.get("search_params")
        if not isinstance(params, dict | None):
            return None
        return _Searched(arguments, params or {})


@dataclass(frozen=True, slots=True)
class _Searched:
    """A call of ``search``."""

    arguments: Mapping[str, Any]
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.arguments["collection_name"])

    @property
    def offset(self) -> Any:
        return self.arguments.get("offset") or self.params.get("offset") or 0

    def request(self, collection: Collection) -> SearchRequest | None:
        arguments, info = self.arguments, collection.info
        limit, offset = arguments.get("limit", 10), self.offset
        whole = type(limit) is int and type(offset) is int and limit > 0 <= offset
        vectors = [name for name, kind in info.schema.items() if "VECTOR" in kind]
        named = arguments.get("anns_field") or (vectors[0] if len(vectors) == 1 else None)
        if not whole or named != info.field:
            return None
        params = {name: value for name, value in self.params.items() if name != "offset"}
        inner = params.get("params") or {}
        for place in (params, inner if isinstance(inner, dict) else {}):
            if str(place.get("metric_type", info.metric.name)).upper() != info.metric.name:
                return None
        try:
            queries, _ = as_queries(arguments["data"], info.dim)
        except InvalidInput:
            return None  # such as text, for the server to embed
        request = SearchRequest(
            queries,
            limit,
            arguments.get("filter"),
            params=params,
            timeout=arguments.get("timeout"),
        )
        return request if collection.unroutable(request, rewritten=False) is None else None

    def whole(self, collection: Collection) -> bool:  # noqa: ARG002 - Qdrant's asks it
        return not self.offset and not self.arguments.get("filter_params")

    def natively(self, timeout: float | None) -> Mapping[str, Any]:
        return {**self.arguments, "timeout": timeout}

    def routed(
        self, plain: Call, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> Effects[Found]:
        if not isinstance(collection, MilvusCollection):
            raise InvalidInput("The router's collection is none of Milvus.")
        table = collection.table()
        check_layout(plan, collection.layout(), table.name)
        condition = self.arguments.get("filter")
        asked = replace(request, k=self.offset + request.k, filter=condition, params=None)
        there = None
        if plan.cells is not None:
            there = yield InThread(partial(collection.partition_names, self.name, request.timeout))
        index = SCANNED
        if plan.cells is not None:
            index = yield InThread(partial(collection.index_inside, plan, request.timeout))
        calls = plan_calls(asked, plan, table, collection.break_even, there, index)
        depth = calls[0].arguments["search_params"].get("params")
        scope = {name: calls[0].arguments[name] for name in ("filter", "partition_names")}
        # By the caller's name: where an alias has moved, the cells' partitions are not there, and
        # the native search answers. The values of a field say nothing of that.
        if plan.cells is not None and not table.by_partitions and self.name != table.name:
            look = partial(table.client.describe_collection, self.name, timeout=request.timeout)
            found = yield InThread(look)
            if found["collection_name"] != table.name:
                raise CollectionError(f"The alias {self.name!r} names {table.name!r} no more.")
        arguments = {**self.natively(request.timeout), **scope}
        if depth:  # how far to search inside the cells, unless the caller says it
            arguments["search_params"] = _with_depth(self.params, depth)
        offset, end = self.offset, self.offset + request.k
        newer = there if table.shares_keys else None  # than the rows in cells may others' be
        if scored_by_ids(plan, table):
            fetched = self._page(arguments, max(min(plan.rescore, MAX_CANDIDATES), end))
            fetched |= {"data": plan.rewritten, "output_fields": [table.key]}
            candidates = yield plain.instead(fetched)
            ids = list(candidates[0].ids)
            index = yield InThread(collection.recent_index)
            second = self._scored(arguments, ids, end, table, index)
            response = (yield plain.instead(second)) if ids else candidates
            planned = _entries(response[0])
            _keep(response[0], planned[offset:end])
        elif calls[0].with_vectors:
            wanted = {"data": request.queries, "limit": calls[0].arguments["limit"]}
            if plan.rewritten is not None:  # as many for every page, or pages do not fit together
                most = min(plan.rescore, MAX_CANDIDATES)
                wanted = {"data": plan.rewritten, "limit": max(most, request.k)}
            fetched = self._candidates(arguments, wanted, table)
            response = yield plain.instead(fetched)
            if newer:
                yield from self._without_older(response, plain, fetched, collection, newer)
            planned = self._rescored(response[0], request, table)
            _keep(response[0], planned[offset:end])
        elif newer:  # a page depends on what is left out of those before it
            fetched = self._page(arguments, end)
            response = yield plain.instead(fetched)
            yield from self._without_older(response, plain, fetched, collection, newer)
            planned = _entries(response[0])
            _keep(response[0], planned[offset:end])
        else:
            response = yield plain.instead(arguments)
            planned = _entries(response[0])
            everything = scope["partition_names"] is None and scope["filter"] == (condition or "")
            if not offset or len(planned) == request.k or everything:
                return Found(response, self.hits(response))
            planned = _entries((yield plain.instead(self._page(arguments, end)))[0])
        if offset and request.k <= len(planned) < end:
            # Behind the plan's hits come all others, best first: so pages fit together. Where not
            # even the first page was full, the native search answered that, and answers this one.
            native = self._page(self.natively(request.timeout), end)
            before = {entry[0] for entry in planned}
            others = _entries((yield plain.instead(native))[0])
            pages = planned + [entry for entry in others if entry[0] not in before]
            _keep(response[0], pages[offset:end])
        return Found(response, [Hit(key, score) for key, score, _ in planned])

    def _without_older(
        self,
        response: Any,
        plain: Call,
        arguments: dict[str, Any],
        collection: MilvusCollection,
        there: Sequence[str],
    ) -> Effects[None]:
        """Find keys that somebody has written since to the overflow there only."""
        table, timeout, limit = collection.table(), arguments["timeout"], arguments["limit"]
        asked, answers, hidden = [arguments], [response], set[Id]()
        for _ in range(MOST_ROUNDS):
            calls = [Searched([0], one) for one in asked]
            more = yield InThread(partial(collection.overwritten, calls, answers, there, timeout))
            if more <= hidden:
                break
            hidden |= more
            asked = without(arguments, hidden, table, there)
            answers = []
            for one in asked:
                answers.append((yield plain.instead(one)))
        if hidden:
            better = table.info.metric.larger_is_better
            found = [entry for answer in answers for entry in _entries(answer[0])]
            found.sort(key=lambda entry: -entry[1] if better else entry[1])
            _keep(response[0], found[:limit])

    def _page(self, arguments: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """Return the arguments of a call for the first hits."""
        asked = arguments.get("search_params") or {}
        depth = self.offset + self.arguments.get("limit", 10)
        params = deep_enough({n: v for n, v in asked.items() if n != "offset"}, depth, limit)
        kept = {name: value for name, value in arguments.items() if name != "offset"}
        return {**kept, "limit": limit, "search_params": params}

    def _scored(
        self,
        arguments: Mapping[str, Any],
        ids: Sequence[Id],
        limit: int,
        table: Table,
        index: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the arguments of a call that scores candidates by the original query."""
        widest = widest_params(index, limit, is_lite=table.is_lite)
        params = {"metric_type": table.info.metric.name, "params": widest}
        kept = {name: value for name, value in arguments.items() if name != "filter_params"}
        page = {**self._page(kept, limit), "search_params": params}
        return {**page, "filter": table.where_ids(ids)}

    def _candidates(
        self, arguments: Mapping[str, Any], asked: Mapping[str, Any], table: Table
    ) -> dict[str, Any]:
        """Return the arguments of a call for candidates to be scored, with their vectors."""
        changed = self._page(arguments, asked["limit"])
        wanted = arguments.get("output_fields")
        if wanted or not table.is_lite:  # Milvus Lite returns all fields where none is named
            changed["output_fields"] = list(dict.fromkeys([*(wanted or ()), table.info.field]))
        return {**changed, "data": asked["data"]}

    def _rescored(self, hits: Any, request: SearchRequest, table: Table) -> list[_Entry]:
        """Return candidates in the order of the original query's scores, with the fields wanted."""
        entries, info = _entries(hits), table.info
        if not entries:
            return []
        keys = np.asarray([hit["entity"][info.field] for _, _, hit in entries], dtype=np.float32)
        scores = native_scores(request.queries[0], keys, info.metric)
        ranked = np.argsort(-scores if info.metric.larger_is_better else scores, kind="stable")
        wanted = self.arguments.get("output_fields")
        keep = (table.is_lite and not wanted) or bool({"*", info.field} & set(wanted or ()))
        rescored = []
        for place in ranked.tolist():
            key, _, hit = entries[place]
            hit["distance"] = score = float(scores[place])
            if not keep:
                del hit["entity"][info.field]
            rescored.append((key, score, hit))
        return rescored

    def tuned(
        self,
        plain: Call,
        collection: Collection,  # noqa: ARG002 - Qdrant's asks it
        request: SearchRequest,
        plan: QueryPlan,
    ) -> Effects[Any]:
        params = with_params(self.params, plan.params, request.k, self.offset)
        return (yield plain.instead({**self.natively(request.timeout), "search_params": params}))

    def exactly(self, plain: Call, collection: Collection, request: SearchRequest) -> Effects[Any]:
        reader: Any = collection  # a MilvusCollection
        table, end = reader.table(), self.offset + request.k
        index = yield InThread(reader.recent_index)
        kept = {
            name: self.params[name] for name in ("offset", "metric_type") if name in self.params
        }
        params = {**kept, "params": widest_params(index, end, is_lite=table.is_lite)}
        return (yield plain.instead({**self.natively(request.timeout), "search_params": params}))

    def plainly(self, own: Call, collection: Collection) -> Effects[Any]:  # noqa: ARG002 - Milvus finds what it is asked for
        return (yield own)

    def hits(self, response: Any) -> list[Any]:
        (found,) = response
        return [Hit(*hit) for hit in zip(found.ids, found.distances, strict=True)]


def _with_depth(params: Mapping[str, Any], depth: Mapping[str, Any]) -> dict[str, Any]:
    inner = dict(params.get("params") or {})
    more = {name: depth[name] for name in depth if name not in params and name not in inner}
    return {**params, "params": {**inner, **more}} if more else dict(params)


_Entry = tuple[Any, float, Any]  # id, score, and pymilvus' hit


def _entries(hits: Any) -> list[_Entry]:
    return list(zip(hits.ids, hits.distances, hits, strict=True))


def _keep(hits: Any, entries: Sequence[_Entry]) -> None:
    """Make these the hits, in this order."""
    hits.ids = [key for key, _, _ in entries]
    hits.distances = [score for _, score, _ in entries]
    hits[:] = [hit for _, _, hit in entries]
