"""Cells inside a database: what it takes to build, mend and take them back."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from amips_plugins.errors import InvalidInput
from amips_plugins.progress import Progress, no_progress
from amips_plugins.sketch import same_vectors, sketch
from amips_plugins.vectors import BoolArray, FloatArray, IntArray, Metric

if TYPE_CHECKING:
    from amips_plugins.collection import Collection, Id

__all__ = [
    "AUDITED",
    "AssignCells",
    "BuildPlan",
    "CellIndex",
    "LayoutAudit",
    "LayoutSpec",
    "LayoutStatus",
    "Layouts",
    "Storage",
    "check_assigned",
    "check_name",
    "find_stale",
    "warn_of_stale",
]

AssignCells = Callable[[Sequence["Id"], FloatArray], IntArray]
"""Gives each key its cell: ids and ``(n, dim)`` float32 vectors to ``(n,)`` int64, -1 for none.

For cells that share keys (``LayoutSpec.shared``) also ``(n, width)``: all cells of every key, its
own first, which fills unused places."""

Storage = Literal["partitions", "field", "payload", "copy", "shards"]

CellIndex = Literal["flat", "auto", "hnsw", "ivf_flat", "ivf_sq8"]

AUDITED = 1000
"""Keys that a backfill looks at, whether their cells are still theirs."""

_log = logging.getLogger("amips_plugins")

_NAME = re.compile(r"[a-z0-9]{1,16}")


@dataclass(frozen=True, slots=True)
class LayoutSpec:
    """The cells that a collection is to get.

    Attributes
    ----------
    layout
        Identifies the cells; lower-case letters and digits, at most 16.
    n_cells
        Number of cells.
    assign
        Gives each key its cell.
    version
        The bundle they come from; kept beside the cells.
    storage
        Milvus: a partition for every cell, or a field that holds the cell; left out, partitions
        where they are few enough. Qdrant: the payload in place, or that of a copy, or custom shard
        keys of a copy; left out, a copy where there is a graph and an alias to move, with shard
        keys where a search asks many shards as it is. Qdrant Edge: the payload or, as well,
        a shard with a graph for every cell.
    index
        Milvus: the vector index inside the cells: ``"flat"`` (exact), ``"auto"`` (what the
        collection has now), ``"hnsw"``, ``"ivf_flat"`` or ``"ivf_sq8"`` (with the collection's
        parameters where it has that kind).
    alias
        The alias to point at a copy when it is complete; left out, the one by which the collection
        was opened, if any.
    work
        Folder that remembers what was copied, so that a run after a crash can tell the writes of
        others apart; left out, memory.
    shared
        Whether a key may lie in more than one cell.
    copies
        Further cells that keys had in the bundle's snapshot, all together; 0 where nobody knows.
    graphs
        Whether the bundle's targets count what graphs inside the cells miss.
    lists
        Where they count what an IVF index of codes misses, the number of its lists; else None.
    sizes
        Keys that each cell had in the bundle's snapshot; empty where nobody knows.
    centroids
        ``(n_cells, width)`` float32, near each other for cells that queries choose together; None
        where nobody knows.
    """

    layout: str
    n_cells: int
    assign: AssignCells
    version: str = ""
    storage: Storage | None = None
    index: CellIndex = "flat"
    alias: str | None = None
    work: Path | None = None
    shared: bool = False
    copies: int = 0
    graphs: bool = False
    lists: int | None = None
    sizes: tuple[int, ...] = ()
    centroids: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What building the cells would do. Nothing has been changed to find it out.

    Attributes
    ----------
    steps
        What happens, in order.
    keys
        Number of keys to place.
    n_bytes
        What the database will store in addition.
    seconds
        A guess from how fast it reads now.
    notes
        What the operator should know before.
    """

    steps: tuple[str, ...]
    keys: int
    n_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayoutStatus:
    """The cells that a collection has.

    Attributes
    ----------
    name
        The collection that serves.
    layout, version, storage
        Its cells and the bundle they come from; None without cells.
    count, overflow
        Its keys, and those of them without a cell.
    unfinished
        What an interrupted build left, to be finished by building again.
    older
        What is kept to roll back to, oldest first; ``drop_old`` removes it.
    sizes
        Keys of each of the users' own partitions that a router knows; empty for cells of ours.
    notes
        What is not as the layout left it, in whole sentences.
    """

    name: str
    layout: str | None
    version: str | None
    storage: str | None
    count: int
    overflow: int
    unfinished: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayoutAudit:
    """Random keys with a cell: how many were judged, how many lie in that of another vector."""

    sampled: int
    stale: int

    @property
    def too_stale(self) -> bool:
        """Whether more keys are stale than a router bears: above 1 %, and 3 that show it."""
        return self.stale >= 3 and self.stale > 0.01 * self.sampled

    @property
    def share_at_most(self) -> float:
        """Upper 95 % confidence bound of the share of stale keys (Clopper and Pearson)."""
        if self.stale >= self.sampled:
            return 1.0
        low, high = self.stale / self.sampled, 1.0
        counts = range(self.stale + 1)
        ways = [
            math.lgamma(self.sampled + 1) - math.lgamma(k + 1) - math.lgamma(self.sampled - k + 1)
            for k in counts
        ]
        for _ in range(40):
            share = (low + high) / 2
            hit, miss = math.log(share or 1e-300), math.log1p(-share)
            chance = sum(math.exp(ways[k] + k * hit + (self.sampled - k) * miss) for k in counts)
            low, high = (share, high) if chance > 0.05 else (low, share)
        return high


def check_name(spec: LayoutSpec) -> None:
    """Refuse an identifier or a number of cells that no database could hold."""
    if not _NAME.fullmatch(spec.layout):
        raise InvalidInput(
            f"The layout is called {spec.layout!r}; use 1 to 16 lower-case letters and digits."
        )
    if spec.n_cells < 1:
        raise InvalidInput(f"{spec.n_cells} cells hold nothing; use 1 or more.")


def check_assigned(cells: IntArray, n_keys: int, n_cells: int, *, shared: bool = False) -> IntArray:
    """Return the cells of some keys as int64, ``(n_keys,)`` or with ``shared`` ``(n_keys, width)``.

    Raises ``InvalidInput`` where they are not integers from -1 to ``n_cells - 1``, one (or a row)
    each.
    """
    array = np.asarray(cells)
    fits = array.shape[:1] == (n_keys,) and (array.ndim == 1 or (shared and array.ndim == 2))
    if not fits or not np.issubdtype(array.dtype, np.integer):
        raise InvalidInput(
            f"assign answered with {array.dtype} of shape {array.shape} for {n_keys} keys; "
            f"it must return one integer a key."
        )
    if n_keys and not (array.min() >= -1 and array.max() < n_cells):
        raise InvalidInput(
            f"assign chose cells from {array.min()} to {array.max()}; "
            f"there are 0 to {n_cells - 1}, and -1 for none."
        )
    return array.astype(np.int64)


def find_stale(
    ids: Sequence[Id],
    vectors: FloatArray,
    cells: IntArray,
    sketches: Sequence[int | None],
    metric: Metric,
    assign: AssignCells | None,
) -> tuple[BoolArray, BoolArray]:
    """Tell which keys with a cell could be judged, and which of these are stale.

    By the sketches beside the cells; without one (older layouts) by the cell that ``assign`` gives.
    """
    judged = np.array([one is not None for one in sketches], dtype=np.bool_)
    stale = np.zeros(len(ids), dtype=np.bool_)
    if judged.any():
        beside = np.array([one for one in sketches if one is not None], dtype=np.int32)
        stale[judged] = ~same_vectors(beside, sketch(vectors[judged], metric))
    rest = np.flatnonzero(~judged).tolist()
    if assign is not None and len(rest):
        again = assign([ids[row] for row in rest], vectors[rest])
        stale[rest] = (again.reshape(len(rest), -1) != cells[rest, None]).all(axis=1)
        judged[rest] = True
    return judged, stale


def warn_of_stale(name: str, audit: LayoutAudit) -> None:
    """Say what a backfill's look at a sample found, where it found anything."""
    if audit.stale:
        _log.warning(
            "%d of %d keys of %r drawn at random had another vector's cell, which was taken away. "
            "Others may be like them: run amips backfill --verify, which reads every vector.",
            audit.stale,
            audit.sampled,
            name,
        )


class Layouts(Protocol):
    """The cells of one collection. ``tests/contract`` holds what every adapter promises."""

    def plan(self, spec: LayoutSpec) -> BuildPlan:
        """Check whether the cells can be built and say what that would do; change nothing.

        Raises
        ------
        InvalidInput
            The collection has these cells already, or cannot have them.
        CollectionError
            The database would refuse, or has too little room.
        """
        ...

    def build(self, spec: LayoutSpec, progress: Progress = no_progress) -> Collection:
        """Give every key its cell while others go on reading and writing.

        Killed at any point and run again, it goes on from there. Cells that were there before
        serve until the new ones are complete.

        Returns
        -------
        Collection
            The collection that has the cells: the same one (in place) or a new generation of it (a
            copy).

        Raises
        ------
        InvalidInput, CollectionError
            As for ``plan``; and what was written is not what was meant to be.
        """
        ...

    def status(self) -> LayoutStatus:
        """Say which cells there are."""
        ...

    def roll_back(self, *, anyway: bool = False) -> Collection:
        """Serve what served before the cells that serve now, and return that.

        Parameters
        ----------
        anyway
            Also where that holds keys which the serving collection has not.

        Raises
        ------
        InvalidInput
            Nothing is kept to roll back to.
        CollectionError
            It holds keys which the serving collection has not.
        """
        ...

    def drop_old(self, *, anyway: bool = False) -> list[str]:
        """Remove what ``roll_back`` would need and what unfinished builds left; return the names.

        Parameters
        ----------
        anyway
            Also where that holds keys which the serving collection has not.

        Raises
        ------
        CollectionError
            Something that would go holds keys which the serving collection has not.
        """
        ...

    def audit(self, sample: int, assign: AssignCells | None = None) -> LayoutAudit:
        """Look whether keys lie in the cells of their own vectors; change nothing.

        Parameters
        ----------
        sample
            How many keys to read with their vectors, drawn at random.
        assign
            Judges keys of older layouts, which have no sketch beside their cells.

        Raises
        ------
        InvalidInput
            The collection has no cells.
        """
        ...

    def backfill(
        self, assign: AssignCells, progress: Progress = no_progress, *, verify: bool = False
    ) -> int:
        """Give the overflow its cells, and return how many keys got one.

        Afterwards a random sample is looked at: stale keys (``LayoutAudit``) lose their cell, are
        overflow from then on, and a warning tells of them.

        Parameters
        ----------
        assign, progress
            As for a build.
        verify
            First read every vector and make all stale keys overflow; killed and called again, it
            goes on.

        Raises
        ------
        InvalidInput
            The collection has no cells.
        """
        ...
