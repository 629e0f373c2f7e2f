"""How a collection is built, as its database tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from amips_plugins.collection.sizing import Kept

__all__ = ["Construction"]


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
    first
        What has to be done before a verdict means anything, as a whole sentence; mostly empty.
    graphs
        How many graphs every search asks; None where it asks none, or nobody knows.
    kept
        What a server of Milvus keeps in memory; None for others.
    vectors_on_disk
        Whether Qdrant leaves the vectors on the disk, and reads those that are compared.
    """

    facts: tuple[tuple[str, str], ...]
    native: Literal["scan", "lists", "graph"] = "scan"
    lists: int | None = None
    worth_from: int = 0
    obstacle: str = ""
    notes: tuple[str, ...] = field(default=())
    first: str = ""
    graphs: int | None = None
    kept: Kept | None = None
    vectors_on_disk: bool = False
