"""Haystack's store for Qdrant.

>>> from haystack_integrations.document_stores.qdrant import QdrantDocumentStore  # doctest: +SKIP
>>> from amips_plugins.integrations.haystack_qdrant import routed  # doctest: +SKIP
>>> store = routed(QdrantDocumentStore(url=url, index="docs"))  # doctest: +SKIP

A saved pipeline holds the store without its router, since its retrievers load nothing but the
class they know: call ``routed`` for the store of a loaded one.

It needs the extra ``haystack-qdrant``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from amips_plugins.errors import require
from amips_plugins.integrations.common import Router, check_store, given_or_late, unrouted
from amips_plugins.proxies import route
from amips_plugins.proxies.client import ClientProxy
from amips_plugins.routing.checks import check_target

if TYPE_CHECKING:
    from amips_plugins.routing.router import LearnedRouter

__all__ = ["routed"]

_Store = TypeVar("_Store")

_MODULE = "haystack_integrations.document_stores.qdrant"


def routed(
    store: _Store,
    router: LearnedRouter | None = None,
    *,
    recall: float | None = None,
    **options: Any,
) -> _Store:
    """Have a store search its embeddings through a router, synchronously or not.

    Sparse and hybrid retrieval, groups and everything else are the store's own as before. The
    store still opens its clients when it first needs them; a router that is to be made is made
    with the first search.

    Parameters
    ----------
    store
        A ``QdrantDocumentStore``. The clients that it opens are replaced by proxies.
    router
        A router of the store's collection; left out, one is made with the store's client.
    recall
        Recall@k to aim at, in (0, 1]; left out, the bundle's own target.
    **options
        Arguments of the ``LearnedRouter`` that is made, such as ``registry``.

    Returns
    -------
    QdrantDocumentStore
        The same store.

    Raises
    ------
    MissingExtra
        The framework is not installed.
    InvalidInput
        It is no such store, or an argument cannot be used.
    """
    framework = require(_MODULE, "haystack-qdrant")
    check_store(store, framework.QdrantDocumentStore, "haystack_qdrant.routed")
    check_target(recall, None)
    inner: Any = store
    kind: Any = type(store)
    inner._client, inner._async_client = unrouted(inner._client), unrouted(inner._async_client)

    def make() -> LearnedRouter:
        from amips_plugins.adapters.qdrant.collection import QdrantCollection
        from amips_plugins.routing.router import LearnedRouter

        kind._initialize_client(inner)  # the asynchronous one may be alone so far
        dense = require(f"{_MODULE}.converters", "haystack-qdrant").DENSE_VECTORS_NAME
        field = dense if inner.use_sparse_embeddings else ""
        collection = QdrantCollection(unrouted(inner._client), inner.index, field)
        return LearnedRouter(collection, **options)

    planner: Router = given_or_late(router, options, inner.index, make)

    def initialise() -> None:
        kind._initialize_client(inner)
        if not isinstance(inner._client, ClientProxy):
            inner._client = route(inner._client, planner, recall=recall)

    async def initialise_async() -> None:
        await kind._initialize_async_client(inner)
        if not isinstance(inner._async_client, ClientProxy):
            inner._async_client = route(inner._async_client, planner, recall=recall)

    # Every method of the store calls one of these first.
    inner._initialize_client = initialise
    inner._initialize_async_client = initialise_async
    return store
