"""What a model file may hold, checked before ONNX Runtime sees a byte of it.

ONNX Runtime loads far more than a router needs: weights from other files, loops, user-defined
functions and operators, tensors of any size. The models of this package are a handful of plain
operators on matrices (``export.to_onnx``), so the check knows exactly those and refuses all else.
It works out the shape of every value too: a graph that passes takes an amount of memory and time
that is known beforehand. The file is read by ``protobuf.Reader``, since the ``onnx`` package is
none that serving needs, and ONNX Runtime can only be asked about a model by loading it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from amips_plugins.errors import BundleCorrupt
from amips_plugins.models.onnx_shapes import (
    FLOAT,
    INT8,
    INT64,
    N_QUERIES,
    UINT8,
    Value,
    results_of,
)
from amips_plugins.models.protobuf import Field, Malformed, Reader

__all__ = ["IR_VERSION", "OPERATORS", "OPSET", "Work", "check_onnx"]

OPSET = 17
IR_VERSION = 8

OPERATORS: Mapping[str, tuple[Mapping[str, int | tuple[int, ...]], ...]] = {
    "Abs": ({},),
    "Add": ({},),
    "Cast": ({"to": 1},),
    "Concat": ({"axis": 1},),
    "Div": ({},),
    "Gather": ({"axis": 0},),
    "Gemm": ({"transB": 1},),
    "Identity": ({},),
    "LogSoftmax": ({"axis": 1},),
    "MatMul": ({},),
    "MatMulInteger": ({},),
    "Max": ({},),
    "Mul": ({},),
    "QuantizeLinear": ({},),
    "ReduceL2": ({"axes": (1,), "keepdims": 1},),
    "ReduceMax": ({"axes": (1,), "keepdims": 1}, {"axes": (2,), "keepdims": 0}),
    "Relu": ({},),
    "Reshape": ({},),
    "ScatterElements": ({"axis": 1},),
    "Slice": ({},),
    "TopK": ({},),
}
"""The operators that ``export.to_onnx`` writes, each with the only attributes it writes.

Of two the latter is for groups of columns, behind a Reshape.
"""

_MOST_FIELDS = 20_000  # of the protobuf message
_MOST_NODES = 256
_WIDEST = 1 << 17  # columns of any value: cells, dimensions, hidden units
_MOST_COLUMNS = 1 << 20  # of the values of all nodes: memory for each query
_MOST_WEIGHTS = 1 << 27  # numbers in all constants
_MOST_MULTIPLICATIONS = 1 << 28  # for each query

_DTYPES: Mapping[int, np.dtype[Any]] = {  # of constants
    FLOAT: np.dtype("<f4"),
    UINT8: np.dtype("u1"),
    INT8: np.dtype("i1"),
    INT64: np.dtype("<i8"),
}
_ATTRIBUTE_INT, _ATTRIBUTE_INTS = 2, 7

_TENSOR = {
    1: Field("dims", "int", repeated=True),
    2: Field("data_type", "int"),
    8: Field("name", "text"),
    9: Field("raw_data", "bytes"),
    13: Field("external data", "refused"),
    14: Field("external data (a data location)", "refused"),
}
_ATTRIBUTE = {
    1: Field("name", "text"),
    3: Field("i", "int"),
    5: Field("a tensor as an attribute", "refused"),
    6: Field("a subgraph", "refused"),
    8: Field("ints", "int", repeated=True),
    10: Field("tensors as an attribute", "refused"),
    11: Field("subgraphs", "refused"),
    20: Field("type", "int"),
}
_NODE = {
    1: Field("input", "text", repeated=True),
    2: Field("output", "text", repeated=True),
    3: Field("name", "text"),
    4: Field("op_type", "text"),
    5: Field("attribute", _ATTRIBUTE, repeated=True),
    7: Field("domain", "text"),
}
_DIMENSION = {1: Field("dim_value", "int"), 2: Field("dim_param", "text")}
_SHAPE = {1: Field("dim", _DIMENSION, repeated=True)}
_TENSOR_TYPE = {1: Field("elem_type", "int"), 2: Field("shape", _SHAPE)}
_TYPE = {1: Field("tensor_type", _TENSOR_TYPE)}
_VALUE = {1: Field("name", "text"), 2: Field("type", _TYPE)}
_GRAPH = {
    1: Field("node", _NODE, repeated=True),
    2: Field("name", "text"),
    5: Field("initializer", _TENSOR, repeated=True),
    11: Field("input", _VALUE, repeated=True),
    12: Field("output", _VALUE, repeated=True),
    15: Field("sparse initializers", "refused"),
}
_OPERATOR_SET = {1: Field("domain", "text"), 2: Field("version", "int")}
_MODEL = {
    1: Field("ir_version", "int"),
    2: Field("producer_name", "text"),
    7: Field("graph", _GRAPH),
    8: Field("opset_import", _OPERATOR_SET, repeated=True),
    20: Field("training steps", "refused"),
    25: Field("functions of its own", "refused"),
}


class Work(NamedTuple):
    """What a model takes for a query: products of two numbers, and numbers that it looks up."""

    multiplications: int
    looked_up: int


def check_onnx(data: bytes) -> Work:
    """Return what a model takes, or raise ``BundleCorrupt``.

    All is refused but what ``export.to_onnx`` writes.
    """
    try:
        model = Reader(_MOST_FIELDS).read(memoryview(data), _MODEL)
        _check_versions(model)
        graph = model.get("graph")
        if graph is None:
            raise Malformed("it has no graph")
        return _check_graph(graph)
    except Malformed as exc:
        raise BundleCorrupt(
            f"The model is refused: {exc}; publish one that amips train has written."
        ) from exc


def _check_versions(model: Mapping[str, Any]) -> None:
    sets = [(entry.get("domain", ""), entry.get("version")) for entry in model["opset_import"]]
    domains = [domain for domain, _ in sets if domain]
    if domains:
        raise Malformed(f"it has operators of the custom domain {domains[0]!r}")
    if sets != [("", OPSET)]:
        versions = ", ".join(str(version) for _, version in sets) or "none"
        raise Malformed(f"its operator set is {versions}, not {OPSET}")
    if model.get("ir_version") != IR_VERSION:
        raise Malformed(f"its ir_version is {model.get('ir_version')}, not {IR_VERSION}")


def _check_graph(graph: Mapping[str, Any]) -> Work:
    if len(graph["node"]) > _MOST_NODES:
        raise Malformed(f"it has {len(graph['node'])} nodes, and {_MOST_NODES} are the limit")
    if [value.get("name") for value in graph["input"]] != ["queries"]:
        raise Malformed("its input is not one matrix named queries")
    values = {"queries": _declared(graph["input"][0])}
    weights = 0
    for tensor in graph["initializer"]:
        value = _constant(tensor)
        weights += math.prod(value.shape)
        if weights > _MOST_WEIGHTS:
            raise Malformed(f"it has more than {_MOST_WEIGHTS} weights")
        _define(values, tensor.get("name", ""), value)
    multiplications = columns = looked_up = 0
    for node in graph["node"]:
        inputs = _inputs_of(node, values)
        results = results_of(node["op_type"], inputs)
        if len(node["output"]) != len(results):
            raise Malformed(f"its {node['op_type']} has {len(node['output'])} outputs")
        if node["op_type"] in ("Gemm", "MatMulInteger"):
            multiplications += inputs[0].shape[1] * results[0].shape[1]
        if node["op_type"] == "Gather":
            looked_up += math.prod(results[0].shape[1:])
        if node["op_type"] == "MatMul":
            multiplications += math.prod(inputs[0].shape[1:])
        columns += sum(math.prod(value.shape[1:]) for value in results)
        if columns > _MOST_COLUMNS:
            raise Malformed(f"its values have more than {_MOST_COLUMNS} columns")
        if multiplications > _MOST_MULTIPLICATIONS:
            raise Malformed(f"it takes more than {_MOST_MULTIPLICATIONS} multiplications a query")
        for name, value in zip(node["output"], results, strict=True):
            _define(values, name, value)
    names = [value.get("name", "") for value in graph["output"]]
    if not names or len(set(names)) < len(names):
        raise Malformed("its outputs are none, or one of them comes twice")
    for declared in graph["output"]:
        name = declared.get("name", "")
        given = values.get(name)
        expected = _declared(declared)
        if given is None or (given.shape, given.dtype) != (expected.shape, expected.dtype):
            raise Malformed(f"its output {name!r} is not of the shape that it declares")
    return Work(multiplications, looked_up)


def _declared(value: Mapping[str, Any]) -> Value:
    """Return an input or output: a float matrix with a row for each query."""
    kind = value.get("type", {}).get("tensor_type", {})
    axes = kind.get("shape", {}).get("dim", [])
    fits = (
        kind.get("elem_type") == FLOAT
        and len(axes) == 2
        and set(axes[0]) == {"dim_param"}
        and set(axes[1]) == {"dim_value"}
        and 0 < axes[1]["dim_value"] <= _WIDEST
    )
    if not fits:
        raise Malformed(f"{value.get('name')!r} is not a float matrix with a row for each query")
    return Value((N_QUERIES, axes[1]["dim_value"]))


def _constant(tensor: Mapping[str, Any]) -> Value:
    """Return a constant; its numbers are finite."""
    name, shape = tensor.get("name", ""), tuple(tensor["dims"])
    dtype = _DTYPES.get(tensor.get("data_type", 0))
    if dtype is None:
        raise Malformed(f"the constant {name!r} is neither float32 nor an integer of 8 or 64 bits")
    if len(shape) > 2 or not all(0 < size <= _MOST_WEIGHTS for size in shape):
        raise Malformed(f"the constant {name!r} has the shape {list(shape)[:8]}")
    raw = tensor.get("raw_data", memoryview(b""))
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise Malformed(f"the constant {name!r} has {len(raw)} bytes, and its shape another number")
    array = np.frombuffer(raw, dtype).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise Malformed(f"the constant {name!r} has values that are not finite")
    return Value(shape, tensor["data_type"], array)


def _define(values: dict[str, Value], name: str, value: Value) -> None:
    if not name or name in values:
        raise Malformed(f"it defines {name!r} twice, or a value without a name")
    if value.constant is None and not all(size <= _WIDEST for size in value.shape):
        raise Malformed(f"its value {name!r} has more than {_WIDEST} columns")
    values[name] = value


def _inputs_of(node: Mapping[str, Any], values: Mapping[str, Value]) -> list[Value]:
    """Check a node's operator and attributes; return what it takes."""
    operator = node.get("op_type", "")
    if node.get("domain"):
        raise Malformed(f"it has operators of the custom domain {node['domain']!r}")
    if operator not in OPERATORS:
        raise Malformed(f"it has the operator {operator!r}, which is not allowed")
    attributes = {item.get("name", ""): _attribute(item) for item in node["attribute"]}
    missing = [name for name in node["input"] if name not in values]
    if missing:
        raise Malformed(f"its {operator} takes {missing[0]!r}, which nothing before it gives")
    inputs = [values[name] for name in node["input"]]
    grouped = any(len(value.shape) == 3 for value in inputs)
    allowed = OPERATORS[operator][-1 if grouped else 0]
    if len(attributes) < len(node["attribute"]) or attributes != allowed:
        raise Malformed(f"its {operator} has attributes that are not allowed")
    return inputs


def _attribute(item: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    if item.get("type") == _ATTRIBUTE_INT and not item["ints"]:
        number: int | None = item.get("i", 0)
        return number
    if item.get("type") == _ATTRIBUTE_INTS and "i" not in item:
        return tuple(item["ints"])
    return None
