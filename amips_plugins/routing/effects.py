"""What a search waits for, as values: one course of action for threads and for tasks.

A search is a generator. It yields an effect, is sent its result (or thrown its error), and returns
the answer in the end. ``run`` performs the effects one after the other on the caller's thread;
``run_async`` awaits them. Everything between two effects is the same code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from amips_plugins.background.abandonable import run_abandonable
from amips_plugins.collection import AsyncCollection, Collection, SearchRequest
from amips_plugins.plan import PreQueryHook, QueryPlan, Target
from amips_plugins.vectors import FloatArray

__all__ = [
    "Effect",
    "Effects",
    "InThread",
    "PlanEffect",
    "Search",
    "SearchBy",
    "run",
    "run_async",
    "search_collection",
]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Search:
    """Search a collection by a plan; gives the hits of every query."""

    collection: Collection
    request: SearchRequest
    plan: QueryPlan

    def perform(self) -> Any:
        """Search."""
        return self.collection.search(self.request, self.plan)

    async def perform_async(self, client: Any) -> Any:
        """Search through an asynchronous client."""
        collection: AsyncCollection = self.collection  # type: ignore[assignment] # checked before
        return await collection.search_async(client, self.request, self.plan)


@dataclass(frozen=True, slots=True)
class PlanEffect:
    """Have a hook plan, and wait no longer than some seconds for it."""

    hook: PreQueryHook
    queries: FloatArray
    target: Target
    seconds: float

    def perform(self) -> Any:
        """Plan, or raise ``TimeoutError``; what takes too long goes on in vain."""
        return run_abandonable(self._job()).result(self.seconds)

    async def perform_async(self, client: Any) -> Any:  # noqa: ARG002 - effects have one signature
        """Plan, while other tasks run."""
        return await asyncio.wait_for(
            asyncio.wrap_future(run_abandonable(self._job())), self.seconds
        )

    def _job(self) -> Callable[[], QueryPlan]:
        # A copy, because a hook that is late reads it when the caller already has it back.
        return partial(self.hook.plan, self.queries.copy(), self.target)


@dataclass(frozen=True, slots=True)
class InThread:
    """Do something that waits for the database, other than a search."""

    job: Callable[[], Any]

    def perform(self) -> Any:
        """Do it."""
        return self.job()

    async def perform_async(self, client: Any) -> Any:  # noqa: ARG002 - effects have one signature
        """Do it on a thread."""
        return await asyncio.to_thread(self.job)


class Effect(Protocol):
    """Something to do before a search goes on: one of the above, or a caller's own."""

    def perform(self) -> Any:
        """Do it."""
        ...

    async def perform_async(self, client: Any) -> Any:
        """Do it while other tasks run."""
        ...


Effects = Generator[Effect, Any, _T]

SearchBy = Callable[[Collection, SearchRequest, QueryPlan], Effects[list[Any]]]
"""Searches a collection by a plan, and returns the hits of every query."""


def search_collection(
    collection: Collection, request: SearchRequest, plan: QueryPlan
) -> Effects[list[Any]]:
    """Search through the collection's own client: the way to search unless another is handed in."""
    found: list[Any]
    if plan.exact:
        found = yield InThread(partial(collection.exact, request))
    else:
        found = yield Search(collection, request, plan)
    return found


def run(effects: Effects[_T]) -> _T:
    """Perform effects on this thread, and return what they come to."""
    try:
        effect = next(effects)
        while True:
            try:
                result = effect.perform()
            except Exception as exc:  # noqa: BLE001, PERF203 - the search decides what it means
                effect = effects.throw(exc)
            else:
                effect = effects.send(result)
    except StopIteration as end:
        value: _T = end.value
        return value


async def run_async(effects: Effects[_T], client: Any) -> _T:
    """Perform effects through an asynchronous client, and return what they come to."""
    try:
        effect = next(effects)
        while True:
            try:
                result = await effect.perform_async(client)
            except Exception as exc:  # noqa: BLE001, PERF203 - the search decides what it means
                effect = effects.throw(exc)
            else:
                effect = effects.send(result)
    except StopIteration as end:
        value: _T = end.value
        return value
