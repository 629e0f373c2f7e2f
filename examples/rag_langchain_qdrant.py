"""LangChain over Qdrant, routed: ``python examples/rag_langchain_qdrant.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common import DIM, QUESTIONS, App, StubGenerator, embed, main
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient, models

from amips_plugins.integrations.langchain_qdrant import routed


class StubEmbeddings(Embeddings):
    """Where your embedding model belongs."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts."""
        return [embed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """Embed a question."""
        return embed(text)


def fill(app: App) -> None:
    client = QdrantClient(path=str(app.folder / "qdrant"))
    size = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=size)
    store = QdrantVectorStore(client, "docs", embedding=StubEmbeddings())
    store.add_documents(
        [Document(page_content=pair.key, metadata={"title": pair.title}) for pair in app.texts]
    )
    client.close()


def ask(app: App) -> Iterator[str]:
    client = QdrantClient(path=str(app.folder / "qdrant"))
    store = QdrantVectorStore(client, "docs", embedding=StubEmbeddings())
    store = routed(store, registry=app.registry, observers=[app.watch])  # the one line

    generator = StubGenerator()

    def generate(found: dict[str, Any]) -> str:
        passages = [(doc.metadata["title"], doc.page_content) for doc in found["documents"]]
        return generator(found["question"], passages)

    retriever = store.as_retriever(search_kwargs={"k": 3})
    chain = {"documents": retriever, "question": RunnablePassthrough()} | RunnableLambda(generate)
    for question in QUESTIONS:
        yield chain.invoke(question)
    client.close()


if __name__ == "__main__":
    main("langchain-qdrant", "qdrant://{folder}/qdrant?collection=docs", fill, ask)
