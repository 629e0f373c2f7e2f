"""LangChain's store for Milvus.

>>> from langchain_milvus import Milvus  # doctest: +SKIP
>>> from amips_plugins.integrations.langchain_milvus import routed  # doctest: +SKIP
>>> store = routed(Milvus(embeddings, connection_args={"uri": "docs.db"}))  # doctest: +SKIP

It needs the extra ``langchain-milvus``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from amips_plugins.errors import require
from amips_plugins.integrations.common import check_store, milvus_router, unrouted
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

    Sparse and hybrid retrieval and everything else are the store's own as before. MMR chooses
    among the hits of a dense search, which is routed.

    Parameters
    ----------
    store
        A ``Milvus`` store, built in any way. Its clients are replaced by proxies.
    router
        A router of the store's collection; left out, one is made with the store's client.
    recall
        Recall@k to aim at, in (0, 1]; left out, the bundle's own target.
    **options
        Arguments of the ``LearnedRouter`` that is made, such as ``registry``.

    Returns
    -------
    Milvus
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
    framework = require("langchain_milvus", "langchain-milvus")
    check_store(store, framework.Milvus, "langchain_milvus.routed")
    inner: Any = store
    client = unrouted(inner.client)
    field = inner._vector_field if isinstance(inner._vector_field, str) else None
    planner = milvus_router(client, inner.collection_name, field, router, options)
    inner._milvus_client = route(client, planner, recall=recall)
    if inner._async_milvus_client is not None:
        aclient = unrouted(inner._async_milvus_client)
        inner._async_milvus_client = route(aclient, planner, recall=recall)
    return store
