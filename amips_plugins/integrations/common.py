"""What the integrations share: the router of a store's collection, made from the store's client."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from amips_plugins.errors import InvalidInput
from amips_plugins.proxies.client import ClientProxy
from amips_plugins.proxies.late import LateRouter
from amips_plugins.routing.async_router import AsyncLearnedRouter
from amips_plugins.routing.router import LearnedRouter

__all__ = [
    "Router",
    "check_store",
    "given_or_late",
    "milvus_router",
    "qdrant_router",
    "unrouted",
]

_T = TypeVar("_T")

Router = LearnedRouter | LateRouter
Given = LearnedRouter | AsyncLearnedRouter | None


def unrouted(client: _T) -> _T:
    """Return the client itself, where a proxy stands in for it."""
    return client._amips_client if isinstance(client, ClientProxy) else client


def check_store(store: object, kind: type, helper: str) -> None:
    """Refuse what is no store of the kind that a helper routes.

    Raises
    ------
    InvalidInput
        It is something else.
    """
    if not isinstance(store, kind):
        raise InvalidInput(
            f"{helper} routes a {kind.__module__.partition('.')[0]} {kind.__name__}, but was given "
            f"a {type(store).__name__}."
        )


def qdrant_router(
    client: Any,
    name: str,
    field: Callable[[], str | None],
    router: Given,
    options: Mapping[str, Any],
) -> Router:
    """Return the router given, or one for a collection of a Qdrant client.

    Parameters
    ----------
    client
        The store's own client.
    name
        The collection.
    field
        Tells which vector the store searches, once the collection is there.
    router
        The caller's router, or None.
    options
        Arguments of ``LearnedRouter``, where none is given.

    Returns
    -------
    LearnedRouter or LateRouter
        The latter where the collection is not there yet.
    """

    def make() -> LearnedRouter:
        from amips_plugins.adapters.qdrant.collection import QdrantCollection

        return LearnedRouter(QdrantCollection(client, name, field()), **options)

    if router is None and client.collection_exists(name):
        return make()
    return given_or_late(router, options, name, make)


def milvus_router(
    client: Any, name: str, field: str | None, router: Given, options: Mapping[str, Any]
) -> Router:
    """Return the router given, or one for a collection of a Milvus client (see above)."""

    def make() -> LearnedRouter:
        from amips_plugins.adapters.milvus.collection import MilvusCollection

        return LearnedRouter(MilvusCollection(client, name, field), **options)

    if router is None and client.has_collection(name):
        return make()
    return given_or_late(router, options, name, make)


def given_or_late(
    router: Given, options: Mapping[str, Any], name: str, make: Callable[[], LearnedRouter]
) -> Router:
    """Return the router given, or one that is made with the first search.

    Raises
    ------
    InvalidInput
        There is a router, and also what to make one with.
    TypeError
        ``LearnedRouter`` does not take the options.
    """
    if router is None:
        inspect.signature(LearnedRouter).bind(None, **options)  # or only a log would say so
        return LateRouter(name, make)
    if options:
        raise InvalidInput(
            f"A router was given, and {min(options)} to make another; pass one of the two."
        )
    return router.router if isinstance(router, AsyncLearnedRouter) else router
