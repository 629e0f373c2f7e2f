"""What a search asks of Milvus, and what the answers mean, without asking it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW, group_by_cells, merge_hits
from amips_plugins.adapters.milvus.cell_index import SCANNED, IndexSearch
from amips_plugins.adapters.milvus.cells import CELL_FIELD, is_ours
from amips_plugins.adapters.milvus.opening import widest_params
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.collection import Hit, Id, SearchRequest
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.plan import QueryPlan, searches_everything
from amips_plugins.vectors import IntArray, native_scores

__all__ = [
    "MAX_CANDIDATES",
    "Call",
    "all_or_none",
    "as_hits",
    "changed_meaning",
    "deep_enough",
    "id_of",
    "plan_calls",
    "score_calls",
    "scored_by_ids",
    "time_left",
    "with_params",
]

MAX_CANDIDATES = 16_384
"""What a server returns for one query, its offset included."""


_NO_TIME = 1e-3  # pymilvus takes 0 for no limit
_WIDTHS = frozenset(
    {"nprobe", "ef", "search_list", "reorder_k", "refine_k", "level", "itopk_size", "search_width"}
)
"""Parameters that say how wide a search looks, and not what it is to find."""
_EVERYTHING = frozenset({"*", "$meta"})
_LENGTHS = ("ef", "search_list", "reorder_k")  # of lists of candidates: hits are taken from them


@dataclass(frozen=True, slots=True)
class Call:
    """One call of ``client.search`` for some of the queries; the timeout is no argument of it.

    ``with_vectors`` says that its hits are candidates whose vectors come with them.
    """

    rows: Sequence[int]
    arguments: dict[str, Any]
    with_vectors: bool = False


def changed_meaning(params: Mapping[str, Any] | None) -> str | None:
    """Name the parameter whose meaning a plan would change (see ``Collection.unroutable``)."""
    asked = dict(params or {})
    inner = asked.pop("params", None) or {}
    if not isinstance(inner, Mapping):
        return "params: params"
    offset = asked.pop("offset", 0)
    if type(offset) is not int or offset < 0:
        return "params: offset"
    known = _WIDTHS | {"metric_type"}
    other = [name for name, value in (*asked.items(), *inner.items()) if name not in known]
    return f"params: {other[0]}" if other else None


def _offset(request: SearchRequest, plan: QueryPlan, *, rescored: bool = False) -> int:
    """Return how many of the best hits to leave out here; of a native search Milvus does it."""
    changed = plan.cells is not None or plan.rewritten is not None or rescored
    return int((request.params or {}).get("offset", 0)) if changed else 0


def plan_calls(
    request: SearchRequest,
    plan: QueryPlan,
    table: Table,
    break_even: float,
    there: Sequence[str] | None = None,
    index: IndexSearch = SCANNED,
) -> list[Call]:
    """Write a search as calls, one for all queries that search the same cells.

    Of the partitions that are ``there`` those that hold no cell are overflow. ``index`` is the one
    that is searched where it matters: inside cells, and where a search is to find the most.

    Raises ``InvalidInput`` where the filter is no expression, or ``params`` name another metric,
    and ``CollectionError`` where Milvus Lite has lost a cell's partition.
    """
    if not isinstance(request.filter, str | None):
        raise InvalidInput(
            f"A Milvus filter is an expression such as 'year > 2000', "
            f"but got {type(request.filter).__name__}."
        )
    # With no field named, Milvus Lite returns all of them, vectors too.
    fields = [name for name in request.fields if not is_ours(name)] or [table.key]
    rescored = plan.rewritten is None and index.oversampling > 1.0
    offset, vectors = _offset(request, plan, rescored=rescored), request.queries
    limit = request.k + offset
    with_vectors = rescored or (plan.rewritten is not None and not scored_by_ids(plan, table))
    if rescored:
        limit = max(min(index.candidates(limit), MAX_CANDIDATES), limit)
        fields = list(dict.fromkeys([*fields, table.info.field]))
    if plan.rewritten is not None:
        vectors = plan.rewritten
        limit = max(min(plan.rescore, MAX_CANDIDATES), limit)
        more = [*fields, table.info.field] if with_vectors else [table.key]
        fields = list(dict.fromkeys(more))
    params = with_params(_search_params(request.params, table), plan.params, request.k)
    params = deep_enough(params, request.k + offset, limit)
    for name, value in _depth(plan, table, index, limit):
        params = _unless_told(params, name, value)
    if offset:
        del params["offset"]
    fixed: dict[str, Any] = {
        "collection_name": table.name,
        "anns_field": table.info.field,
        "limit": limit,
        "output_fields": fields,
        "search_params": params,
    }
    others = table.overflow_partitions(there) if there else []
    calls = []
    for cells, rows in _groups(len(vectors), plan, break_even):
        condition, partitions = _scope(request.filter or "", cells, table, others, there or ())
        scope = {"filter": condition, "partition_names": partitions}
        arguments = {**fixed, **scope, "data": vectors[list(rows)]}
        calls.append(Call(rows, arguments, with_vectors))
    if table.is_lite and there:
        _check_partitions(calls, there, table.name)
    return calls


def scored_by_ids(plan: QueryPlan, table: Table) -> bool:
    """Tell whether a second search scores the candidates of a rewritten query by their ids.

    For one query on a server that takes half the CPU of fetching their vectors, or less. A batch
    would take a search for each query, and Milvus Lite looks at every row for each.
    """
    return plan.rewritten is not None and len(plan.rewritten) == 1 and not table.is_lite


def score_calls(
    request: SearchRequest,
    plan: QueryPlan,
    table: Table,
    asked: Sequence[Call],
    answers: Sequence[Any],
    index: Mapping[str, Any],
) -> list[Call]:
    """Write the second search, by the query itself and among the candidates that were found."""
    fields = [name for name in request.fields if not is_ours(name)] or [table.key]
    depth = request.k + _offset(request, plan)
    widest = widest_params(index, depth, is_lite=table.is_lite)
    params = {"metric_type": table.info.metric.name, "params": widest}
    fixed = {
        "data": request.queries,
        "limit": depth,
        "output_fields": fields,
        "search_params": params,
    }
    return [
        Call(call.rows, {**call.arguments, **fixed, "filter": table.where_ids(ids)})
        for call, (hits,) in zip(asked, answers, strict=True)
        if (ids := [id_of(hit, table) for hit in hits])
    ]


def id_of(hit: Any, table: Table) -> Id:
    """Return the id of a hit."""
    # Servers up to 2.3 do not say what the key is called.
    found: Id = hit.get(table.key, hit.get("id"))
    return found


def _groups(
    count: int, plan: QueryPlan, break_even: float
) -> list[tuple[Sequence[int] | None, Sequence[int]]]:
    """Say which cells to search for which queries; None is all of the collection."""
    if plan.cells is None:
        return [(None, range(count))]
    everything = searches_everything(plan, break_even)
    whole, some = np.flatnonzero(everything).tolist(), np.flatnonzero(~everything)
    groups: list[tuple[Sequence[int] | None, Sequence[int]]] = [(None, whole)] if whole else []
    routed: IntArray = plan.cells[some]
    groups += [(cells, some[rows].tolist()) for cells, rows in group_by_cells(routed)]
    return groups


def _scope(
    condition: str,
    cells: Sequence[int] | None,
    table: Table,
    others: Sequence[str],
    there: Sequence[str],
) -> tuple[str, list[str] | None]:
    """Return the filter and the partitions of a search of these cells."""
    if cells is not None and table.given is not None:
        return _given_scope(condition, cells, table, others, there)
    if cells is None or table.cells is None:
        return condition, None
    if table.cells.storage == "partitions":
        named = [table.cells.partition(cell) for cell in cells]
        return condition, list(dict.fromkeys([*named, *(others if OVERFLOW in cells else ())]))
    inside = f"{CELL_FIELD} in {list(cells)}"
    return (f"({condition}) and {inside}" if condition else inside), None


def _given_scope(
    condition: str, cells: Sequence[int], table: Table, others: Sequence[str], there: Sequence[str]
) -> tuple[str, list[str] | None]:
    assert table.given is not None  # noqa: S101 - for the type checker
    chosen = table.given.chosen(cells)
    if table.by_partitions:
        # One that is gone has lost its keys with it. Naming none would search all of them.
        named = [str(value) for value in chosen if value in there]
        return condition, [*named, *(others if OVERFLOW in cells or not named else ())]
    ways = [table.has_values(chosen)] if chosen else []
    ways += [table.has_others(table.given.values)] if OVERFLOW in cells else []
    inside = " or ".join(ways)
    return (f"({condition}) and ({inside})" if condition else inside), None


def _search_params(params: Mapping[str, Any] | None, table: Table) -> dict[str, Any]:
    metric = table.info.metric.name
    asked = dict(params or {})
    for place in (asked, asked.get("params") or {}):
        if str(place.get("metric_type", metric)).upper() != metric:
            raise InvalidInput(  # Milvus Lite would answer with wrong scores
                f"params name the metric {place['metric_type']}, but the index of "
                f"{table.name!r} compares by {metric}; leave metric_type out."
            )
    return {**asked, "metric_type": metric}


def with_params(
    params: Mapping[str, Any], planned: Mapping[str, Any] | None, k: int, offset: int | None = None
) -> dict[str, Any]:
    """Put a plan's own search parameters in place of the caller's.

    They were chosen for k hits, and have to hold those of the pages before, too.
    """
    if planned is None:
        return dict(params)
    before = int(params.get("offset", 0)) if offset is None else offset
    planned = deep_enough(planned, 0, before + k)
    kept = {name: value for name, value in params.items() if name not in planned}
    return {**kept, "params": {**(kept.get("params") or {}), **planned}}


def _depth(
    plan: QueryPlan, table: Table, index: IndexSearch, limit: int
) -> Iterator[tuple[str, float]]:
    """Say how far the index inside the cells is searched.

    Lists are all searched where nothing was calibrated, as the bundle's targets have it; so are
    those of an index over all cells, of which the keys of a cell may lie in any.
    """
    if plan.cells is None or table.cells is None:
        return
    inside = table.cells.storage == "partitions" and not table.is_lite
    if index.kind == "graph" and plan.effort is not None and inside:
        yield "ef", max(plan.effort, limit)
    if index.kind == "lists":
        yield "nprobe", min(plan.probes or index.lists, index.lists) if inside else index.lists
    if index.reranks:
        name, times = index.reranks
        yield name, math.ceil(times * limit) if name == "reorder_k" else times


def _unless_told(params: dict[str, Any], name: str, value: float) -> dict[str, Any]:
    """Set a parameter that says how far to search, unless the caller does."""
    inner = dict(params.get("params") or {})
    if name in params or name in inner:
        return params
    return {**params, "params": {**inner, name: value}}


def deep_enough(params: Mapping[str, Any], depth: int, limit: int) -> dict[str, Any]:
    """Lengthen a list of candidates that was told for fewer hits than a plan fetches.

    A server refuses a search for more hits than its list holds. One that is too short for the
    ``depth`` of what the caller asks is left to the server's own error.
    """

    def lengthened(told: Mapping[str, Any]) -> dict[str, Any]:
        short = {
            name: limit
            for name in _LENGTHS
            if (length := _whole(told.get(name))) is not None and depth <= length < limit
        }
        return {**told, **short}

    inner = params.get("params")
    return {**lengthened(params), **({"params": lengthened(inner)} if inner else {})}


def _whole(told: Any) -> int | None:
    """Return a number as a server reads it, which takes a text for one."""
    if isinstance(told, str) and told.isdecimal():
        return int(told)
    return told if isinstance(told, int) else None


def _check_partitions(calls: Sequence[Call], there: Sequence[str], name: str) -> None:
    """Refuse calls for partitions that are not there: Milvus Lite takes them for empty ones."""
    missing = {p for call in calls for p in call.arguments["partition_names"] or ()} - set(there)
    if missing:
        raise CollectionError(
            f"Collection {name!r} has no partition {min(missing)!r}; lay it out again."
        )


def time_left(timeout: float | None, started: float) -> float | None:
    """Return what one more call may take of a deadline; the database says so when it is past."""
    return None if timeout is None else max(timeout - (time.monotonic() - started), _NO_TIME)


def as_hits(
    request: SearchRequest,
    plan: QueryPlan,
    table: Table,
    calls: Sequence[Call],
    answers: Sequence[Any],
) -> list[list[Hit]]:
    """Return every query's hits, scored by the query itself and merged from its calls."""
    found: list[list[list[Hit]]] = [[] for _ in request.queries]
    for call, answer in zip(calls, answers, strict=True):
        for row, hits in zip(call.rows, answer, strict=True):
            found[row].append(_hits(request, plan, table, call, row, hits))
    rescored = any(call.with_vectors for call in calls)
    better, offset = table.info.metric.larger_is_better, _offset(request, plan, rescored=rescored)
    depth = request.k + offset
    best = (
        parts[0] if len(parts) == 1 else merge_hits(parts, depth, larger_is_better=better)
        for parts in found
    )
    return [hits[offset:depth] for hits in best]


def _hits(
    request: SearchRequest,
    plan: QueryPlan,
    table: Table,
    call: Call,
    row: int,
    answer: Sequence[Any],
) -> list[Hit]:
    scores = [float(hit["distance"]) for hit in answer]
    places: Sequence[int] = range(len(answer))
    if call.with_vectors and scores:
        info = table.info
        keys = np.asarray([hit["entity"][info.field] for hit in answer], dtype=np.float32)
        exact = native_scores(request.queries[row], keys, info.metric)
        ranked = -exact if info.metric.larger_is_better else exact
        depth = request.k + _offset(request, plan, rescored=True)
        places = np.argsort(ranked, kind="stable")[:depth].tolist()
        scores = exact.tolist()
    wanted = set(request.fields)
    # What comes beside the fields asked for: the key or the vector, added by ``plan_calls``.
    added = {table.key, table.info.field} if "*" not in wanted else set()
    return [
        Hit(
            id_of(answer[place], table),
            scores[place],
            {
                name: value
                for name, value in answer[place]["entity"].items()
                if not is_ours(name)
                and (name in wanted or (wanted & _EVERYTHING and name not in added))
            },
        )
        for place in places
    ]


async def all_or_none(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Await calls at the same time; where one fails, or the caller goes, so do the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
