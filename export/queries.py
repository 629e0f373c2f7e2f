"""Training queries: splitting before anything else, and augmenting only then."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from amips_plugins.errors import TrainingError
from amips_plugins.export.keys import Keys
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["QuerySplits", "augment", "guess_queries", "split_queries"]

_SHARES = (("train", 0.75), ("validate", 0.05), ("calibrate", 0.10), ("test", 0.10))
_FEWEST = 50


@dataclass(frozen=True)
class QuerySplits:
    """Distinct queries, no two splits share one.

    Attributes
    ----------
    train
        ``(n, dim)`` float32: what the models learn from.
    validate
        Stops the training and compares the candidates.
    calibrate
        Decides how many probes a recall target takes; untouched until then, which its guarantee
        needs.
    test
        Only ever reported on.
    source
        Whether they were logged or guessed from the keys.
    asked
        For each split ``(n,)``: how often each of its queries was there.
    """

    train: FloatArray
    validate: FloatArray
    calibrate: FloatArray
    test: FloatArray
    source: Literal["log", "guess"]
    asked: dict[str, IntArray] = field(default_factory=dict)


def guess_queries(
    keys: Keys,
    count: int,
    seed: int,
    spread: float = 0.5,
    centre: FloatArray | None = None,
) -> FloatArray:
    """Make up queries near the keys, for a collection that has no query log.

    A router trained on them is only as good as this guess; real queries usually lie elsewhere.
    """
    warnings.warn(
        "No query log was given: training on perturbed keys. Such a router is only as good as "
        "that guess; collect real queries and train again.",
        stacklevel=2,
    )
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.integers(len(keys), size=count))
    chosen = np.asarray(keys[rows], dtype=np.float32)
    step = rng.standard_normal(chosen.shape, dtype=np.float32)
    lengths = np.linalg.norm(chosen if centre is None else chosen - centre, axis=1, keepdims=True)
    step *= spread * lengths / np.sqrt(chosen.shape[1])
    return chosen + step


def split_queries(
    queries: FloatArray, seed: int, source: Literal["log", "guess"] = "log"
) -> QuerySplits:
    """Split by distinct query: a query's own bytes decide where it goes.

    Repeats of a query therefore share a split, and a query keeps its split when the log grows. Too
    few raise ``TrainingError``.
    """
    # Adding zero makes one number of the two zeros.
    distinct, counts = np.unique(queries + np.float32(0.0), axis=0, return_counts=True)
    places = np.empty(len(distinct))
    for row, query in enumerate(distinct):
        digest = hashlib.blake2b(query.tobytes(), digest_size=8, salt=seed.to_bytes(8, "little"))
        # 53 bits are exact: all 64 could round up to 1, which is in no split.
        places[row] = (int.from_bytes(digest.digest(), "little") >> 11) / 2**53
    order = np.argsort(places)
    distinct, places, counts = distinct[order], places[order], counts[order]
    parts: dict[str, FloatArray] = {}
    asked: dict[str, IntArray] = {}
    low = 0.0
    for name, share in _SHARES:
        chosen = (places >= low) & (places < low + share)
        parts[name], asked[name] = distinct[chosen], counts[chosen]
        low += share
    if len(distinct) < _FEWEST or min(len(part) for part in parts.values()) == 0:
        raise TrainingError(
            f"{len(distinct)} distinct queries are too few to train and to test on; collect at "
            f"least {_FEWEST}, better some thousands."
        )
    return QuerySplits(**parts, source=source, asked=asked)


def augment(queries: FloatArray, copies: int, std: float, seed: int) -> FloatArray:
    """Append noisy copies, rescaled to the length of their original (paper, section 4).

    Only ever used on the training split, after the split.
    """
    if copies == 0:
        return queries
    rng = np.random.default_rng(seed)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    parts = [queries]
    for _ in range(copies):
        noise = rng.standard_normal(queries.shape, dtype=np.float32) * np.float32(std)
        noisy = queries + noise * lengths
        noisy *= lengths / np.maximum(np.linalg.norm(noisy, axis=1, keepdims=True), 1e-12)
        parts.append(noisy.astype(np.float32))
    return np.concatenate(parts)
