from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from amips_plugins.export.nets import TwoLevelRouter, multiplications, served_scores
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.export.two_level import (
    VISITED,
    cell_groups,
    fewest_groups,
    new_two_level,
    unscored_shares,
)
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import Metric, lift_queries, lifted_dim, normalise
from tests.support.training_data import gaussian, shake
from tests.support.two_level import two_level

DIM, CELLS, SIZE = 6, 23, 4  # the last group has one place that no cell uses


def order_of(n_cells: int = CELLS) -> Order:
    """Unscored cells are told apart, and come behind most of the scored ones."""
    unscored = np.linspace(-9.0, -8.0, n_cells, dtype=np.float32)
    return Order(1.7, np.linspace(-0.5, 0.5, n_cells, dtype=np.float32), unscored)


def visiting(net: TwoLevelRouter, visited: int) -> TwoLevelRouter:
    net.visited = visited
    return net


@pytest.mark.parametrize(("n_cells", "n_groups"), [(64, 8), (65, 8), (7, 3), (5, 9), (1, 1)])
def test_every_cell_is_in_one_group_and_groups_are_of_one_size(n_cells: int, n_groups: int) -> None:
    groups = cell_groups(gaussian(n_cells, DIM), n_groups, 0)
    assert len(groups) <= n_groups
    assert sorted(groups[groups >= 0].tolist()) == list(range(n_cells))
    assert groups.shape[1] == -(-n_cells // n_groups)
    assert all((np.diff(np.append(row, -1)[: (row >= 0).sum()]) > 0).all() for row in groups)
    np.testing.assert_array_equal(groups, cell_groups(gaussian(n_cells, DIM), n_groups, 0))


def test_cells_that_point_one_way_are_in_one_group() -> None:
    directions = np.eye(5, 8, dtype=np.float32)
    belongs = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 6))
    weights = directions[belongs] + 0.05 * gaussian(30, 8)
    groups = cell_groups(weights * np.linspace(1, 9, 30, dtype=np.float32)[:, None], 5, 0)
    assert all(len(set(belongs[row])) == 1 for row in groups)


def test_what_a_full_group_leaves_goes_to_the_next_nearest() -> None:
    weights = np.repeat(np.array([[1.0, 0.1], [0.1, 1.0]], np.float32), [5, 3], axis=0)
    groups = cell_groups(weights, 2, 0)
    sides = [np.sort((row >= 5).astype(int)).tolist() for row in groups]
    assert sorted(sides) == [[0, 0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("visited", [1, 2, 5, 6])
def test_the_graph_scores_the_cells_of_the_best_groups(
    metric: Metric, batch: int, visited: int
) -> None:
    net = shake(two_level(lifted_dim(DIM, metric), CELLS, visited, SIZE))
    queries, order = gaussian(batch, DIM, 3), order_of()
    data = to_onnx(net, DIM, metric, order)
    (priority,) = OnnxModel(data).run(["priority"], {"queries": queries})
    unit = torch.from_numpy(normalise(lift_queries(queries, metric)))
    with torch.no_grad():
        every, served = net(unit), served_scores(net, unit)
    scored = torch.isfinite(served)
    assert set(scored.sum(dim=1).tolist()) <= {visited * SIZE, visited * SIZE - 1}
    torch.testing.assert_close(served[scored], every[scored])
    np.testing.assert_allclose(priority, order.priority(served.numpy()), atol=1e-4, rtol=1e-4)
    assert order.unscored is not None
    left = ~scored.numpy()
    expected = np.broadcast_to(order.unscored + order.offset, left.shape)
    np.testing.assert_allclose(priority[left], expected[left], rtol=1e-6)
    shares = np.exp(np.where(left, -np.inf, priority - order.offset)).sum(axis=1)
    np.testing.assert_allclose(shares, 1.0, rtol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
def test_a_query_costs_what_the_net_says(int8: bool) -> None:
    net = shake(two_level(DIM, CELLS, 2, SIZE))
    model = OnnxModel(to_onnx(net, DIM, Metric.COSINE, order_of(), int8=int8))
    assert model.multiplications == multiplications(net) == 3 * DIM + 3 * (6 + 2 * SIZE + 1)


def test_the_cost_grows_as_the_root_of_the_cells() -> None:
    costs = [
        multiplications(visiting(new_two_level(gaussian(n_cells, 16), 8, 0), 4)) - 8 * 16
        for n_cells in (256, 4_096)
    ]
    assert costs[1] == pytest.approx(4 * costs[0], rel=0.02)


def test_it_starts_at_the_best_approximation_of_the_centroids_and_its_groups_at_their_mean() -> (
    None
):
    start = 20 * normalise(gaussian(30, 7))
    net = new_two_level(start, 3, 0)
    assert net.visited == len(net.members)
    left, singular, right = np.linalg.svd(start)
    best = (left[:, :3] * singular[:3]) @ right[:3]  # Eckart and Young
    unit = normalise(gaussian(50, 7, 1))
    with torch.no_grad():
        scores = net(torch.from_numpy(unit)).numpy()
        of_groups = net.group_scores(torch.from_numpy(unit)).numpy()
    np.testing.assert_allclose(scores, unit @ best.T, atol=1e-3)
    group_of = net.group_of.numpy()
    means = np.stack([best[group_of == g].mean(axis=0) for g in range(group_of.max() + 1)])
    np.testing.assert_allclose(of_groups, unit @ means.T, atol=1e-3)


def test_the_number_of_groups_is_the_one_that_scores_best() -> None:
    net = two_level(DIM, 9 * SIZE, 1, SIZE)
    tried: list[int] = []

    def score() -> float:
        tried.append(net.visited)
        return -abs(net.visited - 8.4)

    best = fewest_groups(net, score)
    assert tried == [4, 8]  # of nine groups
    assert net.visited == 8
    assert best == pytest.approx(-0.4)
    assert max(VISITED) > 9


def test_no_more_is_copied_than_a_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = two_level(DIM, 9 * SIZE, 1, SIZE)
    monkeypatch.setattr("amips_plugins.export.two_level._MOST_COPIED", 4 * SIZE * 3)
    fewest_groups(net, lambda: net.visited)
    assert net.visited == 4
    monkeypatch.setattr("amips_plugins.export.two_level._MOST_COPIED", 4 * SIZE * 3 - 1)
    assert fewest_groups(net, lambda: net.visited) == -np.inf


def test_all_cells_at_once_have_the_same_scores() -> None:
    net = shake(two_level(DIM, CELLS, 2, SIZE))
    assert isinstance(net, TwoLevelRouter)
    unit = torch.from_numpy(normalise(gaussian(20, DIM)))
    with torch.no_grad():
        torch.testing.assert_close(net.low_rank()(unit), net(unit))


def test_what_is_left_in_other_groups_is_shared_as_hits_are_known() -> None:
    net = two_level(DIM, CELLS, 2, SIZE)
    shake(net)
    unit = normalise(gaussian(400, DIM))
    rng = np.random.default_rng(0)
    hits = rng.integers(-1, CELLS, size=(400, 5))
    with torch.no_grad():
        scored = torch.isfinite(served_scores(net, torch.from_numpy(unit))).numpy()
    placed = hits >= 0
    missed = placed & ~np.take_along_axis(scored, hits.clip(0), axis=1)
    known = np.repeat(np.arange(CELLS), np.arange(CELLS))
    shares = np.exp(unscored_shares(net, unit, hits, known).astype(np.float64))
    assert shares.sum() == pytest.approx(missed.sum() / placed.sum(), rel=1e-5)
    assert (np.diff(shares) > 0).all()


def test_nothing_left_is_a_small_share_and_no_logarithm_of_zero() -> None:
    net = two_level(DIM, CELLS, CELLS, SIZE)
    hits = np.zeros((10, 3), dtype=np.int64)
    assert np.isfinite(unscored_shares(net, normalise(gaussian(10, DIM)), hits, hits)).all()


def test_many_queries_are_run_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = to_onnx(shake(two_level(DIM, CELLS, 2, SIZE)), DIM, Metric.IP, order_of())
    queries = gaussian(9, DIM)
    (together,) = OnnxModel(data).run(["priority"], {"queries": queries})
    monkeypatch.setattr("amips_plugins.models.onnx_session._MOST_LOOKED_UP", 1)
    model = OnnxModel(data)
    rows: list[int] = []
    session = model._session

    class Counted:
        def run(self, outputs: Any, inputs: Any) -> Any:
            rows.append(len(inputs["queries"]))
            return session.run(outputs, inputs)

    model._session = Counted()
    (parted,) = model.run(["priority"], {"queries": queries})
    assert rows == [1] * 9
    np.testing.assert_allclose(parted, together, rtol=1e-5)
