"""Qdrant clients: ``query_points`` of one dense vector, or a batch of one such query, is routed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import merge_hits
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.messages import prefers_grpc
from amips_plugins.collection import Collection, CollectionInfo, SearchRequest
from amips_plugins.errors import InvalidInput, require
from amips_plugins.plan import QueryPlan
from amips_plugins.proxies.calls import Call, Found, RoutableCall, RoutedCollection
from amips_plugins.proxies.client import ClientProxy, reading, routing
from amips_plugins.proxies.late import LateRouter
from amips_plugins.proxies.qdrant_writes import writes
from amips_plugins.proxies.records import hide
from amips_plugins.routing.effects import Effects
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
_OF_THE_CALL = frozenset({"collection_name", "consistency", "timeout"})
_ALONE = {batched: alone for alone, batched in _BATCHED.items()}


def wrap(
    kinds: Mapping[str, type],
    client: Any,
    router: LearnedRouter | LateRouter,
    recall: float | None,
) -> ClientProxy | None:
    """Return the proxy of a client of these classes, or None if it is of no kind known here."""
    kind = kinds.get("QdrantClient", kinds.get("AsyncQdrantClient"))
    if kind is None:
        return None

    def same(name: str, info: CollectionInfo) -> Effects[bool]:
        found = yield Call(client.get_aliases)
        named = {alias.alias_name: alias.collection_name for alias in found.aliases}
        return bool(named.get(name, name) == named.get(info.name, info.name))

    def as_asked(collection: Any) -> bool:
        return not isinstance(collection, QdrantCollection) or collection.finds_as_asked

    routed = RoutedCollection(router, recall, same, as_asked)
    methods = {
        "query_points": routing(_Qdrant(), routed, _show_points),
        "query_batch_points": routing(_QdrantBatch(), routed, _show_batch),
        "query_points_groups": reading(_show_groups),
        "scroll": reading(_show_scrolled),
        "retrieve": reading(_show),
        **writes(routed),
    }
    return ClientProxy(client, kind, methods, routed)


def _show(records: Any) -> Any:
    for record in records:
        payload = record.payload
        if payload:
            hide(payload)
    return records


def _show_scrolled(answer: Any) -> Any:
    _show(answer[0])
    return answer


def _show_points(response: Any) -> Any:
    _show(response.points)
    return response


def _show_batch(responses: Any) -> Any:
    for response in responses:
        _show(response.points)
    return responses


def _show_groups(response: Any) -> Any:
    for group in response.groups:
        _show(group.hits)
        if group.lookup is not None:
            hide(group.lookup.payload)
    return response


@dataclass(frozen=True, slots=True)
class _Qdrant:
    """How ``query_points`` is asked."""

    def read(self, arguments: dict[str, Any]) -> RoutableCall | None:
        if not _KEPT.issuperset(arguments):
            for name, value in arguments.items():
                if value is not None and name not in _KEPT:
                    return None
        if not isinstance(arguments.get("query"), (list, tuple, np.ndarray)):
            return None
        condition, params = arguments.get("query_filter"), arguments.get("search_params")
        if condition is not None and not isinstance(condition, models.Filter):
            return None
        given: dict[str, Any] = {}
        if params is not None:
            if not isinstance(params, models.SearchParams):
                return None
            given = {name: value for name, value in params if value not in (None, False)}
            if not _PARAMS.issuperset(given):
                return None  # among them exact, which asks for no approximation at all
        return _QueryPoints(arguments, given)


class _QdrantBatch(_Qdrant):
    """How ``query_batch_points`` is asked: one query may be routed, as if it came alone."""

    def read(self, arguments: dict[str, Any]) -> RoutableCall | None:
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
        return _QueryBatch(asked.arguments, asked.params, arguments, request)


@dataclass(slots=True)
class _QueryPoints:
    """A call of ``query_points``."""

    arguments: Mapping[str, Any]
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.arguments["collection_name"])

    @property
    def offset(self) -> Any:
        return self.arguments.get("offset") or 0

    def request(self, collection: Collection) -> SearchRequest | None:
        arguments, info = self.arguments, collection.info
        limit, offset = arguments.get("limit", 10), self.offset
        timeout = arguments.get("timeout")
        whole = type(limit) is int and type(offset) is int and limit > 0 <= offset
        if not whole or (arguments.get("using") or "") != info.field:
            return None
        try:
            queries, single = as_queries(arguments["query"], info.dim)
        except InvalidInput:
            return None  # such as several vectors, or names of points
        if not single:
            return None
        shard_key, condition = arguments.get("shard_key_selector"), arguments.get("query_filter")
        if shard_key is not None:
            chosen = ("cell_shards", "shards")  # those of a layout, and of given partitions
            if any(getattr(collection, one, None) for one in chosen):
                return None  # of these the router chooses itself
            if not info.namespace:
                condition = ["shard_key", condition]  # one that nothing is known of
        if info.namespace and str(shard_key) != info.namespace:
            return None  # the router knows one shard key alone
        return SearchRequest(
            queries,
            limit,
            condition,
            params=self.params,
            timeout=None if timeout is None else float(timeout),
        )

    def whole(self, collection: Collection) -> bool:
        given = self.arguments
        if given.get("offset") or given.get("score_threshold") is not None:
            return False
        return given.get("shard_key_selector") is None or bool(collection.info.namespace)

    def natively(self, timeout: float | None) -> Mapping[str, Any]:
        return {**self.arguments, "timeout": _seconds(timeout)}

    def tuned(
        self, plain: Call, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> Effects[Any]:
        reader: Any = collection  # a QdrantCollection
        _, params = reader.narrowed(request, plan, None)
        changes = {"search_params": params, "timeout": _seconds(request.timeout)}
        changed = replace(self, arguments={**self.arguments, **changes})
        return (yield from changed.plainly(self.changed(plain, changes), collection))

    def exactly(self, plain: Call, collection: Collection, request: SearchRequest) -> Effects[Any]:  # noqa: ARG002 - Milvus' asks it
        exact = models.SearchParams(exact=True)
        timeout = _seconds(request.timeout)
        return (yield self.changed(plain, {"search_params": exact, "timeout": timeout}))

    def plainly(self, own: Call, collection: Collection) -> Effects[Any]:
        reader: Any = collection  # a QdrantCollection
        given = self.arguments
        parts = reader.native_parts(given.get("query_filter"), given.get("search_params"))
        if parts is None:
            return (yield own)
        depth, larger = (
            given.get("limit", 10) + self.offset,
            collection.info.metric.larger_is_better,
        )
        kept = {_BATCHED.get(name, name): value for name, value in given.items()}
        request = models.QueryRequest(
            **{name: kept[name] for name in kept.keys() & models.QueryRequest.model_fields.keys()}
        )
        requests = [
            request.model_copy(
                update={"filter": part, "params": asked, "limit": depth, "offset": None}
            )
            for part, asked in parts
        ]
        whole = {name: given[name] for name in given.keys() & _OF_THE_CALL}
        timeout = own.kwargs.get("timeout", whole.get("timeout"))
        batch = own.method.__self__.query_batch_points  # type: ignore[attr-defined]
        arguments = {**whole, "requests": requests, "timeout": timeout}
        responses = yield own.other(batch, arguments)
        merged = merge_hits([one.points for one in responses], depth, larger_is_better=larger)
        responses[0].points = merged[self.offset :]
        return self.wrapped(responses[0])

    def routed(
        self, plain: Call, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> Effects[Found]:
        reader: Any = collection  # a QdrantCollection
        condition = self.arguments.get("query_filter")
        changes: dict[str, Any] = {}
        if plan.rewritten is None:
            changes["query_filter"], changes["search_params"] = reader.narrowed(
                request, plan, condition, over_grpc=self.takes_messages(plain)
            )
            asked = reader.asked_shards(plan)
            if asked is not None:
                changes["shard_key_selector"] = asked
        else:
            (query,) = reader.queries(replace(request, filter=condition), plan)
            changes["query_filter"], changes["search_params"] = query.filter, query.params
            changes["prefetch"] = query.prefetch
        if request.timeout != self.arguments.get("timeout"):
            changes["timeout"] = _seconds(request.timeout)
        threshold = self.arguments.get("score_threshold")
        if threshold is not None:
            # To tell a plan that found too little from hits that are cut off.
            changes["score_threshold"] = None
        response = yield self.changed(plain, changes)
        found = self.hits(response)
        if len(found) < request.k and self.offset:
            everything = changes["query_filter"] is condition and plan.rewritten is None
            everything = everything and "shard_key_selector" not in changes
            if not everything:
                found = yield from self._beyond(plain, changes, response, request)
        if threshold is None:
            return Found(response, found)
        page = self.hits(response)
        scores = np.array([hit.score for hit in page], dtype=np.float32)
        edge = np.float32(threshold)
        if (scores == edge).any():  # whether the edge itself passes is the database's to say
            response = yield self.changed(plain, {**changes, "score_threshold": threshold})
        else:
            larger = collection.info.metric.larger_is_better
            better = scores > edge if larger else scores < edge
            kept = [hit for hit, ok in zip(page, better.tolist(), strict=True) if ok]
            self.answer(response).points = kept
        return Found(response, found)

    def _beyond(
        self, plain: Call, changes: Mapping[str, Any], response: Any, request: SearchRequest
    ) -> Effects[list[Any]]:
        """Fill a page that the plan's hits do not: behind them come all others, best first.

        So pages fit together. Where not even the first page was full, the native search answered
        that, and has to answer this one.
        """
        whole = {"offset": 0, "limit": self.offset + request.k}
        planned = self.hits((yield self.changed(plain, {**changes, **whole})))
        if len(planned) < request.k:
            return []
        native = {name: changes[name] for name in ("timeout", "score_threshold") if name in changes}
        others = self.hits((yield self.changed(plain, {**native, **whole})))
        there = {hit.id for hit in planned}
        pages = planned + [hit for hit in others if hit.id not in there]
        self.answer(response).points = pages[self.offset : self.offset + request.k]
        return planned

    def takes_messages(self, plain: Call) -> bool:
        """Tell whether the call takes filter and parameters as messages of gRPC."""
        return prefers_grpc(getattr(plain.method, "__self__", None))

    def changed(self, plain: Call, changes: Mapping[str, Any]) -> Call:
        """Return the caller's call with these arguments changed."""
        return plain.instead({**self.arguments, **changes})

    def answer(self, response: Any) -> Any:
        """Return the answer to the query."""
        return response

    def wrapped(self, response: Any) -> Any:
        """Return an answer in the form of the call's."""
        return response

    def hits(self, response: Any) -> list[Any]:
        return list(self.answer(response).points)


@dataclass(slots=True)
class _QueryBatch(_QueryPoints):
    """A call of ``query_batch_points`` with one query."""

    given: Mapping[str, Any]
    only: models.QueryRequest

    def natively(self, timeout: float | None) -> Mapping[str, Any]:
        return {**self.given, "timeout": _seconds(timeout)}

    def takes_messages(self, plain: Call) -> bool:  # noqa: ARG002 - its models hold models
        return False

    def changed(self, plain: Call, changes: Mapping[str, Any]) -> Call:
        timeout = {name: value for name, value in changes.items() if name == "timeout"}
        update = {_BATCHED.get(name, name): value for name, value in changes.items()}
        update.pop("timeout", None)
        requests = [self.only.model_copy(update=update)]
        return plain.instead({**self.given, **timeout, "requests": requests})

    def answer(self, response: Any) -> Any:
        return response[0]

    def wrapped(self, response: Any) -> Any:
        return [response]


def _seconds(timeout: float | None) -> int | None:
    # Qdrant counts whole seconds, and 0 would mean no time at all.
    return None if timeout is None else max(1, math.ceil(timeout))
