"""Keys whose cell is another vector's: found by their sketches, and made overflow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from amips_plugins.adapters.qdrant.cells import CelledKeys, CellStore, LayoutRecord
from amips_plugins.cell_layout import AUDITED, AssignCells, LayoutAudit, find_stale
from amips_plugins.collection import Id
from amips_plugins.progress import Progress
from amips_plugins.vectors import Metric

__all__ = ["Staleness"]

_PAGES = 20  # between two notes of how far a verification is
_FRESH = 86_400.0  # seconds after which one that was interrupted begins anew


class Staleness:
    """Judges the keys of one layout."""

    def __init__(self, store: CellStore, record: LayoutRecord, metric: Metric) -> None:
        self._store = store
        self._record = record
        self._metric = metric

    def audit(self, sample: int, assign: AssignCells | None) -> tuple[LayoutAudit, Sequence[Id]]:
        """Judge some keys drawn at random; return what was found, and the stale ones."""
        found = self._store.sample(self._record, sample)
        return (LayoutAudit(0, 0), ()) if found is None else self._judge(found, assign)

    def displace_sample(self, assign: AssignCells) -> LayoutAudit:
        """Judge some keys, and make the stale ones overflow."""
        sampled = stale = 0
        parts = self._store.parts()
        for part in parts:
            audit, found = Staleness(part, self._record, self._metric).audit(
                -(-AUDITED // len(parts)), assign
            )
            sampled, stale = sampled + audit.sampled, stale + audit.stale
            if found:
                part.displace(self._record, found)
        return LayoutAudit(sampled, stale)

    def displace_all(self, assign: AssignCells, progress: Progress, keys: int) -> None:
        """Judge every key, and make the stale ones overflow; goes on where it was killed."""
        note = f"amips_verified_{self._record.layout}"
        noted = self._store.metadata().get(note) or {}
        if time.time() - noted.get("at", 0) > _FRESH:
            noted = {}
        with progress("verify", keys, 0, "keys") as step:
            for number, part in enumerate(self._store.parts()):
                if number < noted.get("part", 0):
                    continue
                after = noted.get("after") if number == noted.get("part") else None
                for page, found in enumerate(part.celled(self._record, after), 1):
                    _, stale = self._judge(found, assign)
                    if stale:
                        part.displace(self._record, stale)
                    step.advance(len(found.keys.ids))
                    if page % _PAGES == 0:
                        noted = {"part": number, "after": found.keys.cursor, "at": time.time()}
                        self._store.write_metadata({note: noted})
        if noted:
            self._store.write_metadata({note: {}})

    def _judge(
        self, found: CelledKeys, assign: AssignCells | None
    ) -> tuple[LayoutAudit, Sequence[Id]]:
        """Judge those of the keys that have a cell; a list may be one only if cells share keys."""
        own = [self._record.own_cell(cell) for cell in found.cells]
        listed = [
            isinstance(cell, list) and one is None
            for cell, one in zip(found.cells, own, strict=True)
        ]
        rows = [row for row, cell in enumerate(own) if cell is not None]
        ids: list[Any] = [found.keys.ids[row] for row in rows]
        cells = np.array([own[row] for row in rows], dtype=np.int64)
        sketches = [found.sketches[row] for row in rows]
        judged, stale = find_stale(
            ids, found.keys.vectors[rows], cells, sketches, self._metric, assign
        )
        wrong = [one for one, is_stale in zip(ids, stale, strict=True) if is_stale]
        wrong += [one for one, is_list in zip(found.keys.ids, listed, strict=True) if is_list]
        return LayoutAudit(int(judged.sum()) + sum(listed), len(wrong)), wrong
