"""Shard keys for the cells of a copy: whether there can be any, how small, and on which nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.cell_shards import group_cells
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.failures import patiently, said
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.errors import require

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = [
    "SHARD_BYTES",
    "create_shard_keys",
    "fans_out",
    "graph_threshold",
    "no_shards",
    "planned_record",
    "shard_options",
]

SHARD_BYTES = 12 << 20
"""What a shard keeps on disk beside its points, with the smallest log of writes."""

_WAL_MB = 1  # a shard maps several logs of this size whatever is in them; the default is 32
_SMALLEST = 10  # kB of vectors that are worth a graph
_GRAPHS_FROM = 4  # cells of a fourth of the mean size have a graph
_FANS_OUT = 8  # shards from which on asking few of them pays (docs/performance.md)
_PATIENCE = 60  # seconds for one shard key, which all nodes have to agree to


def planned_record(spec: LayoutSpec) -> LayoutRecord:
    """Return what the metadata of a copy are to say."""
    places: tuple[int, ...] = ()
    if spec.storage == "shards":
        places = group_cells(spec.n_cells, spec.sizes, spec.centroids)
    return LayoutRecord(spec.layout, spec.version, spec.n_cells, shared=spec.shared, places=places)


def peers(client: QdrantClient) -> list[int] | None:
    """Return the nodes of a cluster; None where the server is not in cluster mode, or will not say.

    One node may be a cluster, too.
    """
    try:
        found: Any = client.cluster_status()
    except Exception:  # noqa: BLE001 - such as a key that may not look: then it may create none
        return None
    named = getattr(found, "peers", None)
    return sorted(int(one) for one in named) if named else None


def _answering(client: QdrantClient, nodes: list[int]) -> list[int]:
    """Return those of the nodes that take messages."""
    found: Any = client.cluster_status()
    failing = {uri.rstrip("/") for uri in getattr(found, "message_send_failures", None) or ()}
    uris = {int(one): getattr(peer, "uri", "") for one, peer in found.peers.items()}
    return [one for one in nodes if uris.get(one, "").rstrip("/") not in failing]


def no_shards(client: QdrantClient) -> str | None:
    """Say why a copy can have no shard keys, or None."""
    if peers(client) is None:
        return (
            "shard keys take a server in cluster mode (cluster.enabled; one node will do), and "
            "a key that may see the cluster"
        )
    return None


def fans_out(client: QdrantClient, name: str) -> bool:
    """Tell whether a search asks so many shards that asking few of them pays."""
    params = client.get_collection(name).config.params
    if params.sharding_method is models.ShardingMethod.CUSTOM:
        return len(client.list_shard_keys(name).shard_keys or ()) >= _FANS_OUT
    return (params.shard_number or 1) >= _FANS_OUT


def graph_threshold(found: models.CollectionInfo, record: LayoutRecord, width: int) -> int | None:
    """Return from how many kB on vectors get a graph, so that nearly every cell has one.

    ``width`` is the dimension. None is as it is in the collection ``found``.
    """
    wanted = found.config.optimizer_config.indexing_threshold
    if not record.places or not wanted:
        return None
    mean = (found.points_count or 0) * width * 4 / 1024 / len(record.shard_keys)
    return min(max(_SMALLEST, int(mean / _GRAPHS_FROM)), wanted)


def shard_options(record: LayoutRecord) -> dict[str, Any]:
    """Return what else a collection is created with to have shard keys."""
    if not record.places:
        return {}
    return {
        "sharding_method": models.ShardingMethod.CUSTOM,
        "shard_number": 1,
        "wal_config": models.WalConfigDiff(wal_capacity_mb=_WAL_MB, wal_segments_ahead=0),
    }


def create_shard_keys(client: QdrantClient, name: str, record: LayoutRecord) -> None:
    """Create those shard keys that are missing.

    Neighbouring cells, which are searched together, lie on different nodes.
    """
    if not record.places:
        return
    found = patiently(lambda: client.list_shard_keys(name)).shard_keys or ()
    there = {one.key for one in found}
    nodes = peers(client) or []
    replicas = client.get_collection(name).config.params.replication_factor or 1
    for number, key in enumerate((*record.shard_keys, record.overflow_shard)):
        if key in there:
            continue
        answering = _answering(client, nodes) if nodes else []
        if len(answering) >= replicas:  # the server would wait a minute for one that is away
            nodes = answering
        chosen = [nodes[(number + one) % len(nodes)] for one in range(min(replicas, len(nodes)))]
        _create(client, name, key, chosen or None)


def _create(client: QdrantClient, name: str, key: str, placement: list[int] | None) -> None:
    def create() -> None:
        try:
            client.create_shard_key(name, key, placement=placement, timeout=_PATIENCE)
        except Exception as exc:
            if "already exists" not in said(exc):  # a try before came through
                raise

    patiently(create)
