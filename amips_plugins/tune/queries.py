"""The queries that calibrate, those that choose, and those that are only reported on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from amips_plugins.errors import InvalidInput
from amips_plugins.export.queries import guess_queries
from amips_plugins.vectors import FloatArray

__all__ = ["FEWEST", "QueryParts", "split"]

FEWEST = 40
"""Distinct queries below which nothing is measured."""

_MOST = {"calibrate": 1_000, "compare": 400, "report": 300}
_SHARES = (0.5, 0.75)
_GUESSED = 1_500


@dataclass(frozen=True)
class QueryParts:
    """Distinct queries, ``(n, dim)`` each; no two parts share one."""

    calibrate: FloatArray
    compare: FloatArray
    report: FloatArray
    source: Literal["log", "guess"]

    def at_most(self, count: int) -> QueryParts:
        """Return the same with fewer of those that calibrate, and half as many that compare."""
        return replace(self, calibrate=self.calibrate[:count], compare=self.compare[: count // 2])


def split(queries: FloatArray | None, keys: FloatArray, seed: int = 0) -> QueryParts:
    """Split queries by chance; without any, keys with noise take their place.

    Raises ``InvalidInput`` for fewer than ``FEWEST``.
    """
    source: Literal["log", "guess"] = "guess" if queries is None else "log"
    if queries is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it speaks of training
            queries = guess_queries(keys, _GUESSED, seed, centre=keys.mean(axis=0))
    distinct = np.unique(queries + np.float32(0.0), axis=0)
    if len(distinct) < FEWEST:
        raise InvalidInput(
            f"{len(distinct)} distinct queries are too few to measure anything; pass at least "
            f"{FEWEST}, better some hundreds."
        )
    mixed = distinct[np.random.default_rng(seed).permutation(len(distinct))]
    first, second = (int(share * len(mixed)) for share in _SHARES)
    parts = zip(_MOST, (mixed[:first], mixed[first:second], mixed[second:]), strict=True)
    chosen = {name: np.ascontiguousarray(part[: _MOST[name]]) for name, part in parts}
    return QueryParts(**chosen, source=source)
