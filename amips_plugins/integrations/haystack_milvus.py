"""Haystack's store for Milvus.

>>> from milvus_haystack import MilvusDocumentStore  # doctest: +SKIP
>>> from amips_plugins.integrations.haystack_milvus import routed  # doctest: +SKIP
>>> store = routed(MilvusDocumentStore(connection_args={"uri": "docs.db"}))  # doctest: +SKIP

A saved pipeline holds the store without its router: call ``routed`` for the store of a loaded one.

It needs the extra ``haystack-milvus``.
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
    """Have a store search its embeddings through a router.

    Sparse and hybrid retrieval and everything else are the store's own as before.

    Parameters
    ----------
    store
        A ``MilvusDocumentStore``. Its client is replaced by a proxy.
    router
        A router of the store's collection; left out, one is made with the store's client.
    recall
        Recall@k to aim at, in (0, 1]; left out, the bundle's own target.
    **options
        Arguments of the ``LearnedRouter`` that is made, such as ``registry``.

    Returns
    -------
    MilvusDocumentStore
        The same store. ``store.client.amips_router`` is the router.

    Raises
    ------
    MissingExtra
        The framework is not installed.
    InvalidInput
        It is no such store, or an argument cannot be used.
    CollectionError
        The store's collection cannot be served.
    """
    framework = require("milvus_haystack", "haystack-milvus")
    check_store(store, framework.MilvusDocumentStore, "haystack_milvus.routed")
    inner: Any = store
    client = unrouted(inner.client)
    planner = milvus_router(client, inner.collection_name, inner._vector_field, router, options)
    inner._milvus_client = route(client, planner, recall=recall)
    return store
