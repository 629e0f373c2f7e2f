"""Opening Qdrant: folders, errors of the client in plain words, and the choice of a vector."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    FieldNotFound,
    MetricNotSupported,
    require,
)
from amips_plugins.vectors import Metric

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
else:
    models = require("qdrant_client.models", "qdrant")
    QdrantClient = require("qdrant_client", "qdrant").QdrantClient
    _exceptions = require("qdrant_client.http.exceptions", "qdrant")
    ResponseHandlingException = _exceptions.ResponseHandlingException
    UnexpectedResponse = _exceptions.UnexpectedResponse
grpc = require("grpc", "qdrant")

__all__ = ["METRICS", "answering", "choose_vector", "listed", "open_folder"]

METRICS = {
    models.Distance.COSINE: Metric.COSINE,
    models.Distance.DOT: Metric.IP,
    models.Distance.EUCLID: Metric.L2,
}
# Half floats come back as floats and compare as they do; the other types round the query as well.
_DATATYPES = (None, models.Datatype.FLOAT32, models.Datatype.FLOAT16)


def open_folder(folder: str) -> QdrantClient:
    """Open the local database in a folder.

    Raises
    ------
    CollectionNotFound
        There is none.
    DatabaseUnreachable
        Another process holds it.
    """
    # The client would make an empty database out of any folder.
    if not Path(folder, "meta.json").is_file():
        raise CollectionNotFound(
            f"There is no Qdrant database in folder {folder!r}; check the path, or write "
            "http://host:port for a server."
        )
    try:
        return QdrantClient(path=folder)
    except RuntimeError as exc:
        if "already accessed" not in str(exc):
            raise
        raise DatabaseUnreachable(
            f"The Qdrant database in folder {folder!r} is open elsewhere, and only one process can "
            "have it; close it there, or run a Qdrant server."
        ) from exc


@contextmanager
def answering(server: str, to: Literal["read", "write to"] = "read") -> Iterator[None]:
    """Turn "nobody is there", "not a Qdrant" and "you may not" into errors that say what to do."""
    absent = "check the address and that it is running"
    stranger = (
        f"{server} answers, but not as this version of the client expects; check that the address "
        "is Qdrant's and that qdrant-client and the server are of about the same version."
    )
    refused = f"{server} refuses access; pass an API key that may {to} the collection."
    try:
        yield
    except ResponseHandlingException as exc:
        if isinstance(exc.source, ValueError):  # JSON of another form
            raise DatabaseUnreachable(stranger) from exc
        raise DatabaseUnreachable(f"{server} does not answer ({exc.source}); {absent}.") from exc
    except json.JSONDecodeError as exc:
        raise DatabaseUnreachable(stranger) from exc
    except grpc.RpcError as exc:
        code = exc.code() if isinstance(exc, grpc.Call) else None
        if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
            raise DatabaseUnreachable(refused) from exc
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise
        raise DatabaseUnreachable(f"{server} does not answer; {absent}.") from exc
    except UnexpectedResponse as exc:
        if exc.status_code == 404:
            raise DatabaseUnreachable(stranger) from exc
        if exc.status_code not in (401, 403):
            raise
        raise DatabaseUnreachable(refused) from exc


def choose_vector(
    vectors: models.VectorParams | Mapping[str, models.VectorParams] | None,
    field: str | None,
    name: str,
) -> tuple[str, models.VectorParams]:
    """Choose the dense vector of a collection to serve, by its name or because it is the only one.

    Raises
    ------
    FieldNotFound, CollectionError, MetricNotSupported
        There is no such vector, or it cannot be served.
    """
    if isinstance(vectors, models.VectorParams):
        named: dict[str, models.VectorParams] = {"": vectors}
    else:
        named = dict(vectors or {})
    dense = sorted(key for key, params in named.items() if params.multivector_config is None)
    if field is None and len(dense) == 1:
        field = dense[0]
    if field is None or field not in named:
        wanted = "no vector was named" if field is None else f"no dense vector {field!r}"
        raise FieldNotFound(
            f"Collection {name!r}: {wanted}; its dense vectors are {listed(dense)}."
        )
    vector = named[field]
    if vector.multivector_config is not None:
        raise CollectionError(
            f"Vector {field!r} of collection {name!r} is a multivector; name a dense vector with "
            f"one embedding a point: {listed(dense)}."
        )
    if vector.datatype not in _DATATYPES:
        raise CollectionError(
            f"Vector {field!r} of collection {name!r} is stored as {vector.datatype.value}; only "
            "float32 and float16 can be served."
        )
    if vector.distance not in METRICS:
        raise MetricNotSupported(
            f"Collection {name!r} compares by {vector.distance.value}; only Cosine, Dot and Euclid "
            "can be served."
        )
    return field, vector


def listed(names: Sequence[str]) -> str:
    """Write names for a message."""
    shown = ", ".join(repr(name) for name in names[:20])
    return (shown + (", ..." if len(names) > 20 else "")) or "none"
