"""How a Qdrant Edge shard is built.

Importing this module needs the extra ``qdrant-edge``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from amips_plugins.collection.construction import Construction

if TYPE_CHECKING:
    import qdrant_edge as edge

__all__ = ["describe_edge"]

_WORTH_FROM = 10_000  # keys: below, a full scan takes as long as a search of cells
_THRESHOLD = 10_000  # kB of vectors: where the shard does not say, smaller segments get no graph
_UNBUILT = (
    "Optimise first: no graph has been built, so that every search scans every key; "
    "collection.optimize() builds it, and in memory it takes less CPU a query than cells do."
)
_GRAPH = (
    "its HNSW graph in memory takes less CPU a query than cells do; cells are for a shard that is "
    "rebuilt or written to all the time, since they are built in a twelfth of the time"
)


def describe_edge(config: Mapping[str, Any], info: edge.ShardInfo, field: str) -> Construction:
    """Say what the engine's description of a shard means for one vector."""
    vector: dict[str, Any] = config["vectors"][field]
    graph = vector.get("hnsw_config") or config.get("hnsw_config") or {}
    links = int(graph.get("m", 16))
    on_disk = bool(vector.get("on_disk") or graph.get("on_disk"))
    quantised = vector.get("quantization_config") or config.get("quantization_config")
    points, indexed = info.points_count, info.indexed_vectors_count
    threshold = (config.get("optimizers") or {}).get("indexing_threshold") or _THRESHOLD
    unbuilt = indexed < points / 2
    due = unbuilt and links > 0 and 4 * int(vector["size"]) * points > 1024 * threshold
    facts = (
        ("server", "Qdrant Edge, in this process"),
        ("graph", f"HNSW m={links}" if indexed else "none yet" if due else "none"),
        ("vectors", "on disk" if on_disk else "in memory"),
        ("quantisation", next(iter(quantised), "none") if quantised else "none"),
        ("segments", f"{info.segments_count}, with {indexed:,} of {points:,} points in a graph"),
    )
    if unbuilt:
        return Construction(facts, worth_from=_WORTH_FROM, first=_UNBUILT if due else "")
    obstacle = "" if on_disk else _GRAPH
    return Construction(
        facts,
        "graph",
        None,
        _WORTH_FROM,
        obstacle,
        graphs=info.segments_count,
        vectors_on_disk=bool(vector.get("on_disk")),
    )
