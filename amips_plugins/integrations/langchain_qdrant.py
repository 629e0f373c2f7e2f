"""LangChain's store for Qdrant.

>>> from langchain_qdrant import QdrantVectorStore  # doctest: +SKIP
>>> from amips_plugins.integrations.langchain_qdrant import routed  # doctest: +SKIP
>>> store = QdrantVectorStore(client, "docs", embedding=embeddings)  # doctest: +SKIP
>>> store = routed(store)  # doctest: +SKIP

It needs the extra ``langchain-qdrant``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from amips_plugins.errors import require
from amips_plugins.integrations.common import check_store, qdrant_router, unrouted
from amips_plugins.proxies import route

if TYPE_CHECKING:
    from amips_plugins.routing.router import LearnedRouter

__all__ = ["routed"]

_Store = TypeVar("_Store")


def routed(
    store: _Store,
    router: LearnedRouter | None = None,
    *,
    recall: float | None = None,
    **options: Any,
) -> _Store:
    """Have a store search its dense vectors through a router.

    Sparse and hybrid retrieval, MMR and everything else are the store's own as before.

    Parameters
    ----------
    store
        A ``QdrantVectorStore``, built in any way. Its client is replaced by a proxy.
    router
        A router of the store's collection; left out, one is made with the store's client.
    recall
        Recall@k to aim at, in (0, 1]; left out, the bundle's own target.
    **options
        Arguments of the ``LearnedRouter`` that is made, such as ``registry``.

    Returns
    -------
    QdrantVectorStore
        The same store. ``store.client.amips_router`` is the router.

    Raises
    ------
    MissingExtra
        The framework is not installed.
    InvalidInput
        It is no such store, or an argument cannot be used.
    CollectionError
        The store's collection has no dense vector that can be served.
    """
    framework = require("langchain_qdrant", "langchain-qdrant")
    check_store(store, framework.QdrantVectorStore, "langchain_qdrant.routed")
    inner: Any = store
    client = unrouted(inner.client)
    planner = qdrant_router(
        client, inner.collection_name, lambda: str(inner.vector_name), router, options
    )
    inner._client = route(client, planner, recall=recall)
    return store
