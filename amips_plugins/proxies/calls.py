"""A routed call: the caller's own call, changed by a plan, in place of the collection's search."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from amips_plugins.collection import Collection, CollectionInfo, SearchRequest
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.proxies.late import LateRouter
from amips_plugins.routing.effects import Effects, InThread
from amips_plugins.routing.fallbacks import Fallbacks
from amips_plugins.routing.router import LearnedRouter

__all__ = ["Call", "Dialect", "Found", "RoutableCall", "RoutedMethod"]

_log = logging.getLogger("amips_plugins")
_NAMES_STAY = 30.0  # seconds that an alias is taken to name what it named: a router's own refresh
_NOTHING: Any = object()


@dataclass(frozen=True, slots=True)
class Call:
    """An effect that calls a method of the caller's client; ``errors`` keeps what it raised."""

    method: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def instead(self, arguments: Mapping[str, Any]) -> Call:
        """Return the call with other arguments; both remember errors in one list."""
        return replace(self, args=(), kwargs=arguments)

    def perform(self) -> Any:
        """Call."""
        try:
            return self.method(*self.args, **self.kwargs)
        except Exception as exc:
            self.errors.append(exc)
            raise

    async def perform_async(self, client: Any) -> Any:  # noqa: ARG002 - effects have one signature
        """Call and wait, while other tasks run."""
        try:
            return await self.method(*self.args, **self.kwargs)
        except Exception as exc:
            self.errors.append(exc)
            raise


@dataclass(frozen=True, slots=True)
class Found:
    """What a changed call found: what the caller gets, and the hits by which to judge the plan.

    The hits, with ``id`` and ``score``, may be more than those that the caller gets.
    """

    response: Any
    hits: list[Any]


class RoutableCall(Protocol):
    """One call of the client that could be routed, understood."""

    @property
    def name(self) -> str:
        """The collection, by the name that the caller has for it."""
        ...

    def request(self, info: CollectionInfo) -> tuple[SearchRequest, int] | None:
        """Return what is searched, and how deep, offset included.

        None where the router cannot do what the caller asks. The filter is only to say whether
        there is one, or anything else that keeps the answer from being the best k keys.
        """
        ...

    def natively(self, timeout: float | None) -> Mapping[str, Any]:
        """Return the arguments of the caller's call with less time."""
        ...

    def routed(
        self, plain: Call, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> Effects[Found]:
        """Make the caller's call, changed by a plan."""
        ...

    def hits(self, response: Any) -> list[Any]:
        """Return the hits of an answer to the caller's own call."""
        ...


class Dialect(Protocol):
    """What differs from database to database, for one method of one client."""

    def read(self, arguments: Mapping[str, Any]) -> RoutableCall | None:
        """Understand a call by its arguments; None if it is no plain dense query."""
        ...

    def same(self, name: str, info: CollectionInfo) -> Effects[bool]:
        """Ask the database whether a name is an alias of the router's collection."""
        ...


class RoutedMethod:
    """Routes the calls of one method of one client; ``signature`` is without ``self``."""

    def __init__(
        self,
        method: Callable[..., Any],
        signature: inspect.Signature,
        dialect: Dialect,
        router: LearnedRouter | LateRouter,
        recall: float | None,
    ) -> None:
        self._method = method
        self._signature = signature
        self._dialect = dialect
        self._router = router
        self._recall = recall
        self._faults = Fallbacks()
        self._names: dict[str, tuple[float, bool]] = {}

    @property
    def router(self) -> LearnedRouter | None:
        """The router; None while it waits for its collection."""
        return self._router.made if isinstance(self._router, LateRouter) else self._router

    def search(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Effects[Any]:
        """Answer a call: through the router, or as it stands."""
        plain = Call(self._method, args, kwargs)
        response = _NOTHING
        try:
            understood = yield from self._understand(args, kwargs)
            if understood is not None:
                router, call, asked, depth = understood

                def by_client(
                    collection: Collection, request: SearchRequest, plan: QueryPlan
                ) -> Effects[list[Any]]:
                    nonlocal response
                    if plan.cells is not None or plan.rewritten is not None:
                        found = yield from call.routed(plain, collection, request, plan)
                    else:
                        less = request.timeout != asked.timeout
                        own = plain.instead(call.natively(request.timeout)) if less else plain
                        answer = yield own
                        found = Found(answer, call.hits(answer))
                    response = found.response
                    return [found.hits]

                target = Target(k=depth, recall=self._recall)
                yield from router.search_effects(asked, target, search=by_client)
        except Exception as exc:
            if any(exc is one for one in plain.errors):
                raise  # the client's own
            self._fault(exc)  # ours: the client answers
        if response is _NOTHING:
            response = yield plain
        return response

    def _understand(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Effects[tuple[LearnedRouter, RoutableCall, SearchRequest, int] | None]:
        """Return what it takes to route a call, or None where it is not to be."""
        try:
            arguments = self._signature.bind(*args, **kwargs).arguments
        except TypeError:
            return None  # the client says it better
        call = self._dialect.read(arguments)
        if call is None:
            return None
        router = self.router
        if router is None and isinstance(self._router, LateRouter):
            router = (yield InThread(self._router.get)) if call.name == self._router.name else None
        if router is None:
            return None
        info = router.collection.info
        if call.name != info.name and not (yield from self._same(call.name, info)):
            return None
        asked = call.request(info)
        return None if asked is None else (router, call, *asked)

    def _same(self, name: str, info: CollectionInfo) -> Effects[bool]:
        """Tell whether a name is an alias of the router's collection, as of half a minute ago."""
        now = time.monotonic()
        since, same = self._names.get(name, (-_NAMES_STAY, False))
        if now - since >= _NAMES_STAY:
            try:
                same = yield from self._dialect.same(name, info)
            except Exception as exc:  # noqa: BLE001 - the caller's own call will say what is wrong
                _log.debug("%r cannot be looked up: %s", name, exc)
                same = False
            self._names[name] = (now, same)
        return same

    def _fault(self, exc: Exception) -> None:
        router = self.router
        name = "?" if router is None else router.collection.info.name
        reason = self._faults.note(name, f"proxy: {type(exc).__name__}", exc)
        if router is not None:
            router.fallbacks[reason] += 1
