"""The trials that a collection's database allows."""

from __future__ import annotations

from amips_plugins.collection import Collection
from amips_plugins.errors import InvalidInput
from amips_plugins.tuning import Tuning

__all__ = ["tuning_of"]


def tuning_of(collection: Collection) -> Tuning:
    """Return what may be tried on a collection, or raise ``InvalidInput``."""
    database = collection.info.database
    if database == "milvus":
        from amips_plugins.adapters.milvus.collection import MilvusCollection
        from amips_plugins.adapters.milvus.tuning import MilvusTuning

        assert isinstance(collection, MilvusCollection)  # noqa: S101 - by its name
        return MilvusTuning(collection)
    if database == "qdrant-edge":
        from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
        from amips_plugins.adapters.qdrant_edge.tuning import EdgeTuning

        assert isinstance(collection, QdrantEdgeCollection)  # noqa: S101 - as above
        return EdgeTuning(collection)
    if database == "qdrant":
        from amips_plugins.adapters.qdrant.collection import QdrantCollection
        from amips_plugins.adapters.qdrant.tuning import QdrantTuning

        assert isinstance(collection, QdrantCollection)  # noqa: S101 - as above
        return QdrantTuning(collection)
    raise InvalidInput(f"A collection of {database} has no index, and nothing to tune.")
