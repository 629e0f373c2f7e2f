"""The contract where cells have shard keys; a server's own is in ``integration_tests``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from qdrant_client import models

from amips_plugins.adapters.qdrant import copied_layouts, new_generation
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import Storage
from amips_plugins.collection import Collection, Hit, Id, SearchRequest
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, Metric
from tests.adapters.contract.test_qdrant import QdrantContract
from tests.support.qdrant_cluster import AwaitedCluster, ClusterClient


class ShardsContract(QdrantContract):
    """With cells in shard keys; another client writes as the documentation tells it to."""

    storage: Storage | None = "shards"

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        """Open it by an alias, which is to lead to the copy."""
        name = super().make(keys, ids, metric, groups).info.name
        made = models.CreateAlias(collection_name=name, alias_name=f"{name}_live")
        self.client.update_collection_aliases([models.CreateAliasOperation(create_alias=made)])
        return self.opened(f"{name}_live")

    def opened(self, name: str) -> QdrantCollection:
        return QdrantCollection(self.client, name)

    def selectors(self, name: str) -> tuple[Any, list[Any]]:
        """The shard key of the overflow, and all others; nothing where there are none."""
        found = self.client.get_collection(name).config.params.sharding_method
        if found is not models.ShardingMethod.CUSTOM:
            return None, []
        keys = [one.key for one in self.client.list_shard_keys(name).shard_keys]
        (overflow,) = [key for key in keys if str(key).endswith("_overflow")]
        return overflow, [key for key in keys if key != overflow]

    def upsert(
        self, name: str, ids: Sequence[Id], keys: FloatArray, groups: Sequence[str] | None
    ) -> None:
        points = [
            models.PointStruct(
                id=ids[row],
                vector={self.vector: key.tolist()} if self.vector else key.tolist(),
                payload={"group": groups[row], "other": row} if groups else {},
            )
            for row, key in enumerate(keys)
        ]
        overflow, others = self.selectors(name)
        self.client.upsert(name, points, shard_key_selector=overflow, wait=True)
        if others:
            gone = models.PointIdsList(points=list(ids))
            self.client.delete(name, gone, shard_key_selector=others, wait=True)

    def rewrite_in_place(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        points = [
            models.PointVectors(id=one, vector={self.vector: key} if self.vector else key)
            for one, key in zip(ids, keys.tolist(), strict=True)
        ]
        name = collection.info.name
        overflow, others = self.selectors(name)
        for key in [overflow, *others]:
            there = self.client.retrieve(name, ids, shard_key_selector=key, with_payload=False)
            known = {one.id for one in there}
            some = [one for one in points if one.id in known]
            if some:
                self.client.update_vectors(name, some, shard_key_selector=key)


@pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
class TestQdrantShards(ShardsContract):
    """The calls that a server gets, answered by a local collection for every shard key."""

    @pytest.fixture(autouse=True)
    def _client(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(copied_layouts, "GRACE", 0.0)
        monkeypatch.setattr(new_generation, "_LOOK", 0.0)
        self.made = []
        self.client = ClusterClient()
        yield
        self.client.close()

    def opened(self, name: str) -> QdrantCollection:
        collection = super().opened(name)
        collection._local = False
        return collection

    def search_async(
        self, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> list[list[Hit]]:
        assert isinstance(collection, QdrantCollection)
        awaited: Any = AwaitedCluster(self.client)
        return asyncio.run(collection.search_async(awaited, request, plan))
