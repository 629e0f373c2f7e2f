"""Qdrant clients: ``query_points`` of one dense vector, or a batch of one such query."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.collection import Collection, CollectionInfo, SearchRequest
from amips_plugins.errors import InvalidInput, require
from amips_plugins.plan import QueryPlan
from amips_plugins.proxies.calls import Call, Found, RoutableCall
from amips_plugins.proxies.client import ClientProxy
from amips_plugins.proxies.late import LateRouter
from amips_plugins.routing.effects import Effects, run, run_async
from amips_plugins.routing.router import LearnedRouter
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
# What the arguments of query_points are called in a batch.
_BATCHED = {
    "query_filter": "filter",
    "search_params": "params",
    "shard_key_selector": "shard_key",
    "with_vectors": "with_vector",
}
_ALONE = {batched: alone for alone, batched in _BATCHED.items()}


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
            dialects = {
                "query_points": _Qdrant(client, local),
                "query_batch_points": _QdrantBatch(client, local),
            }
            return proxy(client, kinds[name], dialects, router, recall)
    return None


class _QdrantProxy(ClientProxy):
    __slots__ = ()

    def query_points(self, *args: Any, **kwargs: Any) -> Any:
        return run(self._amips_routing["query_points"].search(args, kwargs))

    def query_batch_points(self, *args: Any, **kwargs: Any) -> Any:
        return run(self._amips_routing["query_batch_points"].search(args, kwargs))


class _AsyncQdrantProxy(ClientProxy):
    __slots__ = ()

    async def query_points(self, *args: Any, **kwargs: Any) -> Any:
        return await run_async(self._amips_routing["query_points"].search(args, kwargs), None)

    async def query_batch_points(self, *args: Any, **kwargs: Any) -> Any:
        routing = self._amips_routing["query_batch_points"]
        return await run_async(routing.search(args, kwargs), None)


@dataclass(frozen=True, slots=True)
class _Qdrant:
    """How ``query_points`` is asked."""

    client: Any
    local: bool  # always exact, and warns of parameters

    def read(self, arguments: Mapping[str, Any]) -> RoutableCall | None:
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

    def same(self, name: str, info: CollectionInfo) -> Effects[bool]:
        found = yield Call(self.client.get_aliases)
        named = {alias.alias_name: alias.collection_name for alias in found.aliases}
        return bool(named.get(name, name) == named.get(info.name, info.name))


class _QdrantBatch(_Qdrant):
    """How ``query_batch_points`` is asked: one query may be routed, as if it came alone."""

    def read(self, arguments: Mapping[str, Any]) -> RoutableCall | None:
        requests = arguments.get("requests")
        if not isinstance(requests, (list, tuple)) or len(requests) != 1:
            return None
        (request,) = requests
        if not isinstance(request, models.QueryRequest):
            return None
        alone = {_ALONE.get(name, name): value for name, value in request if value is not None}
        alone |= {name: value for name, value in arguments.items() if name != "requests"}
        asked = super().read(alone)
        if not isinstance(asked, _QueryPoints):
            return None
        return _QueryBatch(asked.arguments, asked.params, asked.local, arguments, request)


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
        condition = arguments.get("query_filter")
        if condition is None and (offset or arguments.get("score_threshold") is not None):
            condition = "page"  # no whole answer, and marked as if it were filtered
        request = SearchRequest(
            queries,
            limit,
            condition,
            params=self.params,
            timeout=None if timeout is None else float(timeout),
        )
        return request, limit + offset

    def natively(self, timeout: float | None) -> Mapping[str, Any]:
        return {**self.arguments, "timeout": _seconds(timeout)}

    def routed(
        self, plain: Call, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> Effects[Found]:
        info = collection.info
        depth = request.k + (self.arguments.get("offset") or 0)
        reader: Any = collection  # a QdrantCollection
        (query,) = reader.queries(
            replace(request, k=depth, filter=self.arguments.get("query_filter")), plan
        )
        changes: dict[str, Any] = {"query_filter": query.filter, "search_params": query.params}
        if query.prefetch is not None:
            changes["prefetch"] = query.prefetch
        if request.timeout != self.arguments.get("timeout"):
            changes["timeout"] = _seconds(request.timeout)
        threshold = self.arguments.get("score_threshold")
        if threshold is None:
            response = yield self.changed(plain, changes)
            return Found(response, self.hits(response))
        # Without the threshold, to tell a plan that found too little from hits that are cut off.
        response = yield self.changed(plain, {**changes, "score_threshold": None})
        hits = self.hits(response)
        scores = np.array([hit.score for hit in hits], dtype=np.float32)
        edge = np.float32(threshold)
        if (scores == edge).any():  # whether the edge itself passes is the database's to say
            response = yield self.changed(plain, changes)
        else:
            better = scores > edge if info.metric.larger_is_better else scores < edge
            kept = [hit for hit, ok in zip(hits, better.tolist(), strict=True) if ok]
            self.answer(response).points = kept
        return Found(response, hits)

    def changed(self, plain: Call, changes: Mapping[str, Any]) -> Call:
        """Return the caller's call with these arguments changed."""
        return plain.instead({**self.arguments, **changes})

    def answer(self, response: Any) -> Any:
        """Return the answer to the query."""
        return response

    def hits(self, response: Any) -> list[Any]:
        return list(self.answer(response).points)


@dataclass(frozen=True, slots=True)
class _QueryBatch(_QueryPoints):
    """A call of ``query_batch_points`` with one query."""

    given: Mapping[str, Any]
    only: models.QueryRequest

    def natively(self, timeout: float | None) -> Mapping[str, Any]:
        return {**self.given, "timeout": _seconds(timeout)}

    def changed(self, plain: Call, changes: Mapping[str, Any]) -> Call:
        timeout = {name: value for name, value in changes.items() if name == "timeout"}
        update = {_BATCHED.get(name, name): value for name, value in changes.items()}
        update.pop("timeout", None)
        requests = [self.only.model_copy(update=update)]
        return plain.instead({**self.given, **timeout, "requests": requests})

    def answer(self, response: Any) -> Any:
        return response[0]


def _seconds(timeout: float | None) -> int | None:
    # Qdrant counts whole seconds, and 0 would mean no time at all.
    return None if timeout is None else max(1, math.ceil(timeout))
