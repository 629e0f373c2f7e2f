"""A bundle for any collection, made by hand in a second, without the packages that training needs.

The cells are k-means', the router scores them by their mean keys. ``tests.support.bundles`` has
smaller ones, which tests change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from amips_plugins import Registry
from amips_plugins.bundle.contents import (
    CALIBRATION,
    CELLS,
    GOLDEN_OUTPUTS,
    IDS,
    KEY_SAMPLE,
    KNOWN_CELLS,
    MODEL,
    REFERENCE,
    BundleContents,
    write_ids,
)
from amips_plugins.bundle.golden_outputs import GoldenOutputs
from amips_plugins.bundle.key_sample import SAMPLED, KeySample
from amips_plugins.bundle.package import Bundle
from amips_plugins.bundle.reference import Reference
from amips_plugins.cell_layout import CellIndex
from amips_plugins.collection import Collection, CollectionInfo, collection_key
from amips_plugins.export.cost_curves import calibrate, curve, levels_by_threshold, thresholds_for
from amips_plugins.layout import lay_out
from amips_plugins.models.cells import Cells, place_keys
from amips_plugins.models.onnx_check import IR_VERSION, OPSET
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

K = 10


def publish(
    collection: Collection,
    queries: FloatArray,
    folder: Path,
    *,
    n_cells: int = 8,
    recall: float = 0.9,
    storage: str | None = None,
    index: CellIndex | None = None,
) -> Collection:
    """Make a bundle for a collection, publish it in ``folder / "registry"`` and lay it out.

    Returns
    -------
    Collection
        The collection in its cells.
    """
    made = make_bundle(collection, queries, folder / "made", n_cells=n_cells, recall=recall)
    Registry(folder / "registry").publish(made)
    return lay_out(
        collection,
        Bundle.in_folder(made),
        storage=storage,  # type: ignore[arg-type]
        index=index,
    )


def make_bundle(
    collection: Collection, queries: FloatArray, folder: Path, *, n_cells: int, recall: float
) -> Path:
    """Write a bundle, calibrated on these queries."""
    info = collection.info
    batches = list(collection.scan(1000))
    ids = [key for batch in batches for key in batch.ids]
    keys = np.concatenate([batch.vectors for batch in batches])
    centroids = _k_means(place_keys(keys, info.metric), n_cells)
    made = make_contents(ids, keys, info.metric, centroids, queries)
    made.write(folder, **about(info, len(keys), n_cells, recall), version="v1")
    return folder


def about(
    info: CollectionInfo, count: int, n_cells: int, recall: float, model: str = "linear"
) -> dict[str, Any]:
    """Fields of the manifest."""
    return {
        "created": "2026-01-01T00:00:00+00:00",
        "collection": collection_key(info),
        "metric": info.metric,
        "dim": info.dim,
        "snapshot": "0" * 64,
        "count": count,
        "model": model,
        "preset": "test",
        "parameters": info.dim * n_cells,
        "queries": "log",
        "default_k": K,
        "default_recall": recall,
        "choice": model,
        "reason": "made by hand",
        "figures": [],
        "tools": {},
    }


def make_contents(
    ids: Sequence[int | str],
    keys: FloatArray,
    metric: Metric,
    centroids: FloatArray,
    queries: FloatArray,
    scale: float = 12.0,
) -> BundleContents:
    """Cut the keys by the nearest centroid; the scores of a cell are those of its mean key.

    Half the queries choose the thresholds, and half are calibrated on.
    """
    n_cells = len(centroids)
    offsets = (-0.5 * np.einsum("ij,ij->i", centroids, centroids)).astype(np.float32)
    drawn = Cells(centroids, offsets, np.zeros(n_cells, np.int64)).assign(keys, metric)
    cells = Cells(centroids, offsets, np.bincount(drawn, minlength=n_cells).astype(np.int64))
    lifted = lift_keys(keys, metric)
    means = np.stack(
        [lifted[drawn == cell].sum(axis=0) / max(1, cells.sizes[cell]) for cell in range(n_cells)]
    ).astype(np.float32)
    asked = lift_queries(queries, metric)
    best = np.argsort(-(asked @ lifted.T), axis=1)[:, :K]
    logits = scale * (normalise(asked) @ means.T)
    priority = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    half = len(queries) // 2
    thresholds = thresholds_for(priority[:half], drawn[best[:half]])
    levels = levels_by_threshold(priority[half:], thresholds)
    measured = curve(levels, len(thresholds), drawn[best[half:]], cells.sizes, n_cells)
    known = np.stack([drawn.astype(np.int32), sketch(keys, metric)], axis=1)
    values: dict[str, Any] = {
        CELLS: cells,
        CALIBRATION: calibrate(measured, thresholds, K),
        KNOWN_CELLS: known,
        IDS: write_ids(ids),
    }
    model = linear_model(means, metric, keys.shape[1], scale)
    return BundleContents(values | _said(ids, keys, metric, model, "priority", queries))


def keynet_contents(
    ids: Sequence[int | str], keys: FloatArray, metric: Metric, queries: FloatArray
) -> BundleContents:
    """What an untrained KeyNet gives: the query's direction."""
    dim = keys.shape[1]
    nodes, constants, unit = _unit(dim, metric)
    if metric is Metric.L2:
        bounds = {f"at{bound}": np.array([bound], np.int64) for bound in {0, 1, dim}}
        constants |= bounds
        nodes.append(helper.make_node("Slice", [unit, "at0", f"at{dim}", "at1"], ["rewritten"]))
    else:
        nodes.append(helper.make_node("Identity", [unit], ["rewritten"]))
    model = _model(nodes, constants, dim, "rewritten", dim)
    return BundleContents(_said(ids, keys, metric, model, "rewritten", queries))


def _said(
    ids: Sequence[int | str],
    keys: FloatArray,
    metric: Metric,
    model: bytes,
    output: str,
    queries: FloatArray,
) -> dict[str, Any]:
    """Return the model, what it gives for golden queries and those of the users, some keys."""
    session = OnnxModel(model)
    (outputs,) = session.run([output], {"queries": queries})
    golden = GoldenOutputs.record(session, output, queries.shape[1])
    return {
        MODEL: model,
        GOLDEN_OUTPUTS: golden,
        REFERENCE: Reference.of(outputs),
        KEY_SAMPLE: KeySample.of(ids[:SAMPLED], keys[:SAMPLED], metric),
    }


def linear_model(weight: FloatArray, metric: Metric, dim: int, scale: float) -> bytes:
    """Write a router that scores cells by the rows of ``(n_cells, lifted_dim)`` weights."""
    n_cells, width = weight.shape
    assert width == lifted_dim(dim, metric)
    nodes, constants, unit = _unit(dim, metric)
    constants |= {"weight": scale * weight}
    nodes += [
        helper.make_node("Gemm", [unit, "weight"], ["logits"], transB=1),
        helper.make_node("LogSoftmax", ["logits"], ["priority"], axis=1),
    ]
    return _model(nodes, constants, dim, "priority", n_cells)


def _unit(dim: int, metric: Metric) -> tuple[list[Any], dict[str, Any], str]:
    """Lift the query and divide its length out."""
    constants: dict[str, Any] = {"tiny": np.float32(1e-30)}
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
    ]
    return nodes, constants, "unit"


def _model(
    nodes: list[Any], constants: Mapping[str, Any], dim: int, output: str, columns: int
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "amips",
        [helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["n", dim])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", columns])],
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
