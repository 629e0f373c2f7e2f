"""Haystack's store for Milvus.

>>> from amips_plugins.integrations.haystack_milvus import (  # doctest: +SKIP
...     RoutedMilvusDocumentStore,
... )
>>> store = RoutedMilvusDocumentStore(  # doctest: +SKIP
...     connection_args={"uri": "docs.db"}, registry=models
... )

Importing this module needs the extra ``haystack-milvus``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amips_plugins.checks import check_target
from amips_plugins.errors import InvalidInput, require
from amips_plugins.integrations.common import milvus_router
from amips_plugins.proxies import route

if TYPE_CHECKING:
    from amips_plugins.router import LearnedRouter

__all__ = ["RoutedMilvusDocumentStore"]

_Store: Any = require("milvus_haystack", "haystack-milvus").MilvusDocumentStore


class RoutedMilvusDocumentStore(_Store):  # type: ignore[misc] # Haystack has no types
    """A ``MilvusDocumentStore`` that searches its embeddings through a router.

    Sparse and hybrid retrieval and everything else are the store's own as before. It can be saved
    with its pipeline.

    Parameters
    ----------
    *args, **kwargs
        As for ``MilvusDocumentStore``.
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
    CollectionError
        The collection cannot be served.
    """

    _milvus_client: Any

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
        options = {} if router else {"registry": registry}
        planner = milvus_router(
            self._milvus_client, self.collection_name, self._vector_field, router, options
        )
        self._milvus_client = route(self._milvus_client, planner, recall=recall)

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
        saved["init_parameters"] |= {"registry": self.registry, "recall": self.recall}
        return saved
