"""Cells in the payload of Qdrant's points: the steps, whichever engine holds the points.

A build takes as many passes over the points without a cell as others' writing makes necessary, so
that going on after a crash is the same as another pass. A pass first *claims* its points by writing
-1, then reads their vectors, then writes the cells where the claim still stands: an upsert by
another client replaces the payload and so takes the claim away, and the new vector cannot get the
old one's cell. Two gaps remain, which cost recall and never a key. ``update_vectors`` keeps the
payload, and with it the cell of the vector before: such a point is found where its old vector was,
until an upsert or a new layout places it again. And where two passes run at once, an upsert between
the claims of both can be claimed by the second and get the first one's cell.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cells import (
    CELL_PREFIX,
    CellStore,
    LayoutState,
    Record,
    cell_key,
)
from amips_plugins.cell_layout import (
    AssignCells,
    BuildPlan,
    LayoutAudit,
    LayoutSpec,
    LayoutStatus,
    check_assigned,
    check_name,
)
from amips_plugins.collection import Collection, Id
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.progress import Progress, Step, no_progress

__all__ = ["QdrantLayouts"]

_SAMPLE = 1000  # keys read to guess how long a build takes
_READS = 2  # every key is read once with its vector, and looked at in passes
_PER_KEY = 56  # bytes beside the payload key's name: value, index (both ways), block overhead
_SPARE = 2  # free disk wanted, in multiples of what will be stored: payload is rewritten
_FEW = 0.001  # a pass that placed at most this share of the keys was the last one
_MISSED = 0.05  # share of the keys that others' writing may leave without a cell,
_MISSED_FEW = 5  # and this many of a small collection


class QdrantLayouts:
    """The cells of one vector of a Qdrant collection (see ``adapters.layouts.Layouts``).

    Builds of different layouts may run at the same time, but the operator should start one after
    the other: each rewrites the same small metadata entry.

    Parameters
    ----------
    collection
        Reads, and finds itself again after a change.
    store
        Where the collection's points and metadata are.
    seconds_per_write
        About how long a cell takes to write; only ``plan`` uses it.
    """

    def __init__(
        self, collection: Collection, store: CellStore, seconds_per_write: float = 5e-5
    ) -> None:
        self._collection = collection
        self._store = store
        self._seconds_per_write = seconds_per_write

    def plan(self, spec: LayoutSpec) -> BuildPlan:
        """Check whether the cells can be built, and say what that would do; change nothing.

        The bytes are the payload and its index for every key, by a rule of thumb; the seconds
        follow from reading some keys now and a rule of thumb for a write.

        Raises
        ------
        InvalidInput
            The collection has these cells already, or the identifier cannot be used.
        CollectionError
            Strict mode forbids what cells need, the payload key is somebody else's, the disk has
            too little room, or the server keeps no metadata.
        """
        self._check(spec)
        key, keys = cell_key(spec.layout), self._collection.count()
        n_bytes = self._n_bytes(spec)
        steps = (
            f"write a marker into the metadata of {self._name!r}",
            f"create an integer index of the payload key {key!r}",
            f"write one of {spec.n_cells} cells into the payload of {keys} points, in place",
            "verify that every point has a cell or is overflow",
            f"point the metadata at {spec.layout!r}; what serves now is kept to roll back to",
        )
        return BuildPlan(steps, keys, n_bytes, self._seconds(keys), self._store.notes())

    def build(self, spec: LayoutSpec, progress: Progress = no_progress) -> Collection:
        """Give every key its cell, in place, while others go on reading and writing.

        Run again after an interruption it goes on: keys that have a cell are not written again.

        Raises
        ------
        InvalidInput, CollectionError
            As for ``plan``; and too many cells are not there at the end, or something else than
            cells is. The layout in force is then unchanged.
        """
        known = spec.layout in self._check(spec).kept()
        key = cell_key(spec.layout)
        record = Record(spec.layout, spec.version, spec.n_cells)
        if not known:
            self._mark(replace(record, complete=False))
        self._store.create_index(key)
        if not known:
            self._refuse_foreign_at_last(key)
        keys = self._collection.count()
        with progress("cells", keys, keys - self._store.overflow(key), "keys") as step:
            _, left = self._fill(key, spec.n_cells, spec.assign, step)
        self._refuse_foreign(key, spec.n_cells)
        lost = self._store.overflow(key) - left
        if lost > _MISSED_FEW + _MISSED * keys:
            raise CollectionError(
                f"{lost} of the {keys} cells written to collection {self._name!r} are not there; "
                "build them again when others write less."
            )
        now = self._state()
        kept = now.without(spec.layout)
        if now.serving is None or now.serving.layout != spec.layout:
            kept = replace(kept, serving=record, before=(*kept.before, now.serving))
        self._write(kept)
        return self._collection.current()

    def status(self) -> LayoutStatus:
        """Say which cells there are; ``older`` also names a layout that was rolled back from."""
        state = self._state()
        here, kept = state.serving, state.kept().values()
        return LayoutStatus(
            self._name,
            None if here is None else here.layout,
            None if here is None else here.version,
            None if here is None else "payload",
            self._collection.count(),
            0 if here is None else self._store.overflow(cell_key(here.layout)),
            unfinished=tuple(one.layout for one in kept if not one.complete),
            older=tuple(one.layout for one in kept if one.complete),
        )

    def roll_back(self, *, anyway: bool = False) -> Collection:  # noqa: ARG002 - all cells hold the same keys
        """Serve the layout from before, or none, and return that; ``drop_old`` removes the other.

        Raises
        ------
        InvalidInput
            Nothing is kept to roll back to.
        """
        state = self._state()
        if not state.before:
            raise InvalidInput(f"{self._name!r} has no earlier cells to roll back to.")
        idle = state.idle if state.serving is None else (*state.idle, state.serving)
        self._write(LayoutState(state.before[-1], state.before[:-1], idle))
        return self._collection.current()

    def drop_old(self, *, anyway: bool = False) -> list[str]:  # noqa: ARG002 - cells go, no key does
        """Remove the cells of every layout that does not serve; return their names."""
        state = self._state()
        dropped = list(state.kept().values())
        # First nobody can roll back to what is about to go; the names stay until it is gone.
        going = tuple(replace(one, complete=False) for one in dropped)
        self._write(LayoutState(state.serving, (), going))
        for one in dropped:
            self._store.remove_cells(cell_key(one.layout))
            self._store.drop_index(cell_key(one.layout))
            self._write(self._state().without(one.layout))
        return [one.layout for one in dropped]

    def audit(self, sample: int, assign: AssignCells | None = None) -> LayoutAudit:  # noqa: ARG002
        """Look whether keys lie in the cells of their own vectors; change nothing."""
        if self._state().serving is None:
            raise InvalidInput(f"{self._name!r} has no cells; lay it out first.")
        return LayoutAudit(0, 0)

    def backfill(
        self,
        assign: AssignCells,
        progress: Progress = no_progress,
        *,
        verify: bool = False,  # noqa: ARG002
    ) -> int:
        """Give the overflow its cells, and return how many keys got one.

        Raises
        ------
        InvalidInput
            The collection has no cells, or others than when this object was opened.
        """
        here, opened = self._state().serving, self._collection.layout()
        if here is None and opened is None:
            raise InvalidInput(f"{self._name!r} has no cells; lay it out first.")
        if here is None or here.layout != opened:
            raise InvalidInput(
                f"The cells of {self._name!r} have changed since it was opened; open it again and "
                "use the bundle of the cells it has now."
            )
        key = cell_key(here.layout)
        with progress("backfill", self._store.overflow(key), 0, "keys") as step:
            given, _ = self._fill(key, here.n_cells, assign, step)
        return given

    @property
    def _name(self) -> str:
        return self._collection.info.name

    def _state(self) -> LayoutState:
        return LayoutState.read(self._store.metadata(), self._collection.info.field)

    def _write(self, state: LayoutState) -> None:
        self._store.write_metadata(state.entry(self._collection.info.field))

    def _mark(self, record: Record) -> None:
        state = self._state()
        self._write(replace(state, idle=(*state.idle, record)))
        if record.layout not in self._state().kept():  # an older server drops it silently
            raise CollectionError(
                f"The server keeps no metadata of collection {self._name!r}, and cells need it; "
                "use Qdrant 1.16 or newer."
            )

    def _check(self, spec: LayoutSpec) -> LayoutState:
        """Refuse what cannot be built, before anything is changed."""
        check_name(spec)
        state = self._state()
        if state.serving is not None and state.serving.layout == spec.layout:
            raise InvalidInput(f"{self._name!r} has the cells {spec.layout!r} already.")
        found = state.kept().get(spec.layout)
        if found is not None and found.n_cells != spec.n_cells:
            raise InvalidInput(
                f"{self._name!r} holds cells {spec.layout!r} that were begun with {found.n_cells} "
                f"cells, not {spec.n_cells}; remove them with drop_old first."
            )
        key = cell_key(spec.layout)
        self._store.check(key, spec.n_cells)
        # Under a key that is new to us even a whole number is somebody else's.
        self._refuse_foreign(key, 0 if found is None else spec.n_cells)
        free, wanted = self._store.free_bytes(), _SPARE * self._n_bytes(spec)
        if free is not None and free < wanted:
            raise CollectionError(
                f"The cells need about {wanted} bytes of disk while they are written, and "
                f"{free} are free; make room first."
            )
        return state

    def _refuse_foreign(self, key: str, n_cells: int) -> None:
        foreign = self._store.foreign(key, n_cells)
        if foreign:
            raise CollectionError(
                f"{foreign} points of collection {self._name!r} hold something else than a cell in "
                f"{key!r}; remove that payload key, or use cells with another identifier."
            )

    def _refuse_foreign_at_last(self, key: str) -> None:
        """Look again, with the index: strict mode may have forbidden to look without."""
        try:
            self._refuse_foreign(key, 0)
        except CollectionError:
            self._store.drop_index(key)
            self._write(self._state().without(key.removeprefix(CELL_PREFIX)))
            raise

    def _n_bytes(self, spec: LayoutSpec) -> int:
        return self._collection.count() * (len(cell_key(spec.layout)) + _PER_KEY)

    def _seconds(self, keys: int) -> float:
        began = time.perf_counter()
        read = next(iter(self._collection.scan(_SAMPLE)), None)
        taken = time.perf_counter() - began
        if read is None:
            return 0.0
        return keys * (_READS * taken / len(read.ids) + self._seconds_per_write)

    def _fill(self, key: str, n_cells: int, assign: AssignCells, step: Step) -> tuple[int, int]:
        """Place what has no cell until next to nothing is left, or others undo as much.

        Returns how many were placed, and for how many there was no cell at last.
        """
        few = _FEW * self._collection.count()
        given, left = self._pass(key, n_cells, assign, step.advance)
        total = given
        while given > few:
            last = given
            given, left = self._pass(key, n_cells, assign)
            total += given
            if given >= last:
                break
        return total, left

    def _pass(
        self,
        key: str,
        n_cells: int,
        assign: AssignCells,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[int, int]:
        given = left = 0
        for ids in self._store.without_cell(key):
            self._store.claim(key, ids)
            placed: list[Id] = []
            cells: list[int] = []
            for batch in self._store.claimed(key, ids):
                chosen = check_assigned(
                    assign(batch.ids, batch.vectors), len(batch.ids), n_cells
                ).tolist()
                inside = [row for row, cell in enumerate(chosen) if cell != OVERFLOW]
                placed += [batch.ids[row] for row in inside]
                cells += [chosen[row] for row in inside]
                left += len(chosen) - len(inside)
                if advance is not None:
                    advance(len(batch.ids))
            if placed:
                self._store.place(key, placed, cells)
            given += len(placed)
        return given, left
