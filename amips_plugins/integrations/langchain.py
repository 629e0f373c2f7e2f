"""A LangChain retriever over several stores, of Qdrant, of Milvus, or of both.

>>> from amips_plugins.integrations.langchain import RoutedRetriever  # doctest: +SKIP
>>> retriever = RoutedRetriever.over({"news": news, "manuals": manuals})  # doctest: +SKIP
>>> retriever.invoke("how do I reset it?")  # doctest: +SKIP

It needs the extras of its stores: ``langchain-qdrant``, ``langchain-milvus``.
"""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any

from amips_plugins.errors import InvalidInput, require

require("langchain_core", "langchain-qdrant")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever

from amips_plugins.integrations.several import SOURCE, Finder, Found, Sources, document_of
from amips_plugins.integrations.stores import StoreKind

if TYPE_CHECKING:
    from amips_plugins.routing.hits import Hits
    from amips_plugins.routing.router import LearnedRouter

__all__ = ["RoutedRetriever"]


class RoutedRetriever(BaseRetriever):
    """Asks those of several stores that the published model chooses, together.

    A document's metadata name its store under ``amips_collection``. Make one by ``over``.

    Attributes
    ----------
    sources
        The stores and their router.
    embeddings
        What embeds the question, once for all stores.
    k
        Number of documents.
    recall
        Recall@k to aim at, in (0, 1); None for the bundle's own target.
    filter
        The stores' own filter, or a mapping of their names to one each. Under a filter all stores
        are asked.
    """

    sources: Any
    embeddings: Any
    k: int = 10
    recall: float | None = None
    filter: Any = None

    @classmethod
    def over(
        cls,
        stores: Mapping[str, Any],
        *,
        embeddings: Embeddings | None = None,
        k: int = 10,
        recall: float | None = None,
        filter: Any = None,  # noqa: A002 - LangChain calls it so
        **options: Any,
    ) -> RoutedRetriever:
        """Make a retriever over stores by name, all with one model of embedding.

        ``embeddings`` are the first store's if left out; ``options`` those of
        ``LearnedRouter.over``: ``name``, ``registry``, ``strict``, ``timeout`` and so on.

        Raises
        ------
        InvalidInput
            There are no stores, one is of another kind, they cannot be compared, or nothing embeds.
        """
        sources = Sources("langchain", stores, _finder, options)
        found = embeddings or getattr(next(iter(stores.values())), "embeddings", None)
        if found is None:
            raise InvalidInput("The first store has no embeddings; pass some to RoutedRetriever.")
        return cls(sources=sources, embeddings=found, k=k, recall=recall, filter=filter)

    @property
    def router(self) -> LearnedRouter:
        """The router over the stores' collections."""
        found: LearnedRouter = self.sources.router
        return found

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:  # noqa: ARG002 - LangChain's signature
        vector = self.embeddings.embed_query(query)
        return _documents(self.sources.find(vector, self.k, self.recall, self.filter))

    async def _aget_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:  # noqa: ARG002 - as above
        vector = await self.embeddings.aembed_query(query)
        return _documents(await self.sources.find_later(vector, self.k, self.recall, self.filter))


def _documents(hits: Hits) -> list[Document]:
    found = []
    for hit in hits:
        document = document_of(hit)
        metadata = {**document.metadata, SOURCE: hit.collection}
        found.append(document.model_copy(update={"metadata": metadata}))
    return found


def _finder(kind: StoreKind, store: Any) -> Finder:
    if kind.database == "qdrant":  # whose store has no asynchronous client
        return Finder(
            lambda vector, k, condition: _found(
                store.similarity_search_with_score_by_vector(vector, k=k, filter=condition)
            )
        )

    async def later(vector: list[float], k: int, condition: Any) -> Found:
        return _found(
            await store.asimilarity_search_with_score_by_vector(vector, k=k, expr=condition)
        )

    asked: Awaitable[Any] | None = getattr(store, "_async_milvus_client", None)
    return Finder(
        lambda vector, k, condition: _found(
            store.similarity_search_with_score_by_vector(vector, k=k, expr=condition)
        ),
        None if asked is None else later,
    )


def _found(pairs: list[tuple[Document, float]]) -> Found:
    return [
        (
            str(document.metadata.get("_id", document.metadata.get("pk", document.id))),
            score,
            document,
        )
        for document, score in pairs
    ]
