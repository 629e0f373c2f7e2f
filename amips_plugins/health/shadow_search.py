"""What a sampled query shows: its answer beside the exact one, and beside those of other states.

What recall has to be, on average:

- Cells, as planned: the recall that the search asked for, which calibration promises.
- Cells, widened: the same, or what the native search finds where that is less. The next state down
  is the native search, and going there must not make things worse.
- A tuned bundle's search: the recall asked for, however wide; natively nothing would be better.
- A rewritten query: what the native search finds with the original one, less ``GIVE``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from amips_plugins.collection import Collection, Hit, Incomplete, SearchRequest, ThoroughCollection
from amips_plugins.health.filters import FilterTrial
from amips_plugins.health.gate import Gate, RecallAgainstTarget, Shadow
from amips_plugins.health.recall import recall_at_k
from amips_plugins.models.hooks import RouteHook
from amips_plugins.models.tuned import TunedHook
from amips_plugins.plan import PreQueryHook, Target
from amips_plugins.vectors import FloatArray

__all__ = [
    "GIVE",
    "ServedQuery",
    "filter_trial",
    "gate_of",
    "search_wider",
    "shadow_search",
    "widens",
]

GIVE = 0.02
"""Recall below the native search's that a rewritten query may have: it promised no figure."""


@dataclass(frozen=True, slots=True)
class ServedQuery:
    """One query, ``(dim,)``, that was answered, without ``n_probes`` of the caller's.

    ``found`` is what the caller got, ``mode`` the kind of the plan that answered, also where it
    found too few and was completed natively; ``widen`` is how wide the gate had it planned,
    infinity natively. Parameters and filter are the caller's own.
    """

    collection: Collection
    hook: PreQueryHook
    query: FloatArray
    target: Target
    found: Sequence[Hit]
    mode: str
    widen: float
    params: Mapping[str, Any] | None = None
    filter: Any = None


def widens(hook: PreQueryHook) -> bool:
    """Tell whether a hook knows of ``Target.widen``: a bundle's router does."""
    return isinstance(hook, (RouteHook, TunedHook))


def gate_of(hook: PreQueryHook | None) -> Gate:
    """Return the gate for what plans."""
    return Gate(widens=hook is not None and widens(hook), native=isinstance(hook, TunedHook))


def shadow_search(
    served: ServedQuery, better: float | None, timeout: float | None
) -> Shadow | None:
    """Search for a served query exactly, natively and less wide, where needed.

    None where the model had no part in the answer, and could have had none.
    """
    collection = served.collection
    if served.widen == 1.0 and served.mode == "native":
        return None  # every cell was called for, or something failed
    k = served.target.k
    request = SearchRequest(served.query[None], k, params=served.params, timeout=timeout)
    (exact,) = _thorough(collection, request)
    if isinstance(exact, Incomplete):
        return None  # what is missing there says nothing of the plan

    def recall(found: Sequence[Hit]) -> float:
        larger = collection.info.metric.larger_is_better
        return recall_at_k(found, exact, k, larger_is_better=larger)

    recall_served = recall(served.found)
    promised = _promised(served)
    tuned = isinstance(served.hook, TunedHook)
    fixed = served.widen == 1.0 and promised is not None and widens(served.hook)
    if served.widen == math.inf or tuned or (fixed and better is None):
        native = recall_served  # not looked at where the target is a fixed one
    else:
        native = recall(collection.search(request)[0])
    tried = None
    if better is not None:
        found = search_wider(better, collection, served.hook, served.target, request)
        if found is None:
            return None
        tried = _against_target(recall(found), better, promised, native, served.hook)
    trial = _against_target(recall_served, served.widen, promised, native, served.hook)
    return Shadow(served.widen, trial, tried)


def filter_trial(
    served: ServedQuery, widen: float, timeout: float | None, *, native_first: bool
) -> FilterTrial | None:
    """Search for a filtered query exactly, natively and by plan, and take the time of both.

    The one that comes second finds the database's caches warm: let chance say which. None where
    the plan would be the native search, or the request is none for a plan.
    """
    collection, hook, k = served.collection, served.hook, served.target.k
    request = SearchRequest(
        served.query[None], k, served.filter, params=served.params, timeout=timeout
    )
    if collection.unroutable(request, rewritten=False) is not None:
        return None
    (exact,) = _thorough(collection, request)
    if isinstance(exact, Incomplete):
        return None
    larger = collection.info.metric.larger_is_better
    native: list[Hit] = []
    planned: list[Hit] | None = None
    seconds = {True: 0.0, False: 0.0}
    for natively in (native_first, not native_first):
        started = perf_counter()
        if natively:
            (native,) = collection.search(request)
        else:
            planned = search_wider(widen, collection, hook, served.target, request)
        seconds[natively] = perf_counter() - started
        if not natively and planned is None:
            return None
    assert planned is not None  # noqa: S101 - for the type checker
    recall = recall_at_k(planned, exact, k, larger_is_better=larger)
    target = _promised(served)
    relative = target is None
    found = recall_at_k(native, exact, k, larger_is_better=larger)
    if target is None:
        target = max(found - GIVE, 0.0)
    ratio = seconds[False] / max(seconds[True], 1e-9)
    same = found if isinstance(hook, TunedHook) else None
    return FilterTrial(recall, target, ratio, widen, relative, same)


def _thorough(collection: Collection, request: SearchRequest) -> list[list[Hit]]:
    """Search for what an answer is judged by: exactly, or what a disk gives up cheaply."""
    if isinstance(collection, ThoroughCollection):
        return collection.thorough(request)
    return collection.exact(request)


def search_wider(
    widen: float,
    collection: Collection,
    hook: PreQueryHook,
    target: Target,
    request: SearchRequest,
) -> list[Hit] | None:
    """Answer one query as a router does that searches so wide; None where it asks no model."""
    if hook.plan(request.queries, replace(target, widen=1.0)).mode in ("native", "exact"):
        return None
    plan = hook.plan(request.queries, replace(target, widen=widen))
    (found,) = collection.exact(request) if plan.exact else collection.search(request, plan)
    if len(found) < request.k and plan.mode in ("route", "rewrite", "tuned"):
        (found,) = collection.search(request)
    return found


def _promised(served: ServedQuery) -> float | None:
    if served.target.recall is None and isinstance(served.hook, (RouteHook, TunedHook)):
        return served.hook.default_recall
    return served.target.recall


def _against_target(
    recall: float, widen: float, promised: float | None, native: float, hook: PreQueryHook
) -> RecallAgainstTarget:
    if promised is None:
        return RecallAgainstTarget(recall, max(native - GIVE, 0.0), relative=True)
    if isinstance(hook, TunedHook) or (widen == 1.0 and widens(hook)):
        return RecallAgainstTarget(recall, promised)
    return RecallAgainstTarget(recall, min(promised, native), relative=True)
