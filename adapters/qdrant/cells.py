"""How cells are kept in Qdrant: payload keys, the collection's metadata, and what writes them.

A cell is an integer under the payload key ``amips_cell_<layout>``: the cells of two layouts live
side by side and never mix. A point without that key, or with -1 there, is overflow. The
collection's metadata say which layout serves, which served before it, and which are only there to
be finished or dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from amips_plugins.collection import Id, KeyBatch
from amips_plugins.errors import CollectionError

__all__ = ["CELL_PREFIX", "CellStore", "LayoutState", "Record", "cell_key", "serving"]

CELL_PREFIX = "amips_cell_"
_POINTER = "amips_layout"  # metadata key, completed by the vector's name


@dataclass(frozen=True, slots=True)
class Record:
    """One layout, as the metadata keep it."""

    layout: str
    version: str
    n_cells: int
    complete: bool = True


class CellStore(Protocol):
    """What the steps need of a database. ``key`` is always a payload key, ``ids`` are of points.

    Only points that have the collection's vector count, here and in every method.
    """

    def metadata(self) -> Mapping[str, Any]:
        """Read the collection's metadata."""
        ...

    def write_metadata(self, changes: Mapping[str, Any]) -> None:
        """Replace these entries of the metadata at once, and keep the others."""
        ...

    def check(self, key: str, n_cells: int) -> None:
        """Raise ``CollectionError`` if the database would refuse cells; change nothing."""
        ...

    def notes(self) -> tuple[str, ...]:
        """Say what an operator should know before."""
        ...

    def free_bytes(self) -> int | None:
        """Return how many bytes the disk has left, or None where that cannot be told."""
        ...

    def foreign(self, key: str, n_cells: int) -> int | None:
        """Count the points with something under the key that is no integer from -1 to n_cells - 1.

        None where the database does not count by this key before it has an index.
        """
        ...

    def overflow(self, key: str) -> int:
        """Count the points without a cell: nothing or -1 under the key."""
        ...

    def create_index(self, key: str) -> None:
        """Index the integers under the key; it may have been done before."""
        ...

    def drop_index(self, key: str) -> None:
        """Drop the index of the key, if there is one."""
        ...

    def remove_cells(self, key: str) -> None:
        """Remove the key from every point; can be killed and called again."""
        ...

    def without_cell(self, key: str) -> Iterator[Sequence[Id]]:
        """Go once through the points without a cell, in batches for one round of writing."""
        ...

    def claim(self, key: str, ids: Sequence[Id]) -> None:
        """Write -1 under the key of those of the points that are there with nothing under it.

        A store that can tell an overwritten point by other means in ``place`` may do nothing.
        """
        ...

    def claimed(self, key: str, ids: Sequence[Id]) -> Iterator[KeyBatch]:
        """Read those of the points whose claim stands."""
        ...

    def place(self, key: str, ids: Sequence[Id], cells: Sequence[int]) -> None:
        """Write the cells of those of the points whose claim still stands.

        Test and write must be one step for the database where others can write in between.
        """
        ...


def cell_key(layout: str) -> str:
    """Name the payload key that holds the cells of a layout."""
    return f"{CELL_PREFIX}{layout}"


def _pointer_key(field: str) -> str:
    """Name the metadata entry that tells the layouts of one vector."""
    return f"{_POINTER}_{field}" if field else _POINTER


def serving(metadata: Mapping[str, Any], field: str) -> Record | None:
    """Read which layout serves; None without one, or where the entry is not ours."""
    try:
        return LayoutState.read(metadata, field).serving
    except CollectionError:
        return None


@dataclass(frozen=True, slots=True)
class LayoutState:
    """The metadata entry of one vector: every layout of which anything is stored."""

    serving: Record | None = None
    before: tuple[Record | None, ...] = ()  # what to roll back to, oldest first; None is no cells
    idle: tuple[Record, ...] = ()  # unfinished, or rolled back from

    @classmethod
    def read(cls, metadata: Mapping[str, Any], field: str) -> LayoutState:
        """Read the entry; without one there are no layouts.

        Raises
        ------
        CollectionError
            The entry is not ours.
        """
        found = metadata.get(_pointer_key(field))
        if found is None:
            return cls()
        try:
            return cls(
                _record(found["serving"]),
                tuple(_record(one) for one in found["before"]),
                tuple(Record(**one) for one in found["idle"]),
            )
        except (TypeError, KeyError) as exc:
            raise CollectionError(
                f"The collection's metadata hold something else under {_pointer_key(field)!r} than "
                "a layout; remove that entry."
            ) from exc

    def entry(self, field: str) -> dict[str, Any]:
        """Return the change to the metadata that makes them say this."""
        content = {
            "serving": _entry(self.serving),
            "before": [_entry(one) for one in self.before],
            "idle": [asdict(one) for one in self.idle],
        }
        return {_pointer_key(field): content}

    def kept(self) -> dict[str, Record]:
        """Layouts stored beside the one that serves, oldest first."""
        found = [one for one in (*self.before, *self.idle) if one is not None]
        here = None if self.serving is None else self.serving.layout
        return {one.layout: one for one in found if one.layout != here}

    def without(self, layout: str) -> LayoutState:
        """Return the state that has forgotten this layout, unless it serves."""
        before = tuple(one for one in self.before if one is None or one.layout != layout)
        idle = tuple(one for one in self.idle if one.layout != layout)
        return replace(self, before=before, idle=idle)


def _record(found: Mapping[str, Any]) -> Record | None:
    return Record(**found) if found else None


def _entry(record: Record | None) -> dict[str, Any]:
    # Never a null: inside of metadata it could mean "remove this".
    return {} if record is None else asdict(record)
