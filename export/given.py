"""Cells that are the users' own partitions: read from a snapshot, and the routers over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from amips_plugins.bundle.manifest import ModelKind
from amips_plugins.errors import InvalidInput, TrainingError
from amips_plugins.export.candidates import Candidate, score
from amips_plugins.export.clustering import cell_means, k_means, nearest_offsets
from amips_plugins.export.cost_curves import Curve, curve, levels_by_threshold, thresholds_for
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.nets import LinearRouter, ManyHeads
from amips_plugins.export.recipes import Preset, TrainOptions
from amips_plugins.export.routers import INITIAL_SCALE, train_router
from amips_plugins.export.snapshot import Snapshot
from amips_plugins.export.targets import cell_order, top_keys
from amips_plugins.export.to_onnx import Order
from amips_plugins.models.cells import Cells, place_keys
from amips_plugins.models.given import GivenCells
from amips_plugins.partitions import NATIVE_PARTITIONS, Partitions, Value
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_keys, lift_queries, normalise

__all__ = ["Given", "largest_first", "many_heads", "refit_given", "train_given"]

_HEADS = (4, 16)  # per partition, that compete with one
_ITERATIONS = 10
_SAMPLE_PER_HEAD = 256
_MOST_MODEL = 0.05  # of a full scan, that a net may cost to be tried
_MANY_VALUES = 1_024
_KEYS_ASKED = 20_000  # as queries, before any query is learned from
_SIZE_POWERS = {"searches": 0.0, "keys": 0.5}


@dataclass(frozen=True)
class Given:
    """The partitions of a snapshot, and the ``(n,)`` cell of each of its keys, -1 for none."""

    cells: GivenCells
    assignment: IntArray

    @classmethod
    def of(cls, snapshot: Snapshot, asked: str | None) -> Given:
        """Read what a snapshot says of where its keys belong.

        Raises
        ------
        InvalidInput
            Another field is asked for than the snapshot has.
        TrainingError
            There is nothing to choose among.
        """
        field = snapshot.manifest.partitions
        name = field or NATIVE_PARTITIONS
        values = snapshot.values()
        if asked is not None and Partitions.named(asked).field != (field or None):
            raise InvalidInput(
                f"The snapshot in {snapshot.path} has the partitions {name!r}, not {asked!r}; take "
                f"another one: amips snapshot --partitions {asked}."
            )
        return cls.from_values(values, field or None)

    @classmethod
    def from_values(cls, values: Sequence[Value | None], field: str | None) -> Given:
        """Tell partitions apart by the value of each key, or raise ``TrainingError``."""
        name = field or NATIVE_PARTITIONS
        known = [value for value in values if value is not None]
        if len({type(value) for value in known}) > 1:
            raise TrainingError(
                f"The field {name!r} holds whole numbers and texts; write its values in one form."
            )
        distinct, counts = np.unique(np.array(known), return_counts=True)
        if len(distinct) < 2:
            raise TrainingError(
                f"The keys have {len(distinct)} different values of {name!r}, and a router chooses "
                f"among several; name another field."
            )
        partitions = Partitions(field, tuple(distinct.tolist()))
        cells = GivenCells(partitions, counts.astype(np.int64), len(values) - len(known))
        return cls(cells, partitions.cells_of(values))

    def as_cells(self, task: TrainingTask) -> Cells:
        """Return the partitions as cells with a centroid, which is what routers begin with."""
        means = cell_means(task.keys, self.assignment, self.cells.n_cells, task.executor)
        centroids = means if task.metric is Metric.L2 else normalise(means)
        sizes = self.cells.sizes
        return Cells(centroids, nearest_offsets(centroids), sizes, centre=task.centre)


def train_given(
    task: TrainingTask, given: Given, options: TrainOptions, presets: dict[str, Preset]
) -> list[Candidate]:
    """Train routers over given partitions, after the control that each has to beat.

    Of the nets with several heads per partition the cheapest is a candidate. Values by the thousand
    are scored in two levels (``two_level``), in groups that their contents make; several heads each
    would cost more than they could save, unless there are keys by the hundred for every value.
    """
    candidates = [
        largest_first(task, given),
        _train("linear", task, given, options, presets["linear"]),
    ]
    most = _MOST_MODEL * len(task.keys) / given.cells.n_cells
    if given.cells.n_cells <= _MANY_VALUES or options.model == "supportnet":
        most = max(most, _HEADS[0])
    if options.model in ("auto", "supportnet") and most >= _HEADS[0]:
        more = with_keys(task)
        tried = [
            _train("supportnet", more, given, options, replace(presets["heads"], heads=heads))
            for heads in _HEADS
            if heads <= most
        ]
        best = max(tried, key=lambda one: score(one.measure(task.validate), task).value)
        candidates.append(best)
    return candidates


def refit_given(
    given: Given,
    options: TrainOptions,
    presets: dict[str, Preset],
    candidates: list[Candidate],
    kind: ModelKind,
    task: TrainingTask,
) -> Candidate:
    """Train one kind of router anew, on a part of the training queries."""
    if kind == "linear":
        return _train("linear", task, given, options, presets["linear"])
    net = next(one.net for one in candidates if one.kind == kind)
    assert isinstance(net, ManyHeads)  # noqa: S101 - for the type checker
    preset = replace(presets["heads"], heads=net.heads)
    return _train("supportnet", with_keys(task), given, options, preset)


def _train(
    kind: ModelKind, task: TrainingTask, given: Given, options: TrainOptions, preset: Preset
) -> Candidate:
    power, cells, assignment = _SIZE_POWERS[options.count], given.as_cells(task), given.assignment
    if kind == "linear":
        return train_router("linear", preset, task, cells, assignment, size_power=power)
    net, name = many_heads(task, given, preset.heads), f"{preset.heads} heads"
    return train_router(
        "supportnet", preset, task, cells, assignment, begun=net, size_power=power, name=name
    )


def largest_first(task: TrainingTask, given: Given) -> Candidate:
    """Return what can be had without looking at a query: partitions by how many hits they hold.

    It is all that a router could learn from permuted labels.
    """
    cells, assignment = given.as_cells(task), given.assignment
    hits = assignment[task.train.hits[:, : task.k]]
    held = np.bincount(hits[hits >= 0], minlength=cells.n_cells) + cells.sizes / cells.sizes.sum()
    order = Order(None, np.log(held / held.sum()).astype(np.float32))
    net = LinearRouter(task.lifted.shape[1], cells.n_cells)

    def priority(split: Split) -> FloatArray:
        return np.tile(order.offset, (len(split.unit), 1))

    def measure(split: Split) -> Curve:
        validated = assignment[task.validate.hits[:, : task.k]]
        thresholds = thresholds_for(priority(task.validate), validated)
        levels, hit_cells = levels_by_threshold(priority(split), thresholds), assignment[split.hits]
        always = given.cells.overflow
        n_levels, sizes = len(thresholds), cells.sizes
        return curve(levels, n_levels, hit_cells, sizes, 0.0, split.as_good, always=always)

    return Candidate("native", net, order, cells, assignment, 0, [], measure, priority)


def many_heads(task: TrainingTask, given: Given, heads: int) -> ManyHeads:
    """Return an untrained net whose heads are where the topics of each partition lie.

    A partition of fewer keys than heads has some of them twice.
    """
    order, bounds = cell_order(given.assignment, given.cells.n_cells)
    rng = np.random.default_rng(task.seed)
    starts = []
    for cell in range(given.cells.n_cells):
        rows = order[bounds[cell] : bounds[cell + 1]]
        if len(rows) > heads * _SAMPLE_PER_HEAD:
            rows = rng.choice(rows, heads * _SAMPLE_PER_HEAD, replace=False)
        keys = np.asarray(task.keys[np.sort(rows)], dtype=np.float32)
        places = place_keys(keys, task.metric, task.centre)
        if len(places) > heads:
            spherical = task.metric is not Metric.L2
            places = k_means(places, heads, task.seed, spherical=spherical, iterations=_ITERATIONS)
        starts.append(places[np.arange(heads) % len(places)])
    centroids = np.concatenate(starts)
    if task.metric is Metric.L2:  # places are counted from the centre already
        centroids = lift_keys(centroids, task.metric)
    net = ManyHeads(centroids.shape[1], given.cells.n_cells, heads)
    net.weight.data.copy_(torch.from_numpy(INITIAL_SCALE * normalise(centroids)))
    return net.to(task.device)


def with_keys(task: TrainingTask) -> TrainingTask:
    """Return the task with keys as further queries, as many as there are queries at the least.

    A key asks for its neighbours. Few queries are repeated, so that they count for as much.
    """
    k, train = min(task.k, len(task.keys) - 1), task.train
    rows = np.random.default_rng(task.seed).permutation(len(task.keys))[:_KEYS_ASKED]
    rows = np.sort(rows)
    keys = np.asarray(task.keys[rows], dtype=np.float32)
    unit = normalise(lift_queries(keys, task.metric, task.centre))
    title = "neighbours of keys"
    hits, _ = top_keys(unit, task.lifted, k + 1, task.device, task.progress, title, task.executor)
    own = hits == rows[:, None]
    own[~own.any(axis=1), -1] = True  # an equal of the key's came in its place
    asked = np.repeat(np.arange(len(train.queries)), max(1, round(len(rows) / len(train.queries))))
    mixed = Split(
        np.concatenate([train.queries[asked], keys]),
        np.concatenate([train.unit[asked], unit]),
        np.concatenate([train.hits[asked, :k], hits[~own].reshape(-1, k)]),
    )
    return replace(task, train=mixed)
