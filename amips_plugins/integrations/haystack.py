"""A Haystack component over several document stores, of Qdrant, of Milvus, or of both.

>>> from amips_plugins.integrations.haystack import RoutedRetriever  # doctest: +SKIP
>>> pipeline.add_component("retriever", RoutedRetriever({"news": news}))  # doctest: +SKIP
>>> pipeline.connect("embedder.embedding", "retriever.query_embedding")  # doctest: +SKIP

It needs the extras of its stores: ``haystack-qdrant``, ``haystack-milvus``. A pipeline with it
cannot be saved, since that would leave the router out: add it to a loaded one.
"""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from amips_plugins.errors import require

require("haystack", "haystack-qdrant")

from haystack import Document, component

from amips_plugins.integrations.several import SOURCE, Finder, Found, Sources, document_of
from amips_plugins.integrations.stores import StoreKind

if TYPE_CHECKING:
    from amips_plugins.routing.hits import Hits
    from amips_plugins.routing.router import LearnedRouter

__all__ = ["RoutedRetriever"]


@component
class RoutedRetriever:
    """Asks those of several document stores that the published model chooses, together.

    A document's ``meta`` names its store under ``amips_collection``.

    Parameters
    ----------
    stores
        The document stores by name, all with one model of embedding.
    top_k
        Number of documents.
    recall
        Recall@k to aim at, in (0, 1); None for the bundle's own target.
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
        top_k: int = 10,
        recall: float | None = None,
        **options: Any,
    ) -> None:
        self._sources = Sources("haystack", stores, _finder, options)
        self._top_k = top_k
        self._recall = recall

    @property
    def router(self) -> LearnedRouter:
        """The router over the stores' collections."""
        return self._sources.router

    @component.output_types(documents=list[Document])
    def run(
        self,
        query_embedding: list[float],
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
    ) -> dict[str, list[Document]]:
        """Retrieve documents.

        Parameters
        ----------
        query_embedding
            The embedded question.
        filters
            Haystack's filter of all stores, or a mapping of their names to one each. Under a
            filter all stores are asked.
        top_k
            In place of the component's own.
        """
        hits = self._sources.find(query_embedding, top_k or self._top_k, self._recall, filters)
        return {"documents": _documents(hits)}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query_embedding: list[float],
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
    ) -> dict[str, list[Document]]:
        """Retrieve documents as ``run`` does, in tasks."""
        asked = query_embedding, top_k or self._top_k, self._recall, filters
        return {"documents": _documents(await self._sources.find_later(*asked))}


def _documents(hits: Hits) -> list[Document]:
    found = []
    for hit in hits:
        document = document_of(hit)
        found.append(replace(document, meta={**document.meta, SOURCE: hit.collection}))
    return found


def _finder(kind: StoreKind, store: Any) -> Finder:
    if kind.database == "milvus":
        from milvus_haystack import MilvusEmbeddingRetriever

        own = MilvusEmbeddingRetriever(document_store=store)
        scaled = (store.index_params or {}).get("metric_type")

        def unscaled(score: float) -> float:
            """Return Milvus' own score, which this store maps to 0 to 1."""
            if scaled == "L2":
                return 4.0 * (1.0 - score)
            return 2.0 * score - 1.0 if scaled in ("IP", "COSINE") else score

        def now(vector: list[float], k: int, filters: Any) -> Found:
            documents = own.run(vector, top_k=k, filters=filters)["documents"]
            return [(document.id, unscaled(document.score), document) for document in documents]

        return Finder(now)
    from haystack_integrations.components.retrievers.qdrant import QdrantEmbeddingRetriever

    retriever = QdrantEmbeddingRetriever(document_store=store, scale_score=False)

    async def later(vector: list[float], k: int, filters: Any) -> Found:
        return _found(await retriever.run_async(vector, top_k=k, filters=filters))

    return Finder(
        lambda vector, k, filters: _found(retriever.run(vector, top_k=k, filters=filters)),
        None if store.location == ":memory:" or store.path else later,
    )


def _found(answer: Mapping[str, list[Document]]) -> Found:
    return [(document.id, document.score, document) for document in answer["documents"]]
