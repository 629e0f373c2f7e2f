"""What every adapter refuses alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amips_plugins.collection.values import Id
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["check_keys", "check_layout"]


def check_keys(
    dim: int,
    layout: str | None,
    ids: Sequence[Id],
    vectors: FloatArray,
    fields: Sequence[Mapping[str, Any]] | None,
    cells: IntArray | None,
    *,
    shared: bool = False,
) -> None:
    """Refuse keys that cannot be written (see ``Collection.upsert``)."""
    if len(set(ids)) != len(ids):
        raise InvalidInput("An id comes twice in one call; pass every id once.")
    if vectors.shape != (len(ids), dim):
        raise InvalidInput(
            f"{len(ids)} ids came with vectors of shape {vectors.shape}; pass ({len(ids)}, {dim})."
        )
    if fields is not None and len(fields) != len(ids):
        raise InvalidInput(f"{len(ids)} ids came with fields for {len(fields)}; pass one each.")
    if cells is not None and layout is None:
        raise InvalidInput("The collection has no cells to write to; lay it out first.")
    if cells is not None and cells.shape != (len(ids), *(cells.shape[1:2] if shared else ())):
        raise InvalidInput(
            f"{len(ids)} ids came with cells of shape {cells.shape}; pass one cell each."
        )


def check_layout(plan: QueryPlan, layout: str | None, name: str) -> None:
    """Raise ``InvalidInput`` for a plan that counts the cells of another layout."""
    if plan.cells is not None and plan.layout != layout:
        raise InvalidInput(
            f"The plan searches cells of layout {plan.layout!r}, but collection {name!r} has "
            f"{layout!r}; lay it out with the bundle that made the plan."
        )
