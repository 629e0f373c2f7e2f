"""Searches of cells over gRPC, from messages that are made once.

The client takes messages as they are; its own models it converts anew with every search, condition
by condition, which would take it longer than the rest of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.search import EXACT, alone_or_listed, in_cell, in_none, of_any
from amips_plugins.errors import require

if TYPE_CHECKING:
    from qdrant_client import grpc, models
    from qdrant_client.conversions.conversion import RestToGrpc
else:
    grpc = require("qdrant_client.grpc", "qdrant")
    RestToGrpc = require("qdrant_client.conversions.conversion", "qdrant").RestToGrpc

__all__ = ["filter_message", "params_message", "prefers_grpc"]

_EXACT = RestToGrpc.convert_search_params(EXACT)


def prefers_grpc(client: Any) -> bool:
    """Tell whether a client searches over gRPC."""
    options = getattr(client, "init_options", None)  # which stand-ins of a client may not have
    return isinstance(options, dict) and bool(options.get("prefer_grpc"))


def filter_message(
    record: LayoutRecord, condition: models.Filter | None, cells: Sequence[int]
) -> grpc.Filter:
    """Say what ``in_cells`` says without strays."""
    alone, in_list = alone_or_listed(cells)
    parts = [_cell(record.key, cell) for cell in alone]
    parts += [_alternative(of_any(record, in_list))] if in_list else []
    # Messages side by side are one message, whose lists are longer.
    here: grpc.Filter = grpc.Filter.FromString(
        b"".join([*parts, _none(record.key, record.n_cells)])
    )
    if condition is None:
        return here
    own = grpc.Condition(filter=RestToGrpc.convert_filter(condition))
    return grpc.Filter(must=[own, grpc.Condition(filter=here)])


def params_message(params: models.SearchParams | None) -> Any:
    """Return the message of what most searches of cells have, and others as they are."""
    return _EXACT if params is EXACT else params


def _alternative(condition: models.FieldCondition) -> bytes:
    made = grpc.Filter(should=[RestToGrpc.convert_condition(condition)])
    return bytes(made.SerializeToString())


@lru_cache(maxsize=32768)
def _cell(key: str, cell: int) -> bytes:
    return _alternative(in_cell(key, cell))


@lru_cache(maxsize=64)
def _none(key: str, n_cells: int) -> bytes:
    return b"".join(_alternative(one) for one in in_none(key, n_cells))
