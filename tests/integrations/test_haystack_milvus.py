from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("milvus_haystack", reason="run it by: make frameworks")

from haystack import Pipeline
from milvus_haystack import MilvusDocumentStore
from milvus_haystack.milvus_embedding_retriever import MilvusEmbeddingRetriever

from amips_plugins import LearnedRouter
from amips_plugins.adapters.milvus import MilvusCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.haystack_milvus import RoutedMilvusDocumentStore
from tests.integrations.congruence import Ask, Congruence, Found, World, lay_out
from tests.integrations.corpus import embed
from tests.integrations.haystack_ways import GROUP, TEXT, added, filled, found


def retrieved(store: Any, **more: Any) -> Found:
    retriever = MilvusEmbeddingRetriever(store, **more)
    return found(retriever.run(query_embedding=embed(TEXT))["documents"])


def piped(store: Any) -> Found:
    pipeline = Pipeline()
    pipeline.add_component("retriever", MilvusEmbeddingRetriever(store, top_k=4))
    answer = pipeline.run({"retriever": {"query_embedding": embed(TEXT)}})
    return found(answer["retriever"]["documents"])


class HaystackMilvus:
    def __init__(self, folder: Path) -> None:
        self.uri = str(folder / "docs.db")
        first = self.build(MilvusDocumentStore, "first")
        first.write_documents(filled())
        self.client = first.client
        self.client.create_alias("first", "docs")
        self.registry = lay_out(MilvusCollection(self.client, "docs"), folder)

    def build(self, kind: Any, name: str, **more: Any) -> Any:
        return kind(
            collection_name=name,
            connection_args={"uri": self.uri},
            index_params={"index_type": "FLAT", "metric_type": "COSINE"},
            **more,
        )

    def store(self) -> Any:
        return self.build(MilvusDocumentStore, "docs")

    def routed(self, router: LearnedRouter | None, **options: Any) -> Any:
        return self.build(RoutedMilvusDocumentStore, "docs", router=router, **options)

    def collection(self) -> MilvusCollection:
        return MilvusCollection(self.client, "docs")

    def best(self, store: Any, text: str) -> list[Any]:
        retriever = MilvusEmbeddingRetriever(store, top_k=10)
        return [doc.id for doc in retriever.run(query_embedding=embed(text))["documents"]]

    def add(self, store: Any, text: str) -> Any:
        doc = added(text)
        store.write_documents([doc])
        return doc.id

    def delete(self, store: Any, key: Any) -> None:
        store.delete_documents([key])

    def router_of(self, store: Any) -> LearnedRouter:
        router: LearnedRouter = store.client.amips_router
        return router


class TestDense(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = {
        "retriever": retrieved,
        "retriever of k": lambda s: retrieved(s, top_k=7),
        "filter": lambda s: retrieved(s, top_k=7, filters=GROUP),
        "pipeline": piped,
    }

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> World:
        return HaystackMilvus(tmp_path_factory.mktemp("hs"))


def test_it_is_saved_with_its_pipeline(tmp_path: Path) -> None:
    uri = str(tmp_path / "docs.db")
    store = RoutedMilvusDocumentStore(connection_args={"uri": uri}, registry="models", recall=0.8)
    pipeline = Pipeline()
    pipeline.add_component("retriever", MilvusEmbeddingRetriever(store))
    loaded = Pipeline.loads(pipeline.dumps()).get_component("retriever").document_store
    assert isinstance(loaded, RoutedMilvusDocumentStore)
    assert loaded.to_dict() == store.to_dict()
    assert (loaded.registry, loaded.recall) == ("models", 0.8)


def test_what_it_cannot_be_given(tmp_path: Path) -> None:
    uri = str(tmp_path / "docs.db")
    with pytest.raises(InvalidInput, match="recall=7"):
        RoutedMilvusDocumentStore(connection_args={"uri": uri}, recall=7)
