"""What was measured of each way to search, with intervals, and which of them to choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from amips_plugins.health.recall import RecallWindow
from amips_plugins.tune.measuring import Trial

__all__ = ["FOUND", "NATIVE_ROW", "Choice", "Row", "choose", "compared", "dropped"]

FOUND, NATIVE_ROW = "as it is", "native, tuned"

_BOOTSTRAPS = 500
_WORTH = 1 / 1.1  # of the tuned native search's cost: a rebuild for less is not worth it
_SAME = 0.97  # of the cost as it is: less of a difference drowns in the noise


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way to search.

    Attributes
    ----------
    search
        Its name; ``as it is`` is how the collection is searched without any parameter.
    parameter, effort
        The search parameter, and its least value that is promised to hold the target; None where
        nothing was set, or nothing can be promised.
    best_promise
        The highest recall target that can be promised; None where it was not asked.
    recall, recall_low, recall_high
        Mean recall@k on queries that have chosen nothing of it, and its 95 % interval.
    cost, cost_low, cost_high
        Milliseconds a query, and their 95 % interval; of the engine's CPU or of the clock.
    ratio, ratio_low, ratio_high
        The same over that of the collection as it is, query by query.
    bytes_per_key
        What a search compares of each key it looks at.
    bytes_scored
        Bytes of vectors that a server says it has scored for a query, the same on every run; None
        where it does not count, or does not tell.
    memory_bytes
        About what the database keeps of the whole collection in memory, with ids; None where that
        is not known.
    build_seconds
        What it took to build a copy; None where nothing was built.
    applies
        Whether the collection itself can be given it here.
    dropped
        Why nothing was measured; None where it was.
    """

    search: str
    parameter: str | None = None
    effort: int | None = None
    best_promise: float | None = None
    recall: float | None = None
    recall_low: float | None = None
    recall_high: float | None = None
    cost: float | None = None
    cost_low: float | None = None
    cost_high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    bytes_per_key: float | None = None
    bytes_scored: float | None = None
    memory_bytes: int | None = None
    build_seconds: float | None = None
    applies: bool = False
    dropped: str | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What to do.

    Attributes
    ----------
    answer
        ``tune`` sets search parameters alone, ``rebuild`` changes the index, too, ``leave`` changes
        nothing, ``unclear`` is for want of queries.
    search
        The name of the row; None where it is unclear.
    text
        Why, in sentences.
    """

    answer: Literal["tune", "rebuild", "leave", "unclear"]
    search: str | None
    text: str


def compared(row: Row, trial: Trial, base: Trial, base_row: Row | None, seed: int = 0) -> Row:
    """Fill in what was measured, beside a base whose own row is known, or is this one's.

    Costs are those of the base times the ratio: so what the machine did meanwhile cancels out.
    """
    window = RecallWindow(len(trial.recall))
    for recall in trial.recall.tolist():
        window.add(recall)
    seen = window.summary()
    assert seen is not None  # noqa: S101 - there are queries
    own, theirs = _resampled(trial.calm, seed), _resampled(base.calm, seed)
    mean = float(_over(trial.calm.mean(keepdims=True), base.calm.mean(keepdims=True))[0])
    low, high = np.quantile(_over(own, theirs), [0.025, 0.975]).tolist()
    if base_row is None or base_row.cost is None:
        cost, ratio = 1e3 * float(trial.calm.mean()), 1.0
        costs = (1e3 * np.quantile(own, [0.025, 0.975])).tolist()
        ratios = [1.0, 1.0]
    else:
        cost, ratio = base_row.cost * mean, (base_row.ratio or 1.0) * mean
        costs = [base_row.cost * low, base_row.cost * high]
        ratios = [(base_row.ratio or 1.0) * low, (base_row.ratio or 1.0) * high]
    return msgspec.structs.replace(
        row,
        recall=seen.mean,
        recall_low=seen.low,
        recall_high=seen.high,
        cost=cost,
        cost_low=costs[0],
        cost_high=costs[1],
        ratio=ratio,
        ratio_low=ratios[0],
        ratio_high=ratios[1],
        bytes_scored=_counted(trial, base, base_row),
    )


def _over(own: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ratios; 1 where a clock that stands still has counted nothing."""
    return np.divide(own, theirs, out=np.ones_like(own), where=theirs > 0)


def _counted(trial: Trial, base: Trial, base_row: Row | None) -> float | None:
    """Return what the engine has counted; on a sample, what the collection's count scales to."""
    if trial.scored is None or base.scored is None or base_row is None:
        return trial.scored
    known = base.scored if base_row.bytes_scored is None else base_row.bytes_scored
    return trial.scored if base.scored == 0 else known * trial.scored / base.scored


def _resampled(values: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(_BOOTSTRAPS, len(values)))
    means: npt.NDArray[np.float64] = values[drawn].mean(axis=1)
    return means


def dropped(name: str, why: str) -> Row:
    """Return the row of something that was not measured."""
    return Row(search=name, dropped=why)


def choose(rows: Sequence[Row], recall: float, k: int, *, agreed: bool = True) -> Choice:
    """Choose the cheapest way that holds the target, and the simplest of those about as cheap."""
    by_name = {row.search: row for row in rows}
    found, native = by_name[FOUND], by_name[NATIVE_ROW]
    holding = [row for row in rows[1:] if _holds(row, recall)]
    if native.dropped is not None:  # every search looks at every key, and finds the best of them
        native = found
        holding.insert(0, found)
    if not holding:
        best = max((row.best_promise or 0.0 for row in rows), default=0.0)
        return Choice(
            answer="unclear",
            search=None,
            text=f"recall@{k} {recall:g} cannot be promised from these queries; the best target is "
            f"{np.floor(best * 1000) / 1000:.3f}. Pass more queries, or ask for less (--recall).",
        )
    cheapest = min(holding, key=_cost)
    chosen = _simplest(cheapest, native, holding)
    more = ""
    if chosen is not native and not chosen.applies:
        able = [row for row in holding if row is native or row.applies]
        more = f" {chosen.search} would cost {_times(chosen)} of what a search costs now, and "
        more += (
            "is not built here: build it in a copy, and move the alias."
            if agreed
            else "was not agreed to."
        )
        if not able:
            return Choice(answer="leave", search=FOUND, text=f"Nothing is set.{more}")
        chosen = _simplest(min(able, key=_cost), native, able)
    holds = chosen is found or (found.recall_low or 0.0) >= recall
    less = _scores_less(native, found) and (native.ratio_low or 0.0) <= 1 / _SAME
    same = (native.ratio or 1.0) > _SAME and not less
    if chosen is native and holds and same:
        text = f"Leave it as it is: it finds {found.recall:.3f}, and nothing set would be cheaper."
        return Choice(answer="leave", search=FOUND, text=text + more)
    what = f"{chosen.parameter} {chosen.effort}"
    if chosen is not native:
        what = f"{chosen.search}, {what}"
    text = f"{what}: recall@{k} {chosen.recall:.3f} at {_times(chosen)} of what a search costs now."
    if chosen.bytes_scored is not None and found.bytes_scored:
        share = chosen.bytes_scored / found.bytes_scored
        text += f" By the server's own count it scores {share:.2f} of the bytes of vectors."
    if chosen.memory_bytes and found.memory_bytes and chosen is not native:
        text += (
            f" In memory it takes about {chosen.memory_bytes / 1e6:,.0f} MB, where it is now "
            f"{found.memory_bytes / 1e6:,.0f}."
        )
    if (found.recall_high or 1.0) < recall:
        text += f" As it is, the collection finds {found.recall:.3f} and misses the target."
    answer: Literal["tune", "rebuild"] = "tune" if chosen is native else "rebuild"
    return Choice(answer=answer, search=chosen.search, text=text + more)


def _simplest(cheapest: Row, native: Row, holding: Sequence[Row]) -> Row:
    """Return the tuned native search unless the other is cheaper by a margin, and surely so."""
    if native not in holding:
        return cheapest
    surely = cheapest.cost_high is not None and cheapest.cost_high < _cost(native)
    surely = surely or _scores_less(cheapest, native)
    return cheapest if surely and _cost(cheapest) <= _WORTH * _cost(native) else native


def _scores_less(row: Row, other: Row) -> bool:
    """Tell whether a server counts clearly less work, which is the same on every run."""
    known = row.bytes_scored is not None and other.bytes_scored is not None
    return known and row.bytes_scored <= _WORTH * other.bytes_scored  # type: ignore[operator]


def _holds(row: Row, recall: float) -> bool:
    promised = row.dropped is None and row.effort is not None
    return promised and row.recall_high is not None and row.recall_high >= recall


def _cost(row: Row) -> float:
    return np.inf if row.cost is None else row.cost


def _times(row: Row) -> str:
    return f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
