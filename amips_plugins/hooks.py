"""The pre-query hooks that come with the package, and how a bundle becomes one.

A KeyNet rewrites the query; a SupportNet and the linear router choose cells. All three are ONNX
models with one interface, so two classes serve them:

=============  ==========================  ===============================================
class          inputs                      outputs
=============  ==========================  ===============================================
RewriteHook    queries (n, dim)            rewritten (n, dim)
RouteHook      queries (n, dim),           cells (n, n_probes) best first,
               n_probes (1,) int64         priority (n, n_probes)
=============  ==========================  ===============================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from amips_plugins.bundle import CALIBRATION, MODEL, Bundle
from amips_plugins.calibration import Calibration
from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.model import OnnxModel
from amips_plugins.plan import NATIVE, PreQueryHook, QueryPlan, Target
from amips_plugins.vectors import FloatArray

__all__ = ["ModelFault", "NativeHook", "RewriteHook", "RouteHook", "load_hook"]


class ModelFault(RuntimeError):
    """A model gave something that cannot be a plan, such as NaN."""


class NativeHook:
    """Leaves every search as it is: the baseline to compare with."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:  # noqa: ARG002
        """Return the empty plan."""
        return NATIVE


@dataclass(frozen=True)
class RewriteHook:
    """A KeyNet: ask for the key it predicts, score with the query itself.

    Attributes
    ----------
    model
        Maps queries to ``rewritten``.
    """

    model: OnnxModel

    @staticmethod
    def candidates(k: int) -> int:
        """Return how many keys a rewritten query fetches to find the best k of the original."""
        return max(3 * k, 30)

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        """Rewrite the queries.

        Raises
        ------
        InvalidInput
            A recall target or probes are asked for: the index decides those in this mode.
        ModelFault
            The model's output is not finite.
        """
        if target.recall is not None or target.n_probes is not None:
            raise InvalidInput(
                "A KeyNet rewrites the query and leaves the probes to the database's index; set "
                "them in params, for example params={'nprobe': 16}."
            )
        (rewritten,) = self.model.run(["rewritten"], {"queries": queries})
        if not np.isfinite(rewritten).all():
            raise ModelFault("The KeyNet's output is not finite.")
        return QueryPlan(rewritten=rewritten, rescore=self.candidates(target.k))


@dataclass(frozen=True)
class RouteHook:
    """A SupportNet or linear router: search only the cells that look best.

    Attributes
    ----------
    model
        Maps queries to their ``n_probes`` best cells.
    calibration
        Says how many probes a recall target takes.
    layout
        Identifies the cells.
    default_recall
        The target when the caller names none.
    """

    model: OnnxModel
    calibration: Calibration
    layout: str
    default_recall: float

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        """Choose the cells; every cell is the native search.

        Raises
        ------
        InvalidInput
            The recall target cannot be promised, or the probes make no sense.
        ModelFault
            The model's output is not finite.
        """
        n_probes = self.n_probes(target)
        if n_probes >= self.calibration.n_cells:
            return NATIVE
        cells, priority = self.model.run(
            ["cells", "priority"],
            {"queries": queries, "n_probes": np.array([n_probes], dtype=np.int64)},
        )
        if not np.isfinite(priority.sum()):
            raise ModelFault("The router's scores are not finite.")
        return QueryPlan(cells=cells, layout=self.layout)

    def n_probes(self, target: Target) -> int:
        """Return how many cells the target takes."""
        if target.n_probes is not None:
            if target.n_probes < 1:
                raise InvalidInput(f"n_probes={target.n_probes} searches nothing; pass 1 or more.")
            return target.n_probes
        if target.recall is not None:
            return self.calibration.probes(target.k, target.recall)
        return self.calibration.default_probes(target.k, self.default_recall)


def load_hook(bundle: Bundle, threads: int = 1) -> PreQueryHook:
    """Load and check the hook of a bundle.

    Raises
    ------
    BundleCorrupt
        A file is not what the manifest says, or the model's inputs and outputs do not fit it.
    """
    manifest = bundle.manifest
    model = OnnxModel(bundle.read(MODEL), threads)
    if manifest.model == "keynet":
        _check(model, bundle, {"queries": manifest.dim}, {"rewritten": manifest.dim})
        return RewriteHook(model)
    _check(
        model, bundle, {"queries": manifest.dim, "n_probes": 1}, {"cells": None, "priority": None}
    )
    calibration = Calibration.from_bytes(bundle.read(CALIBRATION))
    if calibration.n_cells != manifest.n_cells:
        raise BundleCorrupt(f"The calibration of {bundle.location} is for other cells.")
    return RouteHook(model, calibration, manifest.layout, manifest.default_recall)


def _check(
    model: OnnxModel, bundle: Bundle, inputs: dict[str, int], outputs: dict[str, int | None]
) -> None:
    """Compare names and last axes with what the hook needs."""
    last_axes = {name: _last(shape) for name, shape in model.inputs.items()}
    given = {name: _last(shape) for name, shape in model.outputs.items()}
    fits = last_axes == inputs and all(
        name in given and axis in (None, given[name]) for name, axis in outputs.items()
    )
    if not fits:
        raise BundleCorrupt(
            f"The model of {bundle.location} takes {last_axes} and gives {given}, which is not "
            f"what a {bundle.manifest.model} must; publish it again."
        )


def _last(shape: list[Any]) -> Any:
    return shape[-1] if shape else None
