"""Writing a cell file: it appears whole or not at all, in one pass over the keys."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from amips_plugins.adapters.cell_file.codes import Coder
from amips_plugins.adapters.cell_file.file_format import (
    HEADER_BYTES,
    LOOSE,
    RUNS,
    Bits,
    Header,
    header_bytes,
    row_type,
    sections_of,
)
from amips_plugins.adapters.cell_file.ordering import near_ones_together
from amips_plugins.collection import CollectionKey
from amips_plugins.files import held
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray, Metric

__all__ = ["CellFileSpec", "Keys", "bytes_needed", "lock_of", "write_cell_file"]


@dataclass(frozen=True)
class Keys:
    """Keys to write: ids as stored, ``(n,)``, and what reads the vectors and fields of some."""

    ids: npt.NDArray[Any]
    vectors: Callable[[IntArray], FloatArray]
    fields: Callable[[IntArray], Sequence[Mapping[str, Any]]] | None = None


@dataclass(frozen=True, kw_only=True)
class CellFileSpec:
    """What a cell file is of, and its cells."""

    collection: CollectionKey
    metric: Metric
    dim: int
    bits: Bits
    layout: str = ""
    version: str = ""
    n_cells: int = 0


def bytes_needed(spec: CellFileSpec, keys: int, id_bytes: int) -> int:
    """Say about how large a file becomes, without fields."""
    coder = Coder(spec.metric, spec.dim, spec.bits)
    runs = spec.n_cells * (coder.head + RUNS.itemsize)
    return (
        HEADER_BYTES
        + runs
        + keys * (coder.width + coder.beside + 4 * spec.dim + 4 + 2 * id_bytes + 8)
    )


def write_cell_file(
    path: Path,
    spec: CellFileSpec,
    keys: Keys,
    cells: IntArray,
    progress: Progress = no_progress,
    publish: Callable[[Path, str], None] | None = None,
) -> None:
    """Write keys, by their cells ``(n,)``, -1 for none, in place of what lies there.

    ``publish`` moves the finished file where it belongs, given its identity too. What others have
    left who were killed over it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with ExitStack() as begun:
            with held(lock_of(path)):
                _remove_left(path)
                file = begun.enter_context(temporary.open("w+b"))
                fcntl.flock(file, fcntl.LOCK_EX)
            identity = _write(file.fileno(), spec, keys, cells, progress)
            os.fsync(file.fileno())
        if publish is None:
            temporary.replace(path)
        else:
            publish(temporary, identity)
    finally:
        temporary.unlink(missing_ok=True)


def lock_of(path: Path) -> Path:
    """Return the lock of those who write."""
    return path.with_name(f"{path.name}.lock")


def _remove_left(path: Path) -> None:
    """Remove files that were begun and that nobody writes any more; hold the file's lock."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    for one in path.parent.iterdir():
        if pattern.fullmatch(one.name):
            with suppress(OSError), one.open("rb") as file:  # BlockingIOError: it is being written
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                one.unlink()


def _write(file: int, spec: CellFileSpec, keys: Keys, cells: IntArray, progress: Progress) -> str:
    coder = Coder(spec.metric, spec.dim, spec.bits)
    order, starts = _runs(cells, spec.n_cells)
    counts = np.diff(starts).tolist()
    header = Header(
        identity=secrets.token_hex(8),
        collection=spec.collection,
        metric=spec.metric,
        dim=spec.dim,
        count=len(order),
        bits=spec.bits,
        layout=spec.layout,
        version=spec.version,
        n_cells=spec.n_cells,
        n_runs=len(counts),
        ids=keys.ids.dtype.str,
        has_fields=keys.fields is not None,
        size=0,
        sections={},
    )
    lengths = [coder.n_bytes(count) for count in counts]
    places = sections_of(header, sum(lengths), 0)
    kind, runs = row_type(header), np.zeros(len(counts) + 1, RUNS)
    runs["row"], runs["code"] = starts, np.concatenate([[0], np.cumsum(lengths)])
    n_fields = 0
    with progress("cell file", len(order), 0, "keys") as step:
        for run, count in enumerate(counts):
            rows = order[starts[run] : starts[run + 1]]
            vectors = np.ascontiguousarray(keys.vectors(rows), dtype="<f4")
            near = near_ones_together(vectors, spec.metric)
            rows, vectors = rows[near], vectors[near]
            order[starts[run] : starts[run + 1]] = rows
            codes = coder.encode(vectors)
            runs["crc"][run] = zlib.crc32(codes)
            _put(file, codes, places["codes"].offset + int(runs["code"][run]))
            records = np.zeros(count, kind)
            records["vector"], records["id"] = vectors, keys.ids[rows]
            if keys.fields is not None:
                lines = [msgspec.json.encode(dict(one)) for one in keys.fields(rows)]
                records["length"] = [len(line) for line in lines]
                records["at"] = n_fields + np.cumsum(records["length"]) - records["length"]
                _put(file, b"".join(lines), places["fields"].offset + n_fields)
                n_fields += int(records["length"].sum())
            view, size = memoryview(records.tobytes()), kind.itemsize
            ends = range(size, len(view) + 1, size)
            records["crc"] = [zlib.crc32(view[end - size : end - 4]) for end in ends]
            _put(file, records.tobytes(), places["rows"].offset + int(starts[run]) * size)
            step.advance(count)
    by_id = np.argsort(keys.ids[order], kind="stable")
    index = keys.ids[order][by_id].tobytes() + by_id.astype("<i8").tobytes()
    table = runs.tobytes()
    _put(file, index, places["index"].offset)
    _put(file, table, places["runs"].offset)
    sections = sections_of(header, sum(lengths), n_fields)
    for name, data in (("index", index), ("runs", table)):
        digest = hashlib.sha256(data).hexdigest()
        sections[name] = msgspec.structs.replace(sections[name], sha256=digest)
    size = sections["fields"].offset + n_fields
    header = msgspec.structs.replace(header, size=size, sections=sections)
    _put(file, header_bytes(header), 0)
    return header.identity


def _runs(cells: IntArray, n_cells: int) -> tuple[IntArray, IntArray]:
    """Return the keys by run, and where each run begins: cells first, then those of no cell."""
    order = np.argsort(np.where(cells < 0, n_cells, cells), kind="stable").astype(np.int64)
    sizes = np.bincount(cells[cells >= 0], minlength=n_cells)[:n_cells]
    n_placed = int(sizes.sum())
    loose = np.arange(n_placed, len(cells), LOOSE)[1:]
    ends = [] if n_placed == len(cells) else [*loose.tolist(), len(cells)]
    starts = np.concatenate([[0], np.cumsum(sizes), ends]).astype(np.int64)
    return order, starts


def _put(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
