"""An object that behaves as another one, but for what its class defines."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from amips_plugins.proxies.calls import Dialect, RoutedMethod
from amips_plugins.proxies.late import LateRouter
from amips_plugins.routing.router import LearnedRouter

__all__ = ["ClientProxy"]


class ClientProxy:
    """Stands in for a client: attributes are read from it and set on it, private ones too.

    Parameters
    ----------
    client
        The client.
    kind
        The class that says what its methods take; a subclass of the client's may take ``*args``.
    dialects
        What is particular to the database, by the name of each method that is routed.
    router, recall
        As for ``route``.
    """

    __slots__ = ("_amips_client", "_amips_routing")

    _amips_client: Any
    _amips_routing: Mapping[str, RoutedMethod]

    def __init__(
        self,
        client: Any,
        kind: type,
        dialects: Mapping[str, Dialect],
        router: LearnedRouter | LateRouter,
        recall: float | None,
    ) -> None:
        routing = {
            method: RoutedMethod(
                getattr(client, method), _parameters(kind, method), dialect, router, recall
            )
            for method, dialect in dialects.items()
        }
        object.__setattr__(self, "_amips_client", client)
        object.__setattr__(self, "_amips_routing", routing)

    @property
    def amips_router(self) -> LearnedRouter | None:
        """The router; None while it waits for a collection that is not there yet."""
        return next(iter(self._amips_routing.values())).router

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


def _parameters(kind: type, method: str) -> inspect.Signature:
    """Return what a method takes, without ``self``."""
    takes = inspect.signature(getattr(kind, method))
    return takes.replace(parameters=list(takes.parameters.values())[1:])
