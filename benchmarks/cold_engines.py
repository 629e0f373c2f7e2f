"""Ways to keep keys on a disk: Qdrant Edge with codes and graphs, and cell files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from amips_plugins.adapters.cell_file.collection import CellFileCollection
from amips_plugins.adapters.cell_file.file_format import Bits
from amips_plugins.adapters.cell_file.key_ids import ids_as_array
from amips_plugins.adapters.cell_file.writing import CellFileSpec, Keys, write_cell_file
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Collection, CollectionKey, SearchRequest
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray, Metric
from benchmarks.learned import Routing

__all__ = ["FILES", "METHODS", "STORES", "Method", "SlowStore", "open_store", "prepare"]

K = 10
_BATCH = 1_000
_EDGE = ("4 bits", "2 bits", "inline", "int8", "cells")
FILES = ("file 2", "file 4")
STORES = (*_EDGE, *FILES)

Search = Callable[[FloatArray], list[Any]]


@dataclass(frozen=True)
class Method:
    """One way to search one store; the larger a setting, the more is searched.

    ``oversampling`` is of candidates scored by their vectors for every hit; of a cell file 0 is its
    own.
    """

    name: str
    store: str
    kind: Literal["graph", "scan", "routed", "sample"]
    settings: tuple[float, ...]
    oversampling: float = 0.0


_EF = (16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0)
_TARGETS = (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975, 0.98)

METHODS = (
    Method("graph, int8", "int8", "graph", _EF, 1.5),
    Method("graph, 4 bits", "4 bits", "graph", _EF, 2.0),
    Method("graph, 2 bits", "2 bits", "graph", _EF, 4.0),
    Method("graph, inline", "inline", "graph", _EF, 2.0),
    Method("scan of 2-bit codes", "cells", "scan", (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
    Method("routed exactly", "cells", "routed", _TARGETS),
    Method("routed, 2-bit codes", "cells", "routed", _TARGETS, 4.0),
    Method("cell file, 2 bits", "file 2", "routed", _TARGETS),
    Method("cell file, 2 for a hit", "file 2", "routed", _TARGETS, 2.0),
    Method("cell file, 4 bits", "file 4", "routed", _TARGETS),
    Method("sample, exactly", "cells", "sample", (0.0,)),
    Method("sample, 2-bit codes", "cells", "sample", (1.0,)),
    Method("sample, cell file", "file 2", "sample", (1.0,)),
)


class SlowStore(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine as ``slow://``: every read takes ``latency`` more seconds."""

    protocol = "slow"
    cachable = False
    latency = 0.0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Read a part."""
        time.sleep(self.latency)
        data: bytes = super().cat_file(path, start, end)
        return data


def build_edge(folder: Path, store: str, keys: FloatArray, routing: Routing) -> None:
    """Make a shard with everything but what is wanted in memory on the disk."""
    import qdrant_edge as edge

    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

    bits = edge.TurboQuantBitSize
    codes: dict[str, Any] = {
        "int8": edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8),
        "4 bits": edge.TurboQuantQuantizationConfig(bits=bits.Bits4),
        "inline": edge.TurboQuantQuantizationConfig(bits=bits.Bits4),
    }
    graph = edge.HnswIndexConfig(
        m=0 if store == "cells" else 16,
        ef_construct=100,
        full_scan_threshold=10_000,
        on_disk=True,
        inline_storage=store == "inline" or None,
    )
    vectors = edge.EdgeVectorParams(
        size=keys.shape[1],
        distance=edge.Distance.Cosine,
        on_disk=True,
        hnsw_config=graph,
        quantization_config=codes.get(store, edge.TurboQuantQuantizationConfig(bits=bits.Bits2)),
    )
    optimizers = edge.EdgeOptimizersConfig(default_segment_number=1, indexing_threshold=1000)
    shard = edge.EdgeShard.create(
        str(folder / store),
        edge.EdgeConfig(vectors={"": vectors}, on_disk_payload=True, optimizers=optimizers),
    )
    for start in range(0, len(keys), _BATCH):
        rows = range(start, min(start + _BATCH, len(keys)))
        points = [edge.Point(row, keys[row].tolist()) for row in rows]
        shard.update(edge.UpdateOperation.upsert_points(points))
    if store != "cells":
        shard.optimize()
    shard.close()
    if store == "cells":
        with QdrantEdgeCollection.connect(str(folder), store) as collection:
            spec = LayoutSpec(routing.layout, routing.n_cells, routing.assign)
            built = collection.layouts.build(spec)
            built.optimize()  # type: ignore[attr-defined]


def build(folder: Path, store: str, file: Path, routing: Routing) -> None:
    """Make a store of unit keys, with their rows as ids."""
    keys: FloatArray = np.load(file, mmap_mode="r", allow_pickle=False)
    if store in _EDGE:
        build_edge(folder, store, keys, routing)
        return
    bits: Bits = 2 if store == "file 2" else 4
    spec = CellFileSpec(
        collection=CollectionKey(database="qdrant", name="docs", field=""),
        metric=Metric.COSINE,
        dim=keys.shape[1],
        bits=bits,
        layout=routing.layout,
        n_cells=routing.n_cells,
    )
    source = Keys(ids_as_array(range(len(keys))), lambda rows: keys[rows])
    write_cell_file(folder / store, spec, source, routing.assignment)


def open_store(folder: Path, store: str, latency: float | None) -> Collection:
    """Open a store; a cell file in a simulated object store where a latency is given."""
    if store in _EDGE:
        from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

        return QdrantEdgeCollection.connect(str(folder), store)
    if latency is None:
        return CellFileCollection(folder / store)
    SlowStore.latency = latency
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    return CellFileCollection(f"slow://{folder / store}")


def prepare(collection: Collection, method: Method, setting: float, routing: Routing) -> Search:
    """Return what answers one query, ``(1, dim)``, at a setting."""
    hook = routing.hook() if method.kind == "routed" else None

    def routed(query: FloatArray) -> list[Any]:
        assert hook is not None
        plan = hook.plan(query, Target(K, setting))
        params: dict[str, Any] | None = None
        if method.name == "routed exactly":
            params = {"exact": True}
        elif method.store in FILES and method.oversampling:
            params = {"oversampling": method.oversampling}
        return collection.search(SearchRequest(query, K, params=params), plan)[0]

    if hook is not None:
        if method.name == "routed exactly":
            from dataclasses import replace

            found: Any = collection
            found._kept = replace(found._found, codes=None)
        return routed
    if method.kind == "sample":
        judge: Any = collection
        judged_by = judge.thorough if setting else judge.exact
        return lambda query: judged_by(SearchRequest(query, K))[0]
    import qdrant_edge as edge

    graph = method.kind == "graph"
    wide = edge.QuantizationSearchParams(
        rescore=True, oversampling=method.oversampling if graph else setting
    )
    params = {"quantization": wide} | ({"hnsw_ef": int(setting)} if graph else {})

    def native(query: FloatArray) -> list[Any]:
        return collection.search(SearchRequest(query, K, params=params), QueryPlan())[0]

    return native
