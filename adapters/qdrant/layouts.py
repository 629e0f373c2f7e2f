"""Cells in the payload of Qdrant's points: the steps, whichever engine holds the points.

A build takes as many passes over the points without a cell as others' writing makes necessary, so
that going on after a crash is the same as another pass. A pass first *claims* its points by writing
a negative number of its own, then reads their vectors, then writes the cells where the claim still
stands: an upsert by another client replaces the payload and so takes the claim away, and the new
vector cannot get the old one's cell. Who changes a vector and keeps its payload (by
``update_vectors``, or an upsert without payload on servers before 1.19) leaves the cell of the
vector before: the sketch beside the cell tells, and ``staleness`` finds such points.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.cells import CellStore, LayoutRecord, LayoutState
from amips_plugins.adapters.qdrant.staleness import Staleness
from amips_plugins.cell_layout import (
    AssignCells,
    BuildPlan,
    LayoutAudit,
    LayoutSpec,
    LayoutStatus,
    check_assigned,
    check_name,
    warn_of_stale,
)
from amips_plugins.collection import Collection, Id
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.progress import Progress, Step, no_progress
from amips_plugins.sketch import sketch

__all__ = ["QdrantLayouts"]

_SAMPLE = 1000  # keys read to guess how long a build takes
_READS = 2  # every key is read once with its vector, and looked at in passes
_PER_KEY = 92  # bytes beside the payload keys' names: two values, index (both ways), block overhead
_SPARE = 2  # free disk wanted, in multiples of what will be stored: payload is rewritten
_FEW = 0.001  # a pass that placed at most this share of the keys was the last one
_MISSED = 0.05  # share of the keys that others' writing may leave without a cell,
_MISSED_FEW = 5  # and this many of a small collection
_SETTLING = 10.0  # seconds until every node shows metadata that were written through one


class QdrantLayouts:
    """The cells of one vector of a Qdrant collection (see ``Layouts``).

    Builds of different layouts may run at the same time, but the operator should start one after
    the other: each rewrites the same small metadata entry.
    """

    def __init__(self, collection: Collection, store: CellStore) -> None:
        self._collection = collection
        self._store = store
        self._replaced: LayoutState | None = None  # by what was written last

    def plan(self, spec: LayoutSpec) -> BuildPlan:
        """Check whether the cells can be built, and say what that would do; change nothing.

        The bytes are the payload and its index for every key, by a rule of thumb; the seconds
        follow from reading some keys now and a rule of thumb for a write.
        """
        self._check(spec)
        key, keys = self._record(spec).key, self._collection.count()
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
        Raises as ``plan`` does, and where too many cells are not there at the end; the layout in
        force is then unchanged.
        """
        known = spec.layout in self._check(spec).kept()
        record = self._record(spec)
        adopted = not known and bool(self._store.taken(record.sketch_key))
        if not known:
            self._mark(replace(record, complete=False))
        self._store.create_index(record.key)
        if not known and not adopted:
            self._refuse_taken_at_last(record)
        if known or adopted:  # others may have changed vectors since
            self._staleness(record).displace_sample(spec.assign)
        if adopted:
            self._staleness(record).displace_all(spec.assign, progress, self._collection.count())
        keys = self._collection.count()
        with progress("cells", keys, keys - self._store.overflow(record), "keys") as step:
            _, left = self._fill(record, spec.assign, step)
        lost = self._store.overflow(record) - left
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
        return self._current()

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
            0 if here is None else self._store.overflow(here),
            unfinished=tuple(one.layout for one in kept if not one.complete),
            older=tuple(one.layout for one in kept if one.complete),
        )

    def roll_back(self, *, anyway: bool = False) -> Collection:  # noqa: ARG002 - all cells hold the same keys
        """Serve the layout from before, or none; ``drop_old`` removes the other."""
        state = self._state()
        if not state.before:
            raise InvalidInput(f"{self._name!r} has no earlier cells to roll back to.")
        idle = state.idle if state.serving is None else (*state.idle, state.serving)
        self._write(LayoutState(state.before[-1], state.before[:-1], idle))
        return self._current()

    def drop_old(self, *, anyway: bool = False) -> list[str]:  # noqa: ARG002 - cells go, no key does
        """Remove the cells of every layout that does not serve; return their names."""
        state = self._state()
        dropped = list(state.kept().values())
        # First nobody can roll back to what is about to go; the names stay until it is gone.
        going = tuple(replace(one, complete=False) for one in dropped)
        self._write(LayoutState(state.serving, (), going))
        for one in dropped:
            self._store.remove_cells(one)
            self._store.drop_index(one.key)
            self._write(self._state().without(one.layout))
        return [one.layout for one in dropped]

    def audit(self, sample: int, assign: AssignCells | None = None) -> LayoutAudit:
        """Look whether keys lie in the cells of their own vectors; change nothing."""
        here = self._state().serving
        if here is None:
            raise InvalidInput(f"{self._name!r} has no cells; lay it out first.")
        return self._staleness(here).audit(sample, assign)[0]

    def backfill(
        self, assign: AssignCells, progress: Progress = no_progress, *, verify: bool = False
    ) -> int:
        """Give the overflow its cells, and return how many keys got one.

        Raises ``InvalidInput`` without cells, or with others than when this object was opened.
        """
        here, opened = self._state().serving, self._collection.layout()
        if here is None and opened is None:
            raise InvalidInput(f"{self._name!r} has no cells; lay it out first.")
        if here is None or here.layout != opened:
            raise InvalidInput(
                f"The cells of {self._name!r} have changed since it was opened; open it again and "
                "use the bundle of the cells it has now."
            )
        if verify:
            self._staleness(here).displace_all(assign, progress, self._collection.count())
        with progress("backfill", self._store.overflow(here), 0, "keys") as step:
            given, _ = self._fill(here, assign, step)
        if not verify:
            warn_of_stale(self._name, self._staleness(here).displace_sample(assign))
        return given

    def _record(self, spec: LayoutSpec) -> LayoutRecord:
        return LayoutRecord(spec.layout, spec.version, spec.n_cells, shared=spec.shared)

    @property
    def _name(self) -> str:
        return self._collection.info.name

    def _staleness(self, record: LayoutRecord) -> Staleness:
        return Staleness(self._store, record, self._collection.info.metric)

    def _state(self) -> LayoutState:
        """Read the metadata; what was just written may reach other nodes late."""
        until = time.monotonic() + _SETTLING
        while True:
            found = LayoutState.read(self._store.metadata(), self._collection.info)
            if found != self._replaced or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def _write(self, state: LayoutState) -> None:
        replaced = self._state()
        self._store.write_metadata(state.entry(self._collection.info))
        self._replaced = replaced if replaced != state else None

    def _current(self) -> Collection:
        """Look at the collection again, until it shows what was written."""
        serving, until = self._state().serving, time.monotonic() + _SETTLING
        layout = None if serving is None else serving.layout
        found = self._collection.current()
        while found.layout() != layout and time.monotonic() < until:
            time.sleep(0.05)
            found = self._collection.current()
        return found

    def _mark(self, record: LayoutRecord) -> None:
        state = self._state()
        self._write(replace(state, idle=(*state.idle, record)))
        if record.layout not in self._state().kept():
            raise CollectionError(
                f"What was written into the metadata of collection {self._name!r} is not there "
                f"{_SETTLING:.0f} seconds later; cells need metadata, which Qdrant keeps from 1.16 "
                "on: use a newer server, or try again."
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
        record = self._record(spec)
        self._store.check(record)
        if found is None:
            self._refuse_taken(record)
        free, wanted = self._store.free_bytes(), _SPARE * self._n_bytes(spec)
        if free is not None and free < wanted:
            raise CollectionError(
                f"The cells need about {wanted} bytes of disk while they are written, and "
                f"{free} are free; make room first."
            )
        return state

    def _refuse_taken(self, record: LayoutRecord) -> None:
        """Refuse cells that are not ours; those of a copy without its metadata have sketches."""
        if not self._store.taken(record.key):
            return
        field = self._collection.info.field
        ours = self._store.taken(record.sketch_key)
        for entry in self._store.metadata().items() if ours else ():
            ours = ours and not (entry[0].startswith("amips_layout") and _names(entry[1], record))
        if not ours:
            raise CollectionError(
                f"Points of collection {self._name!r} hold something else than a cell of vector "
                f"{field!r} in {record.key!r}; remove that payload key, or use cells with another "
                "identifier."
            )

    def _refuse_taken_at_last(self, record: LayoutRecord) -> None:
        """Look again, with the index: strict mode may have forbidden to look without."""
        try:
            self._refuse_taken(record)
        except CollectionError:
            self._store.drop_index(record.key)
            self._write(self._state().without(record.layout))
            raise

    def _n_bytes(self, spec: LayoutSpec) -> int:
        return self._collection.count() * (sum(map(len, self._record(spec).keys)) + _PER_KEY)

    def _seconds(self, keys: int) -> float:
        began = time.perf_counter()
        read = next(iter(self._collection.scan(_SAMPLE)), None)
        taken = time.perf_counter() - began
        if read is None:
            return 0.0
        return keys * (_READS * taken / len(read.ids) + self._store.seconds_per_write)

    def _fill(self, record: LayoutRecord, assign: AssignCells, step: Step) -> tuple[int, int]:
        """Place what has no cell until next to nothing is left, or others undo as much.

        Returns how many were placed, and for how many there was no cell at last.
        """
        few = _FEW * self._collection.count()
        given, left = self._pass(record, assign, step.advance)
        total = given
        while given > few:
            last = given
            given, left = self._pass(record, assign)
            total += given
            if given >= last:
                break
        return total, left

    def _pass(
        self,
        record: LayoutRecord,
        assign: AssignCells,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[int, int]:
        given = left = 0
        claim = -2 - secrets.randbelow(2**31 - 2)
        pages = ((part, ids) for part in self._store.parts() for ids in part.without_cell(record))
        for part, ids in pages:
            part.claim(record, ids, claim)
            for batch in part.claimed(record, ids, claim):
                chosen = record.stored(
                    check_assigned(
                        assign(batch.ids, batch.vectors),
                        len(batch.ids),
                        record.n_cells,
                        shared=record.shared,
                    )
                )
                beside = sketch(batch.vectors, self._collection.info.metric).tolist()
                inside = [row for row, cell in enumerate(chosen) if cell != OVERFLOW]
                placed: list[Id] = [batch.ids[row] for row in inside]
                if placed:
                    cells = [chosen[row] for row in inside]
                    part.place(record, placed, cells, [beside[row] for row in inside], claim)
                given += len(placed)
                left += len(chosen) - len(placed)
                if advance is not None:
                    advance(len(batch.ids))
        return given, left


def _names(entry: object, record: LayoutRecord) -> bool:
    """Tell whether a metadata entry speaks of this layout."""
    return f"'layout': {record.layout!r}" in str(entry)
