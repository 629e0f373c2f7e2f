"""Cells: a partition of the keys, and the rule that gives a new key its cell."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.arrays import read_npz, readable, write_npz
from amips_plugins.errors import BundleCorrupt
from amips_plugins.sketch import same_vectors, sketch
from amips_plugins.vectors import FloatArray, IntArray, Metric, normalise

__all__ = ["Cells", "KnownCells", "View", "further_cells", "place_keys"]

_BLOCK = 16_384
_ARRAYS = ("centroids", "offsets", "sizes", "view", "weight", "popularity", "centre")


@dataclass(frozen=True)
class View:
    """How queries see a key: where cells are cut that learn from queries.

    A key y, in the place that ``place_keys`` gives it, is seen at
    ``z = y + weight * normalise(y @ matrix)``, of unit length unless the metric is L2, with one
    more coordinate: its popularity, how often queries are expected to hit it.

    Attributes
    ----------
    matrix
        ``(dim, dim)`` float32: maps a key to the mean direction of the queries that hit it.
    weight
        How far a key moves in that direction.
    popularity
        ``(dim + 1,)`` float32 ``p``: a key's is ``<y, p[:-1]> + p[-1]``.
    """

    matrix: FloatArray
    weight: float
    popularity: FloatArray

    def see(self, places: FloatArray, metric: Metric) -> FloatArray:
        """Map ``(n, dim)`` places of keys to ``(n, dim + 1)`` views."""
        moved: FloatArray = places + np.float32(self.weight) * normalise(places @ self.matrix)
        seen = moved if metric is Metric.L2 else normalise(moved)
        return np.hstack([seen, (places @ self.popularity[:-1] + self.popularity[-1])[:, None]])


@dataclass(frozen=True)
class Cells:
    """A partition of the keys.

    A key belongs to the cell of the largest ``<z, centroid> + offset``, where z is its view, or
    its place where there is no view: then these are plain k-means cells. Keys of the snapshot that
    queries have hit are placed by those queries instead, so their cells are recorded beside the
    rule (``KnownCells``).

    Attributes
    ----------
    centroids
        ``(n_cells, dim)`` float32, or ``(n_cells, dim + 1)`` with a view.
    offsets
        ``(n_cells,)`` float32; half the squared length of the centroid, negative, makes the rule
        that of the nearest centroid.
    sizes
        ``(n_cells,)`` int64, keys of the snapshot in each cell.
    view
        How queries see a key, or None.
    centre
        ``(dim,)`` where places are counted from if the metric is L2; None for the origin.
    """

    centroids: FloatArray
    offsets: FloatArray
    sizes: IntArray
    view: View | None = None
    centre: FloatArray | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.centroids)

    def assign(self, keys: FloatArray, metric: Metric) -> IntArray:
        """Give keys their cells; deterministic, and blockwise in memory."""
        chosen = np.empty(len(keys), dtype=np.int64)
        for start in range(0, len(keys), _BLOCK):
            block = np.asarray(keys[start : start + _BLOCK], dtype=np.float32)
            places = place_keys(block, metric, self.centre)
            seen = places if self.view is None else self.view.see(places, metric)
            nearness = seen @ self.centroids.T + self.offsets
            chosen[start : start + _BLOCK] = nearness.argmax(axis=1)
        return chosen

    def layout(self) -> str:
        """Return a short identifier of this partition, for partition names and payload keys."""
        digest = hashlib.sha256()
        for name, array in self._arrays().items():
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()[:10]

    def to_bytes(self) -> bytes:
        """Serialise as an npz archive (plain arrays, no pickle)."""
        return write_npz(**self._arrays())

    def _arrays(self) -> dict[str, Any]:
        arrays = {"centroids": self.centroids, "offsets": self.offsets, "sizes": self.sizes}
        if self.centre is not None:
            arrays["centre"] = self.centre
        if self.view is None:
            return arrays
        view, weight = self.view, np.array([self.view.weight])
        return arrays | {"view": view.matrix, "weight": weight, "popularity": view.popularity}

    @classmethod
    def from_bytes(cls, data: bytes) -> Cells:
        """Read what ``to_bytes`` wrote."""
        with readable("The bundle's cells"):
            archive = read_npz(data, _ARRAYS)
            centroids = np.asarray(archive["centroids"], dtype=np.float32)
            offsets = np.asarray(archive["offsets"], dtype=np.float32)
            sizes = np.asarray(archive["sizes"], dtype=np.int64)
            view = None
            if "view" in archive:
                matrix = np.asarray(archive["view"], dtype=np.float32)
                popularity = np.asarray(archive["popularity"], dtype=np.float32)
                view = View(matrix, float(archive["weight"][0]), popularity)
            centre = archive.get("centre")
            centre = None if centre is None else np.asarray(centre, dtype=np.float32)
            sound = all(np.isfinite(array).all() for array in archive.values())
            sound = sound and not (sizes < 0).any()
        per_cell = (len(centroids),) if centroids.ndim == 2 else ()
        fits = sizes.shape == offsets.shape == per_cell != ()
        if fits and view is not None:
            dim = centroids.shape[1] - 1
            fits = view.matrix.shape == (dim, dim) and view.popularity.shape == (dim + 1,)
        if fits and centre is not None:
            fits = centre.shape == (centroids.shape[1] - (view is not None),)
        if not fits:
            raise BundleCorrupt("The bundle's cells have unfitting shapes; publish it again.")
        if not sound:
            raise BundleCorrupt("The bundle's cells have impossible values; publish it again.")
        return cls(centroids, offsets, sizes, view, centre)


def place_keys(keys: FloatArray, metric: Metric, centre: FloatArray | None = None) -> FloatArray:
    """Return where keys lie for k-means: their direction, or from a centre to them if it is L2."""
    if metric is not Metric.L2:
        return normalise(keys)
    return keys if centre is None else keys - centre


class KnownCells:
    """The recorded cells of a snapshot's keys, and the rule for every other key.

    A key keeps its recorded cell as long as its vector is about the one of the snapshot; written
    again with another vector, it is another key and goes by the rule. ``further`` holds the row
    and the cell, ``(m, 2)``, wherever a key lies in more cells than one. Takes 16 bytes a key, and
    4 more for every further cell that some key has.
    """

    def __init__(
        self,
        cells: Cells,
        metric: Metric,
        ids: Iterable[int | str],
        recorded: npt.NDArray[np.int32],
        further: npt.NDArray[np.int32] | None = None,
    ) -> None:
        # Hashes in place of ids: two keys that share one are still told apart by their sketches,
        # and a key taken for unknown only goes by the rule.
        hashes = np.fromiter(map(hash, ids), dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        self._cells = cells
        self._metric = metric
        self._hashes = hashes[order]
        self._sketches = recorded[order, 1]
        self.shared = further is not None
        members = recorded[:, :1] if further is None else all_cells(recorded[:, 0], further)
        self._members = members[order]

    def __call__(self, ids: Sequence[int | str], vectors: FloatArray) -> IntArray:
        """Give each key its cell, or all its cells (``cell_layout.AssignCells``)."""
        chosen, known = self._look_up(ids, vectors)
        new = np.flatnonzero(~known)
        if len(new):
            chosen[new] = self._cells.assign(vectors[new], self._metric)[:, None]
        return chosen if self.shared else chosen[:, 0]

    def _look_up(
        self, ids: Sequence[int | str], vectors: FloatArray
    ) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Return recorded cells, and of which keys they are."""
        if not len(self._hashes) or not len(ids):
            none = np.zeros((len(ids), self._members.shape[1]), dtype=np.int64)
            return none, np.zeros(len(ids), dtype=np.bool_)
        wanted = np.fromiter(map(hash, ids), dtype=np.int64, count=len(ids))
        places = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        same = same_vectors(sketch(vectors, self._metric), self._sketches[places])
        known: npt.NDArray[np.bool_] = (self._hashes[places] == wanted) & same
        return self._members[places].astype(np.int64), known


def all_cells(
    first: npt.NDArray[np.int32], further: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Put the cells of every key together from its first and ``(m, 2)`` rows and further cells."""
    order = np.argsort(further[:, 0], kind="stable")
    rows = further[order, 0]
    places = np.arange(len(rows)) - np.searchsorted(rows, rows) + 1
    members = np.repeat(first[:, None], 1 + int(places.max(initial=0)), axis=1)
    members[rows, places] = further[order, 1]
    return members


def further_cells(members: IntArray) -> npt.NDArray[np.int32]:
    """Return rows and cells, ``(m, 2)``, of all cells but the first of every key."""
    rows, places = np.nonzero(members != members[:, :1])
    return np.stack([rows, members[rows, places]], axis=1).astype(np.int32)
