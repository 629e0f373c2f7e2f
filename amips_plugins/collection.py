"""What the router needs of a vector database: the ``Collection`` protocol and its values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import msgspec

from amips_plugins.cell_layout import Construction, Layouts
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions, Value
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray, IntArray, Metric

__all__ = [
    "AsyncCollection",
    "Collection",
    "CollectionInfo",
    "CollectionKey",
    "Cursor",
    "Failure",
    "Hit",
    "Id",
    "Incomplete",
    "KeyBatch",
    "SearchRequest",
    "ThoroughCollection",
    "check_keys",
    "check_layout",
    "collection_key",
]

Id = int | str
Cursor = int | str


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """What a collection is, read once from the database.

    Attributes
    ----------
    database
        ``"milvus"``, ``"qdrant"``, ``"qdrant-edge"``, ``"cell-file"``, ``"memory"`` or
        ``"several"``.
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
    namespace
        What keeps collections of one name apart on a server: Milvus' database; "" for the default
        one, and where there is none.
    family
        The name that the generations and aliases of a collection share, as the adapter knows it;
        "" where that is ``name``.
    origin
        The collection that this one is a copy of, by whose bundles it is searched; None for itself.
    """

    database: str
    name: str
    field: str
    metric: Metric
    dim: int
    schema: Mapping[str, str] = dataclasses.field(default_factory=dict)
    namespace: str = ""
    family: str = ""
    origin: CollectionKey | None = None


@dataclass(frozen=True, slots=True)
class KeyBatch:
    """Some keys of a collection; read by ``scan``, in the order of their ids.

    Attributes
    ----------
    ids
        One id a key.
    vectors
        ``(n, dim)`` float32, as the database stores them.
    cursor
        Pass it as ``after`` to go on behind this batch, in another process too.
    values
        Where each key belongs, None for nowhere, if the collection is seen in its own partitions.
    """

    ids: Sequence[Id]
    vectors: FloatArray
    cursor: Cursor = ""
    values: Sequence[Value | None] | None = None


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
    collection
        Where several collections are searched as one, the name of the one that it is of.
    """

    id: Id
    score: float
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    collection: str = ""

    @property
    def key(self) -> Id:
        """Its id among all that is searched: with its collection, as JSON, if it names one."""
        return json.dumps([self.collection, self.id]) if self.collection else self.id


class Incomplete(list[Hit]):
    """The hits of a query that some of several collections gave no answer to.

    Attributes
    ----------
    left_out
        Their names.
    """

    def __init__(self, hits: Iterable[Hit], left_out: tuple[str, ...]) -> None:
        super().__init__(hits)
        self.left_out = left_out


class Failure(Enum):
    """What an error of a database means to whoever might ask it again.

    Attributes
    ----------
    OUTAGE
        No answer: a timeout, or no connection. It is not asked again.
    BUSY
        It has too much to do, and says so. It is not asked again.
    SIZE
        More candidates were asked for than it gives.
    REQUEST
        What was asked is wrong, and would be wherever it is asked.
    OTHER
        Anything else.
    """

    OUTAGE = "outage"
    BUSY = "busy"
    SIZE = "size"
    REQUEST = "request"
    OTHER = "other"


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


def check_keys(
    dim: int,
    layout: str | None,
    ids: Sequence[Id],
    vectors: FloatArray,
    fields: Sequence[Mapping[str, Any]] | None,
    cells: IntArray | None,
    *,
    shared: bool = False,
) -> None:
    """Refuse keys that cannot be written (see ``Collection.upsert``)."""
    if len(set(ids)) != len(ids):
        raise InvalidInput("An id comes twice in one call; pass every id once.")
    if vectors.shape != (len(ids), dim):
        raise InvalidInput(
            f"{len(ids)} ids came with vectors of shape {vectors.shape}; pass ({len(ids)}, {dim})."
        )
    if fields is not None and len(fields) != len(ids):
        raise InvalidInput(f"{len(ids)} ids came with fields for {len(fields)}; pass one each.")
    if cells is not None and layout is None:
        raise InvalidInput("The collection has no cells to write to; lay it out first.")
    if cells is not None and cells.shape != (len(ids), *(cells.shape[1:2] if shared else ())):
        raise InvalidInput(
            f"{len(ids)} ids came with cells of shape {cells.shape}; pass one cell each."
        )


def check_layout(plan: QueryPlan, layout: str | None, name: str) -> None:
    """Raise ``InvalidInput`` for a plan that counts the cells of another layout."""
    if plan.cells is not None and plan.layout != layout:
        raise InvalidInput(
            f"The plan searches cells of layout {plan.layout!r}, but collection {name!r} has "
            f"{layout!r}; lay it out with the bundle that made the plan."
        )


def collection_key(info: CollectionInfo) -> CollectionKey:
    """Return the key of a collection, which its generations, aliases and copies share."""
    return info.origin or CollectionKey(
        database=info.database,
        namespace=info.namespace,
        name=info.family or info.name,
        field=info.field,
    )


class CollectionKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The collection a bundle was made for."""

    database: str
    name: str
    field: str
    namespace: str = ""

    def __str__(self) -> str:
        """Spell it as the command line does: ``milvus@tenant/docs/vector``."""
        database = f"{self.database}@{self.namespace}" if self.namespace else self.database
        return f"{database}/{self.name}/{self.field}"
