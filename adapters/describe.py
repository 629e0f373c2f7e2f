"""How a collection is built, as far as its database tells: what ``amips doctor`` begins with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from amips_plugins.collection import Collection

__all__ = ["Construction", "describe"]


@dataclass(frozen=True, slots=True)
class Construction:
    """How a collection is built.

    Attributes
    ----------
    facts
        What there is and how it is, in the order to show it.
    native
        What a native search does: scan every key, scan some lists of an IVF index, follow a graph.
    lists
        Number of those lists; None where it is not known, or there are none.
    worth_from
        Number of keys below which a full scan costs no more than a search of cells
        (docs/performance.md).
    obstacle
        Why cells cannot pay here whatever the data, as the end of a sentence; empty where they may.
    notes
        What to put right, whatever becomes of routing; whole sentences.
    """

    facts: tuple[tuple[str, str], ...]
    native: Literal["scan", "lists", "graph"] = "scan"
    lists: int | None = None
    worth_from: int = 0
    obstacle: str = ""
    notes: tuple[str, ...] = field(default=())


def describe(collection: Collection) -> Construction:
    """Look at how a collection is built; nothing is changed.

    Raises
    ------
    AmipsError
        The database cannot be asked.
    """
    return _with_cells(collection, _of_the_database(collection))


def _of_the_database(collection: Collection) -> Construction:
    # Importing an adapter needs its client, which is there if such a collection is.
    database = collection.info.database
    if database == "milvus":
        from amips_plugins.adapters.milvus.collection import MilvusCollection
        from amips_plugins.adapters.milvus.describe import describe_milvus

        if isinstance(collection, MilvusCollection):
            return describe_milvus(collection.table())
    if database == "qdrant":
        from amips_plugins.adapters.qdrant.collection import QdrantCollection
        from amips_plugins.adapters.qdrant.describe import describe_qdrant

        if isinstance(collection, QdrantCollection):
            return describe_qdrant(collection)
    if database == "qdrant-edge":
        from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
        from amips_plugins.adapters.qdrant_edge.describe import describe_edge

        if isinstance(collection, QdrantEdgeCollection):
            return describe_edge(collection)
    return Construction(())


def _with_cells(collection: Collection, found: Construction) -> Construction:
    layout = collection.layout()
    if layout is None:
        return replace(found, facts=(*found.facts, ("cells", "none")))
    count, overflow = collection.count(), collection.overflow()
    share = overflow / max(1, count)
    facts = (
        *found.facts,
        ("cells", f"layout {layout}"),
        ("overflow", f"{overflow:,} keys have no cell ({share:.1%})"),
    )
    return replace(found, facts=facts)
