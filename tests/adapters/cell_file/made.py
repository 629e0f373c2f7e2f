"""Cell files of real enough keys, and a store that can be made to fail."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from amips_plugins.adapters.cell_file.file_format import Bits
from amips_plugins.adapters.cell_file.key_ids import ids_as_array
from amips_plugins.adapters.cell_file.writing import CellFileSpec, Keys, write_cell_file
from amips_plugins.collection import CollectionKey
from amips_plugins.vectors import FloatArray, IntArray, Metric

COUNT, DIM, N_CELLS = 3000, 48, 12
ORIGIN = CollectionKey(database="qdrant", name="docs", field="")


@functools.cache
def clustered() -> tuple[FloatArray, IntArray]:
    """Keys around centres, and the centre of each."""
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((N_CELLS, DIM))
    cells = rng.integers(N_CELLS, size=COUNT)
    keys = centres[cells] + 0.7 * rng.standard_normal((COUNT, DIM))
    return keys.astype(np.float32), cells.astype(np.int64)


def queries(count: int = 60) -> FloatArray:
    rng = np.random.default_rng(6)
    keys, _ = clustered()
    return (keys[:count] + 0.5 * rng.standard_normal((count, DIM))).astype(np.float32)


def write(path: Path, bits: Bits = 2, metric: Metric = Metric.COSINE, **changes: Any) -> Path:
    keys, cells = clustered()
    fields: dict[str, Any] = {"layout": "abc", "version": "v1", "n_cells": N_CELLS}
    fields |= {"collection": ORIGIN} | changes
    spec = CellFileSpec(metric=metric, dim=DIM, bits=bits, **fields)
    write_cell_file(path, spec, Keys(ids_as_array(range(COUNT)), lambda rows: keys[rows]), cells)
    return path


class FlakyStore(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine as ``flaky://``, whose reads do what ``before`` does first."""

    protocol = "flaky"
    cachable = False
    before: Callable[[], None] = staticmethod(lambda: None)
    under_way = 0
    most = 0
    reads = 0
    _counting = threading.Lock()

    @classmethod
    def reset(cls, before: Callable[[], None] = lambda: None) -> None:
        cls.before = staticmethod(before)
        cls.under_way = cls.most = cls.reads = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        kind = type(self)
        with self._counting:
            kind.under_way += 1
            kind.reads += 1
            kind.most = max(kind.most, kind.under_way)
        try:
            kind.before()
            data: bytes = super().cat_file(path, start, end)
            return data
        finally:
            with self._counting:
                kind.under_way -= 1


fsspec.register_implementation("flaky", FlakyStore, clobber=True)


def failing(times: int) -> Callable[[], None]:
    """Fail so many times, then no more."""
    left, lock = [times], threading.Lock()

    def fail() -> None:
        with lock:
            left[0] -= 1
            if left[0] >= 0:
                raise ConnectionResetError("reset by peer")

    return fail


def slow(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)
