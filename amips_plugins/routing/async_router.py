"""The router for asyncio: the same planning, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from amips_plugins.collection import Id
from amips_plugins.errors import InvalidInput
from amips_plugins.routing.checks import Matrix, SearchOptions, Vector, as_search
from amips_plugins.routing.effects import run_async
from amips_plugins.routing.hits import Hits
from amips_plugins.routing.router import LearnedRouter

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AsyncLearnedRouter"]


class AsyncLearnedRouter:
    """Searches through an asynchronous client, as a ``LearnedRouter`` plans.

    The router follows the collection and the registry on its own connection, off the event loop;
    what serves, its counts and its observers are the same for both. Any number of tasks may share
    this object. A task that is cancelled, or runs out of time, leaves nothing behind.

    A model plans on the event loop where that is sure to take no more than milliseconds (a
    bundle's own model and a batch of any usual size), else on a thread.

    Make one in every process, on its own event loop: neither can be taken to another process, by
    pickling or by a fork. In a server of many processes leave ``threads`` at 1, so that each takes
    the core that it has; more of them help large batches in a process that has the cores to
    itself (see ``LearnedRouter``).

    Parameters
    ----------
    router
        What plans.
    client
        An ``AsyncMilvusClient`` or ``AsyncQdrantClient`` of the same database; it stays the
        caller's to close. A collection in memory takes None.

    Raises
    ------
    InvalidInput
        The router's collection cannot be searched so.

    Examples
    --------
    With the collection's own connection beside the asynchronous one, or with the latter alone:

    >>> router = AsyncLearnedRouter(LearnedRouter(collection), client)  # doctest: +SKIP
    >>> router = await AsyncLearnedRouter.open(client, "docs")  # doctest: +SKIP
    >>> hits = await router.search(query, k=10)  # doctest: +SKIP
    """

    def __init__(self, router: LearnedRouter, client: Any) -> None:
        if not hasattr(router.collection, "search_async"):
            raise InvalidInput(
                f"A {type(router.collection).__name__} has no asynchronous client; search it with "
                f"the LearnedRouter, on a thread: asyncio.to_thread(router.search, ...)."
            )
        self.router = router
        self._client = client

    @classmethod
    async def open(
        cls, client: Any, name: str, field: str | None = None, **options: Any
    ) -> AsyncLearnedRouter:
        """Make a router of an asynchronous client alone.

        The router looks around through the same client, on threads of its own that wait for this
        event loop. Its ``router.search`` and whatever else of it blocks work on other threads
        only, for as long as the loop runs. ``AsyncMilvusClient`` cannot tell when an index other
        than FLAT is complete, so lay a collection out with ``amips layout``.

        Parameters
        ----------
        client
            An ``AsyncMilvusClient`` or ``AsyncQdrantClient``; it stays the caller's to close.
        name
            Name or alias of the collection.
        field
            The vector field; may be left out where there is only one.
        options
            Those of ``LearnedRouter``: ``registry``, ``bundle``, ``hook``, ``refresh`` and so on.

        Raises
        ------
        InvalidInput
            It is no asynchronous client, or an option cannot be used.
        CollectionError
            There is no such collection or field, or it cannot be served.
        BundleError
            The ``bundle`` given cannot serve the collection.
        """
        from amips_plugins.adapters.sync_facade import open_blocking

        collection = open_blocking(client, name, field, asyncio.get_running_loop())
        return cls(await asyncio.to_thread(LearnedRouter, collection, **options), client)

    @overload
    async def search(
        self, queries: Matrix, k: int = 10, **options: Unpack[SearchOptions]
    ) -> list[Hits]: ...

    @overload
    async def search(
        self, queries: Vector, k: int = 10, **options: Unpack[SearchOptions]
    ) -> Hits: ...

    async def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        recall: float | None = None,
        n_probes: int | None = None,
        filter: Any = None,  # noqa: A002 - both databases call it so
        fields: Sequence[str] = (),
        params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        explain: bool = False,
    ) -> Hits | list[Hits]:
        """Search; arguments, result and errors are those of ``LearnedRouter.search``."""
        request, target, single = as_search(
            self.router.collection.info.dim,
            queries,
            k,
            recall,
            n_probes,
            filter,
            fields,
            params,
            timeout,
        )
        effects = self.router.search_effects(request, target, explain=explain)
        found = await run_async(effects, self._client)
        return found[0] if single else found

    async def upsert(
        self,
        ids: Sequence[Id],
        vectors: Any,
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write keys as ``LearnedRouter.upsert`` does, on a thread."""
        await asyncio.to_thread(self.router.upsert, ids, vectors, fields)

    async def delete(self, ids: Sequence[Id]) -> None:
        """Delete keys as ``LearnedRouter.delete`` does, on a thread."""
        await asyncio.to_thread(self.router.delete, ids)

    async def refresh(self) -> bool:
        """Look at the database and the registry as ``LearnedRouter.refresh`` does, on a thread."""
        return await asyncio.to_thread(self.router.refresh)

    def __reduce__(self) -> Any:
        raise TypeError(
            "An AsyncLearnedRouter belongs to an event loop and cannot be pickled; make one in "
            "every process."
        )
