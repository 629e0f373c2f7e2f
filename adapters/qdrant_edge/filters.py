"""Conditions on the points of a Qdrant Edge shard."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
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

__all__ = [
    "Outside",
    "among",
    "both",
    "empty",
    "exactly",
    "in_cells",
    "no_cell",
    "unplaced",
    "without_cell",
]

_ONE_BY_ONE = 64  # cells up to which naming each costs less than what a list does with its points


class Outside(Enum):
    """What points without a cell may have in its place."""

    NOBODY = "there are no such points"
    LISTED = "nothing, or a whole number: an index lists them"
    ANYTHING = "anything: every point has to be looked at"


def in_cells(
    record: LayoutRecord | Partitions,
    cells: Sequence[int],
    outside: Outside = Outside.ANYTHING,
) -> edge.Filter:
    """Points of some cells; ``OVERFLOW`` among them means all that have none, whatever is there."""
    if isinstance(record, Partitions):
        return _in_values(record, cells)
    chosen = [cell for cell in cells if cell != OVERFLOW]
    if len(chosen) == len(cells):
        either = edge.Filter(should=_each(record.key, chosen))
        return either if chosen else edge.Filter(must=[exactly(record.key, ())])
    if outside is Outside.LISTED:
        return edge.Filter(should=[*_each(record.key, chosen), empty(record.key), *no_cell(record)])
    if not record.shared:
        return edge.Filter(must_not=[exactly(record.key, record.all_but(cells))])
    nowhere = edge.Filter(must_not=[exactly(record.key, record.all_but(()))])
    return edge.Filter(should=[exactly(record.key, chosen), nowhere]) if chosen else nowhere


def _each(key: str, cells: Sequence[int]) -> list[edge.ConditionType]:
    """Name cells one by one: of a list the engine first makes every point it finds unique."""
    if len(cells) > _ONE_BY_ONE:
        return [exactly(key, cells)]
    return [edge.FieldCondition(key, match=edge.MatchValue(cell)) for cell in cells]


def empty(key: str) -> edge.FieldCondition:
    """Points with nothing under the key; of an ``IsEmptyCondition`` each is looked at again."""
    return edge.FieldCondition(key, is_empty=True)


def no_cell(record: LayoutRecord) -> list[edge.ConditionType]:
    """Points with a whole number that is no cell."""
    ranges = edge.RangeFloat(lt=0), edge.RangeFloat(gte=record.n_cells)
    return [edge.FieldCondition(record.key, range=one) for one in ranges]


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
