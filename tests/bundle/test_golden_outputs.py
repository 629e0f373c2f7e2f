from __future__ import annotations

import numpy as np
import pytest
import torch

from amips_plugins.bundle.golden_outputs import GoldenOutputs
from amips_plugins.errors import BundleCorrupt
from amips_plugins.export.nets import TwoLevelRouter
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import FloatArray, Metric, normalise
from tests.support.two_level import two_level

DIM, N_CELLS = 16, 12


@pytest.fixture
def router() -> TwoLevelRouter:
    torch.manual_seed(0)
    net = two_level(DIM, N_CELLS, visited=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return net


def served(net: TwoLevelRouter) -> OnnxModel:
    order = Order(1.0, np.zeros(N_CELLS, np.float32), np.full(N_CELLS, -9.0, np.float32))
    return OnnxModel(to_onnx(net, DIM, Metric.COSINE, order))


def tie(net: TwoLevelRouter, query: FloatArray) -> None:
    """Let the two best groups of a query be equally good."""
    with torch.no_grad():
        scores = net.group_scores(torch.from_numpy(normalise(query[None])))[0]
        best, second = scores.topk(2).indices
        net.group_bias[second].add_(scores[best] - scores[second])


def test_a_model_that_rounds_otherwise_where_groups_tie_is_sound(router: TwoLevelRouter) -> None:
    first = np.random.default_rng(0).standard_normal(DIM, dtype=np.float32)
    tie(router, first)
    recorded = GoldenOutputs.record(served(router), "priority", DIM)
    given = []
    for sign in (-1, 1):
        for group in range(len(router.group_bias)):
            with torch.no_grad():
                router.group_bias[group] += sign * 2e-6
            other = served(router)
            recorded.check(other, "priority", "here")
            given.append(other.run(["priority"], {"queries": first[None]})[0])
            with torch.no_grad():
                router.group_bias[group] -= sign * 2e-6
    # The query that ties is one that another rounding answers from another group.
    assert np.ptp(np.concatenate(given), axis=0).max() > 1.0


def test_another_model_is_refused(router: TwoLevelRouter) -> None:
    recorded = GoldenOutputs.record(served(router), "priority", DIM)
    assert recorded.queries.shape == (8, DIM)
    with torch.no_grad():
        router.up[3] += 0.1
        router.group_bias.add_(torch.randn(router.group_bias.shape))
    with pytest.raises(BundleCorrupt, match="gives other results here"):
        recorded.check(served(router), "priority", "here")
