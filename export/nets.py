"""The networks. All of them see a unit query u (lifted, divided by its length).

A query's own length never changes which key is best, so the nets need not learn it: the exported
graph divides it out, and multiplies support values by it again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from amips_plugins.vectors import IntArray

__all__ = [
    "KeyNet",
    "LinearRouter",
    "LowRankRouter",
    "ManyHeads",
    "Net",
    "Router",
    "SupportNet",
    "TwoLevelRouter",
    "multiplications",
    "served_scores",
]


class LinearRouter(nn.Module):
    """One score per cell: ``W u + b``. It costs exactly what comparing with the centroids costs."""

    def __init__(self, dim: int, n_cells: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_cells, dim))
        self.bias = nn.Parameter(torch.zeros(n_cells))

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, dim)`` unit queries to ``(n, n_cells)`` scores."""
        return functional.linear(u, self.weight, self.bias)

    def constrain(self) -> None:
        """Do nothing: any weight is allowed."""


class LowRankRouter(nn.Module):
    """A linear router of lower cost: ``V (U u) + b``, for cells by the thousand."""

    def __init__(self, dim: int, n_cells: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, dim))
        self.up = nn.Parameter(torch.zeros(n_cells, rank))
        self.bias = nn.Parameter(torch.zeros(n_cells))

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, dim)`` unit queries to ``(n, n_cells)`` scores."""
        return functional.linear(functional.linear(u, self.down), self.up, self.bias)

    def constrain(self) -> None:
        """Do nothing: any weight is allowed."""


class TwoLevelRouter(nn.Module):
    """A low-rank router that scores groups of cells first, then the cells of the best groups.

    With as many groups as the root of the number of cells a query is multiplied with
    ``O(sqrt(n_cells))`` rows of ``rank`` numbers. What is learned is a score of every cell and of
    every group; only serving leaves the cells of other groups out.

    Parameters
    ----------
    dim
        Of the unit queries.
    groups
        ``(n_groups, size)`` int64: the cells of each group, -1 in places that are not used. Every
        cell is in one.
    rank
        Of the map that both levels share.
    visited
        Groups whose cells a query scores.
    """

    members: Tensor
    group_of: Tensor

    def __init__(self, dim: int, groups: IntArray, rank: int, visited: int) -> None:
        super().__init__()
        n_groups, used = len(groups), groups >= 0
        group_of = np.empty(int(used.sum()), dtype=np.int64)
        group_of[groups[used]] = np.nonzero(used)[0]
        self.visited = min(visited, n_groups)
        self.register_buffer("members", torch.from_numpy(groups))
        self.register_buffer("group_of", torch.from_numpy(group_of))
        self.down = nn.Parameter(torch.zeros(rank, dim))
        self.up = nn.Parameter(torch.zeros(len(group_of), rank))
        self.bias = nn.Parameter(torch.zeros(len(group_of)))
        self.group_up = nn.Parameter(torch.zeros(n_groups, rank))
        self.group_bias = nn.Parameter(torch.zeros(n_groups))

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, dim)`` unit queries to ``(n, n_cells)`` scores of all cells."""
        return functional.linear(functional.linear(u, self.down), self.up, self.bias)

    def group_scores(self, u: Tensor) -> Tensor:
        """Map ``(n, dim)`` unit queries to ``(n, n_groups)`` scores."""
        return functional.linear(functional.linear(u, self.down), self.group_up, self.group_bias)

    def scored(self, u: Tensor) -> Tensor:
        """Return what is served: the scores of the best groups' cells, minus infinity elsewhere."""
        best = self.group_scores(u).topk(self.visited, dim=1).indices
        chosen = torch.zeros(len(u), len(self.group_up), dtype=torch.bool, device=u.device)
        chosen.scatter_(1, best, value=True)
        served: Tensor = self(u).masked_fill(~chosen[:, self.group_of], -torch.inf)
        return served

    @torch.no_grad()
    def low_rank(self) -> LowRankRouter:
        """Return the router that scores all cells at once, with the same scores."""
        rank, dim = self.down.shape
        net = LowRankRouter(dim, len(self.bias), rank).to(self.down.device)
        for to, of in ((net.down, self.down), (net.up, self.up), (net.bias, self.bias)):
            to.copy_(of)
        return net

    @property
    def multiplications(self) -> int:
        """Number of weights that a served query is multiplied with.

        Places that no cell uses count, and a row of zeros that stands for the cells left out.
        """
        rows = len(self.group_up) + self.visited * self.members.shape[1] + 1
        return int(self.down.numel() + rows * self.up.shape[1])

    def constrain(self) -> None:
        """Do nothing: any weight is allowed."""


class SupportNet(nn.Module):
    """Input-convex and 1-homogeneous: one support function estimate per cell (paper, section 3).

    ::

        z_0 = relu(A_0 u + a_0 ||u||)
        z_i = relu(B_i z_{i-1} + A_i u + a_i ||u||)        B_i >= 0, a_i >= 0
        f   = B z_last + A u + a ||u||                     B >= 0, a >= 0

    Without free biases every layer is 1-homogeneous; with B and a non-negative every layer is
    convex in u, since ||u|| is. Both hold exactly, by construction. The gradient of head c at u is
    the key that the net predicts to be the best of cell c.
    """

    def __init__(self, dim: int, n_cells: int, width: int = 128, depth: int = 1) -> None:
        super().__init__()
        outs = [width] * depth + [n_cells]
        self.skip = nn.ParameterList([nn.Parameter(torch.empty(out, dim)) for out in outs])
        self.norm = nn.ParameterList([nn.Parameter(torch.zeros(out)) for out in outs])
        self.mix = nn.ParameterList([nn.Parameter(torch.empty(out, width)) for out in outs[1:]])
        for skip in self.skip:
            nn.init.normal_(skip, std=dim**-0.5)
        for mix in self.mix:
            nn.init.uniform_(mix, 0.0, 2.0 / width)
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, dim)`` queries of any length to ``(n, n_cells)`` support values."""
        length = u.norm(dim=1, keepdim=True)
        z = torch.relu(u @ self.skip[0].T + length * self.norm[0])
        for mix, skip, norm in zip(
            self.mix[:-1], list(self.skip)[1:-1], list(self.norm)[1:-1], strict=True
        ):
            z = torch.relu(z @ mix.T + u @ skip.T + length * norm)
        scores: Tensor = z @ self.mix[-1].T + u @ self.skip[-1].T + length * self.norm[-1]
        return scores

    @property
    def scale(self) -> Tensor:
        """Positive factor from support values to logits; it changes no ranking."""
        return self.log_scale.exp()

    @torch.no_grad()
    def constrain(self) -> None:
        """Project the weights that convexity needs onto the non-negative ones."""
        for weights in (*self.mix, *self.norm):
            weights.clamp_(min=0.0)


class ManyHeads(nn.Module):
    """Several linear scores per cell, of which the largest counts.

    That is what a support function is, with few keys for many: the maximum of products is convex
    and 1-homogeneous in u by construction. Parts that people cut hold several topics, and each
    head stands for one.
    """

    def __init__(self, dim: int, n_cells: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.zeros(n_cells * heads, dim))
        self.bias = nn.Parameter(torch.zeros(n_cells * heads))

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, dim)`` unit queries to ``(n, n_cells)`` scores."""
        scores = functional.linear(u, self.weight, self.bias)
        largest: Tensor = scores.view(len(u), -1, self.heads).amax(dim=2)
        return largest

    def constrain(self) -> None:
        """Do nothing: any weight is allowed."""


class KeyNet(nn.Module):
    """Predicts the best key itself (paper, section 3): ``(n, dim)`` to ``(n, dim)``."""

    def __init__(
        self,
        dim: int,
        width: int = 0,
        depth: int = 1,
        residual: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.dropout = dropout
        hidden = [width] * depth if width else []
        ins = [dim, *hidden]
        outs = [*hidden, dim]
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.empty(o, i)) for o, i in zip(outs, ins, strict=True)]
        )
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(out)) for out in outs])
        for weight in self.weights:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if residual:
            nn.init.zeros_(self.weights[-1])

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, dim)`` unit queries to ``(n, dim)`` keys."""
        z = u
        last = len(self.weights) - 1
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            z = functional.linear(z, weight, bias)
            if place < last:
                z = functional.dropout(torch.relu(z), self.dropout, self.training)
        return z + u if self.residual else z

    def constrain(self) -> None:
        """Do nothing: any weight is allowed."""


Router = LinearRouter | LowRankRouter | ManyHeads | SupportNet | TwoLevelRouter
Net = Router | KeyNet


def multiplications(net: Net) -> int:
    """Return the number of weights a single query is multiplied with."""
    if isinstance(net, TwoLevelRouter):
        return net.multiplications
    return sum(p.numel() for p in net.parameters() if p.dim() == 2)


def served_scores(net: Net, u: Tensor) -> Tensor:
    """Return the scores that are served; minus infinity where a router does not look."""
    scores: Tensor = net.scored(u) if isinstance(net, TwoLevelRouter) else net(u)
    return scores
