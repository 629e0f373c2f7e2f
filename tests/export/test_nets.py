from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amips_plugins.export import losses
from amips_plugins.export.nets import (
    KeyNet,
    LinearRouter,
    LowRankRouter,
    SupportNet,
    multiplications,
)
from tests.support.training_data import every_net, shake

DIM, CELLS = 6, 5
SHAPES = {
    "width": st.integers(1, 24),
    "depth": st.integers(1, 4),
    "seed": st.integers(0, 10_000),
}


def support_net(width: int, depth: int, seed: int) -> SupportNet:
    torch.manual_seed(seed)
    net = SupportNet(DIM, CELLS, width, depth)
    shake(net, seed)
    return net.double()


def points(n: int, seed: int) -> Tensor:
    """Vectors of lengths from about 0.01 to 100."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 10.0 ** (4 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 2)
    return lengths * torch.randn(n, DIM, generator=generator, dtype=torch.float64)


def jacobian(net: SupportNet, x: Tensor) -> Tensor:
    """Gradient of every head at x, ``(n_cells, dim)``."""
    x = x.detach().requires_grad_()
    scores = net(x[None])[0]
    return torch.stack([torch.autograd.grad(s, x, retain_graph=True)[0] for s in scores])


def train_a_little(net: SupportNet, seed: int, steps: int = 12) -> None:
    """Take real steps of both losses, large enough to push mixes below zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    keys = torch.randn(CELLS, DIM, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        u = torch.nn.functional.normalize(
            torch.randn(32, DIM, generator=generator, dtype=torch.float64)
        )
        chosen = (u @ keys.T).argmax(dim=1)
        loss = losses.score_regression(net(u), u @ keys.T)
        loss = loss + losses.gradient_matching(net, u, chosen, keys[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        net.constrain()


@torch.no_grad()
def worst_chord(net: SupportNet, seed: int, pairs: int = 400) -> float:
    """How far a net rises above a chord, at worst, in units of the values at its ends."""
    x, y = points(pairs, seed), points(pairs, seed + 1)
    # Chords through the origin's neighbourhood are where a cone is sharpest.
    y[::4] = -x[::4] * 0.9 + 0.01 * y[::4]
    t = torch.rand(pairs, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chord = t * net(x) + (1 - t) * net(y)
    scale = 1 + net(x).abs() + net(y).abs()
    return float(((net(t * x + (1 - t) * y) - chord) / scale).max())


@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_supportnet_is_convex(width: int, depth: int, seed: int) -> None:
    assert worst_chord(support_net(width, depth, seed), seed) <= 1e-12


@settings(max_examples=20, deadline=None)
@given(**SHAPES)
def test_supportnet_stays_convex_when_trained(width: int, depth: int, seed: int) -> None:
    net = support_net(width, depth, seed)
    before = [p.detach().clone() for p in net.parameters()]
    train_a_little(net, seed)
    assert any(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert worst_chord(net, seed) <= 1e-12


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("part", ["mix", "norm"])
def test_without_the_constraint_it_is_not_convex(part: str, depth: int) -> None:
    net = support_net(16, depth, 3)
    weights = getattr(net, part)
    with torch.no_grad():
        for weight in weights:
            weight.neg_()
    assert worst_chord(net, 3) > 1e-3, "the chords would not notice a net that is not convex"
    net.constrain()
    assert worst_chord(net, 3) <= 1e-12


def test_training_needs_the_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    net = support_net(16, 2, 0)
    monkeypatch.setattr(net, "constrain", lambda: None)
    train_a_little(net, 0)
    assert min(float(mix.detach().min()) for mix in net.mix) < 0


@settings(max_examples=40, deadline=None)
@given(**SHAPES, power=st.floats(-6, 6))
def test_supportnet_is_homogeneous(width: int, depth: int, seed: int, power: float) -> None:
    net = support_net(width, depth, seed)
    x, factor = points(50, seed), 10.0**power
    with torch.no_grad():
        torch.testing.assert_close(net(factor * x), factor * net(x), rtol=1e-9, atol=1e-12)
        assert torch.count_nonzero(net(torch.zeros(1, DIM, dtype=torch.float64))) == 0


@settings(max_examples=30, deadline=None)
@given(**SHAPES)
def test_gradient_agrees_with_finite_differences_and_euler(
    width: int, depth: int, seed: int
) -> None:
    net = support_net(width, depth, seed)
    for x in points(5, seed):
        slopes = jacobian(net, x)
        # Euler: a 1-homogeneous function is its own gradient times x.
        with torch.no_grad():
            value = net(x[None])[0]
            torch.testing.assert_close(slopes @ x, value, rtol=1e-9, atol=1e-9)
            step = 1e-7 * float(x.norm())
            shifts = step * torch.eye(DIM, dtype=torch.float64)
            differences = (net(x + shifts) - net(x - shifts)).T / (2 * step)
        torch.testing.assert_close(slopes, differences, rtol=1e-4, atol=1e-4)


def test_the_gradient_supports_the_whole_function() -> None:
    """f(y) >= <grad f(x), y>: what makes the gradient a key that is best at x."""
    net = support_net(16, 2, 1)
    others = points(300, 5)
    for x in points(20, 4):
        slopes = jacobian(net, x)
        with torch.no_grad():
            gap = net(others) - others @ slopes.T
        assert float((gap / (1 + others.norm(dim=1, keepdim=True))).min()) >= -1e-9


def test_scale_is_positive_and_changes_no_ranking() -> None:
    net = support_net(8, 1, 0)
    with torch.no_grad():
        net.log_scale.fill_(-9.0)
    assert float(net.scale.detach()) > 0


@pytest.mark.parametrize("width", [0, 8])
def test_an_untrained_residual_keynet_leaves_the_query(width: int) -> None:
    torch.manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(10, DIM))
    with torch.no_grad():
        torch.testing.assert_close(KeyNet(DIM, width, 2)(u), u)
        assert not torch.allclose(KeyNet(DIM, width, 2, residual=False)(u), u)


def test_linear_router_and_keynet_may_have_any_weights() -> None:
    for net in (LinearRouter(DIM, CELLS), LowRankRouter(DIM, CELLS, 2), KeyNet(DIM, 8)):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(-1.0)
        net.constrain()
        assert all(bool((p == -1.0).all()) for p in net.parameters())


def test_multiplications_count_what_one_query_is_multiplied_with() -> None:
    width = 7
    assert multiplications(LinearRouter(DIM, CELLS)) == DIM * CELLS
    assert multiplications(LowRankRouter(DIM, CELLS, 2)) == 2 * DIM + CELLS * 2
    assert multiplications(KeyNet(DIM, 0)) == DIM * DIM
    assert multiplications(KeyNet(DIM, width, 2)) == DIM * width + width * width + width * DIM
    expected = (DIM * width) * 2 + width * width + width * CELLS + DIM * CELLS
    assert multiplications(SupportNet(DIM, CELLS, width, 2)) == expected


def test_a_low_rank_router_is_the_linear_one_of_its_product() -> None:
    low, linear = LowRankRouter(DIM, CELLS, 2), LinearRouter(DIM, CELLS)
    shake(low)
    with torch.no_grad():
        linear.weight.copy_(low.up @ low.down)
        linear.bias.copy_(low.bias)
        u = points(9, 0).float()
        torch.testing.assert_close(low(u), linear(u), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(every_net(DIM, CELLS)))
def test_every_net_answers_one_query_as_it_answers_many(name: str) -> None:
    net = every_net(DIM, CELLS)[name].double()
    u = points(9, 0)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([net(row[None]) for row in u]), net(u))


def test_losses_are_zero_at_the_truth_only() -> None:
    torch.manual_seed(0)
    keys = torch.randn(4, DIM)
    u = torch.nn.functional.normalize(torch.randn(4, DIM))
    support = torch.randn(4, CELLS)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda given: losses.score_regression(given, support), support),
        (lambda given: losses.key_regression(given, keys), keys),
        (lambda given: losses.score_consistency(given, u, (keys * u).sum(dim=1)), keys),
    ]
    for loss, truth in cases:
        assert float(loss(truth)) == pytest.approx(0.0, abs=1e-9)
        assert float(loss(truth + 0.1)) > 1e-4


def test_routing_loss_is_the_cross_entropy_of_the_cells_of_the_hits() -> None:
    logits = np.random.default_rng(0).standard_normal((3, CELLS))
    hit_cells = np.array([[0, 0, 4], [1, 2, 3], [4, 4, 4]])
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -np.mean([log_softmax[row, cell] for row in range(3) for cell in hit_cells[row]])
    given = losses.routing(torch.from_numpy(logits), torch.from_numpy(hit_cells))
    assert float(given) == pytest.approx(expected)


def test_gradient_matching_measures_the_chosen_heads_only() -> None:
    net = support_net(8, 2, 0)
    u = torch.nn.functional.normalize(points(6, 0))
    chosen = torch.tensor([0, 1, 2, 3, 4, 0])
    gradients = torch.stack([jacobian(net, row)[cell] for row, cell in zip(u, chosen, strict=True)])
    matched = losses.gradient_matching(net, u, chosen, gradients).detach()
    assert float(matched) == pytest.approx(0.0, abs=1e-9)
    off = losses.gradient_matching(net, u, chosen, gradients + 1.0).detach()
    assert float(off) == pytest.approx(DIM)
