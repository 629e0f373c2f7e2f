"""How a Qdrant collection is built.

Importing this module needs the extra ``qdrant``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.points import RESERVED
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.cell_layout import Construction

if TYPE_CHECKING:
    from qdrant_client import models

__all__ = ["describe_qdrant"]

_WORTH_FROM = 10_000  # keys: below, a full scan takes as long as a search of cells
_CELLS = 64  # as many as ``amips train`` makes when it is not told
_LOCAL = "Qdrant's local mode filters in Python, where a search of cells costs more than a full one"
_GRAPH = "it has an HNSW graph in memory, which beat cells in every comparison"


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
    on_disk = bool(vector.on_disk or (config.hnsw_config if own is None else own).on_disk)
    ef = config.hnsw_config.ef_construct
    limits = Limits(config.strict_mode_config)
    refused = limits.refusal(_CELLS, len(found.payload_schema) + 1)
    strict = [refused] if refused else list(limits.notes())
    facts = (
        ("server", f"Qdrant, {found.status.value}"),
        ("graph", f"HNSW m={links}, ef_construct={ef}" if links else "none (m=0)"),
        ("vectors", "on disk" if on_disk else "in memory"),
        ("quantisation", _name(vector.quantization_config or config.quantization_config)),
        ("payload", ", ".join(_payload(found)) or "no index"),
        ("strict mode", "; ".join(strict) or "allows cells"),
        ("segments", _segments(found)),
    )
    points, indexed = found.points_count or 0, found.indexed_vectors_count or 0
    obstacle = "strict mode of the collection refuses cells" if refused else ""
    if not links:
        return Construction(facts, worth_from=_WORTH_FROM, obstacle=obstacle)
    notes: tuple[str, ...] = ()
    if indexed < points:
        notes = (
            f"{points - indexed:,} of {points:,} points are in no graph yet (segments below the "
            f"indexing threshold, or still being optimised), and every search scans them.",
        )
    if indexed < points / 2:
        return Construction(facts, "scan", None, _WORTH_FROM, obstacle, notes)
    return Construction(
        facts, "graph", None, _WORTH_FROM, obstacle or ("" if on_disk else _GRAPH), notes
    )


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
