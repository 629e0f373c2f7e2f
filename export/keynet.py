"""The candidate that rewrites queries: a KeyNet for an index whose cells nobody can see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from amips_plugins.export import losses
from amips_plugins.export.candidates import Candidate, score
from amips_plugins.export.clustering import centroid_weights, native_cells
from amips_plugins.export.cost_curves import Curve, curve, levels_by_rank
from amips_plugins.export.dataset import Split, TrainingTask, augmented
from amips_plugins.export.nets import KeyNet, Net, multiplications
from amips_plugins.export.recipes import Preset
from amips_plugins.export.targets import top_keys
from amips_plugins.export.training_loop import fit
from amips_plugins.models.cells import Cells
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_queries

__all__ = ["train_keynet"]

_SCALE = 20.0  # turns cosines into logits
_PARTITIONS = 16 * (1.0,) + 4 * (0.5, 1.5, 2.0)
"""Sizes, relative to the number of cells, of the partitions that the routing loss looks at."""
_PER_STEP = 4  # of them, drawn anew for every batch
_ITERATIONS = 8  # of k-means, which need not converge to be a partition


def train_keynet(
    preset: Preset, task: TrainingTask, cells: Cells, assignment: IntArray, rescore: int
) -> Candidate:
    """Train a net that rewrites the query.

    Its routing loss looks at k-means partitions of its own, of several sizes and seeds; it is
    measured on ``cells``, which it has not seen.
    """
    train = augmented(task, preset)
    torch.manual_seed(task.seed)
    dim = train.unit.shape[1]
    net = KeyNet(dim, preset.width, preset.depth, dropout=preset.dropout).to(task.device)
    unit = torch.from_numpy(train.unit).to(task.device)
    wanted, place = np.unique(train.hits[:, 0], return_inverse=True)
    # Read once: from shards the rows of one batch would take nearly all of them.
    best_keys = np.array(task.lifted[wanted]) if preset.scores or preset.keys else None
    partitions = cut_many_ways(task, train, cells.n_cells) if preset.routing else []
    # Early stopping looks at cells of its own, too: those it is measured on stay unseen.
    seed, do = task.seed + 611_953, task.executor
    stopping = native_cells(task.keys, task.metric, cells.n_cells, seed, _ITERATIONS, do)

    def loss(model: Net, rows: Tensor) -> Tensor:
        u = unit[rows]
        predicted = model(u)
        total: Tensor = predicted.new_zeros(())
        for at in torch.randint(len(partitions), (_PER_STEP,)).tolist() if partitions else ():
            seen = partitions[at]
            # With log(size) in the logits the bare product orders cells by share per key searched.
            logits = _SCALE * (predicted @ seen.centroids.T) + seen.log_sizes
            total = total + preset.routing / _PER_STEP * losses.routing(logits, seen.cells[rows])
        if best_keys is not None:
            best = torch.from_numpy(best_keys[place[rows.cpu().numpy()]]).to(task.device)
            consistency = losses.score_consistency(predicted, u, (best * u).sum(dim=1))
            regression = losses.key_regression(predicted, best)
            total = total + preset.scores * consistency + preset.keys * regression
        return total

    def rewrite(split: Split) -> FloatArray:
        with torch.no_grad():
            rewritten = net(torch.from_numpy(split.unit).to(task.device)).cpu().numpy()
        return as_query(rewritten, task.metric)

    def order_cells(split: Split, given: Cells, placed: IntArray) -> Curve:
        table = centroid_weights(task.keys, placed, given, task.metric, task.centre, task.executor)
        levels = levels_by_rank(rewrite(split) @ table.T)
        model_keys = multiplications(net) / dim + given.n_cells + rescore
        hit_cells = placed[split.hits]
        return curve(levels, given.n_cells, hit_cells, given.sizes, model_keys, split.as_good)

    def measure(split: Split) -> Curve:
        measured = order_cells(split, cells, assignment)
        fetched, _ = top_keys(
            rewrite(split), task.lifted, rescore, task.device, executor=task.executor
        )
        kept = (split.hits[:, :, None] == fetched[:, None, :]).any(axis=2)
        # A key outside the best `rescore` of all keys counts as never found, though fewer probes
        # leave it fewer rivals: the figure errs against the KeyNet.
        return replace(measured, found=np.where(kept, measured.found, cells.n_cells))

    history = fit(
        net,
        loss,
        len(train.unit),
        lambda _: score(order_cells(task.validate, *stopping), task),
        preset.schedule,
        task.seed,
        task.work / "keynet.safetensors",
        "train keynet",
        task.progress,
    )
    parameters = multiplications(net)
    return Candidate("keynet", net, None, cells, assignment, parameters, history, measure, None)


def as_query(rewritten: FloatArray, metric: Metric) -> FloatArray:
    """Lift what a KeyNet says as the database will read it: a query of the collection."""
    if metric is Metric.L2:
        return lift_queries(np.ascontiguousarray(rewritten[:, :-1]), metric)
    return rewritten


@dataclass(frozen=True)
class Partition:
    """One way to cut the keys, as the routing loss needs it.

    ``centroids`` are ``(n_cells, lifted_dim)``, ``log_sizes`` ``(n_cells,)``; ``cells``,
    ``(n_queries, k)``, are those of the training queries' top keys.
    """

    centroids: Tensor
    log_sizes: Tensor
    cells: Tensor


def cut_many_ways(task: TrainingTask, train: Split, n_cells: int) -> list[Partition]:
    """Cut the keys as indexes nobody has seen might."""
    result = []
    with task.progress("partitions", len(_PARTITIONS), 0, "partitions") as step:
        for number, factor in enumerate(_PARTITIONS):
            count = max(2, min(int(n_cells * factor), len(task.keys) // 4))
            seed = task.seed + 7_919 * (number + 1)
            keys, metric, do = task.keys, task.metric, task.executor
            cells, assignment = native_cells(keys, metric, count, seed, _ITERATIONS, do)
            arrays = (
                centroid_weights(keys, assignment, cells, metric, task.centre, do),
                np.log(cells.sizes).astype(np.float32),
                assignment[train.hits[:, : task.k]],
            )
            result.append(Partition(*(torch.from_numpy(a).to(task.device) for a in arrays)))
            step.advance()
    return result
