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
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.haystack_milvus import routed
from tests.integrations.congruence import Ask, Congruence, Found, World, lay_out
from tests.integrations.corpus import embed
from tests.integrations.haystack_ways import GROUP, TEXT, added, filled, found, read, write_again


def retrieved(store: Any, **more: Any) -> Found:
    retriever = MilvusEmbeddingRetriever(store, **more)
    return found(retriever.run(query_embedding=embed(TEXT))["documents"])


def piped(store: Any) -> Found:
    pipeline = Pipeline()
    pipeline.add_component("retriever", MilvusEmbeddingRetriever(store, top_k=4))
    answer = pipeline.run({"retriever": {"query_embedding": embed(TEXT)}})
    return found(answer["retriever"]["documents"])


class HaystackMilvus:
    def __init__(self, folder: Path, storage: str | None = None) -> None:
        self.uri = str(folder / "docs.db")
        first = self.build("first")
        first.write_documents(filled())
        self.client = first.client
        self.client.create_alias("first", "docs")
        self.registry = lay_out(MilvusCollection(self.client, "docs"), folder, storage)

    def build(self, name: str) -> Any:
        return MilvusDocumentStore(
            collection_name=name,
            connection_args={"uri": self.uri},
            index_params={"index_type": "FLAT", "metric_type": "COSINE"},
        )

    def store(self) -> Any:
        return self.build("docs")

    def routed(self, router: LearnedRouter | None, **options: Any) -> Any:
        return routed(self.build("docs"), router, **options)

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

    def read(self, store: Any, key: Any) -> tuple[Any, Any, Any]:
        return read(store, key)

    def write_again(self, store: Any, key: Any, document: Any, text: str, title: str) -> None:
        write_again(store, document, text, title)

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


class TestCellsInAField(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = {"filter": TestDense.ways["filter"]}

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> World:
        return HaystackMilvus(tmp_path_factory.mktemp("hs"), "field")


def test_it_is_saved_as_the_store_it_was(tmp_path: Path) -> None:
    store = MilvusDocumentStore(connection_args={"uri": str(tmp_path / "docs.db")})
    before = store.to_dict()
    assert routed(store).to_dict() == before


def test_what_it_cannot_be_given(tmp_path: Path) -> None:
    store = MilvusDocumentStore(connection_args={"uri": str(tmp_path / "docs.db")})
    with pytest.raises(InvalidInput, match="recall=7"):
        routed(store, recall=7)
    with pytest.raises(InvalidInput, match="MilvusDocumentStore, but was given a object"):
        routed(object())
    with pytest.raises(TypeError, match="no_such"):
        routed(store, no_such=1)
