"""Ranges of ids, read by several readers from the databases themselves."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.connect import connect
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cli import main
from amips_plugins.collection import Collection, Id
from amips_plugins.export import parquet_keys
from amips_plugins.export.sharded_snapshot import take_sharded_snapshot
from amips_plugins.export.snapshot import Snapshot, take_snapshot
from tests.support.training_data import gaussian

pymilvus = pytest.importorskip("pymilvus")
parquet = pytest.importorskip("pyarrow.parquet")

N, DIM, BATCH = 300, 4, 20
KEYS = gaussian(N, DIM)
RNG = np.random.default_rng(0)
IDS: dict[str, list[Id]] = {
    "integers": [int(key) for key in RNG.choice(10**9, N, replace=False)],
    "uuids": [str(uuid.UUID(bytes=RNG.bytes(16))) for _ in range(N)],
}


@pytest.fixture
def milvus(tmp_path: Path) -> Iterator[Callable[[list[Id]], Collection]]:
    opened: list[Collection] = []

    def make(ids: list[Id]) -> Collection:
        where = str(tmp_path / "docs.db")
        client = pymilvus.MilvusClient(where)
        text = isinstance(ids[0], str)
        client.create_collection(
            "docs",
            dimension=DIM,
            id_type="string" if text else "int",
            max_length=64,
            metric_type="IP",
        )
        rows = [{"id": key, "vector": row} for key, row in zip(ids, KEYS.tolist(), strict=True)]
        client.insert("docs", rows)
        client.flush("docs")
        client.close()
        opened.append(connect(f"milvus://{where}?collection=docs"))
        return opened[-1]

    yield make
    for collection in opened:
        collection.close()


@pytest.fixture
def qdrant() -> Callable[[list[Id]], Collection]:
    def make(ids: list[Id]) -> Collection:
        client = QdrantClient(":memory:")
        about = models.VectorParams(size=DIM, distance=models.Distance.DOT)
        client.create_collection("docs", about)
        points = [
            models.PointStruct(id=key, vector=row)
            for key, row in zip(ids, KEYS.tolist(), strict=True)
        ]
        client.upsert("docs", points)
        return QdrantCollection(client, "docs")

    return make


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("database", ["milvus", "qdrant"])
@pytest.mark.slow
def test_ranges_hold_every_key_once(
    database: str,
    kind: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_keys, "ROW_GROUP", 16)
    collection: Collection = request.getfixturevalue(database)(IDS[kind])
    flat = take_snapshot(collection, tmp_path / "flat", BATCH)
    cut = take_sharded_snapshot(collection, tmp_path / "cut", 4, BATCH)
    assert cut.ids_bytes() == flat.ids_bytes()
    np.testing.assert_array_equal(cut.keys()[:], flat.vectors())
    counts = [shard.count for shard in cut.manifest.shards or []]
    assert len(counts) == 4
    assert min(counts) > N // 8


def test_the_command_takes_shards_and_parquet(
    milvus: Callable[[list[Id]], Collection],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    milvus(IDS["integers"]).close()
    uri = f"milvus://{tmp_path}/docs.db?collection=docs"

    def amips(*arguments: str) -> str:
        with suppress(SystemExit):
            main(["snapshot", uri, *arguments])
        return "".join(capsys.readouterr())

    assert "300 keys" in amips("-o", str(tmp_path / "cut"), "--shards", "2")
    cut = Snapshot.open(tmp_path / "cut")
    columns = ("--id-column", "id", "--vector-column", "vector")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for place, shard in enumerate(cut.manifest.shards or []):
        (foreign / f"{place}.parquet").write_bytes((tmp_path / "cut" / shard.file).read_bytes())
    assert "300 keys" in amips("-o", str(tmp_path / "t"), "--parquet", str(foreign), *columns)
    np.testing.assert_array_equal(Snapshot.open(tmp_path / "t").keys()[:], cut.keys()[:])
    out = ("-o", str(tmp_path / "u"), "--parquet", str(foreign))
    assert "leave them out" in amips(*out, "--shards", "2")
