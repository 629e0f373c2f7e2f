"""A graph in every cell: shards beside a Qdrant Edge shard that say which of its points to look at.

The collection's own shard keeps every point, with its cells in its payload, and decides what is
answered and with which score. A shard of a cell holds the ids and vectors of its points once more,
with the sketches of the vectors, and only proposes candidates: what it still has of a point that
has moved, or gone, is looked up in vain. So nothing has to happen in one step, and whoever is
killed leaves a point without a cell at worst, which every search looks at.

Each shard is opened when it is first searched or written.

Importing this module needs the extra ``qdrant-edge``.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amips_plugins.adapters.qdrant.points import plain_id
from amips_plugins.collection import Id
from amips_plugins.errors import CollectionError, DatabaseUnreachable, require

if TYPE_CHECKING:
    import qdrant_edge as edge
else:
    edge = require("qdrant_edge", "qdrant-edge")

__all__ = ["CellGraphs", "graph_params"]

_SKETCH = "sketch"
_PAGE = 10_000
_KB_OF_A_GRAPH = 10  # cells with less are scanned
_GRAPH = {"m": 16, "ef_construct": 100}  # the engine's own


def graph_params(config: Mapping[str, Any], field: str) -> edge.EdgeVectorParams:
    """Return what the vectors of a cell are: the collection's, with a graph like the one it has."""
    vector = config["vectors"][field]
    own = vector.get("hnsw_config") or config.get("hnsw_config") or {}
    links, effort = (int(own.get(name) or default) for name, default in _GRAPH.items())
    datatype = vector.get("datatype")
    return edge.EdgeVectorParams(
        size=int(vector["size"]),
        distance=getattr(edge.Distance, str(vector["distance"])),
        datatype=getattr(edge.VectorStorageDatatype, str(datatype).capitalize())
        if datatype
        else None,
        hnsw_config=edge.HnswIndexConfig(links, effort, _KB_OF_A_GRAPH),
    )


class CellGraphs:
    """The shards of one layout's cells, by name.

    Parameters
    ----------
    folder
        Holds a folder for each of them; it need not be there.
    params
        Of the vectors.
    """

    def __init__(self, folder: Path, params: edge.EdgeVectorParams) -> None:
        self._folder = folder
        self._params = params
        self._open: dict[str, edge.EdgeShard] = {}
        self._lock = threading.Lock()

    @property
    def opened(self) -> list[str]:
        """The shards that are open."""
        return sorted(self._open)

    def names(self) -> list[str]:
        """Return the shards that there are."""
        if not self._folder.is_dir():
            return []
        return sorted(one.name for one in self._folder.iterdir() if one.suffix != ".new")

    def candidates(
        self, asked: Mapping[str, Mapping[int, int]], queries: Sequence[list[float]], k: int
    ) -> list[set[Id]]:
        """Return, for every query, ids that are the best of one of the shards that it asks.

        ``asked`` has, by shard, the rows of the queries, and with which ef.
        """
        found: list[set[Id]] = [set() for _ in queries]
        for name, rows in asked.items():
            shard = self._shard(name)
            if shard is None:
                continue
            requests = [
                edge.QueryRequest(
                    k,
                    query=edge.Query.Nearest(queries[row]),
                    params=edge.SearchParams(hnsw_ef=effort),
                )
                for row, effort in rows.items()
            ]
            answers = (
                [shard.query(requests[0])]
                if len(requests) == 1
                else shard.query_batch(edge.QueryBatchRequest(requests))
            )
            for row, points in zip(rows, answers, strict=True):
                found[row].update(plain_id(one.id) for one in points)
        return found

    def put(
        self,
        ids: Sequence[Id],
        vectors: Sequence[list[float]],
        sketches: Sequence[int],
        homes: Sequence[Sequence[str]],
    ) -> None:
        """Write points into the shards that each of them belongs to."""
        by_name: dict[str, list[edge.Point]] = {}
        for one, vector, sketch, names in zip(ids, vectors, sketches, homes, strict=True):
            for name in names:
                by_name.setdefault(name, []).append(edge.Point(one, vector, {_SKETCH: sketch}))
        for name, points in by_name.items():
            shard = self._shard(name) or self._create(name)
            shard.update(edge.UpdateOperation.upsert_points(points))

    def remove(self, ids: Sequence[Id], names: Iterable[str]) -> None:
        """Delete points from shards; those that are not there are none of its business."""
        for name in names:
            shard = self._shard(name) if ids else None
            if shard is not None:
                shard.update(edge.UpdateOperation.delete_points(list(ids)))

    def sketches(self, name: str) -> dict[Id, int | None]:
        """Return all points of a shard, with the sketches of the vectors that it has."""
        shard, found = self._shard(name), {}
        for record in () if shard is None else _all(shard):
            found[plain_id(record.id)] = (record.payload or {}).get(_SKETCH)
        return found

    def optimize(self) -> None:
        """Build the graphs that are not whole: whoever wrote to a shard may have been killed."""
        for name in self.names():
            shard = self._shard(name)
            if shard is not None:
                shard.optimize()

    def flush(self) -> None:
        """Bring to the disk what only logs hold."""
        for shard in list(self._open.values()):
            shard.flush()

    def close(self) -> None:
        """Close those that are open; each opens again when it is used."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def _shard(self, name: str) -> edge.EdgeShard | None:
        found = self._open.get(name)
        if found is not None:
            return found
        with self._lock:
            if name not in self._open and (self._folder / name).is_dir():
                self._open[name] = _load(self._folder / name)
            return self._open.get(name)

    def _create(self, name: str) -> edge.EdgeShard:
        """Create a shard under another name: what is killed meanwhile must not look like one."""
        made = self._folder / f"{name}.new"
        shutil.rmtree(made, ignore_errors=True)
        config = edge.EdgeConfig(
            vectors=self._params,
            optimizers=edge.EdgeOptimizersConfig(
                default_segment_number=1, indexing_threshold=_KB_OF_A_GRAPH
            ),
            max_search_threads=1,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        edge.EdgeShard.create(str(made), config).close()
        made.rename(self._folder / name)
        shard = self._shard(name)
        assert shard is not None  # noqa: S101 - for the type checker
        return shard


def _load(folder: Path) -> edge.EdgeShard:
    try:
        return edge.EdgeShard.load(str(folder))
    except Exception as exc:  # the engine knows no other class
        if "WouldBlock" not in str(exc):
            raise CollectionError(
                f"The shard of a cell in {str(folder)!r} cannot be opened ({exc}). Remove this "
                "folder, and run `amips backfill --verify`: it writes the cell's keys anew."
            ) from exc
        raise DatabaseUnreachable(
            f"The shard of a cell in {str(folder)!r} is open elsewhere: a collection object that "
            "used it is not closed; close it, before its shard is opened again."
        ) from exc


def _all(shard: edge.EdgeShard) -> Iterator[edge.Record]:
    offset: Any = None
    while True:
        request = edge.ScrollRequest(offset=offset, limit=_PAGE, with_payload=[_SKETCH])
        records, offset = shard.scroll(request)
        yield from records
        if offset is None:
            return
