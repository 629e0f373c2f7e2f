"""Haystack's component over several document stores."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("haystack_integrations.document_stores.qdrant", reason="run: make frameworks")

from haystack import Document, Pipeline
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore

from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.haystack import RoutedRetriever
from tests.integrations.corpus import DIM, embed
from tests.integrations.several_ways import (
    NAMES,
    QUESTIONS,
    check_recall,
    publish,
    texts_of,
    truth,
)


def on_milvus(name: str, folder: Path) -> Any:
    milvus = pytest.importorskip("milvus_haystack")
    return milvus.MilvusDocumentStore(
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
        if request.param == "both" and place % 2:
            store = on_milvus(name, folder)
        else:
            store = QdrantDocumentStore(
                ":memory:", index=name, embedding_dim=DIM, similarity="cosine"
            )
        store.write_documents(
            [
                Document(id=f"d{row}", content=text, meta=meta, embedding=embed(text))
                for row, text, meta in texts_of(name)
            ]
        )
        made[name] = store
    return made


def known(answer: dict[str, Any]) -> list[tuple[str, object]]:
    documents = answer["documents"]
    return [(doc.meta["amips_collection"], doc.meta["row"]) for doc in documents]


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
def test_it_asks_the_stores_that_hold_the_answer(
    stores: dict[str, Any], loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    every = RoutedRetriever(stores, registry=tmp_path)
    for question in QUESTIONS[:5]:
        assert known(every.run(embed(question))) == truth(question, 10)
        assert known(loop.run_until_complete(every.run_async(embed(question)))) == truth(
            question, 10
        )
    registry = publish(every.router.collection, tmp_path / "run")
    retriever = RoutedRetriever(stores, registry=registry, refresh=None)
    seen: list[Any] = []
    retriever.router.observe(seen.append)
    pipeline = Pipeline()
    pipeline.add_component("retriever", retriever)
    asked = [{"retriever": {"query_embedding": embed(question)}} for question in QUESTIONS]
    check_recall([known(pipeline.run(one)["retriever"]) for one in asked], 10)
    assert sum(one.probes for one in seen) < 0.9 * len(NAMES) * len(seen)


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
def test_a_filter_is_the_stores_own(stores: dict[str, Any], tmp_path: Path) -> None:
    retriever = RoutedRetriever(stores, registry=tmp_path)
    condition = {"field": "meta.group", "operator": "==", "value": 1}
    found = retriever.run(embed(QUESTIONS[0]), filters=condition, top_k=5)["documents"]
    assert len(found) == 5
    assert {doc.meta["group"] for doc in found} == {1}
    with pytest.raises(InvalidInput, match="no store of this framework"):
        RoutedRetriever({"a": object()})
