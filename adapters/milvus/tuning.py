"""Trying index kinds of Milvus on a collection beside the one that is tuned."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amips_plugins.adapters.milvus.cell_index import INDEXED_FROM
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.opening import describe_index
from amips_plugins.collection import Collection, KeyBatch
from amips_plugins.errors import CollectionError
from amips_plugins.progress import Progress
from amips_plugins.tuning import (
    GRAPH_EFFORTS,
    Build,
    Knob,
    list_efforts,
    scratch_collection,
    scratch_name,
)

__all__ = ["MilvusTuning"]

_LITE_LISTS = 128
_WAIT = 1_800.0  # seconds for an index of a copy
_ROWS = 1_000
_HNSW = {"M": 16, "efConstruction": 200}


class MilvusTuning:
    """Trials on one collection (see ``tuning.Tuning``)."""

    def __init__(self, collection: MilvusCollection) -> None:
        self._collection = collection
        self._table = collection.table()

    @property
    def in_process(self) -> bool:
        """Whether it is Milvus Lite."""
        return self._table.is_lite

    @property
    def notes(self) -> Sequence[str]:
        """Say where trials are built."""
        name = scratch_name(self._table.name)
        return (
            f"Trials are built in a collection {name!r} of this database, which is loaded beside "
            f"yours, and dropped; yours is only searched.",
        )

    def as_found(self) -> Build | None:
        """Say how its index is searched; None where there is nothing to set."""
        return self._build(str(self._index.get("index_type", "")).upper(), self._index)

    @property
    def _index(self) -> Mapping[str, Any]:
        return describe_index(self._table)

    def builds(self) -> Sequence[Build]:
        """List other kinds of index; a server refuses those that it does not have."""
        if self._table.is_lite:
            kinds = ["HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8"]
        else:
            kinds = ["HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8", "IVF_RABITQ", "SCANN"]
        present = str(self._index.get("index_type", "")).upper()
        found = (self._build(kind, self._wanted(kind)) for kind in kinds if kind != present)
        return [build for build in found if build is not None]

    def _wanted(self, kind: str) -> dict[str, Any]:
        count = max(1, self._collection.count())
        if kind.startswith("HNSW"):
            return dict(_HNSW) | ({"sq_type": "SQ8"} if kind == "HNSW_SQ" else {})
        return {"nlist": _LITE_LISTS if self._table.is_lite else max(16, int(4 * count**0.5))}

    def _build(self, kind: str, index: Mapping[str, Any]) -> Build | None:
        dim, names = self._table.info.dim, ("nlist", "M", "efConstruction", "sq_type", "m", "nbits")
        options = {"index_type": kind, **{name: index[name] for name in names if name in index}}
        width = {"HNSW_SQ": 1.0, "IVF_SQ8": 1.0, "IVF_RABITQ": 1 / 8, "SCANN": 0.5}.get(kind, 4.0)
        exact = kind in ("AUTOINDEX", "HNSW", "IVF_FLAT", "SCANN", "DISKANN")
        if kind.startswith("HNSW") or (kind == "AUTOINDEX" and self._table.is_lite):
            knob = Knob("ef", GRAPH_EFFORTS)  # Lite's automatic index is a graph of the same kind
        elif kind == "DISKANN":
            knob = Knob("search_list", GRAPH_EFFORTS)
        elif kind.startswith("IVF") or kind == "SCANN":
            lists = _LITE_LISTS if self._table.is_lite else int(index.get("nlist", _LITE_LISTS))
            knob = Knob("nprobe", list_efforts(lists))
        else:
            return None
        return Build(kind, knob, width * dim, options, exact_scores=exact)

    def free_bytes(self, work: Path) -> int | None:
        """Return what the disk has left beside Milvus Lite's file; of a server nobody knows."""
        if not self._table.is_lite:
            return None
        work.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(work).free

    @contextmanager
    def scratch(
        self, build: Build, batches: Iterable[KeyBatch], count: int, work: Path, progress: Progress
    ) -> Iterator[Collection]:
        """Build a collection of these keys, which is dropped."""
        client, name = self._table.client, scratch_name(self._table.name, work)
        with scratch_collection(work, name, client.has_collection, client.drop_collection):
            self._create(name)
            with progress(f"build {build.name}", count, 0, "keys") as step:
                for batch in batches:
                    self._insert(name, batch)
                    step.advance(len(batch.ids))
            client.flush(name)
            self._index_and_load(name, build, count)
            yield MilvusCollection(client, name, self._table.info.field)

    def _create(self, name: str) -> None:
        from pymilvus import DataType

        client, table = self._table.client, self._table
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        if table.string_keys:
            key = next(one for one in table.raw["fields"] if one.get("is_primary"))
            length = int(key["params"].get("max_length", 65_535))
            schema.add_field(table.key, DataType.VARCHAR, is_primary=True, max_length=length)
        else:
            schema.add_field(table.key, DataType.INT64, is_primary=True)
        schema.add_field(table.info.field, DataType.FLOAT_VECTOR, dim=table.info.dim)
        # The collection's own: a stronger one adds what has nothing to do with the index.
        level = table.raw.get("consistency_level", "Bounded")
        client.create_collection(name, schema=schema, consistency_level=level)

    def _insert(self, name: str, batch: KeyBatch) -> None:
        table = self._table
        for low in range(0, len(batch.ids), _ROWS):
            rows = zip(batch.ids[low : low + _ROWS], batch.vectors[low : low + _ROWS], strict=True)
            table.client.insert(
                name,
                [{table.key: key, table.info.field: vector.tolist()} for key, vector in rows],
            )

    def _index_and_load(self, name: str, build: Build, count: int) -> None:
        client, table = self._table.client, self._table
        options = dict(build.options)
        kind = options.pop("index_type")
        index = client.prepare_index_params()
        index.add_index(
            field_name=table.info.field,
            index_name=table.info.field,
            index_type=kind,
            metric_type=table.info.metric.name,
            params=options,
        )
        client.create_index(name, index, timeout=_WAIT)
        client.load_collection(name)
        if table.is_lite or count < INDEXED_FROM:
            return
        deadline = time.monotonic() + _WAIT
        while sum(
            int(part.num_rows) for part in client.list_loaded_segments(name) if part.index_name
        ) < min(count, client.query(name, output_fields=["count(*)"])[0]["count(*)"]):
            if time.monotonic() > deadline:
                raise CollectionError(f"The index of {name!r} is not ready after {_WAIT:.0f} s.")
            time.sleep(0.5)

    def apply(self, build: Build, progress: Progress) -> Collection:
        """Refuse: nobody could search the collection between one index and the next."""
        del progress
        raise CollectionError(
            f"Milvus cannot be searched while one index replaces another; build {build.name} in a "
            f"copy, and move the alias."
        )

    def way_back(self, before: Build) -> str:
        """Say that there is nothing to take back."""
        return f"The index is as it was ({before.name})."
