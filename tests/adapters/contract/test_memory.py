from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.collection import Collection, Hit, Id, SearchRequest
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, Metric
from tests.adapters.contract.collection_contract import CollectionContract


class TestMemoryCollection(CollectionContract):
    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        return MemoryCollection(keys, ids, metric, fields=[{"group": group} for group in groups])

    def group_filter(self, group: str) -> Callable[[Id, Mapping[str, Any]], bool]:
        return lambda _, fields: fields["group"] == group

    def add_without_cell(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        assert isinstance(collection, MemoryCollection)
        collection.upsert(ids, keys)

    def rewrite_in_place(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        assert isinstance(collection, MemoryCollection)
        collection._vectors[[collection._ids.index(key) for key in ids]] = keys

    def search_async(
        self, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> list[list[Hit]]:
        assert isinstance(collection, MemoryCollection)
        return asyncio.run(collection.search_async(None, request, plan))
