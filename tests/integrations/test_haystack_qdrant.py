from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("haystack_integrations.document_stores.qdrant", reason="make frameworks")

from haystack import Pipeline
from haystack.dataclasses import SparseEmbedding
from haystack.utils import Secret
from haystack_integrations.components.retrievers.qdrant import (
    QdrantEmbeddingRetriever,
    QdrantHybridRetriever,
)
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore
from qdrant_client import AsyncQdrantClient, QdrantClient, models

from amips_plugins import LearnedRouter
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.haystack_qdrant import routed
from integration_tests.servers import QdrantAddress
from tests.integrations.congruence import Ask, Congruence, Found, World, lay_out
from tests.integrations.corpus import DIM, embed
from tests.integrations.haystack_ways import GROUP, TEXT, added, filled, found, read, write_again
from tests.support.proxy_data import Rewrite

# A store's own client compares its version with the server's, in a thread of its own.
VERSIONS = pytest.mark.filterwarnings("ignore:Qdrant client version:UserWarning")
UNTOLD = pytest.mark.filterwarnings("ignore:Failed to obtain server version:UserWarning")
HERE: dict[str, Any] = {"location": ":memory:", "index": "docs", "embedding_dim": DIM}


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
        self.store().write_documents(self.documents())
        self.registry = lay_out(self.collection(), folder)
        inner: Any = self.client._client
        ainner: Any = self.aclient._client
        ainner.collections = inner.collections

    def documents(self) -> list[Any]:
        if not self.more.get("use_sparse_embeddings"):
            return filled()
        lengths = [sorted({len(word) for word in (d.content or "").split()}) for d in filled()]
        words = [SparseEmbedding(found, [1.0] * len(found)) for found in lengths]
        return [replace(d, sparse_embedding=w) for d, w in zip(filled(), words, strict=True)]

    def store(self) -> Any:
        return self.opened(QdrantDocumentStore(**self.more))

    def routed(self, router: LearnedRouter | None, **options: Any) -> Any:
        return self.opened(routed(QdrantDocumentStore(**self.more), router, **options))

    def opened(self, store: Any) -> Any:
        """Open the store's clients, as its methods would."""
        initialise_async = store._initialize_async_client

        async def initialise() -> None:  # a client belongs to the loop that first uses it
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qdrant_client.AsyncQdrantClient", lambda **_: self.aclient)
                await initialise_async()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qdrant_client.QdrantClient", lambda **_: self.client)
            store._initialize_client()
        store._initialize_async_client = initialise
        return store

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

    def read(self, store: Any, key: Any) -> tuple[Any, Any, Any]:
        return read(store, key)

    def write_again(self, store: Any, key: Any, document: Any, text: str, title: str) -> None:
        write_again(store, document, text, title)

    def router_of(self, store: Any) -> LearnedRouter:
        if store._client.amips_router is None:
            self.best(store, TEXT)  # it is made with the first search
        router: LearnedRouter = store._client.amips_router
        return router


class OnAServer(HaystackQdrant):
    """The same with stores whose clients are their own."""

    def __init__(self, folder: Path, address: QdrantAddress, **more: Any) -> None:
        self.client = address.client()
        token = Secret.from_token(address.token) if address.token else None
        index = f"docs_{uuid.uuid4().hex[:8]}"
        self.more = {"url": address.url, "api_key": token, "index": index, "embedding_dim": DIM}
        self.more |= more
        self.store().write_documents(self.documents())
        self.registry = lay_out(self.collection(), folder)

    def opened(self, store: Any) -> Any:
        store._initialize_client()
        return store

    def collection(self) -> QdrantCollection:
        return QdrantCollection(self.client, str(self.more["index"]))


def on_a_server(folder: Path, address: QdrantAddress, **more: Any) -> Iterator[OnAServer]:
    made = OnAServer(folder, address, **more)
    yield made
    made.client.delete_collection(str(made.more["index"]))
    made.client.close()


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


@VERSIONS
@UNTOLD
class TestDenseOnAServer(TestDense):
    @pytest.fixture(scope="class")
    @classmethod
    def world(
        cls, tmp_path_factory: pytest.TempPathFactory, qdrant_server: QdrantAddress
    ) -> Iterator[World]:
        yield from on_a_server(tmp_path_factory.mktemp("hs"), qdrant_server)


@VERSIONS
@UNTOLD
class TestHybridOnAServer(TestHybrid):
    tied = frozenset({"hybrid"})

    @pytest.fixture(scope="class")
    @classmethod
    def world(
        cls, tmp_path_factory: pytest.TempPathFactory, qdrant_server: QdrantAddress
    ) -> Iterator[World]:
        folder = tmp_path_factory.mktemp("hs")
        yield from on_a_server(folder, qdrant_server, use_sparse_embeddings=True)


def test_it_opens_its_clients_as_late_as_before() -> None:
    store = routed(QdrantDocumentStore(url="http://localhost:1"), registry="nowhere", recall=0.8)
    assert store._client is None
    assert store._async_client is None


def test_it_is_saved_as_the_store_it_was() -> None:
    store = routed(QdrantDocumentStore(**HERE))
    pipeline = Pipeline()
    pipeline.add_component("retriever", QdrantEmbeddingRetriever(store))
    loaded = Pipeline.loads(pipeline.dumps()).get_component("retriever")._document_store
    assert loaded.to_dict() == QdrantDocumentStore(**HERE).to_dict()


def test_a_closed_store_is_routed_when_it_opens_again() -> None:
    store = routed(QdrantDocumentStore(**HERE), hook=Rewrite(), refresh=None)
    for _ in range(2):
        store.write_documents([added("one"), replace(added("two"), id="second")])
        retriever = QdrantEmbeddingRetriever(store, top_k=2)
        assert len(retriever.run(query_embedding=embed("one"))["documents"]) == 2
        assert isinstance(store._client.amips_router, LearnedRouter)
        store.close()


def test_what_it_cannot_be_given() -> None:
    client = QdrantClient(":memory:")
    client.create_collection("docs", models.VectorParams(size=2, distance=models.Distance.DOT))
    router = LearnedRouter(QdrantCollection(client, "docs"), hook=Rewrite())
    store = QdrantDocumentStore(**HERE)
    with pytest.raises(InvalidInput, match="pass one of the two"):
        routed(store, router, registry="models")
    with pytest.raises(InvalidInput, match="recall=7"):
        routed(store, recall=7)
    with pytest.raises(InvalidInput, match="QdrantDocumentStore, but was given a object"):
        routed(object())
    with pytest.raises(TypeError, match="no_such"):
        routed(store, no_such=1)
