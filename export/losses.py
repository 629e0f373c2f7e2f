"""The objectives, each a mean over a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from amips_plugins.export.nets import SupportNet

__all__ = [
    "gradient_matching",
    "key_regression",
    "routing",
    "score_consistency",
    "score_regression",
]


def routing(logits: Tensor, hit_cells: Tensor, *, some: bool = False) -> Tensor:
    """Cross-entropy against the cells that hold the query's top keys; ``some`` have none (-1).

    Keys with several cells, on a third axis that repeats the first in unused places, are found in
    any of them.
    """
    shares = functional.log_softmax(logits, dim=1)
    if some:
        placed = hit_cells >= 0
        logs = shares.gather(1, hit_cells.clamp_min(0)) * placed
        return -logs.sum() / placed.sum().clamp_min(1)
    if hit_cells.dim() == 2:
        return -shares.gather(1, hit_cells).mean()
    found = shares.gather(1, hit_cells.flatten(1)).view(hit_cells.shape)
    unused = hit_cells == hit_cells[:, :, :1]
    unused[:, :, 0] = False
    return -found.masked_fill(unused, -torch.inf).logsumexp(dim=2).mean()


def score_regression(scores: Tensor, support: Tensor) -> Tensor:
    """Squared error of the support values (paper, section 3)."""
    return functional.mse_loss(scores, support)


def gradient_matching(net: SupportNet, u: Tensor, cells: Tensor, keys: Tensor) -> Tensor:
    """Squared distance of a head's gradient to the best key of its cell (paper, section 3)."""
    u = u.detach().requires_grad_()
    scores = net(u).gather(1, cells[:, None]).sum()
    (gradient,) = torch.autograd.grad(scores, u, create_graph=True)
    return (gradient - keys).square().sum(dim=1).mean()


def key_regression(predicted: Tensor, keys: Tensor) -> Tensor:
    """Squared distance of the predicted key to the best one (paper, section 3)."""
    return (predicted - keys).square().sum(dim=1).mean()


def score_consistency(predicted: Tensor, u: Tensor, best: Tensor) -> Tensor:
    """Squared error of ``<predicted, u>`` as the support value (paper, section 3; Euler)."""
    return functional.mse_loss((predicted * u).sum(dim=1), best)
