"""A bundle's cells and router as plain tensors, for an engine's own pruner or another program.

Two files, and no program of ours needed to read them: ``cells.safetensors`` holds the arrays and
``cells.json`` says what each of them is, how a key finds its cell and a query its order of cells.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from amips_plugins.bundle.contents import (
    CALIBRATION,
    CELLS,
    FURTHER_CELLS,
    IDS,
    KNOWN_CELLS,
    MODEL,
    load,
)
from amips_plugins.bundle.package import Bundle
from amips_plugins.errors import InvalidInput, require
from amips_plugins.files import replace_file
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import FloatArray, Metric, lift_queries, normalise

__all__ = ["DESCRIPTION", "TENSORS", "export_cells"]

TENSORS = "cells.safetensors"
DESCRIPTION = "cells.json"
_FORMAT = 1
_CHECKED = 64  # queries that the linear form has to agree with the model on
_TOLERANCE = 0.1  # of a priority, a logarithm: the steps of a query in 8 bits differ by so much
_STEPS = 63  # of a query on either side of zero: see ``to_onnx``

_PLACE = {
    Metric.COSINE: "place = key / |key|",
    Metric.IP: "place = key / |key|",
    Metric.L2: "place = key - centre, where there is a centre; else place = key",
}
_SEEN = (
    "seen = place + view_weight * unit(place @ view_matrix), made unit unless the metric is L2, "
    "and one more coordinate: place @ popularity[:-1] + popularity[-1]"
)
_UNIT = {
    Metric.COSINE: "unit = query / |query|",
    Metric.IP: "unit = query / |query|",
    Metric.L2: "lifted = (query - centre, 1), where there is a centre; unit = lifted / |lifted|",
}
_LINEAR = "priority = log_softmax(unit @ router_weight.T + router_bias) + router_offset"
_MODEL = ["priority = what model.onnx gives for the query as it is"]
_SEARCH = "search the cells whose priority is at least the threshold, the best one in any case"


def export_cells(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """Write a bundle's cells, router, calibration and assignment in a form of nobody's own.

    Parameters
    ----------
    bundle
        With cells that a layout uses: ``linear`` or ``supportnet``.
    folder
        Made where it is missing. Gets ``cells.safetensors``, ``cells.json``, ``model.onnx`` and
        ``ids.jsonl``; the description is written last, with the others' checksums.

    Returns
    -------
    dict
        What ``cells.json`` says.

    Raises
    ------
    InvalidInput
        The bundle has no cells of its own, as a KeyNet has none, or partitions of users.
    """
    require("safetensors", "train")
    from safetensors.numpy import load as read_tensors
    from safetensors.numpy import save

    manifest = bundle.manifest
    if CELLS not in manifest.files:
        raise InvalidInput(
            f"A bundle of model {manifest.model!r} has no cells to export: train with --model "
            "linear or supportnet, and without --partitions."
        )
    contents = load(bundle)
    cells, calibration = contents[CELLS], contents[CALIBRATION]
    about: dict[str, str] = {}
    tensors: dict[str, npt.NDArray[Any]] = {}

    def add(name: str, array: Any, meaning: str) -> None:
        tensors[name] = np.ascontiguousarray(array)  # the format knows no other order
        about[name] = meaning

    add("centroids", cells.centroids, "of cells, in the space of what a key is seen as")
    add("offsets", cells.offsets, "a key's cell has the largest seen @ centroid + offset")
    add("sizes", cells.sizes, "keys of the snapshot in each cell, copies counted")
    if cells.centre is not None:
        add("centre", cells.centre, "where places are counted from")
    if cells.view is not None:
        add("view_matrix", cells.view.matrix, "a key to the mean direction of its queries")
        add(
            "view_weight",
            np.array([cells.view.weight], dtype=np.float32),
            "how far a key moves that way",
        )
        add("popularity", cells.view.popularity, "how often queries are expected to hit a key")
    known = contents[KNOWN_CELLS]
    add("assignment", known[:, 0], "the cell of each key of ids.jsonl, which wins over the rule")
    if FURTHER_CELLS in manifest.files:
        add("further_cells", contents[FURTHER_CELLS], "(row, cell) of keys in more cells than one")
    model = contents[MODEL]
    linear = _linear_form(model, manifest.metric, manifest.dim, cells.centre)
    if linear is not None:
        weight, bias, offset = linear
        add("router_weight", weight, "of the linear router, for unit queries")
        add("router_bias", bias, "of the linear router")
        add("router_offset", offset, "what a cell's size costs")
    add("thresholds", calibration.thresholds, "a query searches the cells of priority above one")
    add("recall", calibration.recall, "(k - 1, level): mean recall@k at each threshold")
    add("guaranteed", calibration.guaranteed, "the same, which holds with the confidence given")
    add("scanned", calibration.scanned, "share of the keys in the cells above each threshold")
    data = save(tensors)
    back = read_tensors(data)
    if any(not np.array_equal(back[name], array) for name, array in tensors.items()):
        raise InvalidInput("This release of safetensors does not keep arrays; take another.")
    files = {TENSORS: data, "model.onnx": model, "ids.jsonl": contents[IDS]}
    described = {
        "format": _FORMAT,
        "bundle": manifest.version,
        "collection": str(manifest.collection),
        "metric": manifest.metric.value,
        "dim": manifest.dim,
        "n_cells": manifest.n_cells,
        "layout": manifest.layout,
        "confidence": calibration.confidence,
        "key": [
            _PLACE[manifest.metric],
            _SEEN if cells.view is not None else "seen = place",
            "cell = argmax(seen @ centroids.T + offsets)",
        ],
        "query": [*(_MODEL if linear is None else [_UNIT[manifest.metric], _LINEAR]), _SEARCH],
        "tensors": {
            name: {"shape": list(array.shape), "type": str(array.dtype), "is": about[name]}
            for name, array in tensors.items()
        },
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    for name, content in files.items():
        replace_file(folder / name, content)
    replace_file(
        folder / DESCRIPTION, msgspec.json.format(msgspec.json.encode(described), indent=2)
    )
    return described


def _linear_form(
    model: bytes, metric: Metric, dim: int, centre: FloatArray | None
) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Return weight, bias and offset of a router that is linear; None for any other."""
    found = _read_linear(model)
    if found is None:
        return None
    weight, bias, offset = found
    queries = np.random.default_rng(0).normal(size=(_CHECKED, dim)).astype(np.float32)
    scores = normalise(lift_queries(queries, metric, centre)) @ weight.T + bias
    scores -= scores.max(axis=1, keepdims=True)
    priority = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)) + offset
    (served,) = OnnxModel(model).run(["priority"], {"queries": queries})
    # Another release may write its graphs in another way: then they speak for themselves.
    return found if np.allclose(priority, served, atol=_TOLERANCE) else None


def _read_linear(model: bytes) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Find the constants of ``log_softmax(W u + b) + offset``, W in floats or in 8 bits."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(model).graph
    made = {name: node for node in graph.node for name in node.output}
    constant = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def back(name: str, *operators: str) -> Any:
        """Follow first inputs through these operators, to the last one's node."""
        node = None
        for operator in operators:
            node = made.get(name)
            if node is None or node.op_type != operator:
                return None
            name = node.input[0]
        return node

    end = graph.output[0].name
    softmax = back(end, "Identity", "Add", "LogSoftmax")
    if softmax is None:
        return None
    offset = constant[back(end, "Identity", "Add").input[1]]
    start = softmax.input[0]
    if (product := back(start, "Gemm")) is not None and back(start, "Gemm", "Div") is not None:
        weight, bias = constant[product.input[1]], constant[product.input[2]]
    elif (whole := back(start, "Add", "Div", "Mul", "Cast", "MatMulInteger")) is not None:
        steps = constant[back(start, "Add", "Div", "Mul").input[1]] * np.float32(_STEPS)
        weight = constant[whole.input[1]].T.astype(np.float32) * steps[:, None]
        bias = constant[back(start, "Add").input[1]]
    else:
        return None
    return weight, bias, offset
