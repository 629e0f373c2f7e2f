"""A routed call: the caller's own call, changed by a plan, in place of the collection's search."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

from amips_plugins.collection import Collection, CollectionInfo, SearchRequest
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.proxies.late import LateRouter
from amips_plugins.routing.effects import Effects, InThread
from amips_plugins.routing.fallbacks import Fallbacks
from amips_plugins.routing.router import LearnedRouter

__all__ = [
    "Arguments",
    "Call",
    "Dialect",
    "Found",
    "RoutableCall",
    "RoutedCollection",
    "Stance",
    "search",
]

_log = logging.getLogger("amips_plugins")
_NAMES_STAY = 30.0  # seconds that an alias is taken to name what it named: a router's own refresh
_NOTHING: Any = object()


class Arguments:
    """Names the arguments of a method's calls; ``kind`` says what it takes."""

    def __init__(self, kind: type, method: str) -> None:
        takes = inspect.signature(getattr(kind, method)).parameters.values()
        self._names = [
            one.name for one in takes if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        ][1:]  # without self

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a call's arguments by name, or None where the client would not take them."""
        if not args:
            return kwargs  # type: ignore[return-value]  # a dictionary of the call's own
        if len(args) > len(self._names):
            return None
        found = dict(zip(self._names, args, strict=False))
        if not found.keys().isdisjoint(kwargs):
            return None
        found.update(kwargs)
        return found


@dataclass(slots=True)
class Call:
    """An effect that calls a method of the caller's client; ``errors`` keeps what it raised."""

    method: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def instead(self, arguments: Mapping[str, Any]) -> Call:
        """Return the call with other arguments; both remember errors in one list."""
        return Call(self.method, (), arguments, self.errors)

    def other(self, method: Callable[..., Any], arguments: Mapping[str, Any]) -> Call:
        """Return a call of another method, to go with this one."""
        return Call(method, (), arguments, self.errors)

    def raised(self, exc: Exception) -> bool:
        """Tell whether an error is the client's own."""
        return any(exc is one for one in self.errors)

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


@dataclass(slots=True)
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

    def request(self, collection: Collection) -> SearchRequest | None:
        """Return what is searched; None where the router cannot do what the caller asks.

        A later page and a least score are no filter: the best keys stay the best ones.
        """
        ...

    def whole(self, collection: Collection) -> bool:
        """Tell whether its request says all that keeps the answer from being the best k keys."""
        ...

    def natively(self, timeout: float | None) -> Mapping[str, Any]:
        """Return the arguments of the caller's call with less time."""
        ...

    def routed(
        self, plain: Call, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> Effects[Found]:
        """Make the caller's call, changed by a plan."""
        ...

    def tuned(
        self, plain: Call, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> Effects[Any]:
        """Make the caller's call with a plan's search parameters."""
        ...

    def exactly(self, plain: Call, collection: Collection, request: SearchRequest) -> Effects[Any]:
        """Make the caller's call with parameters by which every key is looked at."""
        ...

    def plainly(self, own: Call, collection: Collection) -> Effects[Any]:
        """Make the caller's call as it stands, or as its database finds what it means."""
        ...

    def hits(self, response: Any) -> list[Any]:
        """Return the hits of an answer to the caller's own call."""
        ...


class Dialect(Protocol):
    """What differs from database to database, for one method of one client."""

    def read(self, arguments: dict[str, Any]) -> RoutableCall | None:
        """Understand a call by its arguments; None if it is no plain dense query."""
        ...


class _Own(NamedTuple):
    """What a collection is called, and whether its native search is the client's own call."""

    collection: Collection
    name: str
    as_asked: bool


class Stance(Enum):
    """What is to be done about a search: nothing, where it is another collection's."""

    LEAVE = 0
    REST = 1  # nothing, unless somebody watches
    SEARCH = 2


class RoutedCollection:
    """The router of a proxy, and the names that its collection goes by.

    ``same`` asks the database whether a name is an alias of the collection; ``as_asked`` tells of
    which collections the native search is the client's own call.
    """

    def __init__(
        self,
        router: LearnedRouter | LateRouter,
        recall: float | None,
        same: Callable[[str, CollectionInfo], Effects[bool]],
        as_asked: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        self.recall = recall
        self._router = router
        self._made = None if isinstance(router, LateRouter) else router
        self._own: _Own | None = None
        self._same = same
        self._as_asked = as_asked
        self._faults = Fallbacks()
        self._names: dict[str, tuple[float, bool]] = {}

    @property
    def router(self) -> LearnedRouter | None:
        """The router; None while it waits for its collection."""
        made = self._made
        if made is None and isinstance(self._router, LateRouter):
            made = self._made = self._router.made
        return made

    def _known(self, router: LearnedRouter) -> _Own:
        """Return what is known of the collection; every search asks."""
        own, collection = self._own, router.collection
        if own is None or own.collection is not collection:
            own = _Own(collection, collection.info.name, self._as_asked(collection))
            self._own = own
        return own

    def of(self, name: str, *, look: bool = True) -> Effects[LearnedRouter | None]:
        """Return the router if a name is its collection's, as of half a minute ago.

        Without ``look`` nothing is asked for that: no alias is looked up, no router made.
        """
        router = self.router
        if router is None and look and isinstance(self._router, LateRouter):
            router = (yield InThread(self._router.get)) if name == self._router.name else None
        if router is None:
            return None
        if name == self._known(router).name:
            return router
        info, now = router.collection.info, time.monotonic()
        since, same = self._names.get(name, (-_NAMES_STAY, False))
        if look and now - since >= _NAMES_STAY:
            try:
                same = yield from self._same(name, info)
            except Exception as exc:  # noqa: BLE001 - the caller's own call will say what is wrong
                _log.debug("%r cannot be looked up: %s", name, exc)
                same = False
            self._names[name] = (now, same)
        return router if same else None

    def stance(self, name: Any) -> Stance:
        """Say, as far as is known without asking, what is to be done about a search by a name."""
        router = self._made or self.router
        if router is None:
            return Stance.SEARCH
        own = self._own
        if own is None or own.collection is not router.collection:
            own = self._known(router)
        if name == own.name:
            return Stance.SEARCH if router.plans or not own.as_asked else Stance.REST
        since, same = self._names.get(name, (-_NAMES_STAY, False))
        other = not same and time.monotonic() - since < _NAMES_STAY
        return Stance.LEAVE if other else Stance.SEARCH

    def rests(self) -> bool:
        """Tell, and count, that the router has nothing to do with a search of its collection."""
        router = self._made or self.router
        return router is not None and router.rests()

    def note(self, exc: Exception) -> None:
        """Count a fault of ours, in whose place the client's own call answers."""
        router = self.router
        name = "?" if router is None else router.collection.info.name
        reason = self._faults.note(name, f"proxy: {type(exc).__name__}", exc)
        if router is not None:
            router.fallbacks[reason] += 1


def search(routed: RoutedCollection, call: RoutableCall, plain: Call) -> Effects[Any]:
    """Answer a call: through the router, or as it stands."""
    response = _NOTHING
    try:
        router = yield from routed.of(call.name)
        collection = None if router is None else router.collection
        asked = None if collection is None else call.request(collection)
        if router is not None and collection is not None and asked is not None:
            timeout, whole = asked.timeout, call.whole(collection)

            def by_client(
                collection: Collection, request: SearchRequest, plan: QueryPlan
            ) -> Effects[list[Any]]:
                nonlocal response
                if plan.cells is not None or plan.rewritten is not None:
                    found = yield from call.routed(plain, collection, request, plan)
                elif plan.params is not None:
                    answer = yield from call.tuned(plain, collection, request, plan)
                    hits = call.hits(answer)
                    if not whole:  # what a threshold or a last page leaves out is not missing
                        hits += [None] * (request.k - len(hits))
                    found = Found(answer, hits)
                elif plan.exact:
                    answer = yield from call.exactly(plain, collection, request)
                    found = Found(answer, call.hits(answer))
                else:
                    less = request.timeout != timeout
                    own = plain.instead(call.natively(request.timeout)) if less else plain
                    answer = yield from call.plainly(own, collection)
                    found = Found(answer, call.hits(answer))
                response = found.response
                return [found.hits]

            target = Target(k=asked.k, recall=routed.recall)
            yield from router.search_effects(
                asked, target, search=by_client, sampled=whole, wanted=False
            )
    except Exception as exc:
        if plain.raised(exc):
            raise
        routed.note(exc)  # ours: the client answers
    if response is _NOTHING:
        response = yield plain
    return response
