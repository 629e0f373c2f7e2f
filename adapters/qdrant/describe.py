"""How a Qdrant collection is built.

Importing this module needs the extra ``qdrant``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.points import RESERVED
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.collection.construction import Construction

if TYPE_CHECKING:
    from qdrant_client import models

__all__ = ["describe_qdrant"]

_WORTH_FROM = 10_000  # keys: below, a full scan takes as long as a search of cells
_CELLS = 64  # as many as ``amips train`` makes when it is not told
_LOCAL = "Qdrant's local mode filters in Python, where a search of cells costs more than a full one"
_GRAPH = "it has an HNSW graph in memory, which beat cells in every comparison"
_TENANTS = (
    "it has a graph for each value of a payload key and none over all (m=0, payload_m > 0), where "
    "a graph beats cells too; but a search over several values, or none, loses neighbours there "
    "without a word (recall .5, .2 and .13 at 2, 4 and 8 of 16 values, .02 at none)"
)
_TENANTS_NOTE = (
    "The router asks for one value at a time and merges; where a search names none, it has every "
    "point compared{}. Who often searches across values gives the collection a graph over all "
    "points as well (hnsw_config.m=16)."
)
_UNBUILT = (
    "Wait until the server has built the graph (status green): now every search scans most of the "
    "keys, and a graph in memory takes less CPU a query than cells do."
)


def describe_qdrant(found: models.CollectionInfo, field: str, *, local: bool) -> Construction:
    """Say what the server's description of a collection means for one vector."""
    params, config = found.config.params, found.config
    named = params.vectors if isinstance(params.vectors, dict) else {"": params.vectors}
    vector = named[field]
    if vector is None:  # an impossible collection: ``info`` would have refused it
        return Construction(())
    if local:
        exact = (("server", "local mode, always exact"),)
        return Construction(exact, worth_from=_WORTH_FROM, obstacle=_LOCAL)
    own = vector.hnsw_config
    links = config.hnsw_config.m if own is None or own.m is None else own.m
    tenants = (config.hnsw_config if own is None or own.payload_m is None else own).payload_m
    tenants = tenants if found.payload_schema and not links else 0
    on_disk = bool(vector.on_disk or (config.hnsw_config if own is None else own).on_disk)
    ef = config.hnsw_config.ef_construct
    limits = Limits(config.strict_mode_config)
    refused = limits.refusal(_CELLS, len(found.payload_schema) + 1)
    strict = [refused] if refused else list(limits.notes())
    facts = (
        ("server", f"Qdrant, {found.status.value}"),
        ("graph", _graph(links, tenants or 0, ef)),
        ("vectors", "on disk" if on_disk else "in memory"),
        ("quantisation", _name(vector.quantization_config or config.quantization_config)),
        ("payload", ", ".join(_payload(found)) or "no index"),
        ("strict mode", "; ".join(strict) or "allows cells"),
        ("segments", _segments(found)),
    )
    points, indexed = found.points_count or 0, found.indexed_vectors_count or 0
    notes: tuple[str, ...] = ()
    obstacle = "strict mode of the collection refuses cells" if refused else ""
    if tenants:
        but = "" if limits.allows_exact else ", which strict mode forbids (search_allow_exact)"
        obstacle, notes = obstacle or _TENANTS, (_TENANTS_NOTE.format(but),)
        return Construction(facts, "graph", None, _WORTH_FROM, obstacle, notes)
    if not links:
        return Construction(facts, worth_from=_WORTH_FROM, obstacle=obstacle)
    if indexed < points:
        notes = (
            f"{points - indexed:,} of {points:,} points are in no graph yet (segments below the "
            f"indexing threshold, or still being optimised), and every search scans them.",
        )
    if indexed < points / 2:
        busy = found.status.value != "green" and not on_disk
        first = _UNBUILT if busy else ""
        return Construction(facts, "scan", None, _WORTH_FROM, obstacle, notes, first)
    obstacle = obstacle or ("" if on_disk else _GRAPH)
    graphs = found.segments_count
    return Construction(
        facts,
        "graph",
        None,
        _WORTH_FROM,
        obstacle,
        notes,
        graphs=graphs,
        vectors_on_disk=bool(vector.on_disk),
    )


def _graph(links: int, tenants: int, ef: int) -> str:
    if links:
        return f"HNSW m={links}, ef_construct={ef}"
    return f"one a payload value (m=0, payload_m={tenants})" if tenants else "none (m=0)"


def _name(quantisation: Any) -> str:
    if quantisation is None:
        return "none"
    kind = type(quantisation).__name__.removesuffix("Quantization").lower()
    inner = getattr(quantisation, kind, None)
    return f"{kind}, always in RAM" if getattr(inner, "always_ram", False) else kind


def _payload(found: models.CollectionInfo) -> Iterator[str]:
    for key, index in sorted(found.payload_schema.items()):
        if not key.startswith(RESERVED):
            yield f"{key} ({index.data_type.value})"


def _segments(found: models.CollectionInfo) -> str:
    threshold = found.config.optimizer_config.indexing_threshold
    return (
        f"{found.segments_count}, with {found.indexed_vectors_count or 0:,} of "
        f"{found.points_count or 0:,} points in a graph"
        + (f" (a segment gets one from {threshold:,} kB on)" if threshold else "")
    )
