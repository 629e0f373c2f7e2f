from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from amips_plugins.export.nets import KeyNet, LinearRouter, Net
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import FloatArray, Metric, lift_queries, lifted_dim, normalise
from tests.support.training_data import every_net, gaussian

DIM, CELLS = 6, 9
KINDS = list(every_net(DIM, CELLS))
ROUTERS = [name for name in KINDS if not name.startswith("keynet")]
ORDER = Order(1.7, np.linspace(-0.5, 0.5, CELLS, dtype=np.float32))
# What a runtime in another language has to know.
OPERATORS = {
    *("Add", "Concat", "Div", "Gemm", "Identity", "LogSoftmax", "Max", "Mul", "ReduceL2", "Relu"),
    *("Abs", "Cast", "MatMulInteger", "QuantizeLinear", "ReduceMax", "Reshape", "Slice"),
    *("Gather", "MatMul", "ScatterElements", "TopK"),
}


def net_and_bytes(name: str, metric: Metric) -> tuple[Net, bytes]:
    net = every_net(lifted_dim(DIM, metric), CELLS)[name]
    return net, to_onnx(net, DIM, metric, None if isinstance(net, KeyNet) else ORDER)


def every_file(name: str, metric: Metric) -> list[bytes]:
    net, data = net_and_bytes(name, metric)
    files = [data]
    if name in ROUTERS:
        files.append(to_onnx(net, DIM, metric, ORDER, int8=True))
    return files


def some_queries(n: int, seed: int = 0) -> FloatArray:
    """Queries of lengths from 1e-3 to 1e3."""
    lengths = 10.0 ** np.random.default_rng(seed).uniform(-3, 3, size=(n, 1))
    return (gaussian(n, DIM, seed) * lengths).astype(np.float32)


def unit_of(queries: FloatArray, metric: Metric) -> FloatArray:
    return normalise(lift_queries(queries, metric))


def torch_scores(net: Net, unit: FloatArray) -> FloatArray:
    with torch.no_grad():
        scores: FloatArray = net(torch.from_numpy(unit)).numpy()
    return scores


def run(data: bytes, outputs: list[str], queries: FloatArray) -> list[npt.NDArray[np.float32]]:
    return OnnxModel(data).run(outputs, {"queries": queries})


def close(given: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> None:
    """Compare rows relative to their own size, which the query's length decides."""
    size = np.abs(wanted).max(axis=1, keepdims=True) + 1e-30
    np.testing.assert_allclose(given / size, wanted / size, atol=2e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("name", ROUTERS)
def test_router_parity(name: str, metric: Metric, batch: int) -> None:
    net, data = net_and_bytes(name, metric)
    queries = some_queries(batch)
    (priority,) = run(data, ["priority"], queries)
    of_unit = torch_scores(net, unit_of(queries, metric))
    assert ORDER.scale is not None
    expected = torch.log_softmax(ORDER.scale * torch.from_numpy(of_unit), dim=1).numpy()
    np.testing.assert_allclose(priority, expected + ORDER.offset, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(priority, ORDER.priority(of_unit), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ROUTERS)
def test_without_a_scale_priorities_are_the_scores(name: str) -> None:
    """The order of the native baseline: nearest centroid first, and no cell costs more."""
    net, order, queries = every_net(DIM, CELLS)[name], Order(None, ORDER.offset), some_queries(7)
    (priority,) = run(to_onnx(net, DIM, Metric.COSINE, order), ["priority"], queries)
    scores = torch_scores(net, unit_of(queries, Metric.COSINE))
    np.testing.assert_allclose(priority, scores + ORDER.offset, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(order.priority(scores), scores + ORDER.offset)


def test_priorities_are_shares_less_a_cost_and_compare_across_queries() -> None:
    scores = gaussian(40, CELLS, 3) * 50  # far beyond what exp could take without care
    order = Order(2.0, np.log(np.arange(1, CELLS + 1, dtype=np.float32)))
    priority = order.priority(scores)
    assert np.isfinite(priority).all()
    shares = np.exp(priority.astype(np.float64)) / np.arange(1, CELLS + 1)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-3)
    # Another constant for a query changes nothing: only differences of its scores count.
    np.testing.assert_allclose(order.priority(scores + 7), priority, atol=1e-3)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_takes_queries_only(name: str) -> None:
    model = OnnxModel(net_and_bytes(name, Metric.L2)[1])
    assert model.inputs == {"queries": ["n", DIM]}
    assert model.outputs == {"priority": ["n", CELLS]}


def linear_of_8_bits(dim: int, n_cells: int, seed: int) -> tuple[LinearRouter, bytes]:
    net = LinearRouter(dim, n_cells)
    random = np.random.default_rng(seed)
    weight = random.standard_normal((n_cells, dim)) * 10.0 ** random.uniform(-2, 2, (n_cells, 1))
    weight[0] = 0.0
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(weight))
        net.bias.copy_(torch.from_numpy(random.standard_normal(n_cells)))
    order = Order(None, np.zeros(n_cells, dtype=np.float32))  # scores, to see each error
    return net, to_onnx(net, dim, Metric.IP, order, int8=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("dim", "n_cells"), [(2, 3), (6, 9), (384, 65)])
def test_8_bits_err_by_no_more_than_half_a_step_each(dim: int, n_cells: int, seed: int) -> None:
    net, data = linear_of_8_bits(dim, n_cells, seed)
    lengths = 10.0 ** np.random.default_rng(seed).uniform(-12, 12, size=(40, 1))
    queries = (gaussian(40, dim, seed) * lengths).astype(np.float32)
    (given,) = run(data, ["priority"], queries)
    unit = normalise((queries / np.abs(queries).max(axis=1, keepdims=True)).astype(np.float32))
    weight = net.weight.detach().numpy().astype(np.float64)
    of_query = np.abs(unit).max(axis=1, keepdims=True) / 63 / 2
    of_weight = np.abs(weight).max(axis=1) / 127 / 2
    bound = (
        of_query * np.abs(weight).sum(axis=1)
        + np.abs(unit).sum(axis=1, keepdims=True) * of_weight
        + dim * of_query * of_weight
    )
    error = np.abs(given - torch_scores(net, unit))
    assert (error <= bound * 1.001 + 1e-5).all()
    assert error.max() > 1e-4  # else these are no 8 bits


def test_8_bits_give_a_query_alone_what_they_give_it_in_a_batch() -> None:
    _, data = linear_of_8_bits(33, 20, 0)
    queries = gaussian(300, 33) * np.linspace(0.01, 100, 300, dtype=np.float32)[:, None]
    (together,) = run(data, ["priority"], queries)
    alone = np.concatenate(
        [run(data, ["priority"], queries[row : row + 1])[0] for row in range(300)]
    )
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("name", ROUTERS)
def test_8_bits_are_close_for_every_router(name: str, metric: Metric) -> None:
    net, data = net_and_bytes(name, metric)
    queries = gaussian(200, DIM)
    (exact,) = run(data, ["priority"], queries)
    rounded = to_onnx(net, DIM, metric, ORDER, int8=True)
    (given,) = run(rounded, ["priority"], queries)
    error = np.abs(given - exact)
    assert 1e-6 < error.mean() < 0.02 * np.std(exact)
    assert OnnxModel(rounded).multiplications == OnnxModel(data).multiplications


def test_no_sum_of_two_products_is_too_large_for_16_bits() -> None:
    """As processors without an instruction for 8 bits add them, and cut what does not fit."""
    model = onnx.load_from_string(linear_of_8_bits(384, 65, 0)[1])
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    (quantise,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear")
    (product,) = (node for node in model.graph.node if node.op_type == "MatMulInteger")
    step, zero = (constants[name] for name in quantise.input[1:])
    largest = int(zero) + round(1.0 / float(step))  # entries lie within -1 and 1
    weights = constants[product.input[1]].astype(np.int64)
    assert np.abs(weights).max() == 127
    assert 2 * largest * 127 < 2**15


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("keynet")])
def test_keynet_parity(name: str, metric: Metric, batch: int) -> None:
    net, data = net_and_bytes(name, metric)
    queries = some_queries(batch)
    (rewritten,) = run(data, ["rewritten"], queries)
    assert rewritten.shape == (batch, DIM)
    close(rewritten, torch_scores(net, unit_of(queries, metric))[:, :DIM])


@pytest.mark.parametrize("metric", [Metric.IP, Metric.COSINE])  # L2 sees lengths
@pytest.mark.parametrize("name", KINDS)
def test_a_querys_length_changes_no_plan(name: str, metric: Metric) -> None:
    _, data = net_and_bytes(name, metric)
    output = "rewritten" if name.startswith("keynet") else "priority"
    queries = gaussian(20, DIM)
    (wanted,) = run(data, [output], queries)
    for factor in (1e-6, 1e6):
        (given,) = run(data, [output], (factor * queries).astype(np.float32))
        np.testing.assert_allclose(given, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("name", KINDS)
def test_extreme_queries_give_finite_output(name: str, metric: Metric) -> None:
    for data in every_file(name, metric):
        outputs = list(OnnxModel(data).outputs)
        for entry in (0.0, -0.0, 1e-38, 1e-25, 1e18):
            for output in run(data, outputs, np.full((2, DIM), entry, dtype=np.float32)):
                assert np.isfinite(output).all(), (name, metric, entry)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("name", KINDS)
def test_graph_is_plain(name: str, metric: Metric, tmp_path: Path) -> None:
    for data in every_file(name, metric):
        graph = onnx.load_from_string(data).graph
        assert {node.op_type for node in graph.node} <= OPERATORS
        assert {node.domain for node in graph.node} == {""}
        assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.initializer)
        assert not any(tensor.external_data for tensor in graph.initializer)
        path = tmp_path / "model.onnx"
        path.write_bytes(data)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert list(tmp_path.iterdir()) == [path]
        batch_axes = {node.shape[0] for node in session.get_inputs() if node.name == "queries"}
        assert all(isinstance(axis, str) for axis in batch_axes)


def test_the_operators_named_are_the_ones_used() -> None:
    used = {
        node.op_type
        for metric in Metric
        for name in KINDS
        for data in every_file(name, metric)
        for node in onnx.load_from_string(data).graph.node
    }
    assert used == OPERATORS


@pytest.mark.parametrize("name", KINDS)
def test_the_same_net_gives_the_same_bytes(name: str) -> None:
    assert every_file(name, Metric.L2) == every_file(name, Metric.L2)


def test_writing_does_not_change_the_net() -> None:
    net, _ = net_and_bytes("supportnet-3", Metric.IP)
    fresh = every_net(DIM, CELLS)["supportnet-3"]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


def test_a_router_needs_an_order() -> None:
    with pytest.raises(ValueError, match="order"):
        to_onnx(every_net(DIM, CELLS)["linear"], DIM, Metric.IP)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("name", ROUTERS)
def test_one_cell(name: str, metric: Metric) -> None:
    net = every_net(lifted_dim(DIM, metric), 1)[name]
    data = to_onnx(net, DIM, metric, Order(1.0, np.zeros(1, dtype=np.float32)))
    (priority,) = run(data, ["priority"], some_queries(3))
    np.testing.assert_array_equal(priority, np.zeros((3, 1)))  # the only cell has every key
