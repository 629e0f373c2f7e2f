"""Plans, filters, ids and records: what goes to Qdrant and what comes back, without asking it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cells import cell_key
from amips_plugins.adapters.qdrant.opening import listed
from amips_plugins.collection import Hit, Id, KeyBatch, SearchRequest, searches_everything
from amips_plugins.errors import InvalidInput, require
from amips_plugins.plan import QueryPlan

if TYPE_CHECKING:
    from qdrant_client import models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = [
    "all_of",
    "as_arguments",
    "as_batch",
    "as_hits",
    "as_ids",
    "cell_of",
    "empty",
    "has_cell",
    "has_vector",
    "overflow",
    "plain_id",
    "plan_queries",
]


def plan_queries(
    request: SearchRequest, plan: QueryPlan, field: str, break_even: float, exact: bool
) -> list[models.QueryRequest]:
    """Write the plan as queries, one for each row.

    Parameters
    ----------
    request, plan
        What is searched and how.
    field
        Name of the vector, empty for the unnamed one.
    break_even
        Share of the keys above which no cells are named.
    exact
        Whether to ask for exactness; False where every search is exact.

    Raises
    ------
    InvalidInput
        The filter is not a ``models.Filter``, or a parameter not one of ``models.SearchParams``.
    """
    if request.filter is not None and not isinstance(request.filter, models.Filter):
        raise InvalidInput(
            "A Qdrant filter is a qdrant_client.models.Filter, but got "
            f"{type(request.filter).__name__}."
        )
    unknown = sorted(set(request.params or {}) - set(models.SearchParams.model_fields))
    if unknown:
        raise InvalidInput(
            f"{unknown[0]!r} is not a search parameter of Qdrant; it has "
            f"{listed(sorted(models.SearchParams.model_fields))}."
        )
    params = dict(request.params or {})
    if plan.cells is not None and exact:
        params["exact"] = True  # HNSW under the filter of a cell loses keys
    fixed: dict[str, Any] = {
        "using": field or None,
        "params": models.SearchParams(**params) if params else None,
    }
    # What is made here has the right types already: to have pydantic look at every number again
    # costs more than the model that chose the cells.
    everything = searches_everything(plan, break_even)
    queries = []
    for row in range(len(request.queries)):
        search: dict[str, Any] = {
            **fixed,
            "query": models.NearestQuery.model_construct(nearest=request.queries[row].tolist()),
            "filter": request.filter,
            "limit": request.k,
        }
        if plan.cells is not None and not everything[row]:
            search["filter"] = _in_cells(plan.cells[row].tolist(), str(plan.layout), request.filter)
        if plan.rewritten is not None:
            # The filter stays inside: the server would merge an outer one into it clause by
            # clause, which turns two ``should`` into alternatives of each other.
            candidates = {
                **search,
                "query": models.NearestQuery.model_construct(nearest=plan.rewritten[row].tolist()),
                "limit": max(plan.rescore, request.k),
            }
            search["prefetch"] = [models.Prefetch.model_construct(**candidates)]
            search["filter"] = None
            # Exact also means unquantised, and only the candidates are scored.
            search["params"] = models.SearchParams(exact=True) if exact else None
        with_payload = list(request.fields) if request.fields else False
        queries.append(models.QueryRequest.model_construct(**search, with_payload=with_payload))
    return queries


def as_arguments(query: models.QueryRequest) -> dict[str, Any]:
    """Return a query of a batch as keyword arguments of the client's call for a single one."""
    return {
        "query": query.query,
        "using": query.using,
        "prefetch": query.prefetch,
        "query_filter": query.filter,
        "search_params": query.params,
        "limit": query.limit,
        "with_payload": query.with_payload or False,
    }


def as_hits(answers: Sequence[models.QueryResponse]) -> list[list[Hit]]:
    """Return what the client answered, one answer a query, as hits."""
    return [
        [Hit(plain_id(point.id), point.score, point.payload or {}) for point in answer.points]
        for answer in answers
    ]


def _in_cells(cells: Sequence[int], layout: str, condition: models.Filter | None) -> models.Filter:
    key = cell_key(layout)
    chosen = sorted({cell for cell in cells if cell >= 0})
    here = models.Filter(should=[empty(key), has_cell(key, [OVERFLOW, *chosen])])
    return here if condition is None else models.Filter(must=[condition, here])


def empty(key: str) -> models.IsEmptyCondition:
    """Points with nothing under the key."""
    return models.IsEmptyCondition(is_empty=models.PayloadField(key=key))


def has_cell(key: str, cells: Sequence[int]) -> models.FieldCondition:
    """Points with one of these integers under the key."""
    return models.FieldCondition(key=key, match=models.MatchAny(any=list(cells)))


def overflow(key: str) -> models.Filter:
    """Points without a cell."""
    return models.Filter(should=[empty(key), has_cell(key, [OVERFLOW])])


def has_vector(field: str) -> models.HasVectorCondition:
    """Points that are keys; the empty name is the unnamed vector's."""
    return models.HasVectorCondition(has_vector=field)


def all_of(*conditions: models.Condition) -> models.Filter:
    """Points that meet every condition."""
    return models.Filter(must=list(conditions))


def as_ids(ids: Sequence[Id]) -> list[Any]:
    """Return the ids as the client takes them.

    Raises
    ------
    InvalidInput
        One is neither a whole number from 0 to 2^64 - 1 nor a UUID.
    """
    return [_as_id(one) for one in ids]


def _as_id(one: Id) -> Id:
    if isinstance(one, (int, np.integer)) and not isinstance(one, bool) and 0 <= one < 2**64:
        return int(one)
    if isinstance(one, str):
        try:
            return str(uuid.UUID(one))
        except ValueError:
            pass  # refused below, with the others
    raise InvalidInput(
        f"{one!r} cannot be an id in Qdrant; use whole numbers from 0 to 2^64 - 1, or UUIDs."
    )


def plain_id(found: Any) -> Id:
    """Return an id of an answer; the client's types allow uuid.UUID, answers hold int or str."""
    return found if isinstance(found, int) else str(found)


def as_batch(records: Sequence[models.Record], field: str) -> KeyBatch | None:
    """Return those of the records that have the vector, or None where none has."""
    ids: list[Id] = []
    vectors: list[Any] = []
    for record in records:
        vector: Any = record.vector
        if isinstance(vector, dict):
            vector = vector.get(field)
        if vector is not None:
            ids.append(plain_id(record.id))
            vectors.append(vector)
    return KeyBatch(ids, np.array(vectors, dtype=np.float32), ids[-1]) if ids else None


def cell_of(record: models.Record, key: str) -> Any:
    """Return what a record holds under the key; None for what Qdrant takes for empty."""
    found = (record.payload or {}).get(key)
    return None if found == [] else found
