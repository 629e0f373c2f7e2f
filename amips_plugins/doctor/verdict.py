"""From what was found to what to do: rules without any measuring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amips_plugins.doctor.findings import Verdict
from amips_plugins.export.trial_result import Trial

if TYPE_CHECKING:
    from amips_plugins.collection.construction import Construction

__all__ = ["RECALLS", "judge", "judge_unseen"]

RECALLS = (0.90, 0.95)
_TARGET = RECALLS[-1]
_WORTH = 0.75  # of the native cost: a smaller gain drowns in the noise (docs/performance.md)
_FEW = 200  # test queries: below, more of them may change the verdict
_HOW = "amips snapshot, train, publish, layout, then amips evaluate with fresh queries"


def judge_unseen(
    construction: Construction, keys: int, layout: str | None, overflow: float
) -> Verdict | None:
    """Judge what needs no trial; None where only a trial can tell."""
    if layout is not None:
        more = (
            " First give the keys without a cell theirs: amips backfill." if overflow > 0.05 else ""
        )
        return Verdict(
            answer="leave",
            text=f"Leave it as it is: it is laid out in cells already ({layout}); amips status "
            f"says how its router does.{more}",
        )
    if construction.first:
        return Verdict(answer="unclear", text=construction.first)
    if construction.obstacle:
        return Verdict(answer="leave", text=f"Leave it as it is: {construction.obstacle}.")
    if keys < construction.worth_from:
        return Verdict(
            answer="leave",
            text=f"Leave it as it is: with {keys:,} keys a full scan costs no more than the call "
            f"itself; cells were never seen to pay below some {construction.worth_from:,} keys.",
        )
    return None


def judge(construction: Construction, break_even: float, trial: Trial) -> Verdict:
    """Judge a trial; above ``break_even`` of the keys a full scan is cheaper than cells."""
    after = trial.cost("linear", _TARGET)
    if after is None:
        return _unclear("the trial's router does not reach the recall; collect more queries")
    saves = (
        f"at recall@{trial.k} {_TARGET:.2f} a router costs {after:.1%} of a full scan, its model "
        f"included"
    )
    before, what = _before(construction, trial)
    if construction.native == "graph":
        return _unclear(
            f"{saves}, but cells were never compared with a graph on disk, or in Milvus Lite; lay "
            f"out a copy and compare both with amips evaluate"
        )
    compared = f"{saves}, and {what} {before:.1%}"
    if trial.guessed:
        return _unclear(
            f"{compared}, of queries that were guessed from the keys; log real ones (QueryLog) and "
            f"ask again with --queries-log"
        )
    if trial.ratio_high > _WORTH > trial.ratio_low and trial.test_queries < _FEW:
        return _unclear(
            f"{compared}, but {trial.test_queries} test queries leave the gain anywhere from "
            f"{1 - trial.ratio_high:.0%} to {1 - trial.ratio_low:.0%}; collect some thousands"
        )
    if after > break_even:
        return _leave(f"{compared}; above {break_even:.0%} a full scan is cheaper than cells")
    if trial.ratio_high > _WORTH:
        return _leave(f"{compared}; {_too_little(trial)}")
    text = f"Worth it: {compared}. Go on with {_HOW}."
    if trial.learned_high >= 1.0:
        text += " Plain k-means cells (amips train --model native) may do as well here."
    if construction.native == "scan":
        text += " The search now is exact; a router finds the share that it is asked for."
    if construction.native == "lists":
        text += " Where you search in batches, leave it: an index takes many queries in one call."
    return Verdict(answer="route", text=text)


def _before(construction: Construction, trial: Trial) -> tuple[float, str]:
    """Return what the native search costs at the target, and how to say so."""
    index = trial.cost("index", _TARGET)
    if construction.native == "lists" and index is not None:
        return index, "its own index"
    return 1.0, "the native search"


def _too_little(trial: Trial) -> str:
    if trial.query_nearness >= trial.key_nearness:
        return "queries look like the keys, and centroids know where those are"
    if trial.ratio_high >= 1.0:
        return "the difference is within the noise"
    return "a gain below a quarter is not worth a second layout"


def _leave(why: str) -> Verdict:
    return Verdict(answer="leave", text=f"Leave it as it is: {why}.")


def _unclear(why: str) -> Verdict:
    return Verdict(answer="unclear", text=f"Cannot say: {why}.")
