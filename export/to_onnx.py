"""Writing nets as ONNX graphs, by hand: few plain operators, one file, no external data.

Every graph takes the query as the user has it, lifts it (see ``amips_plugins.vectors``) and divides
its length out. ``tests/export/test_to_onnx.py`` holds each graph against its torch net.

ONNX Runtime computes every output of a file, whichever are asked for. So what serves has one:

- a router: ``queries (n, dim)`` to ``priority (n, n_cells)``, which chooses cells (``Order``);
- a KeyNet: ``queries (n, dim)`` to ``rewritten (n, dim)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from amips_plugins.export.nets import (
    KeyNet,
    LinearRouter,
    LowRankRouter,
    ManyHeads,
    Net,
    SupportNet,
    TwoLevelRouter,
)
from amips_plugins.vectors import FloatArray, Metric

__all__ = ["Order", "to_onnx"]

_OPSET = 17
_IR_VERSION = 8  # what ONNX Runtime 1.14 and later read
_HOPELESS = -1e4  # the log of a share that is zero

_UnitTimes = Callable[..., str]
"""Writes the product of the unit query with ``(n, lifted_dim)`` weights, plus a bias if any."""


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
    unscored
        ``(n_cells,)`` float32, what stands for the log of the share of a cell that a router does
        not score (a score of minus infinity); None for a hopeless one.
    """

    scale: float | None
    offset: FloatArray
    unscored: FloatArray | None = None

    def priority(self, scores: FloatArray) -> FloatArray:
        """Return what the exported graph gives for these scores of unit queries."""
        if self.scale is None:
            return scores + self.offset
        logits = self.scale * scores
        logits = logits - logits.max(axis=1, keepdims=True)
        shares: FloatArray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        unscored = _HOPELESS if self.unscored is None else self.unscored
        shares = np.where(np.isneginf(shares), unscored, shares).astype(np.float32)
        priority: FloatArray = shares + self.offset
        return priority


def to_onnx(
    net: Net,
    dim: int,
    metric: Metric,
    order: Order | None = None,
    *,
    int8: bool = False,
    centre: FloatArray | None = None,
) -> bytes:
    """Write what serves of a net, whose input dimension is the lifted one, as a checked ONNX file.

    With ``int8`` a router's query is multiplied with weights of 8 bits: half the time, a quarter of
    the memory. Every query and every cell has a step of its own, so that a query is served alone as
    in a batch; integer products are the same on every processor.
    """
    graph = _Graph()
    query = _lifted_query(graph, dim, metric, centre)
    if isinstance(net, KeyNet):
        rewritten = _keynet(graph, net, _unit(graph, query))
        if metric is Metric.L2:
            rewritten = graph.slice_columns(rewritten, dim)
        return graph.finish("rewritten", rewritten, dim, dim)
    if order is None:
        raise ValueError("a router needs an order")
    # Scores are linear in the weights of the last layer, which can take the scale.
    scale = 1.0 if order.scale is None else order.scale
    unit_times = _int8_unit(graph, query) if int8 else _float_unit(graph, query)
    if isinstance(net, LinearRouter):
        scores = unit_times(scale * net.weight, scale * net.bias)
    elif isinstance(net, ManyHeads):
        every = unit_times(scale * net.weight, scale * net.bias)
        scores = graph.largest_of(every, net.heads)
    elif isinstance(net, LowRankRouter):
        scores = graph.affine(unit_times(net.down), scale * net.up, scale * net.bias)
    elif isinstance(net, TwoLevelRouter):
        shares = _two_levels(graph, net, order, unit_times(net.down), scale)
        priority = graph.add("Add", shares, graph.constant(order.offset))
        return graph.finish("priority", priority, dim, len(order.offset))
    else:
        scores = _support_values(graph, net, unit_times, scale)
    if order.scale is not None:
        scores = graph.add("LogSoftmax", scores, axis=1)
    priority = graph.add("Add", scores, graph.constant(order.offset))
    return graph.finish("priority", priority, dim, len(order.offset))


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
        self._constants.append(numpy_helper.from_array(np.asarray(array, dtype, order="C"), name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = self._fresh()
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def best(self, x: str, count: int) -> str:
        """Return the numbers of the largest columns, best first."""
        values, numbers = self._fresh(), self._fresh()
        wanted = self.constant(np.array([count]), np.int64)
        self._nodes.append(helper.make_node("TopK", [x, wanted], [values, numbers]))
        return numbers

    def rows(self, table: Any, numbers: str, dtype: Any = np.float32) -> str:
        """Look rows of a table up: of each query those with its numbers, one behind another."""
        return self.add("Gather", self.constant(table, dtype), numbers, axis=0)

    def reshape(self, x: str, *shape: int) -> str:
        """Give every query's numbers another shape; 0 leaves an axis as it is."""
        return self.add("Reshape", x, self.constant(np.array([0, *shape]), np.int64))

    def affine(self, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
        """``x W^T + b`` as one operator."""
        terms = [x, self.constant(weight)] + ([] if bias is None else [self.constant(bias)])
        return self.add("Gemm", *terms, transB=1)

    def largest_of(self, x: str, group: int) -> str:
        """Take the largest of every ``group`` neighbouring columns."""
        return self.add("ReduceMax", self.reshape(x, -1, group), axes=[2], keepdims=0)

    def slice_columns(self, x: str, stop: int) -> str:
        bounds = [self.constant(np.array([at]), np.int64) for at in (0, stop, 1)]
        return self.add("Slice", x, *bounds)

    def finish(self, name: str, value: str, dim: int, columns: int) -> bytes:
        """Close the graph: its one output by name, a value made here, and its columns."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        graph = helper.make_graph(
            self._nodes,
            "amips",
            [_rows("queries", dim)],
            [_rows(name, columns)],
            self._constants,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="amips-plugins",
        )
        onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString()
        return data


def _rows(name: str, columns: int) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", columns])


def _lifted_query(graph: _Graph, dim: int, metric: Metric, centre: FloatArray | None) -> str:
    if metric is not Metric.L2:
        return "queries"
    ones = graph.affine("queries", torch.zeros(1, dim), torch.ones(1))
    query = "queries"
    if centre is not None:
        query = graph.add("Add", query, graph.constant(-centre))
    return graph.add("Concat", query, ones, axis=1)


def _unit(graph: _Graph, query: str) -> str:
    """Divide the query by its length."""
    length = graph.add("ReduceL2", query, axes=[1], keepdims=1)
    return graph.add("Div", query, graph.add("Max", length, graph.constant(np.float32(1e-30))))


def _float_unit(graph: _Graph, query: str) -> _UnitTimes:
    return partial(graph.affine, _unit(graph, query))


def _int8_unit(graph: _Graph, query: str) -> _UnitTimes:
    """Write the unit query in whole steps, and products with it in whole numbers.

    Queries have 63 steps on either side of zero, not 127: processors without a product of 8 bits
    add two of them in 16, and these would not fit.
    """
    largest = graph.add("ReduceMax", graph.add("Abs", query), axes=[1], keepdims=1)
    tiny = graph.constant(np.finfo(np.float32).tiny)
    row = graph.add("Div", query, graph.add("Max", largest, tiny))
    # One entry is 1 now, but in a row of zeros.
    length = graph.add("ReduceL2", row, axes=[1], keepdims=1)
    length = graph.add("Max", length, graph.constant(np.float32(1.0)))
    zero = graph.constant(np.uint8(64), np.uint8)
    steps = graph.add("QuantizeLinear", row, graph.constant(np.float32(1 / 63)), zero)

    def times(weight: Tensor, bias: Tensor | None = None) -> str:
        weights = weight.detach().cpu().numpy().astype(np.float64)
        step = np.maximum(np.abs(weights).max(axis=1), np.finfo(np.float32).tiny) / 127
        whole = graph.constant(np.rint(weights / step[:, None]).T, np.int8)
        product = graph.add("Cast", graph.add("MatMulInteger", steps, whole, zero), to=1)
        size = graph.add("Mul", product, graph.constant(step / 63))
        scores = graph.add("Div", size, length)
        return scores if bias is None else graph.add("Add", scores, graph.constant(bias))

    return times


def _keynet(graph: _Graph, net: KeyNet, u: str) -> str:
    z = u
    last = len(net.weights) - 1
    for place, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        z = graph.affine(z, weight, bias)
        if place < last:
            z = graph.add("Relu", z)
    return graph.add("Add", z, u) if net.residual else z


def _support_values(graph: _Graph, net: SupportNet, unit_times: _UnitTimes, scale: float) -> str:
    """Forward pass: scores times a scale.

    The query has unit length, so the terms with ||u|| are biases.
    """
    depth = len(net.mix)
    z = ""
    for place in range(depth):
        before = unit_times(net.skip[place], net.norm[place])
        if place:
            before = graph.add("Add", before, graph.affine(z, net.mix[place - 1]))
        z = graph.add("Relu", before)
    direct = unit_times(scale * net.skip[-1], scale * net.norm[-1])
    return graph.add("Add", direct, graph.affine(z, scale * net.mix[-1]))


def _two_levels(graph: _Graph, net: TwoLevelRouter, order: Order, x: str, scale: float) -> str:
    """Log of the shares of all cells: scored in the best groups of x, the low-rank query.

    The cells of a group lie side by side, so that a group is one row of every table. Places that
    no cell uses are scored as hopeless, and written to a column behind the last cell.
    """
    members, rank = net.members.cpu(), net.up.shape[1]
    n_cells, (n_groups, size) = len(net.bias), members.shape
    unused, cells = members < 0, members.clamp_min(0)
    up = (scale * net.up.detach().cpu())[cells] * ~unused[:, :, None]
    bias = (scale * net.bias.detach().cpu())[cells].masked_fill(unused, _HOPELESS)
    groups = graph.best(graph.affine(x, net.group_up, net.group_bias), net.visited)
    rows = graph.reshape(graph.rows(up.reshape(n_groups, size * rank), groups), -1, rank)
    products = graph.add("MatMul", rows, graph.reshape(x, -1, 1))
    biases = graph.reshape(graph.rows(bias, groups), -1)
    scores = graph.add("Add", graph.reshape(products, -1), biases)
    if order.scale is not None:
        scores = graph.add("LogSoftmax", scores, axis=1)
    places = graph.rows(members.masked_fill(unused, n_cells), groups, np.int64)
    unscored = np.full(n_cells, _HOPELESS) if order.unscored is None else order.unscored
    others = graph.constant(np.append(unscored, 0.0)[None, :])
    nothing = graph.affine(x, torch.zeros(1, rank))  # a row for every query
    every = graph.add("Add", nothing, others)
    every = graph.add("ScatterElements", every, graph.reshape(places, -1), scores, axis=1)
    return graph.slice_columns(every, n_cells)
