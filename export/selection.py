"""Choice by cost: which candidate is published, and whether it pays."""

from __future__ import annotations

from amips_plugins.bundle.manifest import CandidateCost
from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cost_curves import TARGETS
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.recipes import TrainOptions

__all__ = ["recommend", "select_model"]


def select_model(
    candidates: list[Candidate], task: TrainingTask, options: TrainOptions
) -> Candidate:
    """Return the candidate asked for; the cheapest learned one where that is left open."""
    wanted = [
        candidate
        for candidate in candidates
        if candidate.kind == options.model
        or (options.model == "auto" and candidate.kind != "native")
    ]
    return min(wanted, key=lambda c: c.measure(task.validate).cost(options.k, options.recall))


def recommend(
    candidates: list[Candidate], task: TrainingTask, measured: list[CandidateCost]
) -> tuple[str, str]:
    """Name the cheapest candidate at the target, and say why.

    The validation split chooses; the test split has to confirm that a learned winner beats the
    native baseline, else the answer is ``native``.
    """
    costs = {c.kind: c.measure(task.validate).cost(task.k, task.recall) for c in candidates}
    best = min(costs, key=lambda kind: costs[kind])
    at = {
        f.candidate: f
        for f in measured
        if f.k == task.k and abs(f.recall - _reported(task.recall)) < 1e-9
    }
    target = f"recall@{task.k} {_reported(task.recall):.2f}"
    native, winner = at["native"].total, at[best].total
    if best != "native" and winner is not None and (native is None or winner < native):
        shown = "cannot reach it" if native is None else f"takes {native:.1%}"
        return best, (
            f"On held-out queries {best} reaches {target} at {winner:.1%} of the cost of a full "
            f"scan, its own cost included; native search with as many cells {shown}."
        )
    shown = "no learned router reaches it" if native is None else f"takes {native:.1%}"
    return "native", (
        f"Use the native search: at {target} it {shown}, and no learned candidate is cheaper on "
        f"held-out queries."
    )


def _reported(recall: float) -> float:
    """Return the nearest recall that figures are reported at."""
    return min(TARGETS, key=lambda target: abs(target - recall))
