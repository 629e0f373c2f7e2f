"""A snapshot's keys, in the cells of a bundle, in a cell file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.adapters.cell_file.codes import Coder
from amips_plugins.adapters.cell_file.file_format import Bits
from amips_plugins.adapters.cell_file.key_ids import ids_as_array, plain_id
from amips_plugins.adapters.cell_file.writing import (
    CellFileSpec,
    Keys,
    bytes_needed,
    write_cell_file,
)
from amips_plugins.bundle.identity import check_made_for
from amips_plugins.bundle.loading import given_cells, known_cells
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import Id, KeyBatch
from amips_plugins.errors import InvalidInput
from amips_plugins.export.disk import check_room
from amips_plugins.export.snapshot import Snapshot
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["CellFilePlan", "plan_cell_file", "write_snapshot"]

_BLOCK = 16_384
_ID = 8  # bytes, of a guess
_SMALL, _LARGE = 10_000, 400_000  # bytes of a cell, outside of which a note is due


@dataclass(frozen=True)
class CellFilePlan:
    """What a file will be: its keys, its bytes, those of a cell's codes, and what to know."""

    keys: int
    n_bytes: int
    cell_bytes: int
    note: str = ""


def plan_cell_file(snapshot: Snapshot, bundle: Bundle, out: Path, bits: int) -> CellFilePlan:
    """Say what ``write_snapshot`` would do, or refuse as it would; nothing is changed."""
    manifest, taken = bundle.manifest, snapshot.manifest
    spec = _spec(snapshot, bundle, bits)
    check_made_for(
        bundle, taken.collection, taken.metric, taken.dim, lambda ids: _fetch(snapshot, ids)
    )
    if not manifest.layout or given_cells(bundle) is not None:
        raise InvalidInput(
            f"Bundle {manifest.version} has no cells of its own to write keys by; train a router "
            f"with --model auto."
        )
    if manifest.copies:
        raise InvalidInput(
            "In a cell file a key lies in one cell, and this bundle gives some several; train with "
            "--spill 0 for it."
        )
    n_bytes = bytes_needed(spec, taken.count, _ID)
    check_room(out, n_bytes)
    coder = Coder(taken.metric, taken.dim, spec.bits)
    cell = coder.n_bytes(-(-taken.count // manifest.n_cells))
    note = ""
    if not _SMALL <= cell <= _LARGE:
        wanted = max(2, round(taken.count * coder.width / 60_000))
        note = (
            f"a cell of 30 to 100 kB is read best; about {wanted:,} cells would be that "
            f"(amips train --cells)."
        )
    return CellFilePlan(taken.count, n_bytes, cell, note)


def write_snapshot(
    snapshot: Snapshot,
    bundle: Bundle,
    out: str | Path,
    bits: int = 2,
    progress: Progress = no_progress,
) -> None:
    """Write the keys of a snapshot into a cell file, in the cells of a bundle.

    Parameters
    ----------
    snapshot
        The keys.
    bundle
        A bundle with cells, made for the snapshot's collection.
    out
        The file; one that lies there is replaced when the new one is complete.
    bits
        Of a code, for each dimension: 2, 4 or 8.
    progress
        Watches the work.

    Raises
    ------
    InvalidInput
        The bundle has no cells, or puts keys into several; or the disk has too little room.
    BundleMismatch
        It was made for another collection.
    """
    path = Path(out)
    plan_cell_file(snapshot, bundle, path, bits)
    vectors, assign = snapshot.keys(), known_cells(bundle)
    ids = _ids(snapshot)
    cells = np.empty(len(ids), dtype=np.int64)
    with progress("cells", len(ids), 0, "keys") as step:
        for low in range(0, len(ids), _BLOCK):
            rows = slice(low, min(low + _BLOCK, len(ids)))
            some = [plain_id(one) for one in ids[rows]]
            cells[rows] = assign(some, np.asarray(vectors[rows]))
            step.advance(len(some))

    def read(rows: IntArray) -> FloatArray:
        chosen: FloatArray = vectors[rows]
        return chosen

    write_cell_file(path, _spec(snapshot, bundle, bits), Keys(ids, read), cells, progress)


def _spec(snapshot: Snapshot, bundle: Bundle, bits: int) -> CellFileSpec:
    known: dict[int, Bits] = {2: 2, 4: 4, 8: 8}
    if bits not in known:
        raise InvalidInput(f"A code has 2, 4 or 8 bits for each dimension, not {bits}.")
    taken, manifest = snapshot.manifest, bundle.manifest
    return CellFileSpec(
        collection=taken.collection,
        metric=taken.metric,
        dim=taken.dim,
        bits=known[bits],
        layout=manifest.layout,
        version=manifest.version,
        n_cells=manifest.n_cells,
    )


def _ids(snapshot: Snapshot) -> npt.NDArray[Any]:
    """Return all ids as a file stores them, each of which has to be there once."""
    ids = ids_as_array(list(snapshot.ids()))
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) < len(ids):
        twice = plain_id(distinct[np.argmax(counts > 1)])
        raise InvalidInput(
            f"The id {twice!r} comes more than once in {snapshot.path}; a cell file needs every id "
            f"once, so mend its source and take the snapshot again."
        )
    return ids


def _fetch(snapshot: Snapshot, ids: Sequence[Id]) -> KeyBatch:
    wanted = set(ids)
    rows = {key: row for row, key in enumerate(snapshot.ids()) if key in wanted}
    return KeyBatch(list(rows), np.asarray(snapshot.keys()[list(rows.values())]))
