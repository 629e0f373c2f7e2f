"""Trying codes of Qdrant Edge on a shard beside the collection's own.

Importing this module needs the extra ``qdrant-edge``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.code_builds import code_builds, kind_of, present_build
from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
from amips_plugins.collection import Collection, KeyBatch
from amips_plugins.errors import CollectionError, require
from amips_plugins.progress import Progress
from amips_plugins.tuning import Build, scratch_folder

if TYPE_CHECKING:
    import qdrant_edge as edge
else:
    edge = require("qdrant_edge", "qdrant-edge")

__all__ = ["EdgeTuning"]

_KNOWN = frozenset({"size", "distance", "on_disk", "hnsw_config", "quantization_config"})
_GRAPH = ("m", "ef_construct", "full_scan_threshold", "on_disk", "payload_m")
_OPTIMIZERS = ("default_segment_number", "max_segment_size", "indexing_threshold")
_BITS = {"bits1": "Bits1", "bits2": "Bits2", "bits4": "Bits4", "bits8": "Bits8"}


class EdgeTuning:
    """Trials on one shard (see ``tuning.Tuning``)."""

    in_process = True
    notes = (
        "Trials are built in shards of their own, in the folder of this command, and removed; the "
        "collection's shard is only searched.",
    )

    def __init__(self, collection: QdrantEdgeCollection) -> None:
        self._collection = collection
        self._config = collection.shard.config()

    def _vector(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._config["vectors"][self._collection.info.field]
        return found

    def _codes(self) -> Mapping[str, Any] | None:
        return self._vector().get("quantization_config") or self._config.get("quantization_config")

    def _applies(self) -> bool:
        """Whether all that the shard's vectors are can be said to the engine again."""
        vectors = self._config["vectors"].values()
        known = all(_KNOWN.issuperset(_given(one)) for one in vectors)
        return known and self._collection.shard.owned

    def as_found(self) -> Build | None:
        """Say which codes its graph is searched by; None without a graph."""
        if self._collection.describe().native != "graph":
            return None
        dim = self._collection.info.dim
        return present_build(self._codes(), dim, applies=self._applies())

    def builds(self) -> Sequence[Build]:
        """List the other codes."""
        dim = self._collection.info.dim
        return code_builds(dim, kind_of(self._codes()), applies=self._applies())

    def free_bytes(self, work: Path) -> int | None:
        """Return what the disk has left."""
        work.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(work).free

    @contextmanager
    def scratch(
        self, build: Build, batches: Iterable[KeyBatch], count: int, work: Path, progress: Progress
    ) -> Iterator[Collection]:
        """Build a shard of these keys in a folder that is removed."""
        folder, info = scratch_folder(work), self._collection.info
        vectors = {info.field: self._params(self._vector(), build)}
        config = edge.EdgeConfig(
            vectors=vectors if info.field else vectors[""], optimizers=self._optimizers()
        )
        try:
            _named(lambda: edge.EdgeShard.create(str(folder / "trial"), config)).close()
            with QdrantEdgeCollection.connect(str(folder), "trial", info.field) as copy:
                with progress(f"build {build.name}", count, 0, "keys") as step:
                    for batch in batches:
                        copy.upsert(batch.ids, batch.vectors)
                        step.advance(len(batch.ids))
                copy.optimize()
                yield copy
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def apply(self, build: Build, progress: Progress) -> Collection:
        """Open the shard with these codes, and let the engine rebuild its segments."""
        folder, info = self._collection.shard.folder, self._collection.info
        vectors = {
            name: self._params(one, build if name == info.field else None)
            for name, one in self._config["vectors"].items()
        }
        self._collection.close()
        with progress(f"rebuild with {build.name}", 1, 0, "shards") as step:
            shard = edge.EdgeShard.load(str(folder), edge.EdgeConfig(vectors=vectors))
            try:
                shard.optimize()
                shard.flush()
            finally:
                shard.close()
            step.advance()
        return QdrantEdgeCollection.connect(str(folder.parent), folder.name, info.field)

    def way_back(self, before: Build) -> str:
        """Say how to have the codes as they were."""
        return (
            f"To have the shard as it was: EdgeShard.load(folder, config) with the vectors' "
            f"quantization_config as before ({before.name}), then optimize()."
        )

    def _params(self, vector: Mapping[str, Any], build: Build | None) -> edge.EdgeVectorParams:
        graph = vector.get("hnsw_config") or self._config.get("hnsw_config")
        quantised = vector.get("quantization_config") or self._config.get("quantization_config")
        quantised = quantised if build is None else build.options
        return edge.EdgeVectorParams(
            size=int(vector["size"]),
            distance=getattr(edge.Distance, str(vector["distance"])),
            on_disk=vector.get("on_disk"),
            hnsw_config=None if graph is None else edge.HnswIndexConfig(**_some(graph, _GRAPH)),
            quantization_config=_codes(quantised),
        )

    def _optimizers(self) -> edge.EdgeOptimizersConfig:
        return edge.EdgeOptimizersConfig(**_some(self._config.get("optimizers"), _OPTIMIZERS))


def _given(options: Mapping[str, Any]) -> set[str]:
    return {name for name, value in options.items() if value is not None}


def _some(options: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    return {
        name: value
        for name, value in (options or {}).items()
        if name in names and value is not None
    }


def _codes(quantised: Mapping[str, Any] | None) -> Any:
    """Make the engine's own configuration; None without codes."""
    given = {name: options or {} for name, options in (quantised or {}).items()}
    if not given:
        return None
    ((kind, options),) = given.items()
    if kind == "scalar":
        return edge.ScalarQuantizationConfig(
            type=edge.ScalarType.Int8, quantile=options.get("quantile")
        )
    if kind == "turbo":
        bits = _BITS.get(str(options.get("bits", "bits4")))
        return edge.TurboQuantQuantizationConfig(
            bits=None if bits is None else getattr(edge.TurboQuantBitSize, bits)
        )
    if kind == "binary":
        return edge.BinaryQuantizationConfig()
    raise CollectionError(f"Qdrant Edge's codes of kind {kind!r} cannot be built anew here.")


def _named(make: Any) -> Any:
    try:
        return make()
    except Exception as exc:  # the engine knows no other class
        raise CollectionError(f"Qdrant Edge refuses it: {exc}") from exc
