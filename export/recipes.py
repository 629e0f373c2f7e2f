"""What can be asked of a training, and its recipes by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from amips_plugins.export.training_loop import Schedule

__all__ = ["PRESETS", "Preset", "TrainOptions"]


class TrainOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to train.

    Attributes
    ----------
    model
        The net to publish; ``auto`` takes the cheapest learned router, ``native`` publishes the
        centroids of plain k-means cells, the baseline.
    n_cells
        Number of cells; for a KeyNet the number of lists of the index it is measured on.
    layout
        How routers cut the keys: as queries see them, or plain k-means.
    partitions
        The field that says where keys belong, ``native`` for the database's own partitions: the
        router chooses among these, and no cells are cut. None takes the snapshot's, if it has some.
    count
        What a search of given partitions is to save: searches, or keys that they hold.
    preset
        The recipe, one of ``PRESETS``.
    k, recall
        The target to be cheap at, and the default of the published router.
    seed
        Decides every random choice.
    epochs
        Passes over the training queries; None for the recipe's own.
    guesses
        Queries to make up where no log is given.
    spill
        Copies of keys in further cells, as a share of the keys; ``auto`` makes none unless they
        pay, and never for Milvus, where a copy is a row.
    max_cell
        Largest cell, copies counted, as a multiple of the mean, for engines whose segments have a
        largest size; None for any.
    index
        What cells will hold: ``flat`` for a scan, ``hnsw`` for a graph, with which every cell costs
        about the same, or ``ivf_sq8`` for lists of codes; the promise then counts their misses.
    device
        ``cpu``, ``cuda``, or ``auto``.
    """

    model: Literal["auto", "linear", "supportnet", "keynet", "native"] = "auto"
    n_cells: int = 64
    layout: Literal["query-aware", "native"] = "query-aware"
    preset: str = "default"
    k: int = 10
    recall: float = 0.95
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**30)] = 0
    epochs: Annotated[int, msgspec.Meta(ge=1)] | None = None
    guesses: Annotated[int, msgspec.Meta(ge=0)] = 20_000
    spill: Annotated[float, msgspec.Meta(ge=0.0, le=3.0)] | Literal["auto"] = "auto"
    index: Literal["flat", "hnsw", "ivf_sq8"] = "flat"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    partitions: str | None = None
    count: Literal["searches", "keys"] = "searches"
    max_cell: Annotated[float, msgspec.Meta(ge=1.05)] | None = None


@dataclass(frozen=True)
class Preset:
    """How one kind of net is trained.

    Attributes
    ----------
    schedule
        How to optimise.
    routing
        Weight of the routing loss.
    scores
        Weight of the regression of support values (SupportNet) or of consistency (KeyNet).
    keys
        Weight of gradient matching (SupportNet) or of key regression (KeyNet).
    copies
        Noisy copies of every training query.
    noise
        Their standard deviation.
    width, depth
        Hidden layers of the nets; a KeyNet of width 0 is linear.
    dropout
        Share of a KeyNet's hidden units left out while training.
    heads
        Linear scores per given partition.
    """

    schedule: Schedule
    routing: float = 0.0
    scores: float = 0.0
    keys: float = 0.0
    copies: int = 0
    noise: float = 0.02
    width: int = 0
    depth: int = 1
    dropout: float = 0.0
    heads: int = 1


_LINEAR = Preset(Schedule(epochs=8, learning_rate=2e-2), routing=1.0)
_HEADS = Preset(Schedule(epochs=10, learning_rate=1e-2), routing=1.0)

PRESETS: dict[str, dict[str, Preset]] = {
    # Chosen on validation queries of npm2pypi; docs/method.md has the evidence.
    "default": {
        "linear": _LINEAR,
        "heads": _HEADS,
        "supportnet": Preset(
            Schedule(epochs=12, learning_rate=2e-3), routing=1.0, scores=1.0, width=64
        ),
        "keynet": Preset(Schedule(learning_rate=5e-3), routing=1.0, width=256, dropout=0.2),
    },
    # The paper's objectives, noise and optimiser; it has no linear router.
    "paper": {
        "linear": _LINEAR,
        "heads": _HEADS,
        "supportnet": Preset(Schedule(), scores=0.01, keys=1.0, copies=1, width=128, depth=2),
        "keynet": Preset(Schedule(), scores=0.01, keys=1.0, copies=1, width=512, depth=2),
    },
}
"""Recipes by name, and in each by kind of net."""
