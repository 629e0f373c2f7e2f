"""Haystack over Qdrant, routed: ``python examples/rag_haystack_qdrant.py``."""

from __future__ import annotations

from collections.abc import Iterator

from common import DIM, QUESTIONS, App, StubGenerator, embed, main
from haystack import Document, Pipeline, component
from haystack_integrations.components.retrievers.qdrant import QdrantEmbeddingRetriever
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore

from amips_plugins.integrations.haystack_qdrant import routed


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


def open_store(app: App) -> QdrantDocumentStore:
    return QdrantDocumentStore(path=str(app.folder / "qdrant"), index="docs", embedding_dim=DIM)


def fill(app: App) -> None:
    store = open_store(app)
    store.write_documents(
        [
            Document(content=pair.key, meta={"title": pair.title}, embedding=embed(pair.key))
            for pair in app.texts
        ]
    )
    store.close()


def ask(app: App) -> Iterator[str]:
    store = open_store(app)
    store = routed(store, registry=app.registry, observers=[app.watch])  # the one line

    pipeline = Pipeline()
    pipeline.add_component("embedder", StubTextEmbedder())
    pipeline.add_component("retriever", QdrantEmbeddingRetriever(store, top_k=3))
    pipeline.add_component("answers", StubAnswers())
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.connect("retriever.documents", "answers.documents")
    for question in QUESTIONS:
        asked = {"embedder": {"text": question}, "answers": {"question": question}}
        yield pipeline.run(asked)["answers"]["answer"]
    store.close()


if __name__ == "__main__":
    main("haystack-qdrant", "qdrant://{folder}/qdrant?collection=docs", fill, ask)
