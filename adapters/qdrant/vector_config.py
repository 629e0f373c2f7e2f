"""How a server keeps one vector of a collection: read from its description."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.codes import Codes, codes_of
from amips_plugins.adapters.qdrant.points import DenseVector

if TYPE_CHECKING:
    from qdrant_client import models

__all__ = ["codes_in", "described", "graph_of", "has_graph", "params_of"]


def graph_of(found: models.CollectionInfo, field: str) -> dict[str, Any]:
    """Return the HNSW configuration of one vector."""
    own = params_of(found, field).hnsw_config
    mine = {} if own is None else own.model_dump(exclude_none=True)
    return {**found.config.hnsw_config.model_dump(), **mine}


def params_of(found: models.CollectionInfo, field: str) -> models.VectorParams:
    """Return the parameters of one vector."""
    vectors = found.config.params.vectors
    one = vectors.get(field) if isinstance(vectors, dict) else vectors
    assert one is not None  # noqa: S101 - chosen among them
    return one


def has_graph(found: models.CollectionInfo, field: str) -> bool:
    """Tell whether a graph over everything has been built of some of it."""
    return bool(found.indexed_vectors_count) and bool(graph_of(found, field)["m"])


def codes_in(found: models.CollectionInfo, field: str) -> Codes | None:
    """Return how its quantised codes are searched, if it has some."""
    vector = params_of(found, field)
    quantised = vector.quantization_config or found.config.quantization_config
    return codes_of(
        None if quantised is None else quantised.model_dump(mode="json"),
        graph_of(found, field),
        vector.size,
        found.points_count or 0,
    )


def described(vector: models.VectorParams) -> DenseVector:
    """Return what the choice among vectors looks at."""
    return DenseVector(
        vector.size,
        vector.distance.value,
        None if vector.datatype is None else vector.datatype.value,
        vector.multivector_config is not None,
    )
