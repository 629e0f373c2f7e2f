"""A database with generations of one collection behind an alias, in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.collection import Collection, Hit, SearchRequest
from amips_plugins.layout import lay_out
from amips_plugins.plan import NATIVE, QueryPlan
from tests.support.bundles import COUNT, open_bundle, vectors

NAME = "docs"


class Gone(Exception):
    """The generation was dropped, in the words of some database."""


class World:
    """What the alias names, what was dropped, and who has asked."""

    def __init__(self, serves: MemoryCollection) -> None:
        self.serves = serves
        self.dropped: list[MemoryCollection] = []
        self.looked = 0
        self.failure: Exception | None = None

    def open(self) -> Collection:
        return Handle(self, self.serves)

    def switch(self, serves: MemoryCollection, *, drop: bool = False) -> None:
        before, self.serves = self.serves, serves
        if drop:
            self.dropped.append(before)


if TYPE_CHECKING:
    Base = MemoryCollection
else:
    Base = object


class Handle(Base):
    """Pinned to one generation, as an adapter's objects are."""

    def __init__(self, world: World, generation: MemoryCollection) -> None:
        self.world = world
        self.generation = generation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generation, name)

    def current(self) -> Any:
        self.world.looked += 1
        if self.world.failure is not None:
            raise self.world.failure
        same = self.world.serves is self.generation
        return self if same else Handle(self.world, self.world.serves)

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        if any(self.generation is gone for gone in self.world.dropped):
            raise Gone("collection not found")
        return self.generation.search(request, plan)

    async def search_async(
        self, client: object, request: SearchRequest, plan: QueryPlan = NATIVE
    ) -> list[list[Hit]]:
        await asyncio.sleep(0)
        return self.search(request, plan)


def generation(number: int, folder: Path | None = None) -> MemoryCollection:
    """Generation of the collection that the tests' bundles are made for, in the cells of one."""
    fields: Sequence[dict[str, Any]] = [{"generation": number}] * COUNT
    name = NAME if number == 1 else f"{NAME}__g{number}"
    collection = MemoryCollection(vectors(), name=name, fields=fields)
    collection._info = replace(collection.info, family=NAME)
    if folder is not None:
        lay_out(collection, open_bundle(folder))
    return collection
