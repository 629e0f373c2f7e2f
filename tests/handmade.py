"""A bundle for any collection, made by hand in a second, without the packages that training needs.

The cells are k-means', the router scores them by their centroids; others:
``tests.support.bundles``.
"""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from amips_plugins import Registry
from amips_plugins.bundle.manifest import (
    CALIBRATION,
    CELLS,
    FORMAT,
    IDS,
    KNOWN_CELLS,
    MANIFEST,
    MODEL,
    Bundle,
    Manifest,
    describe_file,
)
from amips_plugins.collection import Collection, collection_key
from amips_plugins.export.cost_curves import calibrate, curve, levels_by_threshold, thresholds_for
from amips_plugins.layout import lay_out
from amips_plugins.models.cells import Cells, place_keys
from amips_plugins.models.onnx_check import IR_VERSION, OPSET
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

__all__ = ["linear_model", "make_bundle", "publish"]

_SCALE = 12.0  # of the router's scores


def publish(
    collection: Collection,
    queries: FloatArray,
    folder: Path,
    *,
    n_cells: int = 8,
    recall: float = 0.9,
    storage: str | None = None,
) -> Collection:
    """Make a bundle for a collection, publish it in ``folder / "registry"`` and lay it out.

    Returns
    -------
    Collection
        The collection in its cells.
    """
    made = make_bundle(collection, queries, folder / "made", n_cells=n_cells, recall=recall)
    Registry(folder / "registry").publish(made)
    return lay_out(collection, Bundle.in_folder(made), storage=storage)  # type: ignore[arg-type]


def make_bundle(
    collection: Collection, queries: FloatArray, folder: Path, *, n_cells: int, recall: float
) -> Path:
    """Write a bundle, calibrated on these queries."""
    info = collection.info
    batches = list(collection.scan(1000))
    ids = [key for batch in batches for key in batch.ids]
    keys = np.concatenate([batch.vectors for batch in batches])
    places = place_keys(keys, info.metric)
    centroids = _k_means(places, n_cells)
    offsets = -0.5 * np.einsum("ij,ij->i", centroids, centroids)
    drawn = Cells(centroids, offsets, np.zeros(n_cells, np.int64)).assign(keys, info.metric)
    cells = Cells(centroids, offsets, np.bincount(drawn, minlength=n_cells).astype(np.int64))

    lifted = lift_keys(keys, info.metric)
    means = np.stack([lifted[drawn == cell].mean(axis=0) for cell in range(n_cells)])
    asked = lift_queries(queries, info.metric)
    best = np.argsort(-(asked @ lifted.T), axis=1)[:, :10]
    logits = _SCALE * (normalise(asked) @ means.T)
    priority = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    half = len(queries) // 2
    thresholds = thresholds_for(priority[:half], drawn[best[:half]])
    levels = levels_by_threshold(priority[half:], thresholds)
    measured = curve(levels, len(thresholds), drawn[best[half:]], cells.sizes, n_cells)

    recorded = io.BytesIO()
    both = np.stack([drawn.astype(np.int32), sketch(keys, info.metric)], axis=1)
    np.save(recorded, both, allow_pickle=False)
    files = {
        MODEL: linear_model(means.astype(np.float32), info.metric, info.dim),
        CELLS: cells.to_bytes(),
        CALIBRATION: calibrate(measured, thresholds, 10).to_bytes(),
        KNOWN_CELLS: recorded.getvalue(),
        IDS: b"".join(msgspec.json.encode(key) + b"\n" for key in ids),
    }
    manifest = Manifest(
        format=FORMAT,
        version="v1",
        created="2026-01-01T00:00:00+00:00",
        collection=collection_key(info),
        metric=info.metric,
        dim=info.dim,
        snapshot="0" * 64,
        count=len(keys),
        model="linear",
        preset="test",
        parameters=means.size,
        n_cells=n_cells,
        layout=cells.layout(),
        queries="log",
        default_k=10,
        default_recall=recall,
        choice="linear",
        reason="made by hand",
        figures=[],
        tools={},
        files={name: describe_file(data) for name, data in files.items()},
    )
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return folder


def linear_model(weight: FloatArray, metric: Metric, dim: int) -> bytes:
    """Write a router that scores cells by the rows of ``(n_cells, lifted_dim)`` weights."""
    n_cells, width = weight.shape
    assert width == lifted_dim(dim, metric)
    constants = {"weight": weight, "tiny": np.float32(1e-30), "scale": np.float32(_SCALE)}
    nodes = []
    query = "queries"
    if metric is Metric.L2:
        constants |= {"zeros": np.zeros((1, dim), np.float32), "one": np.ones(1, np.float32)}
        nodes += [
            helper.make_node("Gemm", [query, "zeros", "one"], ["ones"], transB=1),
            helper.make_node("Concat", [query, "ones"], ["lifted"], axis=1),
        ]
        query = "lifted"
    nodes += [
        helper.make_node("ReduceL2", [query], ["length"], axes=[1], keepdims=1),
        helper.make_node("Max", ["length", "tiny"], ["divisor"]),
        helper.make_node("Div", [query, "divisor"], ["unit"]),
        helper.make_node("Gemm", ["unit", "weight"], ["scores"], transB=1),
        helper.make_node("Mul", ["scores", "scale"], ["logits"]),
        helper.make_node("LogSoftmax", ["logits"], ["priority"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "amips",
        [helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["n", dim])],
        [helper.make_tensor_value_info("priority", TensorProto.FLOAT, ["n", n_cells])],
        [numpy_helper.from_array(np.ascontiguousarray(c), name) for name, c in constants.items()],
    )
    imports = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def _k_means(places: FloatArray, n_cells: int) -> FloatArray:
    rng = np.random.default_rng(0)
    centroids = places[rng.choice(len(places), n_cells, replace=False)]
    for _ in range(10):
        distances = -2 * places @ centroids.T + np.einsum("ij,ij->i", centroids, centroids)
        nearest: IntArray = distances.argmin(axis=1)
        for cell in range(n_cells):
            if (nearest == cell).any():
                centroids[cell] = places[nearest == cell].mean(axis=0)
    return centroids
