"""Bundles of a linear router, made by hand in a fraction of a second: no training run."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.arrays import write_npy
from amips_plugins.bundle.contents import (
    CALIBRATION,
    CELLS,
    GOLDEN_OUTPUTS,
    KNOWN_CELLS,
    MODEL,
    write_files,
)
from amips_plugins.bundle.golden_outputs import GoldenOutputs
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import Id
from amips_plugins.layout import lay_out
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.cells import Cells
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.sketch import sketch
from amips_plugins.vectors import FloatArray, IntArray, Metric, normalise
from tests.handmade import about, keynet_contents, make_contents

COUNT = 48
DIM = 4
N_CELLS = 6
K = 10
SCALE = 3.0  # of the router's scores


def vectors(seed: int = 0, count: int = COUNT) -> FloatArray:
    """Vectors of different lengths, so that IP, cosine and L2 rank differently."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal((count, DIM)) * rng.uniform(0.5, 2.0, (count, 1))
    return array.astype(np.float32)


def memory(
    metric: Metric = Metric.COSINE, name: str = "docs", ids: Sequence[Id] | None = None
) -> MemoryCollection:
    """The collection that the bundles are made for, with stored fields to filter by."""
    fields = [{"group": row % 3} for row in range(COUNT)]
    return MemoryCollection(vectors(), ids, metric, name, fields)


def known_file(cells: IntArray, metric: Metric = Metric.COSINE) -> bytes:
    """The file of recorded cells, for the keys of ``memory(metric)``."""
    sketches = sketch(vectors(), metric)
    return write_npy(np.stack([cells.astype(np.int32), sketches], axis=1))


def make_files(metric: Metric = Metric.COSINE, model: str = "linear") -> dict[str, bytes]:
    """The files of a bundle for ``memory(metric)``, without the manifest."""
    return dict(_files(metric, model))


@functools.cache
def _files(metric: Metric, model: str) -> Mapping[str, bytes]:
    if model == "keynet":
        return keynet_contents(range(COUNT), vectors(), metric, vectors(seed=1, count=512)).files()
    keys = vectors()
    centroids = keys[np.random.default_rng(2).choice(COUNT, N_CELLS, replace=False)]
    centroids = centroids if metric is Metric.L2 else normalise(centroids)
    asked = np.concatenate([vectors(3, 1000), vectors(1, 1000)])
    return make_contents(range(COUNT), keys, metric, centroids, asked, SCALE).files()


def write_bundle(
    folder: Path,
    metric: Metric = Metric.COSINE,
    *,
    version: str = "v1",
    model: str = "linear",
    change: Callable[[dict[str, bytes]], None] = lambda _: None,
    **changes: Any,
) -> Path:
    """Write a bundle; ``change`` alters its files before they are summed, the rest its manifest."""
    files = make_files(metric, model)
    change(files)
    fields = about(memory(metric).info, COUNT, N_CELLS, 0.9, model)
    write_files(folder, files, **(fields | {"version": version} | changes))
    return folder


def replace_model(data: bytes, output: str = "priority") -> Callable[[dict[str, bytes]], None]:
    """A change for ``write_bundle``: another model that runs, and what it gives."""

    def change(files: dict[str, bytes]) -> None:
        files[MODEL] = data
        golden = GoldenOutputs.record(OnnxModel(data), output, DIM)
        files[GOLDEN_OUTPUTS] = golden.to_bytes()

    return change


def weaken(best: float, confidence: float = 0.95) -> Callable[[dict[str, bytes]], None]:
    """A change for ``write_bundle``: a calibration whose best promise short of every cell is so."""

    def change(files: dict[str, bytes]) -> None:
        whole = Calibration.from_bytes(files[CALIBRATION])
        n_levels = len(whole.thresholds)
        steps = np.append(np.linspace(0.3, best, n_levels - 1), 1.0).astype(np.float32)
        guaranteed = np.tile(steps, (K, 1))
        weak = Calibration(whole.thresholds, guaranteed, guaranteed, whole.scanned, confidence)
        files[CALIBRATION] = weak.to_bytes()

    return change


def other_cells(files: dict[str, bytes]) -> None:
    """A change for ``write_bundle``: the same cells, the first two of them with swapped names."""
    cells = Cells.from_bytes(files[CELLS])
    order = [1, 0, *range(2, N_CELLS)]
    swapped = Cells(cells.centroids[order], cells.offsets[order], cells.sizes[order])
    files[CELLS] = swapped.to_bytes()
    recorded = np.load(io.BytesIO(files[KNOWN_CELLS]))[:, 0]
    files[KNOWN_CELLS] = known_file(np.array(order)[recorded])


def open_bundle(folder: Path) -> Bundle:
    return Bundle.in_folder(folder)


def laid_out(folder: Path, metric: Metric = Metric.COSINE) -> MemoryCollection:
    """``memory(metric)``, in the cells of the bundle in the folder."""
    collection = memory(metric)
    lay_out(collection, open_bundle(folder))
    return collection
