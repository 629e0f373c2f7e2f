"""The cells of a cell file: whatever changes them writes the file anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_file.key_ids import ids_as_array, plain_id
from amips_plugins.adapters.cell_file.log import log_of, packed, read_entries
from amips_plugins.adapters.cell_file.writing import (
    CellFileSpec,
    Keys,
    bytes_needed,
    lock_of,
    write_cell_file,
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
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.files import held, replace_file
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray

if TYPE_CHECKING:
    from amips_plugins.adapters.cell_file.collection import CellFileCollection, State
    from amips_plugins.collection import Id

__all__ = ["CellFileLayouts"]

_BLOCK = 16_384
_SPEED = 100e6  # bytes a second, of a guess


class CellFileLayouts:
    """The cells of a ``CellFileCollection``."""

    def __init__(self, collection: CellFileCollection) -> None:
        self._of = collection

    def _on_disk(self) -> Path:
        path = self._of._path
        if path is None:
            raise InvalidInput(
                f"{self._of._location} is only read; change the file on a disk, and copy it again."
            )
        return path

    def plan(self, spec: LayoutSpec) -> BuildPlan:
        """Say what ``build`` would do."""
        check_name(spec)
        self._on_disk()
        now, name = self._of._now(), self._of.info.name
        if spec.layout == self._of.layout():
            raise InvalidInput(f"{name!r} has the cells {spec.layout!r} already.")
        if spec.shared:
            raise InvalidInput(
                "In a cell file a key lies in one cell; train with --spill 0 for it."
            )
        count, header = self._of.count(), now.file.header
        n_bytes = bytes_needed(
            _spec(now, spec.layout, spec.version, spec.n_cells),
            count,
            np.dtype(header.ids).itemsize,
        )
        steps = (f"write {count} keys anew in {spec.n_cells} cells", "put that in the file's place")
        return BuildPlan(steps, count, n_bytes, n_bytes / _SPEED)

    def build(self, spec: LayoutSpec, progress: Progress = no_progress) -> CellFileCollection:
        """Write the file anew in other cells; until then it serves as it is."""
        self.plan(spec)
        now = self._of._now()
        everything = _Everything(now)
        cells = np.full(len(everything.ids), -1, dtype=np.int64)
        with progress("cells", len(cells), 0, "keys") as step:
            for low in range(0, len(cells), _BLOCK):
                rows = np.arange(low, min(low + _BLOCK, len(cells)))
                ids = [plain_id(everything.ids[row]) for row in rows]
                found = spec.assign(ids, everything.vectors(rows))
                cells[rows] = check_assigned(found, len(ids), spec.n_cells)
                step.advance(len(rows))
        self._replace(
            now,
            _spec(now, spec.layout, spec.version, spec.n_cells),
            everything,
            cells,
            progress,
        )
        return type(self._of)(self._of._location, self._of._timeout)

    def backfill(
        self, assign: AssignCells, progress: Progress = no_progress, *, verify: bool = False
    ) -> int:
        """Write the file anew, with all that was written since in its cells."""
        del verify  # a key's vector and cell are written together: none is stale
        if self._of.layout() is None:
            raise InvalidInput(f"{self._of.info.name!r} has no cells; lay it out first.")
        self._on_disk()
        now = self._of._now()
        if not self._of.overflow() and not now.recent.ids and not len(now.recent.hidden):
            return 0
        header, everything = now.file.header, _Everything(now)
        cells = everything.cells()
        loose = np.flatnonzero(cells < 0)
        with progress("backfill", len(loose), 0, "keys") as step:
            for low in range(0, len(loose), _BLOCK):
                rows = loose[low : low + _BLOCK]
                ids = [plain_id(everything.ids[row]) for row in rows]
                found = np.asarray(assign(ids, everything.vectors(rows)))
                first = found if found.ndim == 1 else found[:, 0]
                cells[rows] = check_assigned(first, len(ids), header.n_cells)
                step.advance(len(rows))
        spec = _spec(now, header.layout, header.version, header.n_cells)
        self._replace(now, spec, everything, cells, progress)
        self._of._open()
        return int((cells[loose] >= 0).sum())

    def _replace(
        self,
        before: State,
        spec: CellFileSpec,
        everything: _Everything,
        cells: IntArray,
        progress: Progress,
    ) -> None:
        path = self._on_disk()

        def publish(temporary: Path, identity: str) -> None:
            """Take over what was logged meanwhile, then move the file; the log goes with it."""
            old = log_of(path, before.file.header.identity)
            with held(lock_of(path)):
                if before.file.ranges.changed():
                    raise CollectionError(
                        f"{path} was written anew by somebody else meanwhile; run it again."
                    )
                entries, _ = read_entries(old, before.recent.offset)
                kept = spec.layout == before.file.header.layout
                moved = [one if kept else _loose(one) for one in entries]
                if moved:
                    replace_file(log_of(path, identity), packed(moved))
                temporary.replace(path)
                old.unlink(missing_ok=True)

        keys = Keys(everything.ids, everything.vectors, everything.fields)
        write_cell_file(path, spec, keys, cells, progress, publish)

    def status(self) -> LayoutStatus:
        """Say which cells there are."""
        of, header = self._of, self._of._state.file.header
        return LayoutStatus(
            of.info.name,
            of.layout(),
            header.version or None,
            "cell file" if header.layout else None,
            of.count(),
            of.overflow(),
        )

    def audit(self, sample: int, assign: AssignCells | None = None) -> LayoutAudit:  # noqa: ARG002 - there is nothing to judge
        """Find nothing stale: a key's vector and its cell are written together."""
        if self._of.layout() is None:
            raise InvalidInput(f"{self._of.info.name!r} has no cells; lay it out first.")
        return LayoutAudit(min(sample, self._of.count() - self._of.overflow()), 0)

    def roll_back(self, *, anyway: bool = False) -> CellFileCollection:  # noqa: ARG002 - refused
        """Refuse: the file that was there before is gone."""
        raise InvalidInput(
            f"Of {self._of._location} nothing is kept to roll back to; write it in the cells of an "
            f"earlier bundle: amips cell-file --bundle VERSION."
        )

    def drop_old(self, *, anyway: bool = False) -> list[str]:  # noqa: ARG002 - nothing is kept
        """Remove nothing: nothing is kept."""
        return []


def _loose(entry: Any) -> Any:
    return type(entry)(entry.ids, entry.vectors, b"", entry.fields)


def _spec(now: State, layout: str, version: str, n_cells: int) -> CellFileSpec:
    header = now.file.header
    return CellFileSpec(
        collection=header.collection,
        metric=header.metric,
        dim=header.dim,
        bits=header.bits,
        layout=layout,
        version=version,
        n_cells=n_cells,
    )


class _Everything:
    """All keys of a state, counted from 0: those of the file by row, then the recent ones."""

    def __init__(self, now: State) -> None:
        self._now = now
        known, rows = now.file.index
        by_row = np.empty_like(known)
        by_row[rows] = known
        kept = np.ones(len(rows), dtype=np.bool_)
        kept[now.recent.hidden] = False
        self._rows = np.flatnonzero(kept)
        own = [plain_id(one) for one in by_row[kept]]
        ids: list[Id] = [*own, *now.recent.ids]
        self.ids = ids_as_array(ids)

    def vectors(self, numbers: IntArray) -> FloatArray:
        """Return the vectors of some."""
        now, n_own = self._now, len(self._rows)
        vectors = np.empty((len(numbers), now.file.header.dim), dtype=np.float32)
        own = numbers < n_own
        rows, at = np.unique(self._rows[numbers[own]], return_inverse=True)
        vectors[own] = now.file.read_rows(rows, None)["vector"][at]
        vectors[~own] = now.recent.vectors[numbers[~own] - n_own]
        return vectors

    @property
    def fields(self) -> Any:
        """Return what reads the fields of some, or None where no key has any."""
        now = self._now
        beside = any(fields for _, _, fields in now.recent.written.values())
        return self._read_fields if now.file.header.has_fields or beside else None

    def _read_fields(self, numbers: IntArray) -> list[Mapping[str, Any]]:
        now, n_own = self._now, len(self._rows)
        own = numbers < n_own
        rows, at = np.unique(self._rows[numbers[own]], return_inverse=True)
        read = now.file.read_fields(now.file.read_rows(rows, None), None)
        mine = iter(at.tolist())
        return [
            read[next(mine)] if number < n_own else now.recent.fields(int(number) - n_own)
            for number in numbers
        ]

    def cells(self) -> IntArray:
        """Return the cell of each, -1 for none."""
        file = self._now.file
        runs = file.run_of(self._rows)
        own = np.where(runs < file.header.n_cells, runs, -1)
        return np.concatenate([own, self._now.recent.cells]).astype(np.int64)
