"""Qdrant's custom shard keys over the client's local mode, which has none.

A shard key is a local collection; reads go over those that are asked and are merged as a server
merges them (an id once in a page, twice in a count; equal hits once in an answer), writes that
name no shard key are refused. Of one node in cluster mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse
from qdrant_client.http.models import QueryResponse

__all__ = ["AwaitedCluster", "ClusterClient", "refusal"]

_SEPARATOR = "~shard~"
_SELECTED = {
    "upsert": "upsert",
    "delete": "delete",
    "set_payload": "set_payload",
    "clear_payload": "clear_payload",
    "delete_payload": "delete_payload",
    "update_vectors": "update_vectors",
    "delete_vectors": "delete_vectors",
}


def refusal(reason: str) -> UnexpectedResponse:
    """What a server answers to what it does not understand."""
    content = f'{{"status":{{"error":"Wrong input: {reason}"}}}}'.encode()
    return UnexpectedResponse(400, "Bad Request", content, httpx.Headers())


_Client: Any = QdrantClient


class ClusterClient(_Client):  # type: ignore[misc] # its methods take what tests pass
    """Has what a client has; collections may have shard keys."""

    def __init__(self, *, nodes: Sequence[int] = (1,)) -> None:
        super().__init__(":memory:")
        self.local = QdrantClient(":memory:")
        self._client = self.local._client
        self.nodes = nodes
        self.away: set[int] = set()
        """Nodes that take no messages."""
        self.placed: dict[tuple[str, Any], list[int] | None] = {}
        self.created: dict[str, dict[str, Any]] = {}
        self.asked: list[Any] = []
        """The shard keys of every search, in order."""
        self.shards: dict[str, dict[Any, str]] = {}

    def _name(self, name: str) -> str:
        aliases = {one.alias_name: one.collection_name for one in self.local.get_aliases().aliases}
        return aliases.get(name, name)

    def _all(self, name: str) -> dict[Any, str] | None:
        return self.shards.get(self._name(name))

    def _chosen(self, name: str, selector: Any, *, write: bool = False) -> list[Any]:
        shards = self._all(name)
        if shards is None:
            if selector is not None:
                raise refusal("there are no shard keys")
            return [None]
        if selector is None:
            if write:
                raise refusal("Shard key not specified")
            return list(shards)
        keys = selector if isinstance(selector, list) else [selector]
        for key in keys:
            if key not in shards:
                raise refusal(f"Shard key {key} not found")
        return list(keys)

    def _at(self, name: str, key: Any) -> str:
        return self._name(name) if key is None else (self._all(name) or {})[key]

    # --- collections ---------------------------------------------------------------------------

    def create_collection(self, collection_name: str, *args: Any, **more: Any) -> bool:
        self.created[collection_name] = more
        made = bool(self.local.create_collection(collection_name, *args, **more))
        if more.get("sharding_method") is models.ShardingMethod.CUSTOM:
            self.shards[collection_name] = {}
        return made

    def create_shard_key(
        self, collection_name: str, shard_key: Any, placement: list[int] | None = None, **_: Any
    ) -> bool:
        collection_name = self._name(collection_name)
        if collection_name not in self.shards:
            raise refusal("Auto sharding method")
        if shard_key in self.shards[collection_name]:
            raise refusal(f"Sharding key {shard_key} already exists")
        child = f"{collection_name}{_SEPARATOR}{shard_key}"
        vectors = self.local.get_collection(collection_name).config.params.vectors
        self.local.create_collection(child, vectors)
        self.shards[collection_name][shard_key] = child
        self.placed[collection_name, shard_key] = placement
        return True

    def delete_shard_key(self, collection_name: str, shard_key: Any) -> bool:
        self.local.delete_collection(self.shards[self._name(collection_name)].pop(shard_key))
        return True

    def list_shard_keys(self, collection_name: str) -> models.ShardKeysResponse:
        found = [models.ShardKeyDescription(key=key) for key in self._all(collection_name) or ()]
        return models.ShardKeysResponse(shard_keys=found)

    def cluster_status(self) -> Any:
        if not self.nodes:
            return models.ClusterStatusOneOf(status="disabled")

        @dataclass
        class Peer:
            uri: str

        class Status:
            status = "enabled"
            peers = {str(one): Peer(f"http://{one}/") for one in self.nodes}  # noqa: RUF012
            message_send_failures = {f"http://{one}/": None for one in self.away}  # noqa: RUF012

        return Status()

    def get_collections(self) -> models.CollectionsResponse:
        found = self.local.get_collections().collections
        return models.CollectionsResponse(
            collections=[one for one in found if _SEPARATOR not in one.name]
        )

    def get_collection(self, collection_name: str) -> models.CollectionInfo:
        found, shards = self.local.get_collection(collection_name), self._all(collection_name)
        params = found.config.params
        created = self.created.get(self._name(collection_name), {})
        if created.get("shard_number"):
            params.shard_number = created["shard_number"]
        if shards is not None:
            params.sharding_method = models.ShardingMethod.CUSTOM
            found.points_count = sum(self.local.count(child).count for child in shards.values())
        return found

    def delete_collection(self, collection_name: str, **_: Any) -> bool:
        for child in self.shards.pop(collection_name, {}).values():
            self.local.delete_collection(child)
        return bool(self.local.delete_collection(collection_name))

    # --- reading -------------------------------------------------------------------------------

    def count(
        self,
        collection_name: str,
        count_filter: Any = None,
        shard_key_selector: Any = None,
        **more: Any,
    ) -> models.CountResult:
        keys = self._chosen(collection_name, shard_key_selector)
        counts = [
            self.local.count(self._at(collection_name, key), count_filter, **more).count
            for key in keys
        ]
        return models.CountResult(count=sum(counts))

    def scroll(
        self,
        collection_name: str,
        scroll_filter: Any = None,
        limit: int = 10,
        shard_key_selector: Any = None,
        **more: Any,
    ) -> tuple[list[models.Record], Any]:
        found: dict[Any, models.Record] = {}
        for key in self._chosen(collection_name, shard_key_selector):
            records, _ = self.local.scroll(
                self._at(collection_name, key), scroll_filter, limit=limit + 1, **more
            )
            for record in records:
                record.shard_key = key
                found.setdefault(record.id, record)
        ids = sorted(found, key=lambda one: (isinstance(one, str), one))
        rest = ids[limit] if len(ids) > limit else None
        return [found[one] for one in ids[:limit]], rest

    def retrieve(
        self, collection_name: str, ids: Any, shard_key_selector: Any = None, **more: Any
    ) -> list[models.Record]:
        found = {}
        for key in self._chosen(collection_name, shard_key_selector):
            for record in self.local.retrieve(self._at(collection_name, key), ids, **more):
                record.shard_key = key
                found[record.id] = record
        return list(found.values())

    def query_points(
        self,
        collection_name: str,
        query: Any = None,
        limit: int = 10,
        offset: int | None = None,
        shard_key_selector: Any = None,
        **more: Any,
    ) -> QueryResponse:
        keys = self._chosen(collection_name, shard_key_selector)
        self.asked.append(keys)
        more.pop("search_params", None)
        depth, hits = limit + (offset or 0), []
        for key in keys:
            answer = self.local.query_points(
                self._at(collection_name, key), query, limit=depth, **more
            )
            for point in answer.points:
                point.shard_key = key
                hits.append(point)
        vectors = self.local.get_collection(collection_name).config.params.vectors
        one = vectors.get(more.get("using") or "") if isinstance(vectors, dict) else vectors
        closer = one is not None and one.distance is models.Distance.EUCLID
        hits.sort(key=lambda hit: (hit.score if closer else -hit.score, str(hit.id)))
        once = [hit for at, hit in enumerate(hits) if at == 0 or not _equal(hit, hits[at - 1])]
        return QueryResponse(points=once[offset or 0 : depth])

    def query_batch_points(
        self, collection_name: str, requests: Sequence[models.QueryRequest], **more: Any
    ) -> list[QueryResponse]:
        return [
            self.query_points(
                collection_name,
                one.query,
                limit=one.limit or 10,
                using=one.using,
                prefetch=one.prefetch,
                query_filter=one.filter,
                with_payload=one.with_payload or False,
                shard_key_selector=one.shard_key,
                **more,
            )
            for one in requests
        ]

    # --- writing -------------------------------------------------------------------------------

    def upsert(
        self, collection_name: str, points: Any, shard_key_selector: Any = None, **more: Any
    ) -> None:
        for key in self._chosen(collection_name, shard_key_selector, write=True):
            self.local.upsert(self._at(collection_name, key), points, **more)

    def delete(
        self,
        collection_name: str,
        points_selector: Any,
        shard_key_selector: Any = None,
        **more: Any,
    ) -> None:
        for key in self._chosen(collection_name, shard_key_selector, write=True):
            self.local.delete(self._at(collection_name, key), points_selector, **more)

    def set_payload(
        self,
        collection_name: str,
        payload: Any,
        points: Any,
        shard_key_selector: Any = None,
        **more: Any,
    ) -> None:
        for key in self._chosen(collection_name, shard_key_selector, write=True):
            self.local.set_payload(self._at(collection_name, key), payload, points, **more)

    def update_vectors(
        self, collection_name: str, points: Any, shard_key_selector: Any = None, **more: Any
    ) -> None:
        for key in self._chosen(collection_name, shard_key_selector, write=True):
            known = {
                one.id
                for one in self.local.retrieve(
                    self._at(collection_name, key), [p.id for p in points]
                )
            }
            some = [one for one in points if one.id in known]
            if some:
                self.local.update_vectors(self._at(collection_name, key), some, **more)

    def batch_update_points(
        self, collection_name: str, update_operations: Sequence[Any], **more: Any
    ) -> None:
        for one in update_operations:
            inner = next(getattr(one, field) for field in _SELECTED if hasattr(one, field))
            for key in self._chosen(collection_name, getattr(inner, "shard_key", None), write=True):
                self.local.batch_update_points(self._at(collection_name, key), [one], **more)


class AwaitedCluster:
    """The same for those who await what it answers."""

    def __init__(self, client: ClusterClient) -> None:
        self.client = client

    def __getattr__(self, collection_name: str) -> Any:
        async def call(*args: Any, **more: Any) -> Any:
            return getattr(self.client, collection_name)(*args, **more)

        return call


def _equal(one: models.ScoredPoint, other: models.ScoredPoint) -> bool:
    return (one.id, one.score) == (other.id, other.score)
