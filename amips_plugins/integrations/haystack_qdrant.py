"""Haystack's store for Qdrant.

>>> from amips_plugins.integrations.haystack_qdrant import (  # doctest: +SKIP
...     RoutedQdrantDocumentStore,
... )
>>> store = RoutedQdrantDocumentStore(url=url, index="docs", registry=models)  # doctest: +SKIP

Importing this module needs the extra ``haystack-qdrant``.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from amips_plugins.checks import check_target
from amips_plugins.errors import InvalidInput, require
from amips_plugins.integrations.common import unrouted
from amips_plugins.proxies import route
from amips_plugins.proxies.client import ClientProxy
from amips_plugins.proxies.late import LateRouter

if TYPE_CHECKING:
    from amips_plugins.router import LearnedRouter

__all__ = ["RoutedQdrantDocumentStore"]

_module = "haystack_integrations.document_stores.qdrant"
_Store: Any = require(_module, "haystack-qdrant").QdrantDocumentStore
_DENSE: str = require(f"{_module}.converters", "haystack-qdrant").DENSE_VECTORS_NAME


class RoutedQdrantDocumentStore(_Store):  # type: ignore[misc] # Haystack has no types
    """A ``QdrantDocumentStore`` that searches its embeddings through a router.

    Sparse and hybrid retrieval, groups and everything else are the store's own as before. It can
    be saved with its pipeline, and is built as lazily as the store is.

    Parameters
    ----------
    *args, **kwargs
        As for ``QdrantDocumentStore``.
    registry
        Where to find the bundle: a folder or an fsspec URL; left out, ``$AMIPS_REGISTRY`` or the
        folder ``registry``.
    recall
        Recall@k to aim at, in (0, 1]; left out, the bundle's own target.
    router
        A router of the collection, in place of one made from the registry. A store that has one
        cannot be saved.

    Raises
    ------
    InvalidInput
        The recall is no share, or both a registry and a router are given.
    """

    _client: Any
    _async_client: Any

    def __init__(
        self,
        *args: Any,
        registry: str | None = None,
        recall: float | None = None,
        router: LearnedRouter | None = None,
        **kwargs: Any,
    ) -> None:
        check_target(recall, None)
        if registry is not None and router is not None:
            raise InvalidInput("Give the store a registry or a router, not both.")
        super().__init__(*args, **kwargs)
        self.registry = registry
        self.recall = recall
        self._router = router
        self._planner: LearnedRouter | LateRouter = router or LateRouter(self.index, self._plan)

    # What is saved is read from the signature.
    __init__.__signature__ = (  # type: ignore[attr-defined]
        lambda ours, theirs: ours.replace(
            parameters=[
                *theirs.parameters.values(),
                *(ours.parameters[name] for name in ("registry", "recall")),
            ]
        )
    )(inspect.signature(__init__), inspect.signature(_Store.__init__))

    def to_dict(self) -> dict[str, Any]:
        """Return what the store can be made of again.

        Raises
        ------
        InvalidInput
            It was given a router.
        """
        if self._router is not None:
            raise InvalidInput(
                "A store with a router of its own cannot be saved; give it the registry instead."
            )
        saved: dict[str, Any] = super().to_dict()
        return saved

    def _initialize_client(self) -> None:
        super()._initialize_client()
        if not isinstance(self._client, ClientProxy):
            self._client = route(self._client, self._planner, recall=self.recall)

    async def _initialize_async_client(self) -> None:
        await super()._initialize_async_client()
        if not isinstance(self._async_client, ClientProxy):
            self._async_client = route(self._async_client, self._planner, recall=self.recall)

    def _plan(self) -> LearnedRouter:
        from amips_plugins.adapters.qdrant import QdrantCollection
        from amips_plugins.router import LearnedRouter

        self._initialize_client()  # the asynchronous one may be alone so far
        field = _DENSE if self.use_sparse_embeddings else ""
        collection = QdrantCollection(unrouted(self._client), self.index, field)
        return LearnedRouter(collection, registry=self.registry)
