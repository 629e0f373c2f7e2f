"""Conditions on the points of a Qdrant Edge shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.collection import Id
from amips_plugins.errors import require
from amips_plugins.partitions import Partitions, Value

if TYPE_CHECKING:
    import qdrant_edge as edge
else:
    edge = require("qdrant_edge", "qdrant-edge")

__all__ = ["among", "both", "exactly", "in_cells", "unplaced", "without_cell"]


def in_cells(record: LayoutRecord | Partitions, cells: Sequence[int]) -> edge.Filter:
    """Points of some cells; ``OVERFLOW`` among them means all that have none, whatever is there."""
    if isinstance(record, Partitions):
        return _in_values(record, cells)
    if OVERFLOW not in cells:
        return edge.Filter(must=[exactly(record.key, cells)])
    if not record.shared:
        return edge.Filter(must_not=[exactly(record.key, record.all_but(cells))])
    nowhere = edge.Filter(must_not=[exactly(record.key, record.all_but(()))])
    chosen = [cell for cell in cells if cell != OVERFLOW]
    return edge.Filter(should=[exactly(record.key, chosen), nowhere]) if chosen else nowhere


def _in_values(given: Partitions, cells: Sequence[int]) -> edge.Filter:
    chosen = exactly(given.key, given.chosen(cells))
    if OVERFLOW not in cells:
        return edge.Filter(must=[chosen])
    others = edge.Filter(must_not=[exactly(given.key, given.values)])
    return edge.Filter(should=[chosen, others])


def without_cell(record: LayoutRecord) -> edge.Filter:
    """Points with nothing under the key, or nothing that is a cell."""
    return in_cells(record, [OVERFLOW])


def unplaced(record: LayoutRecord) -> edge.Filter:
    """Points without a cell; unless cells share keys a list of several values is none, either."""
    if record.shared:
        return without_cell(record)
    several = edge.FieldCondition(record.key, values_count=edge.ValuesCount(gt=1))
    return edge.Filter(should=[without_cell(record), several])


def both(condition: edge.Filter | None, here: edge.Filter) -> edge.Filter:
    """Write "and"; merged clause by clause two ``should`` would become one."""
    return here if condition is None else edge.Filter(must=[condition, here])


def among(ids: Sequence[Id]) -> edge.HasIdCondition:
    """Points with one of these ids."""
    return edge.HasIdCondition(set(ids))


def exactly(key: str, cells: Sequence[Value]) -> edge.FieldCondition:
    """Points with one of these values under the key."""
    return edge.FieldCondition(key, match=edge.MatchAny(list(cells)))  # type: ignore[arg-type]  # of one kind
