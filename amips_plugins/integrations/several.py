"""What the retrievers over several stores have in common, whichever framework they are of."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from amips_plugins.collection import Collection, Hit, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.stores import STORES, StoreKind
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.routing.checks import as_search
from amips_plugins.routing.effects import Effects, run, run_async
from amips_plugins.routing.hits import Hits
from amips_plugins.routing.router import LearnedRouter

__all__ = ["SOURCE", "Finder", "Found", "Sources", "document_of", "kind_of"]

SOURCE = "amips_collection"
"""Under what a document's metadata names the store that it is of."""

_DOCUMENT = "document"  # the field of a hit that holds the framework's own

Found = Iterable[tuple[str, float, Any]]


@dataclass(frozen=True)
class Finder:
    """How one store is searched: a vector, k and a filter give ids, scores and documents.

    ``later`` is the same for tasks; None where the store can only block.
    """

    now: Callable[[list[float], int, Any], Found]
    later: Callable[[list[float], int, Any], Awaitable[Found]] | None = None


class _StoreCollection:
    """A store's collection, searched by the store itself, so that hits bring its documents."""

    def __init__(self, inner: Collection, finder: Finder) -> None:
        self._inner = inner
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def current(self) -> Any:
        """Follow the collection."""
        now = self._inner.current()
        return self if now is self._inner else _StoreCollection(now, self._finder)

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:  # noqa: ARG002 - one of several is searched natively
        """Search the store."""
        return [
            _hits(self._finder.now(query.tolist(), request.k, request.filter))
            for query in request.queries
        ]

    async def search_async(
        self,
        client: object,  # noqa: ARG002 - as above
        request: SearchRequest,
        plan: QueryPlan = NATIVE,  # noqa: ARG002 - as above
    ) -> list[list[Hit]]:
        """Search the store through its own asynchronous methods."""
        later: Any = self._finder.later
        calls = [later(query.tolist(), request.k, request.filter) for query in request.queries]
        return [_hits(found) for found in await asyncio.gather(*calls)]


class Sources:
    """Several stores, and the router that chooses among them.

    Parameters
    ----------
    framework
        The beginning of the names of the integrations that its stores may be of.
    stores
        The stores by name.
    finder
        How a store of a kind is searched.
    over
        Arguments of ``LearnedRouter.over``.
    """

    def __init__(
        self,
        framework: str,
        stores: Mapping[str, Any],
        finder: Callable[[StoreKind, Any], Finder],
        over: Mapping[str, Any],
    ) -> None:
        if not isinstance(stores, Mapping) or not stores:
            raise InvalidInput("Pass the stores as a mapping that names them, one or more.")
        members: dict[str, Any] = {}
        self._clients: dict[str, Any] = {}
        for name, store in stores.items():
            kind = kind_of(framework, store)
            found = finder(kind, store)
            members[name] = _StoreCollection(kind.opened(store), found)
            if found.later is not None:
                self._clients[name] = store
        self.router = LearnedRouter.over(members, **over)

    def find(self, vector: Any, k: int, recall: float | None, condition: Any) -> Hits:
        """Search the stores that the router chooses."""
        (hits,) = run(self._effects(vector, k, recall, condition))
        return hits

    async def find_later(self, vector: Any, k: int, recall: float | None, condition: Any) -> Hits:
        """Do the same in tasks."""
        (hits,) = await run_async(self._effects(vector, k, recall, condition), self._clients)
        return hits

    def _effects(
        self, vector: Any, k: int, recall: float | None, condition: Any
    ) -> Effects[list[Hits]]:
        if recall == 1.0:
            raise InvalidInput("A store finds as its index does; pass a recall below 1.")
        dim = self.router.collection.info.dim
        request, target, _ = as_search(dim, vector, k, recall, None, condition, (), None, None)
        # A filter is the store's, which no collection could be asked by beside it.
        return self.router.search_effects(request, target, sampled=condition is None)


def document_of(hit: Hit) -> Any:
    """Return what the store found."""
    return hit.fields[_DOCUMENT]


def kind_of(framework: str, store: object) -> StoreKind:
    """Say which integration a store is of, or raise ``InvalidInput``."""
    kinds = [kind for name, kind in STORES.items() if name.startswith(framework)]
    for kind in kinds:
        if kind.takes(store):
            return kind
    known = " or ".join(f"a {kind.store} of {kind.module}" for kind in kinds)
    raise InvalidInput(f"A {type(store).__name__} is no store of this framework; pass {known}.")


def _hits(found: Found) -> list[Hit]:
    return [Hit(key, float(score), {_DOCUMENT: document}) for key, score, document in found]
