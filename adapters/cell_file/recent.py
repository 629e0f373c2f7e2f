"""What has been written and deleted since a cell file was: in memory, and searched exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_file.log import Entry
from amips_plugins.collection import Id
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Recent"]

_Written = tuple[FloatArray, int, Mapping[str, Any]]


@dataclass(frozen=True)
class Recent:
    """Keys behind a file's own, and the rows of it that they replace or that are deleted.

    Attributes
    ----------
    written
        Vector, cell (-1 for none) and fields of each key.
    hidden
        Sorted rows of the file that are no more.
    offset
        How much of the log this is.
    """

    dim: int
    written: Mapping[Id, _Written] = field(default_factory=dict)
    hidden: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    offset: int = 0

    def __post_init__(self) -> None:
        ids = list(self.written)
        shape = (len(ids), self.dim)
        vectors = np.array([one for one, _, _ in self.written.values()], dtype=np.float32)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "vectors", vectors.reshape(shape))
        cells = np.array([cell for _, cell, _ in self.written.values()], dtype=np.int64)
        object.__setattr__(self, "cells", cells)

    ids: list[Id] = field(init=False, repr=False)
    vectors: FloatArray = field(init=False, repr=False)
    cells: IntArray = field(init=False, repr=False)

    def fields(self, place: int) -> Mapping[str, Any]:
        """Return the fields of a key."""
        return self.written[self.ids[place]][2]

    def after(
        self, entries: Sequence[Entry], offset: int, find: Callable[[Sequence[Id]], IntArray]
    ) -> Recent:
        """Return what it is after these entries; ``find`` gives the rows of ids in the file."""
        written, hidden = dict(self.written), set(self.hidden.tolist())
        for entry in entries:
            for one in entry.ids:
                written.pop(one, None)
            hidden.update(row for row in find(entry.ids).tolist() if row >= 0)
            if entry.vectors:
                vectors = np.frombuffer(entry.vectors, "<f4").reshape(len(entry.ids), self.dim)
                cells = np.frombuffer(entry.cells, "<i8").tolist() or [-1] * len(entry.ids)
                fields = entry.fields or [{}] * len(entry.ids)
                written.update(
                    zip(entry.ids, zip(vectors, cells, fields, strict=True), strict=True)
                )
        return Recent(self.dim, written, np.array(sorted(hidden), dtype=np.int64), offset)
