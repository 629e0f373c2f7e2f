"""What is told of a search: how each of its queries was answered."""

from __future__ import annotations

from dataclasses import replace

from amips_plugins.collection import Collection, Incomplete
from amips_plugins.plan import QueryPlan, searches_everything
from amips_plugins.routing.execution import TOO_FEW, Outcome
from amips_plugins.routing.hits import Trace
from amips_plugins.routing.serving import Serving

__all__ = ["traces"]


def traces(
    answered: Outcome,
    serving: Serving,
    fallback: str | None,
    times: tuple[float, float],
    *,
    explain: bool,
) -> list[Trace]:
    """Say of every row how it was answered; with ``explain``, by which cells and at what cost.

    ``times`` are the seconds of the plan and of all searches.
    """
    plan, count = answered.plan, len(answered.found)
    version = None if serving.manifest is None else serving.manifest.version
    base = Trace(plan.mode, None, version, fallback or answered.fallback)
    if explain:
        base = replace(base, plan_us=times[0] * 1e6, search_ms=times[1] * 1e3)
    rows = [base] * count
    if plan.cells is not None and explain:
        chosen = [tuple(c for c in cells if c >= 0) for cells in plan.cells.tolist()]
        scanned = _scanned(serving.collection, plan, serving.model_share)
        rows = [
            replace(base, n_probes=len(cells), cells=cells, scanned=share)
            for cells, share in zip(chosen, scanned, strict=True)
        ]
    elif plan.cells is not None:  # without ``replace``, which takes as long as all the rest
        rows = [
            Trace(base.mode, len(cells) - cells.count(-1), base.version, base.fallback)
            for cells in plan.cells.tolist()
        ]
    for row in answered.completed:
        routed = rows[row].scanned
        scanned_too = None if routed is None else routed + 1.0  # the cells, and then every key
        rows[row] = replace(rows[row], mode="native", fallback=TOO_FEW, scanned=scanned_too)
    for row, hits in enumerate(answered.found):
        if isinstance(hits, Incomplete):
            rows[row] = replace(rows[row], left_out=hits.left_out)
    return rows


def _scanned(collection: Collection, plan: QueryPlan, model_share: float) -> list[float | None]:
    if plan.shares is None:
        return [None] * (0 if plan.cells is None else len(plan.cells))
    whole = searches_everything(plan, collection.break_even).tolist()
    return [
        (1.0 if everything else share) + model_share
        for everything, share in zip(whole, plan.shares.tolist(), strict=True)
    ]
