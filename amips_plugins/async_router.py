"""The router for asyncio: the same planning, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amips_plugins.errors import InvalidInput
from amips_plugins.router import LearnedRouter
from amips_plugins.steps import run_async

if TYPE_CHECKING:
    from amips_plugins.adapters.base import Id

__all__ = ["AsyncLearnedRouter"]


class AsyncLearnedRouter:
    """Searches through an asynchronous client, as a ``LearnedRouter`` plans.

    The router follows the collection and the registry on its own connection, off the event loop;
    what serves, its counts and its observers are the same for both. Any number of tasks may share
    this object.

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
    """

    def __init__(self, router: LearnedRouter, client: Any) -> None:
        from amips_plugins.adapters.base import AsyncCollection

        if not isinstance(router.collection, AsyncCollection):
            raise InvalidInput(
                f"A {type(router.collection).__name__} has no asynchronous client; search it with "
                f"the LearnedRouter, on a thread: asyncio.to_thread(router.search, ...)."
            )
        self.router = router
        self._client = client

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
    ) -> Any:
        """Search; arguments, result and errors are those of ``LearnedRouter.search``."""
        steps = self.router.steps(
            queries,
            k,
            recall=recall,
            n_probes=n_probes,
            filter=filter,
            fields=fields,
            params=params,
            timeout=timeout,
            explain=explain,
        )
        return await run_async(steps, self._client)

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
