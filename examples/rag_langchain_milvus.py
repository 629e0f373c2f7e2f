"""LangChain over Milvus, routed: ``python examples/rag_langchain_milvus.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common import QUESTIONS, App, StubGenerator, embed, main
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_milvus import Milvus

from amips_plugins.integrations.langchain_milvus import routed


class StubEmbeddings(Embeddings):
    """Where your embedding model belongs."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts."""
        return [embed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """Embed a question."""
        return embed(text)


def fill(app: App) -> None:
    store = Milvus(
        StubEmbeddings(),
        collection_name="docs",
        connection_args={"uri": str(app.folder / "docs.db")},
        index_params={"index_type": "FLAT", "metric_type": "COSINE"},
    )
    store.add_documents(
        [Document(page_content=pair.key, metadata={"title": pair.title}) for pair in app.texts],
        ids=[str(row) for row in range(len(app.texts))],
    )
    store.client.create_alias("docs", "docs_live")  # a layout moves it to the copy that it makes
    store.client.close()


def ask(app: App) -> Iterator[str]:
    store = Milvus(
        StubEmbeddings(),
        collection_name="docs_live",
        connection_args={"uri": str(app.folder / "docs.db")},
    )
    store = routed(store, registry=app.registry, observers=[app.watch])  # the one line

    generator = StubGenerator()

    def generate(found: dict[str, Any]) -> str:
        passages = [(doc.metadata["title"], doc.page_content) for doc in found["documents"]]
        return generator(found["question"], passages)

    retriever = store.as_retriever(search_kwargs={"k": 3})
    chain = {"documents": retriever, "question": RunnablePassthrough()} | RunnableLambda(generate)
    for question in QUESTIONS:
        yield chain.invoke(question)
    store.client.close()


if __name__ == "__main__":
    main("langchain-milvus", "milvus://{folder}/docs.db?collection=docs_live", fill, ask)
