from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("haystack_integrations.document_stores.qdrant", reason="make frameworks")

from haystack import Pipeline
from haystack.dataclasses import SparseEmbedding
from haystack_integrations.components.retrievers.qdrant import (
    QdrantEmbeddingRetriever,
    QdrantHybridRetriever,
)
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore
from qdrant_client import AsyncQdrantClient, QdrantClient

from amips_plugins import LearnedRouter
from amips_plugins.adapters.qdrant import QdrantCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.haystack_qdrant import RoutedQdrantDocumentStore
from tests.integrations.congruence import Ask, Congruence, Found, World, lay_out
from tests.integrations.corpus import DIM, embed
from tests.integrations.haystack_ways import GROUP, TEXT, added, filled, found
from tests.proxies.data import Rewrite

HERE = {"location": ":memory:", "index": "docs", "embedding_dim": DIM}


def retrieved(store: Any, **more: Any) -> Found:
    retriever = QdrantEmbeddingRetriever(store, **more)
    return found(retriever.run(query_embedding=embed(TEXT))["documents"])


async def later(store: Any) -> Found:
    retriever = QdrantEmbeddingRetriever(store, filters=GROUP, top_k=6)
    return found((await retriever.run_async(query_embedding=embed(TEXT)))["documents"])


def piped(store: Any) -> Found:
    pipeline = Pipeline()
    pipeline.add_component("retriever", QdrantEmbeddingRetriever(store, top_k=4))
    answer = pipeline.run({"retriever": {"query_embedding": embed(TEXT)}})
    return found(answer["retriever"]["documents"])


def hybrid(store: Any) -> Found:
    words = SparseEmbedding(indices=[2, 4, 5], values=[1.0, 1.0, 1.0])
    answer = QdrantHybridRetriever(store, top_k=5).run(
        query_embedding=embed(TEXT), query_sparse_embedding=words
    )
    return found(answer["documents"])


WAYS: dict[str, Ask] = {
    "retriever": retrieved,
    "retriever of k": lambda s: retrieved(s, top_k=7, return_embedding=True),
    "filter": lambda s: retrieved(s, top_k=7, filters=GROUP),
    "threshold": lambda s: retrieved(s, score_threshold=0.3, scale_score=True),
    "groups": lambda s: retrieved(s, group_by="meta.group", group_size=2, top_k=3),
    "pipeline": piped,
    "asynchronous": later,
}


class HaystackQdrant:
    """Stores build their own clients, so here they find those of one database."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.client = QdrantClient(":memory:")
        self.aclient = AsyncQdrantClient(":memory:")
        self.more = {**HERE, **more}
        first = self.build(QdrantDocumentStore)
        first.write_documents(self.documents())
        self.registry = lay_out(self.collection(), folder)
        inner: Any = self.client._client
        ainner: Any = self.aclient._client
        ainner.collections = inner.collections

    def documents(self) -> list[Any]:
        docs = filled()
        if self.more.get("use_sparse_embeddings"):
            for doc in docs:
                lengths = sorted({len(word) for word in (doc.content or "").split()})
                doc.sparse_embedding = SparseEmbedding(lengths, [1.0] * len(lengths))
        return docs

    def build(self, kind: Any, **more: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qdrant_client.QdrantClient", lambda **_: self.client)
            patch.setattr("qdrant_client.AsyncQdrantClient", lambda **_: self.aclient)
            store = kind(**self.more, **more)
            store._initialize_client()
        aclient = self.aclient

        def mine() -> dict[str, Any]:
            return {"location": ":memory:"}

        store._prepare_client_params = mine
        original = store._initialize_async_client

        async def initialise() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qdrant_client.AsyncQdrantClient", lambda **_: aclient)
                await original()

        store._initialize_async_client = initialise
        return store

    def store(self) -> Any:
        return self.build(QdrantDocumentStore)

    def routed(self, router: LearnedRouter | None, **options: Any) -> Any:
        return self.build(RoutedQdrantDocumentStore, router=router, **options)

    def collection(self) -> QdrantCollection:
        return QdrantCollection(self.client, "docs")

    def best(self, store: Any, text: str) -> list[Any]:
        retriever = QdrantEmbeddingRetriever(store, top_k=10)
        return [doc.id for doc in retriever.run(query_embedding=embed(text))["documents"]]

    def add(self, store: Any, text: str) -> Any:
        doc = added(text)
        store.write_documents([doc])
        return doc.id

    def delete(self, store: Any, key: Any) -> None:
        store.delete_documents([key])

    def router_of(self, store: Any) -> LearnedRouter:
        self.best(store, TEXT) if store._client.amips_router is None else None
        router: LearnedRouter = store._client.amips_router
        return router


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
class TestDense(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = WAYS
    unrouted = frozenset({"groups"})

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> World:
        return HaystackQdrant(tmp_path_factory.mktemp("hs"))


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
class TestHybrid(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = {"hybrid": hybrid, "filter": WAYS["filter"]}
    unrouted = frozenset({"hybrid"})

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> World:
        return HaystackQdrant(tmp_path_factory.mktemp("hs"), use_sparse_embeddings=True)


def test_building_it_opens_nothing() -> None:
    store = RoutedQdrantDocumentStore(url="http://localhost:1", registry="nowhere", recall=0.8)
    assert store._client is None


def test_it_is_saved_with_its_pipeline() -> None:
    store = RoutedQdrantDocumentStore(**HERE, registry="models", recall=0.8)
    pipeline = Pipeline()
    pipeline.add_component("retriever", QdrantEmbeddingRetriever(store))
    loaded = Pipeline.loads(pipeline.dumps()).get_component("retriever")._document_store
    assert isinstance(loaded, RoutedQdrantDocumentStore)
    assert loaded.to_dict() == store.to_dict()
    assert (loaded.index, loaded.registry, loaded.recall) == ("docs", "models", 0.8)


def test_a_store_with_a_router_cannot_be_saved() -> None:
    client = QdrantClient(":memory:")
    router = LearnedRouter(_some(client), hook=Rewrite())
    store = RoutedQdrantDocumentStore(**HERE, router=router)
    with pytest.raises(InvalidInput, match="cannot be saved"):
        store.to_dict()
    with pytest.raises(InvalidInput, match="not both"):
        RoutedQdrantDocumentStore(**HERE, router=router, registry="models")
    with pytest.raises(InvalidInput, match="recall=7"):
        RoutedQdrantDocumentStore(**HERE, recall=7)


def _some(client: QdrantClient) -> QdrantCollection:
    from qdrant_client import models

    client.create_collection("docs", models.VectorParams(size=2, distance=models.Distance.DOT))
    return QdrantCollection(client, "docs")
