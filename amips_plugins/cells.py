"""Cells: a partition of the keys, and the rule that gives a new key its cell."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from amips_plugins.errors import BundleCorrupt
from amips_plugins.vectors import FloatArray, IntArray, Metric, normalise

__all__ = ["Cells", "KnownCells", "view_keys"]

_BLOCK = 16_384


@dataclass(frozen=True)
class Cells:
    """A partition of the keys.

    A key belongs to the cell whose centroid is nearest to its view z. Without a map the view is
    the key itself, of unit length unless the metric is L2, and the cells are plain k-means cells.
    With one, ``z = y + weight * normalise(y @ view)`` (again of unit length unless the metric is
    L2): the map is learned from queries, so that keys which queries see alike share a cell even
    where they lie apart.

    Attributes
    ----------
    centroids
        ``(n_cells, dim)`` float32.
    sizes
        ``(n_cells,)`` int64, keys of the snapshot in each cell.
    view
        ``(dim, dim)`` float32, or None.
    weight
        Weight of the mapped key in the view.
    """

    centroids: FloatArray
    sizes: IntArray
    view: FloatArray | None = None
    weight: float = 0.0

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.centroids)

    def assign(self, keys: FloatArray, metric: Metric) -> IntArray:
        """Give keys their cells; deterministic, and blockwise in memory.

        Parameters
        ----------
        keys
            ``(n, dim)`` float32, as the collection stores them.
        metric
            Metric of the collection.

        Returns
        -------
        numpy.ndarray
            ``(n,)`` int64.
        """
        chosen = np.empty(len(keys), dtype=np.int64)
        offsets = 0.5 * np.einsum("ij,ij->i", self.centroids, self.centroids)
        for start in range(0, len(keys), _BLOCK):
            block = np.asarray(keys[start : start + _BLOCK], dtype=np.float32)
            views = view_keys(block, metric, self.view, self.weight)
            nearness = views @ self.centroids.T - offsets
            chosen[start : start + _BLOCK] = nearness.argmax(axis=1)
        return chosen

    def layout(self) -> str:
        """Return a short identifier of this partition, for partition names and payload keys."""
        digest = hashlib.sha256(self.centroids.tobytes())
        digest.update(np.float32(self.weight).tobytes())
        digest.update(b"" if self.view is None else self.view.tobytes())
        return digest.hexdigest()[:10]

    def to_bytes(self) -> bytes:
        """Serialise as an npz archive (plain arrays, no pickle)."""
        arrays = {"centroids": self.centroids, "sizes": self.sizes}
        if self.view is not None:
            arrays |= {"view": self.view, "weight": np.float32(self.weight).reshape(1)}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type] # the stub takes allow_pickle as a dict value
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Cells:
        """Read what ``to_bytes`` wrote.

        Raises
        ------
        BundleCorrupt
            Not such an archive, or its shapes do not fit each other.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                centroids = np.asarray(archive["centroids"], dtype=np.float32)
                sizes = np.asarray(archive["sizes"], dtype=np.int64)
                view = np.asarray(archive["view"], dtype=np.float32) if "view" in archive else None
                weight = float(archive["weight"][0]) if view is not None else 0.0
        except Exception as exc:  # a damaged archive raises whatever zipfile and numpy raise
            raise BundleCorrupt(
                f"The bundle's cells cannot be read ({exc}); publish it again."
            ) from exc
        if centroids.ndim != 2 or sizes.shape != (len(centroids),):
            raise BundleCorrupt("The bundle's cells have unfitting shapes; publish it again.")
        dim = centroids.shape[1]
        if view is not None and view.shape != (dim, dim):
            raise BundleCorrupt("The bundle's view map has an unfitting shape; publish it again.")
        return cls(centroids, sizes, view, weight)


def view_keys(
    keys: FloatArray, metric: Metric, view: FloatArray | None, weight: float
) -> FloatArray:
    """Map keys to the view that cells cut (see ``Cells``).

    Parameters
    ----------
    keys
        ``(n, dim)`` float32, as the collection stores them.
    metric
        Metric of the collection.
    view, weight
        The map and its weight; None for plain cells.

    Returns
    -------
    numpy.ndarray
        ``(n, dim)`` float32.
    """
    base = keys if metric is Metric.L2 else normalise(keys)
    if view is None:
        return base
    mixed: FloatArray = base + np.float32(weight) * normalise(base @ view)
    return mixed if metric is Metric.L2 else normalise(mixed)


class KnownCells:
    """The cells of a snapshot's keys by id, and the rule for every other key.

    Parameters
    ----------
    cells
        The partition.
    metric
        Metric of the collection.
    known
        Cell of each key of the snapshot.
    """

    def __init__(self, cells: Cells, metric: Metric, known: Mapping[int | str, int]) -> None:
        self._cells = cells
        self._metric = metric
        self._known = known

    def __call__(self, ids: Sequence[int | str], vectors: FloatArray) -> IntArray:
        """Give each key its cell (``adapters.base.AssignCells``)."""
        chosen = np.array([self._known.get(key, -1) for key in ids], dtype=np.int64)
        new = np.flatnonzero(chosen < 0)
        if len(new):
            chosen[new] = self._cells.assign(vectors[new], self._metric)
        return chosen
