"""The cells of a collection in memory: built, shown, mended and taken back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.cell_layout import (
    AUDITED,
    AssignCells,
    BuildPlan,
    LayoutAudit,
    LayoutSpec,
    LayoutStatus,
    check_assigned,
    check_name,
    find_stale,
    warn_of_stale,
)
from amips_plugins.errors import InvalidInput
from amips_plugins.progress import Progress, no_progress
from amips_plugins.sketch import sketch
from amips_plugins.vectors import IntArray

if TYPE_CHECKING:
    from amips_plugins.adapters.memory import MemoryCollection

__all__ = ["MemoryLayouts", "as_wide"]


class MemoryLayouts:
    """The cells of a ``MemoryCollection``."""

    def __init__(self, collection: MemoryCollection) -> None:
        self._of = collection

    def plan(self, spec: LayoutSpec) -> BuildPlan:
        """Say what ``build`` would do."""
        check_name(spec)
        if spec.layout == self._of._layout:
            raise InvalidInput(f"{self._of.info.name!r} has the cells {spec.layout!r} already.")
        keys = self._of.count()
        return BuildPlan((f"give {keys} keys one of {spec.n_cells} cells",), keys, 8 * keys, 0.0)

    def build(self, spec: LayoutSpec, progress: Progress = no_progress) -> MemoryCollection:
        """Give every key its cell, in place."""
        of, plan = self._of, self.plan(spec)
        ids, vectors, before = list(of._ids), of._vectors, of._placed()
        with progress("cells", plan.keys, 0, "keys") as step:
            found = check_assigned(
                spec.assign(ids, vectors), len(ids), spec.n_cells, shared=spec.shared
            )
            step.advance(plan.keys)
        of._before.append((of._layout, of._version, of._shared, before))
        of._layout, of._version, of._shared = spec.layout, spec.version, spec.shared
        wide = found.reshape(len(ids), -1 if found.size else 1)
        pairs = zip(wide, sketch(vectors, of.info.metric).tolist(), strict=True)
        of._place(dict(zip(ids, pairs, strict=True)))
        return of

    def status(self) -> LayoutStatus:
        """Say which cells there are."""
        of = self._of
        older = tuple(layout for layout, *_ in of._before if layout is not None)
        storage = None if of._layout is None else "memory"
        version = of._version or None
        return LayoutStatus(
            of.info.name,
            of._layout,
            version,
            storage,
            of.count(),
            of.overflow(),
            older=older,
        )

    def roll_back(self, *, anyway: bool = False) -> MemoryCollection:  # noqa: ARG002 - all cells hold the same keys
        """Serve the cells from before; keys written since are overflow."""
        of = self._of
        if not of._before:
            raise InvalidInput(f"{of.info.name!r} has no earlier cells to roll back to.")
        of._layout, of._version, of._shared, cells = of._before.pop()
        of._place(cells)
        return of

    def drop_old(self, *, anyway: bool = False) -> list[str]:  # noqa: ARG002 - all cells hold the same keys
        """Forget the cells from before."""
        dropped = [layout for layout, *_ in self._of._before if layout is not None]
        self._of._before.clear()
        return dropped

    def audit(self, sample: int, assign: AssignCells | None = None) -> LayoutAudit:
        """Look whether keys lie in the cells of their own vectors; change nothing."""
        judged, stale = self._stale(sample, assign)
        return LayoutAudit(len(judged), len(stale))

    def backfill(
        self, assign: AssignCells, progress: Progress = no_progress, *, verify: bool = False
    ) -> int:
        """Give the overflow its cells; a sample of the others is looked at, or all of them."""
        of = self._of
        if verify:
            of._cells[self._stale(of.count(), assign)[1]] = OVERFLOW
        elif of._layout is None:
            raise InvalidInput(f"{of.info.name!r} has no cells; lay it out first.")
        rows = np.flatnonzero(of._cells[:, 0] == OVERFLOW)
        with progress("backfill", len(rows), 0, "keys") as step:
            given = assign([of._ids[row] for row in rows], of._vectors[rows])
            of._cells, given = as_wide(of._cells, given)
            of._cells[rows] = given
            of._sketches[rows] = sketch(of._vectors[rows], of.info.metric)
            step.advance(len(rows))
        if not verify:
            judged, stale = self._stale(AUDITED, assign)
            of._cells[stale] = OVERFLOW
            warn_of_stale(of.info.name, LayoutAudit(len(judged), len(stale)))
        return len(rows)

    def _stale(self, sample: int, assign: AssignCells | None) -> tuple[IntArray, IntArray]:
        """Return the rows judged and those of them that are stale."""
        of = self._of
        if of._layout is None:
            raise InvalidInput(f"{of.info.name!r} has no cells; lay it out first.")
        rows = np.flatnonzero(of._cells[:, 0] != OVERFLOW)
        rows = np.random.default_rng().permutation(rows)[:sample]
        beside = of._sketches[rows].tolist()
        ids = [of._ids[row] for row in rows]
        judged, stale = find_stale(
            ids, of._vectors[rows], of._cells[rows, 0], beside, of.info.metric, assign
        )
        return rows[judged], rows[stale]


def as_wide(first: IntArray, second: IntArray) -> list[IntArray]:
    """Give the cells of keys, ``(n,)`` or ``(n, width)``, one width."""
    both = [np.asarray(one).reshape(len(one), -1 if one.size else 1) for one in (first, second)]
    width = max(one.shape[1] for one in both)
    return [np.hstack([one, one[:, :1].repeat(width - one.shape[1], axis=1)]) for one in both]
