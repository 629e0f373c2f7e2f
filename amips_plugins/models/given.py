"""Cells that are the users' own partitions, and how many keys each of them had."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from amips_plugins.arrays import readable
from amips_plugins.errors import BundleCorrupt
from amips_plugins.partitions import Partitions, Value
from amips_plugins.vectors import IntArray

__all__ = ["GivenCells"]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    field: str | None
    values: list[Value]
    sizes: list[int]
    overflow: int


@dataclass(frozen=True)
class GivenCells:
    """The parts that a router knows, as they were when it was trained.

    Attributes
    ----------
    partitions
        What tells them apart, and their values in the order of the cells.
    sizes
        ``(n_cells,)`` int64, keys of the snapshot in each.
    overflow
        Keys of the snapshot that belong to none.
    """

    partitions: Partitions
    sizes: IntArray
    overflow: int = 0

    @property
    def n_cells(self) -> int:
        """Number of parts."""
        return len(self.partitions.values)

    def layout(self) -> str:
        """Return what identifies the parts."""
        return self.partitions.layout

    def to_bytes(self) -> bytes:
        """Serialise as JSON."""
        given = self.partitions
        return msgspec.json.encode(
            _File(given.field, list(given.values), self.sizes.tolist(), self.overflow)
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> GivenCells:
        """Read what ``to_bytes`` wrote, or raise ``BundleCorrupt``."""
        with readable("The bundle's partitions"):
            found = msgspec.json.decode(data, type=_File)
            sizes = np.array(found.sizes, dtype=np.int64)
        values = found.values
        sound = bool(values) and len(set(values)) == len(values) == len(sizes)
        sound = sound and len({type(value) for value in values}) == 1
        if not sound or (sizes < 0).any() or found.overflow < 0:
            raise BundleCorrupt("The bundle's partitions have impossible values; publish it again.")
        return cls(Partitions(found.field, tuple(values)), sizes, found.overflow)
