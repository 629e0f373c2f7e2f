"""How the cells of Milvus are named, and how a collection says that it has some.

A laid-out collection says so in the properties it was created with (a server forgets properties
altered later when it restarts). Its cells are partitions, with the overflow in Milvus' own
``_default``, or values of the field ``amips_cell``, where the overflow is -1.

Where keys lie in more cells than one, a key has a row in the partition of each: a server returns
equal ids once. What we have to know of such rows lies in Milvus' dynamic field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.cell_layout import Storage

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = [
    "BUILDING",
    "CELLS_FIELD",
    "CELL_FIELD",
    "COPY_FIELD",
    "DEFAULT_PARTITION",
    "RESERVED",
    "SKETCH_FIELD",
    "STAMP_FIELD",
    "CellProperties",
    "building_name",
    "draining",
    "generation_name",
    "generation_of",
    "is_ours",
    "read_cells",
]

RESERVED = "amips_"
"""What everything of ours in users' rows begins with."""
CELL_FIELD = "amips_cell"
SKETCH_FIELD = "amips_sketch"
COPY_FIELD = "amips_copy"  # of all rows of a key but the one in its own cell
CELLS_FIELD = "amips_cells"  # of a key in several: all of them, its own first
STAMP_FIELD = "amips_stamp"  # and the write that its rows are of
BUILDING = "__building_"  # in the name of a copy that is not complete
DEFAULT_PARTITION = "_default"  # where Milvus puts a row that names no partition

_GENERATION = re.compile(r"(.*)__g(\d+)f?")
_PROPERTY = "amips."


@dataclass(frozen=True, slots=True)
class CellProperties:
    """The cells of a laid-out table (see ``LayoutSpec``), and the ``source`` it was copied from.

    ``family`` is the name of the first generation; those of older versions do not say it, nor
    whether keys may lie in several cells, which they did not.
    """

    layout: str
    n_cells: int
    version: str
    storage: Storage
    source: str
    index: str
    family: str
    shared: bool = False

    def properties(self) -> dict[str, str]:
        """Write them as properties of a collection."""
        return {f"{_PROPERTY}{name}": str(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def read(cls, properties: Mapping[str, str]) -> CellProperties | None:
        """Read what ``properties`` wrote, or None."""
        found = {name: properties.get(f"{_PROPERTY}{name}") for name in cls.__slots__}
        storage = found["storage"]
        if storage not in ("partitions", "field") or not str(found["n_cells"]).isdigit():
            return None
        return cls(
            layout=str(found["layout"]),
            n_cells=int(str(found["n_cells"])),
            version=found["version"] or "",
            storage="partitions" if storage == "partitions" else "field",
            source=found["source"] or "",
            index=found["index"] or "FLAT",
            family=found["family"] or "",
            shared=found["shared"] == str(True),
        )

    def partition(self, cell: int) -> str:
        """Return the partition of a cell, the overflow's too."""
        return DEFAULT_PARTITION if cell == OVERFLOW else f"cell_{self.layout}_{cell:04d}"


def is_ours(name: str) -> bool:
    """Tell whether a field is ours, and none that users know of."""
    return name.startswith(RESERVED)


def read_cells(client: MilvusClient, name: str) -> CellProperties | None:
    """Read the cells of a collection from its properties."""
    return CellProperties.read(client.describe_collection(name).get("properties") or {})


def draining(target: str) -> str:
    """Return the alias that names the source of a switch while late writes are copied from it."""
    return f"{target}__draining"


def generation_of(name: str, cells: CellProperties | None) -> tuple[str, int]:
    """Split the name of a generation: ``docs__g3`` is number 3 of ``docs``, itself number 1.

    A collection without cells is the first of its own family, whatever it is called.
    """
    match = _GENERATION.fullmatch(name)
    if cells is None or match is None:
        return (cells.family if cells is not None and cells.family else name), 1
    return cells.family or match[1], int(match[2])


def generation_name(family: str, number: int, storage: Storage) -> str:
    """Return the name of a generation.

    Those with a cell field have names of their own, since clients cache the fields behind a name.
    """
    return f"{family}__g{number}{'f' if storage == 'field' else ''}"


def building_name(family: str, layout: str, storage: Storage) -> str:
    """Return the name of a copy that is not complete, of its own for each storage as above."""
    return f"{family}{BUILDING}{layout}{'_field' if storage == 'field' else ''}"
