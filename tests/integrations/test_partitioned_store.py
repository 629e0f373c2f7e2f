"""A store of a collection that its users have cut up: ``routed`` chooses among the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_qdrant", reason="run it by: make frameworks")

from langchain_core.documents import Document
from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.integrations.langchain_qdrant import routed
from tests.integrations.corpus import DIM, documents
from tests.integrations.several_ways import QUESTIONS, check_recall, name_of, publish
from tests.integrations.test_several_langchain import Hashed


def test_a_store_is_searched_in_the_values_that_hold_the_answer(tmp_path: Path) -> None:
    client = QdrantClient(":memory:")
    params = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=params)
    store = QdrantVectorStore(client=client, collection_name="docs", embedding=Hashed())
    rows = [
        Document(page_content=text, metadata={**known, "topic": name_of(row)})
        for row, (text, known) in enumerate(documents())
    ]
    store.add_documents(rows, ids=list(range(len(rows))))
    registry = publish(QdrantCollection(client, "docs"), tmp_path, "metadata.topic")
    store = routed(store, registry=registry, refresh=None)
    router: Any = store.client.amips_router
    seen: list[Any] = []
    router.observe(seen.append)
    answers = []
    for question in QUESTIONS:
        found = store.similarity_search(question, k=10)
        answers.append([(doc.metadata["topic"], doc.metadata["row"]) for doc in found])
    check_recall(answers, 10)
    assert sum(one.routed for one in seen) == len(QUESTIONS)
    assert sum(one.probes for one in seen) < 3.6 * len(QUESTIONS)
    late = Document(page_content="entirely new", metadata={"topic": "of tomorrow", "row": -1})
    store.add_documents([late], ids=[9_999])
    assert store.similarity_search("entirely new", k=1)[0].metadata["row"] == -1
    client.close()
