"""A routed call: the caller's own call, changed by a plan. The steps are those of every search."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from amips_plugins.collection import CollectionInfo, SearchRequest
from amips_plugins.plan import Target
from amips_plugins.proxies.late import LateRouter
from amips_plugins.routing.effects import Effects, InThread, Search
from amips_plugins.routing.fallbacks import Fallbacks
from amips_plugins.routing.router import LearnedRouter

__all__ = ["Asked", "Call", "Dialect", "Found", "Routing", "bound"]

_log = logging.getLogger("amips_plugins")
_NAMES_STAY = 30.0  # seconds that an alias is taken to name what it named: a router's own refresh


@dataclass(frozen=True, slots=True)
class Call:
    """A step that calls a method of the caller's client.

    Attributes
    ----------
    method, args, kwargs
        The call.
    errors
        What it raised.
    """

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

    async def perform_async(self, client: Any) -> Any:  # noqa: ARG002 - steps have one signature
        """Call and wait, while other tasks run."""
        try:
            return await self.method(*self.args, **self.kwargs)
        except Exception as exc:
            self.errors.append(exc)
            raise


@dataclass(frozen=True, slots=True)
class Found:
    """What a changed call found.

    Attributes
    ----------
    response
        What the caller is to get.
    hits
        The hits, with ``id`` and ``score``, by which to tell whether the plan found enough; they
        may be more.
    """

    response: Any
    hits: list[Any]


class Asked(Protocol):
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

    def routed(self, plain: Call, step: Search, depth: int) -> Effects[Found]:
        """Make the caller's call, changed by the plan of a step; ``depth`` as in ``request``."""
        ...

    def hits(self, response: Any) -> list[Any]:
        """Return the hits of an answer to the caller's own call."""
        ...


class Dialect(Protocol):
    """What differs from database to database, for one client."""

    def read(self, arguments: Mapping[str, Any]) -> Asked | None:
        """Understand a call by its arguments; None if it is no plain dense query."""
        ...

    def same(self, name: str, info: CollectionInfo) -> Effects[bool]:
        """Ask the database whether a name is an alias of the router's collection."""
        ...


def bound(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Return a call's arguments by name, or None where the client would not take them."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None


class Routing:
    """Routes the calls of one method of one client.

    Parameters
    ----------
    method
        The client's own method.
    signature
        Its parameters, without ``self``.
    dialect
        What is particular to the database.
    router
        What plans.
    recall
        Recall@k to aim at, or None.
    """

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
        try:
            understood = yield from self._understand(args, kwargs)
        except Exception as exc:  # noqa: BLE001 - the client answers whatever is wrong here
            self._fault(exc)
            understood = None
        if understood is None:
            return (yield plain)
        router, asked, request, depth = understood
        done = _Done(plain, asked, request, depth)
        try:
            yield from done.through(
                router.search_effects(request, Target(k=depth, recall=self._recall))
            )
        except Exception as exc:
            if any(exc is one for one in plain.errors):
                raise  # the client's own
            self._fault(exc)
        if done.response is _NOTHING:
            return (yield plain)
        return done.response

    def _understand(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Effects[tuple[LearnedRouter, Asked, SearchRequest, int] | None]:
        """Return what it takes to route a call, or None where it is not to be."""
        arguments = bound(self._signature, args, kwargs)
        asked = None if arguments is None else self._dialect.read(arguments)
        if asked is None:
            return None
        if isinstance(self._router, LateRouter):
            if self._router.made is None and asked.name != self._router.name:
                return None
            router = self._router.made or (yield InThread(self._router.get))
        else:
            router = self._router
        if router is None:
            return None
        info = router.collection.info
        if asked.name != info.name and not (yield from self._same(asked.name, info)):
            return None
        wanted = asked.request(info)
        return None if wanted is None else (router, asked, *wanted)

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


_NOTHING: Any = object()


class _Done:
    """Performs the searches of one call by the caller's client, and keeps what the last gave."""

    def __init__(self, plain: Call, asked: Asked, request: SearchRequest, depth: int) -> None:
        self.response: Any = _NOTHING
        self._plain = plain
        self._asked = asked
        self._timeout = request.timeout
        self._depth = depth

    def through(self, steps: Effects[Any]) -> Effects[Any]:
        """Pass the steps on, with every search of the collection made by the client."""
        go_on: Callable[[Any], Any] = steps.send
        value: Any = None
        while True:
            try:
                step = go_on(value)
            except StopIteration as end:
                return end.value
            try:
                if isinstance(step, Search):
                    found = yield from self._search(step)
                    self.response, value = found.response, [found.hits]
                else:
                    value = yield step
                go_on = steps.send
            except Exception as exc:  # noqa: BLE001 - the steps decide what it means
                go_on, value = steps.throw, exc

    def _search(self, step: Search) -> Effects[Found]:
        if step.plan.cells is not None or step.plan.rewritten is not None:
            return (yield from self._asked.routed(self._plain, step, self._depth))
        call = self._plain
        if step.request.timeout != self._timeout:
            call = call.instead(self._asked.natively(step.request.timeout))
        response = yield call
        return Found(response, self._asked.hits(response))
