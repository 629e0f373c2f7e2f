"""Qdrant clients: ``query_points`` of one dense vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.base import CollectionInfo, SearchRequest, check_layout
from amips_plugins.adapters.qdrant_queries import plan_queries
from amips_plugins.errors import InvalidInput, require
from amips_plugins.proxies.calls import Asked, Call, Found
from amips_plugins.proxies.client import ClientProxy
from amips_plugins.proxies.late import LateRouter
from amips_plugins.router import LearnedRouter
from amips_plugins.steps import Search, Steps, run, run_async
from amips_plugins.vectors import as_queries

if TYPE_CHECKING:
    from qdrant_client import models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["wrap"]

# What else query_points may be given without becoming another kind of query.
_KEPT = frozenset(
    {
        "collection_name",
        "query",
        "using",
        "query_filter",
        "search_params",
        "limit",
        "offset",
        "with_payload",
        "with_vectors",
        "score_threshold",
        "consistency",
        "shard_key_selector",
        "timeout",
    }
)
_PARAMS = frozenset({"hnsw_ef", "quantization", "acorn"})


def wrap(
    kinds: Mapping[str, type],
    client: Any,
    router: LearnedRouter | LateRouter,
    recall: float | None,
) -> ClientProxy | None:
    """Return the proxy of a client of these classes, or None if it is of no kind known here."""
    for name, proxy in (("QdrantClient", _QdrantProxy), ("AsyncQdrantClient", _AsyncQdrantProxy)):
        if name in kinds:
            options = client.init_options
            local = options.get("location") == ":memory:" or options.get("path") is not None
            dialect = _Qdrant(client, local)
            return proxy.around(client, "query_points", kinds[name], dialect, router, recall)
    return None


class _QdrantProxy(ClientProxy):
    __slots__ = ()

    def query_points(self, *args: Any, **kwargs: Any) -> Any:
        return run(self._amips_routing.search(args, kwargs))


class _AsyncQdrantProxy(ClientProxy):
    __slots__ = ()

    async def query_points(self, *args: Any, **kwargs: Any) -> Any:
        return await run_async(self._amips_routing.search(args, kwargs), None)


@dataclass(frozen=True, slots=True)
class _Qdrant:
    """How Qdrant is asked."""

    client: Any
    local: bool  # always exact, and warns of parameters

    def read(self, arguments: Mapping[str, Any]) -> Asked | None:
        if any(value is not None for name, value in arguments.items() if name not in _KEPT):
            return None
        if not isinstance(arguments.get("query"), (list, tuple, np.ndarray)):
            return None
        params = arguments.get("search_params")
        if not isinstance(params, models.SearchParams | None):
            return None
        if not isinstance(arguments.get("query_filter"), models.Filter | None):
            return None
        given = {name: value for name, value in params or () if value not in (None, False)}
        if not _PARAMS.issuperset(given):
            return None  # among them exact, which asks for no approximation at all
        return _QueryPoints(arguments, given, self.local)

    def same(self, name: str, info: CollectionInfo) -> Steps[bool]:
        found = yield Call(self.client.get_aliases)
        named = {alias.alias_name: alias.collection_name for alias in found.aliases}
        return bool(named.get(name, name) == named.get(info.name, info.name))


@dataclass(frozen=True, slots=True)
class _QueryPoints:
    """A call of ``query_points``."""

    arguments: Mapping[str, Any]
    params: Mapping[str, Any]
    local: bool

    @property
    def name(self) -> str:
        return str(self.arguments["collection_name"])

    def request(self, info: CollectionInfo) -> tuple[SearchRequest, int] | None:
        arguments = self.arguments
        limit, offset = arguments.get("limit", 10), arguments.get("offset") or 0
        timeout = arguments.get("timeout")
        whole = isinstance(limit, int) and isinstance(offset, int) and limit > 0 <= offset
        if not whole or (arguments.get("using") or "") != info.field:
            return None
        try:
            queries, single = as_queries(arguments["query"], info.dim)
        except InvalidInput:
            return None  # such as several vectors, or names of points
        if not single:
            return None
        request = SearchRequest(
            queries,
            limit,
            arguments.get("query_filter"),
            params=self.params,
            timeout=None if timeout is None else float(timeout),
        )
        return request, limit + offset

    def natively(self, timeout: float | None) -> Mapping[str, Any]:
        # Qdrant counts whole seconds, and 0 would mean no time at all.
        seconds = None if timeout is None else max(1, math.ceil(timeout))
        return {**self.arguments, "timeout": seconds}

    def routed(self, plain: Call, step: Search, depth: int) -> Steps[Found]:
        collection = step.collection
        info = collection.info
        check_layout(step.plan, collection.layout(), info.name)
        (query,) = plan_queries(
            replace(step.request, k=depth),
            step.plan,
            info.field,
            collection.break_even,
            exact=not self.local,
        )
        arguments = {**self.arguments, "query_filter": query.filter, "search_params": query.params}
        if query.prefetch is not None:
            arguments["prefetch"] = query.prefetch
        if step.request.timeout != self.arguments.get("timeout"):
            arguments["timeout"] = self.natively(step.request.timeout)["timeout"]
        threshold = arguments.pop("score_threshold", None)
        response = yield plain.instead(arguments)
        hits = list(response.points)
        if threshold is None:
            return Found(response, hits)
        # Without the threshold, to tell a plan that found too little from hits that are cut off.
        scores = np.array([hit.score for hit in hits], dtype=np.float32)
        edge = np.float32(threshold)
        if (scores == edge).any():  # whether the edge itself passes is the database's to say
            response = yield plain.instead({**arguments, "score_threshold": threshold})
        else:
            better = scores > edge if info.metric.larger_is_better else scores < edge
            response.points = [hit for hit, ok in zip(hits, better.tolist(), strict=True) if ok]
        return Found(response, hits)

    def hits(self, response: Any) -> list[Any]:
        return list(response.points)
