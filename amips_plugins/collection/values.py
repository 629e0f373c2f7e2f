"""What is asked of a collection, what it answers, and what it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from amips_plugins.partitions import Value
from amips_plugins.vectors import FloatArray, Metric

__all__ = [
    "CollectionInfo",
    "CollectionKey",
    "Cursor",
    "Failure",
    "Hit",
    "Id",
    "Incomplete",
    "KeyBatch",
    "SearchRequest",
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
