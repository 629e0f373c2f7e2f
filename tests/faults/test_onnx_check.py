"""The check of models allows what training writes, and knows what a graph will do."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from amips_plugins.errors import BundleCorrupt
from amips_plugins.export.nets import KeyNet, multiplications
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.models.onnx_check import IR_VERSION, OPERATORS, OPSET, check_onnx
from amips_plugins.vectors import Metric, lifted_dim
from tests.support.training_data import every_net

DIM, CELLS = 6, 9


def written() -> list[Any]:
    """Every kind of graph that training writes."""
    models = []
    for metric in Metric:
        for net in every_net(lifted_dim(DIM, metric), CELLS).values():
            plain = Order(1.7, np.zeros(CELLS, dtype=np.float32))
            order = None if isinstance(net, KeyNet) else plain
            files = [to_onnx(net, DIM, metric, order)]
            if order is not None:
                files.append(to_onnx(net, DIM, metric, order, int8=True))
            for file in files:
                check_onnx(file)
                models.append(onnx.load_from_string(file))
    return models


def test_what_is_allowed_is_what_training_writes_and_no_more() -> None:
    seen: dict[str, Any] = defaultdict(list)
    for model in written():
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert model.ir_version == IR_VERSION
        for node in model.graph.node:
            values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            if plain not in seen[node.op_type]:
                seen[node.op_type].append(plain)
    assert {name: len(ways) for name, ways in seen.items()} == {
        name: len(ways) for name, ways in OPERATORS.items()
    }
    assert all(way in OPERATORS[name] for name, ways in seen.items() for way in ways)


@pytest.mark.parametrize("name", list(every_net(DIM, CELLS)))
def test_multiplications_are_those_of_the_net(name: str) -> None:
    net = every_net(DIM, CELLS)[name]
    order = None if isinstance(net, KeyNet) else Order(1.7, np.zeros(CELLS, dtype=np.float32))
    work = check_onnx(to_onnx(net, DIM, Metric.COSINE, order))
    assert work.multiplications == multiplications(net)


WIDEST = 6
OUTPUTS_ONE = ("Abs", "Identity", "LogSoftmax", "ReduceL2", "ReduceMax", "Relu", "Slice")
LOOK_UPS = ("TopK", "Gather", "MatMul", "ScatterElements")  # the same
IN_8_BITS = ("QuantizeLinear", "MatMulInteger", "Cast")  # one after the other, and no other way


def passes(data: bytes) -> bool:
    try:
        check_onnx(data)
    except BundleCorrupt:
        return False
    return True


def node_of(operator: str, inputs: list[str], output: str) -> Any:
    node = helper.make_node(operator, inputs, [output])
    for key, value in OPERATORS[operator][-1 if inputs[0].startswith("grouped") else 0].items():
        plain = list(value) if isinstance(value, tuple) else value
        node.attribute.append(helper.make_attribute(key, plain))
    return node


def random_graph(rng: np.random.Generator) -> bytes:
    """Random nodes over random constants, each of them one that passes."""
    dim = int(rng.integers(1, 4))
    names = ["queries", "c0", "c1", "c2", "c3"]
    constants = [
        numpy_helper.from_array(np.array([value], np.int64), f"i{value}") for value in (0, 1, 2)
    ]
    for place in range(4):
        shape = rng.integers(1, 4, size=rng.choice([0, 1, 2, 2]))
        constants.append(numpy_helper.from_array(np.full(shape, 0.5, np.float32), f"c{place}"))
        weights = np.ones(rng.integers(1, 4, size=2), np.int8)
        constants.append(numpy_helper.from_array(weights, f"w{place}"))
        into = np.array([0, -1, place + 1], np.int64)
        constants.append(numpy_helper.from_array(into, f"g{place}"))
        table = np.ones((3, place + 1), np.float32)
        constants.append(numpy_helper.from_array(table, f"t{place}"))
    constants.append(numpy_helper.from_array(np.zeros((3, 1), np.int64), "members"))
    constants.append(numpy_helper.from_array(np.array([1]), "first"))
    constants.append(numpy_helper.from_array(np.array([0, -1]), "flat"))
    constants.append(numpy_helper.from_array(np.array(7, np.uint8), "zero"))
    constants.append(numpy_helper.from_array(np.array(0.5, np.float32), "step"))

    def model(nodes: list[Any], output: str, width: int) -> bytes:
        info = helper.make_tensor_value_info
        inputs = [info("queries", TensorProto.FLOAT, ["n", dim])]
        outputs = [info(output, TensorProto.FLOAT, ["n", width])]
        graph = helper.make_graph(nodes, "random", inputs, outputs, constants)
        opset = [helper.make_opsetid("", OPSET)]
        made = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        data: bytes = made.SerializeToString()
        return data

    nodes: list[Any] = []
    best = b""
    for place in range(30):
        operator = str(rng.choice([*OPERATORS, "Gemm", "Gemm"]))
        count = 1 if operator in OUTPUTS_ONE else rng.choice([2, 2, 3])
        taken = [str(name) for name in rng.choice(names, count)]
        if operator == "Gemm":  # else it hardly ever fits
            taken[:2] = str(rng.choice([names[0], *names[5:]])), str(rng.choice(names[1:5]))
        taken += ["i0", rng.choice(["i1", "i2"]), "i1"] if operator == "Slice" else []
        name = f"v{place}"
        steps = [(operator, taken, name)]
        if operator in IN_8_BITS:
            weight = f"w{rng.integers(4)}"
            quantised, product = f"q{place}", f"p{place}"
            steps = [
                ("QuantizeLinear", [taken[0], "step", "zero"], quantised),
                ("MatMulInteger", [quantised, weight, "zero"], product),
                ("Cast", [product], name),
            ]
        if operator in LOOK_UPS:
            numbers = f"numbers{place}"
            steps = [
                ("TopK", ["queries", "first"], f"top{place}"),
                ("Gather", [f"t{dim - 1}", numbers], f"rows{place}"),
                ("Reshape", [f"rows{place}", f"g{dim - 1}"], f"grouped{place}"),
                ("Reshape", ["queries", "g0"], f"column{place}"),
                ("MatMul", [f"grouped{place}", f"column{place}"], f"product{place}"),
                ("Reshape", [f"product{place}", "flat"], f"scores{place}"),
                ("Gather", ["members", numbers], f"cells{place}"),
                ("Reshape", [f"cells{place}", "flat"], f"places{place}"),
                ("ScatterElements", [taken[-1], f"places{place}", f"scores{place}"], name),
            ]
        if operator == "Reshape":
            grouped = f"grouped{place}"
            groups = [taken[0], f"g{rng.integers(4)}"]
            steps = [("Reshape", groups, grouped), ("ReduceMax", [grouped], name)]
        made = [node_of(*step) for step in steps]
        for node in made:
            if node.op_type == "TopK":
                node.output.append(f"numbers{place}")
        for width in range(1, WIDEST + 1):
            data = model([*nodes, *made], name, width)
            if passes(data):
                best = data
                nodes += made
                names.append(name)
                break
    return best


@pytest.mark.slow
def test_what_passes_gives_the_shapes_worked_out() -> None:
    rng = np.random.default_rng(0)
    seen: Counter[str] = Counter()
    for data in filter(None, (random_graph(rng) for _ in range(80))):
        graph = onnx.load_from_string(data).graph
        (source,), (target,) = graph.input, graph.output
        dim, width = (v.type.tensor_type.shape.dim[1].dim_value for v in (source, target))
        seen.update(node.op_type for node in graph.node)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        for count in (1, 2, 3, 5):
            (output,) = session.run(None, {"queries": np.ones((count, dim), np.float32)})
            assert output.shape == (count, width)
            assert output.dtype == np.float32
    assert min(seen[operator] for operator in OPERATORS) >= 3, seen


def quantised(**changes: Any) -> bytes:
    """A product in 8 bits, with one thing changed."""
    steps: dict[str, tuple[str, list[str]]] = {
        "q": ("QuantizeLinear", ["queries", "step", "zero"]),
        "p": ("MatMulInteger", ["q", "weight", "zero"]),
        "priority": ("Cast", ["p"]),
    }
    constants: dict[str, Any] = {
        "step": np.array(0.1, np.float32),
        "zero": np.array(64, np.uint8),
        "weight": np.ones((DIM, CELLS), np.int8),
    }
    for name, value in changes.items():
        (constants if name in constants else steps)[name] = value
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node_of(operator, inputs, output) for output, (operator, inputs) in steps.items()],
        "quantised",
        [info("queries", TensorProto.FLOAT, ["n", DIM])],
        [info("priority", TensorProto.FLOAT, ["n", CELLS])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", OPSET)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    data: bytes = made.SerializeToString()
    return data


@pytest.mark.parametrize(
    "changes",
    [
        {"step": np.array([0.1] * DIM, np.float32)},
        {"step": np.array(1, np.uint8)},
        {"step": np.array(np.nan, np.float32)},
        {"zero": np.array([64], np.uint8)},
        {"zero": np.array(64, np.int8)},
        {"zero": np.array(64.0, np.float32)},
        {"weight": np.ones((DIM + 1, CELLS), np.int8)},
        {"weight": np.ones((DIM, CELLS + 1), np.int8)},
        {"weight": np.ones((DIM, CELLS), np.uint8)},
        {"weight": np.ones((DIM, CELLS), np.float32)},
        {"weight": np.ones(DIM, np.int8)},
        {"weight": np.ones((2, DIM, CELLS), np.int8)},
        {"weight": np.ones((DIM, CELLS), np.int16)},
        {"weight": np.ones((DIM, CELLS), np.int32)},
        {"q": ("QuantizeLinear", ["queries", "step"])},
        {"q": ("QuantizeLinear", ["weight", "step", "zero"])},
        {"q": ("QuantizeLinear", ["queries", "zero", "step"])},
        {"q": ("Identity", ["queries"])},
        {"p": ("MatMulInteger", ["q", "weight"])},
        {"p": ("MatMulInteger", ["q", "q", "zero"])},
        {"p": ("MatMulInteger", ["weight", "q", "zero"])},
        {"p": ("MatMulInteger", ["q", "weight", "zero", "zero"])},
        {"p": ("Identity", ["q"])},
        {"priority": ("Cast", ["q"])},
        {"priority": ("Cast", ["queries"])},
        {"priority": ("Cast", ["p", "p"])},
        {"priority": ("Identity", ["p"])},
    ],
)
def test_a_product_in_8_bits_has_one_form(changes: dict[str, Any]) -> None:
    assert check_onnx(quantised()).multiplications == DIM * CELLS
    with pytest.raises(BundleCorrupt, match="model is refused"):
        check_onnx(quantised(**changes))


def looked_up(**changes: Any) -> bytes:
    """A score of the cells of the best groups, with one thing changed."""
    steps: dict[str, tuple[str, list[str], list[str]]] = {
        "groups": ("Gemm", ["queries", "level"], ["groups"]),
        "best": ("TopK", ["groups", "two"], ["top", "best"]),
        "rows": ("Gather", ["table", "best"], ["rows"]),
        "matrix": ("Reshape", ["rows", "of_dim"], ["matrix"]),
        "column": ("Reshape", ["queries", "of_one"], ["column"]),
        "product": ("MatMul", ["matrix", "column"], ["product"]),
        "scores": ("Reshape", ["product", "in_a_row"], ["scores"]),
        "cells": ("Gather", ["members", "best"], ["cells"]),
        "places": ("Reshape", ["cells", "in_a_row"], ["places"]),
        "base": ("Gemm", ["queries", "zeros"], ["base"]),
        "priority": ("ScatterElements", ["base", "places", "scores"], ["priority"]),
    }
    constants: dict[str, Any] = {
        "level": np.ones((3, DIM), np.float32),
        "two": np.array([2]),
        "table": np.ones((3, 3 * DIM), np.float32),
        "members": np.arange(9).reshape(3, 3),
        "zeros": np.zeros((CELLS, DIM), np.float32),
        "of_dim": np.array([0, -1, DIM]),
        "of_one": np.array([0, -1, 1]),
        "in_a_row": np.array([0, -1]),
    }
    for name, value in changes.items():
        (constants if name in constants else steps)[name] = value
    nodes = []
    for operator, inputs, outputs in steps.values():
        node = node_of(operator, inputs, outputs[0])
        node.output.extend(outputs[1:])
        nodes.append(node)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "looked up",
        [info("queries", TensorProto.FLOAT, ["n", DIM])],
        [info("priority", TensorProto.FLOAT, ["n", CELLS])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", OPSET)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    data: bytes = made.SerializeToString()
    return data


@pytest.mark.parametrize(
    "changes",
    [
        {"two": np.array([0])},
        {"two": np.array([-1])},
        {"two": np.array([4])},  # of three groups
        {"two": np.array(2)},
        {"two": np.array([2.0], np.float32)},
        {"best": ("TopK", ["groups", "two"], ["best"])},
        {"best": ("TopK", ["level", "two"], ["top", "best"])},
        {"best": ("TopK", ["groups"], ["top", "best"])},
        {"rows": ("Gather", ["table", "top"], ["rows"])},
        {"rows": ("Gather", ["groups", "best"], ["rows"])},
        {"rows": ("Gather", ["table", "members"], ["rows"])},
        {"table": np.ones((2, 3 * DIM), np.float32)},  # a group has no row
        {"table": np.ones((3, 3 * DIM), np.int64)},
        {"table": np.ones((3, 3 * DIM), np.int8)},
        {"table": np.ones((3, 3 * DIM + 1), np.float32)},
        {"table": np.ones(3 * DIM, np.float32)},
        {"members": np.arange(9).reshape(3, 3) - 1},
        {"members": np.arange(9).reshape(3, 3) + 1},  # a cell that is not there
        {"members": np.arange(9, dtype=np.int64).reshape(3, 3).astype(np.float32)},
        {"members": np.zeros((3, 2), np.int64)},
        {"of_dim": np.array([0, -1, DIM + 1])},
        {"of_dim": np.array([0, 0, DIM])},
        {"of_dim": np.array([-1, 3, DIM])},
        {"of_one": np.array([0, -1, 2])},
        {"in_a_row": np.array([-1])},
        {"in_a_row": np.array([-1, 6])},
        {"product": ("MatMul", ["column", "matrix"], ["product"])},
        {"product": ("MatMul", ["matrix", "matrix"], ["product"])},
        {"product": ("MatMul", ["matrix", "queries"], ["product"])},
        {"product": ("Identity", ["matrix"], ["product"])},
        {"priority": ("ScatterElements", ["zeros", "places", "scores"], ["priority"])},
        {"priority": ("ScatterElements", ["base", "best", "scores"], ["priority"])},
        {"priority": ("ScatterElements", ["base", "scores", "scores"], ["priority"])},
        {"priority": ("ScatterElements", ["base", "places"], ["priority"])},
        {"priority": ("Identity", ["places"], ["priority"])},
    ],
)
def test_what_is_looked_up_is_known_to_be_there(changes: dict[str, Any]) -> None:
    assert check_onnx(looked_up()).multiplications == 3 * DIM + 6 * DIM + CELLS * DIM
    with pytest.raises(BundleCorrupt, match="model is refused"):
        check_onnx(looked_up(**changes))
