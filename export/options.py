"""What can be asked of a training."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["TrainOptions"]


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
    preset
        The recipe, see ``presets.PRESETS``.
    k, recall
        The target to be cheap at, and the default of the published router.
    seed
        Decides every random choice.
    epochs
        Passes over the training queries; None for the recipe's own.
    guesses
        Queries to make up where no log is given.
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
