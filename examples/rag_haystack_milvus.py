"""Haystack over Milvus, routed: ``python examples/rag_haystack_milvus.py``."""

from __future__ import annotations

from collections.abc import Iterator

from common import QUESTIONS, App, StubGenerator, embed, main
from haystack import Document, Pipeline, component
from milvus_haystack import MilvusDocumentStore
from milvus_haystack.milvus_embedding_retriever import MilvusEmbeddingRetriever

from amips_plugins.integrations.haystack_milvus import routed


@component
class StubTextEmbedder:
    """Where your embedder belongs."""

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, list[float]]:
        """Embed a question."""
        return {"embedding": embed(text)}


@component
class StubAnswers:
    """Where your prompt builder and your generator belong."""

    @component.output_types(answer=str)
    def run(self, question: str, documents: list[Document]) -> dict[str, str]:
        """Answer a question."""
        passages = [(doc.meta["title"], doc.content or "") for doc in documents]
        return {"answer": StubGenerator()(question, passages)}


def open_store(app: App, name: str) -> MilvusDocumentStore:
    return MilvusDocumentStore(
        collection_name=name,
        connection_args={"uri": str(app.folder / "docs.db")},
        index_params={"index_type": "FLAT", "metric_type": "COSINE"},
    )


def fill(app: App) -> None:
    store = open_store(app, "docs")
    store.write_documents(
        [
            Document(content=pair.key, meta={"title": pair.title}, embedding=embed(pair.key))
            for pair in app.texts
        ]
    )
    store.client.create_alias("docs", "docs_live")  # a layout moves it to the copy that it makes
    store.client.close()


def ask(app: App) -> Iterator[str]:
    store = open_store(app, "docs_live")
    store = routed(store, registry=app.registry, observers=[app.watch])  # the one line

    pipeline = Pipeline()
    pipeline.add_component("embedder", StubTextEmbedder())
    pipeline.add_component("retriever", MilvusEmbeddingRetriever(store, top_k=3))
    pipeline.add_component("answers", StubAnswers())
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.connect("retriever.documents", "answers.documents")
    for question in QUESTIONS:
        asked = {"embedder": {"text": question}, "answers": {"question": question}}
        yield pipeline.run(asked)["answers"]["answer"]
    store.client.close()


if __name__ == "__main__":
    main("haystack-milvus", "milvus://{folder}/docs.db?collection=docs_live", fill, ask)
