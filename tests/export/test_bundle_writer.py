from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from amips_plugins.export.bundle_writer import served_model
from amips_plugins.export.candidates import Candidate
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.nets import KeyNet, LinearRouter, Net
from amips_plugins.export.to_onnx import Order
from amips_plugins.models.cells import Cells
from amips_plugins.vectors import Metric
from tests.support.training_tasks import CELLS as N_CELLS
from tests.support.training_tasks import DIM, make_task


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> TrainingTask:
    return make_task(tmp_path_factory.mktemp("problem"))


def candidate(net: Net, order: Order | None) -> Candidate:
    cells = Cells(
        np.eye(N_CELLS, DIM, dtype=np.float32),
        np.zeros(N_CELLS, dtype=np.float32),
        np.ones(N_CELLS, dtype=np.int64),
    )
    none: Callable[..., None] = lambda _: None  # noqa: E731 - never called
    return Candidate("linear", net, order, cells, np.zeros(1), 0, [], none, None)  # type: ignore[arg-type]


def linear(size: float) -> LinearRouter:
    net = LinearRouter(DIM, N_CELLS)
    random = np.random.default_rng(0).standard_normal((N_CELLS, DIM))
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(size * random))
    return net


ORDER = Order(1.0, np.zeros(N_CELLS, dtype=np.float32))


@pytest.mark.parametrize(
    ("published", "in_8_bits"),
    [
        (candidate(linear(0.5), ORDER), True),
        (candidate(linear(0.5), replace(ORDER, scale=100.0)), False),
        (candidate(linear(50.0), ORDER), False),
        (candidate(linear(0.5), replace(ORDER, scale=None)), False),
        (candidate(KeyNet(DIM), None), False),
    ],
)
def test_8_bits_serve_where_they_change_no_priority_by_much(
    published: Candidate, in_8_bits: bool, problem: TrainingTask
) -> None:
    graph = onnx.load_from_string(served_model(published, problem)).graph
    assert ("MatMulInteger" in {node.op_type for node in graph.node}) is in_8_bits


def test_8_bits_do_not_serve_l2(tmp_path: Path) -> None:
    published = candidate(LinearRouter(DIM + 1, N_CELLS), ORDER)
    graph = onnx.load_from_string(served_model(published, make_task(tmp_path, Metric.L2))).graph
    assert "MatMulInteger" not in {node.op_type for node in graph.node}
