"""LlamaIndex' store for Qdrant.

>>> from llama_index.vector_stores.qdrant import QdrantVectorStore  # doctest: +SKIP
>>> from amips_plugins.integrations.llama_index_qdrant import routed  # doctest: +SKIP
>>> store = routed(QdrantVectorStore("docs", client=client))  # doctest: +SKIP

It needs the extra ``llama-index-qdrant``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from amips_plugins.errors import InvalidInput, require
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
    """Have a store search its dense vectors through a router, synchronously or not.

    Sparse and hybrid queries and everything else are the store's own as before.

    Parameters
    ----------
    store
        A ``QdrantVectorStore``, hybrid or not. Its clients are replaced by proxies.
    router
        A router of the store's collection; left out, one is made with the store's client. A store
        that has an asynchronous client alone needs one.
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
    framework = require("llama_index.vector_stores.qdrant", "llama-index-qdrant")
    check_store(store, framework.QdrantVectorStore, "llama_index_qdrant.routed")
    inner: Any = store
    client, aclient = unrouted(inner._client), unrouted(inner._aclient)
    if client is None and router is None:
        raise InvalidInput(
            "The store has an asynchronous client alone, and a router looks at its collection "
            "through an ordinary one; pass a router, or give the store a client= too."
        )
    planner = qdrant_router(
        client, inner.collection_name, lambda: str(inner.dense_vector_name), router, options
    )
    if client is not None:
        inner._client = route(client, planner, recall=recall)
    if aclient is not None:
        inner._aclient = route(aclient, planner, recall=recall)
    return store
