"""Learned query routing for the vector database you already run.

>>> from amips_plugins import LearnedRouter, connect
>>> collection = connect("milvus:///path/docs.db?collection=docs")  # doctest: +SKIP
>>> LearnedRouter(collection).search(query, k=10)  # doctest: +SKIP

Importing the package loads neither a model runtime nor a database client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amips_plugins.adapters.connect import connect
    from amips_plugins.adapters.memory import MemoryCollection
    from amips_plugins.adapters.milvus.collection import MilvusCollection
    from amips_plugins.adapters.qdrant.collection import QdrantCollection
    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.errors import AmipsError
    from amips_plugins.plan import PreQueryHook, QueryPlan, Target
    from amips_plugins.proxies import route
    from amips_plugins.routing.async_router import AsyncLearnedRouter
    from amips_plugins.routing.router import Hits, LearnedRouter
    from amips_plugins.vectors import Metric

_HOMES = {
    "AmipsError": "errors",
    "AsyncLearnedRouter": "routing.async_router",
    "Hits": "routing.router",
    "LearnedRouter": "routing.router",
    "MemoryCollection": "adapters.memory",
    "Metric": "vectors",
    "MilvusCollection": "adapters.milvus.collection",
    "PreQueryHook": "plan",
    "QdrantCollection": "adapters.qdrant.collection",
    "QdrantEdgeCollection": "adapters.qdrant_edge.collection",
    "QueryPlan": "plan",
    "Registry": "bundle.registry",
    "Target": "plan",
    "connect": "adapters.connect",
    "route": "proxies",
}

__all__ = [
    "AmipsError",
    "AsyncLearnedRouter",
    "Hits",
    "LearnedRouter",
    "MemoryCollection",
    "Metric",
    "MilvusCollection",
    "PreQueryHook",
    "QdrantCollection",
    "QdrantEdgeCollection",
    "QueryPlan",
    "Registry",
    "Target",
    "connect",
    "route",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that importing the package stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
