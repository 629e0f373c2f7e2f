"""LlamaIndex' retriever over several vector stores."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_index.vector_stores.qdrant", reason="run it by: make frameworks")

from llama_index.core.embeddings import MockEmbedding
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.llama_index import RoutedRetriever
from tests.integrations.corpus import DIM, embed
from tests.integrations.several_ways import (
    NAMES,
    QUESTIONS,
    check_recall,
    publish,
    texts_of,
    truth,
)


class Hashed(MockEmbedding):
    def _get_query_embedding(self, query: str) -> list[float]:
        return embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed(query)


def on_milvus(name: str, folder: Path) -> Any:
    milvus = pytest.importorskip("llama_index.vector_stores.milvus")
    return milvus.MilvusVectorStore(
        str(folder / "docs.db"), collection_name=name, dim=DIM, similarity_metric="COSINE"
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
        if request.param == "both" and place % 2:
            store = on_milvus(name, folder)
        else:
            store = QdrantVectorStore(collection_name=name, client=QdrantClient(":memory:"))
        store.add(
            [
                TextNode(text=text, metadata=m, embedding=embed(text))
                for _, text, m in texts_of(name)
            ]
        )
        made[name] = store
    return made


def known(nodes: list[NodeWithScore]) -> list[tuple[str, object]]:
    scores = [node.score for node in nodes]
    assert scores == sorted(scores, reverse=True)
    return [(node.metadata["amips_collection"], node.metadata["row"]) for node in nodes]


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
def test_it_asks_the_stores_that_hold_the_answer(
    stores: dict[str, Any], loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    model = Hashed(embed_dim=DIM)
    every = RoutedRetriever(stores, embed_model=model, registry=tmp_path)
    assert isinstance(every, BaseRetriever)
    for question in QUESTIONS[:5]:
        assert known(every.retrieve(question)) == truth(question, 10)
        assert known(loop.run_until_complete(every.aretrieve(question))) == truth(question, 10)
    registry = publish(every.router.collection, tmp_path / "run")
    retriever = RoutedRetriever(stores, embed_model=model, registry=registry, refresh=None)
    seen: list[Any] = []
    retriever.router.observe(seen.append)
    answers = [known(retriever.retrieve(question)) for question in QUESTIONS]
    check_recall(answers, 10)
    given = QueryBundle("", embedding=embed(QUESTIONS[0]))
    assert known(retriever.retrieve(given)) == answers[0]
    assert sum(one.probes for one in seen) < 0.9 * len(NAMES) * len(seen)


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
def test_a_filter_is_the_stores_own(stores: dict[str, Any], tmp_path: Path) -> None:
    filters = MetadataFilters(filters=[MetadataFilter(key="group", value=1)])
    model = Hashed(embed_dim=DIM)
    more: dict[str, Any] = {"embed_model": model, "registry": tmp_path}
    retriever = RoutedRetriever(stores, filters=filters, similarity_top_k=5, **more)
    found = retriever.retrieve(QUESTIONS[0])
    assert len(found) == 5
    assert {node.metadata["group"] for node in found} == {1}
    with pytest.raises(InvalidInput, match="no store of this framework"):
        RoutedRetriever({"a": object()})
