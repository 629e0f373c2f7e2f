"""What a search asks of Milvus, and what the answers mean, without asking it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_groups import group_by_cells, merge_hits
from amips_plugins.adapters.milvus.cells import CELL_FIELD
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.collection import Hit, SearchRequest, searches_everything
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import IntArray, native_scores

__all__ = ["Call", "as_hits", "check_partitions", "plan_calls", "time_left"]

_NO_TIME = 1e-3  # pymilvus takes 0 for no limit


@dataclass(frozen=True, slots=True)
class Call:
    """One call of ``client.search`` for some of the queries; the timeout is no argument of it."""

    rows: Sequence[int]
    arguments: dict[str, Any]


def plan_calls(
    request: SearchRequest, plan: QueryPlan, table: Table, break_even: float
) -> list[Call]:
    """Write a search as calls, one for all queries that search the same cells.

    Raises ``InvalidInput`` where the filter is no expression, or ``params`` name another metric.
    """
    if not isinstance(request.filter, str | None):
        raise InvalidInput(
            f"A Milvus filter is an expression such as 'year > 2000', "
            f"but got {type(request.filter).__name__}."
        )
    # With no field named, Milvus Lite returns all of them, vectors too.
    fields = list(request.fields) or [table.key]
    limit, vectors = request.k, request.queries
    if plan.rewritten is not None:
        vectors = plan.rewritten
        limit = max(plan.rescore, request.k)
        fields = list(dict.fromkeys([*fields, table.info.field]))
    fixed: dict[str, Any] = {
        "collection_name": table.name,
        "anns_field": table.info.field,
        "limit": limit,
        "output_fields": fields,
        "search_params": _search_params(request.params, table),
    }
    calls = []
    for cells, rows in _groups(len(vectors), plan, break_even):
        condition, partitions = _scope(request.filter or "", cells, table)
        scope = {"filter": condition, "partition_names": partitions}
        calls.append(Call(rows, {**fixed, **scope, "data": vectors[list(rows)]}))
    return calls


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
    condition: str, cells: Sequence[int] | None, table: Table
) -> tuple[str, list[str] | None]:
    """Return the filter and the partitions of a search of these cells."""
    if cells is None or table.cells is None:
        return condition, None
    if table.cells.storage == "partitions":
        return condition, [table.cells.partition(cell) for cell in cells]
    inside = f"{CELL_FIELD} in {list(cells)}"
    return (f"({condition}) and {inside}" if condition else inside), None


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


def check_partitions(calls: Sequence[Call], there: Sequence[str], name: str) -> None:
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
            found[row].append(_hits(request, plan, table, row, hits))
    better = table.info.metric.larger_is_better
    return [
        parts[0] if len(parts) == 1 else merge_hits(parts, request.k, larger_is_better=better)
        for parts in found
    ]


def _hits(
    request: SearchRequest, plan: QueryPlan, table: Table, row: int, answer: Sequence[Any]
) -> list[Hit]:
    scores = [float(hit["distance"]) for hit in answer]
    places: Sequence[int] = range(len(answer))
    if plan.rewritten is not None and scores:
        info = table.info
        keys = np.asarray([hit["entity"][info.field] for hit in answer], dtype=np.float32)
        exact = native_scores(request.queries[row], keys, info.metric)
        ranked = -exact if info.metric.larger_is_better else exact
        places = np.argsort(ranked, kind="stable")[: request.k].tolist()
        scores = exact.tolist()
    return [
        Hit(
            # Servers up to 2.3 do not say what the key is called.
            answer[place].get(table.key, answer[place].get("id")),
            scores[place],
            {name: answer[place]["entity"].get(name) for name in request.fields},
        )
        for place in places
    ]
