"""Learned query routing for the vector database you already run.

>>> from amips_plugins import LearnedRouter, connect
>>> collection = connect("milvus:///path/docs.db?collection=docs")  # doctest: +SKIP
>>> LearnedRouter(collection).search(query, k=10)  # doctest: +SKIP

What is public imports from here, and docs/api.md lists it. Importing the package loads neither a
model runtime nor a database client: a name's module is loaded when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from amips_plugins.errors import (
    AmipsError,
    BundleCorrupt,
    BundleError,
    BundleMismatch,
    BundleNotFound,
    BundleUnsigned,
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
    MissingExtra,
    SnapshotError,
    TrainingError,
)

if TYPE_CHECKING:
    from amips_plugins.adapters.cell_file.collection import CellFileCollection
    from amips_plugins.adapters.connect import connect
    from amips_plugins.adapters.memory import MemoryCollection
    from amips_plugins.adapters.milvus.collection import MilvusCollection
    from amips_plugins.adapters.qdrant.collection import QdrantCollection
    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
    from amips_plugins.adapters.several.collection import SeveralCollections
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.cell_layout import LayoutSpec
    from amips_plugins.collection import (
        AsyncCollection,
        Collection,
        CollectionInfo,
        CollectionKey,
        Hit,
        KeyBatch,
        SearchRequest,
        collection_key,
    )
    from amips_plugins.evaluation import Measurement, evaluate
    from amips_plugins.export.snapshot import Snapshot, take_snapshot
    from amips_plugins.export.train import TrainOptions, train
    from amips_plugins.health.gate import Health
    from amips_plugins.health.monitor import HealthMonitor
    from amips_plugins.health.status_file import StatusFile
    from amips_plugins.layout import backfill, lay_out, plan_layout
    from amips_plugins.observe.metrics import RouterMetrics
    from amips_plugins.observe.query_log import QueryLog
    from amips_plugins.observe.tracing import SearchSpans
    from amips_plugins.partitions import Partitions
    from amips_plugins.plan import PreQueryHook, QueryPlan, Target
    from amips_plugins.proxies import route
    from amips_plugins.routing.async_router import AsyncLearnedRouter
    from amips_plugins.routing.hits import Hits, Trace
    from amips_plugins.routing.router import LearnedRouter
    from amips_plugins.vectors import Metric

_HOMES = {
    "adapters.cell_file.collection": "CellFileCollection",
    "adapters.connect": "connect",
    "adapters.memory": "MemoryCollection",
    "adapters.milvus.collection": "MilvusCollection",
    "adapters.qdrant.collection": "QdrantCollection",
    "adapters.qdrant_edge.collection": "QdrantEdgeCollection",
    "adapters.several.collection": "SeveralCollections",
    "bundle.registry": "Registry",
    "cell_layout": "LayoutSpec",
    "collection": "AsyncCollection Collection CollectionInfo CollectionKey Hit KeyBatch "
    "SearchRequest collection_key",
    "evaluation": "Measurement evaluate",
    "export.snapshot": "Snapshot take_snapshot",
    "export.train": "TrainOptions train",
    "health.gate": "Health",
    "health.monitor": "HealthMonitor",
    "health.status_file": "StatusFile",
    "layout": "backfill lay_out plan_layout",
    "observe.metrics": "RouterMetrics",
    "observe.query_log": "QueryLog",
    "observe.tracing": "SearchSpans",
    "partitions": "Partitions",
    "plan": "PreQueryHook QueryPlan Target",
    "proxies": "route",
    "routing.async_router": "AsyncLearnedRouter",
    "routing.hits": "Hits Trace",
    "routing.router": "LearnedRouter",
    "vectors": "Metric",
}

__all__ = [
    "AmipsError",
    "AsyncCollection",
    "AsyncLearnedRouter",
    "BundleCorrupt",
    "BundleError",
    "BundleMismatch",
    "BundleNotFound",
    "BundleUnsigned",
    "CellFileCollection",
    "Collection",
    "CollectionError",
    "CollectionInfo",
    "CollectionKey",
    "CollectionNotFound",
    "DatabaseUnreachable",
    "FieldNotFound",
    "Health",
    "HealthMonitor",
    "Hit",
    "Hits",
    "InvalidInput",
    "KeyBatch",
    "LayoutSpec",
    "LearnedRouter",
    "Measurement",
    "MemoryCollection",
    "Metric",
    "MetricNotSupported",
    "MilvusCollection",
    "MissingExtra",
    "Partitions",
    "PreQueryHook",
    "QdrantCollection",
    "QdrantEdgeCollection",
    "QueryLog",
    "QueryPlan",
    "Registry",
    "RouterMetrics",
    "SearchRequest",
    "SearchSpans",
    "SeveralCollections",
    "Snapshot",
    "SnapshotError",
    "StatusFile",
    "Target",
    "Trace",
    "TrainOptions",
    "TrainingError",
    "backfill",
    "collection_key",
    "connect",
    "evaluate",
    "lay_out",
    "plan_layout",
    "route",
    "take_snapshot",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
