"""A request and a plan as requests of Qdrant's engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW, group_by_cells
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.codes import Codes
from amips_plugins.adapters.qdrant.points import RESERVED, listed
from amips_plugins.adapters.qdrant.wide_search import wide_effort
from amips_plugins.adapters.qdrant_edge.cell_graphs import CellGraphs
from amips_plugins.adapters.qdrant_edge.filters import Outside, among, both, in_cells
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.errors import InvalidInput, require
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import BoolArray, FloatArray

if TYPE_CHECKING:
    import qdrant_edge as edge
else:
    edge = require("qdrant_edge", "qdrant-edge")

__all__ = ["EdgeSearch"]


class EdgeSearch:
    """A request and a plan as the engine's own requests."""

    def __init__(
        self,
        request: SearchRequest,
        plan: QueryPlan,
        field: str,
        record: LayoutRecord | Partitions | None,
        everything: BoolArray,
        codes: Codes | None = None,
        *,
        has_graph: bool = False,
    ) -> None:
        if request.filter is not None and not isinstance(request.filter, edge.Filter):
            raise InvalidInput(
                f"A Qdrant Edge filter is a qdrant_edge.Filter, but got "
                f"{type(request.filter).__name__}."
            )
        self.request = request
        self.record = None if plan.cells is None else record
        self._plan = plan
        self._everything = everything
        self._using = field or None
        asked = {**(request.params or {}), **(plan.params or {})}
        if isinstance(asked.get("quantization"), Mapping):  # a plan's own, in plain values
            asked["quantization"] = edge.QuantizationSearchParams(**asked["quantization"])
        self._params = _search_params(asked)
        # HNSW under the filter of a cell loses keys.
        self._exact = _search_params({**asked, "exact": True})
        self._codes = codes
        # Graphs know nothing of the payload, and serve who says how far to follow them.
        self.by_graphs = (
            isinstance(self.record, LayoutRecord)
            and bool(self.record.places)
            and plan.effort is not None
            and plan.rewritten is None
            and request.filter is None
            and not asked.get("exact")
        )
        if self.by_graphs:  # which cost the same however many keys are in them
            self._everything = np.zeros_like(everything)
        self._least = int(asked.get("hnsw_ef") or 0)
        if codes is not None:
            wide = edge.QuantizationSearchParams(rescore=True, oversampling=codes.oversampling)
            asked = {"quantization": wide, **asked}
            self._by_codes = _search_params(asked)
        effort = wide_effort(request.k, plan.recall, self._least, None) if has_graph else None
        self._all = None if effort is None else _search_params({**asked, "hnsw_ef": effort})

    def _scan(self, row: int) -> edge.SearchParams | None:
        """Return the parameters of a search of cells: by their codes where these are scanned."""
        share = None if self._plan.shares is None else float(self._plan.shares[row])
        scanned = self._codes is not None and self._codes.scan(share)
        return self._by_codes if scanned else self._exact

    def candidates(self, rows: range, graphs: CellGraphs) -> dict[int, set[Id]]:
        """Ask the graphs of the cells of some rows which points to look at."""
        assert self._plan.cells is not None and isinstance(self.record, LayoutRecord)  # noqa: S101, PT018 - for the type checker
        routed = [row for row in rows if not self._everything[row]]
        efforts = self._plan.efforts
        if efforts is None:
            efforts = np.full(self._plan.cells.shape, self._plan.effort or 0, dtype=np.int64)
        efforts = np.maximum(efforts, max(self._least, self.request.k))
        asked: dict[str, dict[int, int]] = {}
        for place, row in enumerate(routed):
            for cell, effort in zip(
                self._plan.cells[row].tolist(), efforts[row].tolist(), strict=True
            ):
                if cell >= 0:
                    here = asked.setdefault(self.record.home(cell), {})
                    here[place] = max(here.get(place, 0), effort)
        queries = self.request.queries[routed].tolist()
        found = graphs.candidates(asked, queries, self.request.k)
        return dict(zip(routed, found, strict=True))

    def requests(
        self,
        rows: range,
        *,
        outside: Outside,
        candidates: Mapping[int, set[Id]] | None = None,
    ) -> list[tuple[int, edge.QueryRequest]]:
        """Write the searches that answer some rows, those with the same filter together.

        ``candidates`` are the points to look at of each row's cells; None for all in them.
        """
        plan = self._plan
        if plan.cells is None or self.record is None:
            return [(row, self._one(row, self._params, self.request.filter)) for row in rows]
        full = [row for row in rows if self._everything[row]]
        routed = [row for row in rows if not self._everything[row]]
        asked = [
            (row, self._one(row, self._all or self._scan(row), self.request.filter)) for row in full
        ]
        if candidates is not None:
            overflow = in_cells(self.record, [OVERFLOW], outside)
            for row in routed:
                chosen = edge.Filter(must=[among([*candidates[row]])])
                asked += [(row, self._one(row, self._exact, chosen))] if candidates[row] else []
                if outside is not Outside.NOBODY:
                    asked.append((row, self._one(row, self._scan(row), overflow)))
            return asked
        if plan.rewritten is None:
            groups = group_by_cells(plan.cells[routed])
        else:  # the candidates are the best of all cells, so no search may be cut into several
            groups = [
                ([OVERFLOW, *sorted({c for c in plan.cells[row].tolist() if c >= 0})], [place])
                for place, row in enumerate(routed)
            ]
        for cells, places in groups:
            if outside is Outside.NOBODY:
                cells = [cell for cell in cells if cell != OVERFLOW]
                if not cells:
                    continue
            here = in_cells(self.record, cells, outside)
            condition = both(self.request.filter, here)
            asked += [
                (row, self._one(row, self._scan(row), condition))
                for row in (routed[place] for place in places)
            ]
        return asked

    def _one(
        self, row: int, params: edge.SearchParams | None, condition: edge.Filter | None
    ) -> edge.QueryRequest:
        request, rewritten = self.request, self._plan.rewritten
        original = self._nearest(request.queries[row])
        fields = [one for one in request.fields if not one.startswith(RESERVED)] or False
        if rewritten is None:
            return edge.QueryRequest(
                request.k, query=original, filter=condition, params=params, with_payload=fields
            )
        candidates = edge.Prefetch(
            max(self._plan.rescore, request.k),
            query=self._nearest(rewritten[row]),
            params=params,
            filter=condition,
        )
        return edge.QueryRequest(
            request.k,
            query=original,
            prefetches=[candidates],
            params=edge.SearchParams(exact=True),  # also means unquantised
            with_payload=fields,
        )

    def _nearest(self, vector: FloatArray) -> edge.Query:
        return edge.Query.Nearest(vector.tolist(), using=self._using)


def _search_params(asked: Mapping[str, Any]) -> edge.SearchParams | None:
    known = [name for name in dir(edge.SearchParams) if not name.startswith("_")]
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise InvalidInput(
            f"{unknown[0]!r} is not a search parameter of Qdrant Edge; it has {listed(known)}."
        )
    try:
        return edge.SearchParams(**asked) if asked else None
    except (TypeError, OverflowError) as exc:
        raise InvalidInput(f"Qdrant Edge cannot use the search parameters ({exc}).") from exc
