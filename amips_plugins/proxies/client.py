"""An object that behaves as a database's client, but for a table of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any

from amips_plugins.proxies.calls import (
    Arguments,
    Call,
    Dialect,
    RoutableCall,
    RoutedCollection,
    Stance,
    search,
)
from amips_plugins.routing.effects import Effects, run, run_async
from amips_plugins.routing.router import LearnedRouter

__all__ = ["After", "Change", "ClientProxy", "Method", "Show", "changing", "reading", "routing"]

Change = Callable[[Any, Call, dict[str, Any]], Effects["dict[str, Any] | None"]]
"""Makes other arguments for a call of a client, by their names; None to leave them."""
After = Callable[[Call, dict[str, Any]], Effects[None]]
Show = Callable[[Any], Any]
"""Returns an answer without what is ours."""
Method = Callable[[Any, type, str], Callable[..., Any]]
"""Makes a proxy's method of the client, the class that says what it takes, and the name."""


class ClientProxy:
    """Stands in for a client: attributes are read from it and set on it, private ones too."""

    __slots__ = ("_amips_client", "_amips_routed")

    _amips_client: Any
    _amips_routed: RoutedCollection

    def __new__(
        cls, client: Any, kind: type, methods: Mapping[str, Method], routed: RoutedCollection
    ) -> ClientProxy:
        """Make a proxy, of a class of its own: its methods are found there without a search."""
        made: dict[str, Any] = {
            name: staticmethod(wraps(getattr(kind, name))(method(client, kind, name)))
            for name, method in methods.items()
            if hasattr(kind, name)
        }
        proxy: ClientProxy = object.__new__(type(cls.__name__, (cls,), {"__slots__": (), **made}))
        object.__setattr__(proxy, "_amips_client", client)
        object.__setattr__(proxy, "_amips_routed", routed)
        return proxy

    @property
    def amips_router(self) -> LearnedRouter | None:
        """The router; None while it waits for a collection that is not there yet."""
        return self._amips_routed.router

    @property  # type: ignore[misc] # what isinstance asks
    def __class__(self) -> type:
        return self._amips_client.__class__  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._amips_client, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._amips_client, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._amips_client, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._amips_client), "amips_router"})

    def __repr__(self) -> str:
        return f"<routed {self._amips_client!r}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "A routed client holds connections and threads and cannot be pickled or copied; make "
            "one in every process."
        )


def routing(dialect: Dialect, routed: RoutedCollection, show: Show) -> Method:
    """Answer a method's calls through the router, where the dialect understands them."""

    def make(client: Any, kind: type, name: str) -> Callable[..., Any]:
        arguments = Arguments(kind, name)

        def read(args: Any, kwargs: Any) -> RoutableCall | None:
            try:
                named = arguments.named(args, kwargs)
                if named is None:
                    return None
                stance = routed.stance(named.get("collection_name"))
                call = None if stance is Stance.LEAVE else dialect.read(named)
                return None if stance is Stance.REST and call and routed.rests() else call
            except Exception as exc:  # noqa: BLE001 - the client answers whatever is wrong here
                routed.note(exc)
                return None

        def method(*args: Any, **kwargs: Any) -> Any:
            own, call = getattr(client, name), read(args, kwargs)
            if call is None:
                return shown(show, own(*args, **kwargs))
            return shown(show, run(search(routed, call, Call(own, args, kwargs))))

        async def method_async(*args: Any, **kwargs: Any) -> Any:
            own, call = getattr(client, name), read(args, kwargs)
            if call is None:
                return shown(show, await own(*args, **kwargs))
            effects = search(routed, call, Call(own, args, kwargs))
            return shown(show, await run_async(effects, None))

        return method_async if iscoroutinefunction(getattr(kind, name)) else method

    return make


def changing(
    routed: RoutedCollection,
    change: Change,
    after: After | None = None,
    show: Show = lambda response: response,
) -> Method:
    """Make a method's calls with other arguments, and do what they leave to do ``after`` them."""

    def make(client: Any, kind: type, name: str) -> Callable[..., Any]:
        arguments = Arguments(kind, name)

        def effects(args: Any, kwargs: Any) -> Effects[Any]:
            # A change may note something among its own arguments, and the plain call has to stay.
            plain = Call(getattr(client, name), args, {**kwargs})
            named, changed = arguments.named(args, kwargs), None
            try:
                if named is not None:
                    changed = yield from change(client, plain, named)
            except Exception as exc:
                if plain.raised(exc):
                    raise
                routed.note(exc)  # ours: the client says what is wrong
            response = yield plain if changed is None else plain.instead(changed)
            try:
                if named is not None and after is not None:
                    yield from after(plain, named)
            except Exception as exc:  # noqa: BLE001 - it has been written, as the client does it
                routed.note(exc)
            return response

        def method(*args: Any, **kwargs: Any) -> Any:
            return shown(show, run(effects(args, kwargs)))

        async def method_async(*args: Any, **kwargs: Any) -> Any:
            return shown(show, await run_async(effects(args, kwargs), None))

        return method_async if iscoroutinefunction(getattr(kind, name)) else method

    return make


def reading(show: Show) -> Method:
    """Hide what is ours in what a method answers."""

    def make(client: Any, kind: type, name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            return shown(show, getattr(client, name)(*args, **kwargs))

        async def method_async(*args: Any, **kwargs: Any) -> Any:
            return shown(show, await getattr(client, name)(*args, **kwargs))

        return method_async if iscoroutinefunction(getattr(kind, name)) else method

    return make


def shown(show: Show, response: Any) -> Any:
    """Return an answer as the caller is to see it; one of an unknown form as it is."""
    try:
        return show(response)
    except (AttributeError, TypeError, IndexError):
        return response
