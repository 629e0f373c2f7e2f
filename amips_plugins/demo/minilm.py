"""all-MiniLM-L6-v2 in 8 bits for ONNX Runtime, built from its published weights without torch.

Weights are rounded for each output and activations for each token, so that a text has the same
vector alone and in a batch. The cosine to the vector in full precision is .99.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.errors import require
from amips_plugins.vectors import FloatArray

__all__ = ["build_graph"]

_HEADS = 12
_LAYERS = 6
_EPSILON = 1e-12
_OPSETS = (("", 20), ("com.microsoft", 1))
_IR_VERSION = 9  # the oldest that knows opset 20, so that older runtimes read it
_ZERO = 128  # what stands for 0 among unsigned 8-bit activations
# Weights use 7 of 8 bits: CPUs without VNNI add two products in 16 bits, which 8 would overflow.
_WEIGHT_LIMIT = 64


class _Graph:
    """Nodes and weights in the order they are written; every operator has one output."""

    def __init__(self) -> None:
        self._onnx = require("onnx", "demo")
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, array: npt.ArrayLike) -> str:
        name = f"w{len(self.weights)}"
        tensor = self._onnx.numpy_helper.from_array(np.array(array, order="C"), name)
        self.weights.append(tensor)
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        output = f"{kind}_{len(self.nodes)}"
        make = self._onnx.helper.make_node
        self.nodes.append(make(kind, inputs, [output], output, domain=domain, **attributes))
        return output

    def rounded(self, x: str) -> tuple[str, str]:
        """Round each token to 8 bits with a scale of its own; return both."""
        largest = self.op("ReduceMax", self.op("Abs", x), self.weight(np.array([-1])))
        scale = self.op("Mul", largest, self.weight(np.float32(1 / (_ZERO - 1))))
        whole = self.op("Round", self.op("Div", x, scale))
        shifted = self.op("Add", whole, self.weight(np.float32(_ZERO)))
        return self.op("Cast", shifted, to=self._onnx.TensorProto.UINT8), scale

    def linear(self, x: tuple[str, str], weight: FloatArray, bias: FloatArray) -> str:
        """Multiply rounded tokens with ``(n_out, n_in)``, rounded for each output."""
        scale = np.abs(weight).max(axis=1) / _WEIGHT_LIMIT
        whole = self.weight(np.round(weight / scale[:, None]).astype(np.int8).T)
        product = self.op("MatMulInteger", x[0], whole, self.weight(np.uint8(_ZERO)))
        product = self.op("Cast", product, to=self._onnx.TensorProto.FLOAT)
        product = self.op("Mul", self.op("Mul", product, self.weight(scale)), x[1])
        return self.op("Add", product, self.weight(bias))

    def model(self, output: str, dim: int) -> Any:
        helper, proto = self._onnx.helper, self._onnx.TensorProto
        graph = helper.make_graph(
            self.nodes,
            "minilm",
            [helper.make_tensor_value_info("ids", proto.INT64, ["n", "length"])],
            [helper.make_tensor_value_info(output, proto.FLOAT, ["n", dim])],
            self.weights,
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


def build_graph(folder: Path) -> Any:
    """Build encoder, mean pooling and normalisation: ids (n, length) to (n, 384) float32 unit rows.

    There is no attention mask: all texts of one call have the same number of tokens. The folder
    holds the published ``model.safetensors``.
    """
    weights = require("safetensors.numpy", "demo").load_file(folder / "model.safetensors")
    graph = _Graph()

    def norm(x: str, name: str) -> str:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return graph.op(
            "LayerNormalization", x, graph.weight(scale), graph.weight(shift), epsilon=_EPSILON
        )

    def linear(x: tuple[str, str], name: str) -> str:
        return graph.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    words = weights["embeddings.word_embeddings.weight"]
    # Every token is of the first type, so the row of that type is a part of each position.
    places = weights["embeddings.position_embeddings.weight"]
    places = places + weights["embeddings.token_type_embeddings.weight"][0]
    zero, one = graph.weight(np.array([0])), graph.weight(np.array([1]))
    length = graph.op("Shape", "ids", start=1, end=2)
    place = graph.op("Slice", graph.weight(places), zero, length, zero)
    word = graph.op("Gather", graph.weight(words), "ids")
    x = norm(graph.op("Add", word, place), "embeddings.LayerNorm")
    for layer in range(_LAYERS):
        name = f"encoder.layer.{layer}"
        token = graph.rounded(x)
        heads = [
            linear(token, f"{name}.attention.self.{part}") for part in ("query", "key", "value")
        ]
        mixed = graph.op("MultiHeadAttention", *heads, domain="com.microsoft", num_heads=_HEADS)
        mixed = linear(graph.rounded(mixed), f"{name}.attention.output.dense")
        x = norm(graph.op("Add", x, mixed), f"{name}.attention.output.LayerNorm")
        inner = graph.op("Gelu", linear(graph.rounded(x), f"{name}.intermediate.dense"))
        outer = linear(graph.rounded(inner), f"{name}.output.dense")
        x = norm(graph.op("Add", x, outer), f"{name}.output.LayerNorm")
    mean = graph.op("ReduceMean", x, one, keepdims=0)
    return graph.model(graph.op("LpNormalization", mean, axis=1, p=2), words.shape[1])
