"""Bundles of a linear router, made by hand in a fraction of a second: no training run."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.golden_outputs import record_canned
from amips_plugins.bundle.manifest import (
    CALIBRATION,
    CANNED,
    CELLS,
    FORMAT,
    IDS,
    KNOWN_CELLS,
    MANIFEST,
    MODEL,
    REFERENCE,
    Bundle,
    Manifest,
    describe_file,
)
from amips_plugins.collection import Id, collection_key
from amips_plugins.export.clustering import nearest_offsets
from amips_plugins.export.cost_curves import calibrate, curve, levels_by_threshold, thresholds_for
from amips_plugins.export.nets import KeyNet, LinearRouter
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.health.drift import Reference
from amips_plugins.layout import lay_out
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.cells import Cells
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.sketch import sketch
from amips_plugins.vectors import (
    FloatArray,
    IntArray,
    Metric,
    lift_keys,
    lift_queries,
    lifted_dim,
    normalise,
)

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


def known_file(cells: IntArray) -> bytes:
    """The file of recorded cells, for the keys of ``memory()``."""
    buffer = io.BytesIO()
    recorded = np.stack([cells.astype(np.int32), sketch(vectors(), Metric.COSINE)], axis=1)
    np.save(buffer, recorded, allow_pickle=False)
    return buffer.getvalue()


def make_files(metric: Metric = Metric.COSINE, model: str = "linear") -> dict[str, bytes]:
    """The files of a bundle for ``memory(metric)``, without the manifest."""
    return dict(_files(metric, model))


@functools.cache
def _files(metric: Metric, model: str) -> Mapping[str, bytes]:
    keys = vectors()
    if model == "keynet":
        torch.manual_seed(0)
        keynet = to_onnx(KeyNet(lifted_dim(DIM, metric)), DIM, metric)
        return {MODEL: keynet, **_records(keynet, "rewritten")}
    rng = np.random.default_rng(2)
    centroids = keys[rng.choice(COUNT, N_CELLS, replace=False)]
    centroids = centroids if metric is Metric.L2 else normalise(centroids)
    offsets = nearest_offsets(centroids)
    drawn = Cells(centroids, offsets, np.zeros(N_CELLS, dtype=np.int64)).assign(keys, metric)
    cells = Cells(centroids, offsets, np.bincount(drawn, minlength=N_CELLS).astype(np.int64))
    lifted_keys = lift_keys(keys, metric)
    means = np.stack(
        [
            lifted_keys[drawn == cell].mean(axis=0)
            if (drawn == cell).any()
            else np.zeros(lifted_keys.shape[1])
            for cell in range(N_CELLS)
        ]
    ).astype(np.float32)
    net = LinearRouter(lifted_dim(DIM, metric), N_CELLS)
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(means))
    order = Order(SCALE, np.zeros(N_CELLS, dtype=np.float32))

    def asked(seed: int) -> tuple[FloatArray, IntArray]:
        """Priorities of some queries, and the cells of their best keys."""
        lifted = lift_queries(vectors(seed, 1000), metric)
        best = np.argsort(-(lifted @ lifted_keys.T), axis=1)[:, :K]
        return order.priority(normalise(lifted) @ means.T), drawn[best]

    thresholds = thresholds_for(*asked(seed=3))
    priority, hit_cells = asked(seed=1)
    levels = levels_by_threshold(priority, thresholds)
    measured = curve(levels, len(thresholds), hit_cells, cells.sizes, N_CELLS)
    data = to_onnx(net, DIM, metric, order)
    return {
        MODEL: data,
        **_records(data, "priority"),
        CELLS: cells.to_bytes(),
        CALIBRATION: calibrate(measured, thresholds, K).to_bytes(),
        KNOWN_CELLS: known_file(drawn),
        IDS: b"".join(msgspec.json.encode(row) + b"\n" for row in range(COUNT)),
    }


def _records(data: bytes, output: str) -> dict[str, bytes]:
    """What the model gives for canned queries, and for those of the users."""
    model = OnnxModel(data)
    (said,) = model.run([output], {"queries": vectors(seed=1, count=512)})
    return {
        CANNED: record_canned(model, output, DIM),
        REFERENCE: Reference.of(said).to_bytes(),
    }


def make_manifest(
    files: Mapping[str, bytes],
    metric: Metric = Metric.COSINE,
    *,
    version: str = "v1",
    model: str = "linear",
    **changes: Any,
) -> Manifest:
    """The manifest of these files for ``memory(metric)``."""
    layout = Cells.from_bytes(files[CELLS]).layout() if CELLS in files else ""
    manifest = Manifest(
        format=FORMAT,
        version=version,
        created="2026-01-01T00:00:00+00:00",
        collection=collection_key(memory(metric).info),
        metric=metric,
        dim=DIM,
        snapshot="0" * 64,
        count=COUNT,
        model=model,  # type: ignore[arg-type] # a literal
        preset="test",
        parameters=DIM * N_CELLS,
        n_cells=N_CELLS if layout else 0,
        layout=layout,
        queries="log",
        default_k=K,
        default_recall=0.9,
        choice=model,
        reason="made by hand",
        figures=[],
        tools={},
        files={name: describe_file(data) for name, data in files.items()},
    )
    return msgspec.structs.replace(manifest, **changes)


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
    manifest = make_manifest(files, metric, version=version, model=model, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return folder


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
