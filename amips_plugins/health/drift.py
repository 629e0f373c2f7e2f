"""Whether live queries still look like those that the router was trained for.

Two samples of what the model makes of queries are compared, output by output, with the two-sample
Kolmogorov-Smirnov test and a Bonferroni correction over the outputs: the black-box shift detection
("BBSDs") that Rabanser, Guennemann and Lipton (2019, arXiv 1810.11953, section 3) found best of
what they compared. Drift says that queries have changed, not that they find less: recall says that.

A bundle carries its own sample, ``reference.npz``: what its model says of up to 512 queries that
no training has seen. Each output is sorted by itself. The test needs no more than that, and so no
query can be worked out from the file: a row of a linear router's outputs, W x + b, would give x
away, and a row of a KeyNet's nearly so.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amips_plugins.arrays import read_npz
from amips_plugins.bundle.manifest import REFERENCE, REFERENCE_LIMIT, Bundle
from amips_plugins.errors import BundleCorrupt
from amips_plugins.models.hooks import RewriteHook, RouteHook
from amips_plugins.plan import PreQueryHook
from amips_plugins.vectors import FloatArray

__all__ = ["ALPHA", "WINDOW", "Drift", "Reference", "ks_p_value", "load_reference", "outputs_of"]

ALPHA = 1e-3
"""Probability that a window of queries like the reference's counts as drift."""

WINDOW = 500
"""Live queries that are compared at a time."""

_ROWS = 512
_HEADERS = 4096  # bytes of the archive that are no numbers


@dataclass(frozen=True, slots=True)
class Drift:
    """One window of live queries against the reference.

    Attributes
    ----------
    p_value
        Probability of outputs at least as different were both samples from one distribution,
        corrected for the number of outputs.
    n
        Live queries in the window.
    """

    p_value: float
    n: int

    @property
    def found(self) -> bool:
        """Whether the queries count as different."""
        return self.p_value < ALPHA


@dataclass(frozen=True)
class Reference:
    """What a model says of held-out queries.

    Attributes
    ----------
    outputs
        ``(n_queries, n_outputs)`` float32, every column sorted by itself.
    """

    outputs: FloatArray

    @classmethod
    def of(cls, outputs: FloatArray) -> Reference:
        """Keep no more of the outputs, ``(n_queries, n_outputs)``, than a test needs."""
        most = (REFERENCE_LIMIT - _HEADERS) // (4 * outputs.shape[1])
        return cls(np.sort(outputs[: min(_ROWS, most)], axis=0))

    def compare(self, outputs: FloatArray) -> Drift:
        """Test the outputs of live queries, ``(n_live, n_outputs)``, in any order."""
        live = np.sort(outputs, axis=0)
        pairs = zip(self.outputs.T, live.T, strict=True)
        largest = max(_distance(ours, theirs) for ours, theirs in pairs)
        p_value = ks_p_value(largest, len(self.outputs), len(live))
        return Drift(min(1.0, live.shape[1] * p_value), len(live))

    def to_bytes(self) -> bytes:
        """Serialise as an npz archive (plain arrays, no pickle)."""
        buffer = io.BytesIO()
        np.savez(buffer, outputs=self.outputs)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        """Read what ``to_bytes`` wrote.

        Raises
        ------
        BundleCorrupt
            Not such an archive, or not sorted finite columns.
        """
        try:
            outputs = np.asarray(read_npz(data, ("outputs",))["outputs"], dtype=np.float32)
        except Exception as exc:  # a damaged archive raises whatever zipfile and numpy raise
            raise BundleCorrupt(
                f"The bundle's reference cannot be read ({exc}); publish it again."
            ) from exc
        sound = outputs.ndim == 2 and outputs.size > 0 and bool(np.isfinite(outputs).all())
        if not sound or not bool((outputs[1:] >= outputs[:-1]).all()):
            raise BundleCorrupt("The bundle's reference has impossible values; publish it again.")
        return cls(outputs)


def load_reference(bundle: Bundle) -> Reference | None:
    """Read the reference of a bundle; None for one from before there were any.

    Raises
    ------
    BundleCorrupt
        It is not what the manifest says, or does not fit the model.
    """
    manifest = bundle.manifest
    if REFERENCE not in manifest.files:
        return None
    reference = Reference.from_bytes(bundle.read(REFERENCE))
    width = manifest.dim if manifest.model == "keynet" else manifest.n_cells
    if reference.outputs.shape[1] != width:
        raise BundleCorrupt(f"The reference of {bundle.location} does not fit its model.")
    return reference


def outputs_of(hook: PreQueryHook, queries: FloatArray) -> FloatArray | None:
    """Return what a bundle's model says of queries; None for a hook of the user's own.

    Parameters
    ----------
    hook
        What plans.
    queries
        ``(n_queries, dim)`` float32.

    Returns
    -------
    numpy.ndarray or None
        ``(n_queries, n_outputs)`` float32: the priority of every cell, or the rewritten query.
    """
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

    Parameters
    ----------
    distance
        Largest distance of the two empirical distribution functions.
    n, m
        Sizes of the samples.
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
