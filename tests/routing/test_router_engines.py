"""The life of a router's cells on real engines: layout, writes, retraining, rollback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, MilvusCollection, QdrantCollection, Registry
from amips_plugins.bundle.contents import CELLS
from amips_plugins.collection import Collection, collection_key
from amips_plugins.layout import backfill, lay_out
from amips_plugins.models.cells import Cells
from amips_plugins.routing.serving import serving_bundle
from amips_plugins.vectors import FloatArray
from tests.support.bundles import COUNT, DIM, N_CELLS, open_bundle, vectors, write_bundle

Write = Callable[[list[int], FloatArray], object]
NEW = vectors(seed=8, count=4)
N_PROBES = N_CELLS // 3  # fewer than a scan of everything takes over for


def renamed(files: dict[str, bytes]) -> None:
    """The same cells for the same model, under another identifier."""
    cells = Cells.from_bytes(files[CELLS])
    files[CELLS] = Cells(cells.centroids, cells.offsets + 1, cells.sizes).to_bytes()


def milvus(folder: Path) -> Iterator[tuple[Collection, Write]]:
    """Behind an alias, which a layout moves."""
    client = MilvusClient(str(folder / "docs.db"))
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection("docs", schema=schema, index_params=index)

    def write(ids: list[int], keys: FloatArray) -> None:
        rows = [{"id": key, "vector": row.tolist()} for key, row in zip(ids, keys, strict=True)]
        client.upsert("live", rows)

    client.create_alias("docs", "live")
    write(list(range(COUNT)), vectors())
    yield MilvusCollection(client, "live"), write
    client.close()


def qdrant(_: Path) -> Iterator[tuple[Collection, Write]]:
    client = QdrantClient(":memory:")
    params = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=params)

    def write(ids: list[int], keys: FloatArray) -> None:
        client.upsert(
            "docs",
            [
                models.PointStruct(id=key, vector=row.tolist())
                for key, row in zip(ids, keys, strict=True)
            ],
        )

    write(list(range(COUNT)), vectors())
    yield QdrantCollection(client, "docs"), write
    client.close()


@pytest.fixture(params=[milvus, qdrant], ids=["milvus-lite", "qdrant-local"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Collection, Write]]:
    yield from request.param(tmp_path)


def found(router: LearnedRouter, queries: FloatArray, mode: str, version: str) -> list[Any]:
    """The best key of each query, and how it was found."""
    answers = router.search(queries, k=1, n_probes=N_PROBES)
    assert {hits.trace.mode for hits in answers} == {mode}
    assert {hits.trace.version for hits in answers} == {version}
    return [hits[0].id for hits in answers]


@pytest.mark.slow
def test_the_life_of_a_routers_cells(opened: tuple[Collection, Write], tmp_path: Path) -> None:
    collection, write = opened
    key = collection_key(collection.info)
    registry = Registry(tmp_path / "registry")
    first = write_bundle(tmp_path / "v1", collection=key)
    registry.publish(first)
    router = LearnedRouter(collection, registry=registry, refresh=None)
    assert found(router, vectors(), "native", "v1") == list(range(COUNT))

    lay_out(collection, open_bundle(first), work=tmp_path / "work")
    assert found(router, vectors(), "native", "v1") == list(range(COUNT))  # not looked yet
    assert router.refresh()
    routed = found(router, vectors(), "route", "v1")
    assert np.mean([a == b for a, b in enumerate(routed)]) > 0.8

    router.upsert([1000, 1001], NEW[:2])
    assert router.overflow_share() == 0.0
    write([1002, 1003], NEW[2:])  # by somebody who knows nothing of cells
    assert router.overflow_share() == pytest.approx(2 / (COUNT + 4))
    assert found(router, NEW, "route", "v1")[2:] == [1002, 1003]
    live = router.collection.current()
    assert backfill(live, serving_bundle(live, registry)) == 2
    assert router.overflow_share() == 0.0
    router.delete([1003])
    routed = found(router, vectors(), "route", "v1")

    second = write_bundle(tmp_path / "v2", version="v2", collection=key, change=renamed)
    registry.publish(second)
    router.refresh()
    assert found(router, vectors(), "route", "v1") == routed
    laid_out = lay_out(router.collection, open_bundle(second), work=tmp_path / "work")
    assert found(router, vectors(), "route", "v1") == routed  # the cells from before still serve
    router.upsert([1002], NEW[2])  # to what serves now, which the router looks up for it
    assert found(router, vectors(), "route", "v2") == routed
    assert laid_out.count() == COUNT + 3
    assert router.overflow_share() == 0.0

    router.collection.layouts.roll_back()
    assert router.refresh()
    assert found(router, vectors(), "route", "v1") == routed
    assert router.collection.count() == COUNT + 3
    assert set(router.fallbacks) == {"cells: not laid out"}
