"""The cells of a Qdrant Edge shard: Qdrant's, with a rebuild, and graphs in them where wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from amips_plugins.adapters.qdrant.cell_shards import group_cells, notes_on_sharing
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.layouts import QdrantLayouts
from amips_plugins.adapters.qdrant_edge.store import EdgeStore
from amips_plugins.cell_layout import AssignCells, BuildPlan, LayoutSpec, LayoutStatus
from amips_plugins.collection import Collection
from amips_plugins.progress import Progress, no_progress

__all__ = ["QdrantEdgeLayouts"]

_PER_POINT = 400  # bytes beside its vector: links, ids and the sketch
_COPIES = 1.3  # of a key that may lie in several cells


class QdrantEdgeLayouts(QdrantLayouts):
    """The cells of a ``QdrantEdgeCollection``; ``optimize`` rebuilds the segments."""

    def __init__(
        self, collection: Collection, store: EdgeStore, optimize: Callable[[], None]
    ) -> None:
        super().__init__(collection, store)
        self._edge = store
        self._optimize = optimize

    def plan(self, spec: LayoutSpec) -> BuildPlan:
        """Say what a build would do, as for Qdrant; with shards what these add."""
        plan = super().plan(spec)
        shards = len(self._record(spec).shard_keys)
        if not shards:
            return plan
        step = (
            f"write the vectors once more into {shards} shards below this one, with a graph in "
            "each: searches of cells open those that they ask"
        )
        notes = (*plan.notes, *notes_on_sharing(spec.n_cells, shards, graphs=spec.graphs))
        if not spec.graphs:
            notes += (
                "the bundle's targets do not count what graphs miss, so its cells are scanned and "
                "the graphs lie idle; train with --index hnsw",
            )
        return replace(plan, steps=(*plan.steps[:3], step, *plan.steps[3:]), notes=notes)

    def build(self, spec: LayoutSpec, progress: Progress = no_progress) -> Collection:
        """Give every key its cell, and the cells their graphs."""
        self._check(spec)
        self._edge.mend(self._record(spec))
        return super().build(spec, progress)

    def status(self) -> LayoutStatus:
        """Say which cells there are."""
        found, here = super().status(), self._state().serving
        sharded = here is not None and bool(here.places)
        return replace(found, storage="shards") if sharded else found

    def roll_back(self, *, anyway: bool = False) -> Collection:
        """Serve the layout from before, without what was deleted since from its cells' shards."""
        before = self._state().before
        if before and before[-1] is not None:
            self._edge.mend(before[-1])
        return super().roll_back(anyway=anyway)

    def backfill(
        self, assign: AssignCells, progress: Progress = no_progress, *, verify: bool = False
    ) -> int:
        """Give the overflow its cells, and return how many keys got one."""
        here = self._state().serving
        if verify and here is not None:
            self._edge.mend(here)
        given = super().backfill(assign, progress, verify=verify)
        if given:
            self._optimize()
        return given

    def _record(self, spec: LayoutSpec) -> LayoutRecord:
        """Return what is to be written; what was begun in one way is finished in it."""
        begun = self._state().kept().get(spec.layout)
        record = super()._record(spec)
        if begun is not None:
            return replace(record, places=begun.places)
        if spec.storage != "shards":
            return record
        return replace(record, places=group_cells(spec.n_cells, spec.sizes, spec.centroids))

    def _n_bytes(self, spec: LayoutSpec) -> int:
        plain = super()._n_bytes(spec)
        if not self._record(spec).places:
            return plain
        copies = self._collection.count() * (_COPIES if spec.shared else 1.0)
        return plain + int(copies * (4 * self._collection.info.dim + _PER_POINT))
