from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("llama_index.vector_stores.qdrant", reason="run it by: make frameworks")

from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import AsyncQdrantClient, QdrantClient

from amips_plugins import LearnedRouter
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.llama_index_qdrant import routed
from integration_tests.servers import QdrantAddress
from tests.integrations import llama_index_ways as shared
from tests.integrations.congruence import Ask, Congruence, World, lay_out
from tests.support.proxy_data import Rewrite


def words(texts: list[str]) -> tuple[list[list[int]], list[list[float]]]:
    """A sparse embedding: which lengths of words there are."""
    indices = [sorted({len(word) for word in text.split()}) for text in texts]
    return indices, [[1.0] * len(found) for found in indices]


class LlamaIndexQdrant:
    def __init__(self, folder: Path, address: QdrantAddress | None = None, **more: Any) -> None:
        self.client = QdrantClient(":memory:") if address is None else address.client()
        self.aclient = AsyncQdrantClient(":memory:") if address is None else address.async_client()
        self.name = f"docs_{uuid.uuid4().hex[:8]}"
        self.more = more
        shared.fill(self.store())
        self.registry = lay_out(self.collection(), folder)
        if address is None:
            inner: Any = self.client._client
            ainner: Any = self.aclient._client
            ainner.collections = inner.collections

    def store(self) -> QdrantVectorStore:
        return QdrantVectorStore(
            collection_name=self.name, client=self.client, aclient=self.aclient, **self.more
        )

    def routed(self, router: LearnedRouter | None, **options: Any) -> QdrantVectorStore:
        return routed(self.store(), router, **options)

    def collection(self) -> QdrantCollection:
        return QdrantCollection(self.client, self.name)

    def best(self, store: Any, text: str) -> list[Any]:
        return shared.best(store, text)

    def add(self, store: Any, text: str) -> Any:
        return shared.add(store, text)

    def delete(self, store: Any, key: Any) -> None:
        store.delete_nodes([key])

    def read(self, store: Any, key: Any) -> tuple[Any, Any, Any]:
        return shared.read(store, key)

    def write_again(self, store: Any, key: Any, document: Any, text: str, title: str) -> None:
        shared.write_again(store, document, text, title)

    def router_of(self, store: Any) -> LearnedRouter:
        router: LearnedRouter = store.client.amips_router
        return router


SPARSE: dict[str, Any] = {
    "enable_hybrid": True,
    "sparse_doc_fn": words,
    "sparse_query_fn": words,
}


def on_a_server(folder: Path, address: QdrantAddress, **more: Any) -> Iterator[LlamaIndexQdrant]:
    made = LlamaIndexQdrant(folder, address, **more)
    yield made
    made.client.delete_collection(made.name)
    made.client.close()


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
class TestDense(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = shared.WAYS

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> World:
        return LlamaIndexQdrant(tmp_path_factory.mktemp("li"))


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
class TestHybrid(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = {**shared.WAYS, **shared.HYBRID}
    unrouted = frozenset(shared.HYBRID)

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> World:
        return LlamaIndexQdrant(tmp_path_factory.mktemp("li"), **SPARSE)


class TestDenseOnAServer(TestDense):
    @pytest.fixture(scope="class")
    @classmethod
    def world(
        cls, tmp_path_factory: pytest.TempPathFactory, qdrant_server: QdrantAddress
    ) -> Iterator[World]:
        yield from on_a_server(tmp_path_factory.mktemp("li"), qdrant_server)


class TestHybridOnAServer(TestHybrid):
    tied = frozenset(shared.HYBRID)

    @pytest.fixture(scope="class")
    @classmethod
    def world(
        cls, tmp_path_factory: pytest.TempPathFactory, qdrant_server: QdrantAddress
    ) -> Iterator[World]:
        yield from on_a_server(tmp_path_factory.mktemp("li"), qdrant_server, **SPARSE)


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
def test_a_store_that_comes_before_its_collection() -> None:
    client = QdrantClient(":memory:")
    store = routed(QdrantVectorStore("docs", client=client), hook=Rewrite(), refresh=None)
    assert store.client.amips_router is None
    shared.fill(store)
    assert shared.best(store, "a folder") == shared.best(
        QdrantVectorStore("docs", client=client), "a folder"
    )
    proxy: Any = store.client
    assert proxy.amips_router.learned


def test_an_asynchronous_client_alone_takes_a_router() -> None:
    store = QdrantVectorStore("docs", aclient=AsyncQdrantClient(":memory:"))
    with pytest.raises(InvalidInput, match="pass a router"):
        routed(store)


def test_another_store_is_refused() -> None:
    with pytest.raises(InvalidInput, match="QdrantVectorStore, but was given a object"):
        routed(object())
