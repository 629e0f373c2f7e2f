"""Searching by a plan, and natively wherever the plan does not do: all from one generation."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

from amips_plugins.collection import Collection, Failure, Incomplete, SearchRequest
from amips_plugins.plan import NATIVE, QueryPlan, searches_everything
from amips_plugins.routing.effects import Effects, InThread, SearchBy

__all__ = ["TOO_FEW", "Outcome", "execute"]

TOO_FEW = "cells: fewer than k hits"

_log = logging.getLogger("amips_plugins")
_NOTICED = 1e-3  # seconds that a plan may take before the database is given less
_SWITCHES = 10  # generations that one search follows: more in a row is a fault


@dataclass(slots=True)
class Outcome:
    """What a search found: each query's hits, and the plan that found them.

    ``fallback`` is why the native search answered in the model's place, ``completed`` the rows
    where it did since the plan found fewer than k hits, ``notes`` are reasons with the error behind
    each; a plan is ``blameless`` that failed for a reason which says nothing of other searches.
    """

    found: list[Any]
    plan: QueryPlan
    fallback: str | None = None
    completed: set[int] = field(default_factory=set)
    notes: list[tuple[str, Exception | None]] = field(default_factory=list)
    blameless: bool = False

    @property
    def incomplete(self) -> bool:
        """Whether some of several collections gave no answer."""
        for hits in self.found:  # noqa: SIM110 - every search comes by, and a generator costs
            if isinstance(hits, Incomplete):
                return True
        return False


def execute(
    search: SearchBy,
    collection: Collection,
    request: SearchRequest,
    plan: QueryPlan,
    started: float,
    switches: int = _SWITCHES,
) -> Effects[Outcome]:
    """Search by a plan. Where the generation is gone, the one that serves now answers instead."""
    outcome = None
    routed = plan.mode in ("route", "rewrite", "tuned")
    try:
        asked = request
        if routed and request.timeout is not None and time.perf_counter() - started > _NOTICED:
            asked = _in_time(collection, request, started) or request
        outcome = Outcome((yield from search(collection, asked, plan)), plan)
        if routed:
            short = [row for row, hits in enumerate(outcome.found) if len(hits) < request.k]
            if short:
                yield from _complete(search, collection, request, outcome, short, started)
    except Exception as exc:  # raised again, unless another search may answer
        by_plan = (routed or plan.exact) and outcome is None
        recovered = yield from _recover(
            search, collection, request, exc, started, switches, by_plan=by_plan
        )
        if recovered is None:
            raise
        return recovered
    return outcome


def _recover(
    search: SearchBy,
    collection: Collection,
    request: SearchRequest,
    exc: Exception,
    started: float,
    switches: int,
    *,
    by_plan: bool,
) -> Effects[Outcome | None]:
    """Answer natively in place of a plan that failed, or elsewhere; None where nothing may.

    A database that is out of reach or has too much to do is asked nothing more; nor is one that
    finds fault with the caller's own request, without the plan.
    """
    failure, left = collection.failure(exc), _in_time(collection, request, started)
    if left is None or failure is Failure.OUTAGE or failure is Failure.BUSY:
        return None
    if by_plan:
        try:
            found = yield from search(collection, left, NATIVE)
        except Exception as again:  # an error of the database shows here too
            recovered = yield from _recover(
                search, collection, request, again, started, switches, by_plan=False
            )
            if recovered is None:
                raise
            return recovered
        return _instead(found, exc, blameless=failure is Failure.SIZE)
    if failure is Failure.REQUEST or not switches:
        return None
    now = yield from _elsewhere(collection)
    left = _in_time(collection, request, started)
    if now is None or left is None:
        return None
    # Natively: the plan may name cells that are no more. Every row, so that none is older.
    # That one may be gone, too, by the time that it is this search's turn.
    other = yield from execute(search, now, left, NATIVE, time.perf_counter(), switches - 1)
    return _instead(other.found, exc)


def _instead(found: list[Any], exc: Exception, *, blameless: bool = False) -> Outcome:
    reason = f"search: {type(exc).__name__}"
    return Outcome(found, NATIVE, reason, notes=[(reason, exc)], blameless=blameless)


def _complete(
    search: SearchBy,
    collection: Collection,
    request: SearchRequest,
    routed: Outcome,
    short: list[int],
    started: float,
) -> Effects[None]:
    """Search natively where a plan found fewer than k hits: small cells, a narrow filter."""
    if routed.plan.shares is not None:
        whole = searches_everything(routed.plan, collection.break_even)
        short = [row for row in short if not whole[row]]  # there is nothing more to find
    left = _in_time(collection, request, started) if short else None
    if left is None:
        return
    try:
        again = yield from search(collection, replace(left, queries=request.queries[short]), NATIVE)
    except Exception as exc:
        if _in_time(collection, request, started) is not None:
            raise
        # Too late; a short answer is at hand.
        routed.notes.append((f"complete: {type(exc).__name__}", exc))
        return
    for row, hits in zip(short, again, strict=True):
        routed.found[row] = hits
    routed.notes.append((TOO_FEW, None))
    routed.completed.update(short)


def _in_time(
    collection: Collection, request: SearchRequest, started: float
) -> SearchRequest | None:
    """Return the request for another search within the one deadline, or None when it has passed."""
    timeout = request.timeout if request.timeout is not None else collection.timeout
    if timeout is None:
        return request
    left = timeout - (time.perf_counter() - started)
    return replace(request, timeout=left) if left > 0 else None


def _elsewhere(collection: Collection) -> Effects[Collection | None]:
    """Return what serves now in place of a generation that failed; None if it is the same."""
    try:
        now: Collection = yield InThread(collection.current)
    except Exception as exc:  # noqa: BLE001 - the error of the search says more than this one
        _log.debug("%r cannot be looked at again: %s", collection.info.name, exc)
        return None
    return None if now is collection else now
