"""Small made-up inputs that several tests share."""

from __future__ import annotations

import numpy as np
import torch

from amips_plugins.export.nets import (
    KeyNet,
    LinearRouter,
    LowRankRouter,
    ManyHeads,
    Net,
    SupportNet,
)
from amips_plugins.vectors import FloatArray
from tests.support.two_level import two_level


def gaussian(n: int, dim: int, seed: int = 0) -> FloatArray:
    """Independent coordinates."""
    return np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)


def clustered_keys(n: int, dim: int, seed: int = 0, clusters: int = 30) -> FloatArray:
    """Keys around some centres, of lengths between 0.5 and 2."""
    rng = np.random.default_rng(seed)
    centres = gaussian(clusters, dim, seed + 1)
    keys = centres[rng.integers(clusters, size=n)] + 0.4 * gaussian(n, dim, seed + 2)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    scaled: FloatArray = (keys * rng.uniform(0.5, 2.0, size=(n, 1))).astype(np.float32)
    return scaled


def narrow_queries(n: int, dim: int, seed: int = 0, directions: int = 3) -> FloatArray:
    """Queries that only look at a few directions: most of what tells keys apart is idle to them.

    Cells cut by where the keys lie are then a poor cut for these queries, which a router can learn.
    """
    queries = 0.02 * gaussian(n, dim, seed + 10)
    queries[:, :directions] += gaussian(n, directions, seed + 11)
    return queries


def shake(net: Net, seed: int = 0) -> Net:
    """Give a net weights that no initialisation would: every term then counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    net.constrain()
    return net


def every_net(dim: int, n_cells: int) -> dict[str, Net]:
    """One net of every kind and shape that there is; the same ones every time."""
    torch.manual_seed(0)
    return {
        "linear": shake(LinearRouter(dim, n_cells)),
        "low-rank": shake(LowRankRouter(dim, n_cells, 3)),
        "two-level": shake(two_level(dim, n_cells, visited=n_cells)),
        "heads": shake(ManyHeads(dim, n_cells, 3)),
        "supportnet-1": shake(SupportNet(dim, n_cells, width=8, depth=1)),
        "supportnet-3": shake(SupportNet(dim, n_cells, width=8, depth=3)),
        "keynet-linear": shake(KeyNet(dim, 0)),
        "keynet-1": shake(KeyNet(dim, 12, 1)),
        "keynet-2-plain": shake(KeyNet(dim, 12, 2, residual=False)),
    }
