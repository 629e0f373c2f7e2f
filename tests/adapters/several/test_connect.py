"""Several collections by their URIs."""

from __future__ import annotations

from pathlib import Path

import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import SeveralCollections, connect
from amips_plugins.errors import AmipsError, InvalidInput

pymilvus = pytest.importorskip("pymilvus")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two collections in one folder of Qdrant, and one of the same embedding in Milvus."""
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    for name in ("news", "docs"):
        params = models.VectorParams(size=4, distance=models.Distance.COSINE)
        client.create_collection(name, vectors_config=params)
        point = models.PointStruct(id=1, vector=[1.0, 0.0, 0.0, len(name) / 10])
        client.upsert(name, [point])
    client.close()
    milvus = pymilvus.MilvusClient(str(tmp_path / "docs.db"))
    milvus.create_collection("docs", dimension=4, metric_type="COSINE")
    milvus.insert("docs", [{"id": 1, "vector": [0.0, 1.0, 0.0, 0.0]}])
    milvus.close()
    return tmp_path


def test_several_uris_are_one_collection(folders: Path) -> None:
    local = f"qdrant://{folders}/qdrant?collection="
    uris = [f"{local}news", f"old={local}docs", f"milvus://{folders}/docs.db?collection=docs"]
    with connect(*uris, name="both") as several:
        assert isinstance(several, SeveralCollections)
        assert list(several.members) == ["qdrant/news", "old", "milvus/docs"]
        assert (several.info.name, several.count()) == ("both", 3)
    with connect(*uris) as again:  # everything was closed
        assert again.count() == 3


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["news"], "Two of the collections are called 'qdrant/news'; write NAME=URI"),
        (["nowhere"], "no collection 'nowhere'"),
    ],
)
def test_several_uris_that_do_not_go_together_leave_nothing_open(
    folders: Path, more: list[str], match: str
) -> None:
    local = f"qdrant://{folders}/qdrant?collection="
    with pytest.raises(AmipsError, match=match):
        connect(f"{local}news", *(f"{local}{name}" for name in more))
    with pytest.raises(InvalidInput, match="names no collection"):
        connect(f"{local}news", f"qdrant://{folders}/qdrant")
    connect(f"{local}news").close()
