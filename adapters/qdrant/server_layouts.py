"""Cells on a Qdrant server: in place, or in a copy where writing in place would cost a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from amips_plugins.adapters.qdrant.cells import CellStore, LayoutRecord
from amips_plugins.adapters.qdrant.copied_layouts import CopiedLayouts
from amips_plugins.adapters.qdrant.layouts import QdrantLayouts
from amips_plugins.cell_layout import BuildPlan, LayoutSpec, LayoutStatus
from amips_plugins.collection import Collection
from amips_plugins.errors import InvalidInput
from amips_plugins.progress import Progress, no_progress

if TYPE_CHECKING:
    from amips_plugins.adapters.qdrant.collection import QdrantCollection

__all__ = ["ServerLayouts"]


class ServerLayouts(QdrantLayouts):
    """The cells of one vector of a collection on a server (see ``Layouts``)."""

    _collection: QdrantCollection

    def __init__(
        self, collection: QdrantCollection, store: CellStore, copied: CopiedLayouts
    ) -> None:
        super().__init__(collection, store)
        self._copied = copied

    def plan(self, spec: LayoutSpec) -> BuildPlan:
        """Check whether the cells can be built, and say how; change nothing."""
        if not self._copies(spec):
            plan = super().plan(spec)
            return replace(plan, notes=(*self._why_in_place(spec), *plan.notes))
        self._store.check(LayoutRecord(spec.layout, spec.version, spec.n_cells))
        return self._copied.plan(spec, self._collection.count())

    def build(self, spec: LayoutSpec, progress: Progress = no_progress) -> Collection:
        """Give every key its cell, in place or in a copy, while others go on reading and writing.

        Of a copy, readers of the alias never fail and never see two generations. Raises as ``plan``
        does, and where too many cells are not there at the end, or the copy is not what its source
        is; what serves is then unchanged.
        """
        if not self._copies(spec):
            return super().build(spec, progress)
        self._store.check(LayoutRecord(spec.layout, spec.version, spec.n_cells))
        self._copied.build(spec, progress)
        alias = spec.alias or self._name
        return (
            self._collection.current() if alias == self._name else self._collection.sibling(alias)
        )

    def status(self) -> LayoutStatus:
        """Say which cells there are; ``older`` also names a layout that was rolled back from."""
        found, copied = super().status(), self._copied
        return replace(
            found,
            older=(*copied.older(), *found.older),
            unfinished=(*copied.unfinished(), *found.unfinished),
        )

    def roll_back(self, *, anyway: bool = False) -> Collection:
        """Serve the layout from before, none, or the collection that this is a copy of.

        Before and after the alias moves back, what was written to the copy is copied to the old
        collection (there it is overflow).
        """
        if self._state().before:
            return super().roll_back(anyway=anyway)
        if self._copied.roll_back(anyway=anyway) is None:
            return super().roll_back(anyway=anyway)  # which says that there is none
        return self._collection.current()

    def drop_old(self, *, anyway: bool = False) -> list[str]:
        """Drop older generations, and the cells of every layout that does not serve."""
        return [*self._copied.drop_old(anyway=anyway), *super().drop_old(anyway=anyway)]

    def _copies(self, spec: LayoutSpec) -> bool:
        """Choose; what was begun in one way is finished in it."""
        if spec.storage == "payload" or spec.layout in self._state().kept():
            return False
        reason = self._obstacle()
        if spec.storage == "copy" and reason is not None:
            raise InvalidInput(f"{self._name!r} cannot be copied: {reason}.")
        if reason is not None:
            return False
        if spec.storage == "copy":
            return True
        named = spec.alias is not None or self._copied.alias is not None
        begun = self._copied.begun(spec.layout)
        return named and (begun or self._collection.is_built())

    def _obstacle(self) -> str | None:
        """Say why there can be no copy, or None."""
        if self._collection.custom_shards:
            return "its custom shard keys are its owner's to make"
        return None

    def _why_in_place(self, spec: LayoutSpec) -> Sequence[str]:
        if spec.storage == "payload" or not self._collection.is_built():
            return ()
        return (
            f"{self._obstacle() or 'it was opened by its own name'}, so cells are written in "
            "place. Opened by an alias (or with --alias NAME, which applications then search) it "
            "would be copied, and others' searches would notice nothing.",
        )
