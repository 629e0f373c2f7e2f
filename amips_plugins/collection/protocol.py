"""What the router needs of a vector database: the ``Collection`` protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from amips_plugins.cell_layout import Layouts
from amips_plugins.collection.construction import Construction
from amips_plugins.collection.values import (
    CollectionInfo,
    Cursor,
    Failure,
    Hit,
    Id,
    KeyBatch,
    SearchRequest,
)
from amips_plugins.partitions import Partitions
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["AsyncCollection", "Collection", "ThoroughCollection"]


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

    def fetch(self, ids: Sequence[Id]) -> KeyBatch:
        """Read those of the keys that are there with a vector, each once, in any order."""
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

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search exactly, as far as the database can: what an answer's recall is measured by.

        Parameters
        ----------
        request
            As for ``search``; its ``params`` are left aside for those that find the most.

        Returns
        -------
        list
            For each query its hits, best first.
        """
        ...

    @property
    def exhaustive(self) -> bool:
        """Whether ``exact`` looks at every key, rather than as far as an index goes."""
        ...

    @property
    def break_even(self) -> float:
        """Share of the keys above which a full scan is cheaper than a search of cells.

        ``docs/performance.md`` says how it was measured; 1 where cells are always cheaper.
        """
        ...

    @property
    def timeout(self) -> float | None:
        """Seconds that the client itself gives a call without a timeout; None without an end."""
        ...

    @property
    def max_candidates(self) -> int | None:
        """How many candidates a rewritten query may fetch here; None for any number."""
        ...

    def describe(self) -> Construction:
        """Say how the collection is built, as far as its database tells; nothing is changed."""
        ...

    def failure(self, exc: BaseException) -> Failure:
        """Say what an error that a search raised means."""
        ...

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:
        """Say why a plan would change what a request means, or None.

        Parameters
        ----------
        request
            What is searched: one query or a batch.
        rewritten
            Whether the plan would send another query, rather than choose cells.

        Returns
        -------
        str or None
            The reason, in a few words such as ``"params: offset"``: then the native search answers.
        """
        ...

    def current(self) -> Collection:
        """Look at the database again.

        An object stays on the generation and the cells it found first, so that one search never
        mixes two. This is how to follow a moved alias or new cells.

        Returns
        -------
        Collection
            This object where nothing changed, else another one with the same connection.
        """
        ...

    def upsert(
        self,
        ids: Sequence[Id],
        vectors: FloatArray,
        fields: Sequence[Mapping[str, Any]] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        """Write keys, in place of those with the same ids; the call returns when they are safe.

        A key that moves to another cell leaves no copy behind in its old one, and is never
        without either.

        Parameters
        ----------
        ids
            One id a key, each once.
        vectors
            ``(n, dim)`` float32.
        fields
            Stored fields of each key.
        cells
            ``(n,)`` int64, cells of this collection's layout, or ``(n, width)`` where these share
            keys: all cells of every key, its own first, which fills unused places. Left out, the
            keys are overflow.

        Raises
        ------
        InvalidInput
            Lengths or the dimension differ, an id comes twice, or there are cells but no layout.
        """
        ...

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete keys; ids that are not there are none of its business."""
        ...

    def layout(self) -> str | None:
        """Return the identifier of the cells the collection is laid out in, or None."""
        ...

    def overflow(self) -> int:
        """Return the number of keys without a cell; 0 without a layout."""
        ...

    @property
    def partitions(self) -> Partitions | None:
        """The users' own partitions that this object takes for cells; None for cells of ours."""
        ...

    def partitioned(self, partitions: Partitions | None) -> Collection:
        """Return another object of the same collection, whose cells are its users' own partitions.

        Its ``layout`` is theirs, plans count their values, and ``scan`` tells where each key
        belongs. Keys of other values, or of none, are overflow. Nothing is written. With None the
        cells are those of a layout again.

        Raises
        ------
        InvalidInput
            The collection cannot be told apart so: there is no such field, or it holds neither
            whole numbers nor texts.
        """
        ...

    @property
    def layouts(self) -> Layouts:
        """Builds, shows, mends and takes back the cells."""
        ...

    def close(self) -> None:
        """Release what this object opened; safe to call twice."""
        ...

    def __enter__(self) -> Collection:
        """Return the collection itself; leaving the block closes it."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        ...


@runtime_checkable
class AsyncCollection(Collection, Protocol):
    """A collection that can also be searched through an asynchronous client of its database."""

    async def search_async(
        self, client: Any, request: SearchRequest, plan: QueryPlan = NATIVE
    ) -> list[list[Hit]]:
        """Search as ``search`` does.

        Parameters
        ----------
        client
            The database's asynchronous client, connected to the same database.
        request, plan
            As for ``search``.
        """
        ...


@runtime_checkable
class ThoroughCollection(Protocol):
    """What a collection has besides, that may lie on a disk: an exact search reads all of it."""

    def thorough(self, request: SearchRequest) -> list[list[Hit]]:
        """Search so far that next to nothing is lost: what samples of live searches are judged by.

        Exactly where the vectors are in memory; where they lie on a disk by the codes of all keys,
        or as far as a graph goes, with many candidates scored by their vectors.
        """
        ...
