"""What the router needs of a vector database: the ``Collection`` protocol and its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from amips_plugins.errors import InvalidInput
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray, Metric

__all__ = [
    "AssignCells",
    "Collection",
    "CollectionInfo",
    "Cursor",
    "Hit",
    "Id",
    "KeyBatch",
    "SearchRequest",
    "group_by_cells",
]

Id = int | str
Cursor = int | str
AssignCells = Callable[[Sequence[Id], FloatArray], IntArray]
"""Gives each key its cell: ids and ``(n, dim)`` float32 vectors to ``(n,)`` int64."""


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """What a collection is, read once from the database.

    Attributes
    ----------
    database
        ``"milvus"``, ``"qdrant"`` or ``"memory"``.
    name
        Name of the collection.
    field
        The vector field searched (Qdrant: the vector's name, empty for the unnamed one).
    metric
        How it compares vectors.
    dim
        Dimension of the vectors.
    schema
        Field names and their types, as the database names them.
    """

    database: str
    name: str
    field: str
    metric: Metric
    dim: int
    schema: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeyBatch:
    """Some keys of a collection, in the order of their ids.

    Attributes
    ----------
    ids
        One id a key.
    vectors
        ``(n, dim)`` float32, as the database stores them.
    cursor
        Pass it as ``after`` to go on behind this batch, in another process too.
    """

    ids: Sequence[Id]
    vectors: FloatArray
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """One search, as the caller asked for it.

    Attributes
    ----------
    queries
        ``(n_queries, dim)`` finite float32.
    k
        Number of hits wanted for each query.
    filter
        The database's own filter: an expression (Milvus), a ``models.Filter`` (Qdrant), a
        predicate on the id and fields (memory).
    fields
        Names of the stored fields to return with each hit.
    params
        The database's own search parameters, such as ``{"nprobe": 16}``.
    timeout
        Seconds the database may take; None for the client's default.
    """

    queries: FloatArray
    k: int
    filter: Any = None
    fields: Sequence[str] = ()
    params: Mapping[str, Any] | None = None
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """One key found.

    Attributes
    ----------
    id
        Its id.
    score
        The database's own score of the original query: inner product, cosine similarity, or a
        distance (squared in Milvus and in memory, not squared in Qdrant).
    fields
        The stored fields asked for.
    """

    id: Id
    score: float
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Collection(Protocol):
    """One vector field of one collection. ``tests/contract`` holds what every adapter promises."""

    @property
    def info(self) -> CollectionInfo:
        """What the collection is; the first use asks the database."""
        ...

    def count(self) -> int:
        """Return the number of keys that a search can find now."""
        ...

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every key once, in a stable order, behind the cursor ``after``."""
        ...

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search by a plan; the empty plan is the database's native search.

        Returns
        -------
        list
            For each query its hits, best first.

        Raises
        ------
        InvalidInput
            The plan names cells of a layout that the collection does not have.
        """
        ...

    def layout(self) -> str | None:
        """Return the identifier of the cells the collection is laid out in, or None."""
        ...

    def lay_out(
        self, layout: str, n_cells: int, assign: AssignCells, progress: Progress = no_progress
    ) -> Collection:
        """Put every key into its cell and return the collection that has the cells.

        That is this collection itself (Qdrant, memory) or a copy of it (Milvus, where a key
        cannot change its partition). Keys written later without a cell are overflow: a search
        of any cells finds them.

        Parameters
        ----------
        layout
            Identifies the cells; lower-case letters and digits, at most 16.
        n_cells
            Number of cells.
        assign
            Gives each key its cell.
        progress
            Watches the work.
        """
        ...

    def close(self) -> None:
        """Release what this object opened; safe to call twice."""
        ...


def group_by_cells(cells: IntArray) -> list[tuple[list[int], list[int]]]:
    """Group the queries that search the same set of cells, so that each group is one call.

    Parameters
    ----------
    cells
        ``(n_queries, n_probes)`` int64, -1 for unused places.

    Returns
    -------
    list
        Pairs of the sorted cells and the row numbers of the queries that search them.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, chosen in enumerate(cells.tolist()):
        groups.setdefault(tuple(sorted({cell for cell in chosen if cell >= 0})), []).append(row)
    return [(list(chosen), rows) for chosen, rows in groups.items()]


def check_layout(plan: QueryPlan, layout: str | None, name: str) -> None:
    """Refuse a plan whose cells are not the collection's own.

    Raises
    ------
    InvalidInput
        The plan counts the cells of another layout.
    """
    if plan.cells is not None and plan.layout != layout:
        raise InvalidInput(
            f"The plan searches cells of layout {plan.layout!r}, but collection {name!r} has "
            f"{layout!r}; lay it out with the bundle that made the plan."
        )
