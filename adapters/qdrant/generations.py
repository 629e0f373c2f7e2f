"""The generations of one Qdrant collection: what they are called, and which one serves.

A copy in cells is a collection of its own, ``docs__g2`` of ``docs``, and an alias names the one
that is searched. What a generation is stands in its metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from amips_plugins.errors import require

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["GENERATION_KEY", "Generation", "Generations", "generation_of"]

GENERATION_KEY = "amips_generation"
"""The metadata entry that tells what a generation is."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One of them, number 1 the ``family``'s first, as its metadata keep it.

    ``source`` is what it was copied from, ``layout`` the cells that it was made for; ``complete``,
    it has served, or may. While ``draining``, what was written to the source shortly before the
    switch may be missing.
    """

    family: str
    number: int = 1
    source: str = ""
    layout: str = ""
    complete: bool = True
    draining: bool = False

    def entry(self) -> dict[str, Any]:
        """Return the change to the metadata that makes them say this."""
        return {GENERATION_KEY: asdict(self)}


def generation_of(name: str, metadata: Mapping[str, Any] | None) -> Generation:
    """Read what a collection is; whatever no copy of ours made is the first of its family."""
    try:
        found = Generation(**(metadata or {})[GENERATION_KEY])
    except (KeyError, TypeError):
        return Generation(name)
    # A collection that others copied or renamed has the metadata of another one.
    return found if name == _named(found.family, found.number) else Generation(name)


def _named(family: str, number: int) -> str:
    return family if number == 1 else f"{family}__g{number}"


@dataclass(frozen=True)
class Generations:
    """The generations of one family, and the aliases of the database."""

    client: QdrantClient
    family: str

    def all(self) -> dict[str, Generation]:
        """Return those that there are, by their names, oldest first."""
        pattern = re.compile(rf"{re.escape(self.family)}(__g\d+)?")
        names = [
            found.name
            for found in self.client.get_collections().collections
            if pattern.fullmatch(found.name)
        ]
        found = {name: self.read(name) for name in names}
        ours = {name: one for name, one in found.items() if one.family == self.family}
        return dict(sorted(ours.items(), key=lambda item: item[1].number))

    def read(self, name: str) -> Generation:
        """Read what a collection is."""
        return generation_of(name, self.client.get_collection(name).config.metadata)

    def next(self, source: str, layout: str) -> tuple[str, Generation]:
        """Return a name for the next one that nothing has, no alias either."""
        taken = {found.name for found in self.client.get_collections().collections}
        taken |= set(self.aliases())
        number = 1 + max((one.number for one in self.all().values()), default=1)
        while (name := _named(self.family, number)) in taken:
            number += 1
        return name, Generation(self.family, number, source, layout, complete=False)

    def aliases(self) -> dict[str, str]:
        """Return all aliases and what they name."""
        found = self.client.get_aliases().aliases
        return {one.alias_name: one.collection_name for one in found}

    def point(self, alias: str, name: str) -> None:
        """Have an alias name a collection, in one step."""
        gone = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))
        here = models.CreateAliasOperation(
            create_alias=models.CreateAlias(collection_name=name, alias_name=alias)
        )
        there = [gone] if alias in self.aliases() else []
        self.client.update_collection_aliases([*there, here])
