"""Trying index kinds of Milvus on a collection beside the one that is tuned."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from amips_plugins.adapters.milvus.cell_index import INDEXED_FROM
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.describe import MANY_GRAPHS
from amips_plugins.adapters.milvus.opening import describe_index
from amips_plugins.collection import Collection, KeyBatch
from amips_plugins.errors import CollectionError
from amips_plugins.progress import Progress
from amips_plugins.tuning import (
    GRAPH_EFFORTS,
    NO_KNOB,
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
_REORDERED = 200  # candidates of SCANN: with as many as there are hits, few of those are the best
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
        where = (
            f"Trials are built in a collection {name!r} of this database, which is loaded beside "
            f"yours, and dropped; yours is only searched."
        )
        pieces = self._pieces
        if pieces < MANY_GRAPHS:
            return (where,)
        return where, f"It has as few segments as Milvus makes of it, where yours has {pieces}."

    @property
    def _pieces(self) -> int:
        """Count the indexed segments, all of which a search asks."""
        if self._table.is_lite:
            return 1
        loaded = self._table.client.list_loaded_segments(self._table.name)
        return sum(bool(part.index_name) for part in loaded)

    def as_found(self) -> Build | None:
        """Say how its index is searched; None where there is none that we know."""
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
        others = [build for build in found if build is not None]
        same = self.as_found()
        if same is not None and same.knob.efforts and self._pieces >= MANY_GRAPHS:
            others.insert(0, replace(same, name=f"{present}, fewer segments", merges=True))
        return others

    def _wanted(self, kind: str) -> dict[str, Any]:
        count = max(1, self._collection.count())
        if kind.startswith("HNSW"):
            return dict(_HNSW) | ({"sq_type": "SQ8"} if kind == "HNSW_SQ" else {})
        return {"nlist": _LITE_LISTS if self._table.is_lite else max(16, int(4 * count**0.5))}

    def _build(self, kind: str, index: Mapping[str, Any]) -> Build | None:
        dim, names = self._table.info.dim, ("nlist", "M", "efConstruction", "sq_type", "m", "nbits")
        options = {"index_type": kind, **{name: index[name] for name in names if name in index}}
        width = {"HNSW_SQ": 1.0, "IVF_SQ8": 1.0, "IVF_RABITQ": 1 / 8, "SCANN": 0.5}.get(kind, 4.0)
        exact = kind in ("AUTOINDEX", "FLAT", "HNSW", "IVF_FLAT", "SCANN", "DISKANN")
        if kind.startswith("HNSW") or kind == "AUTOINDEX":  # which is such a graph, too
            knob = Knob("ef", GRAPH_EFFORTS)
        elif kind == "DISKANN":
            knob = Knob("search_list", GRAPH_EFFORTS)
        elif kind == "FLAT":
            knob = NO_KNOB
        elif kind.startswith("IVF") or kind == "SCANN":
            lists = _LITE_LISTS if self._table.is_lite else int(index.get("nlist", _LITE_LISTS))
            knob = Knob("nprobe", list_efforts(lists), reorder_k=_REORDERED * (kind == "SCANN"))
        else:
            return None
        applies = self._table.is_lite  # which nobody else has open meanwhile
        return Build(kind, knob, width * dim, options, applies, exact_scores=exact)

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
            self._check(name, build)
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

    def _check(self, name: str, build: Build) -> None:
        """Have a server refuse an index that it does not have before anything is written."""
        if self._table.is_lite:
            return
        with _unlogged():
            self._table.client.create_index(name, self._params(build), timeout=_WAIT)
        self._table.client.drop_index(name, self._table.info.field)

    def _index_and_load(self, name: str, build: Build, count: int) -> None:
        client = self._table.client
        with _unlogged():
            client.create_index(name, self._params(build), timeout=_WAIT)
        client.load_collection(name)
        if self._table.is_lite or count < INDEXED_FROM or build.knob == NO_KNOB:
            return  # of FLAT there is nothing to build, and no segment says that it has it
        deadline = time.monotonic() + _WAIT
        while sum(
            int(part.num_rows) for part in client.list_loaded_segments(name) if part.index_name
        ) < min(count, client.query(name, output_fields=["count(*)"])[0]["count(*)"]):
            if time.monotonic() > deadline:
                raise CollectionError(f"The index of {name!r} is not ready after {_WAIT:.0f} s.")
            time.sleep(0.5)

    def _params(self, build: Build) -> Any:
        options = dict(build.options)
        index = self._table.client.prepare_index_params()
        index.add_index(
            field_name=self._table.info.field,
            index_name=self._table.info.field,
            index_type=options.pop("index_type"),
            metric_type=self._table.info.metric.name,
            params=options,
        )
        return index

    def apply(self, build: Build, progress: Progress) -> Collection:
        """Have Milvus Lite build this index in place of the other; a server refuses.

        Nobody could search a server's collection between one index and the next; Milvus Lite's is
        this process's alone. What fails or is interrupted has the old index built again.
        """
        client, name, before = self._table.client, self._table.name, self.as_found()
        if not self._table.is_lite or before is None:
            raise CollectionError(
                f"Milvus cannot be searched while one index replaces another; build {build.name} "
                f"in a copy, and move the alias."
            )
        with progress(f"rebuild with {build.name}", 1, 0, "collections") as step:
            try:
                self._replace_index(build)
            except BaseException:
                with _undisturbed():
                    self._replace_index(before)
                raise
            step.advance()
        return MilvusCollection(client, name, self._table.info.field)

    def _replace_index(self, build: Build) -> None:
        client, name, field = self._table.client, self._table.name, self._table.info.field
        client.release_collection(name)
        for index in client.list_indexes(name, field_name=field):
            client.drop_index(name, index)
        client.create_index(name, self._params(build))
        client.load_collection(name)

    def way_back(self, before: Build) -> str:
        """Say how to have the index as it was."""
        if not self._table.is_lite:
            return f"The index is as it was ({before.name})."
        name, field = self._table.name, self._table.info.field
        options = dict(before.options)
        return (
            f"To have the index as it was: release_collection({name!r}), drop_index({name!r}, "
            f"{field!r}), then create_index with index_type={options.pop('index_type')!r}, "
            f"metric_type={self._table.info.metric.name!r} and params={options!r}, and "
            f"load_collection({name!r})."
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C wait for nothing: what is done here ends in an error anyway."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep pymilvus from writing the traceback of what a server refuses, which is answer enough."""
    logger = logging.getLogger("pymilvus.decorators")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
