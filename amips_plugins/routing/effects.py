"""What a search waits for, as values: one plan of action for threads and for tasks.

A search is a generator. It yields a step, is sent the step's result (or thrown its error), and
returns the answer in the end. ``run`` performs the steps one after the other on the caller's
thread; ``run_async`` awaits them. Everything between two steps is the same code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from amips_plugins.background.abandonable import start
from amips_plugins.collection import AsyncCollection, Collection, SearchRequest
from amips_plugins.plan import PreQueryHook, QueryPlan, Target
from amips_plugins.vectors import FloatArray

__all__ = ["InThread", "Plan", "Search", "Step", "Steps", "run", "run_async"]

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
class Plan:
    """Have a hook plan, and wait no longer than some seconds for it."""

    hook: PreQueryHook
    queries: FloatArray
    target: Target
    seconds: float

    def perform(self) -> Any:
        """Plan.

        Raises
        ------
        TimeoutError
            It took too long, and goes on in vain.
        """
        return start(self._job()).result(self.seconds)

    async def perform_async(self, client: Any) -> Any:  # noqa: ARG002 - steps have one signature
        """Plan, while other tasks run."""
        return await asyncio.wait_for(asyncio.wrap_future(start(self._job())), self.seconds)

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

    async def perform_async(self, client: Any) -> Any:  # noqa: ARG002 - steps have one signature
        """Do it on a thread."""
        return await asyncio.to_thread(self.job)


class Step(Protocol):
    """Something to do before a search goes on: one of the above, or a caller's own."""

    def perform(self) -> Any:
        """Do it."""
        ...

    async def perform_async(self, client: Any) -> Any:
        """Do it while other tasks run."""
        ...


Steps = Generator[Step, Any, _T]


def run(steps: Steps[_T]) -> _T:
    """Perform steps on this thread, and return what they come to."""
    try:
        step = next(steps)
        while True:
            try:
                result = step.perform()
            except Exception as exc:  # noqa: BLE001, PERF203 - the steps decide what it means
                step = steps.throw(exc)
            else:
                step = steps.send(result)
    except StopIteration as end:
        value: _T = end.value
        return value


async def run_async(steps: Steps[_T], client: Any) -> _T:
    """Perform steps through an asynchronous client, and return what they come to."""
    try:
        step = next(steps)
        while True:
            try:
                result = await step.perform_async(client)
            except Exception as exc:  # noqa: BLE001, PERF203 - the steps decide what it means
                step = steps.throw(exc)
            else:
                step = steps.send(result)
    except StopIteration as end:
        value: _T = end.value
        return value
