"""What a collection of Qdrant's points is, whichever engine holds them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.given import GivenLayouts
from amips_plugins.adapters.qdrant.cell_shards import CellShards
from amips_plugins.adapters.qdrant.cells import CellStore, LayoutRecord
from amips_plugins.adapters.qdrant.codes import Codes
from amips_plugins.adapters.qdrant.points import listed, plain_id, unroutable
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.collection import CollectionInfo, Failure, Hit, KeyBatch, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions, column
from amips_plugins.plan import NATIVE, QueryPlan

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Found", "PointCollection", "ServerFound"]

_TELLING = ("integer", "keyword", "uuid")  # indexes of values that tell partitions apart


@dataclass(frozen=True, slots=True)
class Found:
    """What one look at the database found: a collection object stays on it."""

    info: CollectionInfo
    cells: LayoutRecord | None
    vectors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServerFound(Found):
    """The same of a collection on a server; what is not compared says how it is asked."""

    limits: Limits = field(compare=False)
    custom_shards: bool
    tenant_keys: frozenset[str] | None
    has_graph: bool = field(default=False, compare=False)
    codes: Codes | None = field(default=None, compare=False)
    on_disk: bool = field(default=False, compare=False)
    shards: CellShards | None = None
    strays: bool = field(default=True, compare=False)


class PointCollection:
    """The common part of ``QdrantCollection`` and ``QdrantEdgeCollection``."""

    _kept: Found | None = None
    _given: Partitions | None = None
    _indexed_only = True  # whether a filter by what has no index reads every payload

    def _look(self) -> Found:
        raise NotImplementedError

    @property
    def _store(self) -> CellStore:
        raise NotImplementedError

    @property
    def _found(self) -> Found:
        if self._kept is None:
            self._kept = self._look()
        return self._kept

    @property
    def info(self) -> CollectionInfo:
        """What the collection is; the first use asks the database.

        The schema lists the payload keys that have an index, the only ones Qdrant knows of; local
        mode knows none.
        """
        return self._found.info

    @property
    def timeout(self) -> float | None:
        """Seconds that the client gives a call; None without an end."""
        return None

    exhaustive = True

    @property
    def max_candidates(self) -> int | None:
        """How many candidates a rewritten query may fetch; None for any number."""
        return None

    def failure(self, exc: BaseException) -> Failure:  # noqa: ARG002 - an engine in the process has no outage
        """Say what an error of a search means."""
        return Failure.OTHER

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:  # noqa: ARG002 - both plans search exactly
        """Say why a plan would change what a request means, or None."""
        return unroutable(request.params)

    def count(self) -> int:
        """Return the exact number of points that have this vector."""
        raise NotImplementedError

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search by a plan."""
        raise NotImplementedError

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search by comparing with every point, unquantised; strict mode may refuse it."""
        return self.search(replace(request, params={"exact": True}))

    def _codes_on_disk(self) -> Codes | None:
        """Return how codes are searched of vectors that lie on a disk; None for others."""
        raise NotImplementedError

    def thorough(self, request: SearchRequest) -> list[list[Hit]]:
        """Search all codes, or as far as the graph goes, where vectors lie on a disk."""
        codes = self._codes_on_disk()
        if codes is None:
            return self.exact(request)
        return self.search(replace(request, params=codes.thorough()))

    @property
    def _cells(self) -> LayoutRecord | Partitions | None:
        """What the cells of a plan are."""
        return self._given or self._found.cells

    def asked_shards(self, plan: QueryPlan) -> list[int | str] | None:  # noqa: ARG002 - cells in shard keys say which
        """Return the shard keys that a search of one query asks; None for all."""
        return None

    def layout(self) -> str | None:
        """Return the identifier of the complete cells of this vector, or None."""
        cells = self._cells
        return None if cells is None else cells.layout

    def overflow(self) -> int:
        """Return the number of points without a cell; 0 without a layout."""
        if self._given is not None:
            return self._store.count_values(self._given.key, self._given.values, others=True)
        cells = self._found.cells
        return 0 if cells is None else self._store.overflow(cells)

    @property
    def partitions(self) -> Partitions | None:
        """The payload key whose values it takes for cells, or None."""
        return self._given

    def partitioned(self, partitions: Partitions | None) -> Self:
        """Return an object of the same points whose cells are the values of a payload key.

        Raises ``InvalidInput`` where no key is named, or it has no index of keywords or whole
        numbers.
        """
        if partitions is not None:
            self._check_field(partitions.field)
        view = copy.copy(self)
        view._given = partitions
        return view

    def _check_field(self, field: str | None) -> None:
        schema, name = self.info.schema, self.info.name
        telling = [key for key, kind in schema.items() if kind in _TELLING]
        if field is None:
            raise InvalidInput(
                f"The points of {name!r} are told apart by a payload key; name one that has an "
                f"index: {listed(telling)}."
            )
        if field in schema or self._indexed_only:
            kind = schema.get(field)
            if kind not in _TELLING:
                raise InvalidInput(
                    f"The payload key {field!r} of {name!r} has "
                    f"{'no index' if kind is None else f'an index of the kind {kind!r}'}, and "
                    f"partitions need one of keywords or integers; create it, or name one of "
                    f"{listed(telling)}."
                )

    def _with_values(self, batches: Iterator[tuple[KeyBatch, Sequence[Any]]]) -> Iterator[KeyBatch]:
        """Say of keys that were read where they belong, if it is asked for."""
        for batch, records in batches:
            if self._given is None:
                yield batch
                continue
            payloads = {plain_id(one.id): one.payload for one in records}
            values = column(self._given.key, [payloads[key] for key in batch.ids])
            yield replace(batch, values=values)

    def _given_layouts(self, given: Partitions) -> GivenLayouts:
        store = self._store

        def sizes() -> list[int]:
            return [store.count_values(given.key, [value]) for value in given.values]

        return GivenLayouts(self, given, sizes)

    def close(self) -> None:
        """Release what this object opened; safe to call twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Return the collection itself; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()
