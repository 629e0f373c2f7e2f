"""Ids, vectors and payloads of Qdrant's points, whichever engine holds them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cells import CelledKeys, LayoutRecord
from amips_plugins.collection import CollectionInfo, Id, KeyBatch, check_keys
from amips_plugins.errors import CollectionError, FieldNotFound, InvalidInput, MetricNotSupported
from amips_plugins.sketch import sketch
from amips_plugins.vectors import FloatArray, IntArray, Metric

__all__ = [
    "RESERVED",
    "DenseVector",
    "as_ids",
    "celled_keys",
    "choose_vector",
    "key_batch",
    "listed",
    "payloads",
    "plain_id",
    "refuse_other_vectors",
    "unroutable",
]

RESERVED = "amips_"
"""What every payload key of ours begins with; no user sees or writes one."""

_METRICS = {"Cosine": Metric.COSINE, "Dot": Metric.IP, "Euclid": Metric.L2}
# Half floats come back as floats and compare as they do; the other types round the query as well.
_DATATYPES = (None, "float32", "float16")


_MEANT = {
    "exact": "it asks for an exact search",
    "indexed_only": "it leaves out what is in no graph yet, where cells are searched exactly",
}


@dataclass(frozen=True, slots=True)
class DenseVector:
    """How a collection keeps one of its vectors, in the words of Qdrant's configuration."""

    size: int
    distance: str
    datatype: str | None = None
    multi: bool = False

    @property
    def metric(self) -> Metric:
        """How it compares."""
        return _METRICS[self.distance]


def choose_vector(
    named: Mapping[str, DenseVector], field: str | None, name: str
) -> tuple[str, DenseVector]:
    """Choose the vector to serve: by its name, the unnamed one, or the only one.

    Raises ``FieldNotFound``, ``CollectionError`` or ``MetricNotSupported`` where none can be
    served.
    """
    dense = sorted(key for key, vector in named.items() if not vector.multi)
    if field is None and ("" in dense or len(dense) == 1):
        field = dense[0]
    if field is None or field not in named:
        wanted = "no vector was named" if field is None else f"no dense vector {field!r}"
        raise FieldNotFound(
            f"Collection {name!r}: {wanted}; its dense vectors are {listed(dense)}."
        )
    vector = named[field]
    if vector.multi:
        raise CollectionError(
            f"Vector {field!r} of collection {name!r} is a multivector; name a dense vector with "
            f"one embedding a point: {listed(dense)}."
        )
    if vector.datatype not in _DATATYPES:
        raise CollectionError(
            f"Vector {field!r} of collection {name!r} is stored as {vector.datatype}; only "
            "float32 and float16 can be served."
        )
    if vector.distance not in _METRICS:
        raise MetricNotSupported(
            f"Collection {name!r} compares by {vector.distance}; only Cosine, Dot and Euclid "
            "can be served."
        )
    return field, vector


def as_ids(ids: Sequence[Id]) -> list[Any]:
    """Check ids, among them ``uuid.UUID`` objects, and write them as Qdrant answers them."""
    return [_as_id(one) for one in ids]


def _as_id(one: Any) -> Id:
    if isinstance(one, (int, np.integer)) and not isinstance(one, bool) and 0 <= one < 2**64:
        return int(one)
    if isinstance(one, uuid.UUID):
        return str(one)
    if isinstance(one, str):
        try:
            return str(uuid.UUID(one))
        except ValueError:
            pass  # refused below, with the others
    raise InvalidInput(
        f"{one!r} cannot be an id in Qdrant; use whole numbers from 0 to 2^64 - 1, or UUIDs."
    )


def plain_id(found: Any) -> Id:
    """Return an id of an answer; the client's types allow uuid.UUID, answers hold int or str."""
    return found if isinstance(found, int) else str(found)


def key_batch(records: Sequence[Any], field: str) -> KeyBatch | None:
    """Return those of the records that have the vector, or None where none has."""
    ids: list[Id] = []
    vectors: list[Any] = []
    for record in records:
        vector: Any = record.vector
        if isinstance(vector, dict):
            vector = vector.get(field)
        if vector is not None:
            ids.append(plain_id(record.id))
            vectors.append(vector)
    return KeyBatch(ids, np.array(vectors, dtype=np.float32), ids[-1]) if ids else None


def celled_keys(records: Sequence[Any], field: str, record: LayoutRecord) -> CelledKeys | None:
    """Return those of the records that have the vector, with what lies beside it."""
    keys = key_batch(records, field)
    if keys is None:
        return None
    found = {plain_id(one.id): one.payload or {} for one in records}
    beside = [found[one].get(record.sketch_key) for one in keys.ids]
    sketches = [one if type(one) is int and -(2**31) <= one < 2**31 else None for one in beside]
    return CelledKeys(keys, [found[one].get(record.key) for one in keys.ids], sketches)


def refuse_other_vectors(info: CollectionInfo, vectors: Sequence[str]) -> None:
    """Refuse to write one of several vectors: the point would lose the others."""
    if len(vectors) > 1:
        raise InvalidInput(
            f"Points of collection {info.name!r} have the vectors {listed(vectors)}, and writing "
            "one would lose the others; write them with Qdrant itself, and let backfill give "
            "them cells."
        )


def payloads(
    info: CollectionInfo,
    record: LayoutRecord | None,
    ids: Sequence[Id],
    vectors: FloatArray,
    fields: Sequence[Mapping[str, Any]] | None,
    cells: IntArray | None,
) -> list[dict[str, Any]]:
    """Check keys (see ``Collection.upsert``) and return what lies beside each vector.

    A key that gets no cell says so: a server may keep the cell of the point before otherwise.
    """
    layout = None if record is None else record.layout
    shared = record is not None and record.shared
    check_keys(info.dim, layout, ids, vectors, fields, cells, shared=shared)
    written = [
        {key: value for key, value in one.items() if not key.startswith(RESERVED)}
        for one in fields or [{}] * len(ids)
    ]
    if record is None:
        return written
    if cells is None:
        cells = np.full(len(ids), OVERFLOW, dtype=np.int64)
    if len(cells) and not (cells.min() >= OVERFLOW and cells.max() < record.n_cells):
        raise InvalidInput(
            f"The cells are from {cells.min()} to {cells.max()}; the collection has 0 to "
            f"{record.n_cells - 1}, and -1 for none."
        )
    beside = sketch(vectors, info.metric).tolist()
    for payload, cell, one in zip(written, record.stored(cells), beside, strict=True):
        payload.update(record.beside(cell, one))
    return written


def unroutable(params: Mapping[str, Any] | None) -> str | None:
    """Say which search parameter a plan would change the meaning of."""
    for name, reason in _MEANT.items():
        if (params or {}).get(name):
            return f"{name}: {reason}"
    return None


def listed(names: Sequence[str]) -> str:
    """Write names for a message."""
    shown = ", ".join(repr(name) for name in names[:20])
    return (shown + (", ..." if len(names) > 20 else "")) or "none"
