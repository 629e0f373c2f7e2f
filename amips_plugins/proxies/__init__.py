"""Database clients that search through a router and are otherwise what they were.

An application, or a framework, that makes its own client calls keeps making them: ``route``
returns an object that behaves as the client, and answers the plain dense queries of one
collection through the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from amips_plugins.errors import InvalidInput
from amips_plugins.routing.checks import check_target

if TYPE_CHECKING:
    from amips_plugins.proxies.late import LateRouter
    from amips_plugins.routing.async_router import AsyncLearnedRouter
    from amips_plugins.routing.observers import Observer
    from amips_plugins.routing.router import LearnedRouter

__all__ = ["route"]

_T = TypeVar("_T")

_DATABASES = {"qdrant_client": "qdrant", "pymilvus": "milvus"}


def route(
    client: _T,
    router: LearnedRouter | AsyncLearnedRouter | LateRouter,
    *,
    recall: float | None = None,
    log: Observer | None = None,
) -> _T:
    """Have a client's own searches planned by a router.

    Routed are plain dense queries of the router's collection and vector, by the collection's name
    or an alias: ``query_points`` of Qdrant, ``search`` of Milvus, one query a call. The call is
    the caller's own, but for the cells that are added to its filter or the query that is
    rewritten; its arguments keep their meaning and the result is the client's own. Every other
    call and attribute is the client's: hybrid and sparse queries, MMR, groups, ids, exact
    searches, other collections, arguments not known here.

    The proxy never raises where the client would have answered.

    Parameters
    ----------
    client
        A ``QdrantClient``, ``AsyncQdrantClient``, ``MilvusClient`` or ``AsyncMilvusClient``; it
        stays the caller's to close. A proxy is as good: that is how to route two collections.
    router
        A router of a collection of the same database. For an asynchronous client too it is one
        with its own, ordinary connection.
    recall
        Recall@k to aim at, in (0, 1]; left out, the bundle's own target.
    log
        A ``QueryLog``, or another observer of the router: it is told of every search. A router
        without a bundle searches natively, so this is the way to the queries that ``amips tune``
        and ``amips train`` read (``--queries-log``).

    Returns
    -------
    object
        Behaves as the client, ``isinstance`` included. ``amips_router`` is the router.

    Raises
    ------
    InvalidInput
        The client is none of these, or of another database than the router's collection.

    Examples
    --------
    >>> client = route(QdrantClient("http://localhost:6333"), router)  # doctest: +SKIP
    >>> client.query_points("docs", query=vector, limit=10)  # doctest: +SKIP
    """
    from amips_plugins.proxies.late import LateRouter
    from amips_plugins.routing.async_router import AsyncLearnedRouter
    from amips_plugins.routing.router import LearnedRouter

    check_target(recall, None)
    if isinstance(router, AsyncLearnedRouter):
        router = router.router
    if not isinstance(router, (LearnedRouter, LateRouter)):
        raise InvalidInput(
            f"route() was given a {type(router).__name__} for a router; pass a LearnedRouter."
        )
    kinds = {
        base.__name__: base
        for base in client.__class__.__mro__
        if base.__module__.partition(".")[0] in _DATABASES
    }
    database = next((_DATABASES[b.__module__.partition(".")[0]] for b in kinds.values()), None)
    made: Any = None
    if database == "qdrant":
        from amips_plugins.proxies import qdrant

        made = qdrant.wrap(kinds, client, router, recall)
    elif database == "milvus":
        from amips_plugins.proxies import milvus

        made = milvus.wrap(kinds, client, router, recall)
    if made is None:
        raise InvalidInput(
            f"A {type(client).__name__} cannot be routed; pass a QdrantClient, AsyncQdrantClient, "
            f"MilvusClient or AsyncMilvusClient."
        )
    if isinstance(router, LearnedRouter) and router.collection.info.database != database:
        raise InvalidInput(
            f"The router searches a collection of {router.collection.info.database}, but the "
            f"client is of {database}; make the router for a collection of that database."
        )
    if log is not None:
        if not isinstance(router, LearnedRouter):
            raise InvalidInput("There is no router to log the searches of yet; make it first.")
        router.observe(log)
    return made  # type: ignore[no-any-return] # it behaves as one
