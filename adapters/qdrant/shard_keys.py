"""Custom shard keys of Qdrant, as its users have made them, as the cells of a plan.

A search names the chosen ones (``shard_key_selector``), and those that the router does not know.
Every shard has its own graph, so that a search of some of them is the server's own.

Importing this module needs the extra ``qdrant``.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.given import GivenLayouts
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.failures import translated_errors
from amips_plugins.adapters.qdrant.point_collection import PointCollection
from amips_plugins.adapters.qdrant.search import search_params
from amips_plugins.adapters.qdrant.store import ServerStore
from amips_plugins.collection import Cursor, Hit, KeyBatch, SearchRequest, check_layout
from amips_plugins.errors import require
from amips_plugins.partitions import Partitions
from amips_plugins.plan import NATIVE, QueryPlan

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["InShardKeys"]

_STAY = 1.0  # seconds in which a new shard key is not seen

ShardKey = int | str


class InShardKeys(QdrantCollection):
    """A Qdrant collection in its users' own shard keys (see ``QdrantCollection.partitioned``)."""

    _given: Partitions
    _listed: tuple[float, tuple[ShardKey, ...]] = (float("-inf"), ())
    break_even = 1.0  # natively, every shard is searched, too

    @classmethod
    def of(cls, whole: QdrantCollection, given: Partitions) -> InShardKeys:
        """Return an object of the same collection in these shard keys."""
        view = cls.__new__(cls)
        view.__dict__.update(whole.__dict__)
        view._given = given
        return view

    def partitioned(  # type: ignore[override]  # of the kind that it was made from
        self, partitions: Partitions | None
    ) -> QdrantCollection:
        """Return an object of the same points in other cells."""
        whole = QdrantCollection.__new__(QdrantCollection)
        whole.__dict__.update(self.__dict__)
        whole._given = None
        return whole.partitioned(partitions)

    def current(self) -> QdrantCollection:
        """Look at the database again."""
        now = super().current()
        return self if now is self else InShardKeys.of(now, self._given)

    @property
    def shards(self) -> Any:
        """The shard keys that there are, as they were a moment ago."""
        if time.monotonic() - self._listed[0] > _STAY:
            with translated_errors(self._server):
                found = self._client.list_shard_keys(self._name).shard_keys or ()
            self._listed = time.monotonic(), tuple(sorted((one.key for one in found), key=str))
        return self._listed[1]

    def asked_shards(self, plan: QueryPlan) -> list[ShardKey] | None:
        """Return the shard keys that a search of one query asks; None for all."""
        return None if plan.cells is None else self._asked(plan.cells[0].tolist())

    def _asked(self, cells: Sequence[int]) -> list[ShardKey] | None:
        """Return the chosen ones that are there, and all that are not known."""
        left_aside = set(self._given.values).difference(self._given.chosen(cells))
        there = self.shards
        return [one for one in there if one not in left_aside] or list(there)

    def _planned(
        self, request: SearchRequest, plan: QueryPlan, client: Any
    ) -> tuple[list[int], list[models.QueryRequest], int | None]:
        check_layout(plan, self.layout(), self._name)
        if plan.cells is None:
            return super()._planned(request, plan, client)
        rows, queries, timeout = super()._planned(request, NATIVE, client)
        asked = [self._asked(cells) for cells in plan.cells.tolist()]
        for row, query in zip(rows, queries, strict=True):
            query.shard_key = asked[row]
        return rows, queries, timeout

    async def search_async(
        self, client: AsyncQdrantClient, request: SearchRequest, plan: QueryPlan = NATIVE
    ) -> list[list[Hit]]:
        """Search as ``search`` does, through an ``AsyncQdrantClient``."""
        if plan.cells is not None:
            await asyncio.to_thread(lambda: self.shards)  # which may ask the server
        return await super().search_async(client, request, plan)

    def narrowed(
        self,
        request: SearchRequest,
        plan: QueryPlan,
        condition: models.Filter | None,
        *,
        over_grpc: bool = False,  # noqa: ARG002 - there is nothing to write
    ) -> tuple[Any, Any]:
        """Return filter and parameters as they are: shard keys are no part of them."""
        check_layout(plan, self.layout(), self._name)
        return condition, search_params(request, NATIVE, exact=False)

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:
        """Say why a plan would change what a request means, or None."""
        return PointCollection.unroutable(self, request, rewritten=rewritten)

    def overflow(self) -> int:
        """Return the number of points of shard keys that are not known."""
        return sum(self._in(key).count() for key in self.shards if key not in self._given.values)

    @property
    def layouts(self) -> Any:
        """Says how many keys each shard key has."""

        def sizes() -> list[int]:
            there = self.shards
            return [self._in(key).count() if key in there else 0 for key in self._given.values]

        return GivenLayouts(self, self._given, sizes)

    def _in(self, key: ShardKey) -> ServerStore:
        return ServerStore(self._client, self._name, self.info.field, self._server, key)

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read shard key by shard key; a cursor is that, and the id behind which to go on."""
        first, behind = (None, None) if after is None else json.loads(str(after))
        for key in self.shards:
            if first is not None and str(key) < str(first):
                continue
            one = self.partitioned(None)
            one._shard_key = key
            for batch in one.scan(batch_size, behind if key == first else None):
                cursor = json.dumps([key, batch.cursor])
                yield replace(batch, cursor=cursor, values=[key] * len(batch.ids))
