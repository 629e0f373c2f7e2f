"""The empty copy of a Qdrant collection that is to become its next generation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.cells import LayoutRecord, LayoutState
from amips_plugins.adapters.qdrant.failures import patiently
from amips_plugins.adapters.qdrant.generations import GENERATION_KEY, Generation
from amips_plugins.adapters.qdrant.search import index_of_cells
from amips_plugins.collection import CollectionInfo
from amips_plugins.errors import CollectionError, require
from amips_plugins.progress import Progress

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["build_graph", "copied_indexes", "create_copy"]

_NO_GRAPH = 0  # as a threshold it means that no segment is ever indexed
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
    """Create it as the source is, but for graphs, which would be built again as points come."""
    found = client.get_collection(source)
    config, params = found.config, found.config.params
    metadata = {
        key: value for key, value in (config.metadata or {}).items() if key != GENERATION_KEY
    }
    metadata |= LayoutState(serving=record).entry(info) | generation.entry()
    patiently(
        lambda: client.create_collection(
            name,
            params.vectors,
            sparse_vectors_config=params.sparse_vectors,
            shard_number=params.shard_number,
            replication_factor=params.replication_factor,
            write_consistency_factor=params.write_consistency_factor,
            on_disk_payload=params.on_disk_payload,
            hnsw_config=models.HnswConfigDiff(**config.hnsw_config.model_dump()),
            optimizers_config=models.OptimizersConfigDiff(
                **{**config.optimizer_config.model_dump(), "indexing_threshold": _NO_GRAPH}
            ),
            wal_config=_diff(models.WalConfigDiff, config.wal_config),
            quantization_config=config.quantization_config,
            metadata=metadata,
        )
    )


def _diff(kind: Any, config: Any) -> Any:
    return None if config is None else kind(**config.model_dump())


def copied_indexes(client: QdrantClient, source: str, name: str, record: LayoutRecord) -> None:
    """Create those payload indexes that the copy lacks, the one of the cells first."""
    there = set(client.get_collection(name).payload_schema)
    wanted: dict[str, Any] = {record.key: index_of_cells()}
    for key, index in client.get_collection(source).payload_schema.items():
        wanted.setdefault(key, index.params or index.data_type)
    for key, params in wanted.items():
        if key not in there:
            _create_index(client, name, key, params)


def _create_index(client: QdrantClient, name: str, key: str, params: Any) -> None:
    patiently(lambda: client.create_payload_index(name, key, params, wait=True))


def build_graph(client: QdrantClient, source: str, name: str, progress: Progress) -> None:
    """Have the server build graphs as it does of the source, and wait until it has."""
    wanted = client.get_collection(source).config.optimizer_config
    diff = models.OptimizersConfigDiff(**wanted.model_dump())
    patiently(lambda: client.update_collection(name, optimizers_config=diff))
    found = client.get_collection(name)
    total = found.points_count or 0
    moved, last, calm = time.monotonic(), -1, 0
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
                step.advance(max(0, done - max(0, last)))
                moved, last = time.monotonic(), done
            if time.monotonic() - moved > _STUCK:
                raise CollectionError(
                    f"Qdrant has not built the graph of {name!r} within the hour; look at the "
                    f"server's load, then run the same command again."
                )
            time.sleep(_LOOK)
            found = client.get_collection(name)
