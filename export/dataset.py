"""What candidates are trained and measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from amips_plugins.bundle.manifest import ModelKind
from amips_plugins.export.cost_curves import Curve
from amips_plugins.export.nets import Net
from amips_plugins.export.queries import augment
from amips_plugins.export.recipes import Preset
from amips_plugins.export.targets import top_keys
from amips_plugins.export.to_onnx import Order
from amips_plugins.export.training_loop import Score
from amips_plugins.models.cells import Cells
from amips_plugins.progress import Progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_queries, normalise

__all__ = ["Candidate", "Problem", "Split", "augmented", "score"]


@dataclass(frozen=True)
class Split:
    """Queries of one split with their exact answers.

    Attributes
    ----------
    queries
        ``(n, dim)`` float32 as the user has them.
    unit
        ``(n, lifted_dim)`` float32: lifted, of unit length; what the nets see.
    hits
        ``(n, depth)`` int64 rows of the best keys, best first.
    """

    queries: FloatArray
    unit: FloatArray
    hits: IntArray


@dataclass(frozen=True)
class Problem:
    """Keys, splits and a target.

    Attributes
    ----------
    keys
        ``(n, dim)`` float32 memory map, as the collection stores them.
    lifted
        ``(n, lifted_dim)`` float32 memory map.
    metric
        Metric of the collection.
    train, validate, calibrate, test
        The splits.
    k, recall
        The target to be cheap at.
    seed
        Decides every random choice.
    device
        Where to train.
    work
        Folder for checkpoints.
    progress
        Watches the work.
    """

    keys: FloatArray
    lifted: FloatArray
    metric: Metric
    train: Split
    validate: Split
    calibrate: Split
    test: Split
    k: int
    recall: float
    seed: int
    device: torch.device
    work: Path
    progress: Progress


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
        The partition it routes to, or (KeyNet) is measured on, and the cell of each key.
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


def augmented(problem: Problem, preset: Preset) -> Split:
    """Return the training split with the recipe's noisy copies, and their own exact answers."""
    if preset.copies == 0:
        return problem.train
    queries = augment(problem.train.queries, preset.copies, preset.noise, problem.seed)
    new = queries[len(problem.train.queries) :]
    unit = normalise(lift_queries(new, problem.metric))
    depth = problem.train.hits.shape[1]
    hits, _ = top_keys(
        unit, problem.lifted, depth, problem.device, problem.progress, "targets (noisy copies)"
    )
    return Split(
        queries,
        np.concatenate([problem.train.unit, unit]),
        np.concatenate([problem.train.hits, hits]),
    )


def score(measured: Curve, problem: Problem) -> Score:
    """Score a candidate while it trains: the cheaper at the target, the better."""
    cost = measured.cost(problem.k, problem.recall)
    # The cost at one recall moves in steps; around it, it is smooth enough to compare epochs.
    around = np.clip(problem.recall + np.linspace(-0.1, 0.03, 14), 0.01, 0.999)
    costs = [min(measured.cost(problem.k, float(recall)), 2.0) for recall in around]
    narrow = int((measured.scanned.mean(axis=0) <= 0.1).sum())
    matched = float(measured.mean_recall(1)[max(narrow - 1, 0)])
    return Score(
        -float(np.mean(costs)),
        f"match rate {matched:.3f} in a tenth of the keys, "
        f"recall@{problem.k} {problem.recall:.2f} at {cost:.2%} of a full scan",
    )
