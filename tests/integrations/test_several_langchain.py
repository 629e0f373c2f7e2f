"""LangChain's retriever over several stores."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_qdrant", reason="run it by: make frameworks")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient, models

from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.langchain import RoutedRetriever
from tests.integrations.corpus import DIM, embed
from tests.integrations.several_ways import (
    NAMES,
    QUESTIONS,
    check_recall,
    publish,
    texts_of,
    truth,
)


class Hashed(Embeddings):
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [embed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return embed(text)


def on_qdrant(name: str) -> QdrantVectorStore:
    client = QdrantClient(":memory:")
    params = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    client.create_collection(name, vectors_config=params)
    return QdrantVectorStore(client=client, collection_name=name, embedding=Hashed())


def on_milvus(name: str, folder: Path) -> Any:
    langchain_milvus = pytest.importorskip("langchain_milvus")
    return langchain_milvus.Milvus(
        Hashed(),
        collection_name=name,
        connection_args={"uri": str(folder / "docs.db")},
        index_params={"index_type": "FLAT", "metric_type": "COSINE"},
    )


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()  # one for all calls: clients belong to theirs
    yield made
    made.close()


@pytest.fixture(scope="module", params=["qdrant", "both"])
def stores(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stores")
    made: dict[str, Any] = {}
    for place, name in enumerate(NAMES):
        on_other = request.param == "both" and place % 2
        store = on_milvus(name, folder) if on_other else on_qdrant(name)
        documents = [Document(page_content=text, metadata=m) for _, text, m in texts_of(name)]
        ids: list[Any] = [row for row, _, _ in texts_of(name)]
        store.add_documents(documents, ids=[str(row) for row in ids] if on_other else ids)
        made[name] = store
    return made


def known(documents: list[Document]) -> list[tuple[str, object]]:
    return [(doc.metadata["amips_collection"], doc.metadata["row"]) for doc in documents]


def test_it_asks_the_stores_that_hold_the_answer(
    stores: dict[str, Any], loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    every = RoutedRetriever.over(stores, registry=tmp_path)
    assert isinstance(every, BaseRetriever)
    for question in QUESTIONS[:5]:
        assert known(every.invoke(question)) == truth(question, 10)
        assert known(loop.run_until_complete(every.ainvoke(question))) == truth(question, 10)
    registry = publish(every.router.collection, tmp_path / "run")
    retriever = RoutedRetriever.over(stores, registry=registry, refresh=None)
    seen: list[Any] = []
    retriever.router.observe(seen.append)
    answers = [known(retriever.invoke(question)) for question in QUESTIONS]
    later = [
        known(loop.run_until_complete(retriever.ainvoke(question))) for question in QUESTIONS[:10]
    ]
    check_recall(answers, 10)
    assert later == answers[:10]
    assert sum(one.probes for one in seen) < 0.9 * len(NAMES) * len(seen)
    assert retriever.router.fallbacks.keys() <= {"cells: fewer than k hits"}


def test_a_filter_is_the_stores_own(stores: dict[str, Any], tmp_path: Path) -> None:
    field = models.FieldCondition(key="metadata.group", match=models.MatchValue(value=1))
    by_name = {
        name: models.Filter(must=[field]) if isinstance(store, QdrantVectorStore) else "group == 1"
        for name, store in stores.items()
    }
    retriever = RoutedRetriever.over(stores, filter=by_name, k=5, registry=tmp_path)
    found = retriever.invoke(QUESTIONS[0])
    assert len(found) == 5
    assert {doc.metadata["group"] for doc in found} == {1}


def test_bad_input_is_one_sentence(stores: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no store of this framework; pass a QdrantVectorStore"):
        RoutedRetriever.over({"a": object()})
    with pytest.raises(InvalidInput, match="a mapping that names them"):
        RoutedRetriever.over({})
    with pytest.raises(InvalidInput, match="below 1"):
        RoutedRetriever.over(stores, recall=1.0, registry=tmp_path).invoke("x")
