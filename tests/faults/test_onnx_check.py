"""The check of models allows what training writes, and knows what a graph will do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from amips_plugins.errors import BundleCorrupt
from amips_plugins.export.nets import KeyNet
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.onnx_check import IR_VERSION, OPERATORS, OPSET, check_onnx
from amips_plugins.vectors import Metric, lifted_dim
from tests.export.data import every_net

DIM, CELLS = 6, 9


def written() -> list[Any]:
    """Every kind of graph that training writes."""
    models = []
    for metric in Metric:
        for net in every_net(lifted_dim(DIM, metric), CELLS).values():
            order = Order(1.7, np.zeros(CELLS, dtype=np.float32))
            data = to_onnx(net, DIM, metric, None if isinstance(net, KeyNet) else order)
            check_onnx(data)
            models.append(onnx.load_from_string(data))
    return models


def test_what_is_allowed_is_what_training_writes_and_no_more() -> None:
    seen: dict[str, Any] = {}
    for model in written():
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert model.ir_version == IR_VERSION
        for node in model.graph.node:
            values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            assert seen.setdefault(node.op_type, plain) == plain
    assert seen == OPERATORS


SIZES = st.sampled_from([1, 2, 3, 4])
SHAPES = st.one_of(st.just(()), st.tuples(SIZES), st.tuples(SIZES, SIZES))
WIDEST = 12
ONE_INPUT = ("ArgMax", "Identity", "LogSoftmax", "ReduceL2", "Relu", "Sign", "Slice")


def passes(data: bytes) -> bool:
    try:
        check_onnx(data)
    except BundleCorrupt:
        return False
    return True


@st.composite
def graphs(draw: st.DrawFn) -> bytes:
    """Random nodes over random constants, each of them one that passes."""
    dim = draw(SIZES)
    names = ["queries"]
    constants = [
        numpy_helper.from_array(np.array([value], np.int64), f"i{value}") for value in (0, 1, 2)
    ]
    for place in range(4):
        array = np.full(draw(SHAPES), 0.5, dtype=np.float32)
        constants.append(numpy_helper.from_array(array, f"c{place}"))
        names.append(f"c{place}")

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
    best = model(nodes, output := "queries", width := dim)
    for place in range(12):
        operator = draw(st.sampled_from(sorted(OPERATORS)))
        count = 1 if operator in ONE_INPUT else draw(st.sampled_from([2, 3]))
        taken = [draw(st.sampled_from(names)) for _ in range(count)]
        taken += ["i0", draw(st.sampled_from(["i1", "i2"])), "i1"] if operator == "Slice" else []
        node = helper.make_node(operator, taken, [name := f"v{place}"])
        for key, value in OPERATORS[operator].items():
            plain = list(value) if isinstance(value, tuple) else value
            node.attribute.append(helper.make_attribute(key, plain))
        tried = [*nodes, node]
        if operator == "ArgMax":  # its integers can be no output
            fitting = [model(tried, output, width)]
        else:
            fitting = [model(tried, name, columns) for columns in range(1, WIDEST)]
        fitting = [data for data in fitting if passes(data)]
        if fitting:
            (best,) = fitting  # no other width passes
            nodes, names = tried, [*names, name]
            if operator != "ArgMax":
                output = name
                width = onnx.load_from_string(best).graph.output[0].type.tensor_type.shape.dim[1]
                width = width.dim_value
    return best


@given(graphs(), st.sampled_from([1, 2, 3, 5]))
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_passes_gives_the_shapes_worked_out(data: bytes, count: int) -> None:
    graph = onnx.load_from_string(data).graph
    (source,), (target,) = graph.input, graph.output
    dim, width = (value.type.tensor_type.shape.dim[1].dim_value for value in (source, target))
    if not graph.node:
        return
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    try:
        (output,) = session.run(None, {"queries": np.ones((count, dim), dtype=np.float32)})
    except Exception as exc:  # noqa: BLE001 - its classes are not public
        # ONNX Runtime looks at the rows that a Gather takes, and refuses those that are not there.
        assert "indices element out of data bounds" in str(exc)  # noqa: PT017
        return
    assert output.shape == (count, width)
    assert output.dtype == np.float32
