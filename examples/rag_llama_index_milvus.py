"""LlamaIndex over Milvus, routed: ``python examples/rag_llama_index_milvus.py``."""

from __future__ import annotations

from collections.abc import Iterator

from common import DIM, QUESTIONS, App, StubGenerator, embed, main
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import TextNode
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import MilvusClient

from amips_plugins.integrations.llama_index_milvus import routed


class StubEmbedding(BaseEmbedding):
    """Where your embedding model belongs."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return embed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed(query)


class StubEngine(CustomQueryEngine):
    """Where your response synthesizer belongs."""

    retriever: BaseRetriever

    def custom_query(self, query_str: str) -> str:
        """Answer a question."""
        found = self.retriever.retrieve(query_str)
        return StubGenerator()(query_str, [(one.metadata["title"], one.text) for one in found])


def open_store(app: App) -> MilvusVectorStore:
    uri = str(app.folder / "docs.db")
    # This store takes no alias, so it has to be told the name of the copy that a layout makes.
    looking = MilvusClient(uri)
    name = "docs__g2" if looking.has_collection("docs__g2") else "docs"
    looking.close()
    return MilvusVectorStore(
        uri,
        dim=DIM,
        collection_name=name,
        similarity_metric="COSINE",
        index_config={"index_type": "FLAT"},
    )


def fill(app: App) -> None:
    store = open_store(app)
    VectorStoreIndex(
        [TextNode(text=pair.key, metadata={"title": pair.title}) for pair in app.texts],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=StubEmbedding(),
    )
    store.client.close()


def ask(app: App) -> Iterator[str]:
    store = open_store(app)
    store = routed(store, registry=app.registry, observers=[app.watch])  # the one line

    index = VectorStoreIndex.from_vector_store(store, embed_model=StubEmbedding())
    engine = StubEngine(retriever=index.as_retriever(similarity_top_k=3))
    for question in QUESTIONS:
        yield str(engine.query(question))
    store.client.close()


if __name__ == "__main__":
    main("llama-index-milvus", "milvus://{folder}/docs.db?collection=docs", fill, ask)
