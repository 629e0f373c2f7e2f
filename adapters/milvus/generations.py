"""The generations of one collection of Milvus: what there is, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from amips_plugins.adapters.milvus.cells import (
    BUILDING,
    generation_name,
    generation_of,
    read_cells,
)
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.cell_layout import Storage

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["Generations"]


@dataclass(frozen=True)
class Generations:
    """The generations of the family that a table belongs to."""

    client: MilvusClient
    table: Table

    @property
    def family(self) -> str:
        """The name of the first one."""
        return generation_of(self.table.name, self.table.cells)[0]

    def number(self, name: str) -> int:
        """Return the number of a generation."""
        return generation_of(name, read_cells(self.client, name))[1]

    def numbers(self) -> dict[str, int]:
        """Return all complete ones and their numbers; another's collection is none of them."""
        family = self.family
        found = {
            name: generation_of(name, read_cells(self.client, name))
            for name in self.client.list_collections()
            if name.startswith(family) and BUILDING not in name
        }
        return {name: number for name, (base, number) in found.items() if base == family}

    def unfinished(self) -> list[str]:
        """Return the copies of this family that are not complete."""
        names = [
            name
            for name in self.client.list_collections()
            if name.startswith(f"{self.family}{BUILDING}")
        ]
        return sorted(name for name in names if read_cells(self.client, name) is not None)

    def copied_from_this(self, name: str) -> bool:
        """Tell whether a collection is a copy of the table."""
        cells = read_cells(self.client, name)
        return cells is not None and cells.source == self.table.name

    def complete(self, layout: str) -> str | None:
        """Return the newest complete generation with these cells."""
        found = [
            (number, name)
            for name, number in self.numbers().items()
            if (cells := read_cells(self.client, name)) is not None and cells.layout == layout
        ]
        return max(found)[1] if found else None

    def next_name(self, storage: Storage) -> str:
        """Return a name for the next generation that nothing has, no alias either."""
        number = 1 + max(self.numbers().values())
        while self.client.has_collection(name := generation_name(self.family, number, storage)):
            number += 1
        return name
