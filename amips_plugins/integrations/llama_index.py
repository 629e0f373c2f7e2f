"""A LlamaIndex retriever over several vector stores, of Qdrant, of Milvus, or of both.

>>> from amips_plugins.integrations.llama_index import RoutedRetriever  # doctest: +SKIP
>>> retriever = RoutedRetriever({"news": news, "manuals": manuals})  # doctest: +SKIP
>>> retriever.retrieve("how do I reset it?")  # doctest: +SKIP

It needs the extras of its stores: ``llama-index-qdrant``, ``llama-index-milvus``.
"""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from amips_plugins.errors import require

require("llama_index.core", "llama-index-qdrant")

from llama_index.core import Settings
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import VectorStoreQuery

from amips_plugins.integrations.several import SOURCE, Finder, Found, Sources, document_of
from amips_plugins.integrations.stores import StoreKind

if TYPE_CHECKING:
    from amips_plugins.routing.hits import Hits
    from amips_plugins.routing.router import LearnedRouter

__all__ = ["RoutedRetriever"]


class RoutedRetriever(BaseRetriever):
    """Asks those of several vector stores that the published model chooses, together.

    A node's metadata name its store under ``amips_collection``. LlamaIndex' own ``RouterRetriever``
    asks a language model which of several retrievers to take; this one takes microseconds, and
    holds a recall.

    Parameters
    ----------
    stores
        The vector stores by name, all with one model of embedding.
    embed_model
        What embeds the question; left out, that of ``Settings``.
    similarity_top_k
        Number of nodes.
    recall
        Recall@k to aim at, in (0, 1); None for the bundle's own target.
    filters
        ``MetadataFilters`` of all stores, or a mapping of their names to some each. Under a filter
        all stores are asked.
    **options
        Those of ``LearnedRouter.over``: ``name``, ``registry``, ``strict``, ``timeout`` and so on.

    Raises
    ------
    InvalidInput
        There are no stores, one is of another kind, or they cannot be compared.
    """

    def __init__(
        self,
        stores: Mapping[str, Any],
        *,
        embed_model: Any = None,
        similarity_top_k: int = 10,
        recall: float | None = None,
        filters: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._sources = Sources("llama_index", stores, _finder, options)
        self._embed_model = embed_model
        self._asked = (similarity_top_k, recall, filters)

    @property
    def router(self) -> LearnedRouter:
        """The router over the stores' collections."""
        return self._sources.router

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = query_bundle.embedding
        if vector is None:
            vector = self._model.get_agg_embedding_from_queries(query_bundle.embedding_strs)
        return _nodes(self._sources.find(vector, *self._asked))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = query_bundle.embedding
        if vector is None:
            texts = query_bundle.embedding_strs
            vector = await self._model.aget_agg_embedding_from_queries(texts)
        return _nodes(await self._sources.find_later(vector, *self._asked))

    @property
    def _model(self) -> Any:
        return Settings.embed_model if self._embed_model is None else self._embed_model


def _nodes(hits: Hits) -> list[NodeWithScore]:
    found = []
    for hit in hits:
        node = document_of(hit)
        metadata = {**node.metadata, SOURCE: hit.collection}
        found.append(
            NodeWithScore(node=node.model_copy(update={"metadata": metadata}), score=hit.score)
        )
    return found


def _finder(kind: StoreKind, store: Any) -> Finder:
    def query(vector: list[float], k: int, filters: Any) -> Any:
        return VectorStoreQuery(query_embedding=vector, similarity_top_k=k, filters=filters)

    async def later(vector: list[float], k: int, filters: Any) -> Found:
        return _found(await store.aquery(query(vector, k, filters)))

    asynchronous = getattr(store, kind.clients[1], None)
    return Finder(
        lambda vector, k, filters: _found(store.query(query(vector, k, filters))),
        None if asynchronous is None else later,
    )


def _found(result: Any) -> Found:
    return zip(result.ids or (), result.similarities or (), result.nodes or (), strict=True)
