"""Every kind of store that can be routed, and the one way to do it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from amips_plugins.collection import Collection
from amips_plugins.errors import InvalidInput, require
from amips_plugins.proxies import route
from amips_plugins.proxies.client import ClientProxy
from amips_plugins.proxies.late import LateRouter
from amips_plugins.routing.async_router import AsyncLearnedRouter
from amips_plugins.routing.checks import check_target
from amips_plugins.routing.router import LearnedRouter

__all__ = ["STORES", "StoreKind"]

_Store = TypeVar("_Store")
_T = TypeVar("_T")
_Given = LearnedRouter | AsyncLearnedRouter | None


@dataclass(frozen=True, slots=True)
class StoreKind:
    """Where the stores of one framework keep their clients, and what they search.

    Attributes
    ----------
    name
        The integration's module; with dashes, the extra that it needs.
    module, store
        The framework's module, and its class in there.
    database
        ``"milvus"`` or ``"qdrant"``.
    client, clients
        Attributes: the ordinary client as it is read, and every client as it is replaced, the
        ordinary one first.
    collection, field
        Attributes that name the collection and its dense vector.
    """

    name: str
    module: str
    store: str
    database: str
    client: str
    clients: tuple[str, ...]
    collection: str
    field: str

    def routed(
        self,
        store: _Store,
        router: LearnedRouter | AsyncLearnedRouter | None = None,
        *,
        recall: float | None = None,
        **options: Any,
    ) -> _Store:
        """Have a store search its dense vectors through a router, synchronously or not.

        Sparse and hybrid retrieval, groups and everything else are the store's own as before; so
        is MMR on Qdrant, while on Milvus the store chooses among the hits of a dense search, which
        is routed. Haystack's store for Qdrant still opens its clients when it first needs them.

        Parameters
        ----------
        store
            A store of the integration's framework, built in any way. Its clients are replaced by
            proxies.
        router
            A router of the store's collection; left out, one is made with the store's client, and
            with the first search where the collection is not there yet. A store that has an
            asynchronous client alone needs one.
        recall
            Recall@k to aim at, in (0, 1]; left out, the bundle's own target.
        **options
            Arguments of the ``LearnedRouter`` that is made, such as ``registry``.

        Returns
        -------
        object
            The same store. The client's ``amips_router`` is the router.

        Raises
        ------
        MissingExtra
            The framework is not installed.
        InvalidInput
            It is no such store, or an argument cannot be used.
        CollectionError
            The store's collection has no dense vector that can be served.
        """
        kind: type = getattr(require(self.module, self.name.replace("_", "-")), self.store)
        if not isinstance(store, kind):
            raise InvalidInput(
                f"{self.name}.routed routes a {kind.__module__.partition('.')[0]} {self.store}, "
                f"but was given a {type(store).__name__}."
            )
        check_target(recall, None)
        self._attach(store, router, recall, options)
        return store

    def takes(self, store: object) -> bool:
        """Tell whether a store is of this kind; nothing is imported."""
        return any(
            kind.__name__ == self.store and f"{kind.__module__}.".startswith(f"{self.module}.")
            for kind in type(store).__mro__
        )

    def opened(self, store: Any) -> Collection:
        """Return a store's collection, searched through the store's own client."""
        client = _unrouted(getattr(store, self.client))
        if client is None:
            raise InvalidInput(
                "The store has an asynchronous client alone, and a router looks at its collection "
                "through an ordinary one; give the store a client= too."
            )
        return self._open(client, getattr(store, self.collection), getattr(store, self.field))

    def _attach(
        self, store: Any, given: _Given, recall: float | None, options: Mapping[str, Any]
    ) -> None:
        """Replace the store's clients."""
        client = _unrouted(getattr(store, self.client))
        if client is None and given is None:
            raise InvalidInput(
                "The store has an asynchronous client alone, and a router looks at its collection "
                "through an ordinary one; pass a router, or give the store a client= too."
            )
        name = getattr(store, self.collection)

        def make() -> LearnedRouter:
            return LearnedRouter(self._open(client, name, getattr(store, self.field)), **options)

        router = _given_or_late(given, options, name, make)
        if isinstance(router, LateRouter) and self._there(client, name):
            router = make()
        for attribute in self.clients:
            own = _unrouted(getattr(store, attribute))
            if own is not None:
                setattr(store, attribute, route(own, router, recall=recall))

    def _there(self, client: Any, name: str) -> bool:
        has = client.has_collection if self.database == "milvus" else client.collection_exists
        return bool(has(name))

    def _open(self, client: Any, name: str, field: Any) -> Collection:
        named = field if isinstance(field, str) else None  # a list of a hybrid store
        if self.database == "milvus":
            from amips_plugins.adapters.milvus.collection import MilvusCollection

            return MilvusCollection(client, name, named)
        from amips_plugins.adapters.qdrant.collection import QdrantCollection

        return QdrantCollection(client, name, named)


class _LazyStoreKind(StoreKind):
    """Haystack's store for Qdrant: it opens its clients, and learns its vector, when first used."""

    __slots__ = ()

    def opened(self, store: Any) -> Collection:
        kind: Any = type(store)
        kind._initialize_client(store)
        converters = require(f"{self.module}.converters", "haystack-qdrant")
        field = converters.DENSE_VECTORS_NAME if store.use_sparse_embeddings else ""
        return self._open(_unrouted(store._client), getattr(store, self.collection), field)

    def _attach(
        self, store: Any, given: _Given, recall: float | None, options: Mapping[str, Any]
    ) -> None:
        kind: Any = type(store)
        for attribute in self.clients:
            setattr(store, attribute, _unrouted(getattr(store, attribute)))

        def make() -> LearnedRouter:
            return LearnedRouter(
                self.opened(store), **options
            )  # the asynchronous client may be alone

        router = _given_or_late(given, options, getattr(store, self.collection), make)

        def replace_client(attribute: str) -> None:
            if not isinstance(getattr(store, attribute), ClientProxy):
                client = getattr(store, attribute)
                setattr(store, attribute, route(client, router, recall=recall))

        def initialise() -> None:
            kind._initialize_client(store)
            replace_client("_client")

        async def initialise_async() -> None:
            await kind._initialize_async_client(store)
            replace_client("_async_client")

        # Every method of the store calls one of these first.
        store._initialize_client = initialise
        store._initialize_async_client = initialise_async


def _unrouted(client: _T) -> _T:
    """Return the client itself, where a proxy stands in for it."""
    return client._amips_client if isinstance(client, ClientProxy) else client


def _given_or_late(
    router: _Given, options: Mapping[str, Any], name: str, make: Callable[[], LearnedRouter]
) -> LearnedRouter | LateRouter:
    """Return the router given, or one that is made with the first search."""
    if router is None:
        inspect.signature(LearnedRouter).bind(None, **options)  # or only a log would say so
        return LateRouter(name, make)
    if options:
        raise InvalidInput(
            f"A router was given, and {min(options)} to make another; pass one of the two."
        )
    return router.router if isinstance(router, AsyncLearnedRouter) else router


STORES = {
    kind.name: kind
    for kind in (
        StoreKind(
            name="langchain_qdrant",
            module="langchain_qdrant",
            store="QdrantVectorStore",
            database="qdrant",
            client="client",
            clients=("_client",),
            collection="collection_name",
            field="vector_name",
        ),
        StoreKind(
            name="langchain_milvus",
            module="langchain_milvus",
            store="Milvus",
            database="milvus",
            client="client",
            clients=("_milvus_client", "_async_milvus_client"),
            collection="collection_name",
            field="_vector_field",
        ),
        StoreKind(
            name="llama_index_qdrant",
            module="llama_index.vector_stores.qdrant",
            store="QdrantVectorStore",
            database="qdrant",
            client="_client",
            clients=("_client", "_aclient"),
            collection="collection_name",
            field="dense_vector_name",
        ),
        StoreKind(
            name="llama_index_milvus",
            module="llama_index.vector_stores.milvus",
            store="MilvusVectorStore",
            database="milvus",
            client="client",
            clients=("_milvusclient", "_async_milvusclient"),
            collection="collection_name",
            field="embedding_field",
        ),
        _LazyStoreKind(
            name="haystack_qdrant",
            module="haystack_integrations.document_stores.qdrant",
            store="QdrantDocumentStore",
            database="qdrant",
            client="_client",
            clients=("_client", "_async_client"),
            collection="index",
            field="",
        ),
        StoreKind(
            name="haystack_milvus",
            module="milvus_haystack",
            store="MilvusDocumentStore",
            database="milvus",
            client="client",
            clients=("_milvus_client",),
            collection="collection_name",
            field="_vector_field",
        ),
    )
}
"""One entry an integration, by its module's name."""
