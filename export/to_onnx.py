"""Writing nets as ONNX graphs, by hand: few plain operators, one file, no external data.

Every graph takes the query as the user has it, lifts it (see ``amips_plugins.vectors``) and divides
its length out. ``tests/export/test_to_onnx.py`` holds each graph against its torch net.

Routers: ``queries (n, dim)`` to

- ``scores (n, n_cells)``: what the net says of every cell (support values for a SupportNet);
- ``priority (n, n_cells)``: what cells are chosen by, see ``Order``;
- ``keys (n, dim)``, SupportNet only: the gradient of the best head, which is the predicted key.

KeyNet: ``queries (n, dim)`` to ``rewritten (n, dim)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from amips_plugins.export.nets import KeyNet, LinearRouter, LowRankRouter, Net, SupportNet
from amips_plugins.vectors import FloatArray, Metric

__all__ = ["Order", "to_onnx"]

_OPSET = 17
_IR_VERSION = 8  # what ONNX Runtime 1.14 and later read


@dataclass(frozen=True)
class Order:
    """How scores of unit queries become the priorities that cells are searched by.

    ``priority = log_softmax(scale * score) + offset``: the log of the estimated share of the top
    keys that lie in the cell, less what searching the cell costs. It compares across queries, so
    that one threshold serves them all. Without a scale, ``priority = score + offset``.

    Attributes
    ----------
    scale
        Positive factor; None leaves the scores as they are.
    offset
        ``(n_cells,)`` float32, such as a penalty for large cells.
    """

    scale: float | None
    offset: FloatArray

    def priority(self, scores: FloatArray) -> FloatArray:
        """Return what the exported graph gives for these scores of unit queries."""
        if self.scale is None:
            return scores + self.offset
        logits = self.scale * scores
        logits = logits - logits.max(axis=1, keepdims=True)
        priority: FloatArray = (
            logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) + self.offset
        )
        return priority


def to_onnx(net: Net, dim: int, metric: Metric, order: Order | None = None) -> bytes:
    """Write a net as an ONNX file.

    Parameters
    ----------
    net
        The net; its input dimension is the lifted one.
    dim
        Dimension of the collection's vectors.
    metric
        Metric of the collection.
    order
        How a router orders its cells; left out for a KeyNet.

    Returns
    -------
    bytes
        A checked ONNX model.
    """
    graph = _Graph()
    unit, length = _unit_query(graph, dim, metric)
    inputs = [helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["n", dim])]
    outputs = []
    if isinstance(net, KeyNet):
        rewritten = _keynet(graph, net, unit)
        if metric is Metric.L2:
            rewritten = graph.slice_columns(rewritten, dim)
        graph.name(rewritten, "rewritten")
        outputs.append(helper.make_tensor_value_info("rewritten", TensorProto.FLOAT, ["n", dim]))
    else:
        if order is None:
            raise ValueError("a router needs an order")
        keys = None
        if isinstance(net, LinearRouter):
            scores = graph.affine(unit, net.weight, net.bias)
        elif isinstance(net, LowRankRouter):
            scores = graph.affine(graph.affine(unit, net.down), net.up, net.bias)
        else:
            scores, keys = _supportnet(graph, net, unit)
            graph.name(graph.add("Mul", scores, length), "scores")
        n_cells = len(order.offset)
        if keys is None:
            graph.name(scores, "scores")
        if order.scale is not None:
            logits = graph.add("Mul", scores, graph.constant(np.float32(order.scale)))
            scores = graph.add("LogSoftmax", logits, axis=1)
        graph.name(graph.add("Add", scores, graph.constant(order.offset)), "priority")
        outputs += [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", n_cells]),
            helper.make_tensor_value_info("priority", TensorProto.FLOAT, ["n", n_cells]),
        ]
        if keys is not None:
            graph.name(graph.slice_columns(keys, dim) if metric is Metric.L2 else keys, "keys")
            outputs.append(helper.make_tensor_value_info("keys", TensorProto.FLOAT, ["n", dim]))
    return graph.finish(inputs, outputs)


class _Graph:
    """Nodes and constants in the making."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._count = 0

    def _fresh(self) -> str:
        self._count += 1
        return f"t{self._count}"

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = self._fresh()
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array, dtype), name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = self._fresh()
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def affine(self, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
        """``x W^T + b`` as one operator."""
        terms = [x, self.constant(weight)] + ([] if bias is None else [self.constant(bias)])
        return self.add("Gemm", *terms, transB=1)

    def slice_columns(self, x: str, stop: int) -> str:
        bounds = [self.constant(np.array([at]), np.int64) for at in (0, stop, 1)]
        return self.add("Slice", x, *bounds)

    def name(self, x: str, name: str) -> None:
        self._nodes.append(helper.make_node("Identity", [x], [name]))

    def finish(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> bytes:
        graph = helper.make_graph(self._nodes, "amips", inputs, outputs, self._constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="amips-plugins",
        )
        onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString()
        return data


def _unit_query(graph: _Graph, dim: int, metric: Metric) -> tuple[str, str]:
    """Lift the query; return it with unit length, and its length."""
    query = "queries"
    if metric is Metric.L2:
        ones = graph.affine(query, torch.zeros(1, dim), torch.ones(1))
        query = graph.add("Concat", query, ones, axis=1)
    length = graph.add("ReduceL2", query, axes=[1], keepdims=1)
    unit = graph.add("Div", query, graph.add("Max", length, graph.constant(np.float32(1e-30))))
    if metric is Metric.COSINE:  # the support value of the direction
        length = graph.constant(np.float32(1.0))
    return unit, length


def _keynet(graph: _Graph, net: KeyNet, u: str) -> str:
    z = u
    last = len(net.weights) - 1
    for place, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        z = graph.affine(z, weight, bias)
        if place < last:
            z = graph.add("Relu", z)
    return graph.add("Add", z, u) if net.residual else z


def _supportnet(graph: _Graph, net: SupportNet, u: str) -> tuple[str, str]:
    """Forward pass, and the gradient of the best head as plain operators.

    The query has unit length, so the terms with ||u|| are biases and d||u||/du is u.
    """
    depth = len(net.mix)
    layers: list[str] = []
    z = ""
    for place in range(depth):
        before = graph.affine(u, net.skip[place], net.norm[place])
        if place:
            before = graph.add("Add", before, graph.affine(z, net.mix[place - 1]))
        z = graph.add("Relu", before)
        layers.append(z)
    direct = graph.affine(u, net.skip[-1], net.norm[-1])
    scores = graph.add("Add", direct, graph.affine(z, net.mix[-1]))

    best = graph.add("ArgMax", scores, axis=1, keepdims=0)
    to_layer = graph.add("Gather", graph.constant(net.mix[-1]), best, axis=0)
    key = graph.add("Gather", graph.constant(net.skip[-1]), best, axis=0)
    norm_weight = graph.add("Gather", graph.constant(net.norm[-1][:, None]), best, axis=0)
    for place in reversed(range(depth)):
        open_units = graph.add("Sign", layers[place])  # the derivative of relu
        to_layer = graph.add("Mul", to_layer, open_units)
        key = graph.add("Add", key, graph.add("MatMul", to_layer, graph.constant(net.skip[place])))
        through = graph.add("MatMul", to_layer, graph.constant(net.norm[place][:, None]))
        norm_weight = graph.add("Add", norm_weight, through)
        if place:
            to_layer = graph.add("MatMul", to_layer, graph.constant(net.mix[place - 1]))
    return scores, graph.add("Add", key, graph.add("Mul", norm_weight, u))
