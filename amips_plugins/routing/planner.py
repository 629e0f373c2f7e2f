"""Asking the model how to search, and leaving it alone where it fails."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.health.filters import DEARER, MISSES, NOT_MEASURED, narrows
from amips_plugins.health.gate import Health
from amips_plugins.models.hooks import NativeHook, is_quick
from amips_plugins.plan import NATIVE, PreQueryHook, QueryPlan, Target
from amips_plugins.routing.checks import check_plan
from amips_plugins.routing.effects import Effects, InThread, PlanEffect
from amips_plugins.routing.fallbacks import Fallbacks
from amips_plugins.routing.serving import Serving

__all__ = ["GATED", "WATCHED", "plan_search"]

GATED = "health: native"
"""The reason where live searches have shown that the native search is the better one."""

WATCHED = (None, GATED, NOT_MEASURED, MISSES, DEARER)
"""Why the native search answers whose searches are sampled all the same, to see if they change."""

OWN_PARAMS = "params: the caller's own"
"""The reason where a search brings the parameter that a tuned bundle would set, and no target."""

NOT_EXHAUSTIVE = "exact: as far as the index goes"
"""The reason where every key is asked for, and the database looks only where its index leads."""

_HINTS = {
    NOT_MEASURED: "a few of its searches are being measured, see docs/health.md",
    "target: not promised": "the bundle promises less; train with more queries, or for less recall",
    "target: k not calibrated": "name n_probes, or train with a larger --k",
}
_TUNED_HINTS = {
    "target: not promised": "as far as was measured; tune with more queries, or for less recall",
    "target: k not calibrated": "as far as was measured; amips tune calibrates smaller k",
}
_A_QUERY_MORE = 1e-3  # seconds: a hundred times what any of our models takes
_MODELS_SHARE = 0.25  # of the caller's time


def plan_search(
    serving: Serving,
    fallbacks: Fallbacks,
    request: SearchRequest,
    target: Target,
    plan_timeout: float,
    health: Health | None,
) -> Effects[tuple[QueryPlan, str | None]]:
    """Plan, or say why the native search answers; ``InvalidInput`` is the caller's own error."""
    hook, queries = serving.hook, request.queries
    if serving.obstacle is not None or hook is None:
        return NATIVE, serving.note(fallbacks, serving.obstacle or "no bundle", serving.hint)
    if not serving.model_breaker.allows():
        return NATIVE, serving.note(fallbacks, "breaker: model")
    if not serving.search_breaker.allows():
        return NATIVE, serving.note(fallbacks, "breaker: search")
    gated = target.n_probes is None and target.recall != 1.0  # which no evidence speaks against
    if health is not None and health.state != "healthy" and gated:
        if health.widen == math.inf:
            return NATIVE, serving.note(fallbacks, GATED, "; ".join(health.reasons))
        target = replace(target, widen=health.widen)
    if _has_to_be_known(hook, request, target) and serving.watch is not None:
        widen, reason = serving.watch.filters.verdict(request.filter)
        if widen is None:
            reason = reason or NOT_MEASURED
            return NATIVE, serving.note(fallbacks, reason, _HINTS.get(reason))
        target = replace(target, widen=max(target.widen, widen))
    try:
        if is_quick(hook, len(queries)):
            plan = hook.plan(queries, target)
        else:
            plan = yield PlanEffect(hook, queries, target, _patience(request, plan_timeout))
        check_plan(plan, queries)
        reason = _unroutable(serving.collection, request, target, plan)
    except InvalidInput:
        raise  # the caller's own argument
    except Exception as exc:  # noqa: BLE001 - whatever a model does, the native search answers
        serving.planned(good=False)
        return NATIVE, serving.note(fallbacks, f"model: {type(exc).__name__}", exc)
    if serving.model_breaker.troubled:
        serving.planned(good=True)
    if reason is not None:
        return NATIVE, serving.note(fallbacks, reason, _HINTS.get(reason))
    if plan.mode == "tuned" and plan.reason is not None:  # the widest search, yet no promise
        return plan, serving.note(fallbacks, plan.reason, _TUNED_HINTS.get(plan.reason))
    if plan.exact and not (yield InThread(partial(getattr, serving.collection, "exhaustive"))):
        return plan, serving.note(fallbacks, NOT_EXHAUSTIVE)
    if plan.rescore:
        most = serving.collection.max_candidates
        if most is not None and plan.rescore > most:
            plan = replace(plan, rescore=most)
    return plan, None


def _has_to_be_known(hook: PreQueryHook, request: SearchRequest, target: Target) -> bool:
    """Tell whether a plan would be made for a filter, of which nothing is promised."""
    if request.filter is None:
        return False
    free = target.n_probes is not None or target.recall == 1.0 or isinstance(hook, NativeHook)
    return not free and narrows(request.filter)


def _unroutable(
    collection: Collection, request: SearchRequest, target: Target, plan: QueryPlan
) -> str | None:
    """Say why the plan is empty, would change what is meant, or find less than is asked for."""
    rewritten = plan.rewritten is not None
    if plan.cells is None and plan.mode == "native":
        return plan.reason
    if rewritten:
        most = collection.max_candidates
        if most is not None and request.k > most:
            return "k: more than there may be candidates"
    reason = collection.unroutable(request, rewritten=rewritten)
    if reason is None and plan.params is not None and target.recall is None:
        asked = request.params or {}
        own = {*asked, *(asked.get("params") or {})}
        return None if own.isdisjoint(plan.params) else OWN_PARAMS
    return reason


def _patience(request: SearchRequest, plan_timeout: float) -> float:
    """Return the seconds that the model may take for a batch within the caller's time."""
    patience = plan_timeout + _A_QUERY_MORE * (len(request.queries) - 1)
    return patience if request.timeout is None else min(patience, _MODELS_SHARE * request.timeout)
