"""Trying codes of a Qdrant server on a collection beside the one that is tuned."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.code_builds import code_builds, kind_of, present_build
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection import Collection, KeyBatch
from amips_plugins.errors import CollectionError, require
from amips_plugins.progress import Progress
from amips_plugins.tuning import Build, scratch_collection, scratch_name

if TYPE_CHECKING:
    from qdrant_client import models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["QdrantTuning"]

_WAIT = 3_600.0  # seconds for graph and codes
_LOOK = 1.0
_STILL = 3  # looks that find it at rest: an optimiser may start a moment after a write
_POINTS = 256


class QdrantTuning:
    """Trials on one collection of a server (see ``tuning.Tuning``)."""

    in_process = False

    def __init__(self, collection: QdrantCollection) -> None:
        self._collection = collection
        self._client = collection.client

    @property
    def notes(self) -> Sequence[str]:
        """Say where trials are built."""
        name = scratch_name(self._collection.info.name)
        return (
            f"Trials are built in a collection {name!r} of this server, which takes its memory and "
            f"CPU, and deleted; yours is only searched.",
        )

    def _vector(self) -> tuple[models.CollectionInfo, models.VectorParams]:
        found = self._client.get_collection(self._collection.info.name)
        vectors = found.config.params.vectors
        field = self._collection.info.field
        one = vectors.get(field) if isinstance(vectors, dict) else vectors
        assert one is not None  # noqa: S101 - it is served
        return found, one

    def as_found(self) -> Build | None:
        """Say which codes its graph is searched by; None without a graph."""
        if self._collection.describe().native != "graph":
            return None
        return present_build(self._present(), self._collection.info.dim, applies=True)

    def _present(self) -> dict[str, Any] | None:
        found, vector = self._vector()
        quantised = vector.quantization_config or found.config.quantization_config
        return None if quantised is None else quantised.model_dump(mode="json", exclude_none=True)

    def builds(self) -> Sequence[Build]:
        """List the other codes."""
        found, vector = self._vector()
        builds = code_builds(self._collection.info.dim, kind_of(self._present()), applies=True)
        if vector.quantization_config is not None or found.config.quantization_config is None:
            return builds
        # Codes of the whole collection cannot be put off for one of its vectors.
        return [replace(one, applies=one.applies and bool(one.options)) for one in builds]

    def free_bytes(self, work: Path) -> int | None:  # noqa: ARG002 - it is the server's disk
        """Return None: a server does not say."""
        return None

    @contextmanager
    def scratch(
        self, build: Build, batches: Iterable[KeyBatch], count: int, work: Path, progress: Progress
    ) -> Iterator[Collection]:
        """Build a collection of these keys, which is deleted."""
        client, field = self._client, self._collection.info.field
        name = scratch_name(self._collection.info.name, work)
        with scratch_collection(work, name, client.collection_exists, client.delete_collection):
            found, vector = self._vector()
            params = vector.model_copy(update={"quantization_config": _config(build)})
            optimizers = found.config.optimizer_config.model_dump(exclude_none=True)
            client.create_collection(
                name,
                vectors_config={field: params} if field else params,
                shard_number=found.config.params.shard_number,
                hnsw_config=models.HnswConfigDiff(
                    **found.config.hnsw_config.model_dump(exclude_none=True)
                ),
                optimizers_config=models.OptimizersConfigDiff(**optimizers),
            )
            with progress(f"build {build.name}", count, 0, "keys") as step:
                for batch in batches:
                    self._write(name, batch)
                    step.advance(len(batch.ids))
            self._settle(name)
            yield QdrantCollection(client, name, field)

    def _write(self, name: str, batch: KeyBatch) -> None:
        field = self._collection.info.field
        for low in range(0, len(batch.ids), _POINTS):
            rows = batch.vectors[low : low + _POINTS].tolist()
            points = [
                models.PointStruct(id=key, vector={field: row} if field else row, payload={})
                for key, row in zip(batch.ids[low : low + _POINTS], rows, strict=True)
            ]
            self._client.upsert(name, points, wait=True)

    def _settle(self, name: str) -> None:
        """Wait until the optimisers have nothing left to do."""
        deadline, still = time.monotonic() + _WAIT, 0
        while still < _STILL:
            if time.monotonic() > deadline:
                raise CollectionError(f"{name!r} is still being optimised after {_WAIT:.0f} s.")
            green = self._client.get_collection(name).status == models.CollectionStatus.GREEN
            still = still + 1 if green else 0
            time.sleep(_LOOK)

    def apply(self, build: Build, progress: Progress) -> Collection:
        """Have the server code the vectors, and wait until it has."""
        name, field = self._collection.info.name, self._collection.info.field
        config = _config(build) or models.Disabled.DISABLED
        with progress(f"rebuild with {build.name}", 1, 0, "collections") as step:
            diff = models.VectorParamsDiff(quantization_config=config)
            self._client.update_collection(name, vectors_config={field: diff})
            self._settle(name)
            step.advance()
        return self._collection.current()

    def way_back(self, before: Build) -> str:
        """Say how to have the codes as they were."""
        name, field = self._collection.info.name, self._collection.info.field
        config = _config(before)
        spelled = "models.Disabled.DISABLED"
        if config is not None:
            spelled = f"models.{type(config).__name__}(**{dict(before.options)!r})"
        return (
            f"To have the codes as they were: client.update_collection({name!r}, vectors_config="
            f"{{{field!r}: models.VectorParamsDiff(quantization_config={spelled})}})."
        )


def _config(build: Build) -> Any:
    """Make the server's own configuration; None without codes."""
    ((kind, options),) = build.options.items() or [("", {})]
    if kind == "scalar":
        return models.ScalarQuantization(scalar=models.ScalarQuantizationConfig(**options))
    if kind == "binary":
        return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(**options))
    if kind == "turbo":
        return models.TurboQuantization(turbo=models.TurboQuantQuantizationConfig(**options))
    if kind == "product":
        return models.ProductQuantization(product=models.ProductQuantizationConfig(**options))
    return None
