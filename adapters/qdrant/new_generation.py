"""The empty copy of a Qdrant collection that is to become its next generation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.cells import LayoutRecord, LayoutState
from amips_plugins.adapters.qdrant.failures import patiently
from amips_plugins.adapters.qdrant.generations import GENERATION_KEY, Generation
from amips_plugins.adapters.qdrant.new_shards import graph_threshold, shard_options
from amips_plugins.adapters.qdrant.search import index_of_cells
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.collection import CollectionInfo
from amips_plugins.errors import CollectionError, require
from amips_plugins.progress import Progress

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["build_graph", "copied_indexes", "create_copy"]

_NO_GRAPH = 0  # as a threshold it means that no segment is ever indexed
_LEAST_SCAN = 10  # kB: the least that a server takes
_CALM = 4  # looks at a collection that is green
_LOOK = 0.5  # seconds between two looks at what the server optimises
_STUCK = 3600.0  # seconds in which nothing changed


def create_copy(
    client: QdrantClient,
    source: str,
    name: str,
    generation: Generation,
    record: LayoutRecord,
    info: CollectionInfo,
) -> None:
    """Create it as the source is, but for graphs, which would be built again as points come.

    A shard of a cell has one segment, and follows its graph however small it is.
    """
    found = client.get_collection(source)
    config, params = found.config, found.config.params
    threshold = graph_threshold(found, record, info.dim)
    one = {} if threshold is None else {"full_scan_threshold": max(_LEAST_SCAN, threshold)}
    several = {} if threshold is None else {"default_segment_number": 1}
    options = {
        "shard_number": params.shard_number,
        "wal_config": _diff(models.WalConfigDiff, config.wal_config),
        **shard_options(record),
    }
    metadata = {
        key: value for key, value in (config.metadata or {}).items() if key != GENERATION_KEY
    }
    metadata |= LayoutState(serving=record).entry(info) | generation.entry()
    patiently(
        lambda: client.create_collection(
            name,
            _scanned_from(params.vectors, threshold),
            sparse_vectors_config=params.sparse_vectors,
            replication_factor=params.replication_factor,
            write_consistency_factor=params.write_consistency_factor,
            on_disk_payload=params.on_disk_payload,
            hnsw_config=models.HnswConfigDiff(**{**config.hnsw_config.model_dump(), **one}),
            optimizers_config=models.OptimizersConfigDiff(
                **{
                    **config.optimizer_config.model_dump(),
                    **several,
                    "indexing_threshold": _NO_GRAPH,
                }
            ),
            quantization_config=config.quantization_config,
            metadata=metadata,
            **options,
        )
    )


def _scanned_from(vectors: Any, threshold: int | None) -> Any:
    """Return vectors' parameters; what one of them says of its graph itself goes by this, too."""
    if threshold is None or vectors is None:
        return vectors
    if isinstance(vectors, dict):
        return {name: _scanned_from(one, threshold) for name, one in vectors.items()}
    own = vectors.hnsw_config
    if own is None or own.full_scan_threshold is None:
        return vectors
    update = {"full_scan_threshold": max(_LEAST_SCAN, min(threshold, own.full_scan_threshold))}
    return vectors.model_copy(update={"hnsw_config": own.model_copy(update=update)})


def _diff(kind: Any, config: Any) -> Any:
    return None if config is None else kind(**config.model_dump())


def copied_indexes(client: QdrantClient, source: str, name: str, record: LayoutRecord) -> None:
    """Create those payload indexes that the copy lacks, the one of the cells first."""
    there = set(client.get_collection(name).payload_schema)
    wanted: dict[str, Any] = {record.key: index_of_cells()}
    found = client.get_collection(source)
    if record.places and Limits(found.config.strict_mode_config).needs_index:
        integers = models.PayloadSchemaType.INTEGER
        wanted |= {key: integers for key in (record.stamp_key, record.copies_key) if key}
    for key, index in found.payload_schema.items():
        wanted.setdefault(key, index.params or index.data_type)
    for key, params in wanted.items():
        if key not in there:
            _create_index(client, name, key, params)


def _create_index(client: QdrantClient, name: str, key: str, params: Any) -> None:
    patiently(lambda: client.create_payload_index(name, key, params, wait=True))


def build_graph(
    client: QdrantClient,
    source: str,
    name: str,
    progress: Progress,
    *,
    record: LayoutRecord,
    dim: int,
) -> None:
    """Have the server build graphs as it does of the source, and wait until it has."""
    there = client.get_collection(source)
    wanted, threshold = (
        there.config.optimizer_config.model_dump(),
        graph_threshold(there, record, dim),
    )
    if threshold is not None:
        wanted |= {"indexing_threshold": threshold, "default_segment_number": 1}
    diff = models.OptimizersConfigDiff(**wanted)
    patiently(lambda: client.update_collection(name, optimizers_config=diff))
    found = client.get_collection(name)
    total = found.points_count or 0
    moved, last, calm, most = time.monotonic(), -1, 0, 0
    with progress("graph", total, 0, "keys") as step:
        # It takes the server a moment to see that there is something to do.
        while (calm := calm + 1 if found.status is models.CollectionStatus.GREEN else 0) < _CALM:
            if found.status is models.CollectionStatus.RED:
                raise CollectionError(
                    f"Qdrant cannot optimise {name!r} ({found.optimizer_status}); look at the "
                    f"server's log and its disk, then run the same command again."
                )
            done = min(total, found.indexed_vectors_count or 0)
            if done != last:
                step.advance(max(0, done - most))  # segments that are merged lose their graphs
                moved, last, most = time.monotonic(), done, max(most, done)
            if time.monotonic() - moved > _STUCK:
                raise CollectionError(
                    f"Qdrant has not built the graph of {name!r} within the hour; look at the "
                    f"server's load, then run the same command again."
                )
            time.sleep(_LOOK)
            found = client.get_collection(name)
