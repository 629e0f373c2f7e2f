"""Choice by cost: which candidate is published, and whether it pays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cost_curves import Curve, resample_weights, resampled_costs
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.promises import Promise
from amips_plugins.export.recipes import TrainOptions

__all__ = ["recommend", "select_model"]

_SURE = 0.8  # share of resamples in which a dearer kind of net has to be the cheaper search
_WORTH = 0.98  # of the native cost: what is saved has to be worth a layout


def select_model(
    candidates: list[Candidate], task: TrainingTask, options: TrainOptions
) -> Candidate:
    """Return the candidate asked for; where that is left open, the cheapest learned one.

    A SupportNet has to be cheaper than the linear router beyond the chance of its queries.
    """
    if options.model != "auto":
        return next(c for c in candidates if c.kind == options.model)
    chosen, *others = (c for c in candidates if c.kind != "native")
    for other in others:
        mine, its = (_costs(c.measure(task.validate), task) for c in (chosen, other))
        if (its < mine).mean() > _SURE:
            chosen = other
    return chosen


def recommend(
    published: Candidate,
    native: Candidate,
    task: TrainingTask,
    promised: Promise | None,
    *,
    given: bool = False,
) -> tuple[str, str, float | None]:
    """Return what to use, why, and the cost of the published search at the default target.

    That cost is the one that will be served: with its guarantee, model and all. A learned search
    has to beat the native one beyond the chance of the queries, and a full scan. Over ``given``
    partitions the native candidate is what permuted labels would do.
    """
    k, recall = task.k, task.recall
    target = f"recall@{k} {recall:.2f}"
    if promised is None:  # a KeyNet leaves the probes to the index
        learned, without = published.measure(task.test), native.measure(task.test)
        cost, costs = learned.cost(k, recall), _costs(learned, task)
        reached = "On held-out queries"
        if not np.isfinite(cost):
            return "native", f"Use the native search: {published.kind} misses {target}.", None
    else:
        learned, without, calibration = promised.learned, promised.native, promised.calibration
        reached = f"With {calibration.confidence:.0%} confidence"
        threshold = calibration.default_threshold(k, recall)
        if threshold == -np.inf:
            best = np.floor(calibration.guaranteed[k - 1, :-1].max(initial=0.0) * 1000) / 1000
            return (
                "native",
                f"Use the native search: {target} cannot be promised with "
                f"{calibration.confidence:.0%} confidence from {len(learned.found)} queries, the "
                f"best that can is {best:.3f}; collect more queries, or train for less recall.",
                None,
            )
        scanned = learned.scanned[:, int((calibration.thresholds <= threshold).argmax())]
        cost = float(scanned.mean()) + learned.model
        costs = resample_weights(len(scanned), task.seed) @ scanned + learned.model
    native_cost = without.cost(k, recall)
    shown = f"takes {native_cost:.1%}" if np.isfinite(native_cost) else "cannot reach it"
    other = "to search the largest first" if given else "native search with as many cells"
    ratio = float(np.quantile(costs / _costs(without, task), 0.975))
    if published.kind != "native" and ratio < _WORTH and cost < 1.0:
        return (
            published.kind,
            f"{reached} {published.kind} reaches {target} at {cost:.1%} of the cost of a full "
            f"scan, its own cost included; {other} {shown}.",
            cost,
        )
    if given:
        return (
            "native",
            f"Search all of the partitions: at {target} the largest first {shown}, and "
            f"{published.kind}, which takes {cost:.1%}, is not sure to be cheaper. They say "
            f"nothing of the vectors.",
            cost,
        )
    why = "is dearer than a full scan" if cost >= 1.0 else "is not sure to be cheaper"
    return (
        "native",
        f"Use the native search: at {target} it {shown}, and {published.kind}, which takes "
        f"{cost:.1%}, {why}.",
        cost,
    )


def _costs(measured: Curve, task: TrainingTask) -> npt.NDArray[np.float64]:
    costs: npt.NDArray[np.float64] = resampled_costs(measured, task.k, (task.recall,), task.seed)[0]
    return costs
