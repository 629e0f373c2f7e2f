"""Milvus clients: ``search`` of one dense vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.search import plan_calls
from amips_plugins.collection import Collection, CollectionInfo, Hit, SearchRequest, check_layout
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.proxies.calls import Call, Found, RoutableCall
from amips_plugins.proxies.client import ClientProxy
from amips_plugins.proxies.late import LateRouter
from amips_plugins.routing.effects import Effects, InThread, run, run_async
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
    }
)
_MORE = frozenset({"consistency_level", "filter_params", "guarantee_timestamp", "offset"})
_PARAMS = frozenset(
    {"nprobe", "ef", "search_list", "reorder_k", "level", "itopk_size", "search_width"}
)


def wrap(
    kinds: Mapping[str, type],
    client: Any,
    router: LearnedRouter | LateRouter,
    recall: float | None,
) -> ClientProxy | None:
    """Return the proxy of a client of these classes, or None if it is of no kind known here."""
    for name, proxy in (("MilvusClient", _MilvusProxy), ("AsyncMilvusClient", _AsyncMilvusProxy)):
        if name in kinds:
            return proxy(client, kinds[name], {"search": _Milvus(client)}, router, recall)
    return None


class _MilvusProxy(ClientProxy):
    __slots__ = ()

    def search(self, *args: Any, **kwargs: Any) -> Any:
        return run(self._amips_routing["search"].search(args, kwargs))


class _AsyncMilvusProxy(ClientProxy):
    __slots__ = ()

    async def search(self, *args: Any, **kwargs: Any) -> Any:
        return await run_async(self._amips_routing["search"].search(args, kwargs), None)

    async def __aenter__(self) -> Any:
        await self._amips_client.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> Any:
        return await self._amips_client.__aexit__(*exc)


@dataclass(frozen=True, slots=True)
class _Milvus:
    """How Milvus is asked."""

    client: Any

    def read(self, arguments: Mapping[str, Any]) -> RoutableCall | None:
        named = {**arguments}
        more = named.pop("kwargs", {})
        if not _MORE.issuperset(more):
            return None
        if any(value is not None for name, value in named.items() if name not in _KEPT):
            return None
        data = named.get("data")
        if not isinstance(data, (list, tuple, np.ndarray)) or len(data) != 1:
            return None
        if not isinstance(named.get("filter"), str | None):
            return None
        asked = named.get("search_params")
        params = {} if asked is None else asked
        inner = params.get("params") if isinstance(params, dict) else None
        if not isinstance(params, dict) or not isinstance(inner, dict | None):
            return None
        if not {"metric_type", "params", "offset", *_PARAMS}.issuperset(params):
            return None
        if not {"metric_type", *_PARAMS}.issuperset(inner or {}):
            return None  # among them a range of scores, and groups
        return _Searched({**named, **more}, params)

    def same(self, name: str, info: CollectionInfo) -> Effects[bool]:
        found = yield Call(self.client.describe_collection, (name,))
        return bool(found["collection_name"] == info.name)


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

    def request(self, info: CollectionInfo) -> tuple[SearchRequest, int] | None:
        arguments = self.arguments
        limit, offset = arguments.get("limit", 10), self.offset
        whole = isinstance(limit, int) and isinstance(offset, int) and limit > 0 <= offset
        vectors = [name for name, kind in info.schema.items() if "VECTOR" in kind]
        named = arguments.get("anns_field") or (vectors[0] if len(vectors) == 1 else None)
        if not whole or named != info.field:
            return None
        for place in (self.params, self.params.get("params") or {}):
            if str(place.get("metric_type", info.metric.name)).upper() != info.metric.name:
                return None
        try:
            queries, _ = as_queries(arguments["data"], info.dim)
        except InvalidInput:
            return None  # such as text, for the server to embed
        request = SearchRequest(
            queries,
            limit,
            # A page behind the first is no whole answer, and is marked as if it were filtered.
            arguments.get("filter") or ("offset" if offset else None),
            params=self.params,
            timeout=arguments.get("timeout"),
        )
        return request, limit + offset

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
        asked = replace(request, filter=condition, params=None)
        there = None if plan.cells is None else (yield InThread(collection.partitions))
        calls = plan_calls(asked, plan, table, collection.break_even, there)
        scope = {name: calls[0].arguments[name] for name in ("filter", "partition_names")}
        # By the name of the generation: the cells are its own, wherever an alias moves meanwhile.
        arguments = {**self.natively(request.timeout), **scope, "collection_name": table.name}
        if plan.rewritten is None:
            response = yield plain.instead(arguments)
            return Found(response, self.hits(response))
        wanted = arguments.get("output_fields")
        field = table.info.field
        arguments["data"] = plan.rewritten
        arguments["limit"] = max(plan.rescore, request.k + self.offset)
        arguments.pop("offset", None)
        arguments["search_params"] = {k: v for k, v in self.params.items() if k != "offset"}
        if wanted or not table.is_lite:  # Milvus Lite returns all fields where none is named
            arguments["output_fields"] = list(dict.fromkeys([*(wanted or ()), field]))
        response = yield plain.instead(arguments)
        hits = response[0]
        everything = (table.is_lite and not wanted) or bool({"*", field} & set(wanted or ()))
        _rescore(hits, request, table.info, self.offset, keep=everything)
        return Found(response, self.hits(response))

    def hits(self, response: Any) -> list[Any]:
        (found,) = response
        return [Hit(*hit) for hit in zip(found.ids, found.distances, strict=True)]


def _rescore(
    hits: Any, request: SearchRequest, info: CollectionInfo, offset: int, *, keep: bool
) -> None:
    """Order candidates by the scores of the original query, and leave those asked for."""
    found = list(hits)
    if not found:
        return
    keys = np.asarray([hit["entity"][info.field] for hit in found], dtype=np.float32)
    scores = native_scores(request.queries[0], keys, info.metric)
    ranked = np.argsort(-scores if info.metric.larger_is_better else scores, kind="stable")
    best = ranked[offset : offset + request.k].tolist()
    for place in best:
        found[place]["distance"] = float(scores[place])
        if not keep:
            del found[place]["entity"][info.field]
    hits.ids = [hits.ids[place] for place in best]
    hits.distances = [float(scores[place]) for place in best]
    hits[:] = [found[place] for place in best]
