"""Whether live queries still look like those that the router was trained for.

Two samples of what the model makes of queries are compared, output by output, with the two-sample
Kolmogorov-Smirnov test and a Bonferroni correction over the outputs: the black-box shift detection
("BBSDs") that Rabanser, Guennemann and Lipton (2019, arXiv 1810.11953, section 3) found best of
what they compared. Drift says that queries have changed, not that they find less: recall says that.

A bundle carries its own sample: what its model says of queries that no training has seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amips_plugins.bundle.reference import Reference
from amips_plugins.models.hooks import RewriteHook, RouteHook
from amips_plugins.plan import PreQueryHook
from amips_plugins.vectors import FloatArray

__all__ = ["ALPHA", "WINDOW", "Drift", "compare", "ks_p_value", "outputs_of"]

ALPHA = 1e-3
"""Probability that a window of queries like the reference's counts as drift."""

WINDOW = 500
"""Live queries that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Drift:
    """One window of ``n`` live queries against the reference.

    ``p_value`` is the probability of outputs at least as different were both samples from one
    distribution, corrected for the number of outputs.
    """

    p_value: float
    n: int

    @property
    def found(self) -> bool:
        """Whether the queries count as different."""
        return self.p_value < ALPHA


def compare(reference: Reference, outputs: FloatArray) -> Drift:
    """Test the outputs of live queries, ``(n_live, n_outputs)``, in any order."""
    live = np.sort(outputs, axis=0)
    pairs = zip(reference.outputs.T, live.T, strict=True)
    largest = max(_distance(ours, theirs) for ours, theirs in pairs)
    p_value = ks_p_value(largest, len(reference.outputs), len(live))
    return Drift(min(1.0, live.shape[1] * p_value), len(live))


def outputs_of(hook: PreQueryHook, queries: FloatArray) -> FloatArray | None:
    """Return what a bundle's model says of queries, ``(n, n_outputs)``; None for any other hook."""
    if isinstance(hook, RouteHook):
        name = "priority"
    elif isinstance(hook, RewriteHook):
        name = "rewritten"
    else:
        return None
    outputs: FloatArray = hook.model.run([name], {"queries": queries})[0]
    return outputs


def _distance(ours: FloatArray, theirs: FloatArray) -> float:
    """Return the largest distance of two sorted samples' distribution functions."""
    both = np.concatenate([ours, theirs])
    here = np.searchsorted(ours, both, side="right") / len(ours)
    there = np.searchsorted(theirs, both, side="right") / len(theirs)
    return float(np.abs(here - there).max())


def ks_p_value(distance: float, n: int, m: int) -> float:
    """Return the exact p-value of the two-sided two-sample Kolmogorov-Smirnov test.

    Draw the pooled sample one by one: every order is equally likely, so the number drawn from the
    first sample walks from (0, 0) to (n, m) at random. The p-value is the probability that the
    walk ever reaches the distance (Hodges 1958, The significance probability of the Smirnov
    two-sample test). With ties it errs towards 1.
    """
    reach = round(distance * n * m)  # the distance is a whole number of 1 / (n m)
    if reach <= 0:
        return 1.0
    ours = np.arange(n + 1)
    here: npt.NDArray[np.float64] = np.zeros(n + 1)  # walks that have not reached it, by ours
    here[0] = 1.0
    reached = 0.0
    for drawn in range(1, n + m + 1):
        left = n + m - drawn + 1
        theirs = drawn - ours
        after = here * np.maximum(m - (theirs - 1), 0) / left
        after[1:] += here[:-1] * (n - ours[:-1]) / left
        out = (np.abs(ours * m - theirs * n) >= reach) & (theirs >= 0) & (theirs <= m)
        reached += float(after[out].sum())
        after[out] = 0.0
        here = after
    return min(1.0, reached)
