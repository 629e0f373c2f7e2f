"""Cells on a Qdrant server: in place, or in a copy where writing in place would cost a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from amips_plugins.adapters.qdrant.cells import CellStore, LayoutRecord
from amips_plugins.adapters.qdrant.copied_layouts import CopiedLayouts
from amips_plugins.adapters.qdrant.layouts import QdrantLayouts
from amips_plugins.adapters.qdrant.sharded_store import ShardedStore
from amips_plugins.cell_layout import AssignCells, BuildPlan, LayoutSpec, LayoutStatus, Storage
from amips_plugins.collection import Collection
from amips_plugins.errors import InvalidInput
from amips_plugins.progress import Progress, no_progress

if TYPE_CHECKING:
    from amips_plugins.adapters.qdrant.collection import QdrantCollection

__all__ = ["ServerLayouts"]


_MANY = "A search asks 8 shards or more, where asking few of them pays"


@dataclass(frozen=True, slots=True)
class _Way:
    """How cells are to be stored, and why, in sentences."""

    storage: Storage
    why: tuple[str, ...] = ()


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
        way = self._way(spec)
        if way.storage == "payload":
            plan = super().plan(spec)
            return replace(plan, notes=(*self._why_in_place(spec), *plan.notes))
        self._store.check(LayoutRecord(spec.layout, spec.version, spec.n_cells))
        plan = self._copied.plan(replace(spec, storage=way.storage), self._collection.count())
        return replace(plan, notes=(*way.why, *plan.notes))

    def build(self, spec: LayoutSpec, progress: Progress = no_progress) -> Collection:
        """Give every key its cell, in place or in a copy, while others go on reading and writing.

        Of a copy, readers of the alias never fail and never see two generations. Raises as ``plan``
        does, and where too many cells are not there at the end, or the copy is not what its source
        is; what serves is then unchanged.
        """
        way = self._way(spec)
        if way.storage == "payload":
            return super().build(spec, progress)
        self._store.check(LayoutRecord(spec.layout, spec.version, spec.n_cells))
        self._copied.build(replace(spec, storage=way.storage), progress)
        alias = spec.alias or self._name
        return (
            self._collection.current() if alias == self._name else self._collection.sibling(alias)
        )

    def status(self) -> LayoutStatus:
        """Say which cells there are; ``older`` also names a layout that was rolled back from."""
        found, copied, shards = super().status(), self._copied, self._collection.cell_shards
        return replace(
            found,
            storage=found.storage if shards is None else "shards",
            notes=() if shards is None else shards.notes(),
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

    def backfill(
        self, assign: AssignCells, progress: Progress = no_progress, *, verify: bool = False
    ) -> int:
        """Give the overflow its cells, in shard keys that are made again where they are gone."""
        store = self._store
        if isinstance(store, ShardedStore) and store.mend():
            self._collection = self._collection.current()
            self._store = self._collection._store
        return super().backfill(assign, progress, verify=verify)

    def _way(self, spec: LayoutSpec) -> _Way:
        """Choose; what was begun in one way is finished in it."""
        sharded = self._collection.cell_shards is not None
        if spec.storage == "payload" and sharded:
            raise InvalidInput(
                f"{self._name!r} has shard keys for its cells, and points change their cells there "
                "by moving: lay it out by a copy (--storage shards or copy)."
            )
        if spec.storage == "payload" or spec.layout in self._state().kept():
            return _Way("payload")
        if spec.storage == "shards":
            reason = self._obstacle() or self._copied.no_shards()
            if reason is not None:
                raise InvalidInput(
                    f"{self._name!r} can have no shard keys for its cells: {reason}. Cells in the "
                    "payload take none: --storage copy, or payload."
                )
            return _Way("shards")
        reason = self._obstacle()
        if spec.storage == "copy" and reason is not None:
            raise InvalidInput(f"{self._name!r} cannot be copied: {reason}.")
        if reason is not None:
            return _Way("payload")
        if spec.storage == "copy":
            return _Way("copy")
        named = spec.alias is not None or self._copied.alias is not None
        begun = self._copied.begun(spec.layout)
        if not (named and (begun or sharded or self._collection.is_built())):
            return _Way("payload")
        return self._copy_or_shards()

    def _copy_or_shards(self) -> _Way:
        """Give cells shard keys where a search asks many shards as it is."""
        if not self._copied.fans_out():
            return _Way("copy")
        reason = self._copied.no_shards()
        if reason is not None:
            return _Way("copy", (f"{_MANY}; but {reason}, so cells are payload.",))
        return _Way("shards", (f"{_MANY}, so every cell gets a shard key and a graph of its own.",))

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
