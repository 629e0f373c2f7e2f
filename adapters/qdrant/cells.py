"""How cells are kept in Qdrant: payload keys, the collection's metadata, and what writes them.

A cell is an integer under the payload key ``amips_cell_<layout>``, or a list of them, the key's
own first, where cells share keys. Beside it is the sketch of the vector that it belongs to: the
cells of two layouts live side by side and never mix. A point with anything else there, or nothing,
is overflow. Where cells have shard keys (``cell_shards``) a stamp tells the last write of an id
from what another shard may still hold of it. The collection's metadata say which layout serves,
which served before it, and which are only there to be finished or dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from amips_plugins.collection import CollectionInfo, Cursor, Id, KeyBatch
from amips_plugins.errors import CollectionError
from amips_plugins.partitions import Value
from amips_plugins.vectors import IntArray

__all__ = [
    "CellStore",
    "CelledKeys",
    "LayoutRecord",
    "LayoutState",
    "cell_key",
    "serving",
]

_POINTER = "amips_layout"  # metadata key, completed by the vector's name


def cell_key(layout: str) -> str:
    """Name the payload key that holds the cells of a layout."""
    return f"amips_cell_{layout}"


@lru_cache(maxsize=64)
def _every(n_cells: int) -> tuple[int, ...]:
    return tuple(range(n_cells))


@dataclass(frozen=True, slots=True)
class LayoutRecord:
    """One layout, as the metadata keep it."""

    layout: str
    version: str
    n_cells: int
    complete: bool = True
    shared: bool = False
    places: tuple[int, ...] = ()  # the number of every cell's shard; empty where cells have none

    @property
    def key(self) -> str:
        """Payload key of the cells."""
        return cell_key(self.layout)

    @property
    def sketch_key(self) -> str:
        """Payload key of the sketches."""
        return f"amips_sketch_{self.layout}"

    @property
    def stamp_key(self) -> str:
        """Payload key, of points in shards, that tells which write of an id is the last one."""
        return f"amips_stamp_{self.layout}"

    @property
    def copy_key(self) -> str:
        """Payload key of points that are in a further shard of their id."""
        return f"amips_copy_{self.layout}"

    @property
    def copies_key(self) -> str | None:
        """The same where there are such points, else None."""
        return self.copy_key if self.places and self.shared else None

    @property
    def keys(self) -> list[str]:
        """All that there are of them."""
        more = [self.stamp_key, self.copy_key] if self.places else []
        return [self.key, self.sketch_key, *more]

    @property
    def overflow_shard(self) -> str:
        """Shard key of the points without a cell."""
        return f"amips_{self.layout}_overflow"

    def home(self, cell: int) -> str:
        """Return the shard key of a cell, or of none."""
        return self._shard(self.places[cell]) if cell >= 0 else self.overflow_shard

    def homes(self, stored: int | list[int]) -> list[str]:
        """Return the shard keys of a key's cells, the one of its own first."""
        cells = stored if isinstance(stored, list) else [stored]
        own = self.home(cells[0])
        return list(dict.fromkeys([own, *(self.home(cell) for cell in cells[1:] if cell >= 0)]))

    @property
    def shard_keys(self) -> list[str]:
        """The shard keys of all cells."""
        return [self._shard(number) for number in range(max(self.places, default=-1) + 1)]

    def cells_of(self, shard: str | int) -> list[int]:
        """Return the cells in a shard key."""
        return [cell for cell, number in enumerate(self.places) if self._shard(number) == shard]

    def _shard(self, number: int) -> str:
        return f"amips_{self.layout}_{number}"

    def beside(self, cell: int | list[int], sketch: int) -> dict[str, int | list[int]]:
        """Return what lies beside a vector in this cell or these, or in none."""
        if isinstance(cell, int) and cell < 0:
            return {self.key: cell}
        return {self.key: cell, self.sketch_key: sketch}

    def stored(self, cells: IntArray) -> list[int | list[int]]:
        """Return how the cells of keys, ``(n,)`` or ``(n, width)``, are stored."""
        if cells.ndim == 1:
            plain: list[int | list[int]] = cells.tolist()
            return plain
        # A single one is stored as itself, so that most points look as without sharing.
        distinct = (list(dict.fromkeys(row)) for row in cells.tolist())
        return [row[0] if len(row) == 1 else row for row in distinct]

    def own_cell(self, found: Any) -> int | None:
        """Return the first cell of what lies under the key, or None where that is none."""
        if isinstance(found, list) and found and self.shared:
            return int(found[0]) if all(_is_cell(one, self.n_cells) for one in found) else None
        return int(found) if _is_cell(found, self.n_cells) else None

    def all_but(self, cells: Sequence[int]) -> list[int]:
        """Return the other cells."""
        others = list(_every(self.n_cells))
        for cell in sorted({*cells}, reverse=True):
            if 0 <= cell < self.n_cells:
                del others[cell]
        return others


@dataclass(frozen=True, slots=True)
class CelledKeys:
    """Keys as they are stored, with what lies beside them."""

    keys: KeyBatch
    cells: Sequence[Any]
    sketches: Sequence[int | None]


def _is_cell(found: Any, n_cells: int) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and 0 <= found < n_cells


class CellStore(Protocol):
    """What the steps need of a database; ``ids`` are of points.

    Only points that have the collection's vector count, here and in every method. Overflow is
    what has no cell, a *claim* a negative number in its place.
    """

    seconds_per_write: float

    def parts(self) -> Sequence[CellStore]:
        """Return the stores to go through one by one, each the owner of its ids."""
        ...

    def metadata(self) -> Mapping[str, Any]:
        """Read the collection's metadata."""
        ...

    def write_metadata(self, changes: Mapping[str, Any]) -> None:
        """Replace these entries of the metadata at once, and keep the others."""
        ...

    def check(self, record: LayoutRecord) -> None:
        """Raise ``CollectionError`` if the database would refuse cells; change nothing."""
        ...

    def notes(self) -> tuple[str, ...]:
        """Say what an operator should know before."""
        ...

    def free_bytes(self) -> int | None:
        """Return how many bytes the disk has left, or None where that cannot be told."""
        ...

    def taken(self, key: str) -> bool | None:
        """Tell whether a point has anything under the key; None where that takes an index."""
        ...

    def overflow(self, record: LayoutRecord) -> int:
        """Count the points without a cell."""
        ...

    def count_values(self, key: str, values: Sequence[Value], *, others: bool = False) -> int:
        """Count the points with one of these values under a payload key; or all ``others``."""
        ...

    def create_index(self, key: str) -> None:
        """Index the integers under the key; it may have been done before."""
        ...

    def drop_index(self, key: str) -> None:
        """Drop the index of the key, if there is one."""
        ...

    def remove_cells(self, record: LayoutRecord) -> None:
        """Remove both keys from every point; can be killed and called again."""
        ...

    def without_cell(self, record: LayoutRecord) -> Iterator[Sequence[Id]]:
        """Go once through the points without a cell, in batches for one round of writing."""
        ...

    def claim(self, record: LayoutRecord, ids: Sequence[Id], claim: int) -> None:
        """Write the claim over whatever is no cell.

        A store that can tell an overwritten point by other means in ``place`` may do nothing.
        """
        ...

    def claimed(self, record: LayoutRecord, ids: Sequence[Id], claim: int) -> Iterator[KeyBatch]:
        """Read those of the points whose claim stands."""
        ...

    def place(
        self,
        record: LayoutRecord,
        ids: Sequence[Id],
        cells: Sequence[int | list[int]],
        sketches: Sequence[int],
        claim: int,
    ) -> None:
        """Write the cells of those of the points whose claim still stands.

        Test and write must be one step for the database where others can write in between.
        """
        ...

    def sample(self, record: LayoutRecord, n: int) -> CelledKeys | None:
        """Read points drawn at random."""
        ...

    def celled(self, record: LayoutRecord, after: Cursor | None) -> Iterator[CelledKeys]:
        """Read all points in the order of their ids, behind a cursor."""
        ...

    def displace(self, record: LayoutRecord, ids: Sequence[Id]) -> None:
        """Take the cells of these points away."""
        ...


def _pointer_key(info: CollectionInfo) -> str:
    """Name the metadata entry that tells the layouts of one vector, in one shard key or all."""
    return "_".join(
        (_POINTER, *filter(None, (info.field, info.namespace and f"@{info.namespace}")))
    )


def serving(metadata: Mapping[str, Any], info: CollectionInfo) -> LayoutRecord | None:
    """Read which layout serves; None without one, or where the entry is not ours."""
    try:
        return LayoutState.read(metadata, info).serving
    except CollectionError:
        return None


@dataclass(frozen=True, slots=True)
class LayoutState:
    """The metadata entry of one vector: every layout of which anything is stored."""

    serving: LayoutRecord | None = None
    # What to roll back to, oldest first; None is no cells.
    before: tuple[LayoutRecord | None, ...] = ()
    idle: tuple[LayoutRecord, ...] = ()  # unfinished, or rolled back from

    @classmethod
    def read(cls, metadata: Mapping[str, Any], info: CollectionInfo) -> LayoutState:
        """Read the entry, or raise ``CollectionError`` if it is not ours; without it no layouts."""
        found = metadata.get(_pointer_key(info))
        if found is None:
            return cls()
        try:
            return cls(
                _record(found["serving"]),
                tuple(_record(one) for one in found["before"]),
                tuple(_read(one) for one in found["idle"]),
            )
        except (TypeError, KeyError) as exc:
            raise CollectionError(
                f"The collection's metadata hold something else under {_pointer_key(info)!r} than "
                "a layout; remove that entry."
            ) from exc

    def entry(self, info: CollectionInfo) -> dict[str, Any]:
        """Return the change to the metadata that makes them say this."""
        content = {
            "serving": _entry(self.serving),
            "before": [_entry(one) for one in self.before],
            "idle": [_written(one) for one in self.idle],
        }
        return {_pointer_key(info): content}

    def kept(self) -> dict[str, LayoutRecord]:
        """Layouts stored beside the one that serves, oldest first."""
        found = [one for one in (*self.before, *self.idle) if one is not None]
        here = None if self.serving is None else self.serving.layout
        return {one.layout: one for one in found if one.layout != here}

    def without(self, layout: str) -> LayoutState:
        """Return the state that has forgotten this layout, unless it serves."""
        before = tuple(one for one in self.before if one is None or one.layout != layout)
        idle = tuple(one for one in self.idle if one.layout != layout)
        return replace(self, before=before, idle=idle)


def _record(found: Mapping[str, Any]) -> LayoutRecord | None:
    return _read(found) if found else None


def _read(found: Mapping[str, Any]) -> LayoutRecord:
    return LayoutRecord(**{**found, "places": tuple(found.get("places", ()))})


def _entry(record: LayoutRecord | None) -> dict[str, Any]:
    # Never a null: inside of metadata it could mean "remove this".
    return {} if record is None else _written(record)


def _written(record: LayoutRecord) -> dict[str, Any]:
    """Leave out what earlier versions of this package do not know, where it says nothing."""
    entry = {**asdict(record), "places": list(record.places)}
    return {k: v for k, v in entry.items() if v or k not in ("shared", "places")}
