"""Ways to search that are compared: what they are, and how they score while they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from amips_plugins.bundle.manifest import ModelKind
from amips_plugins.export.cost_curves import Curve
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.nets import Net
from amips_plugins.export.to_onnx import Order
from amips_plugins.export.training_loop import Score
from amips_plugins.models.cells import Cells
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Candidate", "score"]


@dataclass(frozen=True)
class Candidate:
    """A way to search, with what it costs.

    Attributes
    ----------
    kind
        Which.
    net
        The net; the native baseline's is a linear router that holds the centroids.
    order
        How scores become priorities; None for a KeyNet.
    cells, assignment
        The partition it routes to, or (KeyNet) is measured on, and the cell of each key, ``(n,)``,
        or all its cells, ``(n, width)``: its own first, which fills unused places.
    parameters
        Multiplications of one query.
    history
        Loss and score of every epoch.
    measure
        Measures the candidate on a split, as it would be used.
    priority
        The priorities its exported graph gives; None for a KeyNet.
    """

    kind: ModelKind
    net: Net
    order: Order | None
    cells: Cells
    assignment: IntArray
    parameters: int
    history: list[dict[str, float]]
    measure: Callable[[Split], Curve]
    priority: Callable[[Split], FloatArray] | None


def score(measured: Curve, task: TrainingTask) -> Score:
    """Score a candidate while it trains: the cheaper at the target, the better."""
    cost = measured.cost(task.k, task.recall)
    # The cost at one recall moves in steps; around it, it is smooth enough to compare epochs.
    around = np.clip(task.recall + np.linspace(-0.1, 0.03, 14), 0.01, 0.999)
    costs = [min(measured.cost(task.k, float(recall)), 2.0) for recall in around]
    narrow = int((measured.scanned.mean(axis=0) <= 0.1).sum())
    matched = float(measured.mean_recall(1)[max(narrow - 1, 0)])
    return Score(
        -float(np.mean(costs)),
        f"match rate {matched:.3f} in a tenth of the keys, "
        f"recall@{task.k} {task.recall:.2f} at {cost:.2%} of a full scan",
    )
