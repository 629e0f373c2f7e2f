"""The pre-query hooks that come with the package, and how a bundle becomes one.

A KeyNet rewrites the query; a SupportNet and the linear router choose cells. All three are ONNX
models with one interface, so two classes serve them:

=============  ==========================  ===============================================
class          inputs                      outputs
=============  ==========================  ===============================================
RewriteHook    queries (n, dim)            rewritten (n, dim)
RouteHook      queries (n, dim)            priority (n, n_cells)
=============  ==========================  ===============================================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from amips_plugins.errors import InvalidInput
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.models.tuned import TunedHook
from amips_plugins.plan import EXACT, NATIVE, PreQueryHook, QueryPlan, Target
from amips_plugins.vectors import FloatArray, IntArray, all_finite

__all__ = ["ModelFault", "NativeHook", "RewriteHook", "RouteHook", "is_quick"]

_QUICK = 1 << 26  # multiplications: some ten milliseconds on one core
_AIMS = 256  # targets that a hook remembers


class ModelFault(RuntimeError):
    """A model gave something that cannot be a plan, such as NaN."""


class NativeHook:
    """Leaves every search as it is: the baseline to compare with."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:  # noqa: ARG002
        """Return the empty plan."""
        return NATIVE


@dataclass(frozen=True)
class RewriteHook:
    """A KeyNet: ask for the key that its model predicts, score with the query itself."""

    model: OnnxModel

    @staticmethod
    def candidates(k: int) -> int:
        """Return how many keys a rewritten query fetches to find the best k of the original."""
        # On npm2pypi 30 candidates lose 17 % of the ten best keys, 100 lose 5 %, 200 lose 2.5 %.
        return max(20 * k, 100)

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        """Rewrite the queries."""
        if target.recall is not None or target.n_probes is not None:
            raise InvalidInput(
                "A KeyNet rewrites the query and leaves the probes to the database's index; set "
                "them in params, for example params={'nprobe': 16}."
            )
        (rewritten,) = self.model.run(["rewritten"], {"queries": queries})
        if not all_finite(rewritten):
            raise ModelFault("The KeyNet's output is not finite.")
        return QueryPlan(rewritten=rewritten, rescore=self.candidates(target.k))


@dataclass(frozen=True)
class RouteHook:
    """A SupportNet or linear router: search only the cells that look best.

    Attributes
    ----------
    model
        Maps queries to the ``priority`` of every cell.
    calibration
        Says which priorities a recall target takes.
    layout
        Identifies the cells.
    default_recall
        The target when the caller names none.
    shares
        ``(n_cells + 1,)`` share of the keys in every cell, and 0 at the end, where the -1 of
        unused places points.
    always
        Share of the keys that every search looks at, whatever is chosen.
    """

    model: OnnxModel
    calibration: Calibration
    layout: str
    default_recall: float
    shares: FloatArray
    always: float = 0.0

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        """Choose the cells.

        A target that only all keys are sure to reach takes an exact search; one without a promise
        is native, as are ``n_probes`` of every cell.
        """
        threshold, reason, effort = self._aim(target)
        n_probes = target.n_probes
        if reason is not None:
            return QueryPlan(reason=reason)
        if threshold == -np.inf:
            return NATIVE if target.widen == np.inf else EXACT
        if n_probes is not None and n_probes >= len(self.shares) - 1:
            return NATIVE
        if len(queries) == 1:
            priority = self.model.run_row("priority", queries)
        else:
            (priority,) = self.model.run(["priority"], {"queries": queries})
        # Not by their sum: finite numbers can overflow it, and numpy would warn.
        if not all_finite(priority):
            raise ModelFault("The router's priorities are not finite.")
        if n_probes is None:
            cells = cells_above(priority, threshold)
        else:
            cells = best_cells(priority, n_probes)
        shares: FloatArray = np.add.reduce(self.shares.take(cells), axis=1)
        if self.always:
            shares += np.float32(self.always)
        effort, probes = (effort, None) if self.calibration.lists is None else (None, effort)
        efforts: IntArray | None = None
        far = self.calibration.far(threshold) if n_probes is None else None
        if far is not None and effort is not None:
            own = np.take_along_axis(priority, np.maximum(cells, 0), axis=1)
            near = (own >= far[0]) | (own >= priority.max(axis=1, keepdims=True))
            efforts = np.where(near, effort, far[1])
        return QueryPlan(
            cells=cells,
            layout=self.layout,
            shares=shares,
            effort=effort,
            efforts=efforts,
            probes=probes,
            recall=None if n_probes is not None else target.recall or self.default_recall,
        )

    def unpromised(self, target: Target) -> str | None:
        """Say why a target is not what the calibration promises, or None."""
        return self._aim(target)[1]

    @cached_property
    def _aims(self) -> dict[tuple[float | None, ...], tuple[float, str | None, int | None]]:
        """What the targets come to that were asked for before: a service has a few."""
        return {}

    def _aim(self, target: Target) -> tuple[float, str | None, int | None]:
        """Return what a cell has to reach, why nothing is promised, how far graphs are followed."""
        asked = target.k, target.recall, target.n_probes, target.widen
        found = self._aims.get(asked)
        if found is None:
            threshold, reason = self._threshold(target)
            least = threshold if target.n_probes is None else -np.inf
            found = threshold, reason, self.calibration.effort(least)
            if len(self._aims) >= _AIMS:
                self._aims.clear()
            self._aims[asked] = found
        return found

    def _threshold(self, target: Target) -> tuple[float, str | None]:
        """Return what a cell has to reach, or why there is nothing that it could be."""
        if target.n_probes is not None:
            if target.n_probes < 1:
                raise InvalidInput(f"n_probes={target.n_probes} searches nothing; pass 1 or more.")
            return 0.0, None
        recall = self.default_recall if target.recall is None else target.recall
        reason = self.calibration.unpromised(target.k, recall)
        if reason is not None:
            return -np.inf, reason
        threshold = self.calibration.threshold(target.k, recall)
        return self.calibration.widen(threshold, target.widen), None


def cells_above(priority: FloatArray, threshold: float) -> IntArray:
    """Choose every query's cells above a threshold, and its best always; ascending, -1 fills up."""
    count, width = priority.shape
    chosen = priority >= threshold
    if count == 1:
        # Where anything reaches the threshold, the best cell does.
        one: IntArray = chosen[0].nonzero()[0]
        return (one if len(one) else priority.argmax(axis=1))[None, :]
    bounds = np.arange(0, priority.size + 1, width)
    found = np.flatnonzero(chosen)  # ten times as fast as nonzero in two dimensions
    starts = found.searchsorted(bounds)
    counts = starts[1:] - starts[:-1]
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        chosen[empty, priority[empty].argmax(axis=1)] = True
        found = np.flatnonzero(chosen)
        counts[empty] = 1
    cells = np.full((count, counts.max()), -1, dtype=np.int64)
    cells[np.arange(cells.shape[1]) < counts[:, None]] = found % width
    return cells


def best_cells(priority: FloatArray, n_probes: int) -> IntArray:
    """Choose every query's cells of the highest priority; of equal ones the first."""
    count, width = priority.shape
    if count > 1:  # a batch is sorted whole at sixteen times the cost
        last = np.partition(priority, width - n_probes, axis=1)[:, width - n_probes, None]
        found = np.flatnonzero(priority >= last)
        if len(found) == count * n_probes:  # else there are equals at the end, to choose among
            cells = (found % width).reshape(count, n_probes)
            order = np.argsort(-priority.ravel()[found].reshape(cells.shape), axis=1, kind="stable")
            return np.take_along_axis(cells, order, axis=1)
    return np.argsort(-priority, axis=1, kind="stable")[:, :n_probes]


def is_quick(hook: PreQueryHook, n_queries: int) -> bool:
    """Tell whether a plan is sure to take no longer than a caller can wait for.

    A bundle's own model does work that is known beforehand; what a user's hook does nobody knows.
    """
    if isinstance(hook, (RouteHook, RewriteHook)):
        return hook.model.multiplications * n_queries <= _QUICK
    return isinstance(hook, (NativeHook, TunedHook))
