"""The candidates: for each kind of net how it is trained, ordered and measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from amips_plugins.cells import Cells
from amips_plugins.export import losses
from amips_plugins.export.clustering import centroid_weights, native_cells
from amips_plugins.export.fit import Schedule, Score, fit
from amips_plugins.export.measure import Curve, curve
from amips_plugins.export.nets import KeyNet, LinearRouter, Net, SupportNet, multiplications
from amips_plugins.export.queries import augment
from amips_plugins.export.targets import best_per_cell, top_keys
from amips_plugins.export.to_onnx import Order
from amips_plugins.progress import Progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_queries, normalise

__all__ = [
    "PRESETS",
    "Candidate",
    "Preset",
    "Problem",
    "Split",
    "native_candidate",
    "train_keynet",
    "train_router",
]

_INITIAL_SCALE = 20.0  # turns cosines into logits as sharp as those of a trained router
_SIZE_PENALTY = 0.5  # probing by score - 0.5 log(cell size) pays for large cells (docs/method.md)


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
    """Everything a candidate is trained and measured on.

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
class Preset:
    """A training recipe.

    Attributes
    ----------
    routing
        Weight of the routing loss.
    scores
        Weight of the regression of support values (SupportNet) or consistency (KeyNet).
    gradients
        Weight of gradient matching (SupportNet) or key regression (KeyNet).
    copies
        Noisy copies of every training query.
    noise
        Their standard deviation.
    width, depth
        Hidden layers of the nets; a KeyNet of width 0 is linear.
    schedule
        How to optimise.
    """

    routing: float
    scores: float
    gradients: float
    copies: int
    noise: float
    width: int
    depth: int
    schedule: Schedule


PRESETS: dict[str, dict[str, Preset]] = {
    "default": {
        "linear": Preset(1.0, 0.0, 0.0, 0, 0.0, 0, 0, Schedule()),
        "supportnet": Preset(1.0, 1.0, 0.0, 0, 0.0, 128, 1, Schedule()),
        "keynet": Preset(1.0, 0.0, 0.0, 0, 0.0, 0, 0, Schedule()),
    },
    # The paper's own objectives and optimiser settings.
    "paper": {
        "linear": Preset(1.0, 0.0, 0.0, 0, 0.0, 0, 0, Schedule()),
        "supportnet": Preset(0.0, 0.01, 1.0, 1, 0.02, 128, 2, Schedule()),
        "keynet": Preset(0.0, 0.01, 1.0, 1, 0.02, 512, 2, Schedule()),
    },
}
"""Recipes by name and kind of net; the linear router is not in the paper."""


@dataclass(frozen=True)
class Candidate:
    """A trained router or rewriter, with what it costs.

    Attributes
    ----------
    kind
        ``native``, ``linear``, ``supportnet`` or ``keynet``.
    net
        The net; the baseline's is a linear router that holds the centroids.
    order
        How scores order the cells; None for a KeyNet.
    cells, assignment
        The partition it routes to, or (KeyNet) is measured on, and the cell of each key.
    parameters
        Multiplications of one query.
    history
        Loss and score of every epoch.
    measure
        Measures the candidate on a split.
    """

    kind: Literal["native", "linear", "supportnet", "keynet"]
    net: Net
    order: Order | None
    cells: Cells
    assignment: IntArray
    parameters: int
    history: list[dict[str, float]]
    measure: Callable[[Split], Curve]


def native_candidate(problem: Problem, cells: Cells, assignment: IntArray) -> Candidate:
    """Return the baseline: probe the cells whose centroids are nearest, as an IVF index does."""
    weights = centroid_weights(problem.keys, assignment, cells, problem.metric)
    net = LinearRouter(weights.shape[1], cells.n_cells)
    net.weight.data.copy_(torch.from_numpy(weights))
    order = Order(1.0, np.zeros(cells.n_cells, dtype=np.float32))

    def measure(split: Split) -> Curve:
        return curve(split.unit @ weights.T, assignment[split.hits], cells.sizes, cells.n_cells)

    return Candidate("native", net, order, cells, assignment, weights.size, [], measure)


def train_router(
    kind: Literal["linear", "supportnet"],
    preset: Preset,
    problem: Problem,
    cells: Cells,
    assignment: IntArray,
) -> Candidate:
    """Train a router over cells.

    Parameters
    ----------
    kind
        Which net.
    preset
        The recipe.
    problem
        What to train on.
    cells, assignment
        The partition.
    """
    train = augmented(problem, preset)
    centroids = centroid_weights(problem.keys, assignment, cells, problem.metric)
    net = new_router(kind, preset, centroids, problem.seed).to(problem.device)
    unit = torch.from_numpy(train.unit).to(problem.device)
    hit_cells = torch.from_numpy(assignment[train.hits[:, : problem.k]]).to(problem.device)
    support = (
        SupportTargets(problem, train.unit, assignment, cells) if kind == "supportnet" else None
    )

    def loss(model: Net, rows: Tensor) -> Tensor:
        u = unit[rows]
        scores = model(u)
        scale = model.scale if isinstance(model, SupportNet) else 1.0
        total = preset.routing * losses.routing(scale * scores, hit_cells[rows])
        if support is not None and isinstance(model, SupportNet):
            if preset.scores:
                values = support.values(rows)
                total = total + preset.scores * losses.score_regression(scores, values)
            if preset.gradients:
                chosen = hit_cells[rows, 0]
                best = support.keys(rows, chosen)
                total = total + preset.gradients * losses.gradient_matching(model, u, chosen, best)
        return total

    def order() -> Order:
        scale = float(net.scale.detach()) if isinstance(net, SupportNet) else 1.0
        penalty = _SIZE_PENALTY * np.log(np.maximum(cells.sizes, 1))
        return Order(scale, -penalty.astype(np.float32))

    def measure(split: Split) -> Curve:
        now = order()
        with torch.no_grad():
            scores = net(torch.from_numpy(split.unit).to(problem.device)).cpu().numpy()
        model_keys = multiplications(net) / split.unit.shape[1]
        priority = now.scale * scores + now.offset
        return curve(priority, assignment[split.hits], cells.sizes, model_keys)

    history = fit(
        net,
        loss,
        len(train.unit),
        lambda _: score(measure(problem.validate), problem),
        preset.schedule,
        problem.seed,
        problem.work / f"{kind}.safetensors",
        f"train {kind}",
        problem.progress,
    )
    return Candidate(kind, net, order(), cells, assignment, multiplications(net), history, measure)


def new_router(
    kind: Literal["linear", "supportnet"], preset: Preset, centroids: FloatArray, seed: int
) -> LinearRouter | SupportNet:
    """Return an untrained router that orders cells as their centroids do."""
    torch.manual_seed(seed)
    n_cells, dim = centroids.shape
    if kind == "linear":
        linear = LinearRouter(dim, n_cells)
        linear.weight.data.copy_(torch.from_numpy(_INITIAL_SCALE * normalise(centroids)))
        return linear
    net = SupportNet(dim, n_cells, preset.width, preset.depth)
    net.skip[-1].data.copy_(torch.from_numpy(centroids))
    net.log_scale.data.fill_(math.log(_INITIAL_SCALE))
    return net


def score(measured: Curve, problem: Problem) -> Score:
    """Score a router: the cheaper at the target, the better."""
    cost = measured.cost(problem.k, problem.recall)
    matched = float((measured.ranks[:, 0] == 0).mean())
    return Score(
        -min(cost, 2.0),
        f"match rate {matched:.3f} at 1 probe, "
        f"recall@{problem.k} {problem.recall:.2f} costs {cost:.2%} of a full scan",
    )


def augmented(problem: Problem, preset: Preset) -> Split:
    """Return the training split with the recipe's noisy copies, and their own exact answers."""
    if preset.copies == 0:
        return problem.train
    queries = augment(problem.train.queries, preset.copies, preset.noise, problem.seed)
    new = queries[len(problem.train.queries) :]
    unit = normalise(lift_queries(new, problem.metric))
    depth = problem.train.hits.shape[1]
    hits, _ = top_keys(
        unit, problem.lifted, depth, problem.device, problem.progress, "noisy copies"
    )
    return Split(
        queries,
        np.concatenate([problem.train.unit, unit]),
        np.concatenate([problem.train.hits, hits]),
    )


class SupportTargets:
    """Exact support values of every training query and cell, and the keys that attain them.

    Parameters
    ----------
    problem
        What is trained on.
    unit
        ``(n, lifted_dim)`` float32 unit queries.
    assignment, cells
        The partition.
    """

    def __init__(
        self, problem: Problem, unit: FloatArray, assignment: IntArray, cells: Cells
    ) -> None:
        self._problem = problem
        self._values, self._rows = best_per_cell(
            unit, problem.lifted, assignment, cells.n_cells, problem.device, problem.progress
        )

    def values(self, rows: Tensor) -> Tensor:
        """Return ``(n, n_cells)`` support values."""
        return torch.from_numpy(self._values[rows.cpu().numpy()]).to(self._problem.device)

    def keys(self, rows: Tensor, cells: Tensor) -> Tensor:
        """Return ``(n, lifted_dim)`` the best key of one cell for each query."""
        best = self._rows[rows.cpu().numpy(), cells.cpu().numpy()]
        return torch.from_numpy(np.array(self._problem.lifted[best])).to(self._problem.device)


_KEYNET_CENTROIDS = ((0.5, 1), (1.0, 2), (1.0, 3), (2.0, 4))
"""Sizes (relative to the number of cells) and seeds of the k-means the routing loss looks at."""


def train_keynet(
    preset: Preset, problem: Problem, cells: Cells, assignment: IntArray, rescore: int
) -> Candidate:
    """Train a net that rewrites the query for an index whose cells nobody can see.

    Its routing loss looks at k-means centroids of its own, of several sizes and seeds; it is
    measured on ``cells``, which it has not seen.

    Parameters
    ----------
    preset
        The recipe.
    problem
        What to train on.
    cells, assignment
        The native cells to measure on.
    rescore
        Candidates that are fetched by the rewritten query and rescored by the original one.
    """
    train = augmented(problem, preset)
    torch.manual_seed(problem.seed)
    dim = train.unit.shape[1]
    net = KeyNet(dim, preset.width, max(preset.depth, 1)).to(problem.device)
    unit = torch.from_numpy(train.unit).to(problem.device)
    best_rows = train.hits[:, 0]
    views = own_cells(problem, train, cells.n_cells) if preset.routing else []
    table = centroid_weights(problem.keys, assignment, cells, problem.metric)

    def loss(model: Net, rows: Tensor) -> Tensor:
        u = unit[rows]
        predicted = model(u)
        total: Tensor = predicted.new_zeros(())
        for centroids, hit_cells in views:
            logits = _INITIAL_SCALE * (predicted @ centroids.T)
            total = total + preset.routing / len(views) * losses.routing(logits, hit_cells[rows])
        if preset.scores or preset.gradients:
            keys = np.array(problem.lifted[best_rows[rows.cpu().numpy()]])
            best = torch.from_numpy(keys).to(problem.device)
            consistency = losses.score_consistency(predicted, u, (best * u).sum(dim=1))
            regression = losses.key_regression(predicted, best)
            total = total + preset.scores * consistency + preset.gradients * regression
        return total

    def rewrite(split: Split) -> FloatArray:
        with torch.no_grad():
            rewritten: FloatArray = (
                net(torch.from_numpy(split.unit).to(problem.device)).cpu().numpy()
            )
        return rewritten

    def order_cells(split: Split) -> Curve:
        priority = as_query(rewrite(split), problem.metric) @ table.T
        model_keys = multiplications(net) / dim + cells.n_cells
        return curve(priority, assignment[split.hits], cells.sizes, model_keys)

    def measure(split: Split) -> Curve:
        measured = order_cells(split)
        queries = as_query(rewrite(split), problem.metric)
        found, _ = top_keys(queries, problem.lifted, rescore, problem.device)
        kept = (split.hits[:, :, None] == found[:, None, :]).any(axis=2)
        # A key outside the best `rescore` of all keys counts as never found, though fewer probes
        # leave it fewer rivals: the figure errs against the KeyNet.
        return Curve(
            np.where(kept, measured.ranks, cells.n_cells), measured.scanned, measured.model
        )

    history = fit(
        net,
        loss,
        len(train.unit),
        lambda _: score(order_cells(problem.validate), problem),
        preset.schedule,
        problem.seed,
        problem.work / "keynet.safetensors",
        "train keynet",
        problem.progress,
    )
    return Candidate("keynet", net, None, cells, assignment, multiplications(net), history, measure)


def as_query(rewritten: FloatArray, metric: Metric) -> FloatArray:
    """Lift what a KeyNet says as the database will read it: a query of the collection."""
    if metric is Metric.L2:
        return lift_queries(np.ascontiguousarray(rewritten[:, :-1]), metric)
    return rewritten


def own_cells(problem: Problem, train: Split, n_cells: int) -> list[tuple[Tensor, Tensor]]:
    """Cut the keys several ways; return centroids in lifted space and the cells of the top keys."""
    result = []
    for factor, offset in _KEYNET_CENTROIDS:
        count = max(2, min(int(n_cells * factor), len(problem.keys) // 4))
        cells, assignment = native_cells(
            problem.keys, problem.metric, count, problem.seed + 7_919 * offset
        )
        weights = centroid_weights(problem.keys, assignment, cells, problem.metric)
        result.append(
            (
                torch.from_numpy(weights).to(problem.device),
                torch.from_numpy(assignment[train.hits[:, : problem.k]]).to(problem.device),
            )
        )
    return result
