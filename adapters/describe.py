"""What every database's description of a collection says of its cells."""

from __future__ import annotations

from dataclasses import replace

from amips_plugins.collection import Collection
from amips_plugins.collection.construction import Construction

__all__ = ["with_cells"]


def with_cells(collection: Collection, found: Construction) -> Construction:
    """Add to a description which cells there are."""
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
