"""Models for the serving benchmark, as values that can go to another process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from amips_plugins.collection import Id
from amips_plugins.export.clustering import native_cells, query_aware_cells
from amips_plugins.export.cost_curves import thresholds_for
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.efforts import InCells, effort_levels
from amips_plugins.export.keynet import train_keynet
from amips_plugins.export.recipes import PRESETS, Preset
from amips_plugins.export.routers import train_router
from amips_plugins.export.spilling import spilled
from amips_plugins.export.to_onnx import to_onnx
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.hooks import RewriteHook, RouteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Routing", "train_rewriting", "train_routing"]


@dataclass(frozen=True)
class Routing:
    """A trained router and its cells.

    Attributes
    ----------
    model
        The router's ONNX file.
    calibration
        Its thresholds. What counts as guaranteed is the mean recall on the calibration queries,
        without a margin: every other method is tuned to just reach the target there, too.
    layout
        Identifies the cells.
    sizes
        ``(n_cells,)`` keys in each cell.
    assignment
        ``(n,)`` the cell of each key, or ``(n, width)`` where keys have several.
    """

    model: bytes
    calibration: Calibration
    layout: str
    sizes: IntArray
    assignment: IntArray

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.sizes)

    def assign(self, ids: Sequence[Id], vectors: FloatArray) -> IntArray:  # noqa: ARG002
        """Give keys, whose ids are rows, their cells (``adapters.layouts.AssignCells``)."""
        return self.assignment[np.asarray(ids, dtype=np.int64)]

    def hook(self) -> RouteHook:
        """Load the model."""
        shares = np.append(self.sizes / self.sizes.sum(), 0.0).astype(np.float32)
        return RouteHook(OnnxModel(self.model), self.calibration, self.layout, 0.95, shares)


def train_routing(
    task: TrainingTask,
    n_cells: int,
    epochs: int | None,
    index: InCells | None = None,
    *,
    graphs: bool = False,
    spill: float = 0.0,
) -> Routing:
    """Cut query-aware cells and train a linear router over them, as ``amips train`` does.

    Parameters
    ----------
    task
        What to train on; its calibration split is only measured on.
    n_cells
        Number of cells.
    epochs
        Passes over the training queries; None for the recipe's own.
    index
        What cells will hold, whose misses are then counted; None for a scan of them.
    graphs
        Whether every cell costs the same, as a graph does, or as much as it holds.
    spill
        Further cells of keys, as a share of the keys.
    """
    train = task.train
    cells, assignment = query_aware_cells(
        task.keys, task.metric, n_cells, task.seed, train.queries, train.hits
    )
    cells, assignment = spilled(task, cells, assignment, spill)
    recipe = _recipe("linear", epochs)
    candidate = train_router("linear", recipe, task, cells, assignment, graphs=graphs)
    assert candidate.priority is not None
    validated = candidate.priority(task.validate)
    thresholds = thresholds_for(validated, assignment[task.validate.hits[:, : task.k]])
    efforts, lists = None, None
    if index is None:
        measured = candidate.measure(task.calibrate)
    else:
        levels = effort_levels(candidate, task, candidate.priority, thresholds, index)
        measured = levels.measure(task.calibrate, task)
        thresholds, efforts, lists = levels.thresholds, levels.efforts, levels.lists
    recall: FloatArray = np.array(
        [measured.mean_recall(k) for k in range(1, task.k + 1)], dtype=np.float32
    )
    scanned = measured.scanned.mean(axis=0)
    calibration = Calibration(thresholds, recall, recall, scanned, 0.0, efforts, lists)
    model = to_onnx(candidate.net, task.keys.shape[1], task.metric, candidate.order)
    layout = cells.layout() if index is None else f"{cells.layout()[:9]}{index.replace('_', '')}"
    return Routing(model, calibration, layout, cells.sizes, assignment)


def train_rewriting(task: TrainingTask, n_cells: int, epochs: int | None) -> bytes:
    """Train a KeyNet, which looks at cells of about this number, and return its ONNX file."""
    cells, assignment = native_cells(task.keys, task.metric, n_cells, task.seed + 1)
    candidates = RewriteHook.candidates(task.k)
    recipe = _recipe("keynet", epochs)
    trained = train_keynet(recipe, task, cells, assignment, candidates)
    return to_onnx(trained.net, task.keys.shape[1], task.metric)


def _recipe(kind: str, epochs: int | None) -> Preset:
    preset = PRESETS["default"][kind]
    if epochs is None:
        return preset
    return replace(preset, schedule=replace(preset.schedule, epochs=epochs))
