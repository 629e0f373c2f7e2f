"""Candidates that choose cells: the native baseline, the linear router and the SupportNet."""

from __future__ import annotations

import math
import tempfile
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from amips_plugins.export import losses
from amips_plugins.export.candidates import Candidate, score
from amips_plugins.export.clustering import centroid_weights
from amips_plugins.export.cost_curves import (
    Curve,
    curve,
    levels_by_rank,
    levels_by_threshold,
    thresholds_for,
)
from amips_plugins.export.dataset import Split, TrainingTask, augmented
from amips_plugins.export.nets import (
    LinearRouter,
    Net,
    Router,
    SupportNet,
    TwoLevelRouter,
    multiplications,
    served_scores,
)
from amips_plugins.export.recipes import Preset
from amips_plugins.export.spilling import first_cells
from amips_plugins.export.targets import best_per_cell
from amips_plugins.export.to_onnx import Order
from amips_plugins.export.training_loop import fit
from amips_plugins.export.two_level import fewest_groups, new_two_level, unscored_shares
from amips_plugins.models.cells import Cells
from amips_plugins.vectors import FloatArray, IntArray, normalise

__all__ = ["INITIAL_SCALE", "native_candidate", "train_router"]

INITIAL_SCALE = 20.0  # turns cosines into logits as sharp as those of a trained router
_SIZE_POWER = 0.75  # of a cell's size, that its share of the top keys has to pay for
_MANY_CELLS = 1_024  # above this a linear router is of low rank, in two levels where they pay
_RANK = 128


def native_candidate(task: TrainingTask, cells: Cells, assignment: IntArray) -> Candidate:
    """Return the baseline: probe the cells whose centroids are nearest, as an IVF index does."""
    weights = centroid_weights(
        task.keys, assignment, cells, task.metric, task.centre, task.executor
    )
    net = LinearRouter(weights.shape[1], cells.n_cells)
    net.weight.data.copy_(torch.from_numpy(weights))
    order = Order(None, np.zeros(cells.n_cells, dtype=np.float32))

    def priority(split: Split) -> FloatArray:
        products: FloatArray = split.unit @ weights.T
        return products

    def measure(split: Split) -> Curve:
        levels = levels_by_rank(priority(split))
        hit_cells = assignment[split.hits]
        model_keys = float(cells.n_cells)
        return curve(levels, cells.n_cells, hit_cells, cells.sizes, model_keys, split.as_good)

    return Candidate("native", net, order, cells, assignment, weights.size, [], measure, priority)


def train_router(
    kind: Literal["linear", "supportnet"],
    preset: Preset,
    task: TrainingTask,
    cells: Cells,
    assignment: IntArray,
    *,
    graphs: bool = False,
    begun: Router | None = None,
    size_power: float | None = None,
    name: str | None = None,
) -> Candidate:
    """Train a router over cells; ``assignment`` may give keys several (``votes``), or none (-1).

    To scan a cell costs what it holds. With a graph in it every cell costs about the same, and no
    cell has to pay for its size. ``begun`` is a net to go on from, in place of one that orders
    cells as their centroids do; ``size_power`` is that of a cell's size which its share of the top
    keys has to pay for.
    """
    train = augmented(task, preset)
    first = first_cells(assignment)
    always = int((first < 0).sum())  # keys that every query searches
    costs = np.full(cells.n_cells, len(first) / cells.n_cells) if graphs else cells.sizes
    powers = 0.0 if graphs else _SIZE_POWER
    powers = powers if size_power is None else size_power
    net: Router
    if begun is None:
        centroids = centroid_weights(
            task.keys, first, cells, task.metric, task.centre, task.executor
        )
        net = new_router(kind, preset, centroids, task.seed)
    else:
        net = begun
    net = net.to(task.device)
    unit = torch.from_numpy(train.unit).to(task.device)
    hit_cells = torch.from_numpy(assignment[train.hits[:, : task.k]]).to(task.device)
    support = (
        SupportTargets(task, train.unit, first, cells, keys=preset.keys > 0)
        if kind == "supportnet" and (preset.scores or preset.keys)
        else None
    )

    def loss(model: Net, rows: Tensor) -> Tensor:
        u = unit[rows]
        scores = model(u)
        scale = model.scale if isinstance(model, SupportNet) else 1.0
        hits = hit_cells[rows]
        total = preset.routing * losses.routing(scale * scores, hits, some=always > 0)
        if isinstance(model, TwoLevelRouter):
            groups = torch.where(hits < 0, hits, model.group_of[hits.clamp_min(0)])
            of_groups = losses.routing(model.group_scores(u), groups, some=always > 0)
            total = total + preset.routing * of_groups
        if support is not None and isinstance(model, SupportNet):
            if preset.scores:
                values = support.values(rows)
                total = total + preset.scores * losses.score_regression(scores, values)
            if preset.keys:
                chosen = hits[:, 0]
                best = support.keys(rows, chosen)
                total = total + preset.keys * losses.gradient_matching(model, u, chosen, best)
        return total

    def order() -> Order:
        scale = float(net.scale.detach()) if isinstance(net, SupportNet) else 1.0
        penalty = powers * np.log(np.maximum(cells.sizes, 1))
        unscored = None
        if isinstance(net, TwoLevelRouter):
            hits, known = first[task.validate.hits[:, : task.k]], first[train.hits[:, : task.k]]
            unscored = unscored_shares(net, task.validate.unit, hits, known)
        return Order(scale, -penalty.astype(np.float32), unscored)

    def priority(split: Split) -> FloatArray:
        with torch.no_grad():
            unit = torch.from_numpy(split.unit).to(task.device)
            scores = served_scores(net, unit).cpu().numpy()
        return order().priority(scores)

    def measure(split: Split) -> Curve:
        thresholds = thresholds_for(
            priority(task.validate), assignment[task.validate.hits[:, : task.k]]
        )
        levels = levels_by_threshold(priority(split), thresholds)
        model_keys = multiplications(net) / split.unit.shape[1]
        return curve(
            levels,
            len(thresholds),
            assignment[split.hits],
            costs,
            model_keys,
            split.as_good,
            len(first),
            always,
        )

    def value() -> float:
        return score(measure(task.validate), task).value

    history = fit(
        net,
        loss,
        len(train.unit),
        lambda _: score(measure(task.validate), task),
        preset.schedule,
        task.seed,
        task.work / f"{name or kind}.safetensors",
        f"train {name or kind}",
        task.progress,
    )
    if isinstance(net, TwoLevelRouter):
        levels, net = net, net.low_rank()
        at_once = value()
        net = levels
        if fewest_groups(levels, value) <= at_once:
            net = levels.low_rank()
    parameters = multiplications(net)
    return Candidate(kind, net, order(), cells, assignment, parameters, history, measure, priority)


def new_router(
    kind: Literal["linear", "supportnet"], preset: Preset, centroids: FloatArray, seed: int
) -> Router:
    """Return an untrained router that orders cells as their centroids do."""
    torch.manual_seed(seed)
    n_cells, dim = centroids.shape
    start = torch.from_numpy(INITIAL_SCALE * normalise(centroids))
    if kind == "supportnet":
        net = SupportNet(dim, n_cells, preset.width, preset.depth)
        net.skip[-1].data.copy_(torch.from_numpy(centroids))
        net.log_scale.data.fill_(math.log(INITIAL_SCALE))
        return net
    if n_cells <= _MANY_CELLS:
        linear = LinearRouter(dim, n_cells)
        linear.weight.data.copy_(start)
        return linear
    return new_two_level(start.numpy(), _RANK, seed)


class SupportTargets:
    """Exact support values of every training query and cell, and the keys that attain them.

    The values lie in a file, for there are as many as queries times cells.
    """

    def __init__(
        self,
        task: TrainingTask,
        unit: FloatArray,
        assignment: IntArray,
        cells: Cells,
        *,
        keys: bool = True,
    ) -> None:
        self._task = task
        shape = (len(unit), cells.n_cells)
        with tempfile.TemporaryFile(dir=task.work) as file:  # mapped, it outlives its name
            values = np.memmap(file, np.float32, "w+", shape=shape)
        self._values, self._rows = best_per_cell(
            unit,
            task.lifted,
            assignment,
            cells.n_cells,
            task.device,
            task.progress,
            task.executor,
            values,
            want_rows=keys,
        )

    def values(self, rows: Tensor) -> Tensor:
        """Return ``(n, n_cells)`` support values."""
        chosen = np.array(self._values[rows.cpu().numpy()])
        return torch.from_numpy(chosen).to(self._task.device)

    def keys(self, rows: Tensor, cells: Tensor) -> Tensor:
        """Return ``(n, lifted_dim)`` the best key of one cell for each query."""
        best = self._rows[rows.cpu().numpy(), cells.cpu().numpy()]
        return torch.from_numpy(np.array(self._task.lifted[best])).to(self._task.device)
