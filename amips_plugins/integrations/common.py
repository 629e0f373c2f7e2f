"""What the integrations share: the router of a store's collection, made from the store's client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from amips_plugins.async_router import AsyncLearnedRouter
from amips_plugins.errors import InvalidInput
from amips_plugins.proxies.client import ClientProxy
from amips_plugins.proxies.late import LateRouter
from amips_plugins.router import LearnedRouter

__all__ = ["Router", "check_store", "milvus_router", "qdrant_router", "unrouted"]

_T = TypeVar("_T")

Router = LearnedRouter | LateRouter


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
    router: LearnedRouter | AsyncLearnedRouter | None,
    options: dict[str, Any],
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
    if router is not None:
        return _given(router, options)

    def make() -> LearnedRouter:
        from amips_plugins.adapters.qdrant import QdrantCollection

        return LearnedRouter(QdrantCollection(client, name, field()), **options)

    return make() if client.collection_exists(name) else LateRouter(name, make)


def milvus_router(
    client: Any,
    name: str,
    field: str | None,
    router: LearnedRouter | AsyncLearnedRouter | None,
    options: dict[str, Any],
) -> Router:
    """Return the router given, or one for a collection of a Milvus client."""
    if router is not None:
        return _given(router, options)

    def make() -> LearnedRouter:
        from amips_plugins.adapters.milvus import MilvusCollection

        return LearnedRouter(MilvusCollection(client, name, field), **options)

    return make() if client.has_collection(name) else LateRouter(name, make)


def _given(router: LearnedRouter | AsyncLearnedRouter, options: dict[str, Any]) -> LearnedRouter:
    if options:
        raise InvalidInput(
            f"A router was given, and {min(options)} to make another; pass one of the two."
        )
    return router.router if isinstance(router, AsyncLearnedRouter) else router
