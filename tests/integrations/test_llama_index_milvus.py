from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("llama_index.vector_stores.milvus", reason="run it by: make frameworks")

from llama_index.vector_stores.milvus import MilvusVectorStore

from amips_plugins import LearnedRouter
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.llama_index_milvus import routed
from tests.integrations import llama_index_ways as shared
from tests.integrations.congruence import Ask, Congruence, World, lay_out
from tests.integrations.corpus import DIM


class LlamaIndexMilvus:
    def __init__(self, folder: Path, storage: str | None = None) -> None:
        self.name = "docs__g2f" if storage == "field" else "docs__g2"
        self.uri = str(folder / "docs.db")
        first = self.store("docs")
        shared.fill(first)
        self.client = first.client
        self.registry = lay_out(MilvusCollection(self.client, "docs"), folder, storage)

    # The store takes no alias: it looks for its name among those of collections.
    def store(self, name: str | None = None) -> MilvusVectorStore:
        return MilvusVectorStore(
            self.uri,
            dim=DIM,
            collection_name=name or self.name,
            similarity_metric="COSINE",
            index_config={"index_type": "FLAT"},
        )

    def routed(self, router: LearnedRouter | None, **options: Any) -> MilvusVectorStore:
        return routed(self.store(), router, **options)

    def collection(self) -> MilvusCollection:
        return MilvusCollection(self.client, self.name)

    def best(self, store: Any, text: str) -> list[Any]:
        return shared.best(store, text)

    def add(self, store: Any, text: str) -> Any:
        return shared.add(store, text)

    def delete(self, store: Any, key: Any) -> None:
        store.delete_nodes([key])

    def read(self, store: Any, key: Any) -> tuple[Any, Any, Any]:
        return shared.read(store, key)

    def write_again(self, store: Any, key: Any, document: Any, text: str, title: str) -> None:
        store.upsert_mode = True
        shared.write_again(store, document, text, title)

    def router_of(self, store: Any) -> LearnedRouter:
        router: LearnedRouter = store.client.amips_router
        return router


class TestDense(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = {**shared.WAYS, **shared.MMR}

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
        made = LlamaIndexMilvus(tmp_path_factory.mktemp("li"))
        yield made
        made.client.close()


class TestCellsInAField(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = {"filter": shared.WAYS["filter"]}

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
        made = LlamaIndexMilvus(tmp_path_factory.mktemp("li"), "field")
        yield made
        made.client.close()


def test_another_store_is_refused() -> None:
    with pytest.raises(InvalidInput, match="MilvusVectorStore, but was given a object"):
        routed(object())
