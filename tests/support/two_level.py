"""Two-level routers over few cells."""

from __future__ import annotations

import numpy as np

from amips_plugins.export.nets import TwoLevelRouter


def two_level(dim: int, n_cells: int, visited: int, size: int = 4, rank: int = 3) -> TwoLevelRouter:
    """Return an untrained router over groups of ``size`` cells in a mixed order."""
    n_groups = -(-n_cells // size)
    groups = np.full(n_groups * size, -1, dtype=np.int64)
    groups[:n_cells] = np.random.default_rng(0).permutation(n_cells)
    return TwoLevelRouter(dim, groups.reshape(n_groups, size), rank, visited)
