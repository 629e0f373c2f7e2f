"""The query plan: what a pre-query hook decides before the database is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from amips_plugins.vectors import BoolArray, FloatArray, IntArray

__all__ = ["EXACT", "NATIVE", "PreQueryHook", "QueryPlan", "Target", "searches_everything"]


@dataclass(frozen=True, slots=True)
class Target:
    """What the caller wants from one search.

    Attributes
    ----------
    k
        Number of keys to return.
    recall
        Recall@k wanted, in (0, 1]; None leaves it to the hook's own default.
    n_probes
        Number of cells to search, which overrides ``recall``; None lets the hook choose.
    widen
        How many times the share of the keys that the target takes to search, up to all of them;
        1 as planned. It leaves ``n_probes`` alone.
    """

    k: int
    recall: float | None = None
    n_probes: int | None = None
    widen: float = 1.0


@dataclass(frozen=True, slots=True)
class QueryPlan:
    """What to ask the database, decided before it is asked. The empty plan is the native search.

    Attributes
    ----------
    rewritten
        ``(n_queries, dim)`` float32 to send in place of the queries; the hits are rescored with
        the original queries. None keeps the queries.
    rescore
        Number of candidates to fetch for every rewritten query before rescoring.
    cells
        ``(n_queries, n_probes)`` int64 cells to search, best first; -1 fills unused places.
        None searches the whole collection.
    layout
        Identifies the cells that ``cells`` counts; a collection laid out otherwise must refuse.
    shares
        ``(n_queries,)`` share of the keys in each query's cells. Above the collection's
        ``break_even`` a query is answered by a full, exact scan, or a search of the graph that is
        as thorough as ``recall`` takes, which is then the cheaper one.
    effort
        How far to search the graph inside a cell (HNSW's ef), where there is one; None leaves it to
        the database.
    efforts
        ``(n_queries, n_probes)`` int64 the same for every cell, where that is known; ``effort`` is
        the largest then, for databases that search all cells alike.
    probes
        How many lists of the IVF index inside a cell to search, where there is one; None for all.
    exact
        Whether every key is to be looked at (``Collection.exact``), in place of an index.
    params
        The database's own search parameters to set, such as ``{"hnsw_ef": 64}``, where nothing else
        is changed; None leaves them as they are.
    reason
        Of an empty plan: why the hook leaves the search to the database, in a few words that are
        counted and stand in the trace; None where that is what was asked for. Beside ``params``:
        why they are not known to do.
    recall
        The target that the cells were chosen for; None where there was none.
    """

    rewritten: FloatArray | None = None
    rescore: int = 0
    cells: IntArray | None = None
    layout: str | None = None
    shares: FloatArray | None = None
    effort: int | None = None
    efforts: IntArray | None = None
    probes: int | None = None
    exact: bool = False
    params: Mapping[str, Any] | None = None
    reason: str | None = None
    recall: float | None = None

    @property
    def mode(self) -> str:
        """``route``, ``rewrite``, ``exact``, ``tuned`` or ``native``: what it does to a search."""
        if self.cells is not None:
            return "route"
        if self.exact:
            return "exact"
        if self.rewritten is not None:
            return "rewrite"
        return "native" if self.params is None else "tuned"


NATIVE = QueryPlan()
"""The plan that leaves the search as it is."""

EXACT = QueryPlan(exact=True)
"""The plan to look at every key."""


@runtime_checkable
class PreQueryHook(Protocol):
    """Queries in, plan out: the one thing a model, or a user's own rule, has to provide.

    A hook is pure: it asks no database and keeps no state between calls.
    """

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        """Plan one batch.

        Parameters
        ----------
        queries
            ``(n_queries, dim)`` finite float32.
        target
            What the caller wants.
        """
        ...


def searches_everything(plan: QueryPlan, break_even: float) -> BoolArray:
    """Tell which queries, ``(n_queries,)``, are cheaper answered by a full, exact scan.

    All False where the plan does not say what its cells hold.
    """
    if plan.cells is None or plan.shares is None:
        return np.zeros(0 if plan.cells is None else len(plan.cells), dtype=np.bool_)
    return plan.shares > break_even
