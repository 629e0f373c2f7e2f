"""Large batches, cell by cell: a search for each query and cell, those of one cell side by side.

Neighbouring searches with equal filters and shard keys a server answers together, at a fraction of
what it takes for a filter or a list of shard keys of each query's own. That sends a query once for
every cell: over gRPC it is converted once for all of them, and only its best hits are converted
back, which the client's own call would do with every search and every hit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from amips_plugins.adapters.cell_groups import OVERFLOW, merge_hits
from amips_plugins.adapters.qdrant.cell_shards import CellShards
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.points import plain_id
from amips_plugins.adapters.qdrant.search import one_cell
from amips_plugins.collection import Hit, Id, SearchRequest
from amips_plugins.errors import require
from amips_plugins.plan import QueryPlan, searches_everything

if TYPE_CHECKING:
    from qdrant_client import grpc, models
    from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
else:
    grpc = require("qdrant_client.grpc", "qdrant")
    models = require("qdrant_client.models", "qdrant")
    _conversion = require("qdrant_client.conversions.conversion", "qdrant")
    GrpcToRest, RestToGrpc = _conversion.GrpcToRest, _conversion.RestToGrpc

__all__ = ["CellGroup", "GrpcBatch", "by_cell", "by_shard", "in_portions", "one_by_one"]

_TIMEOUT = 5  # seconds, the client's default


class CellGroup(NamedTuple):
    """Queries that are asked side by side, and what changes them; nothing, where they are whole."""

    rows: list[int]
    changes: Mapping[str, Any]


def by_cell(
    request: SearchRequest,
    plan: QueryPlan,
    record: LayoutRecord,
    break_even: float,
    *,
    strays: bool = True,
) -> list[CellGroup]:
    """Group a plan's queries by the cells in payloads, and the overflow."""
    whole, wanted = _wanted(plan, break_even, lambda cells: {OVERFLOW, *cells})
    return whole + [
        CellGroup(rows, {"filter": one_cell(record, cell, request.filter, strays=strays)})
        for cell, rows in sorted(wanted.items())
    ]


def by_shard(
    request: SearchRequest, plan: QueryPlan, shards: CellShards, break_even: float
) -> list[CellGroup]:
    """Group a plan's queries by the shard keys of cells, the overflow's and others'."""
    whole, wanted = _wanted(plan, break_even, shards.asked)
    return whole + [
        CellGroup(rows, {"filter": request.filter, "shard_key": key})
        for key, rows in sorted(wanted.items(), key=lambda one: str(one[0]))
    ]


def _wanted(
    plan: QueryPlan, break_even: float, places: Any
) -> tuple[list[CellGroup], dict[Any, list[int]]]:
    everything = searches_everything(plan, break_even)
    wanted: dict[Any, list[int]] = {}
    whole = []
    for row, cells in enumerate([] if plan.cells is None else plan.cells.tolist()):
        if everything[row]:
            whole.append(row)
        else:
            for place in places(cells):
                wanted.setdefault(place, []).append(row)
    return [CellGroup(whole, {})] if whole else [], wanted


def one_by_one(
    queries: Sequence[models.QueryRequest], groups: Sequence[CellGroup]
) -> tuple[list[int], list[models.QueryRequest]]:
    """Write groups as queries of the client's, and say the row of each."""
    rows = [row for group in groups for row in group.rows]
    found = [
        queries[row].model_copy(update=group.changes) if group.changes else queries[row]
        for group in groups
        for row in group.rows
    ]
    return rows, found


def in_portions(rows: Sequence[int], size: int) -> list[list[int]]:
    """Cut searches, each of the query in a row, into calls of some ``size``; return their numbers.

    Those of one query stay together, so that no write comes between two calls for it.
    """
    portions: list[list[int]] = []
    filled, of_row = size, dict[int, list[int]]()
    for row, searches in sorted(Counter(rows).items()):
        if filled + searches > size:
            portions.append([])
            filled = 0
        filled += searches
        of_row[row] = portions[-1]
    for number, row in enumerate(rows):
        of_row[row].append(number)
    return portions


class _Scored(NamedTuple):
    id: Id
    score: float
    point: Any


@dataclass(frozen=True, slots=True)
class GrpcBatch:
    """A batch as messages of gRPC, with the row of each."""

    name: str
    rows: list[int]
    messages: list[Any]

    @classmethod
    def of(
        cls,
        name: str,
        queries: Sequence[models.QueryRequest],
        groups: Sequence[CellGroup],
        shard_key: int | str | None,
    ) -> GrpcBatch:
        """Write groups as messages; ``shard_key`` is that of all, where a group names none."""
        bare: dict[int, Any] = {}
        rows: list[int] = []
        messages: list[Any] = []
        for group in groups:
            part = grpc.QueryPoints()
            if group.changes.get("filter") is not None:
                part.filter.CopyFrom(RestToGrpc.convert_filter(group.changes["filter"]))
            key = group.changes.get("shard_key", shard_key)
            if key is not None:
                part.shard_key_selector.CopyFrom(RestToGrpc.convert_shard_key_selector(key))
            for row in group.rows:
                if row not in bare:
                    kept = {"filter": None, "shard_key": None} if group.changes else {}
                    query = queries[row].model_copy(update=kept)
                    bare[row] = RestToGrpc.convert_query_request(query, name)
                message = grpc.QueryPoints()
                message.CopyFrom(bare[row])
                message.MergeFrom(part)
                messages.append(message)
            rows += group.rows
        return cls(name, rows, messages)

    def call(self, part: Sequence[int], timeout: int | None, client: Any) -> tuple[Any, int]:
        """Return a call, and the seconds that it may take: of no caller's, the client's own."""
        messages = [self.messages[number] for number in part]
        call = grpc.QueryBatchPoints(
            collection_name=self.name, query_points=messages, timeout=timeout
        )
        own = client.init_options.get("timeout")
        seconds = _TIMEOUT if own is None else math.ceil(own)  # as the client reads it
        return call, seconds if timeout is None else timeout

    def hits(
        self,
        parts: Sequence[Sequence[int]],
        results: Sequence[Any],
        request: SearchRequest,
        larger: bool,
    ) -> list[list[Hit]]:
        """Merge what the parts were answered, one result a search, into every query's best hits."""
        by_row: list[list[list[_Scored]]] = [[] for _ in request.queries]
        rows = [self.rows[number] for part in parts for number in part]
        for row, result in zip(rows, results, strict=True):
            by_row[row].append(
                [_Scored(_id_of(point.id), point.score, point) for point in result.result]
            )
        return [
            [
                Hit(one.id, one.score, _payload(one.point))
                for one in merge_hits(parts, request.k, larger_is_better=larger)
            ]
            for parts in by_row
        ]


def _id_of(found: Any) -> Id:
    return plain_id(found.num) if found.HasField("num") else plain_id(found.uuid)


def _payload(point: Any) -> dict[str, Any]:
    found: dict[str, Any] = GrpcToRest.convert_payload(point.payload) if point.payload else {}
    return found
