"""Plans, filters, ids and records: what goes to Qdrant and what comes back, without asking it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cell_shards import CellShards
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.codes import Codes
from amips_plugins.adapters.qdrant.points import RESERVED, listed, plain_id
from amips_plugins.adapters.qdrant.wide_search import wide_effort
from amips_plugins.collection import Hit, Id, SearchRequest
from amips_plugins.errors import InvalidInput, require
from amips_plugins.partitions import Partitions, Value
from amips_plugins.plan import QueryPlan, searches_everything

if TYPE_CHECKING:
    from qdrant_client import models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = [
    "EXACT",
    "all_of",
    "alone_or_listed",
    "among",
    "as_arguments",
    "as_hits",
    "both",
    "empty",
    "has_cell",
    "has_value",
    "has_vector",
    "in_cell",
    "in_cells",
    "in_none",
    "index_of_cells",
    "of_any",
    "one_cell",
    "others_than",
    "plan_queries",
    "search_params",
    "strays_of",
    "unplaced",
    "widely",
    "without_cell",
]

_EXACTLY = {"exact": True}
EXACT = models.SearchParams(exact=True)
_NONE_OF = models.Filter(must_not=[])
_ANY_OF = models.MatchAny(any=[])
_WITH = models.FieldCondition(key="", match=_ANY_OF)
_ALTERNATIVES = models.Filter(should=[])
_ONE_BY_ONE = 16  # cells: a server makes the points of a list unique, a client writes each cell


def plan_queries(
    request: SearchRequest,
    plan: QueryPlan,
    field: str,
    named: Callable[[list[int]], Any] | None,
    break_even: float,
    *,
    exact: bool,
    has_graph: bool = False,
    max_ef: int | None = None,
    codes: Codes | None = None,
    shards: CellShards | None = None,
) -> list[models.QueryRequest]:
    """Write the plan as queries, one a row; ``exact`` is False where every search is.

    ``named`` makes the filter of some cells, the request's own within. With a graph a row whose
    cells hold most of the keys follows that, widely: to compare with every key scores twenty times
    the bytes. Cells in shard keys are asked by their names.
    """
    if request.filter is not None and not isinstance(request.filter, models.Filter):
        raise InvalidInput(
            "A Qdrant filter is a qdrant_client.models.Filter, but got "
            f"{type(request.filter).__name__}."
        )
    fixed: dict[str, Any] = {"using": field or None}
    graphs = shards is not None
    params = search_params(request, plan, exact, graphs=graphs)
    # What is made here has the right types already: to have pydantic look at every number again
    # costs more than the model that chose the cells.
    everything = searches_everything(plan, break_even)
    shares = [None] * len(everything) if plan.shares is None else plan.shares.tolist()
    queries = []
    for row in range(len(request.queries)):
        search: dict[str, Any] = {
            **fixed,
            "params": params,
            "query": models.NearestQuery.model_construct(nearest=request.queries[row].tolist()),
            "filter": request.filter,
            "limit": request.k,
        }
        if plan.cells is not None and everything[row] and exact and has_graph:
            search["params"] = widely(params, request, plan, max_ef, codes)
        elif plan.cells is not None:
            if codes is not None:
                search["params"] = search_params(
                    request, plan, exact, None if graphs else codes, shares[row], graphs=graphs
                )
            if shards is not None and not everything[row]:
                search["shard_key"] = shards.asked(plan.cells[row].tolist())
            elif named is not None and not everything[row]:
                search["filter"] = named(plan.cells[row].tolist())
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
        with_payload = [one for one in request.fields if not one.startswith(RESERVED)] or False
        queries.append(models.QueryRequest.model_construct(**search, with_payload=with_payload))
    return queries


def widely(
    params: models.SearchParams | None,
    request: SearchRequest,
    plan: QueryPlan,
    most: int | None,
    codes: Codes | None,
) -> models.SearchParams | None:
    """Return parameters of a search of the graph that stands for one of all keys.

    Scores are the vectors' own, as those of cells are; ``most`` is what strict mode allows.
    """
    asked = 0 if params is None else params.hnsw_ef or 0
    effort = wide_effort(request.k, plan.recall, asked, most)
    if effort is None:
        return params
    changed: dict[str, Any] = {**(dict(params) if params else {}), "exact": None}
    changed["hnsw_ef"] = effort
    if codes is not None and changed.get("quantization") is None:
        changed["quantization"] = _rescored(codes)
    return models.SearchParams.model_construct(**changed)


def _rescored(codes: Codes) -> models.QuantizationSearchParams:
    return models.QuantizationSearchParams.model_construct(
        rescore=True, oversampling=codes.oversampling
    )


def one_cell(
    record: LayoutRecord, cell: int, condition: models.Filter | None, *, strays: bool = True
) -> models.Filter:
    """Points of one cell, or without any, that meet a condition."""
    if cell != OVERFLOW:
        here = models.Filter.model_construct(must=[in_cell(record.key, cell)])
    elif strays:
        here = without_cell(record)
    else:
        here = models.Filter.model_construct(should=[*in_none(record.key, record.n_cells)])
    return both(condition, here)


def search_params(
    request: SearchRequest,
    plan: QueryPlan,
    exact: bool,
    codes: Codes | None = None,
    share: float | None = None,
    *,
    graphs: bool = False,
) -> models.SearchParams | None:
    """Return the caller's parameters and the plan's; cells, with a share of the keys, are scanned.

    By their codes where the engine does not follow its graph then, else exactly. Where a cell has
    a graph and the plan an ``effort`` for it, that is how far it is followed.
    """
    params: dict[str, Any] = {**request.params} if request.params else {}
    if plan.params and exact:  # local mode is exact, and warns of any
        params.update(plan.params)
    for name in params:
        if name not in models.SearchParams.model_fields:
            raise InvalidInput(
                f"{name!r} is not a search parameter of Qdrant; it has "
                f"{listed(sorted(models.SearchParams.model_fields))}."
            )
    if params and isinstance(params.get("quantization"), Mapping):  # a plan's own, in plain values
        params["quantization"] = models.QuantizationSearchParams(**params["quantization"])
    if plan.cells is not None and graphs and plan.effort is not None:
        params["hnsw_ef"] = max(params.get("hnsw_ef") or 0, plan.effort, request.k)
    elif plan.cells is not None and exact:
        if codes is not None and codes.scan(share):
            params.setdefault("quantization", _rescored(codes))
        else:
            params["exact"] = True  # HNSW under the filter of a cell loses keys
    if params == _EXACTLY:
        return EXACT  # most searches of cells
    return models.SearchParams.model_construct(**params) if params else None


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
        "shard_key_selector": query.shard_key,
    }


def as_hits(answers: Sequence[models.QueryResponse]) -> list[list[Hit]]:
    """Return what the client answered, one answer a query, as hits."""
    return [
        [Hit(plain_id(point.id), point.score, point.payload or {}) for point in answer.points]
        for answer in answers
    ]


def in_cells(
    record: LayoutRecord | Partitions,
    cells: Sequence[int],
    condition: models.Filter | None,
    *,
    strays: bool = True,
) -> models.Filter:
    """Points of some cells and of none; ``strays`` says whether these may have anything else.

    Such points only a filter finds that leaves the other cells out, and for that a server looks at
    every point. Without them these are alternatives that its index lists, and nothing for which it
    would look at the points again.
    """
    if isinstance(record, Partitions):
        return in_values(record, cells, condition)
    if strays:
        return both(condition, _all_but(record, cells))
    alone, in_list = alone_or_listed(cells)
    these = [in_cell(record.key, cell) for cell in alone]
    these += [of_any(record, in_list)] if in_list else []
    here: models.Filter = _filled(
        _ALTERNATIVES, should=[*these, *in_none(record.key, record.n_cells)]
    )
    return both(condition, here)


def alone_or_listed(cells: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the cells that are named one by one, and those in a list: one of both is empty."""
    chosen = list(dict.fromkeys(cell for cell in cells if cell >= 0))
    return (chosen, []) if len(chosen) <= _ONE_BY_ONE else ([], chosen)


def _all_but(record: LayoutRecord, cells: Sequence[int]) -> models.Filter:
    """Leave out the other cells; of keys in several, one may be in these all the same."""
    others = of_any(record, record.all_but(() if record.shared else cells))
    here: models.Filter = _filled(_NONE_OF, must_not=[others])
    if record.shared:
        here = models.Filter(should=[of_any(record, [cell for cell in cells if cell >= 0]), here])
    return here


@lru_cache(maxsize=32768)
def in_cell(key: str, cell: int) -> models.FieldCondition:
    """Points of one cell."""
    return models.FieldCondition(key=key, match=models.MatchValue(value=cell))


@lru_cache(maxsize=64)
def in_none(key: str, n_cells: int) -> tuple[models.FieldCondition, ...]:
    """Points with nothing under the key, or a whole number that is no cell."""
    # An ``IsEmptyCondition`` says the same as the first, but every point found is looked at again.
    nothing = models.FieldCondition(key=key, is_empty=True)
    claimed = models.FieldCondition(key=key, range=models.Range(lt=0))
    beyond = models.FieldCondition(key=key, range=models.Range(gte=n_cells))
    return nothing, claimed, beyond


def strays_of(record: LayoutRecord) -> models.Filter:
    """Points with something under the key that is no whole number."""
    cells = has_cell(record.key, range(record.n_cells))
    return models.Filter(must_not=[cells, *in_none(record.key, record.n_cells)])


def of_any(record: LayoutRecord, cells: list[int]) -> models.FieldCondition:
    """Points of some cells."""
    found: models.FieldCondition = _filled(_WITH, key=record.key, match=_filled(_ANY_OF, any=cells))
    return found


def _filled(form: Any, **values: Any) -> Any:
    """Return a copy of a model with other values, which are of the right types.

    Pydantic would look at every number and try every kind of condition; ``model_copy`` does
    neither, and still takes three times as long, of every search.
    """
    made = object.__new__(form.__class__)
    object.__setattr__(made, "__dict__", {**form.__dict__, **values})
    object.__setattr__(made, "__pydantic_fields_set__", {*form.__pydantic_fields_set__})
    object.__setattr__(made, "__pydantic_extra__", None)
    object.__setattr__(made, "__pydantic_private__", None)
    return made


def in_values(
    given: Partitions, cells: Sequence[int], condition: models.Filter | None
) -> models.Filter:
    """Points of some values, and all of values that are not known: of none, too."""
    chosen, known = given.chosen(cells), given.values
    ways = [has_value(given.key, chosen), others_than(given.key, known)]
    return both(condition, models.Filter.model_construct(should=ways))


def both(condition: models.Filter | None, here: models.Filter) -> models.Filter:
    """Write "and"; merged clause by clause two ``should`` would become one."""
    return here if condition is None else models.Filter.model_construct(must=[condition, here])


def has_value(key: str, values: Sequence[Value]) -> models.FieldCondition:
    """Points with one of these values under the key."""
    if len(values) == 1:
        return models.FieldCondition(key=key, match=models.MatchValue(value=values[0]))
    # Built here with the right types: pydantic would try both kinds of list on each of them.
    return models.FieldCondition.model_construct(
        key=key, match=models.MatchAny.model_construct(any=list(values))
    )


def others_than(key: str, values: Sequence[Value]) -> models.Filter:
    """Points with none of these values under the key, or nothing at all."""
    return models.Filter.model_construct(must_not=[has_value(key, values)])


def without_cell(record: LayoutRecord) -> models.Filter:
    """Points with nothing under the key, or nothing that is a cell."""
    return models.Filter(must_not=[has_cell(record.key, range(record.n_cells))])


def unplaced(record: LayoutRecord) -> models.Filter:
    """Points without a cell; unless cells share keys a list of several values is none, either."""
    if record.shared:
        return without_cell(record)
    several = models.FieldCondition(key=record.key, values_count=models.ValuesCount(gt=1))
    return models.Filter(should=[without_cell(record), several])


def empty(key: str) -> models.IsEmptyCondition:
    """Points with nothing under the key."""
    return models.IsEmptyCondition(is_empty=models.PayloadField(key=key))


def has_cell(key: str, cells: Sequence[int]) -> models.FieldCondition:
    """Points with one of these integers under the key."""
    return models.FieldCondition(key=key, match=models.MatchAny(any=list(cells)))


def among(ids: Sequence[Id]) -> models.HasIdCondition:
    """Points with one of these ids."""
    return models.HasIdCondition(has_id=list(ids))


def has_vector(field: str) -> models.HasVectorCondition:
    """Points that are keys; the empty name is the unnamed vector's."""
    return models.HasVectorCondition(has_vector=field)


def index_of_cells() -> models.IntegerIndexParams:
    """Return the index of a cell's key: points of a cell lie together, and no graph knows of it.

    With links for every value a graph takes half as much again to build and to search, and cells
    are scanned, not walked.
    """
    return models.IntegerIndexParams(
        type=models.IntegerIndexType.INTEGER, is_principal=True, enable_hnsw=False
    )


def all_of(*conditions: models.Condition) -> models.Filter:
    """Points that meet every condition."""
    return models.Filter(must=list(conditions))
