"""Asking the model how to search, and leaving it alone where it fails."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from amips_plugins.errors import InvalidInput
from amips_plugins.health.gate import Health
from amips_plugins.models.hooks import is_quick
from amips_plugins.plan import NATIVE, QueryPlan, Target
from amips_plugins.routing.checks import check_plan
from amips_plugins.routing.circuit_breaker import Breaker
from amips_plugins.routing.effects import Effects, PlanEffect
from amips_plugins.routing.fallbacks import Fallbacks
from amips_plugins.routing.serving import Serving
from amips_plugins.vectors import FloatArray

__all__ = ["GATED", "Planner"]

GATED = "health: native"
"""The reason where live searches have shown that the native search is the better one."""

_log = logging.getLogger("amips_plugins")
_A_QUERY_MORE = 1e-3  # seconds: a hundred times what any of our models takes
_MODELS_SHARE = 0.25  # of the caller's time


class Planner:
    """Plans searches, and counts what kept it from doing so.

    Parameters
    ----------
    fallbacks
        Where reasons are counted.
    patience
        Seconds that the plan for one query may take.
    """

    def __init__(self, fallbacks: Fallbacks, patience: float) -> None:
        self._fallbacks = fallbacks
        self._patience = patience
        self.enabled = True
        self.start_over(None)

    def start_over(self, serving: Serving | None) -> None:
        """Trust the model and the routed search anew: another state serves."""
        self._judged = serving
        self._model = Breaker()
        self._search = Breaker()

    def plan(
        self,
        serving: Serving,
        queries: FloatArray,
        target: Target,
        timeout: float | None,
        health: Health | None,
    ) -> Effects[tuple[QueryPlan, str | None]]:
        """Plan, or say why the native search answers.

        Parameters
        ----------
        serving
            What serves.
        queries, target
            What is searched, and what the caller wants.
        timeout
            The caller's time.
        health
            What live searches say of the model, or None.

        Raises
        ------
        InvalidInput
            The hook cannot do what the caller asks for.
        """
        name = serving.collection.info.name
        if not self.enabled:
            return NATIVE, self._fallbacks.note(name, "disabled")
        hook = serving.hook
        if serving.obstacle is not None or hook is None:
            return NATIVE, self._fallbacks.note(name, serving.obstacle or "no bundle", serving.hint)
        if not self._model.allows():
            return NATIVE, self._fallbacks.note(name, "breaker: model")
        if not self._search.allows():
            return NATIVE, self._fallbacks.note(name, "breaker: search")
        if health is not None and health.state != "healthy" and target.n_probes is None:
            if health.widen == math.inf:
                return NATIVE, self._fallbacks.note(name, GATED, "; ".join(health.reasons))
            target = replace(target, widen=health.widen)
        try:
            if is_quick(hook, len(queries)):
                plan = hook.plan(queries, target)
            else:
                plan = yield PlanEffect(hook, queries, target, self._seconds(len(queries), timeout))
            check_plan(plan, queries)
        except InvalidInput:
            raise  # the caller's own argument
        except Exception as exc:  # noqa: BLE001 - whatever a model does, the native search answers
            if self._model.fail():
                _tell("The model for %r failed time and again and is given a rest.", name, "rest")
            return NATIVE, self._fallbacks.note(name, f"model: {type(exc).__name__}", exc)
        if self._model.succeed():
            self._answers_again("The model for %r answers again.", name)
        return plan, None

    def searched(self, serving: Serving, *, by_plan: bool) -> None:
        """Learn how a routed search ended: by its plan, or by the native search in its place."""
        if serving is not self._judged:
            return  # it began before the state was changed
        name = serving.collection.info.name
        if by_plan:
            if self._search.succeed():
                self._answers_again("Routed searches of %r answer again.", name)
        elif self._search.fail():
            _tell("Routed searches of %r failed time and again and get a rest.", name, "rest")

    def _answers_again(self, text: str, name: str) -> None:
        _tell(text, name, "recovery")
        self._fallbacks.start_over()

    def _seconds(self, n_queries: int, timeout: float | None) -> float:
        patience = self._patience + _A_QUERY_MORE * (n_queries - 1)
        return patience if timeout is None else min(patience, _MODELS_SHARE * timeout)


def _tell(text: str, name: str, event: str) -> None:
    _log.warning(text, name, extra={"amips_event": event, "amips_collection": name})
