"""What the tests of the two LlamaIndex stores share."""

from __future__ import annotations

from typing import Any

from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import (
    ExactMatchFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from tests.integrations.congruence import Ask, Found
from tests.integrations.corpus import documents, embed

TEXT = "Return the names of all files that lie in a folder"


class Hashed(BaseEmbedding):
    def _get_query_embedding(self, query: str) -> list[float]:
        return embed(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return embed(text)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed(query)


def nodes() -> list[TextNode]:
    return [
        TextNode(id_=f"00000000-0000-0000-0000-{row:012d}", text=text, metadata=known)
        for row, (text, known) in enumerate(documents())
    ]


def fill(store: Any) -> None:
    """Build an index as the README does."""
    context = StorageContext.from_defaults(vector_store=store)
    VectorStoreIndex(nodes(), storage_context=context, embed_model=Hashed())


def _query(k: int = 5, **more: Any) -> VectorStoreQuery:
    return VectorStoreQuery(query_str=TEXT, query_embedding=embed(TEXT), similarity_top_k=k, **more)


def _filters() -> MetadataFilters:
    return MetadataFilters(filters=[ExactMatchFilter(key="group", value=1)])


def _found(result: Any) -> Found:
    return [
        (type(node), key, node.get_content(), node.metadata, node.embedding, score)
        for node, key, score in zip(result.nodes, result.ids, result.similarities, strict=True)
    ]


def _retrieved(scored: Any) -> Found:
    return [(one.node_id, one.text, one.metadata, one.score) for one in scored]


def _retriever(store: Any, **more: Any) -> Any:
    index = VectorStoreIndex.from_vector_store(store, embed_model=Hashed())
    return index.as_retriever(similarity_top_k=6, **more)


async def _later(store: Any) -> Found:
    return _found(await store.aquery(_query(filters=_filters())))


async def _retrieved_later(store: Any) -> Found:
    return _retrieved(await _retriever(store).aretrieve(TEXT))


WAYS: dict[str, Ask] = {
    "query": lambda s: _found(s.query(_query())),
    "query of k": lambda s: _found(s.query(_query(9))),
    "filter": lambda s: _found(s.query(_query(7, filters=_filters()))),
    "retriever": lambda s: _retrieved(_retriever(s).retrieve(TEXT)),
    "retriever with a filter": lambda s: _retrieved(
        _retriever(s, filters=_filters()).retrieve(TEXT)
    ),
    "asynchronous": _later,
    "asynchronous retriever": _retrieved_later,
}

MMR: dict[str, Ask] = {
    "mmr": lambda s: _found(s.query(_query(4, mode=VectorStoreQueryMode.MMR), mmr_prefetch_k=10))
}

HYBRID: dict[str, Ask] = {
    "hybrid": lambda s: _found(
        s.query(_query(5, mode=VectorStoreQueryMode.HYBRID, sparse_top_k=5, hybrid_top_k=5))
    ),
    "sparse": lambda s: _found(
        s.query(_query(5, mode=VectorStoreQueryMode.SPARSE, sparse_top_k=5))
    ),
}


def best(store: Any, text: str) -> list[Any]:
    query = VectorStoreQuery(query_embedding=embed(text), similarity_top_k=10)
    found: list[Any] = store.query(query).ids
    return found


def read(store: Any, key: Any) -> tuple[Any, str, Any]:
    (node,) = store.get_nodes(node_ids=[key])
    return node, node.text, node.metadata


def write_again(store: Any, node: Any, text: str, title: str) -> None:
    node.text, node.embedding = text, embed(text)
    node.metadata["title"] = title
    assert store.add([node]) == [node.node_id]


def add(store: Any, text: str) -> Any:
    more = {"title": "", "group": 0, "row": -1}
    node = TextNode(
        id_="00000000-0000-0000-0001-000000000000", text=text, metadata=more, embedding=embed(text)
    )
    return store.add([node])[0]
