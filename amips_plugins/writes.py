"""Writing through the router: keys get cells, whatever happens to the cells meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from amips_plugins.bundle import Bundle
from amips_plugins.cells import KnownCells
from amips_plugins.layout import known_cells
from amips_plugins.vectors import FloatArray, IntArray

if TYPE_CHECKING:
    from amips_plugins.adapters.base import Id

__all__ = ["Assigner"]


class Assigner:
    """Gives keys the cells of a bundle, whose records it reads at the first use and keeps."""

    def __init__(self) -> None:
        self._read: tuple[Bundle, KnownCells] | None = None
        self.after_fork()

    def after_fork(self) -> None:
        """Forget a reading that the parent process was at."""
        self._lock = threading.Lock()

    def assign(self, bundle: Bundle, ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        """Return each key's cell.

        Raises
        ------
        BundleCorrupt
            The records are not what the manifest says.
        """
        with self._lock:
            if self._read is None or self._read[0].manifest != bundle.manifest:
                self._read = bundle, known_cells(bundle)
            _, known = self._read
        return known(ids, vectors)
