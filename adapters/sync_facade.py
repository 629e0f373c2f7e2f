"""An asynchronous client, for code that blocks: what the router does aside from searching.

A client belongs to the event loop that it was first used on. Threads other than the loop's own
hand their calls over to it, and wait.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from concurrent.futures import CancelledError, wait
from functools import partial
from typing import Any

from amips_plugins.collection import AsyncCollection
from amips_plugins.errors import CollectionError, DatabaseUnreachable, InvalidInput

__all__ = ["BlockingClient", "open_blocking"]

_LOOK = 0.2  # seconds after which a waiting thread looks whether the event loop still runs


class BlockingClient:
    """Has what an asynchronous client has; its coroutines are calls that block.

    A call ends when the client says so or the event loop ends (``DatabaseUnreachable``); from the
    loop's own thread, where it would wait for itself, it is refused.
    """

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return partial(self._call, name) if callable(found) else found

    def _call(self, name: str, *arguments: Any, **more: Any) -> Any:
        answer = getattr(self._client, name)(*arguments, **more)
        return self._result(answer) if inspect.iscoroutine(answer) else answer

    def _result(self, call: Coroutine[Any, Any, Any]) -> Any:
        problem = self._problem()
        if problem is not None:
            call.close()
            raise problem
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            while not wait([future], _LOOK).done:
                if not self._loop.is_running():
                    raise _stopped()
            return future.result()
        except CancelledError as exc:  # what happens to all tasks when ``asyncio.run`` ends
            raise _stopped() from exc
        finally:
            future.cancel()
            if inspect.getcoroutinestate(call) == inspect.CORO_CREATED:
                call.close()  # it was handed over, and the loop stopped before it looked

    def _problem(self) -> CollectionError | None:
        if not self._loop.is_running():
            return _stopped()
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            return None
        if here is not self._loop:
            return None
        return CollectionError(
            "This call blocks, on the event loop that it waits for; make it on a thread: "
            "asyncio.to_thread(...)."
        )


class _BlockingMilvusClient(BlockingClient):
    """What ``pymilvus.AsyncMilvusClient`` answers in another form than ``MilvusClient``."""

    def list_aliases(self, *arguments: Any, **more: Any) -> Any:
        found = self._call("list_aliases", *arguments, **more)
        return found if isinstance(found, dict) else {"aliases": list(found)}


def _stopped() -> DatabaseUnreachable:
    return DatabaseUnreachable(
        "The event loop of the asynchronous client does not run any more; make the client and "
        "what uses it anew on the one that does."
    )


def open_blocking(
    client: Any, name: str, field: str | None, loop: asyncio.AbstractEventLoop
) -> AsyncCollection:
    """Open a collection through a client used on ``loop``, for use on threads; nothing is asked."""
    homes = {kind.__module__.partition(".")[0] for kind in type(client).__mro__}
    blocking: Any
    if "pymilvus" in homes and inspect.iscoroutinefunction(getattr(client, "search", None)):
        from amips_plugins.adapters.milvus.collection import MilvusCollection

        blocking = _BlockingMilvusClient(client, loop)
        return MilvusCollection(blocking, name, field)
    if "qdrant_client" in homes and inspect.iscoroutinefunction(
        getattr(client, "query_points", None)
    ):
        from amips_plugins.adapters.qdrant.collection import QdrantCollection

        blocking = BlockingClient(client, loop)
        return QdrantCollection(blocking, name, field)
    raise InvalidInput(
        f"A {type(client).__name__} is no asynchronous client of a database; pass an "
        f"AsyncMilvusClient or an AsyncQdrantClient."
    )
