"""What a collection of Qdrant's points is, whichever engine holds them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from amips_plugins.adapters.qdrant.cells import CellStore, LayoutRecord
from amips_plugins.adapters.qdrant.points import unroutable
from amips_plugins.collection import CollectionInfo, Failure, Hit, SearchRequest
from amips_plugins.plan import NATIVE, QueryPlan

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Found", "PointCollection"]


@dataclass(frozen=True, slots=True)
class Found:
    """What one look at the database found: a collection object stays on it."""

    info: CollectionInfo
    cells: LayoutRecord | None
    vectors: tuple[str, ...]


class PointCollection:
    """The common part of ``QdrantCollection`` and ``QdrantEdgeCollection``."""

    _kept: Found | None = None

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

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search by a plan."""
        raise NotImplementedError

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search by comparing with every point, unquantised; strict mode may refuse it."""
        return self.search(replace(request, params={"exact": True}))

    def layout(self) -> str | None:
        """Return the identifier of the complete cells of this vector, or None."""
        cells = self._found.cells
        return None if cells is None else cells.layout

    def overflow(self) -> int:
        """Return the number of points without a cell; 0 without a layout."""
        cells = self._found.cells
        return 0 if cells is None else self._store.overflow(cells)

    def close(self) -> None:
        """Release what this object opened; safe to call twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Return the collection itself; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()
